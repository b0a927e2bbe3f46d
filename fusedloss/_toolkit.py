"""The compilers of this machine, and how kernels are compiled with them.

Imports nothing of the package: setup.py loads it by its path.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# A gradient has the same bits from every kernel that computes it.
_CUDA_FLAGS = ["-std=c++20", "-fmad=false"]
NVCC_FLAGS = [*_CUDA_FLAGS, "-O3", "--expt-relaxed-constexpr"]
# Functions without another word are a device's, like constexpr ones to nvcc.
NVRTC_FLAGS = [
    *(*_CUDA_FLAGS, "--device-as-default-execution-space", "--pre-include=cuda/nvrtc.h"),
    *("-w", "--split-compile=0"),  # on all cores
]

# A formula alone is one chain of dependent instructions: the first two flags interleave several
# formulas. The third makes a loop as fast wherever the linker puts it. GCC only: clang refuses the
# first.
GCC_SCHEDULING = ["-fschedule-insns", "-fsched-pressure", "-falign-loops=32"]


def run(
    *command: str, seconds: float = 60.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a compiler. After that many seconds, kills it and the processes that it has started.

    Raises:
        OSError: it cannot be started; TimeoutError: it took longer.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException as error:  # also Ctrl-C, which does not reach the new session
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(
                    f"{command[0]} was ended, since it took longer than {seconds:g} s"
                ) from error
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def find_compiler() -> str | None:
    """The C++ compiler: CXX, else the first of the usual names on the PATH."""
    chosen = os.environ.get("CXX")
    names = (chosen,) if chosen else ("c++", "g++", "clang++")
    return next(filter(None, map(shutil.which, names)), None)


def _cuda_home() -> str | None:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def find_nvcc() -> str | None:
    home = _cuda_home()
    candidates = (os.environ.get("NVCC"), home and str(Path(home, "bin", "nvcc")), "nvcc")
    return next(filter(None, (shutil.which(name) for name in candidates if name)), None)


def nvcc_release(nvcc: str) -> str | None:
    """The CUDA release that nvcc reports, such as "13.0".

    Raises:
        OSError: it does not run.
    """
    release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    return release and release[1]


@functools.cache
def version_of(*compiler: str) -> str:
    return run(*compiler, "--version").stdout


def is_clang(compiler: str) -> bool:
    return "clang" in version_of(compiler)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, as its nvcc describes it."""

    nvcc: str
    version: str
    includes: list[str]
    libraries: list[str]


def output_of(*command: str) -> str:
    done = run(*command)
    return done.stdout + done.stderr


def find_toolkit() -> Toolkit | str:
    """The CUDA toolkit of torch's CUDA version; or, as text, why there is none."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc: neither NVCC, nor CUDA_HOME/bin/nvcc, nor nvcc on the PATH"
    # nvcc may be a script that calls another one, so its folder says nothing about the toolkit.
    try:
        says = output_of(nvcc, "--dryrun", "-o", os.devnull, "empty.cu")
        version = nvcc_release(nvcc)
    except OSError as error:
        return f"{nvcc} does not run: {error}"
    if version is None:
        return f"{nvcc} --version names no release"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {version}, and torch of CUDA {torch.version.cuda}"

    def paths(variable: str, flag: str) -> list[str]:
        line = next((x for x in says.splitlines() if x.startswith(f"#$ {variable}=")), "")
        return re.findall(rf'"-{flag}([^"]+)"', line)

    return Toolkit(nvcc, version, paths("INCLUDES", "I"), paths("LIBRARIES", "L"))


def find_nvrtc() -> list[str] | str:
    """The command of NVRTC of torch's CUDA version; or, as text, why there is none."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    # Where torch's wheels have it, or a toolkit; else where the system does.
    folders = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib"))
    if home := _cuda_home():
        folders.append(Path(home, "lib64"))
    library = next((path for folder in folders if (path := folder / name).is_file()), Path(name))
    # Isolated, so that neither the environment nor a module in the folder gets in its way.
    script = str(Path(__file__).with_name("_nvrtc.py"))
    command = [sys.executable, "-I", "-S", script, str(library)]
    try:
        done = run(*command, "--version")
    except OSError as error:
        return f"NVRTC does not run: {error}"
    return command if done.returncode == 0 else f"no NVRTC: {done.stderr.strip()}"


def chosen_architectures() -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST; none if that is not set."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    flags: list[str] = _get_cuda_arch_flags()
    return flags
