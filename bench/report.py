"""Rows as a table in the terminal, Markdown, JSON and pictures."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tabulate import tabulate

import fusedloss

from .cases import COLUMNS, LABELS, TABLES
from .measure import JOINING, Row, quantiles
from .peers import PEERS

RESULTS = Path(__file__).parent / "results"
# In the checkout, even if this folder is a link into it.
UNPUBLISHED = Path(__file__).resolve().parent.parent / "build" / "bench"


def folder(arguments: argparse.Namespace, device: str) -> Path:
    """The folder for a device's results, by the options of `add_out`; created if it is missing."""
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    kept = RESULTS if arguments.publish else UNPUBLISHED
    path: Path = arguments.out or kept / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path


def caveat() -> str | None:
    """A warning for the reader if the compiled kernels cannot run."""
    reason = fusedloss.info().backends["compiled"]
    if reason is None:
        return None
    return f"Not the compiled kernels here ({reason}): no figure of ours below is theirs."


def busy(load: float | None, threads: int) -> str | None:
    """A warning if more was running than our threads: OpenMP waits long for a core that it lost."""
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(command: str, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """What a stranger needs to judge or repeat the figures; collected after the run."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    threads = torch.get_num_threads()
    warnings = [text for text in (caveat(), busy(load, threads)) if text]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "fusedloss": fusedloss.__version__,
        "caveat": " ".join(warnings) or None,
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "peers": {name: peer.version for name, peer in PEERS.items() if peer.version is not None},
        "python": platform.python_version(),
        "compiler": fusedloss.info().build.get("compiler"),
        "nvcc": fusedloss.info().build.get("cuda") or None,
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "load_average": load,
        "transparent_huge_pages": _huge_pages(),
        "rounds": rounds,
    }


def measured(path: Path) -> int:
    """How many cases have figures in the JSON of an earlier run; 0 if there is none."""
    if not path.exists():
        return 0
    return sum(bool(row["samples"]) for row in json.loads(path.read_text())["rows"])


def as_json(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    return json.dumps({**about, "rows": [_row(row) for row in rows]}, indent=1) + "\n"


def _row(row: Row) -> dict[str, Any]:
    return {
        "table": row.case.table,
        "case": row.case.name,
        "loss": row.case.loss,
        "shape": row.case.shape,
        "dtype": str(row.case.dtype).removeprefix("torch."),
        "autocast": row.case.autocast,
        "upstream": row.case.upstream,
        "path": row.path,
        "ratios": {
            name: {**asdict(ratio), "ratio": f"{COLUMNS[name].of} / {COLUMNS[name].over}"}
            for name, ratio in row.ratios().items()
        },
        "missed": row.missed(),
        "problems": {name: problem._asdict() for name, problem in row.problems.items()},
        "unit": row.unit,
        "least_bytes": row.case.least_bytes,
        "samples": row.samples,
        "compile_seconds": row.compile_seconds,
        "limit_by": row.limit_by,
    }


def _bar(name: str, bar: float) -> str:
    return f"{'≥' if COLUMNS[name].at_least else '≤'} {bar:.3g}"


def columns(rows: Sequence[Row]) -> list[str]:
    """A table's own columns, and those of the contestants that joined it."""
    joined = {name for row in rows for name in (*row.samples, *row.problems)}
    return [*TABLES[rows[0].case.table].columns, *(c for c in JOINING if c in joined)]


def _cells(row: Row, columns: Sequence[str], barred: frozenset[str]) -> list[str]:
    cells = [row.case.name]
    ratios = row.ratios()
    for name in columns:
        column = COLUMNS[name]
        if name in ratios:
            ratio = ratios[name]
            cell = f"{ratio.median:.2f}"
            if len(row.samples["ours"]) > 1:
                cell += f" ({ratio.low:.2f} to {ratio.high:.2f})"
        else:
            failed = [c for c in (column.of, column.over) if c in row.problems]
            cell = f"{failed[0]} {row.problems[failed[0]].verdict}" if failed else "not measured"
        cells.append(cell)
        if name in barred:
            bar = row.case.bars.get(name)
            cells.append("" if bar is None else _bar(name, bar))
    if "limit" in TABLES[row.case.table].contestants:
        cells.append(_bandwidth(row))
    return [*cells, _verdict(row)]


def _bandwidth(row: Row) -> str:
    if "ours" not in row.samples:
        return ""
    return f"{row.case.least_bytes / np.median(row.samples['ours']) / 1e9:.3g}"


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
    """The tables as GitHub Markdown, which is also readable in a terminal."""
    parts = []
    for name, table in TABLES.items():
        own = [row for row in rows if row.case.table == name and row.begun]
        if not own:
            continue
        shown = columns(own)
        barred = frozenset(column for row in own for column in row.case.bars)
        headers = ["case"]
        for column in shown:
            headers += (
                [COLUMNS[column].heading, "bar"] if column in barred else [COLUMNS[column].heading]
            )
        if "limit" in table.contestants:
            headers.append("ours, GB/s")
        body = [_cells(row, shown, barred) for row in own]
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
    notes += [
        f"{row.case.name}: {PEERS[name].package} overwrites its input, and is timed doing so, on a "
        "copy of its own"
        for name in row.samples
        if name in PEERS and PEERS[name].overwrites(row.case)
    ]
    if row.path not in (None, "compiled"):
        notes.append(f"{row.case.name}: ours took the path {row.path}, not the compiled kernel")
    return notes


def summary(rows: Sequence[Row]) -> str:
    barred = [row for row in rows if row.case.bars and row.begun]
    missed = [row.case.id for row in barred if row.missed()]
    unmeasured = [row.case.id for row in barred if row.unmeasured()]
    whole = sum(not row.missed() and not row.unmeasured() for row in barred)
    broken = [f"{row.case.id} ({name})" for row in rows for name in row.broken()]
    lists = {"Missed": missed, "Not wholly measured": unmeasured, "Wrong or failed": broken}
    lists["Not begun, for lack of time"] = [row.case.id for row in rows if not row.begun]
    lines = [f"{whole} of {len(barred)} cases with a bar reach all of theirs."]
    lines += [f"{name}: {'; '.join(found)}." for name, found in lists.items() if found]
    return "\n\n".join(lines)


_LIMIT_CPU = (
    "It is the fastest copy of each round: compiled with ordinary stores or with streaming stores, or "
    "PyTorch's own `add` or `copy_`, each into memory that is prepared as ours is (huge pages from 32 "
    'MiB on), or PyTorch\'s copy into new memory ("copy"). The JSON names the copy that was the '
    "fastest most often. Cases that move the same bytes share the fastest median among theirs."
)
_LIMIT_GPU = "It is PyTorch's own operator, `torch.add` or `clone`."
_ABOUT_CPU = """\
- Every figure is a ratio: the median over rounds of the ratio within a round, with the 20 % and \
80 % quantiles in brackets. All contestants run in one process in turn, once a round, in an order \
drawn anew; tables whose bars lie within a few per cent (upstream gradients, "none", forward only) \
have three times the rounds. Each is first held against float64; one that is wrong gets no \
figure.
- Peak memory is resident memory, each contestant in a process of its own, in which glibc maps from 1 \
MiB on (`MALLOC_MMAP_THRESHOLD_`), so that what is freed does not count."""
_ABOUT_GPU = """\
- Every figure is a ratio: the median over rounds of the ratio within a round, with the 20 % and \
80 % quantiles in brackets. All contestants run in one process in turn, once a round, in an order \
drawn anew; a sample is the median of steps that each start with a cache emptied of their data \
(`triton.testing.do_bench`). Each is first held against float64; one that is wrong gets no figure.
- Small inputs are timed by the host, in blocks of calls that it waits for at their end.
- Peak memory is what torch's allocator handed out."""


def markdown(rows: Sequence[Row], about: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    warning = f"\n**{about['caveat']}**\n" if about["caveat"] else ""
    images = "".join(f"![{title}]({name})\n\n" for title, name in pictures.items())
    return f"""# Speed and memory, beside PyTorch

{summary(rows)}
{warning}
{images}- **eager** is `torch.nn.functional`, **torch.compile** the same call compiled (fixed shapes, \
compiling not timed), **ours** `fusedloss.functional`. A custom loss (those of \
docs/custom-losses.md) is the same line for all three. Each step delivers a fresh gradient.
- **limit** is the least traffic that a step can have: read both tensors of a pointwise loss (one where \
targets are class indices), write one. {_LIMIT_GPU if about["device"] == "cuda" else _LIMIT_CPU} \
GB/s counts that traffic alone.
- **products**, behind a linear layer, are the bare matrix products that a step needs (`torch.mm`), over \
the rows that count: for the logits, and for the gradients of hidden states and weight. **torch, chunked** \
is `F.linear_cross_entropy` with `LinearCrossEntropyOptions()`. Memory there is beyond the gradients too.
- **gradients**, beside the memory of losses over rows, are the bytes of the gradients alone.
{_ABOUT_GPU if about["device"] == "cuda" else _ABOUT_CPU}

{tables(rows)}
{facts(about)}
"""


def facts(about: Mapping[str, Any]) -> str:
    """What the figures were measured with, as a section of Markdown."""
    lines = [(name.replace("_", " "), _fact(value)) for name, value in about.items()]
    text = tabulate(
        [line for line in lines if line[0] != "caveat"],
        ["setting", "value"],
        tablefmt="github",
        disable_numparse=True,
    )
    return f"## Setting\n\n{text}"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return "unknown" if value is None else str(value)


def where(about: Mapping[str, Any]) -> str:
    if about["gpu"]:
        where = f"{about['gpu']}, torch {about['torch']}"
    else:
        where = (
            f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
            f"{about['cpu_capability']}"
        )
    return "\n".join([where, *textwrap.wrap(about["caveat"] or "", 80)])


_COLOURS = {
    "ours": ("fusedloss", "tab:blue"),
    "eager": ("PyTorch eager", "0.5"),
    "compile": ("torch.compile", "0.7"),
    "triton": ("fusedloss, Triton", "tab:cyan"),
    "liger": ("Liger-Kernel", "tab:orange"),
    "quack": ("quack", "tab:green"),
    "flash_attn": ("flash-attn", "tab:purple"),
    "apex": ("apex", "tab:brown"),
}


def curves(rows: Sequence[Row], about: Mapping[str, Any]) -> Figure | None:
    """Share of the limit's speed by size, one panel for each loss: a roofline with its roof at 100
    %."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.case.table == "curve" and "limit" in row.samples:
            panels.setdefault(row.case.loss, []).append(row)
    if not panels:
        return None
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.6 * across, 3 * down + 1.2), layout="constrained")
    figure.suptitle(
        "Share of the memory limit's speed, by size, forward + backward\n" + where(about),
        fontsize=11,
    )
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for axis, (loss, own) in zip(axes, panels.items(), strict=False):
        classes = len(own[0].case.shape) > 1
        if not classes:  # torch.compile is measured only at some sizes, in the table of speed
            own = own + [
                row
                for row in rows
                if row.case.table == "speed"
                and (row.case.loss, len(row.case.shape)) == (loss, 1)
                and row.case.dtype == own[0].case.dtype
                and {"compile", "limit"} <= row.samples.keys()
            ]
        own.sort(key=lambda row: row.case.shape[-1])
        for name, (label, colour) in _COLOURS.items():
            shown = [
                (row.case.shape[-1], *quantiles(row.samples["limit"], row.samples[name]))
                for row in own
                if name in row.samples and (row.case.table == "curve" or name == "compile")
            ]
            if not shown:
                continue
            at, low, median, high = np.array(shown).T
            axis.plot(at, median, ".-", color=colour, label=label)
            axis.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        axis.axhline(1, color="black", lw=1)
        axis.set_xscale("log", base=2)
        axis.set_title(LABELS.get(loss, loss), fontsize=10)
        logits = own[0].case.shape[0] * own[0].case.shape[-1]
        axis.set_xlabel(f"classes, {logits:.3g} logits in all" if classes else "elements")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    labelled = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labelled[label] = handle
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4)
    return figure


def memory_picture(rows: Sequence[Row], about: Mapping[str, Any]) -> Figure | None:
    """Peak memory of every contestant that was measured."""
    rows = [row for row in rows if row.case.table == "memory" and row.samples]
    if not rows:
        return None
    figure = Figure(figsize=(9, 2 + 0.45 * len(rows)), layout="constrained")
    axis = figure.subplots()
    figure.suptitle(
        "Peak memory of forward + backward, beyond the inputs\n" + where(about), fontsize=11
    )
    names = [name for name in _COLOURS if any(name in row.samples for row in rows)]
    height = 0.8 / len(names)
    for series, name in enumerate(names):
        shown = [
            (place + (series - (len(names) - 1) / 2) * height, row.samples[name][0] / 2**20)
            for place, row in enumerate(rows)
            if name in row.samples
        ]
        label, colour = _COLOURS[name]
        at, size = np.array(shown).T
        bars = axis.barh(at, size, 0.95 * height, color=colour, label=label)
        axis.bar_label(bars, fmt="{:.0f}".format, padding=3, fontsize=7)
    axis.set_yticks(range(len(rows)), [row.case.name for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("MiB")
    axis.margins(x=0.1)
    axis.legend()
    return figure


def picture(rows: Sequence[Row], about: Mapping[str, Any], table: str = "speed") -> Figure | None:
    """Speed-up over eager and share of the limit, for a table with both."""
    rows = [row for row in rows if row.case.table == table and row.begun]
    if not rows:
        return None
    figure = Figure(figsize=(13, 3.5 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(
        f"{TABLES[table].title}, one loss step: fusedloss beside PyTorch\n{where(about)}",
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
    right.set_xlabel("share of the memory limit's speed (100 % = a bare copy)")
    right.xaxis.set_major_formatter(PercentFormatter(1))
    left.set_yticks(range(len(rows)), [row.case.name for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def write(rows: Sequence[Row], about: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write Markdown, JSON and pictures; returns their paths."""
    pictures = {
        "Speed-up over eager, and distance to the limit": (picture, f"{stem}.png"),
        "The same for custom losses": (partial(picture, table="own"), f"{stem}-own.png"),
        "Share of the limit by size": (curves, f"{stem}-curves.png"),
        "Peak memory": (memory_picture, f"{stem}-memory.png"),
    }
    drawn = {}
    for title, (draw, name) in pictures.items():
        figure = draw(rows, about)
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
            drawn[title] = name
    paths = [folder / f"{stem}.md", folder / f"{stem}.json"]
    paths[0].write_text(markdown(rows, about, drawn))
    paths[1].write_text(as_json(rows, about))
    return paths + [folder / name for name in drawn.values()]
