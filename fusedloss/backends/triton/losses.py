"""The maths of csrc/math, mirrored: the pointwise losses, and a row of cross-entropy.

All numbers of a call are of one type, float32 or float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from .words import clamp, clamp_min, divide, exp_nonpositive, log1p_finite

# ---- pointwise -----------------------------------------------------------------------------------
# A loss is a jit function of one element,
#
#     loss(input, target, *operands, *parameters) -> value, slope  [, slope by target [, divisor]]
#
# of blocks of numbers of one type, and gives blocks of that type: the value, its derivative by
# input and, where a call wants a gradient for target, that by target. operands are further tensors
# of input's shape (a pos_weight); parameters are numbers, known at run time. The engine multiplies
# by weight, upstream gradient and what a mean divides by.
# A derivative that is a quotient may come with its divisor as a fourth result (the third is then
# not read): divided last, as in torch, a target of 0 or 1 costs one rounding less.


@triton.jit
def _mse(x, y):
    # Twice that slope can overflow where the gradient, divided by a mean's count, does not.
    d = x - y
    return d * d, d


@triton.jit
def _l1(x, y):
    d = x - y
    return tl.abs(d), tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0)).to(d.dtype)


@triton.jit
def _smooth_l1(x, y, beta):
    d = x - y
    slope = divide(clamp(d, -beta, beta), beta)
    return slope * (d - 0.5 * beta * slope), slope


@triton.jit
def _huber(x, y, delta):
    d = x - y
    slope = clamp(d, -delta, delta)
    return slope * (d - 0.5 * slope), slope


@triton.jit
def _bce(x, y):
    log_x = clamp_min(tl.log(x), -100.0)
    log_1_x = clamp_min(log1p_finite(-x), -100.0)
    # 1e-12 as a float32, as in torch.
    divisor = clamp_min((1.0 - x) * x, 9.999999960041972e-13)
    return (y - 1.0) * log_1_x - y * log_x, x - y, 0.0, divisor


@triton.jit
def _bce_with_logits(x, y):
    e = exp_nonpositive(-tl.abs(x))
    q = divide(e, 1.0 + e)
    s = tl.where(x < 0.0, -y, 1.0 - y)
    return log1p_finite(e) + s * x, s + tl.where(x < 0.0, q, -q)


@triton.jit
def _bce_with_logits_pos_weight(x, y, p):
    e = exp_nonpositive(-tl.abs(x))
    factor = 1.0 + (p - 1.0) * y
    q = factor * divide(e, 1.0 + e)
    value = (1.0 - y) * x + factor * (log1p_finite(e) + clamp_min(-x, 0.0))
    return value, tl.where(x < 0.0, q - p * y, (1.0 - y) - q)


@triton.jit
def _log_loss(x, y, eps):
    p = clamp(x, eps, 1.0)
    inside = (x >= eps) & (x <= 1.0)
    return 0.0 - y * tl.log(p), tl.where(inside, 0.0 - y, tl.where(x == x, 0.0, x)), 0.0, p


@dataclass(frozen=True)
class PointwiseLoss:
    """A loss, and what an engine must know of it; as in csrc/math/losses.h."""

    function: Any
    mean: str = "elements"  # what reduction "mean" divides by: or "weights", or "rows"
    unit_interval: bool = False  # input and target must lie in [0, 1]
    parameters: int = 0  # how many it takes
    slope_unit: float = 1.0  # what its slopes are to be multiplied by


POINTWISE = {
    "mse_loss": PointwiseLoss(_mse, mean="weights", slope_unit=2.0),
    "l1_loss": PointwiseLoss(_l1, mean="weights"),
    "smooth_l1_loss": PointwiseLoss(_smooth_l1, parameters=1),
    "huber_loss": PointwiseLoss(_huber, parameters=1),
    "binary_cross_entropy": PointwiseLoss(_bce, unit_interval=True),
    "binary_cross_entropy_with_logits": PointwiseLoss(_bce_with_logits),
    "binary_cross_entropy_with_logits_pos_weight": PointwiseLoss(_bce_with_logits_pos_weight),
    "log_loss": PointwiseLoss(_log_loss, mean="rows", parameters=1),
}


# ---- cross-entropy -------------------------------------------------------------------------------
# What some of a row's classes add up to: max of the logits; sum of e^(x - max), for class indices
# over all classes but the target; dot of q (x - max); mass of q. A class counts with
# q = w (keep y + spread), for class indices with w: see csrc/math/row_losses.h.


@triton.jit
def finite_max(max):
    """To measure distances from: a row of nothing but -inf has none."""
    return tl.where(max == float("-inf"), 0.0, max)


@triton.jit
def rescale(top, max, sum, dot, mass):
    """The sums, as measured from another finite_max."""
    sum = sum * exp_nonpositive(max - finite_max(top))  # 0 where max is -inf
    return sum, dot + mass * (finite_max(max) - finite_max(top))


@triton.jit
def merge(max, sum, dot, mass, other_max, other_sum, other_dot, other_mass):
    top = tl.maximum(max, other_max)
    sum, dot = rescale(top, max, sum, dot, mass)
    other_sum, other_dot = rescale(top, other_max, other_sum, other_dot, other_mass)
    return top, sum + other_sum, dot + other_dot, mass + other_mass


@triton.jit
def soft_row(sum, dot, mass, scale):
    """Of class probabilities: the loss; and the gradient, as e^(x - max) factor - q scale."""
    log_sum = log1p_finite((sum - 1.0).to(dot.dtype))
    return mass * log_sum - dot, divide(mass * scale, sum.to(dot.dtype))


@triton.jit
def hard_row(max, sum, dot, logit, weight, scale, keep, spread, weights, SMOOTH: tl.constexpr):
    """Of class indices: the loss; and the gradient, as e^(x - max) factor - w spread scale, but for
    the target's own element."""
    gap = logit - max
    at = exp_nonpositive(gap)
    # What all but the largest e^(x - max), which is 1, add up to: keeps the digits of a small loss.
    log_sum = log1p_finite((sum + (at.to(sum.dtype) - 1.0)).to(at.dtype))
    sum = sum.to(at.dtype)
    mass = keep * weight
    loss = mass * (log_sum - gap)
    own = 0.0 - sum
    if SMOOTH:
        soft = spread * weights
        loss = loss + spread * (weights * log_sum - dot)
        own = soft * at - mass * sum
        mass = mass + soft
        own = tl.where(mass == 0.0, 0.0, divide(own, mass))
    factor = divide(mass * scale, sum + at)
    at_target = own * factor
    if SMOOTH:
        at_target = at_target - weight * (spread * scale)
    return loss, factor, at_target
