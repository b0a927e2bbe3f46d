"""What got faster or slower between two runs: `python -m bench compare A.json B.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

# What both runs measured beside ours, the steadiest first: it tells a slower machine from slower
# code. Runs up to version 0.1.1 call PyTorch's copy "limit", as those on a GPU still do.
YARDSTICKS = {"copy": "copy by PyTorch", "limit": "copy by PyTorch", "eager": "eager"}


def spread(row: Mapping[str, Any]) -> tuple[str, np.ndarray[Any, Any]] | None:
    """20 %, median and 80 % of ours, in units of the yardstick of the same round."""
    samples = row["samples"]
    for name, heading in YARDSTICKS.items():
        if name in samples and "ours" in samples:
            ratios = np.divide(samples["ours"], samples[name])
            return heading, np.quantile(ratios, [0.2, 0.5, 0.8])
    return None


# Differences below this count as none: memory has no spread to judge by.
LEAST = 0.02
WORDS = {"s": ("faster", "SLOWER"), "bytes": ("less", "MORE")}


def verdict(before: Sequence[float], after: Sequence[float], unit: str = "s") -> str:
    """Compares spreads (20 %, median, 80 %): different where they do not overlap."""
    better, worse = WORDS[unit]
    if after[2] < before[0] * (1 - LEAST):
        return better
    if after[0] > before[2] * (1 + LEAST):
        return worse
    return "same"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line for each case of both runs: its name, ours in either, the change, the verdict."""
    earlier = {(row["table"], row["case"]): row for row in a["rows"]}
    lines = []
    for row in b["rows"]:
        name = f"{row['table']}: {row['case']}"
        other = earlier.get((row["table"], row["case"]))
        if other is None:
            continue
        before, after = spread(other), spread(row)
        if before is None or after is None or before[0] != after[0]:
            lines.append((name, "", "", "", "", "not comparable"))
            continue
        yardstick = before[0]
        figures = [f"{s[1]:.3g} ({s[0]:.3g} to {s[2]:.3g})" for _, s in (before, after)]
        change = after[1][1] / before[1][1] - 1
        said = verdict(before[1].tolist(), after[1].tolist(), row["unit"])
        lines.append((name, yardstick, *figures, f"{change:+.1%}", said))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="Compare ours between two runs, each time in units of what the same run "
        "measured beside it (PyTorch's copy, else eager), so that a slower machine is not taken for "
        "slower code. Faster or slower is said where the spreads, from 20 % to 80 %, lie apart.",
        epilog="The exit status is 1 if a case got slower or takes more memory.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    arguments = parser.parse_args(argv)
    runs = []
    for path in (arguments.before, arguments.after):
        try:
            runs.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
    for label, about in zip(("A", "B"), runs, strict=True):
        where = about.get("gpu") or about["cpu"]
        print(f"{label}: {about['date']}, {where}, torch {about['torch']}, {about['commit']}")
    lines = compare(*runs)
    if not lines:
        parser.error("the two runs have no case in common")
    headers = ["case", "in units of", "A", "B", "change", "verdict"]
    print("\n" + tabulate(lines, headers, tablefmt="github", disable_numparse=True))
    counts = Counter(line[-1] for line in lines)
    print("\n" + ", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["SLOWER"] or counts["MORE"] else 0


if __name__ == "__main__":
    sys.exit(main())
