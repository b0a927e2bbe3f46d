"""Removes the kernels' barriers and fences one at a time: does a small run notice each?

A mutant dies where the run under ThreadSanitizer fails, or where a plain run fails or gives other
bits than the unchanged kernels.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import build
from cases import Sample
from engines import RUNNER, SOURCES, Calls, Loss
from translate import blank, mirror

KERNELS = Path("csrc/cuda")
_BARRIER = re.compile(
    r"\b(__syncthreads|__syncwarp|__threadfence(?:_block|_system)?)\s*\([^()]*\)"
    r"|\b\w+(?:\(\))?\.sync\(\)"
)
# A function that does nothing else, and the calls of it.
_HELPER = re.compile(r"\bvoid\s+(\w+)\s*\(\)\s*(?:const\s*)?\{\s*([^;{}]*)\s*;\s*\}")

SEEDS = ("0", "1", "2")


@dataclass(frozen=True)
class Mutant:
    path: Path  # from the root of the repository
    start: int
    end: int
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def mutants(path: Path) -> Iterator[Mutant]:
    """One for every barrier in the source, and every call of what is nothing but a barrier."""
    code = blank((build.ROOT / path).read_text())
    helpers = [m[1] for m in _HELPER.finditer(code) if _BARRIER.fullmatch(m[2].strip())]
    patterns = [_BARRIER, *(re.compile(rf"\w+(?:\.|->){name}\(\)") for name in helpers)]
    for match in (match for pattern in patterns for match in pattern.finditer(code)):
        line = code.count("\n", 0, match.start()) + 1
        yield Mutant(path, match.start(), match.end(), line, match.group())


def small_run() -> tuple[Calls, list[Loss]]:
    """Calls that come by every barrier more than once: many rows, and many blocks, of each kind."""
    calls = Calls()
    generator = torch.Generator().manual_seed(0)
    losses = []

    def ask(loss: str, sample: Sample, reduction: str = "mean") -> None:
        losses.append(Loss(calls, loss, sample, reduction, prediction=(1.0, 3.0)))
        losses[-1].forward()

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def classes(rows: int, n: int) -> torch.Tensor:
        return torch.randint(n, (rows,), generator=generator)

    ask("mse_loss", Sample(real(20_000), real(20_000), {}))
    ask("mse_loss", Sample(real(130, 140), real(140, 130).t(), {}))
    # Rows of a few lanes, of a block and of a cluster; and rows that lie side by side.
    for rows, n in ((600, 10), (40, 1000), (30, 5000), (9, 70_000)):
        ask("cross_entropy", Sample(real(rows, n), classes(rows, n), {}))
        ask("cross_entropy", Sample(real(rows, n), real(rows, n).softmax(1), {}))
    ask("cross_entropy", Sample(real(3, 20, 700), classes(3, 20).new_zeros(3, 700), {}))
    # No probability: the host is told.
    ask("binary_cross_entropy", Sample(real(3000).sigmoid() + 0.5, real(3000).sigmoid(), {}))
    # A mean over many class indices.
    ask("cross_entropy", Sample(real(40_000, 2), classes(40_000, 2), {}))
    return calls, losses


def results(calls: Calls, losses: list[Loss]) -> list[bytes]:
    found = [t for loss in losses for t in (loss.value_found(), loss.gradient_found())]
    return [tensor.numpy().tobytes() for tensor in found]


def failure(folder: Path, variant: str, expected: list[bytes]) -> str:
    """How a run over the folder's kernels goes wrong; empty: it does not."""
    try:
        program = build.build([*SOURCES, RUNNER], variant, folder)
    except subprocess.CalledProcessError:
        return "does not compile"
    for seed in SEEDS if variant == "plain" else SEEDS[:1]:
        calls, losses = small_run()
        try:
            calls.run(program, {"EMULATOR_SEED": seed, "TSAN_OPTIONS": "halt_on_error=1"})
        except AssertionError as error:
            known = re.search(r"data race|divergent|access to|no lane", str(error))
            return known.group() if known else "fails"
        if results(calls, losses) != expected:
            return "other results"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose description contains this")
    options = parser.parse_args()
    folder = build.OUT / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    mirror(build.ROOT, build.FOLDERS, folder)
    calls, losses = small_run()
    calls.run(build.build([*SOURCES, RUNNER], "plain", folder))
    expected = results(calls, losses)
    for variant in ("plain", "thread"):
        unchanged = failure(folder, variant, expected)
        if unchanged:
            sys.exit(f"the unchanged kernels: {variant}: {unchanged}")

    survivors = 0
    for path in sorted((build.ROOT / KERNELS).glob("*.cu*")):
        source = path.read_text()
        for mutant in mutants(path.relative_to(build.ROOT)):
            if options.only not in str(mutant):
                continue
            changed = source[: mutant.start] + "(void)0" + source[mutant.end :]
            mirror(build.ROOT, build.FOLDERS, folder, {mutant.path: changed})
            died = {v: failure(folder, v, expected) for v in ("thread", "plain")}
            survivors += not any(died.values())
            print(f"{mutant}  thread: {died['thread'] or '-'}  plain: {died['plain'] or '-'}")
            sys.stdout.flush()
    print(f"{survivors} survived")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
