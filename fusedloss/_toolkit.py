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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NVCC_FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr"),
    # A gradient has the same bits from every kernel that forms it, whatever else that computes.
    "-fmad=false",
]

# For formulas that stand side by side: each alone is a chain that waits for itself. GCC's own flags:
# clang refuses them.
GCC_SCHEDULING = ["-fschedule-insns", "-fsched-pressure"]


def run(
    *command: str, seconds: float = 60.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a compiler. Where it takes longer than that it is ended, with what it has started.

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
        except BaseException as error:  # an interrupt from the keyboard too, which it does not get
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(
                    f"{command[0]} was ended, since it took longer than {seconds:g} s"
                ) from error
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@functools.cache
def version_of(compiler: str) -> str:
    return run(compiler, "--version").stdout


def is_clang(compiler: str) -> bool:
    return "clang" in version_of(compiler)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, by what its own nvcc says of it."""

    nvcc: str
    version: str
    includes: list[str]
    libraries: list[str]


def output_of(*command: str) -> str:
    done = run(*command)
    return done.stdout + done.stderr


def find_toolkit() -> Toolkit | str:
    """The CUDA toolkit for torch's own CUDA version; or, as text, why there is none."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (os.environ.get("NVCC"), home and str(Path(home, "bin", "nvcc")), "nvcc")
    nvcc = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if nvcc is None:
        return "no nvcc: neither NVCC, nor CUDA_HOME/bin/nvcc, nor nvcc on the PATH"
    # Not guessed from where nvcc lies, which may be a script that calls another.
    try:
        says = output_of(nvcc, "--dryrun", "-o", os.devnull, "empty.cu")
        release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    except OSError as error:
        return f"{nvcc} does not run: {error}"
    if release is None:
        return f"{nvcc} --version names no release"
    version = release[1]
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {version}, and torch of CUDA {torch.version.cuda}"

    def paths(variable: str, flag: str) -> list[str]:
        line = next((x for x in says.splitlines() if x.startswith(f"#$ {variable}=")), "")
        return re.findall(rf'"-{flag}([^"]+)"', line)

    return Toolkit(nvcc, version, paths("INCLUDES", "I"), paths("LIBRARIES", "L"))


def chosen_architectures() -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST; none where that is not set."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    flags: list[str] = _get_cuda_arch_flags()
    return flags
