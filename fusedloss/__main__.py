"""``python -m fusedloss info|doctor|run|bench``"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from . import doctor
from .backends import extension, info
from .patching import patch

NO_BENCH = (
    "fusedloss: the benchmark is part of the source tree, not of the installed package: "
    "unpack the sdist or clone the repository, and run `python -m bench` there"
)


def bench(arguments: Sequence[str]) -> int:
    """Runs the benchmark beside the package or, for an installed package, in the current folder."""
    for root in (Path(__file__).parent.parent, Path.cwd()):
        # The folder may have another program's bench.
        if (root / "bench" / "measure.py").is_file() and (root / "csrc" / "call.h").is_file():
            break
    else:
        print(NO_BENCH, file=sys.stderr)
        return 2
    sys.path.insert(0, str(root))
    sys.argv = ["bench", *arguments]
    try:
        runpy.run_module("bench", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as missing:
        print(
            f"fusedloss: the benchmark needs {missing.name}: {sys.executable} -m pip install "
            "'fusedloss[bench]'",
            file=sys.stderr,
        )
        return 2
    return 0


RUN_USAGE = "usage: python -m fusedloss run [-m MODULE | SCRIPT] [ARGUMENT ...]"


def run(arguments: Sequence[str]) -> int:
    """Runs a program as ``python SCRIPT`` or ``python -m MODULE`` does, under a patch, and then
    prints what the patch reached, however the program ended."""
    as_module = list(arguments[:1]) == ["-m"]
    program, *_ = command = list(arguments[as_module:]) or ["-h"]
    if program in ("-h", "--help"):
        print(RUN_USAGE, file=sys.stderr)
        return 0 if program in arguments else 2
    if not as_module and not os.path.exists(program):
        print(f"fusedloss: no script {program!r} in {os.getcwd()}", file=sys.stderr)
        return 2
    sys.argv[:] = command
    patched = patch()
    try:
        with patched:
            if as_module:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                if not getattr(sys.flags, "safe_path", False):
                    sys.path[0] = os.path.dirname(os.path.realpath(program))
                runpy.run_path(program, run_name="__main__")
    finally:
        sys.stdout.flush()
        print(patched, file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m fusedloss")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built, what runs, and why the rest does not")
    examination = commands.add_parser(
        "doctor",
        help="the usual troubles of an installation, and the cure of each",
        epilog="The exit status is 1 if there is a trouble, but not for a note.",
    )
    examination.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this as well, like the program in question; may be repeated",
    )
    # The program parses the arguments that follow.
    commands.add_parser(
        "run",
        help="run a script, or -m MODULE, with fused losses, and say which calls they reached",
        add_help=False,
    )
    # The benchmark parses the arguments that follow, also --help.
    commands.add_parser("bench", help="the benchmark, with its own options", add_help=False)
    if argv[:1] == ["bench"]:
        return bench(argv[1:])
    if argv[:1] == ["run"]:
        return run(argv[1:])
    chosen = parser.parse_args(argv)
    if chosen.command == "info":
        print(info())
        return 0
    try:
        findings = doctor.examine(chosen.modules)
    except ImportError as error:
        parser.error(str(error))
    print(doctor.report(findings))
    return 1 if any(finding.kind == "trouble" for finding in findings) else 0


if __name__ == "__main__":
    if extension is None:
        doctor.hand_over()
    sys.exit(main())
