"""The galleries of docs/custom-losses.md and docs/losses-over-rows.md have the text that docs/gallery.py
writes; their losses are compared with independent formulas, in test_custom.py, test_row_losses.py and
here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from custom_losses import CASES, CustomCase
from row_losses import ROW_LOSSES

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_its_formula(fused: str, case: CustomCase) -> None:
    """With the default parameters, in float64; and check() finds nothing wrong."""
    parameters = case.loss._traced.defaults
    inputs = [t.requires_grad_() for t in case.sample(torch.float64)]
    ours, formula = case.loss(*inputs, reduction="none"), case.eager(*inputs, **parameters)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-13)
    for mine, right in zip(
        torch.autograd.grad(ours.sum(), inputs),
        torch.autograd.grad(formula.sum(), inputs, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-13)
    report = case.loss.check()
    assert report.ok, report


@pytest.mark.skipif(not DOCS.is_dir(), reason="no docs/ here")
def test_page_shows_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    gallery = importlib.import_module("gallery")
    walks = {case.loss: case.walks for case in ROW_LOSSES}
    tested = {case.loss for case in CASES} | walks.keys()
    for path, entries in gallery.GALLERIES.items():
        page = gallery.BLOCK.search(path.read_text())[1]
        assert page.count("\n### ") + 1 == len(entries)
        for entry in entries:
            assert entry.loss in tested
            about = page[page.index(f"### {entry.title}\n") :].partition("\n### ")[0]
            assert f"\n{entry.formula}\n" in about and f"\n{entry.use}\n" in about
            assert f"```python\n{gallery.definition(entry.loss)}\n" in about
            if entry.loss in walks:
                assert f"\nWalks over a row: {walks[entry.loss]}.\n" in about
            assert f"](gallery/{entry.picture})" in about
            assert f"\nSource: {entry.source}." in about
            assert 0 < (gallery.PICTURES / entry.picture).stat().st_size < 40_000


def test_what_is_masked_does_not_count(fused: str) -> None:
    masked = next(case for case in CASES if case.name == "masked_focal")
    x, y, mask = masked.sample(torch.float32, (9, 31))
    x[mask == 0] = torch.nan
    x.requires_grad_()
    value = masked.loss(x, y, mask)
    value.backward()
    assert value.isfinite() and x.grad is not None
    assert not x.grad[mask == 0].any() and x.grad[mask == 1].all()
