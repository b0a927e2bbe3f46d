"""How often a result is rounded, in units in the last place (ULP)."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedloss.functional as FL
from helpers import EMULATED, FOR_A_GPU


def of_the_cpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test of the CPU kernels."""
    emulated = pytest.mark.skipif(EMULATED, reason="is about the CPU's own kernels")
    return pytest.mark.usefixtures("compiled")(emulated(test))


def gradient(loss: Tensor, input: Tensor, upstream: float) -> Tensor:
    (result,) = torch.autograd.grad(loss, input, torch.tensor(upstream, dtype=input.dtype))
    return result


def ulps(result: Tensor, truth: Tensor) -> float:
    """The largest distance of float32 numbers from a truth in float64."""
    wide = truth.detach().numpy()
    _, exponent = np.frexp(wide)
    distance = np.abs(result.detach().double().numpy() - wide)
    return float((distance / np.ldexp(1.0, exponent - 24)).max())


@of_the_cpu
@pytest.mark.parametrize("count", [5, 2048, 250_000])
def test_float64_mean(count: int) -> None:
    """The sum keeps the digits that its parts round away, and so does the division."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        input, target = torch.randn(2, count, generator=generator, dtype=torch.float64)
        exact = sum(map(Fraction, (input - target).abs().tolist()), Fraction(0)) / count
        mean = FL.l1_loss(input, target).item()
        assert abs(Fraction(mean) - exact) < Fraction(0.75) * Fraction(np.spacing(float(exact)))


@of_the_cpu
@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 65536.0, -1000 / 3, 1e-3])
def test_scale_costs_no_digit(upstream: float) -> None:
    """If x - y is exact, a gradient of mse_loss is rounded once, whatever the factors, on CPUs with
    fused multiply-add."""
    input = torch.randn(10_007, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.zeros_like(input)
    upstream = torch.tensor(upstream).item()  # as a float32
    result = gradient(FL.mse_loss(input, target), input, upstream)
    fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    assert ulps(result, 2 * input.double() * upstream / 10_007) < (0.501 if fused else 1.001)


@pytest.mark.parametrize("upstream", [1.0, 1 / 3, -1 / 3, 65536.0])
def test_infinite_slope(upstream: float) -> None:
    """Infinity times the scale is infinity, whether the scale fits a float32 or not."""
    for count in (4, 3):
        input = torch.zeros(count)
        input[:2] = torch.tensor([torch.inf, -torch.inf])
        input.requires_grad_()
        target = torch.zeros(count)
        result = gradient(FL.mse_loss(input, target), input, upstream)
        expected = gradient(torch.nn.functional.mse_loss(input, target), input, upstream)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_quotient_is_divided_last() -> None:
    """With a target of 1, a gradient of log_loss is a quotient: two roundings in all."""
    input = torch.rand(10_007, 3, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    input.requires_grad_()
    target = torch.arange(10_007) % 3
    result = gradient(FL.log_loss(input, target), input, 1000 / 3)
    chosen = input.double()[range(10_007), target]
    truth = -torch.tensor(1000 / 3).double() / 10_007 / chosen
    scale = (torch.tensor(1000 / 3).double() / 10_007).float()
    off = abs(scale.double().item() * 10_007 / torch.tensor(1000 / 3).item() - 1)
    assert ulps(result[range(10_007), target], truth) < 0.501 + off * 2**24


def test_quotient_as_torch() -> None:
    """A gradient of binary_cross_entropy has at most torch's error, on every draw."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        input = (torch.rand(50_000, generator=generator) * 0.98 + 0.01).requires_grad_()
        target = torch.rand(50_000, generator=generator).round()
        x = input.double()
        truth = (x - target) / (x * (1 - x)) * torch.tensor(1000 / 3).double() / 50_000
        errors = [
            ulps(gradient(loss(input, target), input, 1000 / 3), truth)
            for loss in (FL.binary_cross_entropy, torch.nn.functional.binary_cross_entropy)
        ]
        assert errors[0] <= errors[1] + 0.05, errors


# ---- sums whose roundings do not cancel ----------------------------------------------------------

# An emulated GPU and Triton's interpreter are slow.
MANY = 1 << 16 if FOR_A_GPU else 1 << 24


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("loss", "input", "exact"),
    [
        ("l1_loss", 1.1, lambda x: x),
        ("mse_loss", 1.1, lambda x: x * x),
        ("smooth_l1_loss", 1.7, lambda x: x - 0.5),
        ("binary_cross_entropy", 0.3, lambda x: -math.log1p(-x)),
        ("binary_cross_entropy_with_logits", 0.0, lambda x: math.log(2)),
    ],
)
def test_many_equal_elements(
    loss: str, input: float, exact: Callable[[float], float], reduction: str, fused: str
) -> None:
    """Each addition to a float32 sum would round the same way."""
    elements = torch.full((MANY,), input)
    truth = torch.tensor(exact(elements[0].item()), dtype=torch.float64)
    if reduction == "sum":
        truth *= MANY
    zeros = torch.zeros(MANY)
    for wanted in (False, True):
        value = getattr(FL, loss)(elements.requires_grad_(wanted), zeros, reduction=reduction)
        assert ulps(value, truth) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["two values", "outliers", "huge", "weighted"])
def test_many_elements(pattern: str, fused: str) -> None:
    input = torch.full((MANY,), 1.1)
    weight = None
    if pattern == "two values":
        input[::2] = 0.3
    elif pattern == "outliers":
        input[::4097] = 1e6
    elif pattern == "huge":  # whose sum does not fit a float32
        input.fill_(1e38)
    else:
        weight = torch.full_like(input, 0.7)
    truth = input.double() if weight is None else input.double() * weight.double()
    truth = truth.mean() if weight is None else truth.sum() / weight.double().sum()
    value = FL.l1_loss(input, torch.zeros(MANY), weight=weight)
    assert ulps(value, truth) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_slope_of_mse_does_not_overflow(dtype: torch.dtype, fused: str) -> None:
    """Twice the difference is out of range, but the gradient is not."""
    huge = torch.finfo(dtype).max * 0.75
    input = torch.tensor([huge, -huge, 1.0], dtype=dtype).repeat(30).requires_grad_()
    for reduction, upstream in (("mean", 1.0), ("sum", 0.25)):
        value = FL.mse_loss(input, torch.zeros_like(input), reduction=reduction)
        result = gradient(value, input, upstream)
        factor = 2 * upstream / (90 if reduction == "mean" else 1)
        torch.testing.assert_close(result, input.detach() * factor)


def long_rows(logits: Tensor, weight: Tensor | None, smoothing: float) -> np.ndarray[Any, Any]:
    """The losses of rows whose target is class 0, in 80 bits."""
    x = np.moveaxis(logits.double().numpy().astype(np.longdouble), 1, -1)
    top = x.max(-1, keepdims=True)
    log_p = x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))
    w = np.ones(x.shape[-1]) if weight is None else weight.double().numpy()
    spread = smoothing / x.shape[-1] * (w * log_p).sum(-1)
    return -(1 - smoothing) * w[0] * log_p[..., 0] - spread  # type: ignore[no-any-return]


def off(result: Tensor, exact: np.ndarray[Any, Any]) -> float:
    """The largest distance, in ULP of result's dtype."""
    kind = np.float64 if result.dtype is torch.float64 else np.float32
    distance = np.abs(result.detach().numpy().astype(np.longdouble) - exact)
    return float((distance / np.spacing(np.abs(exact).astype(kind))).max())


@of_the_cpu
@pytest.mark.parametrize("inner", [(), (3,), (16,)], ids=str)
def test_float64_rows_of_many_classes(inner: tuple[int, ...]) -> None:
    """Roundings of a sum over 32,000 equal classes do not add up."""
    logits = torch.full((4, 32_000, *inner), 0.3, dtype=torch.float64)
    logits[:, 1] = 0.7
    target = torch.zeros((4, *inner), dtype=torch.int64)
    value = FL.cross_entropy(logits, target, reduction="none")
    assert off(value, long_rows(logits, None, 0.0)) <= 1


@pytest.mark.parametrize("shape", [(64, 10), (4, 10, 16), (64, 1000)], ids=str)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothing_with_one_heavy_class(
    shape: tuple[int, ...], smoothing: float, fused: str
) -> None:
    """If a row is sure of the heavy class and another class is the target, the sum over the other
    classes is multiplied by the heavy weight."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(shape, generator=generator) * 4
    logits[:, 3] += 12
    weight = torch.full((shape[1],), 1e-3)
    weight[3] = 1e4
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    value = FL.cross_entropy(logits, target, weight, label_smoothing=smoothing, reduction="none")
    # An exponential multiplies the rounding of its argument, some 20 here, by that.
    assert off(value, long_rows(logits, weight, smoothing)) <= 12
