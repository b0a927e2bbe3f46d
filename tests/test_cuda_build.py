"""The CUDA kernels as machine code, where they were built, and those of custom losses, where there
is an nvcc: what a GPU would be given to run.

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
import torch

import fusedloss
from custom_losses import charbonnier, focal, gaussian_kl
from fusedloss._toolkit import find_toolkit
from fusedloss.custom import PointwiseLoss
from fusedloss.custom.building import CUDA

REQUIRED = os.environ.get("FUSEDLOSS_REQUIRE_CUDA") == "1"

# The kernels whose bandwidth counts: 16 bytes per access, and no spilled registers. By parts of
# their demangled names; kernels for double do not count.
HOT = {
    "pointwise": r"::pointwise_vectorized<fusedloss::\w+, (?!double)[\w:]+, true>",
    "contiguous rows": r"::rows_contiguous<.*CrossEntropyRow<(?!double)[\w:]+, true>, .*Scope\)\d>",
    "strided rows": r"::rows_strided<.*CrossEntropyRow<(?!double)[\w:]+, true>, true>",
    "class probabilities": r"::rows_contiguous<.*ProbabilitiesRow<(?!double)[\w:]+>, .*Scope\)\d>",
    "strided rows in shared memory": r"::rows_strided_smem<",
}


def _cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def need(wanted: object, reason: str) -> None:
    """Skips the test if something is missing, or fails it if FUSEDLOSS_REQUIRE_CUDA=1."""
    if wanted:
        return
    if REQUIRED:
        pytest.fail(f"FUSEDLOSS_REQUIRE_CUDA=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def built() -> str:
    """The extension's file, if it has CUDA kernels."""
    cuda = fusedloss.info().build.get("cuda")
    need(cuda not in (None, "emulated"), "the extension was built without CUDA kernels")
    extension = fusedloss.backends.extension
    assert extension is not None and extension.__file__ is not None
    return extension.__file__


def _dump(file: str, *options: str) -> str:
    tool = _cuobjdump()
    need(tool, "there is no cuobjdump")
    assert tool is not None
    command = [tool, *options, file]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def machine_code(file: str, architecture: str) -> dict[str, list[str]]:
    """The instructions of each kernel, by its demangled name."""
    kernels: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in _dump(file, "-sass", "-arch", architecture).splitlines():
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
def test_hot_kernels(kind: str, architecture: str, built: str) -> None:
    # Three dtypes of each; eight losses, and three groups of threads that share a row.
    count = {"pointwise": 27, "contiguous rows": 9, "class probabilities": 9}.get(kind, 3)
    check_kernels(built, architecture, HOT[kind], count)


def check_kernels(file: str, architecture: str, kind: str, count: int) -> None:
    """Each hot kernel reads and writes 16 bytes at a time and spills no register."""
    kernels = machine_code(file, architecture).items()
    found = {name: code for name, code in kernels if re.search(kind, name)}
    assert len(found) == count, list(found)
    for name, code in found.items():
        text = "\n".join(code)
        for access in (r"LDG\.E\.128|LDGSTS\S*\.128", r"STG\.E\.128"):
            assert re.search(access, text), f"{name}: no {access}"
        spills = re.findall(r"\b(?:LDL|STL)\S*", text)
        assert not spills, f"{name}: {len(spills)} accesses to local memory"


def inner_loops(code: list[str]) -> list[list[str]]:
    """The instructions of each loop without another one inside; an instruction has 16 bytes."""
    jumps = [re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction) for instruction in code]
    ends = [(int(jump[1], 16) // 16, i) for i, jump in enumerate(jumps) if jump]
    loops = [(first, last) for first, last in ends if first <= last]
    return [
        code[first : last + 1]
        for first, last in loops
        if not any(first <= a and b <= last for a, b in loops if (a, b) != (first, last))
    ]


def instructions_per_class(code: list[str], dtype: str) -> tuple[float, float]:
    """... and exponentials, in the three walks over a row's vectors in shared memory: for the
    maximum, the sum and the gradient. Each is unrolled, and has a shorter loop for the rest."""
    walks: dict[str, tuple[int, int, int]] = {}
    for loop in inner_loops(code):
        loads = sum(
            int(found[1]) // 64
            for instruction in loop
            if (found := re.search(r"LDS\.(64|128)", instruction))
        )
        stores = sum("STG.E.128" in instruction for instruction in loop)
        exponentials = sum("MUFU.EX2" in instruction for instruction in loop)
        kind = "gradient" if stores else "sum" if exponentials else "maximum"
        if loads and not any(re.search(r"SHFL|LDG\.|ATOM", instruction) for instruction in loop):
            size = 4 if dtype == "float" else 8
            classes = {"gradient": stores * size, "sum": exponentials, "maximum": loads * size // 2}
            found_walk = classes[kind], len(loop), exponentials
            walks[kind] = max(walks.get(kind, found_walk), found_walk)
    assert set(walks) == {"maximum", "sum", "gradient"}, walks
    return (
        sum(count / classes for classes, count, _ in walks.values()),
        sum(exponentials / classes for classes, _, exponentials in walks.values()),
    )


# Kernels whose loops over a row's classes are counted: instructions and exponentials per class, of
# float and of the two-byte types. What is done once per row is not among them.
COUNTED = {
    "class probabilities": {"float": (40, 2), "two bytes": (23, 2)},
    "strided rows in shared memory": {"float": (20.5, 1), "two bytes": (17, 2)},
}


@pytest.mark.parametrize("kind", COUNTED)
def test_instructions_per_class(kind: str, built: str) -> None:
    for name, code in machine_code(built, "sm_90").items():
        if re.search(HOT[kind], name):
            dtype = "float" if "Row<float" in name else "two bytes"
            instructions, exponentials = instructions_per_class(code, dtype)
            assert instructions <= COUNTED[kind][dtype][0], f"{name}: {instructions} per class"
            assert exponentials == COUNTED[kind][dtype][1], f"{name}: {exponentials} per class"


def test_ptx_for_later_devices(built: str) -> None:
    """A driver compiles the PTX for devices without machine code in the library."""
    listed = _dump(built, "-lptx") + _dump(built, "-ptx", "-arch", "sm_90")
    assert re.search(r"arch = sm_90\b", listed)


# ---- custom losses -------------------------------------------------------------------------------


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_toolkit()
    need(not isinstance(found, str), str(found))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")


@pytest.mark.slow
@pytest.mark.parametrize("loss", [charbonnier, gaussian_kl, focal], ids=lambda x: x.__name__)
def test_own_loss(loss: PointwiseLoss, nvcc: None, capfd: pytest.CaptureFixture[str]) -> None:
    found: list[tuple[str, str]] = []
    own = CUDA.library(loss.__name__, loss._struct)
    own.load(lambda *of: found.append(of))
    assert f"compiled {loss.__name__} for the GPU in " in capfd.readouterr().err
    for architecture in ("sm_80", "sm_90"):
        # Three dtypes with value and input's gradient; four with every other combination.
        for plain, count in (("true", 3), ("false", 4)):
            kind = rf"::pointwise_vectorized<fusedloss::.*Loss, [\w:]+, {plain}>"
            check_kernels(found[0][1], architecture, kind, count)
    own.load(lambda *of: found.append(of))
    assert found[1] == found[0]
    assert not capfd.readouterr().err


@pytest.mark.slow
def test_own_loss_loads(nvcc: None, built: str) -> None:
    """Beside the library for the CPU, which has another name."""
    charbonnier.compile("cuda")
    charbonnier.compile("cpu")
    assert charbonnier._keys["cuda"] != charbonnier._keys["cpu"]
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="no CPU kernel of the loss"):
        torch.ops.fusedloss.loss(
            x, x, None, [], charbonnier._keys["cuda"], [1.0, 1.0], 0, 1, x.dtype, None
        )
