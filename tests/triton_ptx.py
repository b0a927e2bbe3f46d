"""The Triton kernels compiled for a GPU that need not be there: python triton_ptx.py CALL...

Runs the calls' own way from tensors to kernels, on CPU tensors, and stops short of the launch.
Prints, a line each, what ptxas and the assembly say of every kernel, as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)


class NoDriver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    """The kernels that were asked for, instead of their launches."""

    def __init__(self) -> None:
        self.kernels: list[tuple[str, Any, float]] = []

    def __enter__(self) -> Compiled:
        driver.set_active(NoDriver())
        self.run = JITFunction.run

        def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            started = time.perf_counter()
            kernel = self.run(function, *args, grid=grid, warmup=True, **options)
            self.kernels.append((function.__name__, kernel, time.perf_counter() - started))
            return kernel

        JITFunction.run = run
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self.run


def report(name: str, kernel: Any, seconds: float) -> dict[str, Any]:
    """What ptxas says of it, and how wide it reads and writes memory."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        told = subprocess.run(
            [get_ptxas(TARGET.arch).path, "-v", "--fmad=false", "--gpu-name=sm_90a", source, "-o", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, told)))

    def widths(instruction: str) -> dict[int, int]:
        """How many accesses there are of each number of bytes."""
        found: dict[int, int] = {}
        for vector, size in re.findall(rf"{instruction}\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx):
            width = int(vector or 1) * int(size) // 8
            found[width] = found.get(width, 0) + 1
        return found

    return {
        "kernel": name,
        "seconds": round(seconds, 2),
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill"),
        "shared": kernel.metadata.shared,
        "loads": widths("ld"),
        "stores": widths("st"),
        "fused": len(re.findall(r"\bfma\.rn\.f", ptx)),
        "doubles": len(re.findall(r"\.f64", ptx)),
    }
