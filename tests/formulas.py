"""Each loss as plain maths in float64: the truth with which values and gradients are compared.

It is independent of the package and of torch's loss functions: written from the definitions, with
the derivative beside the value (autograd cannot differentiate a clamped logarithm the way torch
documents it). Each value has a *scale*: the sum of the magnitudes of its terms. A rounding error is
relative to a term, not to the rest after terms cancel, so tolerances are multiples of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elements:
    """The unreduced loss and its derivative.

    ``value`` has the shape of reduction "none"; ``slope`` has the input's shape and is the
    derivative of the value of its element or row with respect to the input.
    """

    value: Tensor
    value_scale: Tensor
    slope: Tensor
    slope_scale: Tensor
    divisor: Tensor  # what reduction "mean" divides the sum by
    class_dim: int | None = None  # None: each element has a value
    counted: Tensor | None = None  # rows that are not ignored


@dataclass(frozen=True)
class Truth:
    value: Tensor
    value_scale: Tensor
    grad: Tensor
    grad_scale: Tensor


# torch documents 1e-12 and stores it in a float, for binary cross-entropy and for cosine embedding.
_FLOOR = torch.tensor(1e-12, dtype=torch.float32).item()


def _pointwise(
    value: Tensor,
    slope: Tensor,
    weight: Tensor | None,
    *,
    value_scale: Tensor | None = None,
    slope_scale: Tensor | None = None,
    mean_by_weight: bool = False,
) -> Elements:
    factor = torch.ones_like(value) if weight is None else weight.expand_as(value)
    return Elements(
        value=factor * value,
        value_scale=(factor * (value if value_scale is None else value_scale)).abs(),
        slope=factor * slope,
        slope_scale=(factor * (slope if slope_scale is None else slope_scale)).abs(),
        divisor=factor.sum() if mean_by_weight else torch.tensor(float(value.numel())).double(),
    )


def mse_loss(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Elements:
    difference = input - target
    return _pointwise(difference**2, 2 * difference, weight, mean_by_weight=weight is not None)


def l1_loss(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Elements:
    difference = input - target
    return _pointwise(
        difference.abs(), difference.sign(), weight, mean_by_weight=weight is not None
    )


def smooth_l1_loss(input: Tensor, target: Tensor, beta: float = 1.0) -> Elements:
    if beta == 0:
        return l1_loss(input, target)
    difference = input - target
    near = difference.abs() < beta
    value = torch.where(near, difference**2 / (2 * beta), difference.abs() - beta / 2)
    slope = torch.where(near, difference / beta, difference.sign())
    return _pointwise(value, slope, None, value_scale=value + torch.where(near, 0.0, beta))


def huber_loss(
    input: Tensor, target: Tensor, delta: float = 1.0, weight: Tensor | None = None
) -> Elements:
    difference = input - target
    near = difference.abs() < delta
    value = torch.where(near, difference**2 / 2, delta * (difference.abs() - delta / 2))
    slope = torch.where(near, difference, delta * difference.sign())
    scale = value + torch.where(near, 0.0, delta**2)
    # torch divides the weighted Huber loss by the count, unlike the weighted MSE and L1.
    return _pointwise(value, slope, weight, value_scale=scale)


def binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Elements:
    log_p = input.log().clamp(min=-100)
    log_q = torch.log1p(-input).clamp(min=-100)
    value = -(target * log_p + (1 - target) * log_q)
    slope = (input - target) / ((1 - input) * input).clamp(min=_FLOOR)
    return _pointwise(value, slope, weight)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Elements:
    positive = target if pos_weight is None else target * pos_weight
    magnitude = input.abs()
    softplus = torch.log1p(torch.exp(-magnitude))  # of -|x|
    value = positive * (softplus + (-input).clamp(min=0)) + (1 - target) * (
        softplus + input.clamp(min=0)
    )
    sigmoid, complement = torch.sigmoid(input), torch.sigmoid(-input)
    return _pointwise(
        value,
        (1 - target) * sigmoid - positive * complement,
        weight,
        # The linear parts cancel: exactly at targets 0 and 1, unless there is a pos_weight.
        value_scale=value
        + torch.where((target * (1 - target) == 0) & (pos_weight is None), 0.0, magnitude),
        # The target's 1 and the sigmoid may cancel.
        slope_scale=(1 - target) * sigmoid + positive * sigmoid + positive,
    )


def soft_margin_loss(input: Tensor, target: Tensor) -> Elements:
    margin = input * target
    value = torch.logaddexp(-margin, torch.zeros_like(margin))
    return _pointwise(value, -target * torch.sigmoid(-margin), None)


def multilabel_soft_margin_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None
) -> Elements:
    of = binary_cross_entropy_with_logits(input, target, weight)
    classes = input.shape[-1]
    return Elements(
        value=of.value.mean(-1),
        value_scale=of.value_scale.mean(-1),
        slope=of.slope / classes,
        slope_scale=of.slope_scale / classes,
        divisor=torch.tensor(float(input.numel() / classes)).double(),
        class_dim=input.dim() - 1,
    )


def hinge_embedding_loss(input: Tensor, target: Tensor, margin: float = 1.0) -> Elements:
    similar = target == 1
    value = torch.where(similar, input, (margin - input).clamp(min=0))
    slope = torch.where(similar, 1.0, -(input <= margin).double())
    return _pointwise(value, slope, None, value_scale=input.abs() + margin)


def margin_ranking_loss(
    input: Tensor, other: Tensor, target: Tensor, margin: float = 0.0
) -> Elements:
    gap = margin - target * (input - other)
    scale = input.abs() + other.abs() + margin
    return _pointwise(
        gap.clamp(min=0), torch.where(gap >= 0, -target, 0.0), None, value_scale=scale
    )


def kl_div(input: Tensor, target: Tensor, log_target: bool = False) -> Elements:
    y = target.exp() if log_target else target
    log_y = target if log_target else torch.where(y == 0, 1.0, y).log()
    scale = y * (log_y.abs() + input.abs())
    if log_target:  # the exponential of a rounded sum
        scale = scale * (1 + target.abs())
    return _pointwise(y * (log_y - input), -y, None, value_scale=scale)


def poisson_nll_loss(
    input: Tensor, target: Tensor, log_input: bool = True, full: bool = False, eps: float = 1e-8
) -> Elements:
    rate = input.exp() if log_input else input + eps
    cross = target * (input if log_input else rate.log())
    value = (rate if log_input else input) - cross
    slope = rate - target if log_input else 1 - target / rate
    scale = rate + cross.abs()
    if full:
        y = target.clamp(min=1)
        parts = y * y.log(), -y, (2 * torch.pi * y).log() / 2
        value = value + torch.where(target > 1, sum(parts), 0.0)
        scale = scale + torch.where(target > 1, sum(part.abs() for part in parts), 0.0)
    slope_scale = rate + target if log_input else 1 + target / rate
    return _pointwise(value, slope, None, value_scale=scale, slope_scale=slope_scale)


def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor, full: bool = False, eps: float = 1e-6
) -> Elements:
    v = var.clamp(min=eps)
    square = (input - target) ** 2 / v
    constant = math.log(2 * math.pi) / 2 if full else 0.0
    return _pointwise(
        (v.log() + square) / 2 + constant,
        (input - target) / v,
        None,
        value_scale=(v.log().abs() + square) / 2 + constant,
    )


def _rows_last(tensor: Tensor, class_dim: int) -> Tensor:
    return tensor.movedim(class_dim, -1)


def _row_weights(
    shape: torch.Size,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight of each class in each row (classes last), with the row's share in a mean.

    Returns the hard part, the smooth part, the counted rows and the divisor of the mean.
    """
    classes = shape[-1]
    per_class = torch.ones(classes).double() if weight is None else weight
    if target.is_floating_point():
        hard = (1 - label_smoothing) * target * per_class
        smooth = (label_smoothing / classes) * per_class.expand(shape)
        counted = torch.ones(shape[:-1], dtype=torch.bool)
        return hard, smooth, counted, torch.tensor(float(counted.numel())).double()
    counted = target != ignore_index
    index = torch.where(counted, target, 0).unsqueeze(-1)
    row_weight = torch.where(counted, per_class.expand(shape).gather(-1, index).squeeze(-1), 0.0)
    hard = torch.zeros(shape).double().scatter_(-1, index, row_weight.unsqueeze(-1))
    smooth = (label_smoothing / classes) * per_class * counted.unsqueeze(-1)
    return (1 - label_smoothing) * hard, smooth, counted, row_weight.sum()


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Elements:
    class_dim = 1 if input.dim() > 1 else 0
    logits = _rows_last(input, class_dim)
    labels = _rows_last(target, class_dim) if target.is_floating_point() else target
    hard, smooth, counted, divisor = _row_weights(
        logits.shape, labels, weight, ignore_index, label_smoothing
    )
    row = hard + smooth
    top = logits.amax(-1, keepdim=True)
    log_sum = torch.logsumexp(logits - top, -1, keepdim=True)
    log_p = logits - top - log_sum
    p = log_p.exp()
    # Each class pulls its logit by 1 - p, summed from the other classes, since 1 - p itself
    # loses all digits where p is nearly 1.
    others = p.sum(-1, keepdim=True) - p
    confident = p > 0.5
    others = torch.where(confident, torch.where(confident, 0.0, p).sum(-1, keepdim=True), others)
    total = row.sum(-1, keepdim=True)
    slope = p * (total - row) - row * others
    # Every logit enters through (x - max), and an error there is one of the whole exponential.
    magnitude = 1 + log_p.abs()
    # A class of weight 0 contributes nothing, however improbable (0 * -inf).
    terms = torch.where(row == 0, 0.0, row * log_p)
    terms_scale = torch.where(row == 0, 0.0, row * magnitude)
    used = counted.unsqueeze(-1)
    return Elements(
        value=-terms.sum(-1).where(counted, 0.0),
        value_scale=terms_scale.sum(-1).where(counted, 0.0),
        slope=slope.where(used, 0.0).movedim(-1, class_dim),
        slope_scale=((p * total + row) * magnitude).where(used, 0.0).movedim(-1, class_dim),
        divisor=divisor,
        class_dim=class_dim,
        counted=counted,
    )


def log_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    *,
    eps: float = torch.finfo(torch.float64).eps,
) -> Elements:
    hard, _, counted, divisor = _row_weights(input.shape, target, weight, ignore_index, 0.0)
    inside = (input >= eps) & (input <= 1)
    terms = -hard * input.clamp(eps, 1).log()
    slope = torch.where(inside, -hard / input, 0.0)
    return Elements(
        value=terms.sum(-1),
        value_scale=terms.abs().sum(-1),
        slope=slope,
        slope_scale=slope.abs(),
        divisor=divisor,
        class_dim=1,
        counted=counted,
    )


def _row_sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def _of_rows(value: Tensor, value_scale: Tensor, slope: Tensor, slope_scale: Tensor) -> Elements:
    """The first two of size 1 along the last dimension."""
    return Elements(
        value=value.squeeze(-1),
        value_scale=value_scale.squeeze(-1),
        slope=slope,
        slope_scale=slope_scale.expand_as(slope),
        divisor=torch.tensor(float(value.numel())).double(),
        class_dim=slope.dim() - 1,
    )


def cosine_embedding_loss(
    input: Tensor, other: Tensor, target: Tensor, margin: float = 0.0
) -> Elements:
    a, b, y = input, other, target.unsqueeze(-1)
    square, root = _row_sum(a * a) + _FLOOR, (_row_sum(b * b) + _FLOOR).sqrt()
    root = square.sqrt() * root
    cosine, magnitude = _row_sum(a * b) / root, _row_sum((a * b).abs()) / root
    far = (y == -1) & (cosine >= margin)
    sign = torch.where(y == 1, -1.0, far.double())
    return _of_rows(
        torch.where(y == 1, 1 - cosine, torch.where(far, cosine - margin, 0.0)),
        magnitude + 1,
        sign * (b / root - cosine * a / square),
        sign.abs() * (b.abs() / root + magnitude * a.abs() / square),
    )


def triplet_margin_loss(
    input: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    eps: float = 1e-6,
    swap: bool = False,
) -> Elements:
    def norm(x: Tensor) -> Tensor:
        return _row_sum(x * x).sqrt()

    to_near, to_far = input - positive + eps, input - negative + eps
    near, far, other = norm(to_near), norm(to_far), norm(positive - negative + eps)
    swapped = (other < far) & torch.tensor(swap)
    bound = torch.where(swapped, other, far)
    on = (margin + near - bound >= 0).double()
    to_far = torch.where(swapped, 0.0, to_far)
    # The difference and eps may cancel.
    scale = ((input - positive).abs() + eps) / near + ((input - negative).abs() + eps) / far
    return _of_rows(
        (margin + near - bound).clamp(min=0),
        margin + near + bound,
        on * (to_near / near - to_far / far),
        on * scale,
    )


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
) -> Elements:
    label = target.unsqueeze(-1)
    at = input.gather(-1, label)
    z, scale = margin - at + input, margin + at.abs() + input.abs()
    there = torch.zeros_like(input).scatter(-1, label, 1.0)
    on = torch.where(there == 1, 0.0, (z > 0).double())
    factor = 1.0 if weight is None else weight[label]
    factor = factor * torch.ones_like(at) / input.shape[-1]
    slope, slope_scale = on * p * z ** (p - 1), on * p * scale ** (p - 1)
    return _of_rows(
        factor * _row_sum(on * z**p),
        factor * _row_sum(on * p * z ** (p - 1) * scale),
        factor * (slope - there * _row_sum(slope)),
        factor * (slope_scale + there * _row_sum(slope_scale)),
    )


FORMULAS: dict[str, Callable[..., Elements]] = {
    function.__name__: function
    for function in (
        mse_loss,
        l1_loss,
        smooth_l1_loss,
        huber_loss,
        binary_cross_entropy,
        binary_cross_entropy_with_logits,
        soft_margin_loss,
        multilabel_soft_margin_loss,
        hinge_embedding_loss,
        margin_ranking_loss,
        kl_div,
        poisson_nll_loss,
        gaussian_nll_loss,
        cross_entropy,
        log_loss,
        cosine_embedding_loss,
        triplet_margin_loss,
        multi_margin_loss,
    )
}


def _widen(value: Any) -> Any:
    widens = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if widens else value


def elements(loss: str, input: Tensor, target: Tensor, options: dict[str, Any]) -> Elements:
    """The unreduced loss in float64, of exactly the given numbers, in any dtype."""
    extra = {"eps": torch.finfo(input.dtype).eps} if loss == "log_loss" else {}
    wide = {key: _widen(value) for key, value in options.items()}
    return FORMULAS[loss](_widen(input), _widen(target), **wide, **extra)


def reduce(elements: Elements, reduction: str, upstream: Tensor | float = 1.0) -> Truth:
    """Value, and gradient for an upstream gradient."""
    factor = torch.as_tensor(upstream, dtype=torch.float64).detach()
    if reduction == "none":
        value, value_scale = elements.value, elements.value_scale
        if elements.class_dim is not None:
            factor = factor.expand(value.shape).unsqueeze(elements.class_dim)
    else:
        divisor = elements.divisor if reduction == "mean" else torch.ones(()).double()
        value = elements.value.sum() / divisor
        value_scale = elements.value_scale.sum() / divisor
        factor = factor / divisor
    grad, grad_scale = elements.slope * factor, elements.slope_scale * factor.abs()
    if elements.counted is not None and elements.class_dim is not None:
        # An ignored row has no gradient, even where the mean's divisor is 0.
        used = elements.counted.unsqueeze(elements.class_dim)
        grad, grad_scale = grad.where(used, 0.0), grad_scale.where(used, 0.0)
    return Truth(value, value_scale, grad, grad_scale)


def truth(
    loss: str,
    input: Tensor,
    target: Tensor,
    options: dict[str, Any],
    reduction: str,
    upstream: Tensor | float = 1.0,
) -> Truth:
    """Value and gradient in float64, of exactly the given numbers."""
    return reduce(elements(loss, input, target, options), reduction, upstream)
