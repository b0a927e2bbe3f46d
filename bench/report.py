"""Rows as a table in the terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tabulate import tabulate

import fusedloss

from .cases import COLUMNS, TABLES
from .measure import Row, quantiles

RESULTS = Path(__file__).parent / "results" / "cpu"


def caveat() -> str | None:
    """What a reader must know first, where the compiled kernels cannot run."""
    reason = fusedloss.info().backends["compiled"]
    if reason is None:
        return None
    return f"Not the compiled kernels here ({reason}): no figure of ours below is theirs."


def busy(load: float | None, threads: int) -> str | None:
    """A warning, where more was running than our threads: OpenMP waits long for a lost core."""
    if load is None or load <= threads + 0.75:
        return None
    return (
        f"Others shared the processor during the run (load average {load:.1f}, {threads} threads "
        "here): take the figures as rough, and repeat them on an idle machine."
    )


def _commit() -> str | None:
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(git, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _cpu() -> str:
    try:
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except FileNotFoundError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _huge_pages() -> str | None:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except FileNotFoundError:
        return None
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else None


def environment(command: str, rounds: int) -> dict[str, Any]:
    """What a stranger needs to judge the figures, or to repeat them; asked for after the run."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    threads = torch.get_num_threads()
    warnings = [text for text in (caveat(), busy(load, threads)) if text]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "fusedloss": fusedloss.__version__,
        "caveat": " ".join(warnings) or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": fusedloss.info().build.get("compiler"),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "load_average": load,
        "transparent_huge_pages": _huge_pages(),
        "rounds": rounds,
    }


def as_json(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    return json.dumps({**about, "rows": [_row(row) for row in rows]}, indent=1) + "\n"


def _row(row: Row) -> dict[str, Any]:
    return {
        "table": row.case.table,
        "case": row.case.name,
        "loss": row.case.loss,
        "shape": row.case.shape,
        "dtype": str(row.case.dtype).removeprefix("torch."),
        "path": row.path,
        "ratios": {
            name: {**asdict(ratio), "ratio": f"{COLUMNS[name].of} / {COLUMNS[name].over}"}
            for name, ratio in row.ratios().items()
        },
        "missed": row.missed(),
        "problems": {name: problem._asdict() for name, problem in row.problems.items()},
        "unit": row.unit,
        "samples": row.samples,
        "compile_seconds": row.compile_seconds,
    }


def _bar(name: str, bar: float) -> str:
    return f"{'≥' if COLUMNS[name].at_least else '≤'} {bar:g}"


def _cells(row: Row) -> list[str]:
    cells = [row.case.name]
    ratios = row.ratios()
    for name in TABLES[row.case.table].columns:
        column = COLUMNS[name]
        if name in ratios:
            ratio = ratios[name]
            cell = f"{ratio.median:.2f}"
            if len(row.samples["ours"]) > 1:
                cell += f" ({ratio.low:.2f} to {ratio.high:.2f})"
        else:
            failed = [c for c in (column.of, column.over) if c in row.problems]
            cell = f"{failed[0]} {row.problems[failed[0]].verdict}" if failed else "not measured"
        bar = row.case.bars.get(name)
        cells += [cell, "" if bar is None else _bar(name, bar)]
    return [*cells, _verdict(row)]


def _verdict(row: Row) -> str:
    if "ours" in row.problems:
        return f"OURS {row.problems['ours'].verdict}".upper()
    parts = []
    if row.missed():
        parts.append("MISSED: " + ", ".join(row.missed()))
    elif any(ratio.met for ratio in row.ratios().values()):
        parts.append("met")
    if row.unmeasured():
        parts.append("not measured: " + ", ".join(row.unmeasured()))
    return "; ".join(parts)


def tables(rows: Sequence[Row]) -> str:
    """GitHub Markdown, which reads well in a terminal too."""
    parts = []
    for name, table in TABLES.items():
        own = [row for row in rows if row.case.table == name]
        if not own:
            continue
        headers = ["case"]
        for column in table.columns:
            headers += [COLUMNS[column].heading, "bar"]
        body = [_cells(row) for row in own]
        text = tabulate(body, [*headers, "verdict"], tablefmt="github", disable_numparse=True)
        parts.append(f"## {table.title}\n\n{text}\n")
        notes = [note for row in own for note in _notes(row)]
        if notes:
            parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    return "\n".join(parts)


def _notes(row: Row) -> list[str]:
    notes = [
        f"{row.case.name}: {name} {problem.verdict}: {problem.text}"
        for name, problem in row.problems.items()
    ]
    if row.path not in (None, "compiled"):
        notes.append(f"{row.case.name}: ours took the path {row.path}, not the compiled kernel")
    return notes


def summary(rows: Sequence[Row]) -> str:
    barred = [row for row in rows if row.case.bars]
    missed = [row.case.id for row in barred if row.missed()]
    unmeasured = [row.case.id for row in barred if row.unmeasured()]
    whole = sum(not row.missed() and not row.unmeasured() for row in barred)
    broken = [f"{row.case.id} ({name})" for row in rows for name in row.broken()]
    lists = {"Missed": missed, "Not wholly measured": unmeasured, "Wrong or failed": broken}
    lines = [f"{whole} of {len(barred)} cases with a bar reach all of theirs."]
    lines += [f"{name}: {'; '.join(found)}." for name, found in lists.items() if found]
    return "\n\n".join(lines)


def markdown(rows: Sequence[Row], about: Mapping[str, Any], picture: str | None) -> str:
    facts = tabulate(
        [
            (name.replace("_", " "), "unknown" if value is None else value)
            for name, value in about.items()
            if name != "caveat"
        ],
        ["setting", "value"],
        tablefmt="github",
        disable_numparse=True,
    )
    warning = f"\n**{about['caveat']}**\n" if about["caveat"] else ""
    image = f"![Speed-up over eager, and distance to the limit]({picture})\n\n" if picture else ""
    return f"""# Speed and memory, beside PyTorch

{summary(rows)}
{warning}
{image}- **eager** is `torch.nn.functional`, **torch.compile** the same call compiled (fixed shapes, \
compiling not timed), **ours** `fusedloss.functional`. Each step delivers a fresh gradient.
- **limit** is the least traffic a step can have, by PyTorch's own operator: `torch.add(x, y)` into \
fresh memory for a pointwise loss, `x.clone()` for cross-entropy. Only cheaper fresh memory (huge \
pages) can beat it.
- Every figure is a ratio: the median over rounds of the ratio within a round, with the 20 % and \
80 % quantiles in brackets. All contestants run in one process in turn, once a round, in rotating \
order. Each is first held against float64; one that is wrong gets no figure.
- Peak memory is resident memory, each contestant in a process of its own.

{tables(rows)}
## Setting

{facts}
"""


def picture(rows: Sequence[Row], about: Mapping[str, Any]) -> Figure | None:
    """Speed-up over eager and share of the limit, for the table that has both."""
    rows = [row for row in rows if row.case.table == "speed"]
    if not rows:
        return None
    figure = Figure(figsize=(13, 3.5 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(
        "One loss step, forward + backward: fusedloss beside PyTorch\n"
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
        f"{about['cpu_capability']}" + (f"\n{about['caveat']}" if about["caveat"] else ""),
        fontsize=11,
    )
    series = {"ours": ("fusedloss", "tab:blue", -0.2), "compile": ("torch.compile", "0.6", 0.2)}
    for column, axis, form in (("eager", left, "{:.1f}"), ("limit", right, "{:.0%}")):
        for contestant, (label, colour, offset) in series.items():
            shown = [
                (place + offset, *quantiles(row.samples[column], row.samples[contestant]))
                for place, row in enumerate(rows)
                if {column, contestant} <= row.samples.keys()
            ]
            if not shown:
                continue
            at, low, median, high = np.array(shown).T
            spread = (median - low, high - median)
            bars = axis.barh(
                at, median, 0.38, xerr=spread, color=colour, label=label, error_kw={"lw": 0.8}
            )
            axis.bar_label(bars, fmt=form.format, padding=4, fontsize=7)
        goals = [
            (row.case.bars[column] ** (1 if COLUMNS[column].at_least else -1), place - 0.2)
            for place, row in enumerate(rows)
            if column in row.case.bars
        ]
        if goals:
            label = "goal for fusedloss"
            axis.plot(*zip(*goals, strict=True), "|", color="tab:red", ms=11, mew=2, label=label)
        axis.axvline(1, color="black", lw=1)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.margins(x=0.1)
        axis.set_xlim(left=0)
    for place, row in enumerate(rows):
        if "ours" in row.problems:
            text = f" fusedloss: {row.problems['ours'].verdict}"
            left.text(0, place - 0.2, text, color="tab:red", va="center", fontsize=8)
    left.set_xlabel("times as fast as PyTorch eager (longer is better)")
    right.set_xlabel("share of the memory limit's speed (100 % = a bare add or copy)")
    right.xaxis.set_major_formatter(PercentFormatter(1))
    left.set_yticks(range(len(rows)), [row.case.name for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def write(rows: Sequence[Row], about: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """The files written."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = picture(rows, about)
    paths = [folder / f"{stem}.md", folder / f"{stem}.json"]
    paths[0].write_text(markdown(rows, about, f"{stem}.png" if figure else None))
    paths[1].write_text(as_json(rows, about))
    if figure:
        paths.append(folder / f"{stem}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths
