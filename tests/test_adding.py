"""docs/adding.md: each of its snippets stands in the file that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="no docs/ here")

# A sentence that names a file, and the code that stands there.
SNIPPET = re.compile(
    r"^In `(?P<file>[^`]+)`:\n\n```\w*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def test_the_page_quotes_the_code() -> None:
    page = PAGE.read_text()
    snippets = list(SNIPPET.finditer(page))
    assert len(snippets) == len(re.findall("^```(?:cpp|py)$", page, re.MULTILINE)) > 0
    for snippet in snippets:
        file, code = ROOT / snippet["file"], snippet["code"]
        assert code in file.read_text(), f"{snippet['file']} has no such lines:\n{code}"
    # All places that know the loss but the pages, the bench, and tables that name no others.
    quoted = {snippet["file"] for snippet in snippets}
    for folder in ("csrc", "fusedloss"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py") and path.is_file():
                named = re.search(
                    r"\b(soft_margin_loss|SoftMargin|SoftMarginLoss)\b", path.read_text()
                )
                assert not named or str(path.relative_to(ROOT)) in quoted, path
