"""The package with its CUDA operators over the emulator, CPU tensors standing for CUDA ones.

So the whole way from the public functions to the kernels runs where there is no GPU, under the very
tests that the CPU kernels pass: `python extension.py [options of pytest]` runs those below with that
package in the place of the installed one.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

import build
from translate import mirror

PACKAGE = build.OUT / "package" / "fusedloss"
STAND_INS = Path("tests/cuda_emulator/extension")
TESTED = "values edge_cases faults operators custom log_loss rounding dtypes linear"
TESTS = tuple(f"test_{name}.py" for name in TESTED.split())
OPERATORS = (
    "losses.cpp",
    "torch/operators.cpp",
    "torch/one_pass.cpp",
    "torch/tensors.cpp",
    "torch/cuda.cpp",
    "torch/products.cpp",
    "torch/python.cpp",
)


def compile_extension() -> Path:
    folder = build.OUT / "source"
    mirror(build.ROOT, build.FOLDERS, folder)
    shared = ["-fPIC", "-fvisibility=hidden"]
    kernels = ["-O1", "-include", "cuda_runtime.h", *shared]
    operators = ["-O1", *shared, f"-I{build.ROOT / STAND_INS}"]
    operators += [
        word
        for path in [*include_paths(), sysconfig.get_paths()["include"]]
        for word in ("-isystem", path)
    ]
    operators += [
        "-DTORCH_EXTENSION_NAME=_C",
        "-DFUSEDLOSS_CUDA_KEY=CPU",
        '-DFUSEDLOSS_CUDA="emulated"',
        '-DFUSEDLOSS_VERSION="emulated"',
        f'-DFUSEDLOSS_TORCH_VERSION="{torch.__version__}"',
    ]
    sources = [(Path("csrc", name), operators) for name in OPERATORS]
    sources += [(STAND_INS / "no_cpu_kernels.cpp", operators)]
    cuda = sorted((build.ROOT / "csrc" / "cuda").glob("*.cu"))
    sources += [(path.relative_to(build.ROOT), kernels) for path in cuda]
    with ThreadPoolExecutor(build.JOBS) as pool:
        objects = list(pool.map(lambda pair: build.compile_one(*pair, folder), sources))
    objects.append(build.compile_one(build.EMULATOR, ["-O2", "-fPIC"], build.HERE))
    digest = hashlib.sha256("\0".join(map(str, objects)).encode()).hexdigest()
    target = build.OUT / f"_C-{digest[:16]}.so"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [build.compiler()[0], "-shared", "-pthread", *map(str, objects)]
        command += [f"-L{path}" for path in library_paths()]
        command += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(target)
    return target


def make_package() -> Path:
    """The folder to put on Python's path: the sources of the package, and that extension."""
    extension = compile_extension()
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for name in ("_C.so", *(p.name for p in (build.ROOT / "fusedloss").iterdir())):
        if name.startswith("_C.") and name != "_C.so" or name == "__pycache__":
            continue
        link = PACKAGE / name
        link.unlink(missing_ok=True)
        link.symlink_to(extension if name == "_C.so" else build.ROOT / "fusedloss" / name)
    return PACKAGE.parent


def main() -> None:
    package = make_package()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    # Its own folders would come first in Python's path, and the installed package from there.
    command += ["-c", str(build.ROOT / "pyproject.toml"), "--rootdir", str(build.ROOT)]
    command += ["-o", f"pythonpath={build.ROOT / 'tests'}", *sys.argv[1:]]
    command += [str(build.ROOT / "tests" / name) for name in TESTS]
    paths = [str(package), str(build.HERE), str(build.ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FUSEDLOSS_EMULATED": "1"}
    sys.exit(subprocess.run(command, cwd=package, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
