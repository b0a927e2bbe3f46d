"""The Triton kernels, compiled for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusedloss import backends

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.INTERPRETED, reason="TRITON_INTERPRET=1"),
]
SCRIPT = Path(__file__).with_name("triton_compile.py")


def compiled(*options: str, cache: Path) -> dict[str, list[dict[str, Any]]]:
    """The compilers' report on the engines' kernels, by call."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, done.stdout.splitlines()):
        if row["kernel"] in ("pointwise", "cross_entropy", "custom_rows"):
            calls.setdefault(row["call"], []).append(row)
    return calls


# Together these have each operand and option of the kernels: indices as rows, broadcast operands, a
# parameter, probabilities in [0, 1], weights, smoothing, rows in one tile and in several.
@pytest.mark.parametrize(
    ("target", "dtype", "families"),
    [
        (
            "sm_90",
            "bf16",
            [
                "mse_loss",
                "binary_cross_entropy",
                "log_loss-weight-ignored_class",
                "cross_entropy",
                "cross_entropy-probabilities-weight-smoothing",
            ],
        ),
        ("sm_80", "fp32", ["huber_loss", "cross_entropy-weight-smoothing-ignored"]),
        (
            "gfx942",
            "fp16",
            [
                "binary_cross_entropy_with_logits-lastdim_weight-lastdim_pos_weight",
                "cross_entropy",
            ],
        ),
    ],
)
def test_kernels(target: str, dtype: str, families: list[str], tmp_path: Path) -> None:
    options = ["--target", target, "--dtype", dtype, "--classes", "1000", "32000"]
    for family in families:
        options += ["--family", family]
    calls = compiled(*options, cache=tmp_path)
    rows = sum(family.startswith("cross_entropy") for family in families)
    assert len(calls) == len(families) + rows
    for call, (forward, backward) in calls.items():
        # so that a gradient has the same bits from both passes
        assert forward["binary"] == backward["binary"], call
        if target.startswith("sm"):
            # Bytes per thread: a tile that does not fit the registers would spill far more.
            assert forward["spills"] <= 64, call
            assert forward["load"] == forward["store"] == 16, call
            assert forward["ordered"], call


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_without_reduction(dtype: str, tmp_path: Path) -> None:
    """It has special kernels: one that stores values, one that reads upstream gradients."""
    families = [
        "mse_loss",
        "mse_loss-weight",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits-lastdim_weight-lastdim_pos_weight",
        "log_loss",
        "cross_entropy",
        "cross_entropy-probabilities-weight-smoothing",
    ]
    options = ["--target", "sm_90", "--dtype", dtype, "--reduction", "none", "--classes", "1000"]
    for family in families:
        options += ["--family", family]
    calls = compiled(*options, "--own", "tukey", cache=tmp_path)
    assert len(calls) == len(families) + 3  # the custom loss: both gradients, or either
    for call, rows in calls.items():
        forward, backward = rows[:2]
        assert forward["binary"] != backward["binary"], call
        for row in rows:
            assert row["spills"] <= 64, call
            assert row["load"] == row["store"] == 16, call


@pytest.mark.parametrize(
    ("target", "dtype", "loss"),
    [
        # Each takes a minute; the others differ in nothing that these do not have.
        ("sm_90", "fp32", "every_word"),
        ("gfx942", "fp64", "every_word"),
        ("sm_90", "bf16", "focal"),
    ],
)
def test_custom_losses(target: str, dtype: str, loss: str, tmp_path: Path) -> None:
    calls = compiled("--target", target, "--dtype", dtype, "--own", loss, cache=tmp_path)
    # Both gradients, input's only, and target's only.
    assert [len(rows) for rows in calls.values()] == [4, 2, 2]
    for call, rows in calls.items():
        # Other parameters, and a gradient from another pass, use the same kernel.
        assert len({row["binary"] for row in rows}) == 1, call
        if target.startswith("sm"):
            assert rows[0]["load"] == rows[0]["store"] == 16, call
            assert loss == "every_word" or rows[0]["spills"] <= 64, call


# Together these have each kind of input, three levels, powers, and maxima with a slope.
@pytest.mark.parametrize(
    ("target", "dtype", "losses"),
    [
        ("sm_90", "bf16", ["jsd", "grpo"]),
        ("sm_80", "fp32", ["renyi", "balanced"]),
        ("gfx942", "fp16", ["spread"]),
    ],
)
def test_row_losses(target: str, dtype: str, losses: list[str], tmp_path: Path) -> None:
    options = ["--target", target, "--dtype", dtype, "--classes", "32", "32000"]
    for loss in losses:
        options += ["--own-rows", loss]
    calls = compiled(*options, cache=tmp_path)
    assert len(calls) == 2 * len(losses)
    for call, (forward, backward) in calls.items():
        assert forward["binary"] == backward["binary"], call
        if target.startswith("sm"):
            assert call.startswith("renyi") or forward["spills"] <= 64, call
            assert forward["load"] == forward["store"] == 16, call
            assert forward["ordered"], call
