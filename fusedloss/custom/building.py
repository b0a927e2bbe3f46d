"""Compiles a printed loss on the machine it runs on, once, and keeps it in a cache on disk by its
content.

A loss is one file and one compiler call, so a build system would have nothing to do.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .. import _caller, _toolkit, backends
from .._toolkit import (
    GCC_SCHEDULING,
    NVCC_FLAGS,
    NVRTC_FLAGS,
    chosen_architectures,
    find_nvrtc,
    find_toolkit,
    is_clang,
    run,
    version_of,
)

SECONDS = 300.0  # limit for a compiler, and for the wait for another process's compiler

_CXX_FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w"),
    # The formulas use registers already, and GCC 12 crashes on some of them in this pass.
    "-fno-tree-slp-vectorize",
    # The flags of the package's kernels: see setup.py.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]
_PACKAGE = Path(__file__).resolve().parents[1]


class CannotCompile(Exception):
    """Why there is no compiled kernel. The reference runs instead."""


@dataclass(frozen=True)
class Engine:
    """Makes sources of the structs that printing.cpp() prints."""

    device: str  # in messages
    folder: str  # of its headers
    header: str
    macro: str
    suffix: str  # of a source
    compiled: str  # and of what a compiler makes of it

    def source(self, struct: str) -> str:
        return (
            f'#include "{self.folder}/{self.header}"\n\nnamespace fusedloss {{\nnamespace {{\n\n'
            f"{struct}\n}}  // namespace\n}}  // namespace fusedloss\n\n"
            f"{self.macro}(fusedloss::Loss)\n"
        )


@functools.cache
def headers() -> Path:
    """The folder with the headers for printed losses: in the package, or beside it in a source tree."""
    shipped = _PACKAGE / "include"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "csrc"


def cache_directory() -> Path:
    """The folder of compiled losses: FUSEDLOSS_CACHE_DIR, or fusedloss in XDG_CACHE_HOME or ~/.cache.

    Raises:
        RuntimeError: there is no home directory.
    """
    chosen = os.environ.get("FUSEDLOSS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fusedloss")


def find_compiler() -> str:
    """The C++ compiler: CXX, else the first of the usual names on the PATH.

    Raises:
        CannotCompile: there is none.
    """
    found = _toolkit.find_compiler()
    if found is not None:
        return found
    chosen = os.environ.get("CXX")
    raise CannotCompile(
        f"CXX={chosen!r} is no program" if chosen else "no C++ compiler (CXX, c++, g++, clang++)"
    )


@functools.cache
def _headers_digest(folder: str) -> str:
    digest = hashlib.sha256()
    for pattern in ("call.h", "math/*.h", f"{folder}/*.h", f"{folder}/*.cuh"):
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
        # Interleaves more, which 32 registers can hold, but 16 cannot.
        scheduling = [*scheduling, "--param=sched-pressure-algorithm=2"]
    flags = [*_CXX_FLAGS, *scheduling, *build["cpu_flags"].split(), *flags]
    return [compiler, *flags, f"-I{headers()}"]


def nvrtc_command(architecture: str) -> list[str]:
    """NVRTC's call, up to the file names.

    Raises:
        CannotCompile: there is no NVRTC of torch's CUDA version.
    """
    nvrtc = find_nvrtc()
    if isinstance(nvrtc, str):
        raise CannotCompile(nvrtc)
    flags = [*NVRTC_FLAGS, f"--gpu-architecture=sm_{architecture}"]
    return [*nvrtc, *flags, f"--include-path={headers()}"]


def nvcc_command(architecture: str) -> list[str]:
    """The same of nvcc."""
    toolkit = find_toolkit()
    if isinstance(toolkit, str):
        raise CannotCompile(toolkit)
    flags = [*NVCC_FLAGS, "-w", "-cubin", f"-arch=sm_{architecture}"]
    return [toolkit.nvcc, *flags, "-ccbin", find_compiler(), f"-I{headers()}"]


def architectures() -> list[str]:
    """Those of TORCH_CUDA_ARCH_LIST, else of the GPUs of this machine: "90" for capability 9.0.

    Raises:
        CannotCompile: there is none.
    """
    try:
        chosen = re.findall(r"code=sm_(\w+)", " ".join(chosen_architectures()))
    except ValueError as error:
        raise CannotCompile(f"TORCH_CUDA_ARCH_LIST: {error}") from error
    if chosen:
        return chosen
    found = range(torch.cuda.device_count())
    capabilities = sorted({torch.cuda.get_device_capability(device) for device in found})
    if not capabilities:
        raise CannotCompile("there is no GPU, and TORCH_CUDA_ARCH_LIST names none")
    return [f"{major}{minor}" for major, minor in capabilities]


CPU = Engine("CPU", "cpu", "pointwise_kernel.h", "FUSEDLOSS_CUSTOM", ".cpp", ".so")
CPU_ROWS = Engine("CPU", "cpu", "custom_rows_kernel.h", "FUSEDLOSS_CUSTOM_ROWS", ".cpp", ".so")
CUDA = Engine("GPU", "cuda", "custom.cuh", "FUSEDLOSS_CUSTOM_CUDA", ".cu", ".cubin")
CUDA_ROWS = Engine(
    "GPU", "cuda", "custom_rows_held.cuh", "FUSEDLOSS_CUSTOM_ROWS_CUDA", ".cu", ".cubin"
)


@dataclass(frozen=True)
class Library:
    """A printed loss, the compiler call, up to the file names, that compiles it, and the version of the
    compiler."""

    name: str  # in file names
    engine: Engine
    source: str
    command: list[str]
    version: str

    @functools.cached_property
    def key(self) -> str:
        """A name that no other library has. Where the headers are is not in it, since their text is."""
        command = shlex.join(self.command).replace(str(headers()), "")
        return key_of(self.name, self.engine, self.source, self.version, command)

    def load(self, loader: Callable[[str], object]) -> None:
        """Calls loader(path) for the library in the cache, compiled if it is not there yet. If the cache
        cannot be used, or its library cannot be loaded, compiles one for this call alone.

        Raises:
            CannotCompile: the library cannot be compiled, or does not load; the message says why.
        """
        try:
            loader(str(self._in_cache()))
            return
        except (OSError, RuntimeError) as error:  # the loader, and Path.home(), raise RuntimeError
            not_kept = str(error).rstrip(".")
        try:
            with tempfile.TemporaryDirectory(
                prefix="fusedloss-", ignore_cleanup_errors=True
            ) as folder:
                library = Path(folder, self.key + self.engine.compiled)
                self._compile(library, "not kept")
                loader(str(library))
        except (OSError, RuntimeError) as error:
            raise CannotCompile(f"{not_kept}; {error}") from error
        chosen = os.environ.get("FUSEDLOSS_CACHE_DIR")
        if chosen not in _warned_of:
            _warned_of.add(chosen)
            _caller.warn(
                "fusedloss keeps no compiled losses, and each process compiles them again: "
                f"{not_kept}. Set FUSEDLOSS_CACHE_DIR to a folder to which only you can write",
                RuntimeWarning,
            )

    def _in_cache(self) -> Path:
        library = _cache() / (self.key + self.engine.compiled)
        if not _is_sound(library):
            with _alone(library.with_suffix(".lock")):
                if not _is_sound(library):
                    self._compile(library, f"kept in {library.parent}")
        return library

    def _compile(self, library: Path, kept: str) -> None:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".building-") as folder:
            source = Path(folder, f"{self.key}{self.engine.suffix}")
            _write(source, self.source.encode())
            content = self._compiled(source)
            finished = Path(folder, "finished")
            # A dynamic loader ignores anything after the last segment.
            _write(finished, content + hashlib.sha256(content).digest())
            # The source is there to be read.
            os.replace(source, library.with_suffix(source.suffix))
            # Atomic, for processes that look at the same time.
            os.replace(finished, library)
        with suppress(OSError):  # not every system can open folders
            _sync(library.parent)
        seconds = time.perf_counter() - started
        print(
            f"fusedloss: compiled {self.name} for the {self.engine.device} in {seconds:.1f} s; {kept}",
            file=sys.stderr,
        )

    def _compiled(self, source: Path) -> bytes:
        """The content of the library that the compiler makes."""
        built, command = source.with_suffix(self.engine.compiled), shlex.join(self.command)
        try:
            # In the temporary folder, which also removes the files of a compiler that was killed.
            done = run(
                *(*self.command, str(source), "-o", str(built)),
                seconds=SECONDS,
                TMPDIR=str(source.parent),
            )
        except OSError as error:
            raise CannotCompile(str(error)) from error
        if done.returncode != 0:
            raise CannotCompile(f"{command} fails: {done.stderr.strip()[-2000:]}")
        content = built.read_bytes() if built.is_file() else b""
        if not _is_whole(content):
            raise CannotCompile(f"{command} leaves no whole library, and no error")
        return content


def key_of(name: str, engine: Engine, source: str, *more: str) -> str:
    """A name that begins with this one, and that no other source, compiled otherwise, has."""
    digest = hashlib.sha256()
    for part in (source, _headers_digest(engine.folder), *more):
        digest.update(part.encode(errors="surrogateescape") + b"\0")
    return f"{name}-{digest.hexdigest()[:24]}"


def cpu_library(name: str, struct: str, engine: Engine = CPU) -> Library:
    """``engine``: CPU_ROWS for a row loss.

    Raises:
        CannotCompile, OSError: there is no compiler.
    """
    command = cpu_command()
    return Library(name, engine, engine.source(struct), command, version_of(command[0]))


def cuda_library(
    name: str,
    struct: str,
    architecture: str,
    command_for: Callable[[str], list[str]],
    engine: Engine = CUDA,
) -> Library:
    """``command_for``: nvrtc_command or nvcc_command; ``engine``: CUDA_ROWS for a row loss. Raises as
    the command does."""
    command = command_for(architecture)
    compiler = command[: command.index(NVCC_FLAGS[0])]
    return Library(name, engine, engine.source(struct), command, version_of(*compiler))


def load_cuda(
    name: str, struct: str, loader: Callable[[str, str], object], engine: Engine = CUDA
) -> None:
    """Calls loader(architecture, path) for the library of each architecture, as Library.load() does.
    NVRTC compiles it, or where that cannot, nvcc.

    Raises:
        CannotCompile: neither can; the message says why.
    """
    for architecture in architectures():
        reasons = []
        for command_for in (nvrtc_command, nvcc_command):
            try:
                library = cuda_library(name, struct, architecture, command_for, engine)
                library.load(partial(loader, architecture))
                break
            except (CannotCompile, OSError) as error:
                reasons.append(str(error))
        else:
            raise CannotCompile("; ".join(reasons))


_warned_of: set[str | None] = set()  # values of FUSEDLOSS_CACHE_DIR


def _cache() -> Path:
    """The folder of compiled losses. Nobody else may write to it, since its files are executed.

    Raises:
        OSError, RuntimeError: there is no such folder, or others may write to it.
    """
    chosen = cache_directory()
    chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = chosen.resolve(strict=True)
    if chosen.is_symlink():
        _require_ours(chosen, chosen.lstat())
    _require_ours(folder, folder.stat())
    return folder


def _require_ours(path: Path, found: os.stat_result) -> None:
    if os.name == "nt":  # has neither these numbers nor these bits
        return
    if found.st_uid != os.geteuid():
        raise PermissionError(
            f"{path} belongs to user {found.st_uid}, and this process to user {os.geteuid()}"
        )
    # The bits of a link mean nothing.
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"others can write to {path}; chmod go-w {path} ends that")


def _opened(path: str, flags: int) -> int:
    """An opener that follows no link, waits for no pipe, and lets nobody else write."""
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags | more, 0o644)


def _is_sound(library: Path) -> bool:
    """Whether a library is ours and undamaged: loading another one ends the process, or worse."""
    try:
        with open(library, "rb", opener=_opened) as file:
            found = os.fstat(file.fileno())
            _require_ours(library, found)
            content = file.read() if stat.S_ISREG(found.st_mode) else b""
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _is_whole(content: bytes) -> bool:
    """Whether a library has all segments of its header: otherwise a dynamic loader reads beyond the end
    of the file, which ends the process."""
    if sys.platform != "linux":
        return bool(content)

    def number(at: int, size: int = 8) -> int:
        return int.from_bytes(content[at : at + size], "little")

    if content[:4] != b"\x7fELF":
        return False
    if content[4:6] != b"\2\1":  # not 64 bits, or not little endian: another header
        return True
    first, count, entry = number(32), number(56, 2), 56
    heads = range(first, first + entry * count, entry)
    return first + entry * count <= len(content) and all(
        number(head + 8) + number(head + 32) <= len(content) for head in heads
    )


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb", opener=_opened) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process compiles, and the others wait. Without locks all compile, which does no harm."""
    with ExitStack() as held:
        with suppress(ImportError, OSError):
            import fcntl

            file = held.enter_context(open(lock, "ab", opener=_opened))
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.05)
        yield
