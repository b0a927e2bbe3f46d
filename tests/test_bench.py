"""The speed table and the demo report what they measured, and show wrong results as wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

for _needed in ("tqdm", "tabulate", "matplotlib", "sklearn"):
    pytest.importorskip(_needed)

import fusedloss
import fusedloss.functional as FL
from bench import __main__ as cli
from bench import (
    arguments,
    cases,
    compare,
    demo,
    examples,
    figures,
    kernels,
    limit,
    linear,
    measure,
    memory,
    models,
    numerics,
    own,
    peers,
    report,
)
from bench.cases import Case

TINY = {
    "mse": Case("mse", "speed", "mse_loss", (3000,), {"eager": 1e-3, "compile": 1, "limit": 1e-3}),
    "l1": Case("l1", "speed", "l1_loss", (3000,), {"eager": 1e-3}),
    "ce": Case("ce", "speed", "cross_entropy", (8, 40), {"eager": 1e-3}),
    "autocast": Case(
        "autocast", "speed", "cross_entropy", (8, 40), dtype=torch.bfloat16, autocast=True
    ),
    "bf16": Case("bf16", "speed", "l1_loss", (300,), dtype=torch.bfloat16),
    "log_loss": Case(
        "log_loss", "curve", "log_loss", (8, 40), functions={"eager": cases.plain_log_loss}
    ),
    "curve": Case("curve", "curve", "mse_loss", (3000,)),
    "upstream": Case("upstream", "upstream", "mse_loss", (3000,), upstream=1 / 3),
    "none": Case("none", "none", "cross_entropy", (8, 40)),
    "forward": Case("forward", "forward", "binary_cross_entropy", (3000,)),
    "own": Case("own", "own", "focal", (3000,), {"limit": 1e-3}),
    "graph": Case("graph", "graph", "cross_entropy", (8, 40)),
    "linear": Case("linear", "linear", "cross_entropy", (8, 16, 40), {"products": 1e3},
                   layer=linear.Layer(), upstream=65536.0),
    "ignored": Case("ignored", "linear", "cross_entropy", (16, 16, 50257), dtype=torch.bfloat16,
                    layer=linear.Layer(ignored=0.75)),
    "frozen": Case("frozen", "linear", "cross_entropy", (8, 16, 40), layer=linear.Layer(frozen=True)),
    "heads": Case("heads", "linear", "distillation", (8, 16, 40), layer=linear.Layer()),
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the command over tiny cases; gives exit status, printed text and the JSON's rows."""

    def run(*names: str, compile: bool = False):
        monkeypatch.setattr(cli, "CASES", {"cpu": [TINY[name] for name in names]})
        options = [] if compile else ["--peers", "eager"]
        status = cli.main(["--rounds", "2", "--out", str(tmp_path), *options])
        about = json.loads((tmp_path / "speed.json").read_text())
        rows = {row["case"]: row for row in about["rows"]}
        return status, capsys.readouterr().out, rows

    return run


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(measure.interleave, "__defaults__", (1e-4, measure.host_clock))


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
    names = TINY.keys() - {"graph"}  # which needs a GPU
    status, text, rows = run(*names)
    assert status == 0
    assert rows.keys() == names
    for name, row in rows.items():
        table = cases.TABLES[row["table"]]
        expected = [c for c in table.contestants if c != "compile"]
        assert list(row["samples"]) == expected, name
        rounds = 2 * table.repeats
        assert all(len(seconds) == rounds for seconds in row["samples"].values()), name
        assert not row["problems"], name
    samples, ratio = rows["mse"]["samples"], rows["mse"]["ratios"]["eager"]
    pairs = sorted(e / o for e, o in zip(samples["eager"], samples["ours"], strict=True))
    assert ratio["median"] == pytest.approx(sum(pairs) / 2)
    assert pairs[0] <= ratio["low"] <= ratio["high"] <= pairs[1]
    # 1e-3 of eager's speed is reached; 1e-3 of the limit's time is impossible.
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


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Stand for build/bench and bench/results."""
    monkeypatch.setattr(report, "UNPUBLISHED", tmp_path / "build")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path / "build" / "cpu", tmp_path / "results" / "cpu"


@pytest.mark.parametrize("publish", [False, True])
def test_results_are_published_only_when_asked(monkeypatch, folders, capsys, publish):
    """Pages show published results, so a run of somebody who tries the bench must not change
    them."""
    monkeypatch.setattr(cli, "CASES", {"cpu": [TINY["mse"]]})
    monkeypatch.setattr(kernels, "CASES", {"cpu": [TINY["mse"]]})
    monkeypatch.setattr(numerics, "measure", list)
    monkeypatch.setattr(numerics, "measure_hard", list)
    monkeypatch.setattr(models, "peak_elsewhere", lambda *_: 2**20)
    monkeypatch.setattr(examples, "MEASURE", {})
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(demo, "TASKS", [dataclasses.replace(demo.TASKS[1], epochs=1)])
    options = ["--publish"] if publish else []
    quick = ["--rounds", "1", "--peers", "eager"]
    assert cli.main(quick + options) == 0
    assert cli.main(["kernels", *quick, *options]) == 0
    assert cli.main(["numerics", *options]) == 0
    assert cli.main(["models", "--quick", "--only", "autoencoder", "--rounds", "1", *options]) == 0
    assert cli.main(["examples", *options]) == 0
    assert demo.main(options) == 0
    written, other = folders[::-1] if publish else folders
    names = {path.name for path in written.iterdir()}
    names -= {"speed.md", "speed.png", "models.md", "models.png"}
    jsons = {f"{name}.json" for name in ("speed", "kernels", "numerics", "models", "examples")}
    assert names == {*jsons, "demo.png"}
    assert not other.exists()
    printed = capsys.readouterr().out
    for name in names:
        assert f"wrote {written / name}" in printed
    for name in jsons:  # the command that repeats the run, wherever it wrote
        assert "--publish" not in json.loads((written / name).read_text())["command"]


def test_unpublished_results_are_ignored_by_git():
    root = Path(report.__file__).parent.parent
    if not (root / ".git").exists():
        pytest.skip("no repository here")
    assert report.UNPUBLISHED.is_relative_to(root)
    subprocess.run(["git", "-C", root, "check-ignore", "-q", report.UNPUBLISHED], check=True)
    # The command that repeats a run does not name the folder that it wrote to.
    for path in report.RESULTS.rglob("*.json"):
        assert "--out" not in json.loads(path.read_text())["command"], path


def test_command_that_repeats_a_run():
    words = ["kernels", "--only", "speed: .*(bf16|2.28)$", "--rounds", "3"]
    told = "python -m bench kernels --only 'speed: .*(bf16|2.28)$' --rounds 3"
    assert arguments.command(*words) == told
    assert arguments.command("--out", "/tmp/a", *words) == told
    assert arguments.command(*words[:3], "--out=/tmp/a", *words[3:]) == told
    assert arguments.command(*words, "--publish") == told


def test_part_of_the_table_leaves_the_whole_one_alone(run, tmp_path):
    run("mse", "l1")
    whole = (tmp_path / "speed.json").read_bytes()
    cli.main(["--only", "l1$", "--rounds", "1", "--peers", "eager", "--out", str(tmp_path)])
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
    assert rows["mse"]["samples"].keys() == {"eager", "limit", "copy"}
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


@pytest.mark.parametrize("elements", [1, 100, 2**15 + 5])
@pytest.mark.parametrize("inputs", [1, 2])
def test_every_copy_moves_the_whole_tensor(elements, inputs):
    x = torch.arange(1, elements + 1, dtype=torch.float32)
    t = torch.full((elements,), -2.0) if inputs == 2 else torch.zeros(3)
    copies = limit.means(x, t)
    torch.testing.assert_close(copies.pop("PyTorch")(), x - 2 if inputs == 2 else x)
    if isinstance(limit.library(), str):
        pytest.skip(limit.library())
    assert copies.keys() == {"ordinary stores", "streaming stores"}
    bits = x.view(torch.int32)
    bits = bits ^ t.view(torch.int32) if inputs == 2 else bits
    for copy in copies.values():
        assert torch.equal(copy().view(torch.int32), bits)


@pytest.mark.skipif(limit.sys.platform != "linux", reason="huge pages are Linux's")
def test_limit_is_measured_over_memory_prepared_as_ours(monkeypatch):
    advised = []
    madvise = lambda at, size, advice: advised.append((at.value, size.value, advice))
    monkeypatch.setattr(limit, "_libc", lambda: SimpleNamespace(madvise=madvise))
    large = torch.empty(limit.HUGE_PAGES_FROM, dtype=torch.uint8)
    assert limit.new_memory(large[1:]).numel() == large.numel() - 1
    assert advised == []
    new = limit.new_memory(large)
    ((first, size, advice),) = advised
    assert first % 4096 == size % 4096 == 0 and advice == 14
    assert new.data_ptr() <= first < new.data_ptr() + 4096
    assert 0 <= new.data_ptr() + new.nbytes - (first + size) < 4096
    for copy in limit.means(large, large[:3]).values():
        copy()
    assert len(advised) == 1 + len(limit.means(large, large[:3]))


def test_limit_is_the_fastest_copy_of_each_round():
    copies = {"limit by a": [3.0, 1.0, 3.0], "limit by b": [2.0, 2.0, 9.0], "copy": [4.0, 4.0, 2.5]}
    samples = {"ours": [3.0] * 3, **copies}
    assert measure.join_limit(samples) == "limit by a"  # each is once the fastest: the first
    assert samples == {"ours": [3.0] * 3, "copy": copies["copy"], "limit": [2.0, 1.0, 2.5]}
    samples = {"ours": [3.0] * 3, **copies, "copy": [1.0, 2.0, 1.0]}
    assert measure.join_limit(samples) == "copy"
    assert samples["limit"] == [1.0, 1.0, 1.0]
    assert measure.join_limit({"ours": [1.0]}) is None


def test_cases_of_the_same_traffic_share_the_fastest_limit():
    def row(name, limit, ours):
        samples = {"ours": ours, "limit": limit}
        return measure.Row(TINY[name], "s", samples, limit_by=f"limit of {name}")

    slow, fast = (
        row("mse", [3.0, 1.0, 4.0], [4.0, 4.0, 4.0]),
        row("own", [2.0, 9.0, 1.0], [3.0] * 3),
    )
    other = row("ce", [7.0], [8.0])  # of class indices: two tensors
    unmeasured = measure.Row(TINY["mse"], "s", {"ours": [1.0]})
    measure.share_limits([slow, other, fast, unmeasured])
    assert slow.samples == {"ours": [4.0] * 3, "limit": [2.0] * 3}
    assert fast.samples["limit"] == [2.0] * 3
    assert slow.limit_by == fast.limit_by == "limit of own"
    assert other.samples["limit"] == [7.0] and other.limit_by == "limit of ce"
    assert unmeasured.samples == {"ours": [1.0]}


def test_limit_without_a_compiler(monkeypatch, run):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    limit.library.cache_clear()
    try:
        assert "/no/such/compiler" in limit.library()
        assert run("mse")[2]["mse"]["limit_by"] in ("copy", "limit by PyTorch")
    finally:
        limit.library.cache_clear()


def test_limit_of_a_gpu_is_pytorchs_copy(monkeypatch):
    monkeypatch.setattr(measure, "second_backend", lambda device: None)
    case = dataclasses.replace(TINY["mse"], device="cuda")
    assert measure.contestants(case, ["eager"]) == ["eager", "ours", "limit"]
    x = torch.ones(3, device="meta")
    assert list(limit.means(x, x)) == ["PyTorch"]


def test_rounds_time_everyone_in_changing_order():
    """No contestant always comes after the same other one."""
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) or 1.0 for name in "abc"}
    samples = measure.interleave(steps, rounds=30, clock=lambda step, seconds: step)
    assert all(len(seconds) == 30 for seconds in samples.values())
    orders = {tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)}
    assert orders == set(permutations("abc"))


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


@pytest.mark.parametrize("device", cases.CASES)
def test_cases_are_told_apart(device):
    own = cases.CASES[device]
    ids = [case.id for case in own]
    assert len(set(ids)) == len(ids)
    wanted = cases.TABLES.keys() - ({"graph"} if device == "cpu" else set())
    assert {case.table for case in own} == wanted
    assert {case.table for case in own if case.quick} == wanted
    assert {case.loss for case in own} >= cases.LABELS.keys()
    listed = cases._QUICK if device == "cpu" else cases._QUICK_CUDA
    assert {case.id for case in own if case.quick} == listed, "a name that is no case's"


def run_kernels(monkeypatch, tmp_path, *names, options=()):
    monkeypatch.setattr(kernels, "CASES", {"cpu": [TINY[name] for name in names]})
    out = ["--out", str(tmp_path)]
    status = kernels.main(["--rounds", "3", "--peers", "eager", *out, *options])
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    return status, {(row["case"], row["contestant"]): row for row in rows}


def test_kernels_of_a_step(monkeypatch, tmp_path, capsys):
    status, rows = run_kernels(monkeypatch, tmp_path, "mse", "ce")
    assert status == 0
    text = capsys.readouterr().out
    for name in ("mse", "ce"):
        ours = {part["name"]: part for part in rows[f"speed: {name}", "ours"]["parts"]}
        assert ours["fusedloss::loss_forward"]["calls"] == 1
        assert "fusedloss::loss_forward" in text
    eager = {part["name"] for part in rows["speed: mse", "eager"]["parts"]}
    assert {"aten::mse_loss", "aten::mse_loss_backward"} <= eager
    assert not any("fusedloss" in name for name in eager)
    for row in rows.values():
        assert len(row["seconds"]) == 3
        assert row["limit"]["low"] <= row["limit"]["median"] <= row["limit"]["high"]
    assert rows["speed: mse", "limit"]["limit"]["median"] == 1


def test_kernels_short_of_time_say_what_they_left_out(monkeypatch, tmp_path, capsys):
    status, rows = run_kernels(monkeypatch, tmp_path, "mse", "ce", options=["--seconds", "0"])
    assert status == 0
    assert rows.keys() == {("speed: mse", "ours"), ("speed: ce", "ours")}
    assert {row["problem"] for row in rows.values()} == {"no time left of the 0 s of this run"}
    assert "no time left of the 0 s of this run" in capsys.readouterr().out


def test_kernels_of_a_wrong_result_have_no_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(FL, "mse_loss", wrong_gradient)
    status, rows = run_kernels(monkeypatch, tmp_path, "mse")
    assert status == 1
    assert "gradient off by" in rows["speed: mse", "ours"]["problem"]
    assert "seconds" not in rows["speed: mse", "ours"]
    assert "gradient off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (["--only", "("], "'(' is no regular expression"),
        (["--only", "nothing like it"], "'nothing like it' matches none of"),
        (["--rounds", "0"], "0 is not a number of rounds"),
        (["--seconds", "-1"], "-1 is no number of seconds"),
        (["--seconds", "nan"], "nan is no number of seconds"),
        (["--peers", "eager,nobody"], "no peer 'nobody'; there are eager, compile"),
        (["--device", "tpu"], "no cases for 'tpu'; there are cpu, cuda"),
    ],
)
def test_bad_options_are_named(option, problem, capsys):
    with pytest.raises(SystemExit):
        cli.main(option)
    assert problem in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs")
def test_peak_memory_sees_each_tensor_that_eager_makes(monkeypatch):
    case = next(case for case in cases.CASES["cpu"] if case.id == "memory: mse 2^24")
    monkeypatch.setitem(
        cases.TABLES, "memory", dataclasses.replace(cases.TABLES["memory"], contestants=("eager",))
    )
    row = memory.measure(case)
    assert not row.problems
    # Forward holds the squares and backward the gradient: 2^24 floats at a time.
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


class _Overwriting(torch.autograd.Function):
    """Cross-entropy whose forward writes its gradient over its input."""

    @staticmethod
    def forward(ctx, x, t):
        with torch.enable_grad():
            inner = x.detach().clone().requires_grad_()
            value = F.cross_entropy(inner, t)
        (gradient,) = torch.autograd.grad(value, inner)
        x.data.copy_(gradient)
        ctx.save_for_backward(gradient)
        return value.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None


@pytest.fixture
def peer(monkeypatch):
    """A peer that is installed and covers every case."""
    load = lambda: _Overwriting.apply
    liger = dataclasses.replace(peers.PEERS["liger"], module="torch", load=load)
    monkeypatch.setattr(type(liger), "covers", lambda self, case: self.name == "liger")
    monkeypatch.setitem(peers.PEERS, "liger", liger)
    return liger


def test_installed_peer_joins_with_an_input_of_its_own(peer):
    x, t = TINY["ce"].inputs()
    before = x.detach().clone()
    case = dataclasses.replace(TINY["ce"], draw=lambda _: (x, t))
    row = measure.Speed(2, wanted=["liger", "eager"])(case)
    assert not row.problems
    assert torch.equal(x, before), "the input that the others share"
    assert row.samples.keys() == {"eager", "ours", "limit", "copy", "liger"}
    assert "liger" in row.ratios()
    text = report.tables([row])
    assert "Liger-Kernel / ours" in text
    assert "ce: liger-kernel overwrites its input" in text


def test_memory_of_a_peer(monkeypatch, peer):
    monkeypatch.setattr(memory, "allocated", lambda case, contestant: len(contestant))
    case = dataclasses.replace(TINY["ce"], table="memory", device="cuda", bars={"memory": 1})
    monkeypatch.setattr(measure, "second_backend", lambda device: None)
    row = memory.measure(case)
    assert row.samples == {"eager": [5.0], "ours": [4.0], "liger": [5.0]}
    assert memory.measure(case, ["eager"]).samples.keys() == {"eager", "ours"}
    figure = report.memory_picture([row], report.environment("test", 1))
    assert figure is not None
    assert len(figure.axes[0].patches) == 3


def test_peer_is_checked(monkeypatch, peer):
    monkeypatch.setitem(
        peers.PEERS, "liger", dataclasses.replace(peer, load=lambda: lambda x, t: x.mean())
    )
    row = measure.Speed(2, wanted=["liger"])(TINY["ce"])
    assert row.problems["liger"].verdict == "wrong"
    assert row.samples.keys() == {"ours", "limit", "copy"}


@pytest.fixture
def cuda_graphs(monkeypatch):
    """torch.cuda's streams and graphs without a GPU: a capture runs the code, and a replay leaves
    the results as they are. Returns the stack of current streams and the list of replayed
    graphs."""
    main, replayed = SimpleNamespace(wait_stream=lambda other: None), []
    current = [main]

    @contextlib.contextmanager
    def stream(chosen):
        current.append(chosen)
        try:
            yield
        finally:
            del current[current.index(chosen) :]

    @contextlib.contextmanager
    def graph(made, stream):
        current.append(stream)
        yield
        current.pop()  # not if the capture fails, as in torch

    class Graph:
        def replay(self):
            replayed.append(self)

    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return current, replayed


def test_peer_joins_in_cuda_graphs(peer, cuda_graphs):
    """One that overwrites its input, too: the replay is checked on an intact input."""
    current, replayed = cuda_graphs
    row = measure.Speed(2)(TINY["graph"])
    assert not row.problems
    assert row.samples.keys() == {"eager", "ours", "liger"}
    assert len(set(replayed)) == 3
    assert len(current) == 1


def test_peer_that_cannot_be_captured_says_so(monkeypatch, peer, cuda_graphs):
    current, _ = cuda_graphs

    def waits(x, t):
        if len(current) > 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return F.cross_entropy(x, t)

    monkeypatch.setitem(peers.PEERS, "liger", dataclasses.replace(peer, load=lambda: waits))
    row = measure.Speed(2)(TINY["graph"])
    assert row.problems["liger"].verdict == "failed"
    assert "not permitted when stream is capturing" in row.problems["liger"].text
    assert row.samples.keys() == {"eager", "ours"}
    assert len(current) == 1, "the stream of the capture stays the current one"


def test_replay_that_gives_something_else_is_wrong(monkeypatch, cuda_graphs):
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: value.mul_(2))
    value = torch.tensor(0.0)

    def loss(x, t):
        nonlocal value
        value = F.cross_entropy(x, t).mul(1)
        return value

    monkeypatch.setattr(FL, "cross_entropy", loss)
    row = measure.Speed(2, wanted=[])(TINY["graph"])
    assert row.problems["ours"].verdict == "wrong"


def test_peers_by_name(peer):
    assert measure.contestants(TINY["ce"], ["eager"]) == ["eager", "ours", "limit", "copy"]
    assert "liger" in measure.contestants(TINY["ce"])
    assert "liger" not in measure.contestants(TINY["none"]), "a table that none joins"


def test_second_backend_joins(monkeypatch):
    assert "triton" not in measure.contestants(TINY["mse"])
    monkeypatch.setattr(measure, "second_backend", lambda device: "triton")
    assert "triton" in measure.contestants(TINY["mse"])
    # Plain PyTorch must not be measured under its name.
    monkeypatch.setattr(measure, "running", lambda contestant: contextlib.nullcontext())
    row = measure.Speed(2, wanted=["triton"])(TINY["own"])
    assert row.problems["triton"].verdict == "skipped"
    assert row.samples.keys() == {"ours", "limit", "copy"}


@pytest.mark.parametrize("name", sorted({c.loss for c in cases.CASES["cpu"] if c.table == "own"}))
def test_custom_loss_beside_the_same_line_in_torch(name):
    """In float64: eager and torch.compile get the loss's own line, not a translation of it."""
    case = dataclasses.replace(TINY["own"], loss=name, dtype=torch.float64)
    x, t = case.inputs()
    ours, eager = measure.our_loss(case), measure.eager_loss(case)
    values = [loss(x, t) for loss in (ours, eager)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, x) for value in values))
    assert "fusedloss" not in eager(x, t).grad_fn.next_functions[0][0].name().lower()


LINEAR = ("linear", "ignored", "frozen", "heads")


@pytest.mark.parametrize("name", LINEAR)
def test_truth_behind_a_linear_layer_needs_little_memory(monkeypatch, name):
    """In float64, some rows at a time, it is what eager computes."""
    case = dataclasses.replace(TINY[name], dtype=torch.float64)
    x, w = case.inputs()
    measure.eager_loss(case)(x, w).backward()
    monkeypatch.setattr(linear, "EXACT_LOGITS", 3 * case.shape[2])
    seen = []
    original = linear.checkpoint
    chunk = lambda f, x, *others, **options: (
        seen.append(len(x)) or original(f, x, *others, **options)
    )
    monkeypatch.setattr(linear, "checkpoint", chunk)
    value, gradient, of_weight = measure.expected(dataclasses.replace(case, upstream=1.0), x, w)
    assert seen == [3] * (case.shape[0] // 3) + [case.shape[0] % 3]
    torch.testing.assert_close(value, measure.eager_loss(case)(x, w).detach())
    torch.testing.assert_close(gradient, x.grad)
    torch.testing.assert_close(of_weight, w.grad)
    assert (of_weight is None) == (name == "frozen")


@pytest.mark.parametrize(
    ("name", "count"), [("linear", 3), ("ignored", 3), ("frozen", 2), ("heads", 4)]
)
def test_products_are_those_that_a_step_needs(name, count):
    case = TINY[name]
    x, w = case.inputs()
    step = linear.products(case, x, w)
    with FlopCounterMode(display=False) as counter:
        step()
    rows = int((linear.labels(case) >= 0).sum())
    assert rows == (case.shape[0] // 4 if name == "ignored" else case.shape[0])
    assert counter.get_total_flops() == 2 * count * rows * case.shape[1] * case.shape[2]


@pytest.mark.parametrize("name", ["linear", "ignored"])
@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda x, w, t: F.linear(x, _Scaled.apply(w)), "gradient of the second input off by"),
        (lambda x, w, t: _TargetAlone.apply(F.linear(x, w), t), "gradient off by"),
    ],
)
def test_wrong_gradient_behind_a_linear_layer_is_shown(run, monkeypatch, name, broken, problem):
    wrong = lambda x, w, t: F.cross_entropy(broken(x, w, t), t)
    monkeypatch.setattr(_Scaled, "backward", lambda ctx, upstream: upstream * 1.05)
    monkeypatch.setattr(FL, "linear_cross_entropy", wrong)
    status, _, rows = run(name)
    assert status == 1
    assert problem in rows[name]["problems"]["ours"]["text"]


class _TargetAlone(torch.autograd.Function):
    """Logits whose gradient is kept for the target's class alone."""

    @staticmethod
    def forward(ctx, logits, t):
        ctx.save_for_backward(t)
        return logits.clone()

    @staticmethod
    def backward(ctx, upstream):
        t = ctx.saved_tensors[0].clamp(0)[:, None]
        return torch.zeros_like(upstream).scatter_(1, t, upstream.gather(1, t)), None


def test_peers_behind_a_linear_layer(monkeypatch):
    """Those that have such a loss, with hidden states, weight and class indices in this order."""
    called = lambda x, w, t, **options: F.cross_entropy(F.linear(x, w), t, **options)
    liger = SimpleNamespace(liger_fused_linear_cross_entropy=called)
    quack = SimpleNamespace(chunked_linear_cross_entropy=called)
    for parent in ("liger_kernel", "liger_kernel.transformers", "quack"):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", liger)
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", quack)
    case = dataclasses.replace(TINY["linear"], device="cuda")
    covering = [name for name, peer in peers.PEERS.items() if peer.covers(case)]
    assert covering == ["liger", "quack", "chunked"]
    heads = dataclasses.replace(TINY["heads"], device="cuda")
    assert not any(
        peer.covers(heads) or peer.covers(TINY["linear"]) for peer in peers.PEERS.values()
    )
    logits = dataclasses.replace(TINY["ce"], device="cuda")
    assert peers.PEERS["liger"].covers(logits) and not peers.PEERS["chunked"].covers(logits)
    assert peers.PEERS["liger"].overwrites(logits) and not peers.PEERS["liger"].overwrites(case)
    if not hasattr(F, "linear_cross_entropy"):
        covering.remove("chunked")
    x, w = TINY["linear"].inputs()
    expected = measure.eager_loss(TINY["linear"])(x, w)
    for name in covering:
        torch.testing.assert_close(peers.PEERS[name].loss(TINY["linear"])(x, w), expected)


def test_memory_behind_a_linear_layer(monkeypatch):
    """Without the gradients, and in MiB too."""
    monkeypatch.setattr(memory, "allocated", lambda case, contestant: 2**22 * len(contestant))
    monkeypatch.setattr(measure, "second_backend", lambda device: None)
    layer, goal = linear.Layer(), {"mebibytes": 11}
    case = Case("ce", "linear_memory", "cross_entropy", (2**10, 2**8, 2**12), goal, device="cuda",
                layer=layer)  # fmt: skip
    row = memory.measure(case, ["eager"])
    gradients = 4 * 2**8 * (2**10 + 2**12)
    assert row.samples["ours"] == [2**24 - gradients]
    assert row.ratios()["mebibytes"].median == 16 - 5
    assert row.ratios()["mebibytes"].met
    assert "ours, MiB" in report.tables([row])
    frozen = dataclasses.replace(case, layer=linear.Layer(frozen=True))
    assert memory.measure(frozen, []).samples["ours"] == [2**24 - 2**20]


def test_memory_of_losses_over_rows(monkeypatch):
    """Beside that of all gradients."""
    monkeypatch.setattr(memory, "allocated", lambda case, contestant: 2**12 * len(contestant))
    case = Case("cosine", "rows_memory", "cosine", (2**4, 2**6), {"gradients": 2}, device="cuda")
    row = memory.measure(case)
    assert row.samples == {"eager": [5 * 2**12], "ours": [2**14], "gradients": [2**13]}
    assert row.ratios()["gradients"].met
    assert "ours / gradients" in report.tables([row])


def test_long_step_runs_once_a_round(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "LONG_SECONDS", 0.0)
    samples = measure.interleave({"a": lambda: calls.append(0)}, rounds=3)
    assert len(calls) == 1 + 3
    assert all(0 < seconds < 1 for seconds in samples["a"])


def test_wrong_custom_loss_is_shown(run, monkeypatch):
    right = measure.our_loss(TINY["own"])
    measure.eager_loss(TINY["own"])  # is cached
    wrong = lambda x, t, reduction="mean": right(x, t, reduction=reduction) * 1.001
    monkeypatch.setattr(own, "ours", lambda name: wrong)
    status, text, rows = run("own")
    assert status == 1
    assert "off by 0.001" in rows["own"]["problems"]["ours"]["text"]
    assert "custom losses" in text


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_case_with_callables_of_its_own(run, monkeypatch, factor):
    def plain(x, t, reduction="mean"):
        return ((x - t) ** 4).mean()

    def draw(case):
        return torch.randn(case.shape).requires_grad_(), torch.randn(case.shape)

    functions = {"eager": plain, "ours": lambda x, t, reduction="mean": factor * plain(x, t)}
    own = Case("quartic", "speed", "quartic_loss", (500,), functions=functions, draw=draw)
    monkeypatch.setitem(TINY, "quartic", own)
    status, _, rows = run("quartic")
    assert status == (factor != 1)
    assert rows["quartic"]["path"] is None
    assert ("ours" in rows["quartic"]["samples"]) == (factor == 1)


def test_run_that_is_short_of_time_says_what_it_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "CASES", {"cpu": [TINY["mse"], TINY["l1"]]})
    assert cli.main(["--seconds", "0", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["samples"] for row in rows] == [{}, {}]
    assert [row["missed"] for row in rows] == [[], []]
    assert rows[0]["problems"]["ours"]["text"] == "no time left of the 0 s of this run"
    out = capsys.readouterr().out
    assert "0 of 0 cases" in out and "Not begun, for lack of time: speed: mse; speed: l1." in out
    assert not list(tmp_path.glob("*.png"))
    # It replaces nothing larger than itself.
    for seconds, name in (("1000", "speed.json"), ("0", "speed-part.json")):
        assert cli.main(["--seconds", seconds, "--rounds", "1", "--out", str(tmp_path)]) == 0
        rows = json.loads((tmp_path / name).read_text())["rows"]
        assert bool(rows[0]["samples"]) == (seconds == "1000")


def test_pictures_of_sizes_and_memory():
    about = report.environment("test", 1)
    curve = [
        measure.Row(
            dataclasses.replace(TINY["curve"], shape=(size,)),
            "s",
            {"limit": [1.0, 1.0], "ours": [1.25, 1.25], "eager": [4.0, 4.0]},
        )
        for size in (2**12, 2**10)
    ]
    figure = report.curves(curve, about)
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["fusedloss"].get_xdata().tolist() == [2**10, 2**12]
    assert lines["fusedloss"].get_ydata().tolist() == [0.8, 0.8]
    case = dataclasses.replace(TINY["mse"], table="memory")
    rows = [measure.Row(case, "bytes", {"eager": [2**21], "ours": [2**20]})]
    figure = report.memory_picture(rows, about)
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1.0, 2.0]


def _run_of(ours, copy=(1.0, 1.0, 1.0), before_copy=False):
    about = {"date": "2026-01-01", "cpu": "a CPU", "torch": "2", "commit": "c"}
    # Up to version 0.1.1 PyTorch's copy was the limit.
    beside = (
        {"limit": list(copy)} if before_copy else {"copy": list(copy), "limit": [0.1, 0.2, 0.3]}
    )
    samples = {"ours": list(ours), **beside}
    row = {"table": "speed", "case": "mse", "unit": "s", "samples": samples}
    return {**about, "rows": [row]}


@pytest.mark.parametrize(
    ("after", "copy", "said", "status"),
    [
        ((1.0, 1.1, 1.2), (1.0, 1.0, 1.0), "same", 0),
        ((2.0, 2.1, 2.2), (1.0, 1.0, 1.0), "SLOWER", 1),
        ((0.5, 0.6, 0.7), (1.0, 1.0, 1.0), "faster", 0),
        # A machine that is half as fast.
        ((2.0, 2.2, 2.4), (2.0, 2.0, 2.0), "same", 0),
    ],
)
@pytest.mark.parametrize("before_copy", [False, True])
def test_compare(tmp_path, capsys, after, copy, said, status, before_copy):
    earlier = _run_of((1.0, 1.1, 1.2), before_copy=before_copy)
    for name, run in (("a", earlier), ("b", _run_of(after, copy))):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    assert cli.main(["compare", *paths]) == status
    line = next(x for x in capsys.readouterr().out.splitlines() if "speed: mse" in x)
    assert said in line and "copy by PyTorch" in line
    with pytest.raises(SystemExit):
        compare.main([paths[0], str(tmp_path / "none.json")])
    assert "none.json" in capsys.readouterr().err


def test_figures_come_from_the_results(run, tmp_path):
    run("mse", "l1", "upstream")
    page = (
        '<!-- figures: speed spans "all of them" "" mine "^mse$" -->\n0\n<!-- /figures -->\n'
        "<!-- figures: speed ratios speed -->\nold\n<!-- /figures -->\n"
        '<!-- figures: speed numbers rounds rounds:d eager "rows/0/ratios/eager/median:.2f" -->\n'
        "<!-- /figures -->\n<!-- figures: speed missed --><!-- /figures -->"
    )
    fresh = figures.rewrite(page, tmp_path)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    first, second = (row["ratios"]["eager"]["median"] for row in rows[:2])
    short = lambda ratio: f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"
    assert f"| mse    | {first:.2f} " in fresh
    assert f"| eager  | {first:.2f} |" in fresh
    assert re.search(rf"\| mine +\| {short(first)} to {short(first)}× ", fresh)
    low, high = sorted((first, second))
    assert re.search(rf"\| all of them +\| {short(low)} to {short(high)}× ", fresh)
    assert "old" not in fresh
    assert "\n1 of 2 cases with a goal miss it.\n" in fresh  # mse's third bar is out of reach
    assert figures.rewrite(fresh, tmp_path) == fresh
    for wrong, problem in (
        ("speed ratios speed nobody", "no case of 'speed' matches 'nobody'"),
        ("speed spans mine", "zip() argument 2 is shorter"),
        ("speed shout", "no view ['shout']"),
        ("speed numbers a rows/7/case", "nothing stands at 'rows/7/case'"),
        ("speed numbers a rows/0/case:.1f", "Unknown format code"),
        ("elsewhere missed", "No such file"),
    ):
        with pytest.raises(figures.NoFigure) as raised:
            figures.rewrite(f"<!-- figures: {wrong} --><!-- /figures -->", tmp_path)
        assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("samples", "gpu", "words"),
    [
        ({"limit": [1.0]}, None, "values below 1 are real"),
        ({"limit": [1.0], "copy": [2.0]}, None, "the fastest plain copy"),
        ({"limit": [1.0]}, "a GPU", "by PyTorch's own kernel"),
    ],
)
def test_pages_say_what_the_limit_of_a_run_is(samples, gpu, words):
    """A run up to version 0.1.1 has PyTorch's copy as its limit."""
    assert words in figures.limit({"gpu": gpu, "rows": [{"samples": samples}]})


def test_figures_tell_where_someone_else_is_faster():
    row = measure.Row(TINY["mse"], "s", {"eager": [1.0], "ours": [2.0], "limit": [9.0]})
    run = json.loads(report.as_json([row], {}))
    assert figures.slower(run) == "\n- speed: mse (eager 2.00 times)\n"
    row.samples["ours"] = [1.0]
    assert "No case of this run is slower" in figures.slower(json.loads(report.as_json([row], {})))


def test_examples_quick(compiled, tmp_path):
    """The figures of docs/examples.md are measured."""
    assert cli.main(["examples", "--quick", "--out", str(tmp_path)]) == 0
    assert "hardly trained" in json.loads((tmp_path / "examples.json").read_text())["caveat"]
    page = Path(__file__).parent.parent / "docs" / "examples.md"
    if page.exists():
        fresh = figures.rewrite(page.read_text().replace("cpu/examples", "examples"), tmp_path)
        assert re.search(r"\| epochs +\| 2 ", fresh)
        assert "| mean squared error " in fresh


@pytest.mark.skipif(not figures.pages(), reason="no pages here")
def test_pages_have_the_figures_of_the_committed_results():
    for page in figures.pages():
        text = page.read_text()
        assert figures.rewrite(text) == text, f"{page}: run python -m bench figures"
        cut = re.search(r"[^\n]<!-- figures|<!-- /figures -->[^\n]", text)
        assert cut is None, f"{page}: {cut}: a mark stands on a line of its own"
        # A speed-up on a page was measured, and stands in a mark.
        unmarked = re.search(r"\d\.\d+\s*(x|×|times)\b", figures.BLOCK.sub("", text))
        assert unmarked is None, f"{page}: {unmarked}"
    assert "<!-- figures: cpu/speed " in (figures.ROOT / "README.md").read_text()


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_models_quick(monkeypatch, tmp_path, capsys, scale):
    """Whole steps are measured; trainings with different losses are reported instead."""

    class Loss(fusedloss.MSELoss):
        def forward(self, input, target):
            return super().forward(input, target) * scale

    monkeypatch.setattr(fusedloss, "MSELoss", Loss)
    monkeypatch.setattr(models, "peak_elsewhere", lambda *_: 2**20)
    names = list(models.MODELS) if scale == 1 else ["autoencoder"]
    options = ["--quick", "--rounds", "1", "--out", str(tmp_path), "--only", *names]
    status = cli.main(["models", *options])
    out, err = capsys.readouterr()
    assert status == (scale != 1)
    assert ("autoencoder: the losses of torch and ours are" in err) == (scale != 1)
    if scale == 1:
        run = json.loads((tmp_path / "models.json").read_text())
        assert [model["name"] for model in run["models"]] == names
        assert all(0 < model["share"]["median"] for model in run["models"])
        assert "no measurement" in run["caveat"] and "no measurement" in out
        assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")
        assert "small GPT on docstrings" in figures.steps(run)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status")
def test_peak_memory_of_training():
    """At least the gradients and AdamW's two moments."""
    weights = sum(p.numel() for p in models.recommender(models.SIZES["quick"]).model.parameters())
    assert models.peak_elsewhere("recommender", "ours", "cpu", True) >= 3 * 4 * weights


GPU = Path(__file__).parent.parent / ".ci" / "gpu"


# Stand for a machine with a GPU: each stage except the build takes as long as $SLOW, or $SLOW_TESTS.
STUBS = {
    "nvidia-smi": "case $* in *memory.total*) echo 80000 ;; *) echo GPU 0 ;; esac",
    # A program that takes as long as a stage.
    "nvcc": """while [ "$1" != -o ]; do shift; done
printf '#!/bin/sh\\n%s\\n' "$SLOW" >"$2"
chmod +x "$2" """,
    "compute-sanitizer": """$SLOW
case $* in
  *"$ERROR"*) echo '========= COMPUTE-SANITIZER'; echo '========= Error: not here'; exit 1 ;;
esac""",
    "python3": """case $* in
  *get_device_capability*) echo 9.0 ;;
  *'-m pytest'*) $SLOW_TESTS ;;
  *'-m bench '*) $SLOW ;;
  *bench.gpu_report*) cp "$3" "$STUBS/stages" ;;
esac""",
}


@pytest.fixture
def make_gpu(tmp_path):
    """Runs it; returns the finished process and the result of each stage."""

    def run(**environment: str):
        for name, text in STUBS.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
        stubs = {"PATH": path, "PYTHON": "python3", "STUBS": str(tmp_path), **environment}
        done = subprocess.run(
            [GPU], check=False, capture_output=True, text=True, env=os.environ | stubs, timeout=28
        )
        lines = (tmp_path / "stages").read_text().splitlines()
        return done, {name: result for name, result, _ in (line.split("\t") for line in lines)}

    return run


@pytest.mark.skipif(not GPU.exists(), reason="needs .ci/gpu")
def test_make_gpu_ends_in_time(make_gpu, tmp_path):
    """Late stages are stopped early, later ones are skipped, and the report says so."""
    # 25 of these seconds are what the stages leave.
    done, stages = make_gpu(SLOW="sleep 100", ERROR="nothing", GPU_SECONDS="28", OUT=str(tmp_path))
    assert done.returncode == 1, done.stderr
    names, results = list(stages), list(stages.values())
    assert {*names[:2]} == {"build", "build of tune"}
    assert names[2:5] == ["tune", "bench", "kernels"]
    assert results[:2] == ["passed"] * 2
    assert re.fullmatch(r"stopped after [1-3] s", results[2])
    assert results[3:] == ["skipped: no time left"] * 8
    # The log is where the results go, as far as it got.
    assert "== tune: stopped after" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "plans.inc").exists()


@pytest.mark.skipif(not GPU.exists(), reason="needs .ci/gpu")
def test_make_gpu_with_a_package(make_gpu, tmp_path):
    """Nothing is compiled then, and what needs the program is skipped where that is not given."""
    (tmp_path / "package").mkdir()
    given = {"PACKAGE": str(tmp_path / "package"), "SLOW": "", "ERROR": "nothing"}
    done, stages = make_gpu(**given)
    assert done.returncode == 0, done.stderr
    assert "build of tune" not in stages
    for name in ("tune", "memcheck", "racecheck"):
        assert stages[name] == "skipped: there is no TUNE"
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho the program ran\n")
    program.chmod(0o755)
    done, stages = make_gpu(TUNE=str(program), **given)
    assert stages["tune"] == stages["memcheck"] == "passed"
    assert "the program ran" in done.stdout


@pytest.mark.skipif(not GPU.exists(), reason="needs .ci/gpu")
def test_make_gpu_bench_alone(make_gpu):
    done, stages = make_gpu(SLOW="", SLOW_TESTS="", ERROR="nothing", ONLY="speed: mse")
    assert done.returncode == 0, done.stderr
    assert stages == {"build": "passed", "bench": "passed"}


@pytest.mark.skipif(not GPU.exists(), reason="needs .ci/gpu")
def test_make_gpu_shows_what_had_ended(make_gpu):
    done, _ = make_gpu(SLOW="", SLOW_TESTS="sleep 100", ERROR="nothing", GPU_SECONDS="29")
    assert done.returncode == 1, done.stderr
    assert "-- values:fp64: " in done.stdout


REFUSED = "skipped: compute-sanitizer does not run here: ========= Error: not here"


@pytest.mark.skipif(not GPU.exists(), reason="needs .ci/gpu")
@pytest.mark.parametrize(
    ("error", "result", "status"),
    [
        ("--tool", REFUSED, 0),  # for every program
        ("--check", "FAILED with status 1", 1),  # for our kernels only
        ("nothing", "passed", 0),
    ],
)
def test_make_gpu_where_compute_sanitizer_is_refused(make_gpu, error, result, status):
    done, stages = make_gpu(SLOW="", ERROR=error)
    others = stages.keys() - {"memcheck", "racecheck"}
    assert stages == {**dict.fromkeys(others, "passed"), "memcheck": result, "racecheck": result}
    assert done.returncode == status, done.stderr


def test_bench_told_to_end_writes_what_it_has(run, monkeypatch, tmp_path):
    def measure_one(speed, case):
        if case.name == "l1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(speed, case)

    original = measure.Speed.__call__
    monkeypatch.setattr(measure.Speed, "__call__", measure_one)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError):  # no complete table
        run("mse", "l1", "ce")
    part = json.loads((tmp_path / "speed-part.json").read_text())
    assert [row["case"] for row in part["rows"]] == ["mse"]
    status, rows = run_kernels(monkeypatch, tmp_path, "mse", "l1", "ce")
    assert status == 130
    assert {case for case, _ in rows} == {"speed: mse"}
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(
    not GPU.exists() or shutil.which("nvidia-smi") is not None, reason="needs .ci/gpu and no GPU"
)
def test_make_gpu_says_what_it_lacks():
    done = subprocess.run([GPU], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "make gpu: no nvidia-smi on the PATH: this needs an NVIDIA GPU with its driver\n"
    )
