"""The speed table and the demo report what they measured, and show what is wrong as wrong."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

for _needed in ("tqdm", "tabulate", "matplotlib", "sklearn"):
    pytest.importorskip(_needed)

import fusedloss
import fusedloss.functional as FL
from bench import __main__ as cli
from bench import cases, demo, measure, memory, report
from bench.cases import Case

TINY = {
    "mse": Case("mse", "speed", "mse_loss", (3000,), {"eager": 1e-3, "compile": 1, "limit": 1e-3}),
    "l1": Case("l1", "speed", "l1_loss", (3000,), {"eager": 1e-3}),
    "ce": Case("ce", "speed", "cross_entropy", (8, 40), {"eager": 1e-3}),
    "autocast": Case("autocast", "speed", "cross_entropy", (8, 40), dtype=torch.bfloat16),
    "upstream": Case("upstream", "upstream", "mse_loss", (3000,), upstream=1 / 3),
    "none": Case("none", "none", "cross_entropy", (8, 40)),
    "forward": Case("forward", "forward", "binary_cross_entropy", (3000,)),
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the command over tiny cases; gives exit status, printed text and the JSON's rows."""

    def run(*names: str, compile: bool = False):
        monkeypatch.setattr(cli, "CASES", [TINY[name] for name in names])
        options = [] if compile else ["--no-compile"]
        status = cli.main(["--rounds", "2", "--out", str(tmp_path), *options])
        about = json.loads((tmp_path / "speed.json").read_text())
        rows = {row["case"]: row for row in about["rows"]}
        return status, capsys.readouterr().out, rows

    return run


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(measure.interleave, "__defaults__", (1e-4,))


class _Scaled(torch.autograd.Function):
    """Right value, gradient off by 1 %."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * 1.01


def wrong_gradient(x, t, reduction="mean"):
    return _Scaled.apply(F.mse_loss(x, t, reduction=reduction))


def test_every_kind_of_row_is_measured(run):
    status, text, rows = run(*TINY)
    assert status == 0
    assert rows.keys() == TINY.keys()
    for name, row in rows.items():
        expected = [c for c in cases.TABLES[row["table"]].contestants if c != "compile"]
        assert list(row["samples"]) == expected, name
        assert all(len(seconds) == 2 for seconds in row["samples"].values()), name
        assert not row["problems"], name
    samples, ratio = rows["mse"]["samples"], rows["mse"]["ratios"]["eager"]
    pairs = sorted(e / o for e, o in zip(samples["eager"], samples["ours"], strict=True))
    assert ratio["median"] == pytest.approx(sum(pairs) / 2)
    assert pairs[0] <= ratio["low"] <= ratio["high"] <= pairs[1]
    # 1e-3 of eager's speed is reached, and 1e-3 of the limit's time cannot be.
    assert ratio["met"] is True
    assert rows["mse"]["missed"] == ["limit"]
    line = next(line for line in text.splitlines() if line.startswith("| mse "))
    assert "≥ 0.001" in line
    assert "≤ 0.001" in line
    assert "MISSED: limit" in line


def test_files_and_setting(run, tmp_path):
    run("mse")
    about = json.loads((tmp_path / "speed.json").read_text())
    for key in (
        "command",
        "date",
        "commit",
        "torch",
        "compiler",
        "cpu",
        "cpu_capability",
        "threads",
        "transparent_huge_pages",
        "rounds",
        "rows",
    ):
        assert key in about
    assert about["torch"] == torch.__version__
    assert about["rounds"] == 2
    text = (tmp_path / "speed.md").read_text()
    assert "| mse " in text
    assert "](speed.png)" in text
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_part_of_the_table_leaves_the_whole_one_alone(run, tmp_path):
    run("mse", "l1")
    whole = (tmp_path / "speed.json").read_bytes()
    cli.main(["--only", "l1$", "--rounds", "1", "--no-compile", "--out", str(tmp_path)])
    assert (tmp_path / "speed.json").read_bytes() == whole
    part = json.loads((tmp_path / "speed-part.json").read_text())
    assert [row["case"] for row in part["rows"]] == ["l1"]


def test_wrong_gradient_of_ours_is_shown(run, monkeypatch):
    monkeypatch.setattr(FL, "mse_loss", wrong_gradient)
    status, text, rows = run("mse", "l1")
    assert status == 1
    row = rows["mse"]
    assert row["problems"]["ours"]["verdict"] == "wrong"
    assert "gradient off by 0.01 " in row["problems"]["ours"]["text"]
    assert "ours" not in row["samples"]
    assert row["ratios"] == {}
    assert row["missed"] == ["eager", "compile", "limit"]
    assert "OURS WRONG" in text
    assert rows["l1"]["ratios"]["eager"]["met"] is True


@pytest.mark.parametrize("name", ["ce", "autocast"])
def test_gradient_of_the_target_class_alone_is_shown_as_wrong(run, monkeypatch, name):
    def one_class(x, t, reduction="mean"):
        chosen = torch.zeros_like(x).scatter_(1, t[:, None], 1)
        x.register_hook(lambda gradient: gradient * chosen)
        return F.cross_entropy(x, t)

    monkeypatch.setattr(FL, "cross_entropy", one_class)
    status, _, rows = run(name)
    assert status == 1
    assert rows[name]["problems"]["ours"]["verdict"] == "wrong"


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (lambda x, t, reduction="mean": F.mse_loss(x, t) * 1.001, "loss off by 0.001 "),
        (lambda x, t, reduction="mean": F.mse_loss(x, t) * torch.nan, "loss off by nan "),
        (lambda x, t, reduction="mean": F.mse_loss(x, t)[None], "loss of shape (1,), not ()"),
        (
            lambda x, t, reduction="mean": F.mse_loss(x.detach().requires_grad_(), t),
            "no gradient",
        ),
    ],
)
def test_wrong_loss_of_ours_is_shown(run, monkeypatch, loss, problem):
    monkeypatch.setattr(FL, "mse_loss", loss)
    status, _, rows = run("mse")
    assert status == 1
    assert problem in rows["mse"]["problems"]["ours"]["text"]


def test_wrong_rival_is_no_failure_of_ours(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, **_: wrong_gradient)
    status, text, rows = run("mse", compile=True)
    assert status == 0
    assert rows["mse"]["problems"]["compile"]["verdict"] == "wrong"
    assert rows["mse"]["ratios"].keys() == {"eager", "limit"}
    assert "compile wrong" in text


def test_exception_in_one_case_leaves_the_others(run, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no such luck")

    monkeypatch.setattr(FL, "mse_loss", broken)
    inputs = Case.inputs
    monkeypatch.setattr(
        Case, "inputs", lambda case: broken() if case.name == "ce" else inputs(case)
    )
    status, text, rows = run("mse", "ce", "l1")
    assert status == 1
    assert rows["mse"]["problems"]["ours"] == {
        "verdict": "failed",
        "text": "ValueError: no such luck",
    }
    assert rows["mse"]["samples"].keys() == {"eager", "limit"}
    assert rows["ce"]["samples"] == {}
    assert rows["l1"]["ratios"]["eager"]["met"] is True
    assert text.count("OURS FAILED") == 2


def test_time_for_compiling_is_bounded(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)
    speed = measure.Speed(1, compile_seconds=1e-9)
    assert "compile" in speed(TINY["mse"]).samples
    row = speed(TINY["mse"])
    assert row.problems["compile"].verdict == "skipped"
    assert row.unmeasured() == ["compile"]
    assert "not measured: compile" in report.tables([row])
    assert "0 of 1 cases with a bar reach all of theirs." in report.summary([row])


def test_rounds_time_everyone_in_rotating_order():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = measure.interleave(steps, rounds=3)
    assert all(len(seconds) == 3 for seconds in samples.values())
    order = "".join(name for name, _ in groupby(calls))
    assert order == "abc" + "abc" + "bca" + "cab"


def test_slow_case_stops_with_enough_rounds(monkeypatch):
    monkeypatch.setattr(measure, "CASE_SECONDS", 0.0)
    samples = measure.interleave({"a": lambda: None}, rounds=50)
    assert len(samples["a"]) == measure.ENOUGH_ROUNDS


def test_interrupted_run_keeps_what_it_has(run, monkeypatch, tmp_path):
    inputs = Case.inputs

    def interrupted(case):
        if case.name == "l1":
            raise KeyboardInterrupt
        return inputs(case)

    run("mse", "l1")
    monkeypatch.setattr(Case, "inputs", interrupted)
    status, *_ = run("mse", "l1", "ce")
    assert status == 130
    part = json.loads((tmp_path / "speed-part.json").read_text())
    assert [row["case"] for row in part["rows"]] == ["mse"]


def test_what_slows_a_whole_round_cancels():
    assert measure.quantiles([2, 30, 200, 14], [1, 15, 100, 7]) == (2, 2, 2)


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.004, True), (1.02, False)])
def test_bars_are_judged_as_printed(ours, met):
    case = dataclasses.replace(TINY["none"], bars={"eager": 1})
    row = measure.Row(case, "s", {"eager": [1.0], "ours": [ours]})
    assert row.ratios()["eager"].met is met
    assert bool(row.missed()) is not met
    assert ("MISSED" in report.tables([row])) is not met


@pytest.mark.parametrize(("load", "warned"), [(None, False), (2.0, False), (4.0, True)])
def test_busy_machine_is_told(load, warned):
    assert (report.busy(load, threads=2) is not None) == warned


def test_cases_are_told_apart():
    ids = [case.id for case in cases.CASES]
    assert len(set(ids)) == len(ids)
    assert {case.table for case in cases.CASES} == cases.TABLES.keys()
    assert {case.table for case in cases.CASES if case.quick} == cases.TABLES.keys()


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (["--only", "("], "'(' is no regular expression"),
        (["--only", "nothing like it"], "'nothing like it' matches none of"),
        (["--rounds", "0"], "0 is not a number of rounds"),
    ],
)
def test_bad_options_are_named(option, problem, capsys):
    with pytest.raises(SystemExit):
        cli.main(option)
    assert problem in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs")
def test_peak_memory_sees_each_tensor_that_eager_makes(monkeypatch):
    case = next(case for case in cases.CASES if case.id == "memory: mse 2^24")
    monkeypatch.setitem(
        cases.TABLES, "memory", dataclasses.replace(cases.TABLES["memory"], contestants=("eager",))
    )
    row = memory.measure(case)
    assert not row.problems
    # Forward holds the squares, backward the gradient: 2^24 floats at a time.
    assert row.samples["eager"][0] == pytest.approx(2**26, rel=0.02)


@pytest.mark.parametrize("scale", [1.0, 1.001])
def test_demo_fails_where_curves_part(monkeypatch, tmp_path, capsys, scale):
    class Loss(fusedloss.MSELoss):
        def forward(self, input, target):
            return super().forward(input, target) * scale

    monkeypatch.setattr(fusedloss, "MSELoss", Loss)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(demo, "TASKS", [dataclasses.replace(demo.TASKS[1], epochs=3)])
    status = demo.main(["--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert status == (scale != 1)
    assert ("FAILED: diabetes, MSE" in err) == (scale != 1)
    assert "largest difference of the curves" in out
    assert f"wrote {tmp_path / 'demo.png'}" in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
