"""The speed table: `python -m bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence

from . import compare, examples, figures, kernels, memory, models, numerics, report
from .arguments import (
    add_device,
    add_only,
    add_out,
    add_peers,
    add_seconds,
    command,
    matching,
    positive,
)
from .cases import CASES, TABLES, Case
from .measure import (
    CASE_SECONDS,
    COMPILE_SECONDS,
    ENOUGH_ROUNDS,
    Problem,
    Row,
    Speed,
    contestants,
    describe,
    one_by_one,
    share_limits,
)

ROUNDS, QUICK_ROUNDS = 25, 7
QUICK_COMPILE_SECONDS = 30.0
COMMANDS = {
    "compare": (compare.main, "what got faster or slower between two runs"),
    "figures": (figures.main, "write the figures of README and docs from committed results"),
    "kernels": (kernels.main, "the kernels of a step, or operators, and their time alone"),
    "models": (models.main, "whole training steps of small models"),
    "examples": (examples.main, "the results of the examples with custom losses"),
    "numerics": (numerics.main, "the largest error of every loss and dtype, in ULP"),
}


def run(
    cases: Sequence[Case],
    rounds: int,
    compile_seconds: float,
    wanted: Collection[str] | None = None,
    seconds: float | None = None,
) -> list[Row]:
    """Measure each case. If one fails, its row says so and the others go on."""
    speed = Speed(rounds, compile_seconds, wanted)

    def measured(case: Case, late: Problem | None) -> Row:
        if late is not None:
            return Row(case, "s", problems=dict.fromkeys(contestants(case, wanted), late))
        try:
            in_bytes = TABLES[case.table].unit == "bytes"
            return memory.measure(case, wanted) if in_bytes else speed(case)
        except Exception as error:  # noqa: BLE001 - the other cases' results are kept
            problem = describe(error)
            return Row(case, "s", problems=dict.fromkeys(TABLES[case.table].contestants, problem))

    return one_by_one(cases, measured, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]][0](argv[1:])
    others = "".join(
        f"\n  python -m bench {name:<8} {what}" for name, (_, what) in COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the fused losses beside PyTorch eager, torch.compile, whichever peers "
        "are installed, and the memory limit;\nprint the table and write it as Markdown, JSON and "
        "pictures.",
        epilog="The exit status is 1 if a result of ours was wrong or missing. A bar that is "
        f"missed is shown as missed,\nand is no failure of the run.\n\nother commands:{others}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a first look")
    add_only(parser)
    add_peers(parser)
    add_device(parser)
    add_out(parser)
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help=f"default: {ROUNDS}, quick: {QUICK_ROUNDS}; "
        f"a case of more than {CASE_SECONDS:.0f} s stops at {ENOUGH_ROUNDS} or later",
    )
    add_seconds(parser)
    arguments = parser.parse_args(argv)

    known = CASES[arguments.device]
    cases = [case for case in known if case.quick or not arguments.quick]
    cases = matching(parser, arguments.only, cases)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    compile_seconds = QUICK_COMPILE_SECONDS if arguments.quick else COMPILE_SECONDS
    if arguments.seconds is not None:  # leave time for measuring
        compile_seconds = min(compile_seconds, arguments.seconds / 3)
    if report.caveat():
        print(report.caveat())

    rows = run(cases, rounds, compile_seconds, arguments.peers, arguments.seconds)
    share_limits(rows)
    about = report.environment(command(*argv), rounds, arguments.device)
    print(f"\n{report.tables(rows)}\n{report.summary(rows)}\n")
    if about["caveat"]:
        print(f"{about['caveat']}\n")
    folder = report.folder(arguments, arguments.device)
    # Part of a table never replaces the whole one, nor a part with more cases.
    measured = sum(row.begun for row in rows)
    whole = len(rows) == len(known) and measured >= report.measured(folder / "speed.json")
    stem = "speed" if whole else "speed-part"
    for path in report.write(rows, about, folder, stem):
        print(f"wrote {path}")
    if len(rows) < len(cases):
        return 130  # a shell's status for an interrupted command
    return 1 if any({"ours", "unit"} & {*row.broken()} for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
