"""Builds the compiled extension `fusedloss._C`; everything static is in pyproject.toml.

FUSEDLOSS_CUDA=0|1 chooses whether CUDA kernels are built. By default they are if torch is a CUDA
build and its nvcc is found (NVCC, CUDA_HOME/bin/nvcc, nvcc). TORCH_CUDA_ARCH_LIST picks the
architectures.

FUSEDLOSS_CPU_CAPABILITIES, such as "AVX2", names the CPU kernels that are built beside DEFAULT's,
which every CPU runs. By default all are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    # The first version that reads pyproject.toml's licence field; older ones give no useful error.
    sys.exit(
        f"fusedloss builds with setuptools>=77, and there is {setuptools.__version__} here: "
        "upgrade it first, or build with isolation"
    )

from packaging.requirements import Requirement
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


def load_module(path: Path) -> ModuleType:
    """One file of the package, since the package cannot be imported yet."""
    spec = importlib.util.spec_from_file_location(f"setup_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkits: Any = load_module(Path(__file__).with_name("fusedloss") / "_toolkit.py")

TORCH = Requirement("torch>=2.11,<2.16")

# Each source of csrc/cpu is compiled once for every capability, under torch's own names for them:
# https://docs.pytorch.org/docs/stable/backends.html#torch.backends.cpu.get_cpu_capability
CPU_CAPABILITIES: dict[str, list[str]] = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_CAPABILITIES["AVX512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *CPU_CAPABILITIES["AVX2"],
        # GCC before 13 warns about its own _mm512_undefined_ps.
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ]

# Sources without torch headers, which compile in seconds; see csrc/cuda.
NVCC_FLAGS = [
    *toolkits.NVCC_FLAGS,
    *("-Xfatbin=-compress-all", "-Xptxas=-v", "-Xcompiler=-fPIC,-Wall,-Wextra,-Wno-psabi"),
]

CXX_FLAGS = [
    *("-std=c++20", "-O2"),
    *("-g0", "-Wall", "-Wextra"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    # Nothing reads errno or floating-point traps, and keeping them prevents vectorization.
    *("-fno-math-errno", "-fno-trapping-math"),
    # A gradient has the same bits from every kernel that computes it.
    "-ffp-contract=off",
    "-Wno-psabi",  # about calls that are inlined anyway
]
# Flags that clang does not have.
GCC_FLAGS = [
    # The useful part of -O3, which takes five times as long to compile.
    *("-ftree-loop-vectorize", "-fvect-cost-model=dynamic"),
    *toolkits.GCC_SCHEDULING,
    "-Wno-maybe-uninitialized",  # about gcc 12's own AVX-512 headers
]


class ShipHeaders(build_py):
    """Puts the headers into the package with which custom losses are compiled where it is used."""

    HEADERS = ("call.h", "math/*.h", "cpu/*.h", "cuda/*.h", "cuda/*.cuh")

    def run(self) -> None:
        super().run()
        if getattr(self, "editable_mode", False):
            return  # found beside the package
        for header in sorted(h for pattern in self.HEADERS for h in Path("csrc").glob(pattern)):
            target = Path(self.build_lib, "fusedloss", "include", header.relative_to("csrc"))
            self.mkpath(str(target.parent))
            self.copy_file(str(header), str(target))


def expose_environment() -> None:
    """Let this build see the packages of the environment that it installs into, after its own.

    Build isolation hides them, but an extension only loads into the torch that it was built
    against.
    """
    isolation = ("PYTHONPATH", "PYTHONNOUSERSITE")
    answer = subprocess.run(
        [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path))"],
        env={name: value for name, value in os.environ.items() if name not in isolation},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    sys.path += [path for path in json.loads(answer.stdout) if path and path not in sys.path]


def installed_torch() -> tuple[str | None, bool]:
    """The version of the installed torch, if any, and whether it is supported."""
    try:
        found = metadata.version(TORCH.name)
    except metadata.PackageNotFoundError:
        return None, False
    return found, TORCH.specifier.contains(found, prereleases=True)


def wanted_capabilities() -> list[str]:
    chosen = os.environ.get("FUSEDLOSS_CPU_CAPABILITIES")
    names = list(CPU_CAPABILITIES) if chosen is None else re.findall(r"\w+", chosen)
    if not set(names) <= CPU_CAPABILITIES.keys():
        known = ", ".join(CPU_CAPABILITIES)
        sys.exit(f"FUSEDLOSS_CPU_CAPABILITIES={chosen!r}: the names are {known}")
    return [name for name in CPU_CAPABILITIES if name in ("DEFAULT", *names)]


def wanted_toolkit() -> toolkits.Toolkit | None:
    choice = os.environ.get("FUSEDLOSS_CUDA")
    if choice not in (None, "0", "1"):
        sys.exit(f"FUSEDLOSS_CUDA must be 0 or 1, not {choice!r}")
    if choice == "0":
        return None
    found = toolkits.find_toolkit()
    if isinstance(found, toolkits.Toolkit):
        return found
    if choice == "1":
        sys.exit(f"FUSEDLOSS_CUDA=1: {found}")
    print(f"fusedloss: building without CUDA kernels: {found}")
    return None


def architecture_flags(toolkit: toolkits.Toolkit) -> list[str]:
    """nvcc's -gencode flags: the architectures, and PTX that drivers compile for later GPUs."""
    if chosen := toolkits.chosen_architectures():
        return chosen
    listed = toolkits.output_of(toolkit.nvcc, "--list-gpu-arch")
    known = sorted(int(name) for name in re.findall(r"compute_(\d+)\b", listed))
    newest = known[-1]
    # A generation's first model has machine code for the others.
    pairs = [(number, f"sm_{number}") for number in (80, 90, 100, 120) if number in known]
    # For the other generations, a driver compiles the PTX of an earlier one.
    pairs += [(90, "compute_90"), (newest, f"compute_{newest}")]
    return [f"-gencode=arch=compute_{ptx},code={code}" for ptx, code in dict.fromkeys(pairs)]


def find_compiler() -> str | None:
    """The C++ compiler: CXX, else the first of the usual names on the PATH."""
    chosen = os.environ.get("CXX")
    if chosen:
        if shutil.which(chosen) is None:
            sys.exit(f"CXX={chosen!r}: no such program")
        return chosen
    return next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def cxx_flags(compiler: str) -> list[str]:
    return CXX_FLAGS if toolkits.is_clang(compiler) else CXX_FLAGS + GCC_FLAGS


def openmp_flags(torch_include: Path) -> list[str]:
    """at::parallel_for is a template that runs in parallel only if OpenMP is switched on."""
    config = (torch_include / "ATen" / "Config.h").read_text()
    on = sys.platform == "linux" and "#define AT_PARALLEL_OPENMP 1" in config
    return ["-fopenmp"] if on else []


def needs_torch(found: str | None) -> type[build_ext]:
    """The command for an environment without a supported torch: it fails if it is run."""

    class NeedsTorch(build_ext):
        def run(self) -> None:
            has = "none" if found is None else f"{TORCH.name} {found}"
            sys.exit(
                f"fusedloss builds against {TORCH}, and there is {has} here: "
                "install it first, or build with isolation"
            )

    return NeedsTorch


def build_kernels() -> type[build_ext]:
    """The command that compiles the extension. A function makes it, since its base class is
    torch's."""
    import torch
    from setuptools.errors import CompileError
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    torch_includes = include_paths()
    # CXXFLAGS last, so that it wins; torch's ninja files leave it out.
    last_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    # The kernels know no torch header.
    kernel_flags = cxx_flags(os.environ["CXX"]) + last_flags
    flags = cxx_flags(os.environ["CXX"]) + openmp_flags(Path(torch_includes[0]))
    # -isystem, so that warnings are about our own code only.
    flags += [word for path in torch_includes for word in ("-isystem", path)]
    flags += last_flags
    toolkit = wanted_toolkit()
    capabilities = wanted_capabilities()

    class BuildKernels(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Kept between builds, also editable ones, so that only changes are compiled again.
            tag = f"{sys.implementation.cache_tag}-{platform.machine()}-torch{torch.__version__}"
            self.build_temp = str(Path("build", tag).absolute())

        def build_extension(self, ext: Extension) -> None:
            def compile_for(name: str) -> list[str]:
                defines = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
                return self.compiler.compile(
                    sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
                    output_dir=str(Path(self.build_temp, name)),
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*kernel_flags, *CPU_CAPABILITIES[name], *defines],
                )

            def compile_cuda(source: Path) -> str:
                assert toolkit is not None
                target = Path(self.build_temp, "cuda", source.stem + ".o")
                newest = max(
                    p.stat().st_mtime for p in [*Path("csrc").rglob("*.*"), Path("setup.py")]
                )
                if not target.exists() or target.stat().st_mtime < newest:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    command = [toolkit.nvcc, *NVCC_FLAGS, *architecture_flags(toolkit)]
                    command += ["-ccbin", os.environ["CXX"], "-c", str(source), "-o", str(target)]
                    done = subprocess.run(command, check=False, capture_output=True, text=True)
                    if done.returncode != 0:
                        raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
                    # ptxas's report of registers and spills.
                    target.with_suffix(".log").write_text(done.stderr)
                return str(target)

            if toolkit is not None:
                ext.sources.append("csrc/torch/cuda.cpp")
                ext.extra_compile_args += [f'-DFUSEDLOSS_CUDA="{toolkit.version}"']
                ext.extra_compile_args += [
                    w for path in toolkit.includes for w in ("-isystem", path)
                ]
                ext.library_dirs += toolkit.libraries
                # torch has loaded its runtime by then: cudart names the same library.
                ext.libraries += ["c10_cuda", "torch_cuda", "cudart"]
            ext.extra_compile_args += [
                *flags,
                *(
                    f'-DFUSEDLOSS_BUILT_{name}="{" ".join(CPU_CAPABILITIES[name])}"'
                    for name in capabilities
                ),
                f'-DFUSEDLOSS_VERSION="{self.distribution.get_version()}"',
                f'-DFUSEDLOSS_TORCH_VERSION="{torch.__version__}"',
            ]

            def compile_operators(sources: list[str]) -> list[str]:
                return self.compiler.compile(
                    sources,
                    output_dir=str(Path(self.build_temp, "operators")),
                    include_dirs=ext.include_dirs,
                    extra_postargs=ext.extra_compile_args,
                )

            # A few sources at a time would leave cores idle, so all are compiled side by side;
            # without ninja the compiler object cannot do that. The smallest source is left for
            # build_ext, which needs one and compiles it when these are done.
            left = min(ext.sources, key=lambda source: Path(source).stat().st_size)
            operators, ext.sources = [s for s in ext.sources if s != left], [left]
            cuda_sources = sorted(Path("csrc/cuda").glob("*.cu")) if toolkit else []
            groups = len(cuda_sources) + 1 + len(capabilities)
            workers = min(groups, os.cpu_count() or 1) if self.use_ninja else 1
            with ThreadPoolExecutor(workers) as pool:
                cuda_objects = pool.map(compile_cuda, cuda_sources)
                operator_objects = pool.map(compile_operators, [operators])
                objects = pool.map(compile_for, capabilities)
            # The baseline first: if several objects hold an inline function, the linker keeps the
            # first, and that one must run on every CPU.
            ext.extra_objects += chain.from_iterable([*operator_objects, *objects, cuda_objects])
            ext.library_dirs += library_paths()
            # No -fopenmp here, to use torch's runtime: a second one would have its own threads and
            # ignore torch.set_num_threads.
            ext.libraries += ["c10", "torch", "torch_cpu", "torch_python"]
            super().build_extension(ext)

    return BuildKernels


def compiled_part() -> dict[str, Any]:
    """setup()'s arguments for the extension: none if there is no compiler."""
    compiler = find_compiler()
    if compiler is None:
        print("fusedloss: no C++ compiler (CXX, c++, g++, clang++): installing without kernels")
        return {"cmdclass": {"build_py": ShipHeaders}}
    os.environ["CXX"] = compiler
    if importlib.util.find_spec("ninja"):
        # If python is called by its path, the environment's programs are not on the PATH.
        import ninja

        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ["PATH"]

    found, usable = installed_torch()
    extension = Extension(
        "fusedloss._C",
        sources=[
            "csrc/losses.cpp",
            *sorted(str(p) for p in Path("csrc/torch").glob("*.cpp") if p.stem != "cuda"),
        ],
        depends=sorted(map(str, Path("csrc").rglob("*.*"))),
        language="c++",
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {
            "build_ext": build_kernels() if usable else needs_torch(found),
            "build_py": ShipHeaders,
        },
        "setup_requires": [] if usable else [str(TORCH)],
    }


def torch_requirement(compiled: bool) -> str:
    """A package with a compiled extension requires the torch that it was built against."""
    found, usable = installed_torch()
    if not compiled or not usable or "sdist" in sys.argv:
        return str(TORCH)
    assert found is not None
    return f"{TORCH.name}=={found.split('+')[0]}"


expose_environment()
compiled = compiled_part()
setup(install_requires=[torch_requirement(bool(compiled))], **compiled)
