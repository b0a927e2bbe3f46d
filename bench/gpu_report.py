"""The stages of `make gpu` and their log, beside the results of the bench: `python -m
bench.gpu_report STAGES LOG`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tabulate import tabulate

from . import report
from .arguments import add_out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report")
    parser.add_argument("stages", type=Path, help="a line each: name, result, seconds")
    parser.add_argument("log", type=Path)
    add_out(parser)
    arguments = parser.parse_args()
    folder = report.folder(arguments, "cuda")
    lines = [line.split("\t") for line in arguments.stages.read_text().splitlines()]
    about = report.environment("make gpu", rounds=0, device="cuda")
    named = [{"stage": name, "result": result, "seconds": int(s)} for name, result, s in lines]
    (folder / "gpu.json").write_text(json.dumps({**about, "stages": named}, indent=1) + "\n")
    if arguments.log.resolve() != (folder / "log.txt").resolve():
        shutil.copy(arguments.log, folder / "log.txt")
    print(tabulate(lines, ["stage", "result", "seconds"], tablefmt="github"))
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
