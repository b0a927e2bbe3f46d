"""Compiles CUDA sources with g++ over the emulator, and runs them.

One program has three variants: plain; address, under AddressSanitizer and
UndefinedBehaviorSanitizer; and thread, under ThreadSanitizer. What has been compiled from the same
text before is taken from the cache.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from translate import mirror

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "cuda_emulator"
# Where there is CUDA C++ to translate.
FOLDERS = (Path("csrc"), HERE.relative_to(ROOT))
EMULATOR = Path("emulator.cpp")

VARIANTS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    # See __tsan_volatile_read8 in emulator.cpp.
    "thread": ["-fsanitize=thread", "--param=tsan-distinguish-volatile=1"],
}
COMPILE = ["-std=c++20", "-g", "-fPIE", "-fno-omit-frame-pointer", "-ffp-contract=off"]
COMPILE += [
    "-fmax-errors=5",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # of vectors that are loaded and used under one condition
    "-I.",
    "-isystem",
    str(HERE / "include"),
]
# A library that the program loads finds the emulator in it.
LINK = ["-pie", "-pthread", "-rdynamic", "-ldl"]
JOBS = 2


@cache
def compiler() -> tuple[str, str]:
    """g++, and what it says of itself."""
    name = os.environ.get("CXX", "g++")
    version = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
    return name, version.stdout


def compile_one(source: Path, options: list[str], folder: Path) -> Path:
    """The object file of a source in the folder, or of one anywhere, that includes from there."""
    name, version = compiler()
    command = [name, *COMPILE, *options, "-x", "c++", str(source)]
    text = subprocess.run([*command, "-E"], cwd=folder, stdout=subprocess.PIPE, check=True).stdout
    digest = hashlib.sha256("\0".join([version, *command]).encode() + text).hexdigest()
    target = OUT / "objects" / f"{source.stem}-{digest[:16]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-c", "-o", str(unfinished)], cwd=folder, check=True)
        unfinished.replace(target)
    return target


def build(sources: Sequence[Path], variant: str, folder: Path | None = None) -> Path:
    """The program of the sources, which are named from the root of the repository.

    ``folder`` holds the translated tree; without it the tree is translated anew.
    """
    if folder is None:
        folder = OUT / "source"
        mirror(ROOT, FOLDERS, folder)
    sanitize = VARIANTS[variant]
    with ThreadPoolExecutor(JOBS) as pool:
        # The emulator itself is compiled alike for every variant.
        emulator = pool.submit(compile_one, EMULATOR, ["-O2"], HERE)
        cuda = ["-O1", *sanitize, "-include", "cuda_runtime.h"]
        objects = list(pool.map(lambda source: compile_one(source, cuda, folder), sources))
        objects.append(emulator.result())
    digest = hashlib.sha256("\0".join([variant, *map(str, objects)]).encode()).hexdigest()
    program = OUT / f"{sources[-1].stem}-{variant}-{digest[:16]}"
    if not program.exists():
        unfinished = program.with_suffix(f".{os.getpid()}")
        command = [compiler()[0], *LINK, *sanitize, *map(str, objects), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(program)
    return program


def run(
    program: Path, *arguments: str, settings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; ``settings`` are environment variables (see emulator.cpp)."""
    command = [str(program), *arguments]
    # ThreadSanitizer wants addresses where it expects them.
    if shutil.which("setarch"):
        command = ["setarch", platform.machine(), "-R", *command]
    environment = {**os.environ, **(settings or {})}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="named from the repository's root")
    parser.add_argument("--variant", choices=VARIANTS, default="plain")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="arguments to run the program with")
    options = parser.parse_args()
    program = build(options.sources, options.variant)
    print(program)
    if options.run is not None:
        result = run(program, *options.run)
        print(result.stdout, end="")
        print(result.stderr, end="", file=sys.stderr)
        sys.exit(result.returncode)


if __name__ == "__main__":
    main()
