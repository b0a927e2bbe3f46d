"""Removes the kernels' barriers, fences and waits for copies one at a time: does a small run notice each?

A mutant dies where the run under ThreadSanitizer fails, or where a plain run fails, gives other bits
than the unchanged kernels, or leaves a gradient that is not the one of its forward_state. The
verdicts are kept: one is asked for again only where a source has changed since.

    PYTHONPATH=tests python tests/cuda_emulator/mutate.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import torch

import build
from cases import Sample
from engines import NOWHERE, RUNNER, SOURCES, Calls, Loss
from translate import SUFFIXES, blank, mirror

KERNELS = Path("csrc/cuda")
VERDICTS = build.OUT / "mutants.jsonl"
_BARRIER = re.compile(
    r"\b(__syncthreads|__syncwarp|__threadfence(?:_block|_system)?"
    r"|__pipeline_(?:commit|wait_prior)|(?<!void )cp_async_(?:commit|wait))\s*\([^()]*\)"
    r"|\b\w+(?:\(\))?\.sync\(\)"
)
# A barrier that tells each thread of all predicates; without it, it knows its own.
_VOTE = re.compile(r"\b__syncthreads_(?:and|or)\s*(\([^()]*\))")
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
    replacement: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"

    def source(self) -> str:
        text = (build.ROOT / self.path).read_text()
        return text[: self.start] + self.replacement + text[self.end :]


def mutants(path: Path) -> Iterator[Mutant]:
    """One for every barrier in the source, and every call of what is nothing but a barrier."""
    code = blank((build.ROOT / path).read_text())
    helpers = [m[1] for m in _HELPER.finditer(code) if _BARRIER.fullmatch(m[2].strip())]
    patterns = [_BARRIER, _VOTE, *(re.compile(rf"\w+(?:\.|->){name}\(\)") for name in helpers)]
    for pattern in patterns:
        for match in pattern.finditer(code):
            line = code.count("\n", 0, match.start()) + 1
            replacement = match[1] if pattern is _VOTE else "(void)0"
            yield Mutant(path, match.start(), match.end(), line, match.group(), replacement)


_VECTORS = KERNELS / "vectors.cuh"
_OTHER_DTYPE = re.compile(r"\n *case DType::k\w+:\n *return f\(\w+\{\}\);")


def tree(mutant: Mutant | None) -> dict[Path, str]:
    """What a run is compiled from and is not as it stands. Kernels of float alone, which are all
    that it asks for, take a quarter of the time to compile."""
    changed = {} if mutant is None else {mutant.path: mutant.source()}
    vectors = changed.get(_VECTORS) or (build.ROOT / _VECTORS).read_text()
    changed[_VECTORS], removed = _OTHER_DTYPE.subn("", vectors)
    assert removed == 3, "with_type of vectors.cuh is not what it was"
    return changed


def key(changed: Mapping[Path, str]) -> str:
    """Of all that a verdict depends on."""
    paths = {
        path.relative_to(build.ROOT)
        for folder in build.FOLDERS
        for path in (build.ROOT / folder).rglob("*")
        if path.suffix in {*SUFFIXES, ".py"}
    }
    texts = [changed.get(path) or (build.ROOT / path).read_text() for path in sorted(paths)]
    return hashlib.sha256("\0".join([build.compiler()[1], *texts]).encode()).hexdigest()[:16]


@dataclass
class SmallRun:
    """Calls that come by every barrier more than once: many rows, and many blocks, of each kind."""

    calls: Calls = field(default_factory=Calls)
    losses: list[Loss] = field(default_factory=list)
    taught: list[Loss] = field(default_factory=list)  # meanwhile: bits depend on the schedule
    fresh: dict[float, Loss] = field(default_factory=dict)  # gradients of theirs

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def real(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        def classes(rows: int, n: int) -> torch.Tensor:
            return torch.randint(n, (rows,), generator=generator)

        many = Sample(real(20_000), real(20_000), {})
        self._ask("mse_loss", many)
        self._ask("mse_loss", Sample(real(130, 140), real(140, 130).t(), {}))
        # Rows of a few lanes, of a block and of a cluster, with a tail and without; and rows that
        # lie side by side.
        for rows, n in ((600, 10), (40, 1001), (30, 5001), (9, 70_001)):
            self._ask("cross_entropy", Sample(real(rows, n), classes(rows, n), {}))
            self._ask("cross_entropy", Sample(real(rows, n), real(rows, n).softmax(1), {}))
        for rows, n in ((600, 256), (200, 1000), (30, 5000), (9, 70_000)):
            self._ask("cross_entropy", Sample(real(rows, n), classes(rows, n), {}))
        # Probabilities that do not lie as the logits do.
        columns = real(5000, 30).t().softmax(1)
        self._ask("cross_entropy", Sample(real(30, 5000), columns, {}))
        for n in (20, 100):
            side_by_side = classes(3, n).new_zeros(3, 700)
            self._ask("cross_entropy", Sample(real(3, n, 700), side_by_side, {}))
        # No probability: the host is told.
        spoilt = Sample(real(3000).sigmoid() + 0.5, real(3000).sigmoid(), {})
        self._ask("binary_cross_entropy", spoilt)
        # A mean over many class indices.
        self._ask("cross_entropy", Sample(real(40_000, 2), classes(40_000, 2), {}))
        for upstream in (0.5, 3.0):
            self.fresh[upstream] = Loss(self.calls, "mse_loss", many, "mean")
            self.fresh[upstream].forward()
            self.fresh[upstream].backward(torch.tensor(upstream), fresh=True)
        for _ in range(20):
            self.taught.append(Loss(self.calls, "mse_loss", many, "mean", (0.5, 3.0)))
            self.calls.teach(self.taught[-1].prediction, list(self.fresh), 2000)
            self.taught[-1].forward()
            self.calls.teach(NOWHERE)

    def _ask(self, loss: str, sample: Sample) -> None:
        self.losses.append(Loss(self.calls, loss, sample, "mean", prediction=(1.0, 3.0)))
        self.losses[-1].forward()

    def results(self) -> list[bytes]:
        found = [t for loss in self.losses for t in (loss.value_found(), loss.gradient_found())]
        return [tensor.numpy().tobytes() for tensor in found]

    def patchwork(self) -> bool:
        """Whether a gradient is not all of the upstream gradient that its forward_state names."""
        return any(loss.is_patchwork(self.fresh) for loss in self.taught)


def failure(folder: Path, variant: str, expected: list[bytes] | None) -> str:
    """How a run over the folder's kernels goes wrong; empty: it does not."""
    try:
        program = build.build([*SOURCES, RUNNER], variant, folder)
    except subprocess.CalledProcessError:
        return "does not compile"
    for seed in SEEDS if variant == "plain" else SEEDS[:1]:
        run = SmallRun()
        try:
            run.calls.run(program, {"EMULATOR_SEED": seed, "TSAN_OPTIONS": "halt_on_error=1"})
        except AssertionError as error:
            known = re.search(r"data race|divergent|access to|no lane", str(error))
            return known.group() if known else "fails"
        except subprocess.TimeoutExpired:
            return "does not end"
        if expected is not None and run.results() != expected:
            return "other results"
        if run.patchwork():
            return "patchwork"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose description contains this")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    options = parser.parse_args()

    folders: SimpleQueue[Path] = SimpleQueue()
    for number in range(options.jobs):
        folders.put(build.OUT / f"mutant-{number}")
    known = {}
    if VERDICTS.exists():
        for line in VERDICTS.read_text().splitlines():
            verdict = json.loads(line)
            known[verdict["key"]] = verdict["died"]

    def verdict(mutant: Mutant | None, expected: list[bytes] | None) -> str:
        """How it died; empty: it did not."""
        changed = tree(mutant)
        name = key(changed)
        if name not in known:
            folder = folders.get()
            mirror(build.ROOT, build.FOLDERS, folder, changed)
            died = ""
            for variant in ("thread", "plain"):
                if how := failure(folder, variant, expected):
                    died = f"{variant}: {how}"
                    break
            folders.put(folder)
            known[name] = died
            with VERDICTS.open("a") as file:
                file.write(json.dumps({"key": name, "mutant": str(mutant), "died": died}) + "\n")
        return known[name]

    folder = folders.get()
    mirror(build.ROOT, build.FOLDERS, folder, tree(None))
    unchanged = SmallRun()
    unchanged.calls.run(build.build([*SOURCES, RUNNER], "plain", folder))
    folders.put(folder)
    expected = unchanged.results()
    if died := verdict(None, expected):
        sys.exit(f"the unchanged kernels: {died}")

    paths = sorted((build.ROOT / KERNELS).glob("*.cu*"))
    all_mutants = [m for path in paths for m in mutants(path.relative_to(build.ROOT))]
    chosen = [mutant for mutant in all_mutants if options.only in str(mutant)]
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, died in zip(
            chosen, pool.map(lambda mutant: verdict(mutant, expected), chosen), strict=True
        ):
            survivors += not died
            print(f"{mutant}  {died or 'SURVIVED'}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survived")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
