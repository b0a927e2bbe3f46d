"""Compiles a printed loss on the machine it runs on, once: a cache on disk keeps it by its content.

One file, one compiler call: there is nothing that a build system could order or skip.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import backends
from .._toolkit import (
    GCC_SCHEDULING,
    NVCC_FLAGS,
    chosen_architectures,
    find_toolkit,
    is_clang,
    version_of,
)

_CXX_FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w"),
    # Formulas are of registers already; and GCC 12 fails on some of them while it looks for more.
    "-fno-tree-slp-vectorize",
    # As the package's own kernels: see setup.py.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    "-DFUSEDLOSS_NO_TORCH",
]
_PACKAGE = Path(__file__).resolve().parents[1]


class CannotCompile(Exception):
    """Why there is no compiled kernel; the reference runs instead."""


@dataclass(frozen=True)
class Engine:
    """What a struct, as printing.cpp() prints it, becomes a source for."""

    device: str  # in words
    folder: str  # of its headers
    header: str
    macro: str
    suffix: str

    def source(self, struct: str) -> str:
        return (
            f'#include "{self.folder}/{self.header}"\n\nnamespace fusedloss {{\nnamespace {{\n\n'
            f"{struct}\n}}  // namespace\n}}  // namespace fusedloss\n\n"
            f"{self.macro}(fusedloss::Loss)\n"
        )


CPU = Engine("CPU", "cpu", "custom.h", "FUSEDLOSS_CUSTOM", ".cpp")
CUDA = Engine("GPU", "cuda", "custom.cuh", "FUSEDLOSS_CUSTOM_CUDA", ".cu")


@functools.cache
def headers() -> Path:
    """The folder with the headers that a printed loss includes: in the package, or, in a source
    tree, beside it."""
    shipped = _PACKAGE / "include"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "csrc"


def cache_directory() -> Path:
    """Where compiled losses are kept: FUSEDLOSS_CACHE_DIR, else a folder of XDG_CACHE_HOME, else of
    ~/.cache."""
    chosen = os.environ.get("FUSEDLOSS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fusedloss")


def find_compiler() -> str:
    """The C++ compiler: CXX, else the first of the usual names on the PATH.

    Raises:
        CannotCompile: there is none.
    """
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise CannotCompile(
        f"CXX={chosen!r} is no program" if chosen else "no C++ compiler (CXX, c++, g++, clang++)"
    )


@functools.cache
def _headers_digest(folder: str) -> str:
    digest = hashlib.sha256()
    for pattern in ("engine.h", "math/*.h", f"{folder}/*.h", f"{folder}/*.cuh"):
        for path in sorted(headers().glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cpu_command() -> list[str]:
    """The compiler call, up to the file names."""
    build = backends.info().build
    capability: str = build["cpu_capability"]
    flags = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    compiler = find_compiler()
    scheduling = [] if is_clang(compiler) else GCC_SCHEDULING
    if scheduling and capability == "AVX512":
        # Puts more side by side, which 32 registers hold and 16 would not.
        scheduling = [*scheduling, "--param=sched-pressure-algorithm=2"]
    flags = [*_CXX_FLAGS, *scheduling, *build["cpu_flags"].split(), *flags]
    return [compiler, *flags, f"-I{headers()}"]


def build_cpu(name: str, struct: str) -> tuple[str, Path]:
    """Compiles a struct for the CPU engine.

    Returns:
        A name that tells it from any other, and the library.

    Raises:
        CannotCompile: there is no compiler, or it fails.
    """
    return _build(name, CPU, struct, cpu_command())


def cuda_command() -> list[str]:
    """nvcc's call, up to the file names.

    Raises:
        CannotCompile: there is no nvcc of torch's CUDA version, or nothing to compile for.
    """
    toolkit = find_toolkit()
    if isinstance(toolkit, str):
        raise CannotCompile(toolkit)
    flags = [*NVCC_FLAGS, *_architectures(), "-Xcompiler=-fPIC,-fvisibility=hidden,-w"]
    # Shared: it is the runtime that torch has loaded, with torch's current device and errors.
    flags += ["-shared", "-cudart=shared"]
    return [toolkit.nvcc, *flags, "-ccbin", find_compiler(), f"-I{headers()}"]


def _architectures() -> list[str]:
    """nvcc's -gencode flags: TORCH_CUDA_ARCH_LIST's, else those of the GPUs that are here."""
    if chosen := chosen_architectures():
        return chosen
    found = range(torch.cuda.device_count())
    capabilities = sorted({torch.cuda.get_device_capability(device) for device in found})
    if not capabilities:
        raise CannotCompile("there is no GPU, and TORCH_CUDA_ARCH_LIST names none")
    numbers = [f"{major}{minor}" for major, minor in capabilities]
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]


def build_cuda(name: str, struct: str) -> tuple[str, Path]:
    """Compiles a struct for the CUDA engine; see build_cpu()."""
    return _build(name, CUDA, struct, cuda_command())


def _build(name: str, engine: Engine, struct: str, command: list[str]) -> tuple[str, Path]:
    source, headers_digest = engine.source(struct), _headers_digest(engine.folder)
    digest = hashlib.sha256()
    for part in (source, headers_digest, version_of(command[0]), shlex.join(command)):
        digest.update(part.encode() + b"\0")
    key = f"{name}-{digest.hexdigest()[:24]}"
    library = _cache() / f"{key}.so"
    if not library.exists():
        with _alone(library.with_suffix(".lock")):
            if not library.exists():
                _compile(name, engine, source, command, library)
    return key, library


def _cache() -> Path:
    folder = cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    # Where nothing can be kept, each process compiles for itself.
    return folder if writable else _own_folder()


@functools.cache
def _own_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="fusedloss-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process compiles, others wait for it. Without locks all compile, which does no harm."""
    with ExitStack() as held:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(held.enter_context(lock.open("w")), fcntl.LOCK_EX)
        yield


def _compile(name: str, engine: Engine, source: str, command: list[str], library: Path) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".building-") as folder:
        file, built = Path(folder, f"{library.stem}{engine.suffix}"), Path(folder, library.name)
        file.write_text(source)
        done = subprocess.run(
            [*command, str(file), "-o", str(built)], check=False, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise CannotCompile(f"{shlex.join(command)} fails: {done.stderr.strip()[-2000:]}")
        # Whole or not at all, for processes that look at the same time; the source for whoever
        # wants to read it.
        os.replace(file, library.with_suffix(engine.suffix))
        os.replace(built, library)
    seconds = time.perf_counter() - started
    print(
        f"fusedloss: compiled {name} for the {engine.device} in {seconds:.1f} s; "
        f"kept in {library.parent}",
        file=sys.stderr,
    )
