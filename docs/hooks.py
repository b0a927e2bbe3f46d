"""What `make docs` adds to MkDocs: files of the repository, formulas without a script, and roles.

Formulas become MathML when the pages are built. A page that would load anything from another
server stops the build.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Where the files of the repository stand among the pages.
REPOSITORY = "repository"
_AS_THEY_ARE = (".png", ".svg", ".json")

_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_LOADED = re.compile(r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//[^"]*"|'
                     r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(?:https?:)?//[^"]*"'
                     r'|@import\s|url\((?:https?:)?//')  # fmt: skip
_ROLE = re.compile(r":(math|func|class|mod|meth):`([^`]+)`")


# ---- links out of docs/ --------------------------------------------------------------------------


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside of docs/: Markdown as a page, text as a page that shows
    it."""
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        here, text = waiting.pop()
        for match in _LINK.finditer(text):
            path = _in_repository(here, match[2])
            if path is None or files.get_file_from_path(_among_pages(path)) is not None:
                continue
            source = ROOT / path
            if source.suffix in _AS_THEY_ARE:
                file = File.generated(config, _among_pages(path), abs_src_path=str(source))
            else:
                shown = source.read_text()
                if source.suffix == ".md":
                    waiting.append((_among_pages(path), shown))
                else:
                    kind = "cpp" if source.suffix in (".h", ".cu", ".cuh") else source.suffix[1:]
                    shown = f"# {path}\n\n```{kind}\n{shown.rstrip()}\n```\n"
                file = File.generated(config, _among_pages(path), content=shown)
            files.append(file)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to where these stand among the pages."""
    here = page.file.src_uri

    def relink(match: re.Match[str]) -> str:
        path = _in_repository(here, match[2])
        if path is None:
            return match[0]
        there = posixpath.relpath(_among_pages(path), posixpath.dirname(here) or ".")
        return f"{match[1]}{there}{match[3] or ''}"

    return _LINK.sub(relink, markdown)


def _in_repository(here: str, target: str) -> str | None:
    """The path in the repository of a file that a page links to; None: it is no such file."""
    folder = posixpath.dirname(here)
    if folder == REPOSITORY or folder.startswith(REPOSITORY + "/"):
        folder = folder[len(REPOSITORY) + 1 :]
    else:
        folder = posixpath.join("docs", folder)
    path = posixpath.normpath(posixpath.join(folder, target))
    return path if (ROOT / path).is_file() else None


def _among_pages(path: str) -> str:
    """Where a file of the repository stands among the pages."""
    suffix = Path(path).suffix
    if path.startswith("docs/") and suffix != ".py":
        return path.removeprefix("docs/")
    return f"{REPOSITORY}/{path}" + ("" if suffix in (".md", *_AS_THEY_ARE) else ".md")


# ---- formulas ------------------------------------------------------------------------------------


def on_page_content(content: str, **_: Any) -> str:
    def as_mathml(match: re.Match[str]) -> str:
        display = "inline" if match[2] == "(" else "block"
        return convert(html.unescape(match[3]), display=display)

    return _FORMULA.sub(as_mathml, content)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    loaded = _LOADED.search(output)
    if loaded:
        raise PluginError(f"{page.file.src_uri} would load {loaded[0]!r} from another server")
    return output


# ---- docstrings ----------------------------------------------------------------------------------


class Roles(griffe.Extension):
    """Sphinx's roles, as docstrings have them, in Markdown: formulas, and links to what is here."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_role, obj.docstring.value)


def _role(match: re.Match[str]) -> str:
    role, text = match[1], match[2]
    if role == "math":
        return rf"\({' '.join(text.split())}\)"
    if text.startswith("fusedloss."):
        return f"[`{text}`][{text}]"
    return f"`{text}`"
