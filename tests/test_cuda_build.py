"""The CUDA kernels as machine code, where they were built: what a GPU would be given to run.

cuobjdump comes with the CUDA toolkit, and with Triton's package.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import fusedloss

REQUIRED = os.environ.get("FUSEDLOSS_REQUIRE_CUDA") == "1"

# Kernels that a bandwidth depends on: 16 bytes an access, and nothing spilled from registers. By
# what their names hold once demangled; a double is never in a hurry.
HOT = {
    "pointwise": r"::flat<fusedloss::\w+, (?!double)[\w:]+, true>",
    "rows of classes": r"::rows<(?!double)[\w:]+, .*Scope\)\d, true>",
    "classes apart": r"::columns<(?!double)[\w:]+, true, true>",
}


def _cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def _need() -> str:
    """cuobjdump, or the test ends: fails where FUSEDLOSS_REQUIRE_CUDA=1."""
    tool = _cuobjdump()
    cuda = fusedloss.info().build.get("cuda")
    if tool is not None and cuda not in (None, "emulated"):
        return tool
    reason = "no cuobjdump" if tool is None else "the extension was built without CUDA kernels"
    if REQUIRED:
        pytest.fail(f"FUSEDLOSS_REQUIRE_CUDA=1, but {reason}")
    pytest.skip(reason)


def _dump(*options: str) -> str:
    extension = fusedloss.backends.extension
    assert extension is not None
    command = [_need(), *options, extension.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def machine_code(architecture: str) -> dict[str, list[str]]:
    """The instructions of each kernel, by its demangled name."""
    kernels: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in _dump("-sass", "-arch", architecture).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found[1]
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            kernels[name].append(found[1])
    names = subprocess.run(
        ["c++filt"], input="\n".join(kernels), check=True, capture_output=True, text=True
    ).stdout.split("\n")
    return dict(zip(names, kernels.values(), strict=False))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", HOT)
def test_hot_kernels(kind: str, architecture: str) -> None:
    _need()
    found = {n: code for n, code in machine_code(architecture).items() if re.search(HOT[kind], n)}
    # Three dtypes of each; eight losses, and three groups of threads that share a row.
    assert len(found) == {"pointwise": 24, "rows of classes": 9, "classes apart": 3}[kind]
    for name, code in found.items():
        text = "\n".join(code)
        for access in ("LDG.E.128", "STG.E.128"):
            assert access in text, f"{name}: no {access}"
        spills = re.findall(r"\b(?:LDL|STL)\S*", text)
        assert not spills, f"{name}: {len(spills)} accesses to local memory"


def test_ptx_for_later_devices() -> None:
    """For devices that have no machine code here a driver compiles the PTX."""
    assert re.search(r"arch = sm_90\b", _dump("-lptx") + _dump("-ptx", "-arch", "sm_90"))
