"""docs/adding.md, followed to the letter: its snippets add a loss whose tests pass."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedloss
from fusedloss._toolkit import Toolkit, find_toolkit
from fusedloss.custom import building

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding.md"
BUILD = (
    ROOT / "build" / f"{sys.implementation.cache_tag}-{platform.machine()}-torch{torch.__version__}"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGE.is_file(), reason="no docs/ here"),
]

# A sentence that names file and place, and the code that goes there.
SNIPPET = re.compile(
    r"^In `(?P<file>[^`]+)`, (?P<side>before|after) `(?P<line>[^`]+)`:\n\n"
    r"```\w*\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
COMMAND = re.compile(r"^(?P<variables>(?:\w+=\w+ )*)python -m (?P<pytest>pytest .*)$", re.MULTILINE)


def insert(tree: Path, snippet: re.Match[str]) -> None:
    """Puts the code beside the one line of its file that begins as the page says."""
    path = tree / snippet["file"]
    lines = path.read_text().splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if line.strip().startswith(snippet["line"])]
    assert len(found) == 1, f"{snippet['file']}: {len(found)} lines begin with {snippet['line']}"
    lines.insert(found[0] + (snippet["side"] == "after"), snippet["code"])
    path.write_text("".join(lines))


def source_of(path: Path) -> Path:
    """What an object file of the build was compiled from."""
    inside = path.relative_to(BUILD)
    if inside.parts[0] == "cuda":
        return ROOT / "csrc" / inside.with_suffix(".cu")
    return ROOT.joinpath(*inside.parts[inside.parts.index("csrc") :]).with_suffix(".cpp")


def build(tree: Path) -> None:
    """The extension of ``tree``, with the baseline kernels only.

    The sources that expand the list of losses are compiled, without optimization to save time. All
    others compile to the same code as in this checkout, whose object files are linked: CUDA kernels
    too, which lack the loss, and which no command of the page runs.
    """
    compiler = building.find_compiler()
    flags = ["-std=c++20", "-O0", "-w", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}"]
    libraries += [f"-l{name}" for name in ("c10", "torch", "torch_cpu", "torch_python")]
    if cuda := fusedloss.info().build["cuda"]:
        toolkit = find_toolkit()
        assert isinstance(toolkit, Toolkit), toolkit
        flags += [f'-DFUSEDLOSS_CUDA="{cuda}"', *(f"-I{path}" for path in toolkit.includes)]
        libraries += [f"-L{path}" for path in toolkit.libraries]
        libraries += ["-lc10_cuda", "-ltorch_cuda", "-lcudart"]
    compiled = []
    for source in ("csrc/losses.cpp", "csrc/cpu/pointwise.cpp"):
        assert "FUSEDLOSS_POINTWISE_LOSSES(" in (tree / source).read_text()
        compiled.append(tree / Path(source).with_suffix(".o").name)
        subprocess.run([compiler, *flags, "-c", tree / source, "-o", compiled[-1]], check=True)
    replaced = {BUILD / "csrc" / "losses.o", BUILD / "DEFAULT" / "csrc" / "cpu" / "pointwise.o"}
    others = []
    for path in sorted({*BUILD.rglob("*.o")} - replaced):
        source = source_of(path)
        # A build folder keeps the objects of sources that are gone, and of another build.
        if source.exists() and (cuda or not (source.suffix == ".cu" or source.stem == "cuda")):
            others.append(path)
    library = Path(fusedloss.backends.extension.__file__).name
    command = [compiler, "-shared", *compiled, *others, *libraries]
    subprocess.run([*command, "-o", tree / "fusedloss" / library], check=True)


def test_the_page_adds_a_loss(tmp_path: Path, compiled: str) -> None:
    if not BUILD.is_dir():
        pytest.skip("there are no object files of a build")
    for name in ("csrc", "fusedloss", "tests", "bench", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    page = PAGE.read_text()
    snippets = list(SNIPPET.finditer(page))
    assert len(snippets) == len(re.findall("^```(?:cpp|py)$", page, re.MULTILINE)) > 0
    for snippet in snippets:
        insert(tmp_path, snippet)
    build(tmp_path)
    commands = list(COMMAND.finditer(page))
    assert len(commands) == 2
    for command in commands:
        variables = dict(word.split("=") for word in command["variables"].split())
        # Processes that the tests start import the copy too. Its loss is in the baseline kernels.
        variables |= {"PYTHONPATH": str(tmp_path), "ATEN_CPU_CAPABILITY": "default"}
        variables |= {"FUSEDLOSS_REQUIRE_COMPILED": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command["pytest"]), "-q", "--tb=short"],
            cwd=tmp_path,
            env={**os.environ, **variables},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
