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

_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_LOADED = re.compile(r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//[^"]*"|'
                     r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(?:https?:)?//[^"]*"'
                     r'|@import\s|url\((?:https?:)?//')  # fmt: skip
_ROLE = re.compile(r":(math|func|class|mod|meth):`([^`]+)`")


# ---- links out of docs/ --------------------------------------------------------------------------


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside of docs/: Markdown as a page, text as a page that shows it."""
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        uri, text = waiting.pop()
        for match in _LINK.finditer(text):
            path = _in_repository(uri, match[2])
            if path is None or files.get_file_from_path(_page_of(path)) is not None:
                continue
            source = ROOT / path
            if source.suffix in (".png", ".svg", ".json"):
                file = File.generated(config, _page_of(path), abs_src_path=str(source))
            else:
                shown = source.read_text()
                if source.suffix == ".md":
                    waiting.append((_page_of(path), shown))
                else:
                    kind = {".h": "cpp", ".cu": "cpp", ".cuh": "cpp"}.get(
                        source.suffix, source.suffix[1:]
                    )
                    shown = f"# {path}\n\n```{kind}\n{shown.rstrip()}\n```\n"
                file = File.generated(config, _page_of(path), content=shown)
            files.append(file)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to where these stand among the pages."""
    here = page.file.src_uri

    def relink(match: re.Match[str]) -> str:
        path = _in_repository(here, match[2])
        if path is None:
            return match[0]
        there = posixpath.relpath(_page_of(path), posixpath.dirname(here) or ".")
        return f"{match[1]}{there}{match[3] or ''}"

    return _LINK.sub(relink, markdown)


def _in_repository(uri: str, target: str) -> str | None:
    """The path in the repository of a file that a page links to; None: it is none, or in docs/."""
    if ":" in target or target.startswith("/"):
        return None
    inside = uri.startswith(REPOSITORY + "/")
    folder = posixpath.dirname(uri.removeprefix(REPOSITORY + "/") if inside else f"docs/{uri}")
    path = posixpath.normpath(posixpath.join(folder, target))
    if path.startswith("docs/") and not path.endswith(".py"):
        return None
    return path if (ROOT / path).is_file() else None


def _page_of(path: str) -> str:
    shown = Path(path).suffix in (".md", ".png", ".svg", ".json")
    return f"{REPOSITORY}/{path}" if shown else f"{REPOSITORY}/{path}.md"


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
