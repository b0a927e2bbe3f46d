"""Multi-class log loss against scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss.functional as FL
from cases import at_shape
from helpers import assert_same_bits, leaf

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", [(3, 2), (64, 10), (1001, 37)], ids=str)
def test_class_indices(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    sample = at_shape("log_loss", shape).sample(dtype)
    # scikit-learn wants rows that sum to 1 in their own dtype.
    input = sample.input / sample.input.sum(1, keepdim=True)
    for normalize, reduction in ((True, "mean"), (False, "sum")):
        expected = sklearn_metrics.log_loss(
            sample.target.cpu().numpy(),
            input.cpu().numpy(),
            labels=range(shape[1]),
            normalize=normalize,
        )
        value = FL.log_loss(input, sample.target, reduction=reduction)
        assert value.item() == pytest.approx(expected, rel=1e-12 if dtype.itemsize == 8 else 1e-6)


def test_certain_and_wrong(backend: str) -> None:
    """A probability of exactly 0 is bounded by eps of the dtype, as in scikit-learn."""
    for dtype in (torch.float64, torch.float32):
        input = torch.tensor([[1, 0, 0], [0, 1, 0], [0.25, 0.25, 0.5]], dtype=dtype)
        target = torch.tensor([1, 1, 2])
        expected = sklearn_metrics.log_loss(
            target.cpu().numpy(), input.cpu().numpy(), labels=range(3)
        )
        assert FL.log_loss(input, target).item() == pytest.approx(expected, rel=1e-6)


def test_certain_and_right(backend: str) -> None:
    """A probability of exactly 1 costs nothing; scikit-learn clamps it to 1 - eps. Below that both
    agree."""
    for dtype in (torch.float64, torch.float32):
        eps = torch.finfo(dtype).eps
        for p, ours, theirs in ((1, 0, eps), (1 - eps, eps, eps)):
            input = torch.tensor([[p, 1 - p]], dtype=dtype)
            value = FL.log_loss(input, torch.tensor([0]))
            assert value.item() == pytest.approx(ours, rel=1e-6)
            expected = sklearn_metrics.log_loss([0], input.cpu().numpy(), labels=[0, 1])
            assert expected == pytest.approx(theirs, rel=1e-6)


def test_one_hot_probabilities_are_class_indices(backend: str) -> None:
    sample = at_shape("log_loss", (64, 10)).sample(torch.float64)
    one_hot = torch.nn.functional.one_hot(sample.target, 10).double()
    torch.testing.assert_close(
        FL.log_loss(sample.input, one_hot), FL.log_loss(sample.input, sample.target)
    )


def test_sample_weights_as_class_weights(backend: str) -> None:
    """A weight for each class is scikit-learn's sample_weight looked up by class."""
    sample = at_shape("log_loss-weight", (64, 10)).sample(torch.float64)
    weight = sample.options["weight"]
    expected = sklearn_metrics.log_loss(
        sample.target.cpu().numpy(),
        sample.input.cpu().numpy(),
        labels=range(10),
        sample_weight=weight[sample.target].cpu().numpy(),
    )
    assert FL.log_loss(sample.input, sample.target, weight).item() == pytest.approx(expected)


def test_it_is_cross_entropy_of_a_softmax(backend: str) -> None:
    sample = at_shape("cross_entropy", (64, 10)).sample(torch.float64)
    torch.testing.assert_close(
        FL.log_loss(sample.input.softmax(1), sample.target),
        FL.cross_entropy(sample.input, sample.target),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_targets_of_zero_by_themselves(dtype: torch.dtype, backend: str) -> None:
    """Kernels skip runs of targets that are all 0, with the same bits as beside another target; nan
    stays."""
    special = [float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 0.0, 1e-30, 0.5, 1.0, 2.0]
    input = torch.tensor(special * 64, dtype=dtype).view(-1, 64).requires_grad_()
    gradients = []
    for last in (0.0, 1.0):  # as the last element of every eight
        target = torch.zeros_like(input, requires_grad=False)
        target[:, 7::8] = last
        value = FL.log_loss(input, target, reduction="sum")
        assert value.isnan()
        gradients.append(torch.autograd.grad(value, input)[0].unflatten(1, (8, 8))[..., :7])
    alone, beside = gradients
    inner = input.detach().unflatten(1, (8, 8))[..., :7]
    assert (alone[inner.isinf()] == 0).all()
    assert alone.isnan().any()
    assert torch.equal(alone.isnan(), beside.isnan())
    assert_same_bits(alone.nan_to_num(3.0), beside.nan_to_num(3.0), "gradient")


NAN, INF = float("nan"), float("inf")


def with_gradient(
    function: Callable[..., Tensor], input: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    input = leaf(input)
    value = function(input, *args, **options)
    return value.detach(), torch.autograd.grad(value, input, torch.full_like(value, 3.0))[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layout", ["(N, C)", "(N, C, d)", "strided"])
def test_ignored_rows_have_no_gradient(layout: str, reduction: str, backend: str) -> None:
    """A mean over ignored rows only has none either: its value is nan, as for cross_entropy."""
    input = torch.rand(6, 16, 4)[..., 0] if layout == "(N, C)" else torch.rand(6, 16, 4)
    if layout == "strided":
        input = torch.rand(6, 4, 32)[..., ::2].transpose(1, 2)
    rows = torch.randint(16, (6, *input.shape[2:]))
    for ignored in (slice(2, 4), slice(None)):
        target = rows.clone()
        target[ignored] = -100
        value, gradient = with_gradient(FL.log_loss, input, target, reduction=reduction)
        assert (gradient[ignored] == 0).all()
        if ignored == slice(None) and reduction == "mean":
            assert value.isnan()
        else:
            assert gradient.isfinite().all() and value.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_absent_classes_do_not_count(reduction: str, backend: str) -> None:
    """As in torch, the loss depends on the target's class only."""
    input, target = torch.rand(6, 16), torch.tensor([0, 3, 5, 5, -100, 0])
    weight = torch.rand(16)
    expected = with_gradient(FL.log_loss, input, target, weight, reduction=reduction)
    for absent in (INF, NAN, -INF):
        weight[[1, 15]] = absent
        value, gradient = with_gradient(FL.log_loss, input, target, weight, reduction=reduction)
        assert_same_bits(value, expected[0], f"value, weight {absent}")
        assert_same_bits(gradient, expected[1], f"gradient, weight {absent}")


def test_nan_in_another_class(backend: str) -> None:
    """The loss depends on the target's class only; the gradient there is nan, as in torch."""
    input, target = torch.rand(6, 16), torch.tensor([0, 3, 5, 5, -100, 0])
    input[1, 7] = input[4, 2] = NAN
    value, gradient = with_gradient(FL.log_loss, input, target)
    assert value.isfinite()
    assert gradient.isnan().nonzero().tolist() == [[1, 7], [4, 2]]


@pytest.mark.parametrize("indices", [True, False], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(dtype: torch.dtype, indices: bool, backend: str) -> None:
    """float32 on every path, like cross_entropy; float64 stays."""
    input = torch.rand(6, 16).to(dtype)
    target = torch.randint(16, (6,)) if indices else torch.rand(6, 16).to(dtype)
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    for weight in (None, torch.rand(16).to(dtype)):
        for reduction in ("mean", "sum", "none"):
            plain = FL.log_loss(input.float(), target if indices else target.float(),
                                None if weight is None else weight.float(), reduction)  # fmt: skip
            with torch.autocast(input.device.type, torch.bfloat16):
                value = FL.log_loss(input, target, weight, reduction)
            assert value.dtype is expected
            if dtype is torch.float32:
                torch.testing.assert_close(value, plain)
