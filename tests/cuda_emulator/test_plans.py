"""How a call over rows is laid over a GPU, most often one of the size of an H100."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import build
from engines import DTYPES

KIB_PER_SM = 228
SMEM_PER_SM = KIB_PER_SM << 10


class Plan(NamedTuple):
    kernel: str
    operands: int
    threads: int
    smem: int
    blocks: int


@cache
def program() -> Path:
    return build.build([Path("tests/cuda_emulator/plans.cpp")], "plain")


def plan(
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
    probabilities: tuple[torch.dtype, Sequence[int], int] | None = None,
    kib_per_sm: int = KIB_PER_SM,
) -> Plan:
    words: list[int] = [kib_per_sm, DTYPES.index(dtype), *shape, *strides]
    if probabilities is not None:
        of, their_strides, shift = probabilities
        words += [DTYPES.index(of), *their_strides, shift]
    result = build.run(program(), *map(str, words))
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
    for classes in (2500, 3000, 4096):
        mine = (1 << 15, classes, 1), (classes, 1, 1)
        found = plan(torch.bfloat16, *mine, kib_per_sm=kib_per_sm)
        assert found.kernel == "sub_warp"
        blocks = (kib_per_sm << 10) // (found.smem + 4096)
        assert blocks >= 3
        assert blocks * found.threads >= warps * 32
