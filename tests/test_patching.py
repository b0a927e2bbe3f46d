"""fusedloss.replace and fusedloss.patch: what they change, keep and put back."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from cases import BASIC, at_shape
from fusedloss import patching
from helpers import assert_same_bits, compare_with_torch, leaf

TORCH_LOSSES = [loss for loss in BASIC if loss != "log_loss"]
ORIGINALS = {loss: getattr(F, loss) for loss in TORCH_LOSSES}


@pytest.fixture(autouse=True)
def torch_is_itself_again() -> Iterator[None]:
    yield
    left = [loss for loss in TORCH_LOSSES if getattr(F, loss) is not ORIGINALS[loss]]
    for loss in left:
        setattr(F, loss, ORIGINALS[loss])
    assert not left


# ---- replace -------------------------------------------------------------------------------------


class Mine(nn.MSELoss):
    """A subclass, which may compute something else."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) + 1


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "body": nn.Linear(4, 7),
            "heads": nn.ModuleList(
                [
                    nn.CrossEntropyLoss(torch.linspace(0.5, 2, 7), label_smoothing=0.1),
                    nn.BCEWithLogitsLoss(pos_weight=torch.ones(7)),
                    nn.HuberLoss(delta=0.5),
                ]
            ),
            "deep": nn.Sequential(nn.Sequential(nn.MSELoss(reduction="sum"), nn.L1Loss())),
            "rest": nn.ModuleList([nn.SmoothL1Loss(beta=0.2), nn.BCELoss()]),
            "other": nn.ModuleList([nn.NLLLoss(), Mine()]),
        }
    )


def test_replace_swaps_every_loss_of_torch() -> None:
    mine = model()
    kinds = {name: type(module) for name, module in mine.named_modules()}
    before, state = repr(mine), list(mine.state_dict())
    with pytest.warns(UserWarning, match="replace left"):
        changed = fusedloss.replace(mine)
    assert list(changed) == [
        "heads.0", "heads.1", "heads.2", "deep.0.0", "deep.0.1", "rest.0", "rest.1",
    ]  # fmt: skip
    for name, module in mine.named_modules():
        if name in changed:
            assert changed[name] is module
            assert type(module) is getattr(fusedloss, kinds[name].__name__)
        else:
            assert type(module) is kinds[name]
    assert repr(mine) == before
    assert list(mine.state_dict()) == state
    with pytest.warns(UserWarning, match="replace left"):
        assert fusedloss.replace(mine) == {}, "again: nothing is left to swap"


def test_replace_keeps_options_buffers_and_hooks() -> None:
    loss = nn.CrossEntropyLoss(
        torch.linspace(0.5, 2, 7), ignore_index=3, reduction="sum", label_smoothing=0.1
    )
    seen: list[str] = []
    loss.register_forward_hook(lambda *_: seen.append("forward"))
    loss.register_full_backward_hook(lambda *_: seen.append("backward"))
    loss.note = "kept"  # type: ignore[assignment]
    loss.double().eval()
    weight, theirs = loss.weight, copy.deepcopy(loss)
    sample = at_shape("cross_entropy", (5, 7)).sample(torch.float64)
    assert fusedloss.replace(loss) == {"": loss}
    assert type(loss) is fusedloss.CrossEntropyLoss
    assert loss.weight is weight and loss.note == "kept" and not loss.training
    results = []
    for module in (loss, theirs):
        input = leaf(sample.input)
        value = module(input, sample.target)
        results.append((value.detach(), torch.autograd.grad(value, input)[0]))
    torch.testing.assert_close(*results)
    assert seen[:2] == ["forward", "backward"]


def test_replace_reaches_a_loss_that_is_shared() -> None:
    """One module under two names and in other places as well."""
    loss = nn.MSELoss()
    both = nn.ModuleDict({"a": loss, "b": loss})
    assert list(fusedloss.replace(both)) == ["a"]
    assert type(loss) is type(both["b"]) is fusedloss.MSELoss


def test_replaced_losses_are_fused(compiled: str) -> None:
    loss = nn.L1Loss()
    x = torch.randn(3)
    with pytest.raises(TypeError):
        fusedloss.explain(loss, x, x)
    fusedloss.replace(loss)
    assert fusedloss.explain(loss, x, x).fused


def said(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result, and the warnings, which point here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert all(warning.filename == __file__ for warning in caught)
    return result, [str(warning.message) for warning in caught]


def test_replace_says_what_it_left_and_why() -> None:
    scripted = torch.jit.script(nn.MSELoss())
    holder = nn.ModuleDict({"a": nn.MSELoss(), "b": Mine(), "c": nn.CTCLoss(), "d": scripted})
    holder.call = F.mse_loss  # type: ignore[assignment]
    holder.reduced = functools.partial(F.l1_loss, reduction="sum")  # type: ignore[assignment]
    changed, heard = said(lambda: fusedloss.replace(holder))
    assert list(changed) == ["a"]
    reasons = {
        "b": "a subclass of MSELoss, which may compute something else",
        "c": "CTCLoss stays torch's: each step needs the one before, so it is no sum over elements or rows",
        "d": "TorchScript",
        "call": "the function torch.nn.functional.mse_loss: put fusedloss.functional.mse_loss there",
        "reduced.func": (
            "the function torch.nn.functional.l1_loss: put fusedloss.functional.l1_loss there"
        ),
    }
    assert changed.left == reasons
    (message,) = heard
    assert all(f"{name} ({why})" in message for name, why in reasons.items())
    lines = str(changed).splitlines()
    assert lines[0].split() == ["a", "fusedloss.MSELoss()"]
    assert [line.split("  left: ")[1] for line in lines[1:]] == list(reasons.values())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 7), nn.LogSoftmax(1))
        self.criterion = nn.NLLLoss(weight=torch.linspace(0.5, 2, 7), ignore_index=3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.net(x), y)
        return loss


def test_log_softmax_and_nll_loss_become_cross_entropy(backend: str) -> None:
    model, x, y = Classifier(), torch.randn(9, 4), torch.randint(7, (9,))

    def step() -> list[Tensor]:
        value = model(x, y)
        return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]

    expected = step()
    assert list(fusedloss.replace(model)) == ["net.1", "criterion"]
    told = fusedloss.explain(model, x, y)
    assert told.fused is (backend != "reference") and told.backend == backend
    for mine, theirs in zip(step(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    # Where a gradient of the log probabilities is asked for, or they have changed, it is torch's.
    for change in (
        lambda t: t.retain_grad(),
        lambda t: t.register_hook(lambda g: g),
        lambda t: t.add_(0),
    ):
        log_p = model.net(x)
        change(log_p)
        assert not fusedloss.explain(model.criterion, log_p, y).fused
        torch.testing.assert_close(model.criterion(log_p, y).detach(), expected[0])
    assert not fusedloss.explain(model.criterion, model.net(x) + 0, y).fused
    assert list(fusedloss.restore(model)) == ["net.1", "criterion"]
    assert type(model.net[1]) is nn.LogSoftmax and type(model.criterion) is nn.NLLLoss


def test_nll_loss_alone_is_left() -> None:
    changed, _ = said(lambda: fusedloss.replace({"a": nn.NLLLoss(), "b": nn.MSELoss()}))
    assert list(changed) == ["b"]
    assert "no LogSoftmax before it" in changed.left["a"]


def test_replace_says_that_there_was_nothing() -> None:
    for holder in (nn.Linear(2, 3), {"loss": 3}, nn.Sequential()):
        changed, (message,) = said(lambda holder=holder: fusedloss.replace(holder))
        assert changed == {} and str(changed) == "nothing changed"
        assert f"no loss of torch.nn in {type(holder).__name__}" in message
    for fused in (fusedloss.MSELoss(), fusedloss.pointwise_loss(absolute).module()):
        assert said(lambda fused=fused: fusedloss.replace(fused)) == ({}, []), "there is one"


def absolute(input: Any, target: Any) -> Any:
    return abs(input - target)


@dataclass
class Trainer:
    model: nn.Module
    losses: dict[str, Any]
    rest: Any = None


class Slotted:
    __slots__ = ("criterion", "unset")

    def __init__(self) -> None:
        self.criterion = nn.HuberLoss()


def test_replace_takes_what_holds_losses() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.MSELoss())
    model.more = [nn.L1Loss(), 3]  # type: ignore[assignment]
    shared = model[1]
    trainer = Trainer(
        model,
        {"a": nn.BCELoss(), "b": (nn.CrossEntropyLoss(), shared), 3: SimpleNamespace(c=Slotted())},
        "text",
    )
    trainer.rest = trainer  # in a circle
    changed, heard = said(lambda: fusedloss.replace(trainer))
    assert sorted(changed) == [
        "losses.3.c.criterion", "losses.a", "losses.b.0", "model.1", "model.more.0",
    ]  # fmt: skip
    assert heard == []
    assert changed["model.1"] is shared and type(shared) is fusedloss.MSELoss
    assert said(lambda: fusedloss.replace([trainer])) == ({}, []), "they are fused by now"


def test_replace_ends_its_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_MOST_OBJECTS", 100)
    holder = {"data": [[n] for n in range(1000)], "late": [[nn.MSELoss()]]}
    changed, (message,) = said(lambda: fusedloss.replace(holder))
    assert changed == {} and "the search ended" in message


@pytest.mark.parametrize("change", [fusedloss.replace, fusedloss.restore])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [(nn.MSELoss, "the class MSELoss"), (F.mse_loss, "the function mse_loss")],
    ids=["class", "function"],
)
def test_what_holds_no_losses_is_refused(change: Any, wrong: Any, named: str) -> None:
    with pytest.raises(TypeError, match=f"an object that holds losses.*not {named}"):
        change(wrong)


def test_restore_undoes_replace() -> None:
    mine = model()
    before = fusedloss.HuberLoss()  # was fused before
    mine["own"] = before
    kinds = {name: type(module) for name, module in mine.named_modules()}
    keys = {name: set(module.__dict__) for name, module in mine.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = fusedloss.replace(mine)
    x = torch.rand(5, 7)
    mine["deep"][0][0](leaf(x), x).backward()
    copies = [copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))]
    for each in (mine, *copies):
        restored, heard = said(lambda each=each: fusedloss.restore(each))
        assert list(restored) == list(changed) and heard == []
        assert {name: type(module) for name, module in each.named_modules()} == kinds
        assert {name: set(module.__dict__) for name, module in each.named_modules()} == keys
        assert str(restored).splitlines()[0].split()[1].startswith("torch.CrossEntropyLoss")
    restored, (message,) = said(lambda: fusedloss.restore(mine))
    assert restored == {} and "found nothing in ModuleDict" in message


# ---- patch ---------------------------------------------------------------------------------------


def is_patched() -> bool:
    states = {getattr(F, loss) is getattr(FL, loss) for loss in TORCH_LOSSES}
    assert len(states) == 1, "some are, and some are not"
    return states.pop()


def test_patch_as_context_manager() -> None:
    with pytest.raises(KeyError), fusedloss.patch():
        assert is_patched()
        raise KeyError
    assert not is_patched()
    assert all(getattr(F, loss) is ORIGINALS[loss] for loss in TORCH_LOSSES)


def test_patch_as_decorator() -> None:
    @fusedloss.patch()
    def recursive(depth: int) -> list[bool]:
        return [is_patched(), *(recursive(depth - 1) if depth else []), is_patched()]

    assert all(recursive(3))
    assert recursive.__name__ == "recursive"
    assert not is_patched()


def test_patch_by_start_and_stop() -> None:
    one, two = fusedloss.patch(), fusedloss.patch()
    one.start()
    two.start()
    one.stop()
    assert is_patched(), "of two patches one is left"
    two.stop()
    assert not is_patched()
    with pytest.raises(RuntimeError, match="without start"):
        one.stop()


def test_patch_puts_back_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def someone_elses(*args: Any, **kwargs: Any) -> Tensor:
        return ORIGINALS["mse_loss"](*args, **kwargs)

    monkeypatch.setattr(F, "mse_loss", someone_elses)
    with fusedloss.patch():
        assert is_patched()
    assert F.mse_loss is someone_elses


def test_patch_from_many_threads() -> None:
    problems: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                with fusedloss.patch():
                    assert is_patched()
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert not is_patched()


@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_patched_functions_compute_what_torch_does(loss: str, backend: str) -> None:
    """Fused and not fused: no call ends in a loop."""
    sample = at_shape(loss, (5, 7)).sample(torch.float64)

    def patched(*args: Any, **kwargs: Any) -> Tensor:
        with fusedloss.patch():
            result: Tensor = getattr(F, loss)(*args, **kwargs)
            return result

    compare_with_torch(loss, sample.input, sample.target, function=patched)
    compare_with_torch(loss, sample.input[:0], sample.target[:0], function=patched)
    subclass = sample.input.as_subclass(Kept)
    assert isinstance(patched(subclass, sample.target), Kept)
    compare_with_torch(loss, subclass, sample.target, function=patched)


class Kept(Tensor):
    """A subclass that torch functions keep."""


def test_torchs_modules_are_fused_under_a_patch(compiled: str) -> None:
    module, x = nn.HuberLoss(delta=0.5), torch.randn(5, 7)
    with fusedloss.patch():
        assert fusedloss.explain(module, x, x).fused
        ours = module(leaf(x), x.flip(0))
    assert_same_bits(ours, fusedloss.HuberLoss(delta=0.5)(leaf(x), x.flip(0)), "under a patch")
    with pytest.raises(TypeError):
        fusedloss.explain(module, x, x)


# ---- what a patch reached ------------------------------------------------------------------------


def line_of(text: str) -> int:
    """The line of this file that ends with that comment."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"  # {text}"))
    return found


def rows(patch: fusedloss.patch) -> list[tuple[int, str, int, bool]]:
    assert {call.file for call in patch.calls} <= {__file__}
    return [(call.line, call.loss, call.calls, call.path.fused) for call in patch.calls]


@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_a_patch_counts_calls(loss: str, backend: str) -> None:
    """Counted by line and path, the path that explain() gives; nothing before and after the
    patch."""
    sample = at_shape(loss, (5, 7)).sample(torch.float32)

    def step() -> Tensor:
        result: Tensor = getattr(F, loss)(leaf(sample.input), sample.target)  # the step
        return result

    step()
    with fusedloss.patch() as patch:
        for _ in range(3):
            step()
        told = fusedloss.explain(step)
    step()
    (call,) = patch.calls
    assert (call.file, call.line, call.function) == (__file__, line_of("the step"), "step")
    assert (call.loss, call.calls, call.path) == (loss, 3, told)
    assert told.backend == backend


def test_a_patch_says_why_a_call_is_plain(compiled: str) -> None:
    x = torch.rand(5, 7)
    with fusedloss.patch() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for y in (x, x, x[None], x.to(torch.uint16)):
            F.mse_loss(x, y)  # one line
        F.smooth_l1_loss(x, x, beta=0.0), F.mse_loss(x, x)  # two calls
        nn.Sequential(Pair(nn.HuberLoss()))(x)  # through modules
        fusedloss.BCELoss()(x, x)  # by name
        FL.log_loss(x, x)  # torch has no such function
    one = [
        "fused, compiled",
        "plain PyTorch: shapes differ: (5, 7) and (1, 5, 7)",
        "plain PyTorch: dtypes differ: torch.float32 and torch.uint16",
    ]
    inner = line_of("within")
    assert rows(patch) == [
        (line_of("one line"), "mse_loss", 2, True),
        (line_of("one line"), "mse_loss", 1, False),
        (line_of("one line"), "mse_loss", 1, False),
        (line_of("two calls"), "smooth_l1_loss", 1, True),
        (line_of("two calls"), "mse_loss", 1, True),
        (inner, "huber_loss", 1, True),
        (line_of("by name"), "binary_cross_entropy", 1, True),
        (line_of("torch has no such function"), "log_loss", 1, True),
    ]
    head, *lines = str(patch).splitlines()
    assert head.split() == ["call", "site", "loss", "calls", "path"]
    assert [" ".join(line.split()[4:]) for line in lines[:3]] == one
    name = "test_a_patch_says_why_a_call_is_plain"
    assert lines[0].split()[:4] == [
        f"{Path(__file__).relative_to(Path.cwd())}:{line_of('one line')}", name, "mse_loss", "2",
    ]  # fmt: skip


class Pair(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.loss(x, x)  # within
        return result


def test_a_patch_counts_custom_losses(backend: str) -> None:
    own, x = fusedloss.pointwise_loss(absolute), torch.rand(3)
    with fusedloss.patch() as patch:
        for _ in range(3):
            own(x, x)  # own
            own.module()(x, x)  # own module
    assert rows(patch) == [
        (line_of("own"), "absolute", 3, backend != "reference"),
        (line_of("own module"), "absolute", 3, backend != "reference"),
    ]


def test_a_table_leaves_out_reasons(compiled: str) -> None:
    x = torch.rand(9, 1)
    with fusedloss.patch() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(2, 9):
            F.mse_loss(x, x[:n].T)
    assert len(patch.calls) == 7
    assert len(str(patch).splitlines()) == 1 + 3 + 1
    assert str(patch).splitlines()[-1].startswith("4 more rows")


def test_a_patch_that_reached_nothing() -> None:
    with fusedloss.patch() as patch:
        ORIGINALS["mse_loss"](torch.rand(3), torch.rand(3))
    assert patch.calls == [] and "reached no loss" in str(patch)
    assert "reached no loss" in str(fusedloss.patch())


def test_each_patch_counts_for_itself(backend: str) -> None:
    x = torch.rand(3)
    one, two = fusedloss.patch(), fusedloss.patch()
    with one:
        F.mse_loss(x, x)
        with two, one:
            F.l1_loss(x, x)
        F.mse_loss(x, x)
    with two:
        F.huber_loss(x, x)
    assert [call.loss for call in one.calls] == ["mse_loss", "l1_loss", "mse_loss"]
    assert [call.loss for call in two.calls] == ["l1_loss", "huber_loss"]
    two.start()
    one.start()
    fusedloss.patch().stop()
    fusedloss.patch().stop()
    F.mse_loss(x, x)
    FL.mse_loss(x, x)
    assert len(one.calls) == 3 and len(two.calls) == 2, "both have ended"
    for _ in range(2):
        two.start()
        FL.mse_loss(x, x)
        two.stop()
    assert [call.calls for call in two.calls] == [1, 1, 2], "which began anew"


def test_a_patch_counts_all_threads(compiled: str) -> None:
    x = torch.rand(3)

    def work() -> None:
        for _ in range(500):
            F.mse_loss(x, x)

    with fusedloss.patch() as patch:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(call.calls for call in patch.calls) == 2000


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5, 7), (1, 7)], ids=["fused", "plain"])
def test_a_patch_says_what_was_traced(shape: tuple[int, ...], backend: str) -> None:
    torch._dynamo.reset()
    own = fusedloss.pointwise_loss(absolute)

    def step(input: Tensor, target: Tensor) -> Tensor:
        return FL.l1_loss(input, target) + own(input, target)

    x, y = torch.rand(5, 7), torch.rand(shape)
    with fusedloss.patch() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(x, y), step(x, y))  # traced, and not
    fused = shape == x.shape and backend != "reference"
    line = line_of("traced, and not")
    assert [row for row in rows(patch) if row[0] == line] == [
        (line, "l1_loss", 0, fused),
        (line, "absolute", 0, fused),
    ]
    assert " traced " in str(patch)


@pytest.mark.slow
def test_a_patch_says_what_is_left_to_the_compiler(compiled: str) -> None:
    torch._dynamo.reset()
    x = torch.rand(5, 7)
    with fusedloss.backend(None), fusedloss.patch() as patch:
        for loss in (FL.mse_loss, FL.cross_entropy):
            torch.compile(loss, backend="aot_eager")(x, x)
    assert {(call.loss, call.calls, call.path.reasons) for call in patch.calls} == {
        (loss, 0, ("few elements, which are left to the compiler",))
        for loss in ("mse_loss", "cross_entropy")
    }


# ---- TorchScript under a patch -------------------------------------------------------------------


def scripted_call(input: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(input, target, reduction="sum")


TORCH_MODULES = [
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss,
    nn.CrossEntropyLoss,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", TORCH_MODULES)
def test_torchs_losses_are_scripted_under_a_patch(kind: Any, backend: str) -> None:
    x, y = torch.rand(5, 7), torch.rand(5, 7)
    expected = kind()(x, y)
    with fusedloss.patch():
        scripted = torch.jit.script(nn.Sequential(Fixed(kind(), y)))
        traced = torch.jit.trace(kind(), (x, y))
        torch.testing.assert_close(scripted(x), expected)
    torch.testing.assert_close(scripted(x), expected)
    torch.testing.assert_close(traced(x, y), expected)


class Fixed(nn.Module):
    def __init__(self, loss: nn.Module, target: Tensor) -> None:
        super().__init__()
        self.loss, self.target = loss, target

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.loss(x, self.target)
        return result


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_functions_are_scripted_under_a_patch(backend: str) -> None:
    x, y = torch.rand(5, 7), torch.rand(5, 7)
    with fusedloss.patch():
        scripted = torch.jit.script(scripted_call)
        with pytest.raises(RuntimeError, match="TorchScript"):
            torch.jit.script(fusedloss.MSELoss())
    torch.testing.assert_close(scripted(x, y), scripted_call(x, y))
    for ours in (FL.mse_loss, FL.log_loss):
        with pytest.raises(RuntimeError, match="TorchScript"):
            torch.jit.script(ours)


# ---- python -m fusedloss run ---------------------------------------------------------------------

SCRIPT = """
import sys
import beside
import torch
from torch.nn.functional import mse_loss

x = torch.rand(3)
print(__name__, sys.argv, flush=True)
for _ in range(4):
    mse_loss(x, x)
exec(sys.argv[1])
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "beside.py").touch()
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fusedloss", "run", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("ends", "status"),
    [("", 0), ("sys.exit(7)", 7), ("raise ValueError('mine')", 1)],
    ids=["ends", "exits", "raises"],
)
def test_run_a_script(ends: str, status: int, tmp_path: Path) -> None:
    """Like Python, from another folder as well; the table comes last, before any traceback."""
    done = run(tmp_path, "script.py", ends, "--option")
    assert done.returncode == status
    assert done.stdout == f"__main__ {['script.py', ends, '--option']}\n"
    table = done.stderr.splitlines()[:2]
    assert table[0].split() == ["call", "site", "loss", "calls", "path"]
    assert table[1].split()[:4] == ["script.py:10", "<module>", "mse_loss", "4"]
    assert ("ValueError: mine" in done.stderr) is (status == 1)


def test_run_a_module(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "script", "sys.exit(7)")
    assert done.returncode == 7
    assert "script.py:10 <module>" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["missing.py"], 2, "no script 'missing.py' in "),
        ([], 2, "usage: "),
        (["--help"], 0, "usage: "),
    ],
)
def test_run_what_is_not_there(
    arguments: list[str], status: int, said: str, tmp_path: Path
) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == status and said in done.stderr and not done.stdout
