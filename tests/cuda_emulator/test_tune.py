"""bench/tune.cu over the emulator, whose clock counts threads: the fewest are the fastest there."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

import build
from translate import mirror

SOURCES = [Path("csrc/cuda/pointwise.cu"), Path("bench/tune.cu")]
HELD = Path("csrc/cuda/rows_held.cuh")
SUM = "state.sum = sum.value * exp.correction"
OTHER_GPU = "{90, 132, 5120, 2, 256, {64, 128, 512, 2}},  // another GPU"


@cache
def program(broken: bool = False) -> Path:
    """Broken: plans with one row in shared memory have losses that are too small."""
    changed = {}
    if broken:
        text = (build.ROOT / HELD).read_text()
        assert text.count(SUM) == 1
        changed[HELD] = text.replace(SUM, f"{SUM} * (tiling.stages == 1 ? 0.999f : 1)")
    folder = build.OUT / f"tune-{'broken' if broken else 'source'}"
    mirror(build.ROOT, (*build.FOLDERS, Path("bench")), folder, changed)
    return build.build(SOURCES, "plain", folder)


def tune(table: Path, *shape: object, broken: bool = False) -> subprocess.CompletedProcess[str]:
    return build.run(program(broken), str(table), "3", *map(str, shape))


def test_the_fastest_plan(tmp_path: Path) -> None:
    table = tmp_path / "plans.inc"
    table.write_text(f"// A comment.\n{OTHER_GPU}\n")
    done = tune(table, "bf16", 40, 200, "fp32", 9, 5000)
    assert done.returncode == 0, done.stderr
    kept, other, *mine = table.read_text().splitlines()
    assert (kept, other) == ("// A comment.", OTHER_GPU)
    # 64 classes a thread are half as many threads; clusters of small blocks have none without work.
    assert [line.split("  // ")[0] for line in mine] == [
        "{90, 3, 5120, 2, 256, {64, 256, 512, 2}},",
        "{90, 3, 5120, 4, 8192, {32, 64, 768, 2}},",
    ]
    assert "emulator, bf16 40x200: 0.500 of the default's time" in mine[0]
    picked = [line for line in done.stdout.splitlines() if line.endswith("<-")]
    assert len(picked) == 2 and "bf16 40x200 {64, 256, 512, 2}" in picked[0]
    # The same row of the table again, and then shapes that the default is best for.
    tune(table, "bf16", 40, 256)
    assert "bf16 40x256" in table.read_text() and "bf16 40x200" not in table.read_text()
    tune(table, "bf16", 4, 136)
    assert table.read_text().splitlines() == [kept, other, mine[1]]


def test_rows_that_are_not_held(tmp_path: Path) -> None:
    table = tmp_path / "plans.inc"
    done = tune(table, "bf16", 3, 9, "bf16", 40, 256)
    assert done.returncode == 0
    assert "bf16 3x9: rows_held does not take it on this GPU" in done.stdout
    assert len(table.read_text().splitlines()) == 1


def test_wrong_plans(tmp_path: Path) -> None:
    table = tmp_path / "plans.inc"
    done = tune(table, "bf16", 40, 256, broken=True)
    assert done.returncode == 1
    assert "WRONG: bf16 40x256 {64, 256, 512, 1}: the loss is" in done.stdout
    timed = [line for line in done.stdout.splitlines() if " ms, " in line]
    assert timed and not any(", 1} " in line for line in timed)
    assert "{64, 256, 512, 2}" in table.read_text()


def test_check() -> None:
    done = build.run(program(), "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    done = build.run(program(broken=True), "--check")
    assert done.returncode == 1
    assert "WRONG: fp32 2x70000x1, kernel 5, clusters of " in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "usage: tune FILE"),
        (("plans", "3", "bf16"), "usage: tune FILE"),
        (("plans", "no"), "ROUNDS is a positive number, not no"),
        (("plans", "1", "fp64", "3", "8"), "a dtype is bf16 or fp32, not fp64"),
        (("missing/plans", "1", "bf16", "3", "8"), "cannot write missing/plans"),
    ],
)
def test_arguments(words: tuple[str, ...], message: str) -> None:
    done = build.run(program(), *words)
    assert done.returncode == 1
    assert message in done.stderr
