"""The speed table: `python -m bench`."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from . import memory, report
from .cases import CASES, TABLES, Case
from .measure import CASE_SECONDS, COMPILE_SECONDS, ENOUGH_ROUNDS, Row, Speed, describe

ROUNDS, QUICK_ROUNDS = 15, 7
QUICK_COMPILE_SECONDS = 30.0


def run(cases: Sequence[Case], rounds: int, compile_seconds: float | None) -> list[Row]:
    """Measure each case; one that fails says so in its own row. Ctrl-C ends with what is there."""
    speed = Speed(rounds, compile_seconds)
    rows = []
    progress = tqdm(cases, unit="case", disable=None)  # None: no bar where there is no terminal
    for case in progress:
        progress.set_description(case.id)
        try:
            rows.append(memory.measure(case) if case.table == "memory" else speed(case))
        except KeyboardInterrupt:
            break
        except Exception as error:  # noqa: BLE001 - the other cases' results are kept
            problem = describe(error)
            rows.append(
                Row(case, "s", problems=dict.fromkeys(TABLES[case.table].contestants, problem))
            )
    return rows


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of rounds: at least 1")
    return number


def regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the fused losses beside PyTorch eager, torch.compile and the memory "
        "limit; print the table and write it as Markdown, JSON and a picture.",
        epilog="The exit status is 1 if a result of ours was wrong or missing. A bar that is "
        "missed is shown as missed, and is no failure of the run.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a first look")
    parser.add_argument(
        "--only", type=regex, metavar="REGEX", help="cases whose 'table: name' matches (search)"
    )
    parser.add_argument(
        "--out", type=Path, default=report.RESULTS, metavar="DIR", help="default: bench/results/cpu"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help=f"default: {ROUNDS}, quick: {QUICK_ROUNDS}; "
        f"a case of more than {CASE_SECONDS:.0f} s stops at {ENOUGH_ROUNDS} or later",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args(argv)

    cases = [case for case in CASES if case.quick or not arguments.quick]
    if arguments.only:
        cases = [case for case in cases if arguments.only.search(case.id)]
        if not cases:
            known = "\n  ".join(case.id for case in CASES)
            parser.error(f"--only {arguments.only.pattern!r} matches none of\n  {known}")
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    compile_seconds = QUICK_COMPILE_SECONDS if arguments.quick else COMPILE_SECONDS
    if report.caveat():
        print(report.caveat())

    rows = run(cases, rounds, None if arguments.no_compile else compile_seconds)
    about = report.environment(shlex.join(["python", "-m", "bench", *argv]), rounds)
    print(f"\n{report.tables(rows)}\n{report.summary(rows)}\n")
    if about["caveat"]:
        print(f"{about['caveat']}\n")
    # A part never takes the place of the whole table.
    stem = "speed" if len(rows) == len(CASES) else "speed-part"
    for path in report.write(rows, about, arguments.out, stem):
        print(f"wrote {path}")
    if len(rows) < len(cases):
        return 130  # as a shell says of an interrupted command
    return 1 if any({"ours", "unit"} & {*row.broken()} for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
