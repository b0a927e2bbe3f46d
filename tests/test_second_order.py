"""First and second derivatives: against finite differences, and against the plain reference."""

from __future__ import annotations

import pytest
import torch

import fusedloss.functional as FL
from cases import DTYPES, FAMILIES, REDUCTIONS, at_shape
from fusedloss import reference
from helpers import COMPUTE, draw_upstream, leaf

# Finite differences do not work beside a pole or a clamp.
SMOOTH = [family for family in FAMILIES if "poles" not in family and "clamped" not in family]
SHAPE = (3, 5)
ONCE = ("multi_margin_loss",)  # torch's function has no second derivative


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", SMOOTH)
def test_gradcheck(family: str, reduction: str, backend: str) -> None:
    case = at_shape(family, SHAPE)
    sample = case.sample(torch.float64)

    def call(input: torch.Tensor) -> torch.Tensor:
        return getattr(FL, case.loss)(input, sample.target, reduction=reduction, **sample.options)

    input = leaf(sample.input)
    assert torch.autograd.gradcheck(call, (input,))
    if backend == "reference" and case.loss in ONCE:
        return
    assert torch.autograd.gradgradcheck(call, (input,))


@pytest.mark.parametrize("family", [f for f in SMOOTH if "cross_entropy" not in f or "prob" in f])
def test_gradcheck_with_target(family: str, backend: str) -> None:
    """A real target has derivatives too, alone and mixed with the input's."""
    case = at_shape(family, SHAPE)
    sample = case.sample(torch.float64)
    if not sample.target.is_floating_point():
        pytest.skip("class indices have no derivative")
    # inside (0, 1), if that is the target's range
    target = sample.target * 0.9 + 0.05

    def call(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return getattr(FL, case.loss)(input, target, **sample.options)

    try:
        call(leaf(sample.input), leaf(target))
    except RuntimeError as error:
        assert "not differentiable with respect to argument 'target'" in str(error)
        pytest.skip("torch has no derivative by target")
    assert torch.autograd.gradcheck(call, (leaf(sample.input), leaf(target)))
    assert torch.autograd.gradgradcheck(call, (leaf(sample.input), leaf(target)))


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_against_reference(family: str, reduction: str, dtype: str, fused: str) -> None:
    """Value, gradient, and gradient of a product with the gradient."""
    case = at_shape(family, (5, 67))
    sample = case.sample(DTYPES[dtype])
    if case.loss in ONCE:
        pytest.skip("torch has no second derivative; gradgradcheck tries ours")
    results = []
    for module in (FL, reference):
        input = leaf(sample.input)
        value = getattr(module, case.loss)(
            input, sample.target, reduction=reduction, **sample.options
        )
        upstream = leaf(draw_upstream(value.shape, value.dtype))
        (grad,) = torch.autograd.grad(value, input, upstream, create_graph=True)
        direction = draw_upstream(grad.shape, grad.dtype, seed=3)
        if grad.requires_grad:
            second = torch.autograd.grad(
                grad, (input, upstream), direction, allow_unused=True, materialize_grads=True
            )
        else:
            second = (torch.zeros_like(input), torch.zeros_like(upstream))
        results.append((value.detach(), grad.detach(), *second))
    eps = torch.finfo(COMPUTE[DTYPES[dtype]]).eps
    for name, ours, plain in zip(
        ("value", "gradient", "second order", "derivative by upstream"), *results, strict=True
    ):
        torch.testing.assert_close(
            ours,
            plain,
            rtol=64 * eps,
            # Terms cancel within a row.
            atol=64 * eps * float(plain.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("family", SMOOTH)
def test_third_order(family: str, backend: str) -> None:
    """create_graph works to any order."""
    case = at_shape(family, SHAPE)
    if backend == "reference" and case.loss in ONCE:
        pytest.skip("torch has no second derivative")
    sample = case.sample(torch.float64)

    def slope(input: torch.Tensor) -> torch.Tensor:
        value = getattr(FL, case.loss)(input, sample.target, **sample.options)
        (grad,) = torch.autograd.grad(value, input, create_graph=True)
        return grad

    input = leaf(sample.input)
    if not slope(input).requires_grad:
        pytest.skip("the gradient does not depend on the input")
    assert torch.autograd.gradgradcheck(slope, (input,))
