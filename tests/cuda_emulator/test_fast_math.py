"""How exact the CUDA kernels' approximate arithmetic for two-byte operands is, by its formulas."""

from __future__ import annotations

from pathlib import Path

from build import build, run


def test_binary_entropy() -> None:
    done = run(build([Path("tests/cuda_emulator/fast_math.cu")], "plain"))
    value, slope = map(float, done.stdout.split())
    assert value < 2**-21
    assert slope < 2**-22
