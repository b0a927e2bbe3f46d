"""Custom losses compiled over the emulator, out of the very source that NVRTC is given."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import build
import fusedloss
from fusedloss import custom
from fusedloss.custom.building import CUDA, CUDA_ROWS, Engine
from translate import mirror

# For the emulator's loader: see cuda.h there.
EXPORTS = """
#define FUSEDLOSS_EXPORT(NAME, ...) EMULATOR_LIBRARY_KERNEL(NAME)
using namespace fusedloss::cuda;
"""
KERNELS = {
    CUDA: "FUSEDLOSS_CUSTOM_VECTORIZED(FUSEDLOSS_EXPORT)\nFUSEDLOSS_CUSTOM_STRIDED(FUSEDLOSS_EXPORT)\n",
    CUDA_ROWS: "FUSEDLOSS_CUSTOM_ROWS_KERNELS(FUSEDLOSS_EXPORT)\n",
}


@cache
def _headers() -> Path:
    folder = build.OUT / "source"
    mirror(build.ROOT, build.FOLDERS, folder)
    return folder


def library(
    name: str,
    struct: str,
    variant: str = "plain",
    against: Path | None = None,
    engine: Engine = CUDA,
) -> Path:
    """The library of a struct, as printing.cpp() prints it, for a program of that variant, which
    has the emulator; or for the extension ``against``, which has it."""
    text = engine.source(struct) + EXPORTS + KERNELS[engine]
    key = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    source = build.OUT / "own_losses" / f"{key}.cu"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text)
    sanitize = build.VARIANTS[variant]
    options = ["-O1", *sanitize, "-include", "cuda_runtime.h", "-Icsrc"]
    options += ["-fPIC", "-fvisibility=hidden"]
    compiled = build.compile_one(source, options, _headers())
    target = compiled.with_suffix(".so" if against is None else f".{against.stem}.so")
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [build.compiler()[0], "-shared", *sanitize, str(compiled), "-o", str(unfinished)]
        subprocess.run([*command, *([str(against)] if against else [])], check=True)
        unfinished.replace(target)
    return target


def load(loss: custom.PointwiseLoss) -> str:
    """Makes a loss ready for the operators over the emulator, and says what they call it."""
    extension = fusedloss.backends.extension
    assert extension is not None and extension.__file__ is not None
    against = Path(extension.__file__).resolve()

    found = library(loss._traced.identifier, loss._struct, against=against)
    extension.load_custom_kernels(found.stem, loss.inputs, len(loss._names) + 1, 90, str(found))
    return found.stem
