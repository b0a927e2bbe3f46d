"""What wraps a call: functorch, forward-mode AD, subclasses, modes, autocast, tracing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
import fusedloss.functional as FL
from cases import BASIC, FAMILIES, Sample, at_shape, narrow
from fusedloss import _dispatch
from helpers import (
    MODULES,
    assert_same_error,
    draw_upstream,
    leaf,
    outcome,
    sample_truth,
    torch_loss,
)

SHAPE = (5, 7)
# Losses whose inputs are probabilities.
UNIT = ("binary_cross_entropy", "binary_cross_entropy-weight")
TORCH_LOSSES = [loss for loss in BASIC if loss != "log_loss"]
# One family per loss, and families whose options take another path through the code.
WRAPPED = [
    *BASIC,
    "mse_loss-weight",
    "huber_loss-delta2-weight",
    "binary_cross_entropy-weight",
    "binary_cross_entropy_with_logits-weight-pos_weight",
    "cross_entropy-weight-smoothing-ignored",
    "cross_entropy-probabilities-weight",
    "log_loss-probabilities",
]


def both(
    family: str, use: Callable[[Callable[..., Tensor], Sample], Any], **tolerance: Any
) -> None:
    """Ours and torch's give the same."""
    case = at_shape(family, SHAPE)
    sample = case.sample(torch.float64)
    ours, our_error, _ = outcome(lambda: use(getattr(FL, case.loss), sample))
    theirs, their_error, _ = outcome(lambda: use(torch_loss(case.loss), sample))
    assert_same_error(our_error, their_error)
    torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("family", WRAPPED)
def test_func_grad(family: str, backend: str) -> None:
    both(
        family,
        lambda f, s: torch.func.grad_and_value(lambda x: 3 * f(x, s.target, **s.options))(s.input),
    )


@pytest.mark.parametrize("family", WRAPPED)
def test_func_of_a_leaf_that_wants_a_gradient(family: str, backend: str) -> None:
    both(
        family,
        lambda f, s: torch.func.grad(lambda x: f(x, s.target, **s.options))(leaf(s.input)).detach(),
    )


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("family", WRAPPED)
def test_vmap(family: str, with_target: bool, backend: str) -> None:
    """Over rows of input only, and over input and target."""

    def use(f: Callable[..., Tensor], s: Sample) -> Tensor:
        stacked = torch.stack([s.input, s.input.flip(0).contiguous()])
        if with_target:
            targets = torch.stack([s.target, s.target.flip(0)])
            return torch.func.vmap(lambda x, y: f(x, y, **s.options))(stacked, targets)
        return torch.func.vmap(lambda x: f(x, s.target, **s.options))(stacked)

    both(family, use)


@pytest.mark.parametrize("family", WRAPPED)
def test_per_sample_gradients(family: str, backend: str) -> None:
    def use(f: Callable[..., Tensor], s: Sample) -> Tensor:
        stacked = torch.stack([s.input, s.input.flip(0).contiguous()])
        return torch.func.vmap(torch.func.grad(lambda x: f(x, s.target, **s.options)))(stacked)

    both(family, use)


@pytest.mark.parametrize("family", WRAPPED)
def test_jvp(family: str, backend: str) -> None:
    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        tangent = draw_upstream(s.input.shape, s.input.dtype)
        return torch.func.jvp(lambda x: f(x, s.target, **s.options), (s.input,), (tangent,))

    both(family, use)


@pytest.mark.parametrize("family", WRAPPED)
def test_forward_mode(family: str, backend: str) -> None:
    """A dual tensor, also if the input requires a gradient."""

    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        results = []
        for primal in (s.input, leaf(s.input)):
            with forward_ad.dual_level():
                tangent = draw_upstream(s.input.shape, s.input.dtype)
                dual = forward_ad.make_dual(primal, tangent)
                value = forward_ad.unpack_dual(f(dual, s.target, **s.options))
                assert value.tangent is not None
                results += [value.primal.detach(), value.tangent.detach()]
        return results

    both(family, use)


@pytest.mark.parametrize("family", WRAPPED)
def test_hessian(family: str, backend: str) -> None:
    both(
        family,
        lambda f, s: torch.func.hessian(lambda x: f(x, s.target, **s.options))(s.input),
    )


@pytest.mark.parametrize("family", WRAPPED)
def test_jacobian(family: str, backend: str) -> None:
    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        return torch.autograd.functional.jacobian(
            lambda x: f(x, s.target, reduction="none", **s.options), s.input, vectorize=True
        )

    both(family, use)


@pytest.mark.parametrize("family", WRAPPED)
def test_batched_gradients(family: str, backend: str) -> None:
    """is_grads_batched: a vmap over the backward pass."""

    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        input = leaf(s.input)
        value = f(input, s.target, reduction="none", **s.options)
        upstream = draw_upstream(torch.Size((3, *value.shape)), value.dtype)
        return torch.autograd.grad(value, input, upstream, is_grads_batched=True)[0]

    both(family, use)


class Tagged(Tensor):
    """A subclass that torch functions keep."""


class Counting(Tensor):
    """A subclass that records the functions it is passed to."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["input", "target", "both"])
@pytest.mark.parametrize("family", WRAPPED)
def test_subclass(family: str, which: str, backend: str) -> None:
    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        input = s.input.as_subclass(Tagged) if which != "target" else s.input
        target = s.target.as_subclass(Tagged) if which != "input" else s.target
        input = input.detach().requires_grad_()
        value = f(input, target, **s.options)
        kind = type(value).__name__
        (grad,) = torch.autograd.grad(value, input)
        return {
            "kind": len(kind),
            "value": value.detach().as_subclass(Tensor),
            "grad": grad.as_subclass(Tensor),
        }

    both(family, use)


def test_a_subclass_that_only_carries_metadata_is_fused(fused: str) -> None:
    x, y = torch.rand(SHAPE), torch.rand(SHAPE)
    tagged = leaf(x.as_subclass(Tagged))
    told = fusedloss.explain(FL.mse_loss, tagged, y)
    assert told.fused and told.backend == fused
    value = FL.mse_loss(tagged, y)
    assert type(value) is Tagged
    value.backward()
    expected = leaf(x)
    FL.mse_loss(expected, y).backward()
    assert torch.equal(tagged.grad.as_subclass(Tensor), expected.grad)
    assert type(FL.mse_loss(x, y, weight=y.as_subclass(Tagged))) is Tagged
    # One that has something to say, or two of which one may.
    assert not fusedloss.explain(FL.mse_loss, x, y.as_subclass(Counting)).fused
    assert not fusedloss.explain(FL.mse_loss, tagged, y.as_subclass(Counting)).fused


def test_a_mask_of_torchvision_is_fused(fused: str) -> None:
    vision = pytest.importorskip("torchvision.tv_tensors")
    x, mask = leaf(torch.rand(SHAPE)), vision.Mask(torch.rand(SHAPE) > 0.5)
    for target in (mask, vision.Mask(mask.float())):
        assert fusedloss.explain(FL.mse_loss, x, target).fused
        for kind in ("Tensor", "TVTensor"):
            with vision.set_return_type(kind):
                ours, theirs = FL.mse_loss(x, target), torch.nn.functional.mse_loss(x, target)
            assert type(ours) is type(theirs)
            torch.testing.assert_close(ours.as_subclass(Tensor), theirs.as_subclass(Tensor))
    wide = vision.BoundingBoxes(torch.rand(2, 4), format="XYXY", canvas_size=(9, 9))
    assert type(FL.l1_loss(torch.rand(2, 4), wide)) is Tensor


@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_torch_function_protocol(loss: str, backend: str) -> None:
    """A subclass's __torch_function__ is asked."""
    Counting.seen.clear()
    sample = at_shape(loss, SHAPE).sample(torch.float32)
    value = getattr(FL, loss)(sample.input.as_subclass(Counting), sample.target)
    assert isinstance(value, Counting)
    assert Counting.seen


class CountingMode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


class CountingDispatchMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [CountingMode, CountingDispatchMode])
@pytest.mark.parametrize("family", WRAPPED)
def test_modes(family: str, mode: Any, backend: str) -> None:
    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        input = leaf(s.input)
        with mode() as active:
            value = f(input, s.target, **s.options)
            (grad,) = torch.autograd.grad(value, input)
        assert active.seen > 0
        return value.detach(), grad

    both(family, use)


@pytest.mark.parametrize("loss", BASIC)
def test_default_device_and_dtype(loss: str, backend: str) -> None:
    """Global defaults do not affect calls on given tensors."""
    before = torch.get_default_dtype()

    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                input = leaf(s.input.float())
                value = f(input, s.target.float() if s.target.is_floating_point() else s.target)
                (grad,) = torch.autograd.grad(value, input, torch.ones_like(value))
        finally:
            torch.set_default_dtype(before)
        return value.detach(), grad

    both(loss, use)


@pytest.mark.parametrize("family", WRAPPED)
def test_parameter_as_input(family: str, backend: str) -> None:
    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        parameter = torch.nn.Parameter(s.input.clone())
        value = f(parameter, s.target, **s.options)
        assert type(value) is Tensor
        value.backward()
        assert parameter.grad is not None and type(parameter.grad) is Tensor
        return value.detach(), parameter.grad

    both(family, use)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", WRAPPED)
def test_autocast(
    family: str, dtype: torch.dtype, autocast_dtype: torch.dtype, backend: str
) -> None:
    """torch's result dtype, gradients in the input's dtype, and a value that is no worse."""
    case = at_shape(family, SHAPE)
    sample = case.sample(dtype)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        input = leaf(sample.input)
        with torch.autocast("cpu", dtype=autocast_dtype):
            value = function(input, sample.target, **sample.options)
        (grad,) = torch.autograd.grad(value, input)
        return value.detach(), grad

    ours, our_error, _ = outcome(lambda: run(getattr(FL, case.loss)))
    theirs, their_error, _ = outcome(lambda: run(torch_loss(case.loss)))
    assert type(our_error) is type(their_error), (our_error, their_error)
    if their_error is not None:
        return
    if case.loss != "log_loss":
        assert ours[0].dtype == theirs[0].dtype
    assert ours[1].dtype == dtype
    truth = sample_truth(case.loss, sample, "mean")
    for mine, eager, right in (
        (ours[0], theirs[0], truth.value),
        (ours[1], theirs[1], truth.grad),
    ):
        floor = torch.finfo(mine.dtype).eps * right.abs().max()
        error, allowed = (mine - right).abs().max(), (eager - right).abs().max()
        assert error <= max(allowed, floor), f"off by {error:.3g}, torch by {allowed:.3g}"


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "huber_loss"])
def test_autocast_of_a_weighted_loss(
    loss: str, dtype: torch.dtype, autocast_dtype: torch.dtype, backend: str
) -> None:
    """Whatever dtype torch gives, for each reduction."""
    input, target, weight = torch.rand(3, 5, 7).to(dtype).unbind()
    for reduction in ("none", "mean", "sum"):
        results = []
        for function in (getattr(FL, loss), torch_loss(loss)):
            x = leaf(input)
            with torch.autocast("cpu", dtype=autocast_dtype):
                value = function(x, target, weight=weight, reduction=reduction)
            results.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
        torch.testing.assert_close(*results)


def test_autocast_cross_entropy_of_low_precision_logits(compiled: str) -> None:
    """fp32 loss, gradient in the logits' dtype rounded once."""
    sample = at_shape("cross_entropy", (33, 1000)).sample(torch.bfloat16)
    input = leaf(sample.input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = FL.cross_entropy(input, sample.target)
    assert value.dtype == torch.float32
    (grad,) = torch.autograd.grad(value, input, torch.tensor(1 / 3))
    assert grad.dtype == torch.bfloat16
    expected = sample_truth("cross_entropy", sample, "mean", torch.tensor(1 / 3))
    torch.testing.assert_close(value.double(), expected.value, rtol=2e-6, atol=0)
    allowed = expected.grad.abs() * 2**-8 + 1e-6 * expected.grad_scale
    assert ((grad.double() - expected.grad).abs() <= allowed).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the CPU does not refuse")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_refuses_binary_cross_entropy(dtype: torch.dtype, compiled: str) -> None:
    x = torch.full((3,), 0.5, dtype=dtype, device="cuda", requires_grad=True)
    with torch.autocast("cuda"):
        for loss in (FL.binary_cross_entropy, fusedloss.BCELoss()):
            with pytest.raises(RuntimeError, match="unsafe to autocast"):
                loss(x, x.detach())


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["mse_loss", "binary_cross_entropy_with_logits", "cross_entropy"])
def test_training_under_autocast(loss: str, dtype: torch.dtype, device: str, compiled: str) -> None:
    """With a GradScaler for fp16: a scale that overflows skips the step, as with torch."""
    results = []
    for function in (getattr(FL, loss), torch_loss(loss)):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 7).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(
            device, init_scale=2.0**40, growth_interval=4, enabled=dtype is torch.float16
        )
        losses, scales = [], []
        x = torch.randn(9, 6, device=device)
        target = at_shape(loss, (9, 7)).sample(dtype).target.to(device)
        for _ in range(40):
            with torch.autocast(device, dtype=dtype):
                value = function(model(x), target)
            assert value.dtype == torch.float32
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(value.item())
            scales.append(scaler.get_scale())
        assert losses[-1] < losses[0]
        results.append((scales, losses))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(*(torch.tensor(r[1]) for r in results), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("family", WRAPPED)
def test_functional_call(family: str, backend: str) -> None:
    """Parameters given from outside, and their gradients, both ways."""

    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        model = torch.nn.Linear(7, 7).double()
        weights = {
            "weight": torch.eye(7, dtype=torch.float64),
            "bias": torch.full((7,), 1e-3, dtype=torch.float64),
        }

        def loss(weights: dict[str, Tensor]) -> Tensor:
            output = torch.func.functional_call(model, weights, s.input)
            output = output.clamp(0, 1) if "log_loss" in family or family in UNIT else output
            return f(output, s.target, **s.options)

        leaves = {name: leaf(w) for name, w in weights.items()}
        eager = torch.autograd.grad(loss(leaves), list(leaves.values()))
        return torch.func.grad(loss)(weights), list(eager)

    both(family, use)


@pytest.mark.parametrize("family", WRAPPED)
def test_anomaly_mode(family: str, backend: str) -> None:
    """It accepts finite results and names a nan."""

    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        with warnings.catch_warnings(), torch.autograd.detect_anomaly():
            warnings.simplefilter("ignore")
            input = leaf(s.input)
            (grad,) = torch.autograd.grad(f(input, s.target, **s.options), input)
            with pytest.raises(RuntimeError, match="returned nan values"):
                torch.autograd.grad(
                    f(input, s.target, **s.options), input, torch.tensor(torch.nan).double()
                )
        return grad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly mode is slow
        both(family, use)


@pytest.mark.parametrize("family", WRAPPED)
def test_deterministic_mode(family: str, backend: str) -> None:
    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        torch.use_deterministic_algorithms(True)
        try:
            input = leaf(s.input)
            value = f(input, s.target, **s.options)
            return value.detach(), torch.autograd.grad(value, input)[0]
        finally:
            torch.use_deterministic_algorithms(False)

    both(family, use)


@pytest.mark.parametrize("family", WRAPPED)
def test_inference_tensors(family: str, backend: str) -> None:
    """Made under inference_mode and used for training afterwards: torch's answer."""

    def use(f: Callable[..., Tensor], s: Sample) -> Any:
        with torch.inference_mode():
            target = s.target.clone()
        input = leaf(s.input)
        value = f(input, target, **s.options)
        return value.detach(), torch.autograd.grad(value, input)[0]

    both(family, use)


@pytest.mark.parametrize("mode", [lambda: torch.device("cpu"), CountingMode], ids=["device", "own"])
@pytest.mark.parametrize("loss", BASIC)
def test_torch_function_modes_are_fused(loss: str, mode: Any, compiled: str) -> None:
    """torch.set_default_device is such a mode, and calls stay fused under it."""
    sample = at_shape(loss, SHAPE).sample(torch.float32)
    with mode():
        assert fusedloss.explain(getattr(FL, loss), sample.input, sample.target).fused


@pytest.mark.parametrize("family", WRAPPED)
def test_make_fx(family: str, backend: str) -> None:
    """Traced with fake tensors, the graph computes the same."""
    case = at_shape(family, SHAPE)
    sample, other = case.sample(torch.float64), case.sample(torch.float64, seed=1)

    def call(input: Tensor) -> Tensor:
        return getattr(FL, case.loss)(input, sample.target, **sample.options)

    for mode in ("real", "fake"):
        traced = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(sample.input)
        torch.testing.assert_close(traced(other.input), call(other.input))


@pytest.mark.parametrize("family", FAMILIES)
def test_fake_tensors(family: str, backend: str) -> None:
    """Shape, dtype, strides and device without numbers, forward and backward."""
    if backend == "reference" and family.startswith("gaussian"):
        pytest.skip("torch's gaussian_nll_loss looks at the numbers of var")
    case = FAMILIES[family][-3]
    sample = case.sample(narrow(family))
    for reduction in ("none", "mean"):
        input = leaf(sample.input)
        value = getattr(FL, case.loss)(input, sample.target, reduction=reduction, **sample.options)
        (grad,) = torch.autograd.grad(value.sum(), input)
        with FakeTensorMode() as mode:
            fakes = {
                key: mode.from_tensor(v) if isinstance(v, Tensor) else v
                for key, v in sample.options.items()
            }
            fake_input = mode.from_tensor(sample.input).requires_grad_()
            fake = getattr(FL, case.loss)(
                fake_input, mode.from_tensor(sample.target), reduction=reduction, **fakes
            )
            (fake_grad,) = torch.autograd.grad(fake.sum(), fake_input)
        for real, unreal in ((value, fake), (grad, fake_grad)):
            assert unreal.shape == real.shape and unreal.dtype == real.dtype
            assert unreal.stride() == real.stride() and unreal.device == real.device


@pytest.mark.slow
@pytest.mark.parametrize("loss", BASIC)
def test_torch_compile(loss: str, backend: str) -> None:
    """Inside torch.compile (without code generation): same value and gradient."""
    torch._dynamo.reset()
    case = at_shape(loss, (6, 35))
    sample = case.sample(torch.float32)

    def step(input: Tensor) -> Tensor:
        return getattr(FL, loss)(input * 2, sample.target) * 3

    results = []
    sample.input.div_(2)
    for function in (step, torch.compile(step, backend="aot_eager")):
        input = leaf(sample.input)
        value = function(input)
        value.backward()
        results.append((value.detach(), input.grad))
    torch.testing.assert_close(*results)


# ---- what overrides torch functions --------------------------------------------------------------


class StrictMode(TorchFunctionMode):
    """Knows torch's functions from before anything was patched, and accepts no others."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        assert func in KNOWN, f"{func} reached the mode"
        return func(*args, **(kwargs or {}))


class Handled(Tensor):
    """A subclass with handlers for torch's functions, as torch's documentation advises."""

    handlers: ClassVar[dict[Any, Callable[..., Any]]] = {}

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.handlers[func](*args, **(kwargs or {}))


THEIRS = {loss: getattr(torch.nn.functional, loss) for loss in TORCH_LOSSES}
KNOWN = {*THEIRS.values(), FL.log_loss}


def patched(on: bool) -> Any:
    return fusedloss.patch() if on else contextlib.nullcontext()


@pytest.mark.parametrize("patch", [False, True], ids=["by name", "patched"])
@pytest.mark.parametrize("family", WRAPPED)
def test_a_mode_sees_one_call_of_torchs_function(family: str, patch: bool, backend: str) -> None:
    """And it is not asked about attributes; if it lets the call pass, the call is fused."""
    case = at_shape(family, SHAPE)
    sample = case.sample(torch.float32)
    function = getattr(FL, case.loss)
    with patched(patch):
        name = torch.nn.functional if patch and case.loss != "log_loss" else FL
        with StrictMode() as mode:
            value = getattr(name, case.loss)(sample.input, sample.target, **sample.options)
            told = fusedloss.explain(function, sample.input, sample.target, **sample.options)
    assert mode.seen == [THEIRS.get(case.loss, FL.log_loss)] * 2
    assert told.backend == backend
    torch.testing.assert_close(value, function(sample.input, sample.target, **sample.options))


@pytest.mark.parametrize("patch", [False, True], ids=["by name", "patched"])
@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_a_subclass_is_asked_for_torchs_function(loss: str, patch: bool, backend: str) -> None:
    """A handler that was registered beforehand is found, with the arguments as torch passes
    them."""
    sample = at_shape(loss, SHAPE).sample(torch.float32)
    seen: list[Any] = []

    def handler(input: Tensor, target: Tensor, *, reduction: str, **options: Any) -> str:
        seen.append((input, target, reduction))
        return "handled"

    input, module = sample.input.as_subclass(Handled), MODULES[loss](reduction="sum")
    Handled.handlers = {THEIRS[loss]: handler}
    with patched(patch):
        calls = [getattr(FL, loss), getattr(torch.nn.functional, loss), module]
        for call in calls:
            options = {} if call is module else {"reduction": "sum"}
            assert call(input, sample.target, **options) == "handled"
        told = fusedloss.explain(FL.__dict__[loss], input, sample.target)
    assert len(seen) == len(calls)
    for given in seen:
        assert given[0] is input and given[1] is sample.target and given[2] == "sum"
    assert told.reasons == ("a tensor subclass is involved",)


@pytest.mark.parametrize("options", [{"beta": -1.0}, {"size_average": False}], ids=str)
def test_a_subclass_is_asked_whatever_the_options(options: dict[str, Any], backend: str) -> None:
    x = torch.rand(3)
    Handled.handlers = {THEIRS["smooth_l1_loss"]: lambda *args, **options: "handled"}
    with fusedloss.patch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.nn.functional.smooth_l1_loss(x.as_subclass(Handled), x, **options)
    assert value == "handled"


class MaskedTensor(Tensor):
    """As in torch's tutorials: dropped elements do not count."""

    mask: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not THEIRS["mse_loss"]:
            return super().__torch_function__(func, types, args, kwargs or {})
        kept = args[0].mask
        return func(args[0].as_subclass(Tensor)[kept], args[1][kept], **(kwargs or {}))


def test_a_mask_is_kept_under_a_patch(backend: str) -> None:
    masked = torch.tensor([1.0, 2.0, 100.0]).as_subclass(MaskedTensor)
    masked.mask = torch.tensor([True, True, False])
    with fusedloss.patch():
        assert torch.nn.functional.mse_loss(masked, torch.zeros(3)) == 2.5
        assert torch.nn.MSELoss()(masked, torch.zeros(3)) == 2.5


def test_a_mode_above_and_a_subclass_below(backend: str) -> None:
    x, y = torch.rand(3).as_subclass(Counting), torch.rand(3)
    Counting.seen.clear()
    with fusedloss.patch(), torch.device("cpu"), StrictMode() as mode:
        value = torch.nn.functional.l1_loss(x, y)
    assert type(value) is Counting
    assert mode.seen == [THEIRS["l1_loss"]] and Counting.seen[0] == "l1_loss"


class Answering(TorchFunctionMode):
    """Computes losses itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "answered"


def test_a_mode_that_computes_the_loss_itself(backend: str) -> None:
    x = torch.rand(3)
    with fusedloss.patch() as patch, Answering():
        assert FL.mse_loss(x, x) == "answered"
        told = fusedloss.explain(FL.mse_loss, x, x)
    assert not told.fused and "TorchFunctionMode" in str(told)
    (call,) = patch.calls
    assert (call.calls, call.path) == (1, told)


def test_modes_stay_as_they_were(backend: str) -> None:
    """In their order, after a call and after an error."""

    def active() -> list[Any]:
        count = torch._C._len_torch_function_stack()
        return [torch._C._get_function_stack_at(i) for i in range(count)]

    x = torch.rand(3)
    with CountingMode(), torch.device("cpu"), CountingMode():
        before = active()
        FL.mse_loss(x, x)
        assert active() == before
        with pytest.raises(RuntimeError):
            FL.mse_loss(x, torch.rand(4))
        assert active() == before


def test_own_losses_and_modules_under_a_strict_mode(backend: str) -> None:
    """Each sees one call: of the loss itself, or of torch's function."""
    x = torch.rand(5, 7)
    own = fusedloss.pointwise_loss(squared)
    KNOWN.add(own)
    with StrictMode() as mode:
        own(x, x)
        fusedloss.MSELoss()(x, x)
        own.module()(x, x)
    KNOWN.remove(own)
    assert mode.seen == [own, THEIRS["mse_loss"], own]


def squared(input: Any, target: Any) -> Any:
    return (input - target) ** 2


@pytest.mark.parametrize("loss", BASIC)
def test_the_short_way_is_open_under_a_default_device(
    loss: str, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = at_shape(loss, SHAPE).sample(torch.float32)
    monkeypatch.setattr(_dispatch, "_why_not_fused", lambda *_, **__: pytest.fail("the long way"))
    with torch.device("cpu"):
        getattr(FL, loss)(sample.input, sample.target)
