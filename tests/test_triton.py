"""Features of the Triton backend: other functions in its engine, and running without a compiled
extension. The tests over the table run on it as well: FUSED in helpers.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fusedloss
import fusedloss.functional as FL
from fusedloss import backends
from fusedloss import math as fm
from helpers import FUSED, assert_same_bits, draw_upstream

triton = pytest.importorskip("triton")
import triton.language as tl

from fusedloss.backends.triton import pointwise, runtime
from fusedloss.backends.triton.losses import PointwiseLoss


@triton.jit
def _saturating(x, y, p, scale, slope):
    """p scale (1 - e^-d^2) + slope x y, with d = x - y."""
    d = x - y
    e = tl.exp(-d * d)
    by_d = p * scale * 2.0 * d * e
    return p * scale * (1.0 - e) + slope * x * y, by_d + slope * y, slope * x - by_d


@pytest.mark.skipif(FUSED != "triton", reason="FUSEDLOSS_TEST_BACKEND is not triton")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_custom_function(reduction: int, layout: str, fused: str) -> None:
    """An operand, two parameters, and a gradient for target: the engine takes a jit function."""
    loss = PointwiseLoss(_saturating, inputs=3, gradients=2, parameters=2)
    shape = (70, 33)
    x, y, p, upstream = torch.randn(4, *shape, dtype=torch.float64).unbind()
    if layout == "transposed":
        x = x.t().contiguous().t()
    parameters = (0.3, -1.75)
    expected = [t.clone().requires_grad_() for t in (x, y)]
    d = expected[0] - expected[1]
    each = p * 0.3 * (1 - (-d * d).exp()) - 1.75 * expected[0] * expected[1]
    value = each if reduction == 0 else each.mean() if reduction == 1 else each.sum()
    upstream = upstream if reduction == 0 else torch.tensor(0.7, dtype=torch.float64)
    wanted = torch.autograd.grad(value, expected, upstream)

    def run(do: runtime.Pass) -> torch.Tensor | None:
        return pointwise.run(do, loss, x, y, None, (p,), parameters, 0, reduction, torch.float64)

    state, right = torch.tensor([[0.0, 0.0], [0.7, 3.0]], dtype=torch.float64).unbind()
    forward = runtime.Pass(runtime.FORWARD if reduction else runtime.VALUE, state)
    forward.prediction = right
    predicted = [runtime.empty_like(x, x.dtype) for _ in range(2)]
    if reduction:
        forward.gradients = tuple(predicted)
    torch.testing.assert_close(run(forward), value.detach())
    gradients = [runtime.empty_like(x, x.dtype) for _ in range(2)]
    prediction = torch.ones(2, dtype=torch.float64)
    run(runtime.Pass(runtime.FRESH, state, tuple(gradients), prediction, upstream))
    for got, correct in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, correct)
    for ahead, got in zip(predicted if reduction else [], gradients, strict=False):
        assert_same_bits(ahead, got, "written by the forward pass, and by the backward pass")


@pytest.mark.skipif(FUSED != "triton", reason="FUSEDLOSS_TEST_BACKEND is not triton")
@pytest.mark.interpret_all
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.5, 0.0, 1.3, -1.0])
def test_numbers_anywhere(p: float, fused: str) -> None:
    """A parameter, a number or a condition of them in the place of each argument, and slopes that
    are equal for all elements."""

    @fusedloss.pointwise_loss
    def numbers(input, target, *, p):  # type: ignore[no-untyped-def]
        chosen = fm.where(fm.equal(p, 2) & (input > 0.5) | (p < 0.7), input * target, fm.sin(input))
        extremes = fm.maximum(p, input) + fm.minimum(target, 0.7) + fm.clamp(input, 0.2, p + 1)
        powers = input**p + 2.0**target + (p + 2) ** input + fm.xlogy(p, target)
        return chosen + extremes + powers + 3 * input - p * target

    @fusedloss.pointwise_loss
    def linear(input, target, *, p):  # type: ignore[no-untyped-def]
        return p * input + 0.1 * target

    x, y = torch.rand(2, 67, dtype=torch.float64).add(0.05).unbind()
    x, y = x.requires_grad_(), y.requires_grad_()
    for loss in (numbers, linear):
        assert fusedloss.explain(loss, x, y, p=p).backend == "triton"
        for options in ({}, {"clip_grad": 0.75}, {"reduction": "none"}):
            values = [call(x, y, p=p, **options) for call in (loss, loss.reference)]
            torch.testing.assert_close(*values, rtol=1e-12, atol=1e-13)
            upstream = draw_upstream(values[0].shape, x.dtype)
            gradients = [torch.autograd.grad(value, (x, y), upstream) for value in values]
            torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.skipif(not backends.INTERPRETED, reason="changes the prediction between programs")
@pytest.mark.parametrize("later", [(2.0, 3.0), (1.0, 0.0), (-1.0, 2.0)])
@pytest.mark.parametrize("rows", [False, True])
def test_a_prediction_that_changes_meanwhile(
    rows: bool, later: tuple[float, float], fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward on another stream may update the prediction while a forward reads it: then backward
    computes the whole gradient."""
    from triton.runtime.interpreter import interpreter_builder

    x, y = torch.randn(20_000, 3), torch.rand(20_000, 3)
    loss, name = FL.mse_loss, "mse_loss"
    if rows:
        loss, name, y = FL.cross_entropy, "cross_entropy", torch.randint(3, (20_000,))
    prediction, calls = torch.tensor([1.0, 3.0], dtype=torch.float64), []
    monkeypatch.setattr(
        sys.modules["fusedloss.backends.triton.operators"],
        "_prediction_of",
        lambda *call: prediction,
    )
    began = interpreter_builder.set_grid_idx

    def meanwhile(program: int, *others: int) -> None:
        calls.append(program)
        if program == 6:  # counting classes takes fewer
            prediction.copy_(torch.tensor(later))
        began(program, *others)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", meanwhile)
    x.requires_grad_()
    value = loss(x, y)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", began)
    assert max(calls) > 6
    state = value.grad_fn.saved_tensors[0]
    assert state.isnan().tolist() == [True, False]
    assert not any(runtime._tickets[key].item() for key in runtime._tickets)
    expected = x.detach().requires_grad_()
    right = getattr(torch.nn.functional, name)(expected, y)
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(
        torch.autograd.grad(value, x), torch.autograd.grad(right, expected), msg=name
    )
    # Again, with a prediction that stays as it is: the ticket serves the next kernel.
    prediction.copy_(torch.tensor([1.0, 3.0]))
    assert loss(x, y).grad_fn.saved_tensors[0][0].item() == 1.0


def test_it_takes_what_the_extension_has_no_kernels_for() -> None:
    """By default CPU tensors go to the compiled kernels, and GPU tensors without CUDA kernels to
    Triton."""
    interpreted = backends.INTERPRETED
    built = backends.extension is not None
    cuda = "compiled" if built and fusedloss.info().build["cuda"] else "triton"
    expected = {"cpu": "compiled"} if built else {}
    if cuda == "compiled" or not interpreted:
        expected["cuda"] = cuda
    if not interpreted:
        expected["xpu"] = "triton"
    assert backends.fused_on == expected


def test_who_is_asked_in_which_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that the CUDA kernels cannot take goes to Triton, unless they were chosen by name."""
    monkeypatch.setattr(backends, "fused_on", {"cuda": "compiled"})
    later = () if backends.INTERPRETED else ("triton",)
    assert backends.candidates("cuda") == ("compiled", *later)
    monkeypatch.setattr(backends, "_chosen", backends.BACKENDS[0])
    assert backends.candidates("cuda") == ("compiled",)


_WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["fusedloss._C"] = None  # as where there was no compiler
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fusedloss
assert "without compiled kernels" in str(caught[0].message), caught
import torch, fusedloss.functional as FL
assert fusedloss.info().backends["compiled"] and not fusedloss.info().backends["triton"]
x, y = torch.randn(9, 5, requires_grad=True), torch.randint(5, (9,))
assert not fusedloss.explain(FL.cross_entropy, x, y).fused  # the interpreter must be chosen
fusedloss.backend("triton")
assert fusedloss.explain(FL.cross_entropy, x, y).backend == "triton"
module = fusedloss.CrossEntropyLoss()
compiled = torch.compile(lambda x: module(x, y), fullgraph=True, backend="aot_eager")
for call in (lambda x: FL.cross_entropy(x, y), lambda x: module(x, y), compiled):
    for upstream in (1.0, 1.0, 3.0):
        (got,) = torch.autograd.grad(call(x) * upstream, x)
        right = torch.nn.functional.cross_entropy(x, y) * upstream
        torch.testing.assert_close(got, torch.autograd.grad(right, x)[0])

import linecache, os
from fusedloss import math as fm

@fusedloss.pointwise_loss
def charbonnier(input, target, *, eps=1e-3):
    return fm.sqrt((input - target) ** 2 + eps**2)

charbonnier.compile()
linecache.clearcache()  # as who prints a traceback may do
target = torch.randn(9, 5, requires_grad=True)
compiled = torch.compile(lambda x, y: charbonnier(x, y, eps=0.5), fullgraph=True, backend="aot_eager")

def own():
    assert fusedloss.explain(charbonnier, x, target).backend == "triton"
    for call in (lambda x, y: charbonnier(x, y, eps=0.5), compiled):
        for upstream in (1.0, 1.0, 3.0):
            got = torch.autograd.grad(call(x, target) * upstream, (x, target))
            right = charbonnier.reference(x, target, eps=0.5) * upstream
            torch.testing.assert_close(got, torch.autograd.grad(right, (x, target)))
own()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    x = x.detach().requires_grad_()
    charbonnier(x, target).backward()
    os._exit(0 if x.grad.isfinite().all() else 1)
assert os.waitpid(pid, 0)[1] == 0
"""


def test_without_the_extension() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EXTENSION],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
