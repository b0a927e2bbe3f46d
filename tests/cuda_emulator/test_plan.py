"""How rows are laid over devices that are not here: csrc/cuda/rows_plan.h."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from build import build, run
from engines import DTYPES
from cases import DTYPES as BY_NAME

KIB = 1024
# Multiprocessors, shared memory of a block and of a multiprocessor, and whether it has clusters.
H100 = (132, 227 * KIB, 228 * KIB, 1)
A100 = (108, 163 * KIB, 164 * KIB, 0)
SM_120 = (170, 99 * KIB, 100 * KIB, 1)
SM_86 = (84, 99 * KIB, 100 * KIB, 0)


def plan(
    dtype: str,
    rows: int,
    classes: int,
    device: tuple[int, ...] = H100,
    row_stride: int = 0,
    smoothing: float = 0.0,
) -> dict[str, Any]:
    program = build([Path("tests/cuda_emulator/plan.cpp")], "plain")
    words = (DTYPES.index(BY_NAME[dtype]), rows, classes, row_stride or classes, smoothing, *device)
    found: dict[str, Any] = json.loads(run(program, *map(str, words)).stdout)
    return found


@pytest.mark.parametrize(
    "dtype, rows, classes, expected",
    [
        ("bf16", 8192, 128_256, ("cluster", 64, 8, 256, 2)),
        ("bf16", 16_384, 32_000, ("cluster", 64, 2, 256, 2)),
        ("bf16", 32_768, 4096, ("block", 64, 1, 64, 2)),
        ("bf16", 65_536, 1024, ("sub-warp", 64, 16, 256, 2)),
        ("bf16", 131_072, 256, ("sub-warp", 32, 8, 256, 2)),
        ("fp32", 8192, 128_256, ("cluster", 64, 8, 256, 1)),
    ],
)
def test_held(dtype: str, rows: int, classes: int, expected: tuple[Any, ...]) -> None:
    """The shapes of the bench, on an H100: two blocks of 256 threads a multiprocessor, or three."""
    found = plan(dtype, rows, classes)
    shared_by = found["threads_per_row" if found["kernel"] == "sub-warp" else "cluster"]
    assert (
        found["kernel"],
        found["held"],
        shared_by,
        found["threads"],
        found["stages"],
    ) == expected
    threads = found["threads"] * found["blocks"] / H100[0]
    assert threads == pytest.approx({64: 512, 32: 768}[found["held"]], rel=0.05)


@pytest.mark.parametrize("device", [H100, A100, SM_120, SM_86], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_limits(dtype: str, device: tuple[int, ...]) -> None:
    """Rows that registers hold, and no more shared memory than there is."""
    most = 64 * 256 * (8 if device[3] else 1)
    for classes in [8 << i for i in range(15)] + [264, 520, 2056, 30_000, 128_256, most]:
        found = plan(dtype, 1000, classes, device)
        assert bool(found["held"]) == (classes <= most), classes
        assert found["smem"] <= device[1] - 4 * KIB
        threads = found["threads_per_row"] if found["kernel"] == "sub-warp" else found["threads"]
        if found["held"]:
            assert threads * found["cluster"] * found["held"] >= classes


@pytest.mark.parametrize(
    "what",
    [
        {"dtype": "fp64"},
        {"classes": 1001},
        {"classes": 131_080},
        {"row_stride": 1001},
        {"smoothing": 0.1},
    ],
    ids=str,
)
def test_general(what: dict[str, Any]) -> None:
    """What registers do not hold, or vectors do not reach."""
    assert plan(**{"dtype": "bf16", "rows": 1000, "classes": 1000, **what})["held"] == 0
    assert plan("bf16", 1000, 1000)["held"] == 64
