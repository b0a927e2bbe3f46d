"""The two autograd Functions: pointwise losses, and cross-entropy.

The forward pass writes the gradient already, for a *predicted* upstream gradient. Backward hands it
over where the prediction was right, and has the same kernel compute it from the saved inputs where
it was not: the gradient that a caller sees is the same, bit for bit, either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, reference

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_REDUCTION_NAMES = {number: name for name, number in REDUCTIONS.items()}

if backends.extension is not None:
    _empty_gradient = torch.ops.fusedloss.empty_gradient.default
    _pointwise_value = torch.ops.fusedloss.pointwise_value.default
    _pointwise_forward = torch.ops.fusedloss.pointwise_forward.default
    _pointwise_backward_ = torch.ops.fusedloss.pointwise_backward_.default
    _cross_entropy_value = torch.ops.fusedloss.cross_entropy_value.default
    _cross_entropy_forward = torch.ops.fusedloss.cross_entropy_forward.default
    _cross_entropy_backward_ = torch.ops.fusedloss.cross_entropy_backward_.default


def new_prediction(device: torch.device) -> Tensor:
    """A call site's prediction: an upstream gradient, and the confidence in it (0 to 3)."""
    return torch.tensor([1.0, 3.0], dtype=torch.float64, device=device)


class Predictions(dict[Any, Tensor]):
    """The predictions of calls that have no module to keep theirs: a few hundred at most."""

    LIMIT = 512

    def __missing__(self, key: Any) -> Tensor:
        if len(self) >= self.LIMIT:
            self.clear()
        # Not by setdefault: two threads may each make one, and either will do.
        prediction = self[key] = new_prediction(key[-1])
        return prediction


_predictions = Predictions()


def _take_gradient(ctx: Any, input: Tensor) -> tuple[Tensor, bool]:
    """The buffer that forward filled, or, in a second backward, a fresh one and True.

    It leaves the graph here, so that autograd is its only owner and need not copy it.
    """
    gradient: Tensor | None = ctx.gradient
    ctx.gradient = None
    if gradient is not None:
        return gradient, False
    return _empty_gradient(input), True


class Pointwise(torch.autograd.Function):
    """Any pointwise loss. Differentiable in ``input``, to any order."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        loss: str,
        parameter: float,
        ignore_index: int,
        reduction: int,
        dtype: torch.dtype,
        prediction: Tensor,
    ) -> Tensor:
        value: Tensor
        value, ctx.gradient, ctx.scales = _pointwise_forward(
            input, target, weight, pos_weight, loss, parameter, ignore_index, reduction, dtype,
            prediction,
        )  # fmt: skip
        ctx.save_for_backward(input, target, weight, pos_weight)
        ctx.options = (loss, parameter, ignore_index, reduction, dtype, prediction)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        input, target, weight, pos_weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss, parameter, ignore_index, reduction, dtype, _ = ctx.options
            value = reference.pointwise(
                loss,
                input.to(dtype),
                *(t if t is None or t.dtype == torch.int64 else t.to(dtype)
                  for t in (target, weight, pos_weight)),
                parameter, ignore_index, _REDUCTION_NAMES[reduction],
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(value, input, grad_output, create_graph=True)
        else:
            gradient, fresh = _take_gradient(ctx, input)
            _pointwise_backward_(
                gradient, grad_output, ctx.scales, fresh, input, target, weight, pos_weight,
                *ctx.options,
            )  # fmt: skip
        return gradient, None, None, None, None, None, None, None, None, None


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits, with class indices or probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
        dtype: torch.dtype,
        prediction: Tensor,
    ) -> Tensor:
        value: Tensor
        value, ctx.gradient, ctx.scales, ctx.stats = _cross_entropy_forward(
            input, target, weight, ignore_index, label_smoothing, reduction, dtype, prediction
        )
        ctx.save_for_backward(input, target, weight)
        ctx.options = (ignore_index, label_smoothing, reduction, dtype, prediction)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        input, target, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            ignore_index, label_smoothing, reduction, dtype, _ = ctx.options
            value = reference.cross_entropy(
                input.to(dtype),
                target if target.dtype == torch.int64 else target.to(dtype),
                None if weight is None else weight.to(dtype),
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction=_REDUCTION_NAMES[reduction],
            )
            (gradient,) = torch.autograd.grad(value, input, grad_output, create_graph=True)
        else:
            gradient, fresh = _take_gradient(ctx, input)
            _cross_entropy_backward_(
                gradient, grad_output, ctx.scales, fresh, ctx.stats, input, target, weight,
                *ctx.options,
            )  # fmt: skip
        return gradient, None, None, None, None, None, None, None


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
    """One fused pointwise call: with its gradient where one is wanted."""
    number = REDUCTIONS[reduction]
    if not (input.requires_grad and torch.is_grad_enabled()):
        value: Tensor = _pointwise_value(
            input, target, weight, pos_weight, loss, parameter, ignore_index, number, dtype
        )
        return value
    if prediction is None:
        prediction = _predictions[loss, input.dtype, input.numel(), number, input.device]
    value = Pointwise.apply(
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
    """One fused cross-entropy call: with its gradient where one is wanted."""
    number = REDUCTIONS[reduction]
    if not (input.requires_grad and torch.is_grad_enabled()):
        value: Tensor = _cross_entropy_value(
            input, target, weight, ignore_index, label_smoothing, number, dtype
        )
        return value
    if prediction is None:
        prediction = _predictions["cross_entropy", input.dtype, input.shape, number, input.device]
    value = CrossEntropy.apply(
        input, target, weight, ignore_index, label_smoothing, number, dtype, prediction
    )
    return value
