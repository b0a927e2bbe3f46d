"""fusedloss.replace and fusedloss.patch: what they change, keep and put back."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from cases import LOSSES, at_shape
from helpers import assert_same_bits, compare_with_torch, leaf

TORCH_LOSSES = [loss for loss in LOSSES if loss != "log_loss"]
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
    """Not torch's loss, whatever it computes."""

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
    """One module under two names, and held elsewhere as well."""
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
    """Fused, and what is not fused: no call comes round to itself."""
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
