"""What `make gpu` did, beside the bench's own results: `python -m bench.gpu_report STAGES LOG`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tabulate import tabulate

from . import report


def main(stages: Path, log: Path) -> None:
    folder = report.results("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line.split("\t") for line in stages.read_text().splitlines()]
    about = report.environment("make gpu", rounds=0, device="cuda")
    named = [{"stage": name, "result": result, "seconds": int(s)} for name, result, s in lines]
    (folder / "gpu.json").write_text(json.dumps({**about, "stages": named}, indent=1) + "\n")
    shutil.copy(log, folder / "log.txt")
    print(tabulate(lines, ["stage", "result", "seconds"], tablefmt="github"))
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
