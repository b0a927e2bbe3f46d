"""``python -m fusedloss doctor``: the usual troubles of an installation, and the cure of each.

Nothing here needs a working torch: if torch does not import, :func:`torch_does_not_import` says why
when fusedloss is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata, util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlparse

from . import _toolkit

PACKAGE = Path(__file__).parent
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)

Version = tuple[int, int]


@dataclass(frozen=True)
class Finding:
    """What was found, and what to do about it.

    ``"trouble"``: something does not run, or runs slower than it could; ``"note"``: nothing is wrong
    now, but a build, or another program in the same process, would suffer.
    """

    kind: Literal["ok", "note", "trouble"]
    what: str
    cure: str | None = None

    def __str__(self) -> str:
        return f"{self.kind:<8} {self.what}" + (f"\n{'':9}cure: {self.cure}" if self.cure else "")


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _version(text: str) -> Version:
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


# ---- what is installed ---------------------------------------------------------------------------


def _distribution() -> metadata.Distribution | None:
    try:
        return metadata.distribution("fusedloss")
    except metadata.PackageNotFoundError:
        return None


def _editable_source() -> Path | None:
    """The folder that `pip install -e` was given, if it was."""
    found = _distribution()
    source = json.loads(found and found.read_text("direct_url.json") or "{}")
    if not source.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(source["url"]).path))


def _reinstall() -> str:
    """The command that builds the extension again, against the installed torch."""
    pip = f"{sys.executable} -m pip install"
    if (PACKAGE.parent / "setup.py").is_file():
        return f"{pip} --no-deps -e {PACKAGE.parent}"
    # No wheel that was built elsewhere, and none from pip's cache.
    return f"{pip} --force-reinstall --no-deps --no-cache-dir SOURCE  (a checkout or the sdist)"


def _install_torch() -> str:
    return f"{sys.executable} -m pip install --force-reinstall torch"


# ---- checks --------------------------------------------------------------------------------------


def python(version: Version = sys.version_info[:2]) -> Iterator[Finding]:
    """Whether this is a Python that fusedloss is tested with."""
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        yield Finding("ok", f"Python {_dotted(version)} ({sys.executable})")
        return
    yield Finding(
        "trouble" if version < OLDEST_PYTHON else "note",
        f"Python {_dotted(version)}: fusedloss is tested with "
        f"{_dotted(OLDEST_PYTHON)} to {_dotted(NEWEST_PYTHON)}",
        "make the environment with one of these",
    )


def torch_does_not_import(error: BaseException) -> str:
    """Why torch does not import, and the cure, as one sentence."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return (
            f"fusedloss needs PyTorch, and {sys.executable} has none. "
            f"Cure: {sys.executable} -m pip install torch"
        )
    return (
        f"fusedloss needs PyTorch, which does not import: {error}. "
        f"Cure: {_install_torch()}; a library of CUDA that it misses comes with it, "
        "unless it was installed with --no-deps"
    )


def torch_release(found: str, requirements: Sequence[str] | None) -> Iterator[Finding]:
    """Whether the torch release is one that this installation requires."""
    required = [r for r in requirements or () if re.match(r"torch\b", r) and ";" not in r]
    for sign, version in re.findall(r"(==|>=|<)\s*([\w.]+)", " ".join(required)):
        if sign == "==":
            fits = found.split("+")[0] == version
        else:
            fits = (_version(found) >= _version(version)) is (sign == ">=")
        if not fits:
            yield Finding(
                "trouble",
                f"torch {found}, and fusedloss was installed for {required[0]}",
                f"{_reinstall()}; or install the torch that it was built for",
            )
            return
    yield Finding("ok", f"torch {found}")


def _others(package: Path, path: Sequence[str]) -> list[Path]:
    """The other copies of the package, in the order in which Python would find them."""
    folders = [Path(entry or ".") / "fusedloss" for entry in path]
    editable = _editable_source()
    if editable is not None:
        folders.append(editable / "fusedloss")
    found = [folder.resolve() for folder in folders if (folder / "__init__.py").is_file()]
    return [folder for folder in dict.fromkeys(found) if folder != package.resolve()]


def _hidden(package: Path, path: Sequence[str]) -> Path | None:
    """The copy with a compiled extension that this one, which has none, hides."""
    if _extensions(package):
        return None
    return next(filter(_extensions, _others(package, path)), None)


def no_extension(package: Path = PACKAGE, path: Sequence[str] | None = None) -> str:
    """Why there is no compiled extension to import, and what to do."""
    hidden = _hidden(package, sys.path if path is None else path)
    source = (package.parent / "setup.py").is_file()
    folder = f"the {'source ' if source else ''}folder {package.parent}"
    install = f"{sys.executable} -m pip install -e {package.parent}"
    if hidden is not None:
        return (
            f"fusedloss was imported from {folder}, which has no compiled extension and hides the "
            f"installed {hidden}, which has one: start Python in another folder, or {install}"
        )
    if _extensions(package):
        return f"the extension in {package} is of another Python: reinstall fusedloss with this one"
    if source:
        return (
            f"nothing has been compiled in {folder}, where fusedloss was imported from: {install}"
        )
    return "the extension was not built: reinstall fusedloss where a C++ compiler is found"


def handing_over() -> bool:
    """Whether ``python -m fusedloss`` is starting in a folder whose copy hides the installed one."""
    # "-m" is what sys.argv has while Python looks for the module.
    if sys.argv[:1] != ["-m"] or _hidden(PACKAGE, sys.path) is None:
        return False
    return any(word.endswith(("fusedloss", "fusedloss.__main__")) for word in sys.orig_argv)


_INSTALLED = """
import os, runpy, sys
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != {!r}] + [{!r}]
runpy.run_module("fusedloss", run_name="__main__", alter_sys=True)
"""


def hand_over() -> None:
    """Lets the installed copy run the command, if this copy, of a source folder, hides it."""
    hidden = _hidden(PACKAGE, sys.path)
    if hidden is None:
        return
    given = sys.argv[1:]
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(given)]
    options = before[: -2 if before[-1] == "fusedloss" else -1]  # -m fusedloss, -mfusedloss
    code = _INSTALLED.format(os.path.realpath(PACKAGE.parent), str(hidden.parent))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *options, "-c", code, *given])


def stray(package: Path, path: Sequence[str], here: Path) -> Iterator[Finding]:
    """Whether programs that start in this folder would import another copy there."""
    copy = here.resolve() / "fusedloss"
    if (copy / "__init__.py").is_file() and copy not in (
        package.resolve(),
        *_others(package, path),
    ):
        lacks = "" if _extensions(copy) else ", which has no compiled extension"
        yield Finding(
            "note",
            f"programs that start in {here} import the fusedloss there{lacks}, and not {package}",
            f"start them in another folder, or {sys.executable} -m pip install -e {here}",
        )


def copies(package: Path, path: Sequence[str]) -> Iterator[Finding]:
    """Whether a stray copy, usually a source checkout, hides the installation."""
    others = _others(package, path)
    if not others:
        yield Finding("ok", f"fusedloss from {package}, the only copy")
        return
    worse = not _extensions(package) and any(map(_extensions, others))
    yield Finding(
        "trouble" if worse else "note",
        f"fusedloss from {package} hides {', '.join(map(str, others))}"
        + (", which has the compiled extension that the former lacks" if worse else ""),
        f"run from a folder other than {package.parent}, take it out of PYTHONPATH, or install "
        f"that one: {sys.executable} -m pip install -e {package.parent}",
    )


def _extensions(package: Path) -> list[str]:
    """The files of a compiled extension, for any Python."""
    files = (*package.glob("_C.*so"), *package.glob("_C*.pyd"))
    return sorted(file.name for file in files if file.is_file())


def extension(
    package: Path, why_not: str | None, loaded: str | None, torch_found: str
) -> Iterator[Finding]:
    """Why the compiled extension does not run, or is not this package's; ``loaded``: its file."""
    if why_not is None:
        if loaded is not None and Path(loaded).resolve().parent != package.resolve():
            # An editable installation of setuptools adds modules that this copy lacks.
            yield Finding(
                "trouble",
                f"the compiled extension is of another copy of the package: {loaded}",
                f"build this one: {_reinstall()}",
            )
        else:
            yield Finding("ok", "the compiled extension loads")
        return
    files = _extensions(package)
    library = re.search(r"(lib[\w.+-]+): cannot open shared object file", why_not)
    if not files:
        what = f"no compiled extension in {package}"
        cure = _reinstall()
        if _toolkit.find_compiler() is None:
            cure = f"install a C++ compiler (Debian: apt install g++), then {cure}"
    elif not any(name == "_C" + suffix for name in files for suffix in EXTENSION_SUFFIXES):
        what = (
            f"the compiled extension is of another Python ({', '.join(files)}), "
            f"and this one loads {EXTENSION_SUFFIXES[0]}"
        )
        cure = f"install fusedloss with this Python: {_reinstall()}"
    elif "undefined symbol" in why_not or "built against torch" in why_not:
        what = f"the compiled extension is of another torch than {torch_found}: {why_not}"
        cure = _reinstall()
    elif library:
        what = f"the compiled extension needs {library[1]}, which is not found"
        cure = (
            "it was built against a CUDA build of torch of another version: " + _reinstall()
            if re.match(r"lib(cu|nv|c10_cuda|torch_cuda)", library[1])
            else f"install the package that has {library[1]}, or {_reinstall()}"
        )
    elif re.search(r"version `?(GLIBC|GLIBCXX|CXXABI)_", why_not):
        what = f"the compiled extension is of a newer system: {why_not}"
        cure = f"build it here: {_reinstall()}"
    else:
        what, cure = f"the compiled extension does not load: {why_not}", _reinstall()
    yield Finding("trouble", what, cure)


_RAISES = """
import torch
import fusedloss.functional as FL
try:
    FL.cross_entropy(torch.zeros(1, 2), torch.tensor([2]))
except IndexError:
    pass
"""


def errors(built_by: str, program: str = _RAISES) -> Iterator[Finding]:
    """Whether errors of the extension arrive: the first one may end the process, if the C++ compiler
    that built the extension was mixed with parts of another installation."""
    command = [sys.executable, "-c", program]
    # In the folder where Python finds this copy of the package.
    folder = PACKAGE.parent
    status = subprocess.run(command, check=False, capture_output=True, cwd=folder).returncode
    if status == 0:
        yield Finding("ok", "errors of the compiled extension arrive")
        return
    yield Finding(
        "trouble",
        f"the compiled extension ends the process where it should raise an error (status {status}); "
        f"it was built by {built_by}",
        f"build it by this system's own C++ compiler (CXX=/usr/bin/g++): {_reinstall()}",
    )


def tools(include: Path | None = None) -> Iterator[Finding]:
    """The tools that build the extension: a C++ compiler, Python's headers, ninja."""
    include = Path(sysconfig.get_path("include")) if include is None else include
    compiler = _toolkit.find_compiler()
    chosen = os.environ.get("CXX")
    if compiler is not None:
        yield Finding("ok", f"C++ compiler: {compiler}")
    elif chosen:
        yield Finding("note", f"CXX={chosen} is no program", "unset CXX, or correct it")
    else:
        yield Finding(
            "note",
            "no C++ compiler (c++, g++, clang++): nothing can be compiled here",
            "Debian: apt install g++; elsewhere, set CXX to one",
        )
    if (include / "Python.h").is_file():
        yield Finding("ok", f"Python's headers: {include}")
    else:
        yield Finding(
            "note",
            f"no Python.h in {include}: nothing can be compiled here",
            f"install this Python's headers (Debian: apt install "
            f"python{_dotted(sys.version_info[:2])}-dev)",
        )
    if util.find_spec("ninja") is not None or shutil.which("ninja"):
        yield Finding("ok", "ninja")
    else:
        yield Finding(
            "note",
            "no ninja: compiling takes one core, and several times as long",
            f"{sys.executable} -m pip install ninja",
        )


def driver_version() -> Version | None:
    """The newest CUDA that the NVIDIA driver runs; None: there is no driver."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        if libcuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def cuda(
    torch_cuda: str | None,
    built_cuda: str | None,
    driver: Version | None,
    fused: bool,
    nvrtc: list[str] | str,
) -> Iterator[Finding]:
    """Whether torch, the extension, its compilers and the driver have the same CUDA version.

    ``fused``: whether a backend other than the extension computes CUDA tensors; ``nvrtc``: what
    _toolkit.find_nvrtc() says.
    """
    if torch_cuda is None:
        if driver is None:
            yield Finding(
                "ok", "no CUDA: torch is built for the CPU, and there is no NVIDIA driver"
            )
        else:
            yield Finding(
                "trouble",
                f"torch is built for the CPU, and there is an NVIDIA driver (CUDA "
                f"{_dotted(driver)})",
                f"{_install_torch()} from an index that has it built for CUDA "
                f"{driver[0]}, then {_reinstall()}",
            )
        return
    ours = _version(torch_cuda)
    major = ours[0]
    if driver is not None and driver < ours:
        # Within a major version an older driver runs kernels that were compiled for its GPU.
        yield Finding(
            "trouble" if driver[0] < major else "note",
            f"the NVIDIA driver runs CUDA up to {_dotted(driver)}, and torch is built for "
            f"{torch_cuda}",
            f"update the driver, or install a torch built for CUDA {driver[0]}",
        )
    elif driver is not None:
        yield Finding("ok", f"NVIDIA driver: CUDA {_dotted(driver)}, torch's is {torch_cuda}")
    nvcc = _toolkit.find_nvcc()
    release = nvcc and _toolkit.nvcc_release(nvcc)
    fits = release is not None and _version(release)[0] == major
    if built_cuda is not None:
        if _version(built_cuda)[0] == major:
            yield Finding("ok", f"CUDA kernels, by nvcc {built_cuda}; torch's CUDA is {torch_cuda}")
        else:
            yield Finding(
                "trouble",
                f"the CUDA kernels are of CUDA {built_cuda}, and torch of CUDA {torch_cuda}",
                f"with nvcc {major}.x on the PATH: {_reinstall()}",
            )
        if not isinstance(nvrtc, str):
            version = _toolkit.version_of(*nvrtc).strip()
            yield Finding("ok", f"{version} compiles custom losses for CUDA tensors")
        elif fits:
            yield Finding("ok", f"{nvcc} compiles custom losses for CUDA tensors ({nvrtc})")
        else:
            yield Finding(
                "note",
                f"{nvrtc}; no nvcc of CUDA {major}.x: a custom loss is not compiled for CUDA tensors",
                f"{_install_torch()}, which has NVRTC with it, or install the CUDA toolkit "
                f"{torch_cuda}, or point NVCC or CUDA_HOME at one",
            )
        return
    if nvcc is None:
        why = "no nvcc was found (NVCC, CUDA_HOME/bin/nvcc, the PATH)"
        first = f"install the CUDA toolkit {torch_cuda}, or another of {major}.x, then "
    elif not fits:
        known = f"of CUDA {release}" if release else "of no known release"
        why = f"{nvcc} is {known}, and torch of CUDA {torch_cuda}"
        first = f"point NVCC or CUDA_HOME at a toolkit {major}.x, then "
    else:
        why, first = f"{nvcc} could build them", ""
    lacking = driver is not None and not fused
    runs = "PyTorch" if not fused else "another backend"
    yield Finding(
        "trouble" if lacking else "note",
        f"no CUDA kernels, so that {runs} computes CUDA tensors: {why}",
        f"{first}FUSEDLOSS_CUDA=1 {_reinstall()}",
    )


def openmp(maps: str) -> Iterator[Finding]:
    """Whether more than one OpenMP runtime is loaded, according to /proc/self/maps."""
    loaded = re.findall(
        r"(/\S*/lib(?:gomp|iomp5|omp)(?:-[\da-f]+)?\.so[\w.]*)$", maps, re.MULTILINE
    )
    runtimes = list(dict.fromkeys(loaded))
    if len(runtimes) < 2:
        yield Finding("ok", f"OpenMP: {runtimes[0] if runtimes else 'no runtime'}")
        return
    kinds = {re.split(r"[-.]", Path(name).name)[0] for name in runtimes}
    yield Finding(
        "trouble" if len(kinds) > 1 else "note",
        f"{len(runtimes)} OpenMP runtimes are loaded, each with threads of its own: "
        + ", ".join(runtimes),
        "install torch and what brings the other from one source (all by pip, or all by conda), "
        "and unset LD_PRELOAD; torch.set_num_threads() reaches torch's alone",
    )


# ---- all of them ---------------------------------------------------------------------------------


def examine(also_import: Sequence[str] = ()) -> list[Finding]:
    """All findings about this process and its environment.

    Args:
        also_import: modules that the program in question imports; the libraries they load count.

    Raises:
        ImportError: one of them does not import.
    """
    import torch

    from . import backends

    for name in also_import:
        import_module(name)
    info = backends.info()
    found = _distribution()
    maps = Path("/proc/self/maps")
    return [
        *python(),
        *torch_release(torch.__version__, found.requires if found else None),
        *stray(PACKAGE, sys.path, Path.cwd()),
        *copies(PACKAGE, sys.path),
        *extension(
            PACKAGE,
            info.backends["compiled"],
            getattr(backends.extension, "__file__", None),
            torch.__version__,
        ),
        *(errors(info.build.get("compiler", "?")) if info.backends["compiled"] is None else ()),
        *tools(),
        *cuda(
            torch.version.cuda,
            info.build.get("cuda"),
            driver_version(),
            info.backends["triton"] is None,
            _toolkit.find_nvrtc(),
        ),
        *(openmp(maps.read_text()) if maps.exists() else ()),
    ]


def report(findings: Sequence[Finding]) -> str:
    """The findings as text, and how many of them are troubles."""
    troubles = sum(finding.kind == "trouble" for finding in findings)
    notes = sum(finding.kind == "note" for finding in findings)
    counts = [
        f"{number} {name}{'' if number == 1 else 's'}"
        for number, name in ((troubles, "trouble"), (notes, "note"))
        if number
    ]
    return "\n".join([*map(str, findings), ", ".join(counts) or "no trouble found"])
