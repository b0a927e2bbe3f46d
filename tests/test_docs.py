"""The pages say what the code does: snippets run, messages are explained, figures are measured."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

# Tests of an installed package have no pages beside them.
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="no docs/ here")

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SNIPPET = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\n+```text\n(?P<output>.*?)^```$)?", re.DOTALL | re.MULTILINE
)


# ---- snippets ------------------------------------------------------------------------------------


@pytest.fixture
def one_process_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", **address}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("compiled", "one_process_of_torchrun")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace per page; the output below a snippet is what it prints."""
    # Traces like the default backend, without half a minute of C++ compiling.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": page.stem}
    for snippet in SNIPPET.finditer(text):
        # The line numbers of an error are the page's.
        before = "\n" * (text[: snippet.start("code")].count("\n"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(before + snippet["code"], str(page), "exec"), namespace)  # noqa: S102
        if snippet["output"] is not None:
            assert printed.getvalue() == snippet["output"], f"{page.name}: {snippet['code']}"


# ---- language ------------------------------------------------------------------------------------

ROOMS = ("docs", "tests", "bench", "examples", "csrc", "fusedloss", ".ci")
SOURCES = {".md", ".py", ".h", ".cpp", ".cu", ".cuh", ".yml", ".toml", ""}  # "": Makefile, scripts
# Awkward wordings. CONTRIBUTING.md asks for plain English instead.
AWKWARD = re.compile(r"(?://|#) Of [a-z]|\bone.s own\b|\bto be[.;:]|\b(?:is|are) to be$")


def test_sentences_are_whole() -> None:
    files = [path for path in ROOT.iterdir() if path.suffix in SOURCES and path.is_file()]
    for room in ROOMS:
        files += [path for path in (ROOT / room).rglob("*") if path.suffix in SOURCES]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(files)
        # The results of earlier runs stay as they were printed; the pattern itself is in this file.
        if path.is_file() and "results" not in path.parts and path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if AWKWARD.search(line)
    ]
    assert not found, "\n".join(found)


# ---- messages ------------------------------------------------------------------------------------
# A message as in its source: the constant texts between the parts that vary.

Message = tuple[str, ...]


def _texts(node: ast.expr) -> Message:
    """The constant texts of a string, in order; empty if the expression is not a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return (node.value,)
    if isinstance(node, ast.JoinedStr):
        return tuple(part.value for part in node.values if isinstance(part, ast.Constant))
    return ()


# Functions that return a message, or a tuple with one.
_GIVE_REASONS = {
    *("_load", "no_extension", "torch_does_not_import", "find_toolkit", "find_nvrtc", "_why_left"),
    *("why_not_fused", "_why_not_fused", "_result_dtype"),
    *("_unfit", "_unfit_elements", "_unfit_rows", "prepared"),
    *("_unfit_custom_rows", "_dtype_of_rows"),
    *("instead_of", "_shown"),
}
_GIVE_ERRORS = {"_explained", "_unknown"}  # functions that return an exception
_SAY = {"warnings.warn", "_caller.warn", "sys.exit", "print"}


def python_messages(path: Path) -> Iterator[Message]:
    """The messages of a file: errors, warnings and reasons."""
    tree = ast.parse(path.read_text())
    constants = {
        node.targets[0].id: _texts(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    said: list[ast.expr] = []
    for node in ast.walk(tree):
        match node:
            case ast.Raise(exc=ast.Call(args=[first, *_])):
                said.append(first)
            case ast.Call(func=ast.Name(id="_report"), args=[_, reason, *_]):
                said.append(reason)
            case ast.Call(func=function, args=[first, *_]) if ast.unparse(function) in _SAY:
                said.append(first)
            case ast.Assign(targets=[ast.Name(id="reason" | "unfit")], value=value):
                said.append(value)
            case ast.FunctionDef(name=name) if name in _GIVE_ERRORS:
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and isinstance(inner.value, ast.Call):
                        said += inner.value.args[:1]
            case ast.FunctionDef(name=name) if name in _GIVE_REASONS:
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        parts = inner.value
                        said += parts.elts if isinstance(parts, ast.Tuple) else [parts]
    for either in said:
        if isinstance(either, ast.IfExp):
            said += [either.body, either.orelse]
    for expression in said:
        name = expression.id if isinstance(expression, ast.Name) else None
        texts = constants.get(name, ()) if name else _texts(expression)
        if any(re.search(r"[A-Za-z]{2}", text) for text in texts):
            yield texts


def _arguments(code: str, start: int) -> list[str]:
    """The arguments of the macro whose parenthesis opens at ``start``."""
    arguments, depth, begin = [], 0, start + 1
    tokens = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|[(\[{]|[)\]}]|,')
    for token in tokens.finditer(code, start):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        if depth == 0 or (token[0] == "," and depth == 1):
            arguments.append(code[begin : token.start()].strip())
            begin = token.end()
        if depth == 0:
            return arguments
    raise AssertionError(f"no end: {code[start : start + 80]}")


def cpp_messages(path: Path) -> Iterator[Message]:
    """The messages of a file's TORCH_CHECKs, TORCH_WARNs and standard exceptions."""
    code = path.read_text()
    for thrown in re.finditer(r"\bthrow std::\w+\(", code):
        (said,) = _arguments(code, thrown.end() - 1)
        yield tuple(re.findall(r'"((?:[^"\\]|\\.)*)"', said))
    for macro in re.finditer(r"\bTORCH_(CHECK\w*|WARN\w*)\(", code):
        arguments = _arguments(code, macro.end() - 1)
        said = arguments if macro[1].startswith("WARN") else arguments[1:]
        literals = ("".join(re.findall(r'"((?:[^"\\]|\\.)*)"', text)) for text in said)
        texts = tuple(
            literal for text, literal in zip(said, literals, strict=True) if text[0] == '"'
        )
        assert texts, f"{path.name}: a check without a message: {arguments}"
        yield texts


def messages() -> dict[str, Message]:
    found = {}
    for path in [ROOT / "setup.py", *sorted((ROOT / "fusedloss").rglob("*.py"))]:
        for message in python_messages(path):
            found[f"{path.name}: {'…'.join(message)}"] = message
    for path in sorted((ROOT / "csrc").rglob("*.cpp")):
        for message in cpp_messages(path):
            found[f"{path.name}: {'…'.join(message)}"] = message
    return found


@functools.cache
def _explained() -> str:
    """The messages on the page: its lines of indented code, one message per line."""
    lines = (DOCS / "troubleshooting.md").read_text().splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith("    "))


def test_every_message_is_explained() -> None:
    """The page has each message of the source, with examples for the parts that vary."""
    found = messages()
    assert len(found) > 25
    unexplained = [
        where
        for where, message in found.items()
        if not re.search(".*".join(re.escape(text.strip()) for text in message), _explained())
    ]
    assert not unexplained, "not in docs/troubleshooting.md:\n" + "\n".join(unexplained)


def test_every_explained_message_exists() -> None:
    """The page has no message that is gone from the source."""
    patterns = [".*".join(map(re.escape, message)) for message in messages().values()]
    source = "\n".join(
        path.read_text()
        for path in [ROOT / "setup.py", *(ROOT / "fusedloss").rglob("*.py")]
    )  # fmt: skip
    stale = [
        line
        for line in _explained().splitlines()
        if not any(re.search(pattern, line) for pattern in patterns)
        # Reasons that explain() and info() give are text in the source, or begin with one.
        and line not in source
    ]
    assert not stale, stale


# ---- figures -------------------------------------------------------------------------------------


@pytest.fixture
def numerics() -> ModuleType:
    for package in ("tqdm", "tabulate", "matplotlib", "sklearn"):
        pytest.importorskip(package)
    return importlib.import_module("bench.numerics")


def test_what_the_numerics_page_says_of_its_figures(numerics: ModuleType) -> None:
    """test_bench.py checks that the figures are those of the JSON."""
    results = json.loads((numerics.report.RESULTS / "cpu" / "numerics.json").read_text())
    covered = {(row["loss"], row["dtype"]) for row in results["rows"]}
    assert len(covered) == len(results["rows"]) == len(numerics.LOSSES) * len(numerics.DTYPES)
    for row in results["rows"]:
        for column, error in row["ours"].items():
            above = (row["loss"], row["dtype"], column) == ("log_loss", "float64", "element")
            assert error < row["torch"][column] + (0.2 if above else 0.02), row
            if row["dtype"] in ("bfloat16", "float16"):
                assert error < 0.505, row
    for row in results["hard"]:
        for column, error in row["ours"].items():
            assert error < max(row["torch"][column], 1) + 0.02, row


def test_numerics_of_hard_inputs(numerics: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truths are true: ours and torch's are never both far off."""
    monkeypatch.setattr(numerics, "EQUAL", 2**10)
    monkeypatch.setattr(numerics, "MANY_CLASSES", 100)
    rows = numerics.measure_hard()
    assert len(rows) == sum(len(hard.dtypes) for hard in numerics.HARD)
    # Confident rows: x - max is between 32 and 64, and half its last place is up to 32 ULP of its
    # exponential.
    for row in rows:
        for column in ("element", "mean"):
            assert min(row["ours"][column], row["torch"][column]) < 32, row
    text = numerics.figures.errors({"hard": rows}, "hard")
    assert text.count("\n") == len(rows) + 4
    assert "| confident rows | `cross_entropy` | bfloat16 | 0.50 |" in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_ulp_is_one_unit_in_the_last_place(numerics: ModuleType, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for truth, spacing in (
        (1.0, info.eps),
        (3.0, 2 * info.eps),
        (0.0, info.smallest_normal * info.eps),
    ):
        exact = torch.tensor([truth], dtype=dtype)
        assert numerics.ulps(exact, numerics.wide(exact)) == 0
        assert numerics.ulps(exact + spacing, numerics.wide(exact)) == 1
