"""The truth is true: formulas.py agrees with torch in float64 on the whole table."""

from __future__ import annotations

import pytest
import torch

import formulas
from cases import CASES, FAMILIES, LOSSES, REDUCTIONS
from helpers import (
    draw_upstream,
    result_shape,
    sample_truth,
    torch_loss,
    value_and_grad,
)


def test_every_loss_has_cases() -> None:
    assert set(LOSSES) == set(formulas.FORMULAS)


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_formula_agrees_with_torch(family: str, reduction: str) -> None:
    for case in FAMILIES[family]:
        sample = case.sample(torch.float64)
        upstream = draw_upstream(result_shape(case.loss, sample, reduction), torch.float64)
        value, grad = value_and_grad(torch_loss(case.loss), sample, reduction, upstream)
        expected = sample_truth(case.loss, sample, reduction, upstream)
        torch.testing.assert_close(
            value, expected.value, rtol=1e-12, atol=1e-13, equal_nan=True, msg=f"{case.name} value"
        )
        # Definitions are compared here, not roundings: torch sums a long row in order.
        off = (grad - expected.grad).abs() > 1e-12 * expected.grad_scale
        assert not off.any(), f"{case.name} gradient"


@pytest.mark.parametrize("family", [f for f in FAMILIES if "poles" not in f and "clamped" not in f])
def test_slope_is_the_derivative(family: str) -> None:
    """The derivatives are those of the values."""
    case = FAMILIES[family][-2]
    sample = case.sample(torch.float64)
    input = sample.input.clone().requires_grad_()
    elements = formulas.FORMULAS[case.loss](input, sample.target, **sample.options)
    (grad,) = torch.autograd.grad(elements.value.sum(), input)
    torch.testing.assert_close(grad, elements.slope.detach(), rtol=1e-10, atol=1e-12)


def test_known_values() -> None:
    """A handful of values worked out by hand."""

    def one(loss: str, x: float, t: float, **options: float) -> tuple[float, float]:
        x_, t_ = torch.tensor([x]).double(), torch.tensor([t]).double()
        result = formulas.truth(loss, x_, t_, options, "sum")
        return result.value.item(), result.grad.item()

    assert one("mse_loss", 3, 1) == (4, 4)
    assert one("l1_loss", 3, 1) == (2, 1)
    assert one("l1_loss", 1, 1) == (0, 0)
    assert one("smooth_l1_loss", 3, 1) == (1.5, 1)
    assert one("smooth_l1_loss", 1.25, 1, beta=0.5) == (0.0625, 0.5)
    assert one("huber_loss", 3, 1, delta=0.5) == (0.875, 0.5)
    assert one("binary_cross_entropy", 0, 1) == (100, pytest.approx(-1e12))
    assert one("binary_cross_entropy", 0, 0) == (0, 0)
    assert one("binary_cross_entropy_with_logits", 0, 1)[1] == -0.5
    rows = formulas.truth(
        "cross_entropy", torch.zeros(2, 4).double(), torch.tensor([1, 3]), {}, "mean"
    )
    torch.testing.assert_close(rows.value, torch.tensor(4.0).double().log())
    assert rows.grad[0].tolist() == [0.125, -0.375, 0.125, 0.125]
