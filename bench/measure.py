"""The contestants of a case, the check of their results, and interleaved timing."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

import fusedloss
import fusedloss.functional as FL

from . import limit, linear, own, row_losses
from .cases import COLUMNS, MODULES, TABLES, Case, Loss
from .peers import PEERS

Step = Callable[[], object]
T = TypeVar("T")

# Exposes a contestant that computes something else, and does not rank roundings: far above the
# error of an fp32 sum of 2^24 terms or of one rounding to bf16, far below any missing term.
# Norm-wise.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-8}
# Behind a linear layer the logits are rounded to bf16 too, and some add up gradients in it.
LINEAR_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6}

# Long enough for the clock, short enough that a round sees one state of the machine.
BLOCK_SECONDS = 0.01
# The same on a GPU, where each step is timed alone, over an emptied cache.
GPU_BLOCK_SECONDS = 0.04

# After this time a case starts no further round, if it has enough of them for a median and a
# spread.
CASE_SECONDS = 20.0
ENOUGH_ROUNDS = 5
# Steps that take longer run once a round, without a warm-up.
LONG_SECONDS = 1.0

# For all compiling of one run together; later cases then go without.
COMPILE_SECONDS = 300.0


class WrongResult(Exception):
    """A contestant's loss or gradient differs from the one in float64."""


@dataclass
class Ratio:
    median: float
    low: float
    high: float
    bar: float | None
    met: bool | None


class Problem(NamedTuple):
    """Why a contestant has no samples."""

    verdict: str  # "wrong", "failed" or "skipped"
    text: str


@dataclass
class Row:
    """One case, measured."""

    case: Case
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    problems: dict[str, Problem] = field(default_factory=dict)
    path: str | None = None
    compile_seconds: float | None = None
    limit_by: str | None = None  # the copy that was the fastest most often, see bench/limit.py

    def ratios(self) -> dict[str, Ratio]:
        """The table's columns for which both contestants were measured."""
        ratios = {}
        for name in (*TABLES[self.case.table].columns, *JOINING):
            column = COLUMNS[name]
            if column.of not in self.samples or column.over not in self.samples:
                continue
            low, median, high = quantiles(self.samples[column.of], self.samples[column.over])
            bar = self.case.bars.get(name)
            met = None
            if bar is not None:
                # Judged as printed, with two decimals: 0.998 against 1 is noise, 0.98 is not.
                shown = round(median, 2)
                met = shown >= bar if column.at_least else shown <= bar
            ratios[name] = Ratio(median, low, high, bar, met)
        return ratios

    @property
    def begun(self) -> bool:
        """False: the run had no time for the case."""
        return bool(self.samples) or any(p.verdict != "skipped" for p in self.problems.values())

    def broken(self) -> list[str]:
        """Contestants with a wrong result or none."""
        return [name for name, problem in self.problems.items() if problem.verdict != "skipped"]

    def missed(self) -> list[str]:
        """Columns whose goal is missed: all of them if ours has no result."""
        if "ours" in self.broken():
            return list(self.case.bars)
        return [name for name, ratio in self.ratios().items() if ratio.met is False]

    def unmeasured(self) -> list[str]:
        """Columns whose goal could not be judged, since the other contestant was not measured."""
        known = {*self.missed(), *self.ratios()}
        # A peer that is not installed does not count as unmeasured.
        wanted = {*TABLES[self.case.table].columns, *self.problems}
        return [name for name in self.case.bars if name in wanted and name not in known]


def quantiles(of: list[float], over: list[float]) -> tuple[float, float, float]:
    """20 %, median and 80 % of the rounds' ratios.

    The median of ratios, not the ratio of medians: whatever slows the machine for a while slows
    both sides of a round and cancels, so the spread is that of the ratio.
    """
    low, median, high = np.quantile(np.divide(of, over), [0.2, 0.5, 0.8]).tolist()
    return low, median, high


def describe(error: Exception) -> Problem:
    """The error as one line for a note."""
    if isinstance(error, WrongResult):
        return Problem("wrong", str(error))
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return Problem("failed", text if len(text) <= 160 else text[:157] + "...")


def one_by_one(
    cases: Iterable[Case], measure: Callable[[Case, Problem | None], T], seconds: float | None
) -> list[T]:
    """The results of `measure` for each case. After the given seconds it gets a problem to report.

    Ctrl-C or SIGTERM ends the loop, and the results so far are returned.
    """
    results = []
    start = time.monotonic()
    told_to_end = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        progress = tqdm(cases, unit="case", disable=None)  # None: no bar without a terminal
        for case in progress:
            progress.set_description(case.id)
            late = None
            if seconds is not None and time.monotonic() - start > seconds:
                late = Problem("skipped", f"no time left of the {seconds:g} s of this run")
            results.append(measure(case, late))
            if case.device == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, told_to_end)
    return results


# Contestants that may join a table.
JOINING = ("triton", *PEERS)


def second_backend(device: str) -> str | None:
    """Another fused backend that runs on the device, beside the one that calls use."""
    if device == "cpu":
        return None  # Triton only has its interpreter there
    x = torch.zeros(2, device=device)
    first = fusedloss.explain(FL.mse_loss, x, x).backend
    for name, why_not in fusedloss.info().backends.items():
        if why_not is None and name != first:
            with fusedloss.backend(name):
                if fusedloss.explain(FL.mse_loss, x, x).fused:
                    return name
    return None


def contestants(case: Case, wanted: Collection[str] | None = None) -> list[str]:
    """Who is measured: ours and the limit always, the others as wanted (None: whoever is here)."""
    table = TABLES[case.table]
    # On a GPU PyTorch's copy is the limit.
    names = [name for name in table.contestants if name != "copy" or case.device == "cpu"]
    if table.peers:
        second = second_backend(case.device)
        names += [second] if second and not case.functions else []
        names += [p.name for p in PEERS.values() if p.covers(case) and p.version is not None]
    always = ("ours", "unit", "limit", "copy", "products")
    if case.gradients > 1:  # a copy of one tensor is no limit then
        names = [name for name in names if name not in ("limit", "copy")]
    return [name for name in names if wanted is None or name in wanted or name in always]


def running(contestant: str) -> AbstractContextManager[None]:
    """The context in which a contestant is built, checked and timed."""
    return fusedloss.backend(contestant) if contestant == "triton" else nullcontext()


def eager_loss(case: Case) -> Loss:
    if case.table == "own":
        return own.eager(case.loss)
    if case.over_rows:
        return row_losses.eager(case)
    if case.layer is not None:
        return linear.eager(case)
    return case.functions.get("eager") or getattr(F, case.loss)


def our_loss(case: Case) -> Loss:
    if case.table == "own":
        return own.ours(case.loss)
    if case.over_rows:
        return row_losses.ours(case)
    if case.layer is not None:
        return linear.ours(case)
    return case.functions.get("ours") or getattr(FL, case.loss)


def build_loss(case: Case, contestant: str) -> Loss:
    if contestant in PEERS:
        return PEERS[contestant].loss(case)
    loss: Loss
    if case.table == "upstream":
        # Modules, since each has its own prediction: one function, called with both upstream
        # gradients in turn, would measure the mispredicted path.
        package = torch.nn if contestant == "eager" else fusedloss
        loss = getattr(package, MODULES[case.loss])()
    elif contestant == "compile":
        # Idle compile workers would share the cores with what is being timed.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        # Cases recompile one function: above dynamo's limit it would silently run eagerly.
        torch._dynamo.reset()
        loss = torch.compile(eager_loss(case), fullgraph=True, dynamic=False)
    else:
        loss = eager_loss(case) if contestant == "eager" else our_loss(case)
    # A partial costs time in every call, so only where it is needed.
    return loss if case.reduction == "mean" else partial(loss, reduction=case.reduction)


def upstream_of(case: Case, contestant: str, x: Tensor, t: Tensor) -> Tensor | None:
    """The gradient given to backward()."""
    if case.reduction == "none":
        shape = case.shape[:1] + case.shape[2:] if case.by_rows else case.shape
        generator = torch.Generator(case.device).manual_seed(1)
        drawn = () if case.expanded else shape
        upstream = torch.randn(drawn, generator=generator, device=case.device, dtype=case.dtype)
        return upstream.expand(shape)
    if case.upstream != 1:
        value = 1.0 if contestant == "unit" else case.upstream
        # Eager's loss has the input's dtype and the peers' have float32: backward() casts.
        return torch.tensor(value, device=case.device)
    return None


def copy_step(copy: limit.Copy, x: Tensor) -> Step:
    """A copy in place of a loss step."""

    @torch.no_grad()
    def step() -> Tensor:
        # Kept in x.grad, so that it is freed when a gradient would be: at the next step.
        x.grad = None
        x.grad = copy()
        return x.grad

    return step


def copies(x: Tensor, t: Tensor) -> dict[str, Step]:
    """The steps that the limit is the fastest of."""
    means = limit.means(x, t)
    return {f"limit by {name}": copy_step(copy, x) for name, copy in means.items()}


def join_limit(samples: dict[str, list[float]]) -> str | None:
    """Replaces the copies by one limit, the fastest of them in each round; returns who that was
    most often.

    New memory gets huge pages by luck, so that a copy chosen once can have a bad round in which
    ours has a good one.
    """
    found = {name: samples[name] for name in samples if name == "copy" or name.startswith("limit")}
    if not found:
        return None
    for name in found:
        del samples[name]
    rounds = np.array(list(found.values()))
    samples["limit"] = rounds.min(axis=0).tolist()
    if "copy" in found:
        samples["copy"] = found["copy"]
    return list(found)[np.bincount(rounds.argmin(axis=0)).argmax()]


def share_limits(rows: Iterable[Row]) -> None:
    """Gives the cases of a run that move the same bytes the fastest limit among theirs.

    A copy's speed is the machine's and not the loss's. Each case has copies of its own only because
    the machine changes: one that was slow throughout would be a limit that ours exceeds.
    """
    alike: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if "limit" in row.samples:
            elements = math.prod(row.case.shape)
            key = row.case.device, row.case.least_bytes, elements
            alike.setdefault(key, []).append(row)
    for group in alike.values():
        fastest = min(group, key=lambda row: np.median(row.samples["limit"]))
        seconds = float(np.median(fastest.samples["limit"]))
        for row in group:
            row.samples["limit"] = [seconds] * len(row.samples["limit"])
            row.limit_by = fastest.limit_by


def make_step(case: Case, contestant: str, x: Tensor, t: Tensor) -> Step:
    """The step that is timed: it delivers a fresh gradient."""
    if contestant == "copy":
        return copy_step(lambda: limit.by_pytorch(x, t), x)
    if contestant == "products":
        return linear.products(case, x, t)

    loss = build_loss(case, contestant)
    if case.table == "forward":

        @torch.no_grad()
        def step() -> Tensor:
            return loss(x, t)

    elif case.autocast:
        autocast = torch.autocast(case.device, dtype=case.dtype)

        def step() -> Tensor:
            x.grad = None
            with autocast:
                value = loss(x, t)
            value.backward()
            return value

    else:
        upstream = upstream_of(case, contestant, x, t)

        def step() -> Tensor:
            x.grad = t.grad = None
            value = loss(x, t)
            value.backward(upstream)
            return value

    return step


def captured(step: Step, x: Tensor, original: Tensor) -> Step:
    """The step in a CUDA graph, captured and replayed on the values of `original`.

    Raises the step's error if it cannot be captured, for example because it waits for the device.
    """
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # Around the capture as well: after a failed one its stream would stay the current one.
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
        x.grad = None
        with torch.no_grad():
            x.copy_(original)
        with torch.cuda.graph(graph, stream=side):
            value = step()
    torch.cuda.current_stream().wait_stream(side)
    gradient = x.grad

    def replay() -> object:
        graph.replay()
        x.grad = gradient
        return value

    return replay


def path(case: Case, x: Tensor, t: Tensor) -> str | None:
    """The backend that a call of ours takes: "ours" may be the fall-back."""
    with torch.autocast(case.device, dtype=torch.bfloat16, enabled=case.autocast):
        try:
            return fusedloss.explain(our_loss(case), x, t, reduction=case.reduction).backend
        except TypeError:  # explain() does not know this callable
            return None


Truth = tuple[Tensor, Tensor | None, Tensor | None]


def expected(case: Case, x: Tensor, t: Tensor) -> Truth:
    """Loss and gradients in float64 (no gradient for x: forward only)."""
    x64 = x.detach().double().requires_grad_(case.table != "forward")
    t64 = t.detach().double() if t.is_floating_point() else t.detach()
    t64.requires_grad_(t.requires_grad)
    function = eager_loss(case) if case.layer is None else linear.exact(case)
    loss = function(x64, t64, reduction=case.reduction)
    if case.table != "forward":
        upstream = upstream_of(case, "ours", x, t)
        loss.backward(None if upstream is None else upstream.double())
    return loss.detach(), x64.grad, t64.grad


def check(case: Case, contestant: str, step: Step, x: Tensor, t: Tensor, truth: Truth) -> None:
    """Compare a contestant's loss and gradients with float64."""
    x.grad = t.grad = None
    value = step()
    assert isinstance(value, Tensor)
    value = value.detach()
    tolerance = TOLERANCE if case.layer is None else LINEAR_TOLERANCE
    names = ("loss", "gradient", "gradient of the second input")
    for name, got, right in zip(names, (value, x.grad, t.grad), truth, strict=True):
        if right is None:
            continue
        if contestant == "unit" and name != "loss":
            right = right / case.upstream
        if got is None:
            raise WrongResult(f"no {name}")
        if got.shape != right.shape and contestant not in PEERS:  # one of the peers returns (1,)
            raise WrongResult(f"{name} of shape {tuple(got.shape)}, not {tuple(right.shape)}")
        error = float((got.double().view_as(right) - right).norm() / right.norm())
        # Written like this so that nan fails.
        if not error <= tolerance[got.dtype]:
            raise WrongResult(f"{name} off by {error:.2g} (norm-wise) from float64")


def host_clock(step: Step, block_seconds: float) -> Callable[[], float]:
    """Seconds per step, from blocks of steps at whose end the host waits once.

    `Timer.timeit` warms up before it reads the clock, so nobody pays for what the contestant before
    left in caches and heap.
    """

    def once() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    if once() > LONG_SECONDS:
        return once
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    # The best of a few: the first call may be slow, and would make the blocks too short.
    seconds = min(timer.timeit(1).mean for _ in range(3))
    number = math.ceil(block_seconds / seconds)
    return lambda: timer.timeit(number).mean


def gpu_clock(step: Step, block_seconds: float) -> Callable[[], float]:
    """Seconds per step on the GPU; each step runs alone, over an emptied cache."""
    from triton.testing import do_bench

    milliseconds = 1e3 * block_seconds
    return lambda: (
        1e-3 * do_bench(step, warmup=milliseconds / 4, rep=milliseconds, return_mode="median")
    )


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    block_seconds: float = BLOCK_SECONDS,
    clock: Callable[[Step, float], Callable[[], float]] = host_clock,
) -> dict[str, list[float]]:
    """Seconds per step of each contestant, one sample per round.

    Each round times every contestant once, in a new random order: otherwise each would always pay
    for what the same other one leaves in heap and caches.
    """
    clocks = {}
    for name, step in steps.items():
        with running(name):
            clocks[name] = clock(step, block_seconds)
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    order = list(clocks)
    draw = random.Random(0)
    start = time.perf_counter()
    for done in range(rounds):
        if done >= ENOUGH_ROUNDS and time.perf_counter() - start > CASE_SECONDS:
            break
        draw.shuffle(order)
        for name in order:
            with running(name):
                samples[name].append(clocks[name]())
    return samples


class Speed:
    """Times cases one by one, within the run's time for compiling."""

    def __init__(
        self,
        rounds: int,
        compile_seconds: float = COMPILE_SECONDS,
        wanted: Collection[str] | None = None,
    ) -> None:
        self.rounds = rounds
        self.compile_left = compile_seconds
        self.wanted = wanted

    def __call__(self, case: Case) -> Row:
        row = Row(case, "s")
        x, t = case.inputs()
        truth = expected(case, x, t)
        steps: dict[str, Step] = {}
        for name in contestants(case, self.wanted):
            if name == "compile" and self.compile_left <= 0:
                row.problems[name] = Problem("skipped", "no time for compiling left")
                continue
            start = time.perf_counter()
            try:
                with running(name):
                    if name == "triton" and path(case, x, t) != name:
                        row.problems[name] = Problem(
                            "skipped", "no kernel of that backend takes it"
                        )
                        continue
                    if name == "limit":
                        steps |= copies(x, t)
                    else:
                        steps[name] = self.prepare(case, name, x, t, truth)
                if name == "ours":
                    row.path = path(case, x, t)
            except Exception as error:  # noqa: BLE001 - the others are still measured
                row.problems[name] = describe(error)
            if name == "compile":
                row.compile_seconds = time.perf_counter() - start
                self.compile_left -= row.compile_seconds
        del truth  # at least twice the size of the inputs
        row.samples = self.time(case, steps)
        row.limit_by = join_limit(row.samples)
        return row

    def time(self, case: Case, steps: Mapping[str, Step]) -> dict[str, list[float]]:
        """Seconds per step of each contestant, one sample per round."""
        rounds = self.rounds * TABLES[case.table].repeats
        if case.device == "cuda" and case.table not in ("small", "graph"):
            return interleave(steps, rounds, GPU_BLOCK_SECONDS, gpu_clock)
        return interleave(steps, rounds)

    def prepare(
        self,
        case: Case,
        name: str,
        x: Tensor,
        t: Tensor,
        truth: Truth,
    ) -> Step:
        """A contestant's step, checked: raises if its result is wrong."""
        if name in ("copy", "products"):
            return make_step(case, name, x, t)
        original = x.detach()
        if name in PEERS and PEERS[name].overwrites(case):
            x = original.clone().requires_grad_()
        step = make_step(case, name, x, t)
        check(case, name, step, x, t, truth)
        if case.table == "graph":
            step = captured(step, x, original)
            check(case, name, step, x, t, truth)
        return step
