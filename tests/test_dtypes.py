"""Operands of several dtypes in one call: torch's promotion, without a converted copy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedloss
import fusedloss.functional as FL
import fusedloss.math as fm
from cases import LOSSES, at_shape
from helpers import affordable, assert_near, compare_with_torch, leaf, torch_loss

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
INTEGERS = (*SIGNED, torch.uint8)
ALL = (*FLOATS, *INTEGERS, torch.bool)
SHAPE = (6, 7)

# What a target may be beside a float32 input, so that a kernel takes it.
TARGETS: dict[str, tuple[torch.dtype, ...]] = {
    "mse_loss": ALL,
    "l1_loss": (*FLOATS, *INTEGERS),
    "smooth_l1_loss": (*FLOATS, *INTEGERS),
    "huber_loss": (),  # torch has no gradient
    "binary_cross_entropy": (),  # torch raises
    "binary_cross_entropy_with_logits": FLOATS,
    "soft_margin_loss": (*FLOATS, *SIGNED),
    "multilabel_soft_margin_loss": (*FLOATS, *SIGNED),
    "hinge_embedding_loss": (*FLOATS, *SIGNED),
    "margin_ranking_loss": (*FLOATS, *SIGNED),
    "kl_div": FLOATS,
    "poisson_nll_loss": (*FLOATS, *INTEGERS),
    "gaussian_nll_loss": (*FLOATS, *INTEGERS),
    "cross_entropy-probabilities": FLOATS,
    "cosine_embedding_loss": (*FLOATS, *SIGNED),
    "triplet_margin_loss": FLOATS,
}
ONE_DTYPE = {"log_loss", "multi_margin_loss"}  # or class indices
assert {family.partition("-")[0] for family in TARGETS} == set(LOSSES) - ONE_DTYPE
# Those whose result has input's dtype take no float64 target: the kernels would round it first.
NARROW = ("soft_margin_loss", "hinge_embedding_loss")


def drawn(family: str, input: torch.dtype, target: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """A call's input, target and options; the target of an integer dtype has integers."""
    sample = at_shape(family, SHAPE).sample(torch.float64)
    x, y, options = sample.input, sample.target, dict(sample.options)
    if family in (
        "margin_ranking_loss",
        "cosine_embedding_loss",
    ):  # the second input stands between
        options["target"] = to(options["target"], target)
        return x.to(input), y.to(input), options
    for name in {"var", "negative"} & options.keys():
        options[name] = options[name].to(input)
    return x.to(input), to(y, target), options


def to(t: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return t.to(dtype)
    return (t.round() if dtype.is_signed else t.round().abs()).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("family", TARGETS)
def test_target_of_another_dtype(family: str, dtype: torch.dtype, backend: str) -> None:
    """torch's value, gradients, dtypes and errors."""
    loss = family.partition("-")[0]
    for target, reduction in affordable(list(itertools.product(ALL, ("mean", "none"))), 7):
        if family == "kl_div" and reduction == "mean":
            reduction = "batchmean"
        x, y, options = drawn(family, dtype, target)
        wants = target.is_floating_point and loss in ("mse_loss", "l1_loss", "smooth_l1_loss")
        compare_with_torch(loss, x, y, target_wants=wants, reduction=reduction, **options)


@pytest.mark.parametrize("family", TARGETS)
def test_which_targets_are_fused(family: str, fused: str) -> None:
    function = getattr(FL, family.partition("-")[0])
    expected = {*TARGETS[family], torch.float32}
    if family.startswith(("cross", *NARROW)):
        expected.discard(torch.float64)
    found = set()
    for target in ALL:
        x, y, options = drawn(family, torch.float32, target)
        if fusedloss.explain(function, leaf(x), y, reduction="sum", **options).fused:
            found.add(target)
    if family == "binary_cross_entropy_with_logits":
        expected = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    assert found == expected


@pytest.mark.parametrize("wide", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "smooth_l1_loss"])
def test_both_gradients_have_the_digits_of_their_dtypes(
    loss: str, wide: torch.dtype, fused: str
) -> None:
    narrow = torch.float32 if wide is torch.float64 else torch.bfloat16
    function = getattr(FL, loss)
    for first, second in ((narrow, wide), (wide, narrow)):
        x, y, _ = drawn(loss, first, second)
        x, y = leaf(x), leaf(y)
        told = fusedloss.explain(function, x, y)
        assert told.fused, told
        value = function(x, y)
        assert value.dtype is wide
        truth = torch_loss(loss)(leaf(x.detach().double()), y.detach().double())
        both = torch.autograd.grad(value, (x, y))
        a, b = leaf(x.detach().double()), leaf(y.detach().double())
        expected = torch.autograd.grad(torch_loss(loss)(a, b), (a, b))
        assert_near(value.detach(), truth.detach(), "value")
        for mine, theirs, t in zip(both, expected, (x, y), strict=True):
            assert mine.dtype is t.dtype
            assert_near(mine, theirs, f"gradient of {t.dtype}")


@pytest.mark.parametrize("family", ["mse_loss", "cross_entropy-probabilities", "poisson_nll_loss"])
@pytest.mark.parametrize("target", [torch.float32, torch.int8], ids=str)
def test_no_worse_than_one_rounding(family: str, target: torch.dtype, fused: str) -> None:
    """A two-byte prediction beside a float32 or an integer target, against float64."""
    loss = family.partition("-")[0]
    if target not in TARGETS[family]:
        return
    x, y, options = drawn(family, torch.bfloat16, target)
    x = leaf(x)
    value = getattr(FL, loss)(x, y, **options)
    (grad,) = torch.autograd.grad(value, x)
    exact = leaf(x.detach().double())
    truth = torch_loss(loss)(exact, y.double(), **options)
    assert_near(value.detach(), truth.detach(), "value")
    assert_near(grad, torch.autograd.grad(truth, exact)[0], "gradient")


WEIGHTED = [
    ("mse_loss", "weight"),
    ("l1_loss", "weight"),
    ("binary_cross_entropy", "weight"),
    ("binary_cross_entropy_with_logits", "weight"),
    ("binary_cross_entropy_with_logits", "pos_weight"),
    ("multilabel_soft_margin_loss", "weight"),
    ("huber_loss", "weight"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("loss", "name"), WEIGHTED)
def test_weight_of_another_dtype(loss: str, name: str, dtype: torch.dtype, backend: str) -> None:
    for weight, reduction in affordable(list(itertools.product(ALL, ("mean", "none"))), 4):
        x, y, options = drawn(loss, dtype, dtype)
        mask = torch.arange(x.numel()).view(SHAPE) % 3 if weight is not torch.bool else x > 0.5
        options = {name: mask.to(weight), "reduction": reduction}
        compare_with_torch(loss, x, y, **options)


@pytest.mark.parametrize(("loss", "name"), WEIGHTED)
def test_a_weight_is_read_as_it_is(loss: str, name: str, fused: str) -> None:
    """torch rounds a sum of weights, or a weight minus 1, to the weight's dtype."""
    x, y, _ = drawn(loss, torch.float32, torch.float32)
    weight = torch.linspace(0.25, 2, 42).view(SHAPE).bfloat16()
    x = leaf(x)
    value = getattr(FL, loss)(x, y, **{name: weight})
    exact = leaf(x.detach().double())
    truth = torch_loss(loss)(exact, y.double(), **{name: weight.double()})
    assert_near(value.detach(), truth.detach(), "value")
    assert_near(torch.autograd.grad(value, x)[0], torch.autograd.grad(truth, exact)[0], "gradient")


def test_a_mask_as_weight_is_fused(fused: str) -> None:
    x, y = leaf(torch.randn(SHAPE)), torch.randn(SHAPE)
    for mask in (y > 0, (y > 0).to(torch.uint8), (y > 0).long(), (y > 0).double()):
        for function in (FL.mse_loss, FL.l1_loss, FL.huber_loss):
            told = fusedloss.explain(function, x, y, weight=mask)
            assert told.fused, told


def test_a_weight_that_is_one_number_does_not_decide(backend: str) -> None:
    x, y, _ = drawn("multilabel_soft_margin_loss", torch.float32, torch.float32)
    weight = torch.tensor(0.5, dtype=torch.float64)
    compare_with_torch("multilabel_soft_margin_loss", x, y, weight=weight)


@fusedloss.pointwise_loss
def clipped(input: Any, target: Any) -> Any:
    return fm.where(fm.abs(input - target) < 1, (input - target) ** 2, target)


@pytest.mark.parametrize("target", ALL, ids=str)
def test_custom_loss(target: torch.dtype, fused: str) -> None:
    for dtype, weight in affordable(
        list(itertools.product(FLOATS, (None, torch.bool, *FLOATS))), 2
    ):
        x, y, _ = drawn("mse_loss", dtype, target)
        x = leaf(x)
        factor = None if weight is None else (x.detach() > 0).to(weight)
        mixed = {dtype, target} == {torch.bfloat16, torch.float16}
        told = fusedloss.explain(clipped, x, y, weight=factor)
        assert told.fused is not mixed, told
        results = []
        for function in (clipped, clipped.reference):
            value = function(x, y, weight=factor)
            results.append((value.detach(), *torch.autograd.grad(value, x)))
        for mine, theirs in zip(*results, strict=True):
            assert mine.dtype is theirs.dtype
            assert_near(mine, theirs.double(), f"{dtype} {weight}")


@pytest.mark.parametrize(
    "family", ["mse_loss", "binary_cross_entropy_with_logits", "poisson_nll_loss"]
)
def test_gradient_of_the_gradient(family: str, fused: str) -> None:
    for first, second in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x, y, _ = drawn(family, first, second)
        found = []
        for function, of in ((getattr(FL, family), first), (torch_loss(family), torch.float64)):
            input = leaf(x.to(of))
            value = function(input, y if of is first else y.double(), reduction="none")
            (grad,) = torch.autograd.grad(value.sum(), input, create_graph=True)
            assert grad.dtype is of
            found += torch.autograd.grad(grad.sum(), input)
        assert_near(*found, f"{family} of {first} and {second}")


@pytest.mark.parametrize(
    "target", [torch.float64, torch.bfloat16, torch.int64, torch.bool], ids=str
)
def test_nothing_is_copied(target: torch.dtype, compiled: str) -> None:
    """No operator converts an operand: the kernels read it as it is."""
    x, y, _ = drawn("mse_loss", torch.float32, target)
    x = leaf(x)
    FL.mse_loss(x, y).backward()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        FL.mse_loss(x, y).backward()
    names = {event.key for event in profiled.key_averages()}
    assert any("fusedloss" in name for name in names)
    assert not {"aten::_to_copy", "aten::to", "aten::copy_"} & names


def test_under_autocast(backend: str) -> None:
    x = torch.randn(SHAPE, dtype=torch.bfloat16)
    for target in (torch.float32, torch.float16, *SIGNED, torch.uint8):
        y = to(torch.randn(SHAPE).abs(), target)
        with torch.autocast("cpu", torch.bfloat16):
            compare_with_torch("mse_loss", x, y)


@pytest.mark.parametrize(
    "target", [torch.float64, torch.bfloat16, torch.int32, torch.bool], ids=str
)
def test_in_a_compiled_graph(target: torch.dtype, fused: str) -> None:
    x, y, _ = drawn("mse_loss", torch.float32, target)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor, y: Tensor) -> Tensor:
        return FL.mse_loss(x, y)

    results = []
    for function in (step, FL.mse_loss):
        input = leaf(x)
        value = function(input, y)
        results.append((value.detach(), *torch.autograd.grad(value, input)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_operators_refuse_other_dtypes(compiled: str) -> None:
    """An integer is a number to most losses, and a class index of int64 to those over rows."""
    x = torch.rand(SHAPE)
    op = torch.ops.fusedloss.loss

    def call(input: Tensor, target: Tensor, loss: str, *numbers: float) -> Tensor:
        return op(input, target, None, [], loss, numbers, 0, 1, torch.float32, None)

    y = torch.randint(7, SHAPE)
    torch.testing.assert_close(call(x, y, "mse_loss"), torch.nn.functional.mse_loss(x, y))
    for loss, number in (("cross_entropy", 0.0), ("log_loss", 1e-7)):
        with pytest.raises(TypeError, match="target's dtype Int is not supported"):
            call(x, y.int(), loss, number)
    with pytest.raises(TypeError, match="input's dtype Long is not supported"):
        call(y, x, "mse_loss")
    with pytest.raises(TypeError, match="ComplexFloat is not supported"):
        call(x, x.cfloat(), "mse_loss")
