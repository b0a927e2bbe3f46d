"""The inputs with which PyTorch tests its own losses, functions and modules: ours give the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from cases import LOSSES
from helpers import affordable, assert_same_error, outcome

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")

Call = tuple[tuple[Any, ...], dict[str, Any]]


def op_infos(loss: str) -> list[Any]:
    """One, but for losses of which torch tests several variants."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.name == f"nn.functional.{loss}"]


def module_infos() -> list[Any]:
    from torch.testing._internal.common_modules import module_db

    return [info for info in module_db if hasattr(fusedloss, info.module_cls.__name__)]


def leaves(call: Call) -> Iterator[Tensor]:
    """The tensors of a call that require a gradient."""
    args, options = call
    for value in (*args, *options.values()):
        if isinstance(value, Tensor) and value.requires_grad:
            yield value


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], call: Call) -> None:
    """The same value and gradients, or the same error."""

    def run(function: Callable[..., Tensor]) -> list[Tensor | None]:
        value = function(*call[0], **call[1])
        wanted = list(leaves(call))
        if not value.requires_grad:
            return [value]
        upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
        return [value, *torch.autograd.grad(value, wanted, upstream, allow_unused=True)]

    mine, my_error, my_warnings = outcome(lambda: run(ours))
    expected, their_error, their_warnings = outcome(lambda: run(theirs))
    assert_same_error(my_error, their_error)
    assert my_warnings == their_warnings
    if their_error is not None:
        return
    for a, b in zip(mine, expected, strict=True):
        if a is None or b is None:
            # torch may leave out a gradient that is 0.
            assert a is b is None or not (a if b is None else b).count_nonzero()  # type: ignore[union-attr]
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5, equal_nan=True)


TORCHS = [loss for loss in (*LOSSES, "linear_cross_entropy") if hasattr(F, loss)]


@pytest.mark.interpret_all
@pytest.mark.parametrize("loss", TORCHS)
def test_functions(loss: str, backend: str) -> None:
    for info in op_infos(loss):
        samples = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
        assert samples
        samples = samples[::5] if len(samples) > 100 else samples
        for sample in affordable(samples, 6):
            call = (sample.input, *sample.args), sample.kwargs
            compare(getattr(FL, loss), plain(loss), call)


def plain(loss: str) -> Callable[..., Tensor]:
    """torch's function, but not torch's way of taking chunks, which has warnings and errors of its own."""
    theirs: Callable[..., Tensor] = getattr(F, loss)
    if loss != "linear_cross_entropy":
        return theirs
    return lambda *args, **options: theirs(*args, **{**options, "options": None})


@pytest.mark.parametrize("loss", TORCHS)
def test_errors(loss: str, backend: str) -> None:
    (info, *_) = op_infos(loss)
    for wrong in info.error_inputs("cpu") if info.error_inputs_func is not None else ():
        sample = wrong.sample_input
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(
                getattr(FL, loss), getattr(F, loss), ((sample.input, *sample.args), sample.kwargs)
            )


def test_modules(backend: str) -> None:
    infos = module_infos()
    assert {info.module_cls.__name__ for info in infos} >= {"PoissonNLLLoss", "MarginRankingLoss"}
    for info in infos:
        kind: type[nn.Module] = getattr(fusedloss, info.module_cls.__name__)
        inputs = info.module_inputs_func(info, "cpu", torch.float32, True, True)
        for given in affordable(inputs, 3):
            made, forward = given.constructor_input, given.forward_input
            if forward is None:
                continue
            ours, theirs = (f(*made.args, **made.kwargs) for f in (kind, info.module_cls))
            ours.load_state_dict(theirs.state_dict())
            if getattr(theirs, "options", None) is not None:
                theirs.options = None  # see plain()
            compare(ours, theirs, (tuple(forward.args), dict(forward.kwargs)))
