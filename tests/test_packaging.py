"""The version is in one place, and a wheel requires the torch that it was built against."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch as installed

import fusedloss

ROOT = Path(__file__).parent.parent


def test_version_stands_in_one_place() -> None:
    version = fusedloss.__version__
    build = fusedloss.info().build
    assert build.get("version", version) == version
    changes = ROOT / "CHANGELOG.md"
    if not changes.exists():
        return  # the tests of an installed package
    newest = re.search(r"^## (\S+)", changes.read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == version
    stated = [
        path.name
        for path in ROOT.glob("*.*")
        if path.suffix in (".py", ".toml", ".yml", ".in") and f'"{version}"' in path.read_text()
    ]
    assert stated == []


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """setup.py's definitions, without the rest of the file's effects."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    # It adds to both.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("torch", "command", "compiled", "asks"),
    [
        ("2.14.1+cu130", "bdist_wheel", True, "torch==2.14.1"),
        ("2.14.1", "bdist_wheel", False, "torch<2.16,>=2.11"),
        ("2.14.1", "sdist", True, "torch<2.16,>=2.11"),
        ("2.10.0", "egg_info", True, "torch<2.16,>=2.11"),
        (None, "egg_info", True, "torch<2.16,>=2.11"),
    ],
)
def test_requirement_of_torch(
    build: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    torch: str | None,
    command: str,
    compiled: bool,
    asks: str,
) -> None:
    def version(name: str) -> str:
        if torch is None:
            raise metadata.PackageNotFoundError(name)
        return torch

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    assert build["torch_requirement"](compiled) == asks


def test_chosen_capabilities(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    known = build["CPU_CAPABILITIES"]
    known.update(AVX2=["-mavx2"], AVX512=["-mavx512f"])
    wanted: Callable[[], list[str]] = build["wanted_capabilities"]
    assert wanted() == ["DEFAULT", "AVX2", "AVX512"]
    for chosen, names in (
        ("", ["DEFAULT"]),
        ("AVX512", ["DEFAULT", "AVX512"]),
        ("AVX2;DEFAULT", ["DEFAULT", "AVX2"]),
    ):
        monkeypatch.setenv("FUSEDLOSS_CPU_CAPABILITIES", chosen)
        assert wanted() == names
    monkeypatch.setenv("FUSEDLOSS_CPU_CAPABILITIES", "AVX2;AVX3")
    with pytest.raises(SystemExit, match="'AVX2;AVX3': the names are DEFAULT, AVX2, AVX512"):
        wanted()


def test_cpu_kernels_stand_alone() -> None:
    """The objects of csrc/cpu, of every capability, name nothing of torch's or Python's."""
    tag = f"{sys.implementation.cache_tag}-{platform.machine()}-torch{installed.__version__}"
    found = sorted((ROOT / "build" / tag).glob("*/csrc/cpu/*.o"))
    # A build folder keeps the objects of sources that are gone.
    objects = [path for path in found if (ROOT / "csrc" / "cpu" / f"{path.stem}.cpp").exists()]
    nm = shutil.which("nm")
    if not objects or nm is None:
        pytest.skip("there are no object files, or there is no nm")
    for path in objects:
        done = subprocess.run([nm, "-C", path], capture_output=True, text=True, check=True)
        assert "fusedloss::cpu::" in done.stdout, path
        foreign = re.findall(r".*\b(?:(?:torch|c10|at)::|_?Py[A-Z_]).*", done.stdout)
        assert not foreign, f"{path}: {foreign[:5]}"
