"""Peak memory of forward + backward, beyond the inputs.

On the CPU it is the memory of the process, with a new process for each contestant; on a GPU it is
what torch's allocator handed out.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from .cases import CASES, TABLES, Case
from .measure import Problem, Row, contestants, describe, make_step, running


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or the peak (VmHWM).

    Linux counts it, so it includes scratch memory that PyTorch's allocator (and profiler) never
    saw. getrusage's ru_maxrss will not do: a child process starts with its parent's.
    """
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


def allocated(case: Case, contestant: str) -> int:
    """Peak bytes on the GPU during a step."""
    x, t = case.inputs()
    step = make_step(case, contestant, x, t)
    step()  # makes predictions, workspaces and handles, once
    x.grad = t.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def growth(case: Case, contestant: str) -> int:
    """Peak bytes during steps, in a fresh process."""
    # Code pages and threads do not count as a step's memory.
    small = replace(case, shape=(2, *case.shape[1:]))
    make_step(small, contestant, *small.inputs())()
    x, t = case.inputs()
    step = make_step(case, contestant, x, t)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def gradients(case: Case) -> int:
    """Bytes of the gradients, where the table leaves them out."""
    if case.layer is None:
        return 0
    rows, width, classes = case.shape
    numbers = (rows + (case.gradients - 1) * classes) * width
    return numbers * case.dtype.itemsize


def measure(case: Case, wanted: Collection[str] | None = None) -> Row:
    row = Row(case, "bytes")
    for contestant in contestants(case, wanted):
        if case.device == "cuda":
            try:
                with running(contestant):
                    row.samples[contestant] = [float(allocated(case, contestant) - gradients(case))]
            except Exception as error:  # noqa: BLE001 - the others are still measured
                row.problems[contestant] = describe(error)
            continue
        command = [sys.executable, "-m", "bench.memory", case.id, contestant]
        done = subprocess.run(
            command,
            check=False,
            cwd=Path(__file__).parent.parent,
            # Fixed, so that glibc gives back what is freed: as it adapts, its heap may keep any part.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            row.samples[contestant] = [float(done.stdout) - gradients(case)]
        else:
            lines = done.stderr.strip().splitlines()
            text = lines[-1] if lines else f"exit status {done.returncode}"
            row.problems[contestant] = Problem("failed", text)
    if "gradients" in TABLES[case.table].columns:
        size = case.gradients * math.prod(case.shape) * case.dtype.itemsize
        row.samples["gradients"] = [float(size)]
    if "mebibytes" in TABLES[case.table].columns:
        row.samples["mebibyte"] = [2.0**20]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory",
        description="Print the bytes that one contestant's steps take at most, beyond the inputs.",
    )
    memory_cases = {case.id: case for case in CASES["cpu"] if TABLES[case.table].unit == "bytes"}
    parser.add_argument("case", choices=memory_cases, metavar="CASE")
    parser.add_argument("contestant", choices=TABLES["memory"].contestants)
    arguments = parser.parse_args()
    print(growth(memory_cases[arguments.case], arguments.contestant))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # noqa: BLE001 - whatever it is, the row says it
        sys.exit(describe(error).text)
