"""The differentiable operators, and gradients of gradients.

The autograd Functions themselves are in csrc/autograd.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, reference

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_REDUCTION_NAMES = {number: name for name, number in REDUCTIONS.items()}


def pointwise(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    parameter: float,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    prediction: Tensor | None,
) -> Tensor:
    """One fused pointwise call; without a prediction of its own, with that of calls like it."""
    number = REDUCTIONS[reduction]
    if prediction is None:
        prediction = _shared_prediction(loss, input, number)
    value: Tensor = _pointwise(
        input, target, weight, pos_weight, loss, parameter, ignore_index, number, dtype, prediction
    )
    return value


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
    prediction: Tensor | None,
) -> Tensor:
    """One fused cross-entropy call; without a prediction of its own, with that of calls like it."""
    number = REDUCTIONS[reduction]
    if prediction is None:
        prediction = _shared_prediction("cross_entropy", input, number)
    value: Tensor = _cross_entropy(
        input, target, weight, ignore_index, label_smoothing, number, dtype, prediction
    )
    return value


# ---- create_graph=True ---------------------------------------------------------------------------


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype) if t.is_floating_point() else t


def _pointwise_reference_gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    parameter: float,
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor:
    value = reference.pointwise(
        loss,
        *(_cast(t, dtype) for t in (input, target, weight, pos_weight)),  # type: ignore[arg-type]
        parameter,
        ignore_index,
        _REDUCTION_NAMES[reduction],
    )
    return torch.autograd.grad(value, input, grad_output, create_graph=True)[0]


def _cross_entropy_reference_gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor:
    value = reference.cross_entropy(
        *(_cast(t, dtype) for t in (input, target, weight)),  # type: ignore[arg-type]
        ignore_index=ignore_index,
        reduction=_REDUCTION_NAMES[reduction],
        label_smoothing=label_smoothing,
    )
    return torch.autograd.grad(value, input, grad_output, create_graph=True)[0]


if backends.extension is not None:
    _shared_prediction = backends.extension.shared_prediction
    _pointwise = torch.ops.fusedloss.pointwise.default
    _cross_entropy = torch.ops.fusedloss.cross_entropy.default
    for name, implementation in {
        "pointwise_reference_gradient": _pointwise_reference_gradient,
        "cross_entropy_reference_gradient": _cross_entropy_reference_gradient,
    }.items():
        torch.library.impl(f"fusedloss::{name}", "CompositeImplicitAutograd")(implementation)
