"""How often a result is rounded, in units in the last place (ULP), on the compiled CPU kernels."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedloss.functional as FL

pytestmark = pytest.mark.usefixtures("compiled")


def gradient(loss: Tensor, input: Tensor, upstream: float) -> Tensor:
    (result,) = torch.autograd.grad(loss, input, torch.tensor(upstream, dtype=input.dtype))
    return result


def ulps(result: Tensor, truth: Tensor) -> float:
    """The largest distance of float32 numbers from a truth in float64."""
    wide = truth.detach().numpy()
    _, exponent = np.frexp(wide)
    distance = np.abs(result.detach().double().numpy() - wide)
    return float((distance / np.ldexp(1.0, exponent - 24)).max())


@pytest.mark.parametrize("count", [5, 2048, 250_000])
def test_float64_mean(count: int) -> None:
    """The sum keeps what its parts have rounded away, and so does the division."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        input, target = torch.randn(2, count, generator=generator, dtype=torch.float64)
        exact = sum(map(Fraction, (input - target).abs().tolist()), Fraction(0)) / count
        mean = FL.l1_loss(input, target).item()
        assert abs(Fraction(mean) - exact) < Fraction(0.75) * Fraction(np.spacing(float(exact)))


@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 65536.0, -1000 / 3, 1e-3])
def test_scale_costs_no_digit(upstream: float) -> None:
    """Of x - y exact, a gradient of mse_loss is rounded once, whatever it is multiplied by: where
    the CPU has fused multiply-add."""
    input = torch.randn(10_007, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.zeros_like(input)
    upstream = torch.tensor(upstream).item()  # as a float32
    result = gradient(FL.mse_loss(input, target), input, upstream)
    fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    assert ulps(result, 2 * input.double() * upstream / 10_007) < (0.501 if fused else 1.001)


@pytest.mark.parametrize("upstream", [1.0, 1 / 3, -1 / 3, 65536.0])
def test_infinite_slope(upstream: float) -> None:
    """Infinity times the scale is infinity, whether a float32 holds the scale or not."""
    for count in (4, 3):
        input = torch.zeros(count)
        input[:2] = torch.tensor([torch.inf, -torch.inf])
        input.requires_grad_()
        target = torch.zeros(count)
        result = gradient(FL.mse_loss(input, target), input, upstream)
        expected = gradient(torch.nn.functional.mse_loss(input, target), input, upstream)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_quotient_is_divided_last() -> None:
    """Of a target of 1, a gradient of log_loss is one number by another: two roundings in all."""
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
    """A gradient of binary_cross_entropy has torch's error at most, on every draw."""
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
