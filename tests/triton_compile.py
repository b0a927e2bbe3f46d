"""The Triton kernels, compiled for GPUs that need not be there: `python triton_compile.py`.

It follows each call from tensors to kernels, on CPU tensors, and stops before the launch. It prints
the compilers' report on every kernel as JSON, one line each.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import custom_losses
import fusedloss.functional as FL
from cases import DTYPES, FAMILIES, REDUCTIONS, at_shape
from fusedloss import backends
from fusedloss.backends.triton import custom_rows, pointwise, rows, runtime
from helpers import leaf
from row_losses import ROW_LOSSES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = [(pointwise, "pointwise"), (rows, "cross_entropy"), (custom_rows, "custom_rows")]
KERNELS += [(runtime, "count_classes")]


class Driver:
    """The attributes of a device that compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        # Triton caches compiled kernels by device.
        self.get_current_device = lambda: list(TARGETS.values()).index(target)
        self.get_current_stream = lambda device: 0
        self.get_active_torch_device = lambda: torch.device("cpu")


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any, tell: Callable[[str, Any, float], None]) -> None:
        self.kernel, self.tell = kernel, tell

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            started = time.perf_counter()
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.tell(self.kernel.__name__, compiled, time.perf_counter() - started)

        return compile_only


@contextmanager
def compiling(target: GPUTarget, tell: Callable[[str, Any, float], None]) -> Iterator[None]:
    driver.set_active(Driver(target))
    backends.fused_on = {"cpu": "triton"}
    backends.compiled_runs = False
    runtime.binds_once = False
    kernels = [(module, name, getattr(module, name)) for module, name in KERNELS]
    for module, name, kernel in kernels:
        setattr(module, name, Compiled(kernel, tell))
    try:
        yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


@functools.cache
def of_nvidia(target: GPUTarget, ptx: str) -> dict[str, Any]:
    """ptxas's report, and how wide the kernel reads and writes memory."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        arch = "sm_90a" if target.arch == 90 else f"sm_{target.arch}"
        command = [get_ptxas(target.arch).path, "-v", "--fmad=false", f"--gpu-name={arch}"]
        told = subprocess.run(
            [*command, source, "-o", cubin], capture_output=True, text=True, check=True
        ).stderr

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, told)))

    def widest(instruction: str) -> int:
        """Bytes of the widest access."""
        found = re.findall(rf"{instruction}\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx)
        return max((int(vector or 1) * int(size) // 8 for vector, size in found), default=0)

    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill"),
        "load": widest("ld"),
        "store": widest("st"),
        # What the program that finishes last needs to see what all have stored.
        "ordered": "gpu.acq_rel.add" in ptx and "ld.global.cv" in ptx,
    }


def report(target: str, call: str, kernel: str, compiled: Any, seconds: float) -> None:
    told: dict[str, Any] = {
        "target": target,
        "call": call,
        "kernel": kernel,
        "seconds": round(seconds, 2),
    }
    told |= {"shared": compiled.metadata.shared, "binary": compiled.hash}
    if TARGETS[target].backend == "cuda":
        told |= of_nvidia(TARGETS[target], compiled.asm["ptx"])
    print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--own", action="append", help="a loss of custom_losses.py, not a family")
    parser.add_argument("--own-rows", action="append", help="a loss of row_losses.py")
    parser.add_argument("--reduction", choices=REDUCTIONS, default="mean")
    parser.add_argument("--classes", type=int, nargs="+", default=[32, 1000, 32000])
    asked = parser.parse_args()
    reduction = asked.reduction
    families = asked.family or (() if asked.own or asked.own_rows else FAMILIES)
    for target, name, dtype in itertools.product(
        asked.target or TARGETS, asked.own or (), asked.dtype or DTYPES
    ):
        # One kernel for each combination of gradients, whatever the parameters.
        loss, sample = getattr(custom_losses, name), torch.rand(2, 640, 200, dtype=DTYPES[dtype])
        for wanted, clip_grad in (((0, 1), 0.5), ((0, 1), 3.0), ((0,), None), ((1,), None)):
            x, y = (t.detach().requires_grad_(i in wanted) for i, t in enumerate(sample))
            tell = functools.partial(report, target, f"{name} {dtype} {wanted}")
            with compiling(TARGETS[target], tell):
                value = loss(x, y, clip_grad=clip_grad, reduction=reduction)
                value.backward(torch.ones_like(value))
    for target, name, dtype, classes in itertools.product(
        asked.target or TARGETS, asked.own_rows or (), asked.dtype or DTYPES, asked.classes
    ):
        (case,) = (case for case in ROW_LOSSES if case.id == name)
        inputs = case.inputs((64,), classes, DTYPES[dtype])
        tell = functools.partial(report, target, f"{name} {dtype} {classes}")
        with compiling(TARGETS[target], tell):
            of_rows = (leaf(t) if t.is_floating_point() and len(t) == 64 else t for t in inputs)
            value = case.loss(*of_rows, reduction=reduction)
            value.backward(torch.ones_like(value))
    for target, family, dtype in itertools.product(
        asked.target or TARGETS, families, asked.dtype or DTYPES
    ):
        rows = family.startswith("cross_entropy")
        for shape in [(64, c) for c in asked.classes] if rows else [(640, 200)]:
            case = at_shape(family, shape)
            sample = case.sample(DTYPES[dtype])
            tell = functools.partial(report, target, f"{case.name} {dtype}")
            with compiling(TARGETS[target], tell):
                loss = getattr(FL, case.loss)
                value = loss(
                    leaf(sample.input), sample.target, reduction=reduction, **sample.options
                )
                value.backward(torch.ones_like(value))


if __name__ == "__main__":
    main()
