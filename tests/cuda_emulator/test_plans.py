"""How a call over rows is laid over a GPU, most often one of the size of an H100."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import build
from engines import DTYPES
from translate import mirror

KIB_PER_SM = 228
SMEM_PER_SM = KIB_PER_SM << 10


class Plan(NamedTuple):
    kernel: str
    operands: int
    threads: int
    smem: int
    blocks: int
    held: int
    threads_per_row: int
    cluster: int
    stages: int


@cache
def program(tuned: str = "") -> Path:
    """tuned: what stands in the table of plans."""
    folder = build.OUT / "plans"
    mirror(build.ROOT, build.FOLDERS, folder, {Path("csrc/cuda/plans.inc"): f"{tuned}\n"})
    return build.build([Path("tests/cuda_emulator/plans.cpp")], "plain", folder)


def plan(
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
    probabilities: tuple[torch.dtype, Sequence[int], int] | None = None,
    kib_per_sm: int = KIB_PER_SM,
    max_cluster: int = 8,
    tuned: str = "",
) -> Plan:
    words: list[int] = [kib_per_sm, max_cluster, DTYPES.index(dtype), *shape, *strides]
    if probabilities is not None:
        of, their_strides, shift = probabilities
        words += [DTYPES.index(of), *their_strides, shift]
    result = build.run(program(tuned), *map(str, words))
    assert result.returncode == 0, result.stderr
    kernel, *numbers = result.stdout.split()
    return Plan(kernel, *map(int, numbers))


@pytest.mark.parametrize("absent", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_matrix(dtype: torch.dtype, absent: int) -> None:
    """Its rows are vectors, whatever the stride of the dimension that it lacks."""
    rows = 4096
    for classes, kernel in ((21, "strided_smem"), (100, "strided_vectorized")):
        found = plan(dtype, (rows, classes, 1), (1, rows, absent))
        assert found.kernel == kernel


@pytest.mark.parametrize(
    "dtype, most", [(torch.float32, 70), (torch.bfloat16, 68)], ids=["fp32", "bf16"]
)
def test_classes_that_fit_in_shared_memory(dtype: torch.dtype, most: int) -> None:
    """Three blocks of an SM have room for them."""
    for classes in (1, 2, most):
        found = plan(dtype, (2, classes, 1 << 16), (classes << 16, 1 << 16, 1))
        assert found.kernel == "strided_smem"
        assert 3 * found.smem <= SMEM_PER_SM
    assert plan(dtype, (2, most + 1, 64), ((most + 1) * 64, 64, 1)).kernel == "strided_vectorized"
    # Vectors of rows: an odd number of them, and of an odd stride.
    assert plan(dtype, (2, 21, 63), (21 * 63, 63, 1)).kernel == "strided"
    assert plan(dtype, (2, 21, 64), (21 * 65, 65, 1)).kernel == "strided"
    assert plan(torch.float64, (2, 21, 64), (21 * 64, 64, 1)).kernel == "strided"


@pytest.mark.parametrize("classes", [1024, 4096, 8192])
def test_probabilities_in_shared_memory(classes: int) -> None:
    def asked(of: torch.dtype, strides: Sequence[int], shift: int = 0) -> Plan:
        mine = (rows, classes, 1), (classes, 1, 1)
        return plan(torch.bfloat16, *mine, (of, strides, shift))

    rows = 1 << 14
    both = asked(torch.bfloat16, (classes, 1, 1))
    assert both.operands == 2
    assert both.smem >= 2 * 2 * classes  # logits and probabilities of a row
    assert SMEM_PER_SM // (both.smem + 4096) * both.threads >= 20 * 32
    assert asked(torch.bfloat16, (classes, 1, 1), 16).operands == 2
    for other in (
        asked(torch.float32, (classes, 1, 1)),
        asked(torch.bfloat16, (1, rows, 1)),
        asked(torch.bfloat16, (classes + 8, 1, 1)),
        asked(torch.bfloat16, (classes, 1, 1), 2),
    ):
        assert other.operands == 1


def test_probabilities_that_do_not_fit() -> None:
    """Logits alone may."""
    classes = 600_000
    strides = (classes, 1, 1)
    found = plan(torch.bfloat16, (4, classes, 1), strides, (torch.bfloat16, strides, 0))
    assert found.kernel == "cluster"
    assert found.operands == 1
    assert found.smem > 0


@pytest.mark.parametrize("kib_per_sm, warps", [(KIB_PER_SM, 24), (100, 9)])
def test_blocks_of_short_rows(kib_per_sm: int, warps: int) -> None:
    """Three or more on an SM, not one whose rows fill it."""
    for classes in (2500, 3001, 4095):
        mine = (1 << 15, classes, 1), (classes, 1, 1)
        found = plan(torch.bfloat16, *mine, kib_per_sm=kib_per_sm)
        assert found.kernel == "sub_warp"
        blocks = (kib_per_sm << 10) // (found.smem + 4096)
        assert blocks >= 3
        assert blocks * found.threads >= warps * 32


@pytest.mark.parametrize(
    "dtype, rows, classes, expected",
    [
        (torch.bfloat16, 8192, 128_256, ("cluster", 64, 8, 256, 2)),
        (torch.bfloat16, 16_384, 32_000, ("cluster", 64, 2, 256, 2)),
        (torch.bfloat16, 32_768, 4096, ("block", 64, 1, 64, 2)),
        (torch.bfloat16, 65_536, 1024, ("sub_warp", 64, 16, 256, 2)),
        (torch.bfloat16, 131_072, 256, ("sub_warp", 32, 8, 256, 2)),
        (torch.float32, 8192, 128_256, ("cluster", 64, 8, 256, 1)),
    ],
)
def test_held(dtype: torch.dtype, rows: int, classes: int, expected: tuple[object, ...]) -> None:
    """The shapes of the bench, on an H100: 512 threads of an SM hold 64 classes, or 768 hold 32."""
    found = plan(dtype, (rows, classes, 1), (classes, 1, 1))
    shared_by = found.threads_per_row if found.kernel == "sub_warp" else found.cluster
    assert (found.kernel, found.held, shared_by, found.threads, found.stages) == expected
    if found.kernel != "cluster":
        assert found.threads * found.blocks == {64: 512, 32: 768}[found.held] * 132


# GPUs with clusters and without; 100 KiB are as in sm_120 and sm_86.
@pytest.mark.parametrize("kib_per_sm", [KIB_PER_SM, 164, 100])
@pytest.mark.parametrize("max_cluster", [8, 4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_registers_hold(dtype: torch.dtype, max_cluster: int, kib_per_sm: int) -> None:
    most = 64 * 256 * max_cluster
    for classes in (*(8 << i for i in range(15)), 264, 520, 2056, 30_000, 128_256):
        found = plan(dtype, (1000, classes, 1), (classes, 1, 1), None, kib_per_sm, max_cluster)
        assert bool(found.held) == (classes <= most), classes
        assert found.smem <= (kib_per_sm - 5) << 10
        if found.held:
            threads = found.threads_per_row if found.kernel == "sub_warp" else found.threads
            assert threads * found.cluster * found.held >= classes


def test_rows_that_are_not_held() -> None:
    """No whole vectors, vectors that are not aligned, no room, doubles, or probabilities."""
    half = torch.bfloat16
    assert plan(half, (1000, 1000, 1), (1000, 1, 1)).held == 64
    assert plan(half, (1000, 1000, 1), (1008, 1, 1)).held == 64
    for found in (
        plan(half, (1000, 1001, 1), (1008, 1, 1)),
        plan(half, (1000, 1000, 1), (1001, 1, 1)),
        plan(half, (1000, 131_080, 1), (131_080, 1, 1)),
        plan(half, (1000, 1000, 1), (1 << 32, 1, 1)),
        plan(half, (1 << 31, 1000, 1), (1000, 1, 1)),
        plan(torch.float64, (1000, 1000, 1), (1000, 1, 1)),
        plan(half, (1000, 1000, 1), (1000, 1, 1), (half, (1000, 1, 1), 0)),
    ):
        assert found.held == 0


TUNED = "{90, 132, 5120, 2, 256, {64, 128, 256, 1}}, {90, 132, 5120, 2, 8192, {64, 64, 512, 2}},"


def test_tuned_plans() -> None:
    """They hold for their GPU, element size, and rows of up to so many classes and more than half
    as many."""
    half = torch.bfloat16

    def found(classes: int, dtype: torch.dtype = half, tuned: str = TUNED) -> Plan:
        return plan(dtype, (1 << 15, classes, 1), (classes, 1, 1), tuned=tuned)

    for classes in (136, 256):
        mine = found(classes)
        assert (mine.held, mine.threads_per_row, mine.threads, mine.stages) == (64, 4, 128, 1)
        assert mine.threads * mine.blocks == 256 * 132
    for classes in (5000, 8192):
        mine = found(classes)
        assert (mine.kernel, mine.held, mine.threads, mine.cluster) == ("cluster", 64, 64, 2)
    for other in (128, 264, 4096, 8200):
        assert found(other) == found(other, tuned="")
    assert found(256, torch.float16) == found(256)
    assert found(256, torch.float32) == found(256, torch.float32, tuned="")
    for gpu in ("80, 132, 5120", "90, 114, 5120", "90, 132, 6144"):
        assert found(256, tuned=TUNED.replace("90, 132, 5120", gpu)) == found(256, tuned="")


@pytest.mark.parametrize(
    "knobs", ["48, 128, 256, 1", "64, 96, 256, 1", "64, 512, 512, 1", "64, 128, 768, 1"]
)
def test_tuned_plans_that_cannot_be(knobs: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        program(f"{{90, 132, 5120, 2, 256, {{{knobs}}}}},")
    assert "plans.inc names a plan that rows_held cannot have" in capfd.readouterr().err
