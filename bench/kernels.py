"""What runs in a step: a GPU's kernels, or the CPU's operators, by torch.profiler.

`python -m bench` times whole steps, including the host's part and the gaps between kernels. This
lists the kernels, counts them, and gives the time they take by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from . import report
from .arguments import (
    add_device,
    add_only,
    add_out,
    add_peers,
    add_seconds,
    command,
    matching,
    positive,
)
from .cases import CASES, Case
from .measure import Problem, Speed, Step, describe, interleave, one_by_one, quantiles

ROUNDS, STEPS = 9, 3  # profiles of a contestant, steps of a profile
# The profiler lists these among the CPU's operators, but they are calls of autograd and
# torch.compile.
NO_OPERATOR = ("autograd::", "torch::autograd::", "Torch-Compiled", "TorchDynamo", "ProfilerStep")
SHOWN = 48  # characters of a kernel's name: names of templates are long


class Part(NamedTuple):
    """A kernel or an operator."""

    name: str
    calls: float  # a step
    seconds: float  # a step: all calls, without other operators that they call


def profiled(step: Step, on: str) -> list[Part]:
    """The kernels or operators of a step, the longest first."""
    gpu = on == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    parts = []
    for event in profiler.key_averages():
        if event.key.startswith(NO_OPERATOR):
            continue
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        if event.device_type == wanted and microseconds > 0:
            parts.append(Part(event.key, event.count / STEPS, 1e-6 * microseconds / STEPS))
    if not parts:
        raise RuntimeError(f"torch.profiler saw nothing run on {on}")
    return sorted(parts, key=lambda part: -part.seconds)


def labelled(step: Step, name: str) -> Step:
    """The step under a name that the profiler sees."""

    def seen() -> object:
        with record_function(name):
            return step()

    return seen


class Kernels(Speed):
    """Like Speed, but counts only the time of a step's kernels, and keeps the list of them."""

    def __init__(self, rounds: int, wanted: Collection[str] | None) -> None:
        super().__init__(rounds, wanted=wanted)
        self.parts: dict[str, list[Part]] = {}  # of the last case

    def time(self, case: Case, steps: Mapping[str, Step]) -> dict[str, list[float]]:
        names = {step: name for name, step in steps.items()}

        def clock(step: Step, _: float) -> Callable[[], float]:
            step()
            name = names[step]
            # The profiler sees operators only, and the compiled copies are none.
            copies = name.startswith("limit") and case.device == "cpu"
            seen = labelled(step, name) if copies else step

            def seconds() -> float:
                self.parts[name] = parts = profiled(seen, case.device)
                return sum(part.seconds for part in parts)

            return seconds

        self.parts = {}
        return interleave(steps, self.rounds, clock=clock)


def measure(case: Case, late: Problem | None, kernels: Kernels) -> list[dict[str, Any]]:
    """A row of the table and of the JSON for each contestant."""

    def without(contestant: str, problem: Problem) -> dict[str, Any]:
        return {
            "case": case.id,
            "contestant": contestant,
            "verdict": problem.verdict,
            "problem": problem.text,
        }

    if late is not None:
        return [without("ours", late)]
    try:
        row = kernels(case)
    except Exception as error:  # noqa: BLE001 - the other cases are still measured
        return [without("ours", describe(error))]
    rows: list[dict[str, Any]] = []
    for name, seconds in row.samples.items():
        step = row.limit_by if name == "limit" else name
        assert step is not None
        low, median, high = quantiles(seconds, row.samples["limit"])
        rows.append(
            {
                "case": case.id,
                "contestant": name,
                "least_bytes": case.least_bytes,
                "seconds": seconds,
                "limit": {"median": median, "low": low, "high": high},
                "parts": [part._asdict() for part in kernels.parts[step]],
            }
        )
    return rows + [without(name, problem) for name, problem in row.problems.items()]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "problem" in row:
            lines.append([row["case"], row["contestant"], None, row["problem"], None])
            continue
        whole = sum(part["seconds"] for part in row["parts"])
        # Kernels under a hundredth are counted, but not listed.
        long = [part for part in row["parts"] if part["seconds"] >= 0.01 * whole]
        what = ", ".join(
            f"{part['name'].removeprefix('void ')[:SHOWN]} {part['seconds'] / whole:.0%}"
            for part in long
        )
        calls = sum(part["calls"] for part in row["parts"])
        ratio = "{median:.2f} ({low:.2f} to {high:.2f})".format(**row["limit"])
        lines.append([row["case"], row["contestant"], f"{calls:.0f}", ratio, what])
    headings = ["case", "contestant", "calls a step", "time / limit's", "share of that time"]
    return tabulate(lines, headings, tablefmt="github", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels",
        description="Profile forward + backward: the kernels of a GPU, or the operators of the CPU, "
        "that a step runs, and what they take by themselves beside the least traffic; print the "
        "table and write it as JSON.",
    )
    add_only(parser)
    add_peers(parser)
    add_device(parser)
    parser.add_argument("--rounds", type=positive, default=ROUNDS, metavar="N", help="default: 9")
    add_seconds(parser)
    add_out(parser)
    arguments = parser.parse_args(argv)
    known = [case for case in CASES[arguments.device] if case.table in ("speed", "own")]
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # or the profiler prints when it starts and ends
    kernels = Kernels(arguments.rounds, arguments.peers)
    cases = matching(parser, arguments.only, known)
    measured = one_by_one(cases, partial(measure, kernels=kernels), arguments.seconds)
    rows = list(chain.from_iterable(measured))
    print(table(rows))
    about = report.environment(command("kernels", *argv), arguments.rounds, arguments.device)
    path = report.folder(arguments, arguments.device) / "kernels.json"
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")
    if len(measured) < len(cases):
        return 130  # a shell's status for an interrupted command
    missing = {row["verdict"] for row in rows if "verdict" in row and row["contestant"] == "ours"}
    return 1 if missing - {"skipped"} else 0
