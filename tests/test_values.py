"""Value and gradient of every case against float64, and never worse than torch's."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence

import pytest
import torch

import formulas
import fusedloss
import fusedloss.functional as FL
from cases import BASIC, DTYPES, FAMILIES, REDUCTIONS, Case, Sample, at_shape, dtypes
from fusedloss import reference
from helpers import (
    INTERPRETED,
    NAMESPACE,
    assert_close_to_truth,
    assert_no_worse,
    assert_same_bits,
    draw_upstream,
    drawn,
    host_sees_errors,
    leaf,
    result_shape,
    sample_truth,
    torch_loss,
    value_and_grad,
)


def small(family: str) -> list[Case]:
    """Every third case of a family, without large ones."""
    return [case for case in FAMILIES[family][1::3] if math.prod(case.shape) < 10_000]


def in_turn(family: str, dtype: str, reduction: str) -> Sequence[Case]:
    """The family's shapes that run in Triton's interpreter with this dtype and reduction; all
    dtypes and reductions together cover all shapes."""
    turns = list(itertools.product(REDUCTIONS, DTYPES))
    shapes = FAMILIES[family]
    every = min(len(turns), len(shapes))
    return shapes[turns.index((reduction, dtype)) % every :: every]


# The reduction varies fastest: a sample's truth serves all three.
@pytest.mark.interpret_all
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradient(family: str, dtype: str, reduction: str, fused: str) -> None:
    """Against float64, element by element and in norm, and no worse than torch."""
    for case in in_turn(family, dtype, reduction) if INTERPRETED else FAMILIES[family]:
        sample, elements = drawn(case, DTYPES[dtype])
        upstream = draw_upstream(result_shape(case.loss, sample, reduction), DTYPES[dtype])
        value, grad = value_and_grad(getattr(FL, case.loss), sample, reduction, upstream)
        expected = formulas.reduce(elements, reduction, upstream)
        assert value.dtype == grad.dtype == DTYPES[dtype]
        what = f"{case.name} {reduction} {dtype}"
        assert_close_to_truth(value, expected.value, expected.value_scale, f"{what} value")
        assert_close_to_truth(grad, expected.grad, expected.grad_scale, f"{what} gradient")
        # In fp64 the truth is no better than the results, so there is nothing to compare.
        if dtype != "fp64":
            eager = value_and_grad(torch_loss(case.loss), sample, reduction, upstream)
            assert_no_worse(value, eager[0], expected.value, f"{what} value")
            assert_no_worse(grad, eager[1], expected.grad, f"{what} gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_torch(family: str, dtype: str) -> None:
    """The same bits as torch's own function, so its error is torch's."""
    for case, reduction in itertools.product(small(family), REDUCTIONS):
        sample, elements = drawn(case, DTYPES[dtype])
        upstream = draw_upstream(result_shape(case.loss, sample, reduction), DTYPES[dtype])
        theirs = value_and_grad(torch_loss(case.loss), sample, reduction, upstream)
        plain = value_and_grad(getattr(reference, case.loss), sample, reduction, upstream)
        with fusedloss.backend("reference"):
            ours = value_and_grad(getattr(FL, case.loss), sample, reduction, upstream)
        what = f"{case.name} {reduction}"
        assert_same_bits(ours[0], plain[0], f"{what} value")
        assert_same_bits(ours[1], plain[1], f"{what} gradient")
        if case.loss != "log_loss":  # torch has no function of that name
            assert_same_bits(plain[0], theirs[0], f"{what} value")
            assert_same_bits(plain[1], theirs[1], f"{what} gradient")
        elif dtype == "fp64":
            expected = formulas.reduce(elements, reduction, upstream)
            assert_close_to_truth(plain[0], expected.value, expected.value_scale, f"{what} value")
            assert_close_to_truth(plain[1], expected.grad, expected.grad_scale, f"{what} gradient")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_result_is_described_as_torch_does(
    family: str, dtype: str, reduction: str, backend: str
) -> None:
    """Same dtype, shape, strides, device, requires_grad and leafness."""
    for case in small(family):
        sample, _ = drawn(case, DTYPES[dtype])
        for wanted in (True, False):
            input = sample.input.clone().requires_grad_(wanted)
            ours, theirs = (
                function(input, sample.target, reduction=reduction, **sample.options)
                for function in (getattr(FL, case.loss), torch_loss(case.loss))
            )
            for attribute in ("dtype", "shape", "device", "requires_grad", "is_leaf", "layout"):
                assert getattr(ours, attribute) == getattr(theirs, attribute), (
                    f"{case.name}: {attribute}"
                )
            assert ours.stride() == theirs.stride(), case.name
            if wanted:
                grads = [
                    torch.autograd.grad(value, input, torch.ones_like(value))[0]
                    for value in (ours, theirs)
                ]
                assert grads[0].shape == input.shape and grads[0].dtype == input.dtype
                assert grads[0].stride() == grads[1].stride(), case.name


@pytest.mark.parametrize("loss", BASIC)
def test_no_gradient_wanted(loss: str, backend: str) -> None:
    """no_grad, inference_mode and plain inputs give the same value, and no graph."""
    sample = at_shape(loss, (6, 35)).sample(torch.float32)
    function = getattr(FL, loss)
    with_graph = function(leaf(sample.input), sample.target)
    plain = function(sample.input, sample.target)
    with torch.no_grad():
        without = function(leaf(sample.input), sample.target)
    with torch.inference_mode():
        inference = function(leaf(sample.input), sample.target)
    assert with_graph.requires_grad
    for value in (plain, without, inference):
        assert not value.requires_grad and value.grad_fn is None
        assert torch.equal(value, with_graph.detach())
    assert inference.is_inference()


@pytest.mark.parametrize("loss", BASIC)
def test_inference_tensors(loss: str, backend: str) -> None:
    """Inputs made under inference_mode may be used outside of it, without gradient."""
    with torch.inference_mode():
        sample = at_shape(loss, (6, 35)).sample(torch.float64)
    expected = sample_truth(loss, sample, "mean")
    value = getattr(FL, loss)(sample.input, sample.target)
    assert_close_to_truth(value, expected.value, expected.value_scale, loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_takes_the_fused_path(family: str, fused: str) -> None:
    """The other tests of this file really run on the backend that they name."""
    case = FAMILIES[family][-1]
    for dtype in dtypes(family).values():
        sample = case.sample(dtype)
        function = getattr(FL, case.loss)
        input = leaf(sample.input)
        told = fusedloss.explain(function, input, sample.target, **sample.options)
        assert told.backend == fused and told.fused, f"{case.name} {dtype}: {told}"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            function(input, sample.target, **sample.options).backward()
        names = {event.key for event in profile.key_averages()}
        assert any(name.startswith(f"{NAMESPACE}::") for name in names), f"{case.name}: {names}"


def test_the_tolerance_catches_zeros_for_the_other_classes() -> None:
    """A gradient that is 0 for every class but the target's must not pass."""
    sample = at_shape("cross_entropy", (4, 1000)).sample(torch.float32)
    expected = sample_truth("cross_entropy", sample, "mean")
    wrong = expected.grad.where(torch.nn.functional.one_hot(sample.target, 1000).bool(), 0.0)
    with pytest.raises(AssertionError):
        assert_close_to_truth(wrong.float(), expected.grad, expected.grad_scale, "planted")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1 + 2**-6, -1.0, 0.0])
def test_the_tolerance_catches_a_wrong_factor(factor: float, dtype: str) -> None:
    """A gradient that is off by a factor which the dtype can tell from 1 must not pass."""
    for loss in BASIC:
        sample = at_shape(loss, (4, 100)).sample(DTYPES[dtype])
        expected = sample_truth(loss, sample, "mean", 0.7)
        right = expected.grad.to(DTYPES[dtype])
        assert_close_to_truth(right, expected.grad, expected.grad_scale, f"{loss}, rounded")
        with pytest.raises(AssertionError):
            wrong = (expected.grad * factor).to(DTYPES[dtype])
            assert_close_to_truth(wrong, expected.grad, expected.grad_scale, "planted")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", [loss for loss in BASIC if loss != "cross_entropy"])
def test_one_factor_of_all_elements(loss: str, dtype: str, fused: str) -> None:
    """A sum after reduction "none", whose upstream gradient is one number, and a weight of one
    number: a GPU's kernels scale by these, and give the bits of reduction "sum"."""
    function = getattr(FL, loss)
    plain = at_shape(loss, (7, 3001)).sample(DTYPES[dtype])
    for turn in (False, loss != "log_loss"):
        tensors = (t.t().contiguous().t() if turn else t for t in (plain.input, plain.target))
        sample = Sample(*tensors, {})
        expected = value_and_grad(function, sample, "sum")
        input = leaf(sample.input)
        (grad,) = torch.autograd.grad(function(input, sample.target, reduction="none").sum(), input)
        assert_same_bits(grad, expected[1], "summed")
        if f"{loss}-weight" not in FAMILIES or loss == "log_loss":
            continue
        half = torch.tensor(0.5, dtype=DTYPES[dtype]).expand(input.shape)
        weighted = Sample(sample.input, sample.target, {"weight": half})
        for found, whole in zip(value_and_grad(function, weighted, "sum"), expected, strict=True):
            assert_same_bits(found, whole / 2, "weight")


# The inputs that have a gradient, as a call's arguments.
OF_SEVERAL: dict[str, tuple[str, ...]] = {
    "mse_loss": ("input", "target"),
    "huber_loss": ("input", "target"),
    "margin_ranking_loss": ("input1", "input2"),
    "gaussian_nll_loss": ("input", "target", "var"),
    "cosine_embedding_loss": ("input1", "input2"),
    "triplet_margin_loss": ("anchor", "positive", "negative"),
    "triplet_margin_loss-swap-margin2-eps0.1": ("anchor", "positive", "negative"),
}


@pytest.mark.interpret_all
@pytest.mark.parametrize("family", OF_SEVERAL)
def test_gradients_of_several_inputs(family: str, fused: str) -> None:
    """Of every choice of them, as torch's, whether forward has written them or backward does."""
    case = at_shape(family, (9, 13))
    loss, sample = case.loss, case.sample(torch.float64)
    names = list(inspect.signature(getattr(FL, loss)).parameters)[:2]
    call = dict(zip(names, (sample.input, sample.target), strict=True)) | sample.options
    for count in range(1, len(OF_SEVERAL[family]) + 1):
        for wanted in itertools.combinations(OF_SEVERAL[family], count):
            for reduction, upstream in itertools.product(REDUCTIONS, (1.0, 0.3)):
                results = []
                for function in (getattr(FL, loss), torch_loss(loss)):
                    leaves = {name: leaf(call[name]) for name in wanted}
                    value = function(**{**call, **leaves}, reduction=reduction)
                    seed = torch.full_like(value, upstream)
                    results.append(torch.autograd.grad(value, list(leaves.values()), seed))
                told = fusedloss.explain(getattr(FL, loss), **{**call, **leaves})
                assert told.backend == fused
                for mine, theirs in zip(*results, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@host_sees_errors
def test_negative_variance(fused: str) -> None:
    x, var = torch.zeros(2, 3), torch.ones(2, 3)
    var[1, 2] = -0.5
    for variances in (var, var.double().t().contiguous().t().float(), var[:, 2:]):
        with pytest.raises(
            ValueError, match=r"var should be at least 0, but var\[1, [02]\] is -0.5"
        ):
            FL.gaussian_nll_loss(x, x, variances)
    var[1, 2] = float("nan")
    assert FL.gaussian_nll_loss(x, x, var).isnan()
