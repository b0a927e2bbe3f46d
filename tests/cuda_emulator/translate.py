"""Rewrites the two things of CUDA C++ that no header can teach a C++ compiler.

``kernel<A><<<grid, block>>>(x)`` becomes ``emulator::configure(kernel<A>, grid, block)(x)``, and a
``__shared__`` variable a reference into its block's shared memory. Lines stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

SUFFIXES = {".cu", ".cuh", ".h", ".inc", ".cpp"}

_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_SHARED = re.compile(r"(extern\s+|static\s+)?__shared__\b([^;]*);")
_DECLARATION = re.compile(
    r"\s*(?:(?:__align__|alignas)\s*\([^()]*\)\s*)?(?P<type>[^=]*?)\s*\b(?P<name>\w+)\s*"
    r"(?P<extents>(?:\[[^][]*\]\s*)*)",
    re.DOTALL,
)
_BRACKETS = {")": "(", "]": "[", "}": "{"}


class TranslationError(Exception):
    pass


def blank(text: str) -> str:
    """The text with comments and strings blanked, each character in its place."""
    return _COMMENT_OR_STRING.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def _declared(match: re.Match[str]) -> str:
    storage, declaration = (match.group(1) or "").strip(), match.group(2)
    parts = _DECLARATION.fullmatch(declaration)
    if parts is None or not parts["type"] or "," in re.sub(r"<.*>|\[.*\]", "", declaration):
        raise TranslationError(f"one plain variable a declaration: __shared__{declaration};")
    kind, name, extents = parts["type"], parts["name"], parts["extents"].strip()
    lines = "\n" * declaration.count("\n")
    if storage == "extern":
        if re.sub(r"\s", "", extents) != "[]":
            raise TranslationError(f"not an array of unknown size: extern __shared__{declaration};")
        memory = "::emulator::dynamic_shared()"
        return f"{kind}* const {name} = static_cast<{kind}*>({memory});{lines}"
    kind = f"std::type_identity_t<{kind}{extents}>"
    memory = f"::emulator::static_shared(&{name}_key, sizeof({kind}))"
    return (
        f"static const char {name}_key = 0; "
        f"{kind}& {name} = *static_cast<{kind}*>({memory});{lines}"
    )


def _start_of_kernel(text: str, end: int) -> int:
    """Where the expression begins that names the kernel and ends at ``end``."""
    start = len(text[:end].rstrip())
    if text[start - 1 : start] == ">":
        depth = 0
        while start:
            start -= 1
            depth += (text[start] == ">") - (text[start] == "<")
            if not depth:
                break
    name = re.search(r"[\w:]+\s*\Z", text[:start])
    if name is None:
        raise TranslationError(f"no kernel before <<< in {text[max(0, end - 40) : end + 40]!r}")
    return name.start()


def _end_of_configuration(text: str, start: int) -> int:
    """The >>> that ends what a <<< before ``start`` begins."""
    open_brackets: list[str] = []
    for position in range(start, len(text)):
        character = text[position]
        if character in _BRACKETS.values():
            open_brackets.append(character)
        elif character in _BRACKETS:
            if not open_brackets or open_brackets.pop() != _BRACKETS[character]:
                break
        elif not open_brackets and text.startswith(">>>", position):
            return position
    raise TranslationError(f"no >>> after {text[start - 40 : start]!r}")


def translate(text: str) -> str:
    """CUDA C++ to C++ over the emulator's headers."""
    # Edits are made from the end, so that earlier positions hold.
    for match in reversed(list(_SHARED.finditer(blank(text)))):
        text = text[: match.start()] + _declared(match) + text[match.end() :]
    code = blank(text)
    edits: list[tuple[int, int, str]] = []
    for match in re.finditer("<<<", code):
        start = _start_of_kernel(code, match.start())
        end = _end_of_configuration(code, match.end())
        edits += [(start, start, "::emulator::configure("), (match.start(), match.end(), ", ")]
        edits.append((end, end + 3, ")"))
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def mirror(
    root: Path, folders: Iterable[Path], out: Path, changed: Mapping[Path, str] | None = None
) -> None:
    """Translates every source below the folders of root into the same place below out.

    ``changed`` holds texts to take instead of what the files hold, by their paths from root.
    """
    for folder in folders:
        for source in sorted((root / folder).rglob("*")):
            if source.suffix not in SUFFIXES:
                continue
            place = source.relative_to(root)
            text = translate((changed or {}).get(place) or source.read_text())
            target = out / place
            if not target.exists() or target.read_text() != text:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
