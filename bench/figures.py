"""The figures of README and docs, from committed results: `python -m bench figures`.

A page has marks for its figures, and this command writes the text between them:

    <!-- figures: cpu/speed ratios speed -->
    <!-- /figures -->

The first word is a JSON under bench/results, the second a view, and the rest are the view's
arguments (in quotes if they have spaces). A mark stands on a line of its own, so that it cuts no
sentence in two.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .cases import COLUMNS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- figures: (.+?) -->)(.*?)(<!-- /figures -->)", re.DOTALL)

Run = Mapping[str, Any]


class NoFigure(Exception):
    """A mark asks for something that is not in the results."""


@cache
def load(path: Path) -> Run:
    try:
        run: Run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NoFigure(str(error)) from None
    return run


def rows_of(run: Run, table: str, name: str = "") -> list[Run]:
    """The table's rows with a ratio whose case matches the regular expression."""
    rows = [
        r for r in run["rows"] if re.fullmatch(table, r["table"]) and re.search(name, r["case"])
    ]
    rows = [r for r in rows if r["ratios"]]
    if not rows:
        raise NoFigure(f"no case of {table!r} matches {name!r}")
    return rows


def ratios(run: Run, table: str, name: str = "") -> str:
    """A table: the case, and each ratio that was measured."""
    rows = rows_of(run, table, name)
    columns = [c for c in COLUMNS if any(c in row["ratios"] for row in rows)]
    body = [
        [row["case"]]
        + [f"{row['ratios'][c]['median']:.2f}" if c in row["ratios"] else "" for c in columns]
        for row in rows
    ]
    headers = ["case", *(COLUMNS[c].heading for c in columns)]
    return f"\n{tabulate(body, headers, tablefmt='github', disable_numparse=True)}\n"


# The columns of a first page, in words for a newcomer.
_HEADLINES = {
    "eager": "faster than eager PyTorch",
    "compile": "than torch.compile",
    "liger": "than Liger-Kernel",
    "memory": "peak memory, share of eager's",
}


def spans(run: Run, *labelled: str) -> str:
    """A first table: the smallest and the largest ratio of groups of cases, each a label and a
    regular expression, and the setting."""
    groups = [
        (label, rows_of(run, "(speed|memory)", name))
        for label, name in zip(labelled[::2], labelled[1::2], strict=True)
    ]

    def cell(rows: Sequence[Run], column: str) -> str:
        found = [row["ratios"][column]["median"] for row in rows if column in row["ratios"]]
        if not found:
            return ""
        if column == "memory":
            return f"{min(found):.0%} to {max(found):.0%}"
        low, high = (f"{ratio:.{int(ratio < 9.95)}f}" for ratio in (min(found), max(found)))
        return f"{low} to {high}×"

    columns = [c for c in _HEADLINES if any(cell(rows, c) for _, rows in groups)]
    body = [[label, *(cell(rows, c) for c in columns)] for label, rows in groups]
    headers = ["", *(_HEADLINES[c] for c in columns)]
    text = tabulate(body, headers, tablefmt="github", disable_numparse=True)
    return f"\n{text}\n{setting(run)}"


def limit(run: Run) -> str:
    """A sentence that says what the limit of the run is."""
    if run.get("gpu"):
        what = "a plain copy of the same traffic, by PyTorch's own kernel"
    elif any("copy" in row["samples"] for row in run["rows"]):
        what = (
            "the fastest plain copy of the same traffic that this machine can do, into memory prepared\n"
            "as ours is"
        )
    else:
        what = (
            "PyTorch's own copy of the same traffic into new memory. For 32 MiB and more fusedloss asks\n"
            "for huge pages, and that copy does not, so values below 1 are real"
        )
    return f"\n*limit* is the time of {what}.\n"


def missed(run: Run) -> str:
    """How many cases with a bar miss one, and how many there are."""
    barred = [
        row
        for row in run["rows"]
        if row["missed"] or any(ratio["bar"] is not None for ratio in row["ratios"].values())
    ]
    count = sum(bool(row["missed"]) for row in barred)
    return f"\n{count} of {len(barred)} cases with a goal miss it.\n"


def slower(run: Run) -> str:
    """Every case in which someone is faster than ours, and how many times."""
    found = [
        f"{row['table']}: {row['case']} ({COLUMNS[name].of} {1 / ratio['median']:.2f} times)"
        for row in run["rows"]
        for name, ratio in row["ratios"].items()
        if COLUMNS[name].at_least and round(ratio["median"], 2) < 1
    ]
    if not found:
        return "\nNo case of this run is slower than what stands beside it.\n"
    return "\n" + "\n".join(f"- {case}" for case in found) + "\n"


def setting(run: Run) -> str:
    """Where, when, and with which versions."""
    if run.get("gpu"):
        where = run["gpu"]
    else:
        threads = f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"
        where = f"{threads} of {run['cpu']} ({run['cpu_capability']})"
    versions = f"fusedloss {run['fusedloss']}, torch {run['torch'].partition('+')[0]}"
    return f"\nMeasured on {where}, {versions}, {run['date'][:10]}.\n"


def steps(run: Run) -> str:
    """The models' training steps."""
    headers = [
        "model",
        "loss, share of torch's step",
        "loss, torch / ours",
        "whole step, torch / ours",
        "peak MiB, torch",
        "peak MiB, ours",
    ]
    body = [
        [
            f"{model['title']}",
            f"{model['share']['median']:.1%}",
            f"{model['loss']['median']:.2f}",
            f"{model['step']['median']:.2f}",
            f"{model['memory']['torch'] / 2**20:.0f}",
            f"{model['memory']['ours'] / 2**20:.0f}",
        ]
        for model in run["models"]
    ]
    return f"\n{tabulate(body, headers, tablefmt='github', disable_numparse=True)}\n"


def _ulps(error: float) -> str:
    """Two decimals for small errors: half an ULP is the cost of one rounding."""
    return f"{error:.2f}" if error < 9.995 else f"{error:.3g}" if error < 1e5 else f"{error:.1e}"


def errors(run: Run, place: str = "rows") -> str:
    """The largest errors of every loss and dtype, in ULP; for "hard", of every hard input."""
    names = ("loss", "dtype") if place == "rows" else ("input", "loss", "dtype")
    columns = ("element", "mean", "gradient")
    lines = [
        f"| {' | '.join(names)} | {' | | '.join(columns)} | |",
        "|" + len(names) * "---|" + 2 * len(columns) * "--:|",
        "|" + len(names) * " |" + len(columns) * " ours | torch |",
    ]
    for row in _found(run, place):
        labels = [f"`{row[name]}`" if name == "loss" else row[name] for name in names]
        cells = [_ulps(row[who][column]) for column in columns for who in ("ours", "torch")]
        lines.append(f"| {' | '.join([*labels, *cells])} |")
    text = "\n".join(lines)
    return f"\n{text}\n"


def _found(run: Run, place: str) -> Any:
    """The value at a place: keys and list indices, joined by slashes."""
    value: Any = run
    for key in place.split("/"):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            raise NoFigure(f"nothing stands at {place!r}") from None
    return value


def _formatted(run: Run, place: str, form: str) -> str:
    try:
        return format(_found(run, place), form)
    except ValueError as error:
        raise NoFigure(str(error)) from None


def numbers(run: Run, *labelled: str) -> str:
    """A table of single numbers: label, place or place:format, ..."""
    body = []
    for label, wanted in zip(labelled[::2], labelled[1::2], strict=True):
        place, _, form = wanted.partition(":")
        body.append([label, _formatted(run, place, form)])
    return f"\n{tabulate(body, ['', ''], tablefmt='github', disable_numparse=True)}\n"


def table(run: Run, place: str, *columns: str) -> str:
    """A list of objects as a table, with the fields that are named: `field` or `field:format`."""
    fields = [column.partition(":")[::2] for column in columns]
    body = [[_formatted(row, field, form) for field, form in fields] for row in _found(run, place)]
    headers = [field for field, _ in fields]
    return f"\n{tabulate(body, headers, tablefmt='github', disable_numparse=True)}\n"


VIEWS: dict[str, Callable[..., str]] = {
    view.__name__: view
    for view in (ratios, spans, limit, missed, slower, setting, steps, errors, numbers, table)
}


def figure(request: str, results: Path = RESULTS) -> str:
    source, *asked = shlex.split(request)
    if not asked or asked[0] not in VIEWS:
        raise NoFigure(f"no view {asked[:1]}; there are {', '.join(VIEWS)}")
    view, *arguments = asked
    try:
        return VIEWS[view](load(results / f"{source}.json"), *arguments)
    except (TypeError, ValueError) as error:
        raise NoFigure(str(error)) from None


def rewrite(text: str, results: Path = RESULTS) -> str:
    """The page with the figures of its marks."""

    def block(match: re.Match[str]) -> str:
        try:
            return match[1] + figure(match[2], results) + match[4]
        except NoFigure as error:
            raise NoFigure(f"figures: {match[2]}: {error}") from None

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    return [*ROOT.glob("README.md"), *sorted((ROOT / "docs").rglob("*.md"))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench figures",
        description="Write the figures of README and docs from the results under bench/results.",
        epilog="The exit status is 1 if --check finds a page that differs.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing, tell what differs")
    arguments = parser.parse_args(argv)
    status = 0
    for page in pages():
        text = page.read_text()
        try:
            fresh = rewrite(text)
        except NoFigure as error:
            parser.exit(2, f"{page}: {error}\n")
        if fresh == text:
            continue
        if arguments.check:
            print(f"{page}: differs from the results; python -m bench figures writes it")
            status = 1
        else:
            page.write_text(fresh)
            print(f"wrote {page}")
    return status


if __name__ == "__main__":
    sys.exit(main())
