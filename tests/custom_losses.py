"""Custom losses, each with functions of fusedloss.math and as plain PyTorch, for the tests and for
docs/gallery.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
from cases import DEVICE
from fusedloss import math as fm
from fusedloss.custom import PointwiseLoss, primitives


@fusedloss.pointwise_loss
def log_cosh(input, target):  # type: ignore[no-untyped-def]
    d = input - target
    return d + fm.softplus(-2 * d) - math.log(2)


@fusedloss.pointwise_loss
def charbonnier(input, target, *, eps=1e-3):  # type: ignore[no-untyped-def]
    return fm.sqrt((input - target) ** 2 + eps**2)


@fusedloss.pointwise_loss
def cauchy(input, target, *, c=1.0):  # type: ignore[no-untyped-def]
    return c**2 / 2 * fm.log1p(((input - target) / c) ** 2)


@fusedloss.pointwise_loss
def welsch(input, target, *, c=2.985):  # type: ignore[no-untyped-def]
    return -(c**2) / 2 * fm.expm1(-(((input - target) / c) ** 2))


@fusedloss.pointwise_loss
def quantile(input, target, *, q=0.5):  # type: ignore[no-untyped-def]
    d = target - input
    return fm.maximum(q * d, (q - 1) * d)


@fusedloss.pointwise_loss
def smooth_quantile(input, target, *, q=0.5, width=0.1):  # type: ignore[no-untyped-def]
    d = target - input
    return q * d + width * fm.softplus(-d / width)


@fusedloss.pointwise_loss
def asymmetric(input, target, *, under=4.0, over=1.0):  # type: ignore[no-untyped-def]
    d = target - input
    return fm.where(d > 0, under, over) * d**2


@fusedloss.pointwise_loss
def poisson(input, target):  # type: ignore[no-untyped-def]
    return fm.exp(input) - target * input


@fusedloss.pointwise_loss
def focal(input, target, *, gamma=2.0, alpha=0.25):  # type: ignore[no-untyped-def]
    hit = -alpha * fm.sigmoid(-input) ** gamma * fm.log_sigmoid(input)
    miss = -(1 - alpha) * fm.sigmoid(input) ** gamma * fm.log_sigmoid(-input)
    return target * hit + (1 - target) * miss


@fusedloss.pointwise_loss
def masked_focal(input, target, mask, *, gamma=2.0, alpha=0.25):  # type: ignore[no-untyped-def]
    hit = -alpha * fm.sigmoid(-input) ** gamma * fm.log_sigmoid(input)
    miss = -(1 - alpha) * fm.sigmoid(input) ** gamma * fm.log_sigmoid(-input)
    return fm.where(mask > 0.5, target * hit + (1 - target) * miss, 0.0)


@fusedloss.pointwise_loss
def sigmoid_focal(input, target, *, alpha=0.25, gamma=2.0):  # type: ignore[no-untyped-def]
    entropy = target * fm.softplus(-input) + (1 - target) * fm.softplus(input)
    missed = target * fm.sigmoid(-input) + (1 - target) * fm.sigmoid(input)
    share = fm.where(alpha < 0, 1.0, alpha * target + (1 - alpha) * (1 - target))
    return share * missed**gamma * entropy


@fusedloss.pointwise_loss
def gan_hinge(score, *, sign=1.0):  # type: ignore[no-untyped-def]
    return fm.relu(1 - sign * score)


@fusedloss.pointwise_loss
def gaussian_nll(mean, target, variance):  # type: ignore[no-untyped-def]
    return 0.5 * (fm.log(variance) + (target - mean) ** 2 / variance)


@fusedloss.pointwise_loss
def log_gaussian_nll(mean, target, logvar):  # type: ignore[no-untyped-def]
    return 0.5 * (logvar + (target - mean) ** 2 * fm.exp(-logvar))


@fusedloss.pointwise_loss
def beta_nll(mean, target, variance, *, beta=0.5):  # type: ignore[no-untyped-def]
    nll = 0.5 * (fm.log(variance) + (target - mean) ** 2 / variance)
    return fm.detach(variance) ** beta * nll


@fusedloss.pointwise_loss
def student_t(location, target, scale, *, df=4.0):  # type: ignore[no-untyped-def]
    z = (target - location) / scale
    normalizer = fm.lgamma(df / 2) - fm.lgamma((df + 1) / 2) + fm.log(math.pi * df) / 2
    return normalizer + fm.log(scale) + (df + 1) / 2 * fm.log1p(z**2 / df)


@fusedloss.pointwise_loss
def tukey(input, target, *, c=4.685):  # type: ignore[no-untyped-def]
    d = (input - target) / c
    return c**2 / 6 * fm.where(fm.abs(d) <= 1, 1 - (1 - d**2) ** 3, 1.0)


@fusedloss.pointwise_loss
def gaussian_kl(mu, logvar):  # type: ignore[no-untyped-def]
    """The Kullback-Leibler divergence of a VAE, from a standard normal distribution."""
    return 0.5 * (mu**2 + fm.expm1(logvar) - logvar)


@fusedloss.pointwise_loss
def every_word(input, target, *, scale=1.5, gamma=2.3):  # type: ignore[no-untyped-def]
    """Every function of fusedloss.math, to be compiled once."""
    x, y = input, target
    inside = ((x > 0) & (y <= scale)) | ~fm.equal(x, y) | (fm.not_equal(x, 1) & (y < 2))
    inside |= fm.is_nan(x) & (y == scale)
    smooth = fm.exp(-x) + fm.expm1(x) + fm.tanh(x) + fm.erf(x) + fm.sin(x) * fm.cos(y)
    smooth += fm.erfc(y) * fm.lgamma(x) - fm.detach(x) * fm.digamma(y)
    of_logits = fm.sigmoid(x) + fm.log_sigmoid(y) + fm.softplus(x * y) + fm.logaddexp(x, y)
    logarithms = fm.log(y) + fm.log1p(x) + fm.xlogy(x, y) / scale
    powers = fm.sqrt(x) + x**gamma + fm.pow(x, y) + x**1.5 / y**2 + fm.sigmoid(y) ** 2.7
    pieces = fm.abs(x) + fm.sign(y) * fm.relu(x) + fm.clamp(x, -1, y)
    pieces += fm.maximum(x, scale) * fm.minimum(x, y)
    return fm.where(inside, smooth + of_logits + logarithms + powers, pieces)


@dataclass(frozen=True)
class CustomCase:
    loss: PointwiseLoss
    eager: Callable[..., Tensor]  # the losses of the elements
    options: dict[str, float] = field(default_factory=dict)
    binary: tuple[int, ...] = ()  # places of inputs that are 0 or 1
    positive: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.loss.__name__

    @property
    def detaches(self) -> bool:
        """Whether its gradient is not the derivative of its value."""
        return bool(self.loss._traced.value.atoms(primitives.Detach))

    def sample(self, dtype: torch.dtype, shape: Any = (4099,), seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.loss.inputs, *shape)
        with torch.device("cpu"):
            inputs = list(torch.randn(shape, generator=generator, dtype=torch.float64) * 2)
        for place in self.binary:
            inputs[place] = (inputs[place] > 0).double()
        for place in self.positive:
            inputs[place] = inputs[place].abs() + 0.1
        return [t.to(DEVICE, dtype) for t in inputs]


def _focal(x: Tensor, y: Tensor, gamma: float, alpha: float) -> Tensor:
    hit = -alpha * torch.sigmoid(-x) ** gamma * F.logsigmoid(x)
    miss = -(1 - alpha) * torch.sigmoid(x) ** gamma * F.logsigmoid(-x)
    return y * hit + (1 - y) * miss


def _sigmoid_focal(x: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    """As torchvision.ops.sigmoid_focal_loss defines it."""
    p = torch.sigmoid(x)
    p_of_target = p * y + (1 - p) * (1 - y)
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none") * (1 - p_of_target) ** gamma
    return loss if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * loss


def _gaussian_nll(x: Tensor, y: Tensor, variance: Tensor) -> Tensor:
    return F.gaussian_nll_loss(x, y, variance, reduction="none", eps=0)


def _tukey(x: Tensor, y: Tensor, c: float) -> Tensor:
    d = (x - y) / c
    return c**2 / 6 * torch.where(d.abs() <= 1, 1 - (1 - d**2) ** 3, torch.ones_like(d))


def _smooth_quantile(x: Tensor, y: Tensor, q: float, width: float) -> Tensor:
    over, under = (1 - q) * (x - y), q * (y - x)
    return width * torch.logaddexp(over / width, under / width)


CASES = [
    CustomCase(log_cosh, lambda x, y: torch.logaddexp(x - y, y - x) - math.log(2)),
    CustomCase(charbonnier, lambda x, y, eps: ((x - y) ** 2 + eps**2).sqrt(), {"eps": 0.3}),
    CustomCase(cauchy, lambda x, y, c: c**2 / 2 * torch.log1p(((x - y) / c) ** 2), {"c": 0.7}),
    CustomCase(
        welsch, lambda x, y, c: c**2 / 2 * (1 - torch.exp(-(((x - y) / c) ** 2))), {"c": 2.0}
    ),
    CustomCase(quantile, lambda x, y, q: torch.maximum(q * (y - x), (q - 1) * (y - x)), {"q": 0.9}),
    CustomCase(smooth_quantile, _smooth_quantile, {"q": 0.9, "width": 0.3}),
    CustomCase(
        asymmetric,
        lambda x, y, under, over: under * F.relu(y - x) ** 2 + over * F.relu(x - y) ** 2,
        {"under": 3.0, "over": 0.5},
    ),
    CustomCase(poisson, lambda x, y: F.poisson_nll_loss(x, y, reduction="none")),
    CustomCase(focal, _focal, {"gamma": 1.5, "alpha": 0.3}, binary=(1,)),
    CustomCase(tukey, _tukey, {"c": 3.0}),
    CustomCase(gaussian_kl, lambda x, y: 0.5 * (x**2 + torch.expm1(y) - y)),
    CustomCase(
        masked_focal,
        lambda x, y, mask, **options: torch.where(mask > 0, _focal(x, y, **options), 0.0),
        {"gamma": 1.5, "alpha": 0.3},
        binary=(1, 2),
    ),
    CustomCase(sigmoid_focal, _sigmoid_focal, {"alpha": -1.0, "gamma": 1.5}, binary=(1,)),
    CustomCase(gan_hinge, lambda x, sign: F.relu(1 - sign * x), {"sign": -1.0}),
    CustomCase(gaussian_nll, _gaussian_nll, positive=(2,)),
    CustomCase(log_gaussian_nll, lambda x, y, log: _gaussian_nll(x, y, log.exp())),
    CustomCase(
        beta_nll,
        lambda x, y, v, beta: v.detach() ** beta * _gaussian_nll(x, y, v),
        {"beta": 0.8},
        positive=(2,),
    ),
    CustomCase(
        student_t,
        lambda x, y, scale, df: -torch.distributions.StudentT(df, x, scale).log_prob(y),
        {"df": 2.5},
        positive=(2,),
    ),
]


@fusedloss.pointwise_loss
def observed(input, target):  # type: ignore[no-untyped-def]
    """A root on one side only; a target of nan was not observed."""
    d = fm.relu(input - target)
    return fm.where(fm.is_nan(target), 0.0, fm.sqrt(d) + fm.log1p(d) ** 0.7)


OBSERVED = CustomCase(
    observed,
    lambda x, y: torch.where(
        y.isnan(), 0.0, torch.relu(x - y).sqrt() + torch.log1p(torch.relu(x - y)) ** 0.7
    ),
)


def one_of(formulas: Iterable[Callable[..., Any]]) -> PointwiseLoss:
    """Several formulas in one loss, so that it is compiled once; ``which`` selects one."""
    numbered = list(enumerate(formulas))

    def chosen(input, target, *, which=0.0):  # type: ignore[no-untyped-def]
        result = 0.0
        for number, formula in numbered:
            result = fm.where(which == number, formula(input, target), result)
        return result

    return fusedloss.pointwise_loss(chosen)


def _clamp(x: Tensor, low: Any, high: Any) -> Tensor:
    """torch.clamp with slope 1 at its bounds, where some releases have 0."""
    low, high = (torch.as_tensor(bound, dtype=x.dtype) for bound in (low, high))
    at_least = torch.where((x < low) | low.isnan(), low, x)
    return torch.where((at_least > high) | high.isnan(), high, at_least)


# The outer slope is infinite where the inner branch is not taken: the formula for us, and for
# PyTorch.
BRANCHES: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (lambda x, y: fm.sqrt(fm.relu(x - y)), lambda x, y: torch.relu(x - y).sqrt()),
    "clamp": (
        lambda x, y: fm.sqrt(fm.clamp(x - y, min=0)),
        lambda x, y: _clamp(x - y, 0.0, math.inf).sqrt(),
    ),
    "maximum": (
        lambda x, y: fm.sqrt(fm.maximum(x - y, 0)),
        lambda x, y: torch.maximum(x - y, torch.zeros_like(x)).sqrt(),
    ),
    "minimum": (
        lambda x, y: fm.log1p(-fm.minimum(fm.relu(x), 1)) * y,
        lambda x, y: torch.log1p(-torch.minimum(x.relu(), torch.ones_like(x))) * y,
    ),
    "of both": (lambda x, y: fm.sqrt(fm.maximum(x, y)), lambda x, y: torch.maximum(x, y).sqrt()),
    "power": (lambda x, y: fm.relu(x - y) ** 0.7, lambda x, y: torch.relu(x - y) ** 0.7),
    "power of element": (lambda x, y: fm.relu(x) ** y, lambda x, y: torch.relu(x) ** y),
    "where": (
        lambda x, y: fm.sqrt(fm.where(x - y > 0, x - y, 0)),
        lambda x, y: torch.where(x - y > 0, x - y, 0.0).sqrt(),
    ),
    "of target": (
        lambda x, y: fm.sqrt(fm.where(y > 0.5, x, y)),
        lambda x, y: torch.where(y > 0.5, x, y).sqrt(),
    ),
    "where in where": (
        lambda x, y: fm.sqrt(fm.where(x > 0, fm.where(y > 0, x * y, 0), fm.relu(y))),
        lambda x, y: torch.where(x > 0, torch.where(y > 0, x * y, 0.0), y.relu()).sqrt(),
    ),
    "sum": (
        lambda x, y: fm.sqrt(fm.relu(x) + fm.relu(y) + 2 * fm.relu(x - 1)),
        lambda x, y: (x.relu() + y.relu() + 2 * (x - 1).relu()).sqrt(),
    ),
    "product": (
        lambda x, y: fm.sqrt(x) * fm.relu(y) + fm.relu(x) * fm.relu(y),
        lambda x, y: x.sqrt() * y.relu() + x.relu() * y.relu(),
    ),
    "product inside": (
        lambda x, y: fm.sqrt(fm.where(x > 0, y, 0) * fm.sin(x)),
        lambda x, y: (torch.where(x > 0, y, 0.0) * x.sin()).sqrt(),
    ),
    "quotient": (
        lambda x, y: 1 / (1 + y * y / fm.relu(x)),
        lambda x, y: 1 / (1 + y * y / x.relu()),
    ),
    "reciprocal": (
        lambda x, y: fm.exp(-1 / fm.relu(x - y)),
        lambda x, y: torch.exp(-1 / torch.relu(x - y)),
    ),
    "whole power": (
        lambda x, y: fm.tanh(fm.relu(x - y) ** -2),
        lambda x, y: torch.tanh(torch.relu(x - y) ** -2),
    ),
    "logarithm": (
        lambda x, y: y * fm.sigmoid(fm.log(fm.relu(x))),
        lambda x, y: y * torch.sigmoid(x.relu().log()),
    ),
    "root squared": (
        lambda x, y: fm.sqrt(fm.relu(x - y)) ** 2,
        lambda x, y: torch.relu(x - y).sqrt() ** 2,
    ),
    "xlogy": (
        lambda x, y: fm.xlogy(fm.relu(x), fm.relu(y)),
        lambda x, y: torch.xlogy(x.relu(), y.relu()),
    ),
    "kink of abs": (lambda x, y: fm.sqrt(fm.abs(x - y)), lambda x, y: (x - y).abs().sqrt()),
}
any_branch = one_of(ours for ours, _ in BRANCHES.values())

# Conditions and pieces follow IEEE 754, for nan and infinities as well. The same functions take
# symbols and tensors.
OF_NAN: dict[str, Callable[[Any, Any], Any]] = {
    "greater": lambda x, y: fm.where(x > y, 1.0, 2.0),
    "not greater": lambda x, y: fm.where(~(x > y), 1.0, 2.0),
    "not less or equal": lambda x, y: fm.where(~(x <= y), 1.0, 2.0),
    "equal": lambda x, y: fm.where(fm.equal(x, y), 1.0, 2.0),
    "==": lambda x, y: fm.where(x == y, 1.0, 2.0),
    "!=": lambda x, y: fm.where(x != y, 1.0, 2.0),
    "equal to itself": lambda x, y: fm.where(fm.equal(y, y), x, 5.0),
    "differs from itself": lambda x, y: fm.where(fm.not_equal(x, x), 3.0, y),
    "at least itself": lambda x, y: fm.where(x >= x, 1.0, 2.0),  # noqa: PLR0124
    "less than itself and 1": lambda x, y: fm.where(x < x + 1, 1.0, 2.0),
    "square": lambda x, y: fm.where(x**2 >= 0, 1.0, 2.0),
    "either of all": lambda x, y: fm.where((x > 0) | (x <= 0), 1.0, 2.0),
    "neither": lambda x, y: fm.where(~((x > y) | (x < 0)) & ~(y > 0), 1.0, 2.0),
    "is_nan": lambda x, y: fm.where(fm.is_nan(x) | fm.is_nan(y), 0.0, x - y),
    "not is_nan": lambda x, y: fm.where(~fm.is_nan(x * y), x, 7.0),
    "relu": lambda x, y: fm.relu(x) + y,
    "abs": lambda x, y: fm.abs(x) + y,
    "sign": lambda x, y: fm.sign(x) + y,
    "maximum": fm.maximum,
    "minimum": fm.minimum,
    "clamp": lambda x, y: fm.clamp(x, -1, 1) + y,
    "clamp above an element": lambda x, y: fm.clamp(x, min=y),
    "clamp below an element": lambda x, y: fm.clamp(x, 0, y),
    "clamp between": lambda x, y: fm.clamp(1, x, y),
}
any_of_nan = one_of(OF_NAN.values())
