"""Mistakes that other fused losses have shipped: each is a test, and its docstring names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import formulas
import fusedloss
import fusedloss.functional as FL
from cases import DEVICE, Sample, at_shape
from helpers import (
    INTERPRETED,
    assert_close_to_truth,
    assert_no_worse,
    assert_same_bits,
    host_sees_errors,
    leaf,
    poisoned_memory,
    same_bits,
    sample_truth,
    value_and_grad,
)

INF = float("inf")

pytestmark = pytest.mark.usefixtures("fused")


def logits(rows: int, classes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator, device="cpu").mul(3).to(DEVICE, dtype)


def labels(rows: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (rows,), generator=generator, device="cpu").to(DEVICE)


def truth(
    x: Tensor, y: Tensor, upstream: float | Tensor = 1.0, reduction: str = "mean", **options: Any
) -> formulas.Truth:
    return formulas.truth("cross_entropy", x, y, options, reduction, upstream)


@pytest.mark.parametrize("mode", ["training", "no_grad", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_overwritten(mode: str, dtype: torch.dtype) -> None:
    """The gradient was written into the caller's logits, and ignored rows zeroed, in any mode."""
    x, y = logits(9, 67, dtype), labels(9, 67)
    y[3] = -100
    before = x.clone()
    if mode == "training":
        input = leaf(x)
        value = FL.cross_entropy(input, y)
        assert same_bits(x, before)
        value.backward()
    else:
        with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
            FL.cross_entropy(x, y)
    assert same_bits(x, before)


def test_second_backward_with_another_upstream() -> None:
    """The gradient was scaled in place: a second backward scaled it twice."""
    x, y = logits(9, 67), labels(9, 67)
    input = leaf(x)
    value = FL.cross_entropy(input, y)
    for upstream in (4.0, 4.0, 0.5, 1.0):
        (grad,) = torch.autograd.grad(value, input, torch.tensor(upstream), retain_graph=True)
        expected = truth(x, y, upstream)
        assert_close_to_truth(grad, expected.grad, expected.grad_scale, f"upstream {upstream}")


def test_upstream_is_not_one() -> None:
    """The upstream gradient went unused, unseen by tests whose upstream was 1."""
    x, y = logits(9, 67), labels(9, 67)
    for upstream in (2.0, -0.37, 1e-3):
        input = leaf(x)
        (FL.cross_entropy(input, y) * upstream).backward()
        expected = truth(x, y, torch.tensor(upstream))
        assert input.grad is not None
        assert_close_to_truth(input.grad, expected.grad, expected.grad_scale, f"{upstream}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["mse_loss", "cross_entropy"])
def test_gradient_rounded_before_the_upstream_scale(loss: str, dtype: torch.dtype) -> None:
    """A low-precision gradient was rounded for upstream 1 and then scaled: two roundings."""
    sample = at_shape(loss, (33, 100)).sample(dtype)
    for upstream in (1.0, 1 / 3, 0.7, 3.3):
        rounded = torch.tensor(upstream, dtype=dtype)
        for _ in range(2):  # as predicted, and not as predicted
            _, grad = value_and_grad(getattr(FL, loss), sample, "mean", rounded)
            expected = sample_truth(loss, sample, "mean", rounded)
            once = torch.finfo(dtype).eps / 2 * expected.grad.abs()
            slack = 2e-6 * expected.grad_scale + torch.finfo(dtype).smallest_normal * 2**-10
            assert ((grad.double() - expected.grad).abs() <= once + slack).all()


def test_small_gradients_vanish_under_a_loss_scale() -> None:
    """fp16 gradients of a mean over many rows were rounded to 0 before the loss scale came."""
    rows = 128 if INTERPRETED else 2048
    x, y = logits(rows, 512, torch.float16), labels(rows, 512)
    module = fusedloss.CrossEntropyLoss()
    for _ in range(3):
        input = leaf(x)
        with torch.autocast(DEVICE, dtype=torch.float16):
            value = module(input, y)
        (grad,) = torch.autograd.grad(value, input, torch.tensor(65536.0))
        expected = truth(x, y, 65536.0)
        assert_close_to_truth(grad, expected.grad, expected.grad_scale, "scaled")


def test_create_graph_without_a_graph() -> None:
    """create_graph=True gave a gradient without a graph: a penalty on it had no effect."""
    x, y = logits(9, 67).double(), labels(9, 67)
    results = []
    for function in (FL.cross_entropy, F.cross_entropy):
        input = leaf(x)
        (grad,) = torch.autograd.grad(function(input, y), input, create_graph=True)
        assert grad.requires_grad
        grad.square().sum().backward()
        assert input.grad is not None and input.grad.abs().max() > 0
        results.append(input.grad)
    torch.testing.assert_close(*results)


def test_reduction_none_with_uneven_upstream() -> None:
    """reduction "none" took the first row's upstream gradient for all rows."""
    x, y = logits(9, 67), labels(9, 67)
    upstream = torch.linspace(-2, 3, 9)
    input = leaf(x)
    (grad,) = torch.autograd.grad(FL.cross_entropy(input, y, reduction="none"), input, upstream)
    expected = truth(x, y, upstream, "none")
    assert_close_to_truth(grad, expected.grad, expected.grad_scale, "uneven")


def test_expanded_upstream() -> None:
    """A stride-0 upstream gradient, as sum() gives, was read as if it were dense."""
    for loss in ("cross_entropy", "mse_loss"):
        sample = at_shape(loss, (9, 67)).sample(torch.float32)
        input = leaf(sample.input)
        getattr(FL, loss)(input, sample.target, reduction="none").sum().backward()
        expected = sample_truth(loss, sample, "sum")
        assert input.grad is not None
        assert_close_to_truth(input.grad, expected.grad, expected.grad_scale, loss)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_row_skips_its_store(reduction: str) -> None:
    """The kernel returned early from an ignored row: its loss and gradient were stale memory."""
    x, y = logits(9, 67), labels(9, 67)
    y[[0, 4, 8]] = -100
    with poisoned_memory():
        input = leaf(x)
        value = FL.cross_entropy(input, y, reduction=reduction)
        (grad,) = torch.autograd.grad(value.sum(), input)
    expected = truth(x, y, 1.0, reduction)
    assert_close_to_truth(value.detach(), expected.value, expected.value_scale, "value")
    assert_close_to_truth(grad, expected.grad, expected.grad_scale, "gradient")
    assert (grad[[0, 4, 8]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [3.0, 8.0, 12.0, 15.0, 16.5, 20.0, 30.0])
def test_true_class_gradient_of_confident_rows(margin: float, dtype: torch.dtype) -> None:
    """p - 1 of the true class was lost to cancellation where p is nearly 1."""
    x = torch.zeros(4, 65, dtype=dtype)
    y = torch.tensor([0, 7, 64, 33])
    x[torch.arange(4), y] = margin
    expected = truth(x, y)
    for reduction in ("mean", "none"):
        _, grad = value_and_grad(
            FL.cross_entropy,
            Sample(x, y, {}),
            reduction,
            1.0 if reduction == "mean" else 0.25,
        )
        true = grad.double()[torch.arange(4), y]
        right = expected.grad[torch.arange(4), y]
        # Relative to the result, however small: half a rounding and a few of the arithmetic's.
        eps = max(torch.finfo(dtype).eps, 32 * torch.finfo(torch.float32).eps)
        eps = eps if dtype != torch.float64 else 1e-13
        assert (true / right - 1).abs().max() <= eps, (true, right)
        # The gradients of a row sum to 0: what pushes one class pulls the others.
        if dtype == torch.float64:
            assert grad.sum(1).abs().max() <= 1e-12 * grad.abs().max()


@pytest.mark.parametrize("margin", [8.0, 15.0, 18.0, 30.0, 60.0])
def test_confident_binary_elements(margin: float) -> None:
    """sigmoid(x) - 1 was 0, or many ulps off, for confident positives."""
    for sign, target in ((1.0, 1.0), (-1.0, 0.0)):
        x = torch.full((37,), sign * margin)
        y = torch.full((37,), target)
        _, grad = value_and_grad(
            FL.binary_cross_entropy_with_logits,
            Sample(x, y, {}),
            "sum",
        )
        right = torch.sigmoid(torch.tensor(-margin).double()) * -sign
        assert (grad.double() / right - 1).abs().max() < 1e-6


@pytest.mark.parametrize("classes", [8, 65, 1000, 4099])
def test_leading_block_of_minus_infinity(classes: int) -> None:
    """Rows that begin with -inf gave nan: exp(-inf - -inf)."""
    x, y = logits(6, classes), torch.full((6,), classes - 1)
    for row, masked in enumerate((1, 4, classes // 2, classes - 2, classes - 1)):
        x[row, :masked] = -INF
    expected = truth(x, y)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        low = x.to(dtype)
        expected = truth(low, y)
        input = leaf(low)
        value = FL.cross_entropy(input, y)
        (grad,) = torch.autograd.grad(value, input)
        assert_close_to_truth(value.detach(), expected.value, expected.value_scale, "value")
        assert not grad.isnan().any()
        zero = low == -INF
        assert (grad[zero] == 0).all()
        scale = expected.grad_scale.nan_to_num(0, 0, 0)
        assert_close_to_truth(grad, expected.grad.nan_to_num(0), scale, "gradient")


@pytest.mark.parametrize("classes", [67, 4099])
def test_masked_logits_as_torch(classes: int) -> None:
    """-inf anywhere, +inf, whole rows of -inf: nan and infinity exactly where torch has them."""
    x, y = logits(10, classes), labels(10, classes)
    x[0, y[0]] = -INF
    x[1] = -INF
    x[2, 5] = INF
    x[3, y[3]] = INF
    x[4, ::2] = -INF
    x[5, :2] = INF
    x[6, classes // 4 : -classes // 4] = -INF
    x[7, -5] = INF
    x[8, -5] = float("nan")
    x[9, : classes // 2], y[9] = -INF, 1
    for smoothing in (0.0, 0.1):
        results = []
        for function in (FL.cross_entropy, F.cross_entropy):
            input = leaf(x)
            value = function(input, y, reduction="none", label_smoothing=smoothing)
            (grad,) = torch.autograd.grad(value.sum(), input)
            results.append((value.detach(), grad))
        torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 7, 9, 17, 33, 65, 127, 257, 1001])
def test_padded_lanes_add_mass(classes: int) -> None:
    """Lanes beyond the last class counted as exp(0): large negative logits showed it."""
    x = torch.full((3, classes), -80.0)
    y = torch.zeros(3, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        low = x.to(dtype)
        expected = truth(low, y)
        value = FL.cross_entropy(low, y)
        assert_close_to_truth(value, expected.value, expected.value_scale, f"{classes}")


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": True}])
def test_all_rows_ignored(options: dict[str, object]) -> None:
    """Every row ignored: a mean is nan and its gradient 0, as in torch; not 0, nor infinite."""
    x, y = logits(9, 67), torch.full((9,), -100)
    if "weight" in options:
        options = {"weight": torch.linspace(0.5, 2, 67)}
    for reduction in ("none", "mean", "sum"):
        results = []
        for function in (FL.cross_entropy, F.cross_entropy):
            input = leaf(x)
            value = function(input, y, reduction=reduction, **options)
            (grad,) = torch.autograd.grad(value, input, torch.ones_like(value))
            results.append((value.detach(), grad))
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
        assert (results[0][1] == 0).all() == (results[1][1] == 0).all()


def test_empty_batch() -> None:
    """No rows at all: torch's nan for a mean, 0 for a sum, and an empty gradient."""
    for loss, shape in (("cross_entropy", (0, 5)), ("mse_loss", (0,)), ("mse_loss", (0, 3))):
        sample = at_shape(loss, shape).sample(torch.float32)
        for reduction in ("none", "mean", "sum"):
            value, grad = value_and_grad(getattr(FL, loss), sample, reduction)
            right = getattr(F, loss)(sample.input, sample.target, reduction=reduction)
            torch.testing.assert_close(value, right, equal_nan=True)
            assert grad.shape == shape


def test_unaligned_labels() -> None:
    """int64 labels that start on no vector boundary were read from the boundary before."""
    x, y = logits(9, 67), labels(9, 67)
    for offset in range(1, 8):
        moved = torch.full((9 + offset,), 10**9)[offset:].copy_(y)
        torch.testing.assert_close(FL.cross_entropy(x, moved), F.cross_entropy(x, y))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [-100, -1, 0, 3, 66, 67, 10**6])
def test_ignore_index_with_weight_and_smoothing(ignored: int, smoothing: float) -> None:
    """An ignored row still counted in the smoothing term, or its weight in the divisor."""
    x, y = logits(33, 67), labels(33, 67)
    y[::4] = ignored
    weight = torch.linspace(0.25, 2, 67)
    for reduction in ("none", "mean", "sum"):
        for w in (None, weight):
            options = {"label_smoothing": smoothing, "ignore_index": ignored, "weight": w}
            upstream = torch.full((33,) if reduction == "none" else (), 0.7)
            input = leaf(x)
            value = FL.cross_entropy(input, y, reduction=reduction, **options)
            (grad,) = torch.autograd.grad(value, input, upstream)
            expected = truth(x, y, upstream, reduction, **options)
            assert_close_to_truth(value.detach(), expected.value, expected.value_scale, "value")
            assert_close_to_truth(grad, expected.grad, expected.grad_scale, "gradient")
            assert (grad[::4] == 0).all()


def test_ignored_label_is_not_looked_up() -> None:
    """A far ignore_index was used as an index into weights and logits before it was masked."""
    x, y = logits(9, 67), labels(9, 67)
    for ignored in (-(2**62), 2**62, -1, 67):
        y[4] = ignored
        value = FL.cross_entropy(x, y, torch.ones(67), ignore_index=ignored)
        kept = torch.arange(9) != 4
        torch.testing.assert_close(value, F.cross_entropy(x[kept], y[kept]))


def test_smoothing_with_masked_logits() -> None:
    """Smoothing over a logit of -inf: torch's infinite loss, not nan from 0 * inf."""
    x, y = logits(4, 67), labels(4, 67)
    x[:, 10] = -INF
    y[:] = 3
    for smoothing in (0.0, 0.1):
        ours = FL.cross_entropy(x, y, label_smoothing=smoothing, reduction="none")
        theirs = F.cross_entropy(x, y, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [65_505, pytest.param(70_001, marks=pytest.mark.slow)])
def test_half_mean_of_many_rows(rows: int, dtype: torch.dtype) -> None:
    """The number of rows was held in fp16, which ends at 65,504: nan or infinity."""
    x, y = logits(rows, 4, dtype), labels(rows, 4)
    y[7] = -100
    weight = torch.linspace(0.5, 2, 4).to(dtype)
    for options in ({}, {"weight": weight}):
        input = leaf(x)
        value = FL.cross_entropy(input, y, **options)
        (grad,) = torch.autograd.grad(value, input, torch.tensor(2.0**14, dtype=dtype))
        expected = truth(x, y, 2.0**14, **options)
        assert_close_to_truth(value.detach(), expected.value, expected.value_scale, "value")
        assert_close_to_truth(grad, expected.grad, expected.grad_scale, "gradient")
    sample = at_shape("mse_loss", (rows,)).sample(dtype)
    value, _ = value_and_grad(FL.mse_loss, sample, "mean")
    expected = sample_truth("mse_loss", sample, "mean")
    assert_close_to_truth(value, expected.value, expected.value_scale, "mse")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss"])
def test_long_sums_drift(loss: str) -> None:
    """A running fp32 sum stopped growing: 2^25 values near 1 lost digits."""
    n = 2**25
    x = torch.full((n,), 1.0000001)
    y = torch.zeros(n)
    x[::3] = 0.9999
    exact = {"mse_loss": x.double().square().mean(), "l1_loss": x.double().mean()}[loss]
    value = getattr(FL, loss)(x, y)
    # Each term is squared in fp32; adding them up must cost next to nothing.
    assert (value.double() / exact - 1).abs() <= 2 * torch.finfo(torch.float32).eps
    assert (getattr(FL, loss)(x, y, reduction="sum").double() / (exact * n) - 1).abs() <= (
        2 * torch.finfo(torch.float32).eps
    )


def test_long_rows_drift() -> None:
    """The sum of exponentials of a long row of equal logits lost digits."""
    for classes in (2**17, 2**20 + 1):
        x = torch.zeros(1, classes)
        y = torch.tensor([classes // 2])
        expected = truth(x, y)
        value, grad = value_and_grad(
            FL.cross_entropy,
            Sample(x, y, {}),
            "mean",
        )
        assert (value.double() - expected.value).abs() <= 2e-7 * expected.value
        assert (grad.double() / expected.grad - 1).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "family", ["mse_loss", "binary_cross_entropy", "cross_entropy", "log_loss"]
)
def test_double_computed_in_float(family: str) -> None:
    """fp64 inputs were cast to fp32 inside, unseen by loose tolerances."""
    case = at_shape(family, (9, 67))
    sample = case.sample(torch.float64)
    value, grad = value_and_grad(getattr(FL, case.loss), sample, "mean", 0.7)
    expected = sample_truth(case.loss, sample, "mean", 0.7)
    assert (value / expected.value - 1).abs() < 1e-14
    assert ((grad - expected.grad).abs() <= 1e-14 * expected.grad_scale).all()


def test_double_upstream_rounded_to_float() -> None:
    """An fp64 upstream gradient went through fp32 on its way into the kernel."""
    for loss in ("mse_loss", "cross_entropy"):
        sample = at_shape(loss, (9, 67)).sample(torch.float64)
        for upstream in (1 / 3, 1 + 2**-40, 1e-100, 1e100):
            _, grad = value_and_grad(getattr(FL, loss), sample, "sum", upstream)
            expected = sample_truth(loss, sample, "sum", upstream)
            assert_close_to_truth(grad, expected.grad, expected.grad_scale, f"{loss} {upstream}")


@pytest.mark.parametrize("classes", [2, 33, 1000])
def test_zero_for_every_other_class(classes: int) -> None:
    """Only the target's gradient was right, and a tolerance let zeros for the others pass."""
    x, y = logits(10, classes), labels(10, classes)
    input = leaf(x)
    FL.cross_entropy(input, y).backward()
    expected = truth(x, y)
    others = F.one_hot(y, classes) == 0
    assert input.grad is not None
    relative = (input.grad.double() / expected.grad - 1).abs()[others]
    assert relative.max() < 1e-5


def test_autocast_result_and_gradient_dtypes() -> None:
    """Under autocast the loss came out in bf16, or the gradient in fp32."""
    x, y = logits(9, 67, torch.bfloat16), labels(9, 67)
    input = leaf(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = FL.cross_entropy(input, y)
    assert value.dtype == torch.float32
    value.backward()
    assert input.grad is not None and input.grad.dtype == torch.bfloat16


@host_sees_errors
@pytest.mark.parametrize("place", ["first", "last", "in a later chunk"])
def test_label_out_of_range_is_not_checked(place: str) -> None:
    """A label past the last class was read out of bounds."""
    x, y = logits(70_001, 3), labels(70_001, 3)
    where = {"first": 0, "last": 70_000, "in a later chunk": 40_000}[place]
    y[where] = 3
    for wants in (True, False):
        with pytest.raises(IndexError, match=r"3.*") as raised:
            FL.cross_entropy(x.clone().requires_grad_(wants), y)
        assert "Target 3 is out of bounds" in str(raised.value)
        assert str(where) in str(raised.value), "the message names the place"


def test_low_precision_mean_is_not_one_percent_off() -> None:
    """Eager bf16 sums are off by a percent; a fused loss copied that."""
    sample = at_shape("mse_loss", (2**17 + 3,)).sample(torch.bfloat16)
    value, _ = value_and_grad(FL.mse_loss, sample, "mean")
    expected = sample_truth("mse_loss", sample, "mean")
    assert (value.double() / expected.value - 1).abs() <= 2**-8
    assert_no_worse(value, F.mse_loss(sample.input, sample.target), expected.value, "mean")


def test_huge_logits() -> None:
    """Logits beyond what exp holds gave infinity where the maximum was not subtracted."""
    for size in (100.0, 1e4, 1e30, 3e38):
        x = torch.tensor([[size, -size, 0.0] * 11, [-size] * 33])
        y = torch.tensor([1, 5])
        results = []
        for function in (FL.cross_entropy, F.cross_entropy):
            input = leaf(x)
            value = function(input, y, reduction="none")
            (grad,) = torch.autograd.grad(value.sum(), input)
            results.append((value.detach(), grad))
        torch.testing.assert_close(*results)


def test_transposed_logits() -> None:
    """A transposed matrix was read as if it were contiguous."""
    x, y = logits(67, 9).t(), labels(9, 67)
    assert not x.is_contiguous()
    expected = truth(x, y)
    input = leaf(x)
    value = FL.cross_entropy(input, y)
    (grad,) = torch.autograd.grad(value, input)
    assert_close_to_truth(value.detach(), expected.value, expected.value_scale, "value")
    assert_close_to_truth(grad, expected.grad, expected.grad_scale, "gradient")


def test_gradient_of_one_step_is_not_overwritten_by_the_next() -> None:
    """A gradient buffer kept for reuse was still the caller's."""
    x, y = logits(9, 67), labels(9, 67)
    module = fusedloss.CrossEntropyLoss()
    first = leaf(x)
    module(first, y).backward()
    assert first.grad is not None
    copy = first.grad.clone()
    module(leaf(x * 2), y).backward()
    assert_same_bits(first.grad, copy, "first step")


def test_offsets_in_32_bits() -> None:
    """Element offsets past 2^31 wrapped around."""
    # Rows that begin where distant rows do: at the beginning of a vector.
    x, y = torch.empty(5, 68)[:, :67].copy_(logits(5, 67)), labels(5, 67)
    # Five short rows far apart: the memory between them is never touched, so never allocated.
    far = torch.empty(2**31 + 2**20, dtype=torch.float32).as_strided((5, 67), (2**29 + 2**10, 1))
    far.copy_(x)
    for loss, target in (("cross_entropy", y), ("mse_loss", x.flip(0))):
        for a, b in zip(*[_step(loss, rows, target) for rows in (far, x)], strict=True):
            assert_same_bits(a, b, loss)
    across = torch.empty(2**31 + 2**20, dtype=torch.float32).as_strided((67, 5), (1, 2**29 + 2**10))
    across.copy_(x.t())
    for a, b in zip(*[_step("mse_loss", rows, x.t()) for rows in (across, x.t())], strict=True):
        assert_same_bits(a, b, "across")


def _step(loss: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return value_and_grad(getattr(FL, loss), Sample(x, y, {}), "mean", 0.7)


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "huber_loss"])
def test_weight_under_a_default_device(loss: str, backend: str) -> None:
    """PyTorch's l1_loss leaves weight out under `with torch.device(...)`, as under any such
    mode."""
    x, y = torch.zeros(2, 3), torch.ones(2, 3)
    weight = torch.tensor([[1.0, 2.0, 3.0]]).repeat(2, 1)
    with torch.device(DEVICE):
        value = getattr(FL, loss)(leaf(x), y, weight=weight, reduction="sum")
    assert value.item() == (6 if loss == "huber_loss" else 12)
