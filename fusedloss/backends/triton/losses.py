"""The maths of csrc/math, mirrored: the pointwise losses, and a row of cross-entropy.

All numbers of a call are of one type, float32 or float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import clamp, clamp_min, divide, exp, exp_nonpositive, log, log1p_finite, xlogy

# ---- pointwise -----------------------------------------------------------------------------------
# A loss is a jit function of one element,
#
#     loss(*inputs, *parameters) -> value, slope, ...  [divisor]
#
# of blocks of numbers of one type, and gives blocks of that type: the value, and its derivatives by
# the first inputs. The inputs are mostly input and target; parameters are numbers, known at run
# time. The engine multiplies by weight, upstream gradient and what a mean divides by.
# A derivative that is a quotient may come with its divisor as a third result: divided last, as in
# torch, a target of 0 or 1 costs one rounding less.


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
    return (y - 1.0) * log_1_x - y * log_x, x - y, divisor


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
    return 0.0 - y * tl.log(p), tl.where(inside, 0.0 - y, tl.where(x == x, 0.0, x)), p


@triton.jit
def _soft_margin(x, y):
    z = x * y
    e = exp_nonpositive(-tl.abs(z))
    slope = divide(tl.where(z < 0.0, 1.0, e), 1.0 + e)
    return log1p_finite(e) + tl.where(z < 0.0, -z, 0.0), -y * slope


@triton.jit
def _hinge_embedding(x, y, margin):
    gap = margin - x
    similar, different = y == 1.0, y == -1.0
    value = tl.where(similar, 0.0, clamp_min(gap, 0.0)) + tl.where(different, 0.0, x)
    slope = tl.where(different, 0.0, 1.0) - tl.where(similar, 0.0, tl.where(gap >= 0.0, 1.0, 0.0))
    return value, slope.to(x.dtype)


@triton.jit
def _margin_ranking(a, b, y, margin):
    gap = margin - y * (a - b)
    slope = tl.where(gap >= 0.0, y, 0.0)
    return clamp_min(gap, 0.0), -slope, slope


@triton.jit
def _kl_div(x, y):
    return xlogy(y, y) - y * x, -y


@triton.jit
def _kl_div_log_target(x, log_y):
    y = exp(log_y)
    return y * (log_y - x), -y


@triton.jit
def _stirling(y, full):
    series = y * log(y) - y + 0.5 * log(6.283185307179586 * y)
    return tl.where(y > 1.0, tl.where(full != 0.0, series, 0.0), 0.0)


@triton.jit
def _poisson_nll(x, y, eps, full):
    rate = x + eps
    return x - y * log(rate) + _stirling(y, full), 1.0 - divide(y, rate)


@triton.jit
def _poisson_nll_log_input(x, y, eps, full):
    rate = exp(x)
    return rate - y * x + _stirling(y, full), rate - y


@triton.jit
def _gaussian_nll(x, y, variance, eps, full):
    v = clamp_min(variance, eps)
    d = x - y
    slope = divide(d, v)
    value = 0.5 * (log(v) + d * slope) + 0.91893853320467274 * full
    return value, slope, -slope, divide(0.5 * (1.0 - d * slope), v)


@dataclass(frozen=True)
class PointwiseLoss:
    """A loss, and what an engine must know of it; as in csrc/math/eval.h."""

    function: Any
    mean: str = "elements"  # what reduction "mean" divides by: or "weights", or "rows"
    inputs: int = 2
    gradients: int = 1  # for how many of the inputs, from the first on, it gives a derivative
    symmetric: bool = False  # in input and target: the value is the same, the slope opposite
    domain: str = ""  # "unit_interval": of input and target; "variance": of the third input
    parameters: int = 0  # how many it takes
    slope_unit: float = 1.0  # what its slopes are to be multiplied by
    quotient: bool = False  # it also gives the divisor of its slope


POINTWISE = {
    "mse_loss": PointwiseLoss(_mse, mean="weights", slope_unit=2.0, symmetric=True),
    "l1_loss": PointwiseLoss(_l1, mean="weights", symmetric=True),
    "smooth_l1_loss": PointwiseLoss(_smooth_l1, parameters=1, symmetric=True),
    "huber_loss": PointwiseLoss(_huber, parameters=1, symmetric=True),
    "binary_cross_entropy": PointwiseLoss(_bce, domain="unit_interval", quotient=True),
    "binary_cross_entropy_with_logits": PointwiseLoss(_bce_with_logits),
    "binary_cross_entropy_with_logits_pos_weight": PointwiseLoss(
        _bce_with_logits_pos_weight, inputs=3
    ),
    "soft_margin_loss": PointwiseLoss(_soft_margin),
    "hinge_embedding_loss": PointwiseLoss(_hinge_embedding, parameters=1),
    "margin_ranking_loss": PointwiseLoss(_margin_ranking, inputs=3, gradients=2, parameters=1),
    "kl_div": PointwiseLoss(_kl_div),
    "kl_div_log_target": PointwiseLoss(_kl_div_log_target),
    "poisson_nll_loss": PointwiseLoss(_poisson_nll, parameters=2),
    "poisson_nll_loss_log_input": PointwiseLoss(_poisson_nll_log_input, parameters=2),
    "gaussian_nll_loss": PointwiseLoss(
        _gaussian_nll, inputs=3, gradients=3, parameters=2, domain="variance"
    ),
    "log_loss": PointwiseLoss(_log_loss, mean="rows", parameters=1, quotient=True),
}


# ---- losses over rows ----------------------------------------------------------------------------
# A row loss is a state, what the classes of a tile add up to (reduce), how two states merge, and the
# loss and the slope of a complete row (finish), from which each class gets its gradient. Numbers of
# a row are blocks of rows; x and q are blocks of rows by classes.
#
# Cross-entropy, as in csrc/math/row_losses.h: q is None where no class counts but the target's.


class SoftmaxState(NamedTuple):
    """What some classes of a row add up to."""

    max: Any  # the largest logit, but for class indices without the target's
    sum: Any  # of e^(x - max), over the same classes
    weighted_logits: Any  # of q (x - max)
    target_mass: Any  # of q


class Slope(NamedTuple):
    """What the gradient of a row is made of."""

    max: Any
    factor: Any  # of e^(x - max)
    scale: Any  # of -q
    target_gradient: Any  # for class indices: of the target class


@triton.jit
def finite_max(max):
    """The max to subtract: 0 for a row that is all -inf, where x - max would be nan."""
    return tl.where(max == float("-inf"), 0.0, max)


@triton.jit
def empty_state(ROWS: tl.constexpr, SUMS_TARGETS: tl.constexpr, T: tl.constexpr):
    zero = tl.zeros([ROWS], T)
    sum = zero
    if SUMS_TARGETS:
        sum = zero.to(tl.float64)
    return SoftmaxState(tl.full([ROWS], float("-inf"), T), sum, zero, zero)


@triton.jit
def exp_of_logit(x, NARROW: tl.constexpr):
    """e^x for x in [-inf, 0] or nan. NARROW: for the logits and gradients of a two-byte type, which
    cannot show an error of |x| roundings of float32."""
    if NARROW:
        return tl.exp2(x * 1.4426950408889634)
    else:
        return exp_nonpositive(x)


@triton.jit
def reduce(x, others, q, inside, NARROW: tl.constexpr):
    """The state, and e^(others - max). others: x, but for class indices -inf for the target, which then
    stays out of max and sum."""
    max = tl.max(others, 1)
    top = finite_max(max)[:, None]
    e = exp_of_logit(others - top, NARROW)
    terms = e
    weighted_logits = tl.zeros_like(max)
    target_mass = tl.zeros_like(max)
    if q is not None:
        # The loss of a row that is sure of another class than its target needs the digits of what
        # the others, small beside it, add up to.
        terms = e.to(tl.float64)
        weighted_logits = tl.sum(tl.where(inside, q * (x - top), 0.0), 1)
        target_mass = tl.sum(q, 1)
    return SoftmaxState(max, tl.sum(terms, 1), weighted_logits, target_mass), e


@triton.jit
def rescale(state, max):
    """The state, measured from a larger max."""
    shift = finite_max(state.max) - finite_max(max)
    return SoftmaxState(
        max,
        state.sum * exp_nonpositive(state.max - finite_max(max)),  # 0 where state.max is -inf
        state.weighted_logits + state.target_mass * shift,
        state.target_mass,
    )


@triton.jit
def merge(a, b):
    max = tl.maximum(a.max, b.max)
    a = rescale(a, max)
    b = rescale(b, max)
    return SoftmaxState(
        max,
        a.sum + b.sum,
        a.weighted_logits + b.weighted_logits,
        a.target_mass + b.target_mass,
    )


@triton.jit
def finish_probabilities(state, scale):
    """The loss and slope of rows whose targets are class probabilities."""
    mass = state.target_mass
    sum = state.sum.to(mass.dtype)
    log_sum = log1p_finite((state.sum - 1.0).to(mass.dtype))
    loss = mass * log_sum - state.weighted_logits
    return loss, Slope(state.max, divide(mass * scale, sum), scale, scale)


@triton.jit
def finish_indices(state, logit, weight, scale, smoothing, SMOOTH: tl.constexpr):
    """The loss and slope of rows whose targets are class indices, with the target's logit and
    weight."""
    state = rescale(state, tl.maximum(state.max, logit))
    target_gap = logit - state.max
    target_exp = exp_nonpositive(target_gap)
    T: tl.constexpr = target_exp.dtype
    # What all e^(x - max) but the largest, which is 1, add up to: keeps the digits of a small loss.
    log_sum = log1p_finite((state.sum + (target_exp.to(state.sum.dtype) - 1.0)).to(T))
    sum = state.sum.to(T)
    target_mass = smoothing.confidence * weight
    loss = target_mass * (log_sum - target_gap)
    target_term = 0.0 - sum
    class_scale = smoothing.eps_per_class * scale
    if SMOOTH:
        weights = smoothing.weight_sum
        loss = loss + smoothing.eps_per_class * (weights * log_sum - state.weighted_logits)
        soft = smoothing.eps_per_class * weights
        target_term = soft * target_exp - target_mass * sum
        target_mass = target_mass + soft
        target_term = tl.where(target_mass == 0.0, 0.0, divide(target_term, target_mass))
    factor = divide(target_mass * scale, sum + target_exp)
    target_gradient = target_term * factor
    if SMOOTH:
        target_gradient = target_gradient - weight * class_scale
    return loss, Slope(state.max, factor, class_scale, target_gradient)


@triton.jit
def for_exponentials(slope, max):
    """The slope of a row whose exponentials are e^(x - max), as reduce() leaves them."""
    factor = slope.factor * exp_nonpositive(max - slope.max)
    return Slope(max, factor, slope.scale, slope.target_gradient)


@triton.jit
def gradient(slope, e, q):
    """e: e^(x - slope.max)."""
    g = e * slope.factor[:, None]
    if q is not None:
        g = g - q * slope.scale[:, None]
    return g
