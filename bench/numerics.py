"""The largest error of every loss and dtype, ours and torch's: `python -m bench numerics`.

For random inputs, and for hard ones: equal terms, whose roundings all go the same way,
cancellation, and numbers near the ends of their range.

The truth is computed in x86's 80-bit floating point, which has 11 bits more than float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
import fusedloss.functional as FL

from . import figures, report
from .arguments import add_out, command
from .cases import plain_log_loss

Wide = npt.NDArray[np.longdouble]
# The value of each element or row, and the derivative with respect to the input.
Formula = Callable[..., tuple[Wide, Wide]]
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UPSTREAM = 1000 / 3  # like a loss scale; rounded to the dtype
SEEDS = 3
ELEMENTS, ROWS, CLASSES = 250_000, 512, 1000
EQUAL, MANY_CLASSES = 2**24, 32_000  # for the hard inputs


def _mse(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    return (x - y) ** 2, 2 * (x - y)


def _l1(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    return np.abs(x - y), np.sign(x - y)


def _huber(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    """Smooth L1 too, since beta and delta are 1."""
    d = x - y
    slope = np.clip(d, -1, 1)
    return slope * (d - slope / 2), slope


def _bce(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    return -(y * np.log(x) + (1 - y) * np.log1p(-x)), (x - y) / (x * (1 - x))


def _bce_with_logits(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    """Every term is positive, so none cancels another."""
    positive, negative = np.logaddexp(0, -x), np.logaddexp(0, x)
    slope = (1 - y) / (1 + np.exp(-x)) - y / (1 + np.exp(x))
    return y * positive + (1 - y) * negative, slope


def _cross_entropy(x: Wide, y: npt.NDArray[np.int64]) -> tuple[Wide, Wide]:
    rows = np.arange(len(y))
    e = np.exp(x - x.max(1, keepdims=True))
    chosen = e[rows, y].copy()
    total = e.sum(1)
    e[rows, y] = 0
    # 1 - p of the target's class is the sum of the others, so that none of them is lost.
    others = e.sum(1)
    slope = e / total[:, None]
    slope[rows, y] = -others / total
    value = np.where(chosen > others, np.log1p(others / chosen), np.log(total) - np.log(chosen))
    return value, slope


def _log_loss(x: Wide, y: npt.NDArray[np.int64], eps: float) -> tuple[Wide, Wide]:
    """Each probability is at least eps, below which the slope is 0."""
    rows = np.arange(len(y))
    p = x[rows, y]
    slope = np.zeros_like(x)
    slope[rows, y] = np.where(p < eps, 0, -1 / p)
    return -np.log(np.maximum(p, eps)), slope


def _real(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, ELEMENTS, generator=generator, dtype=torch.float64)
    return x, y


def _probability(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = torch.rand(2, ELEMENTS, generator=generator, dtype=torch.float64)
    return x * 0.98 + 0.01, y.round()


def _logit(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, ELEMENTS, generator=generator, dtype=torch.float64)
    return 4 * x, (y > 0).double()


def _classes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    return 4 * x, torch.randint(CLASSES, (ROWS,), generator=generator)


def _distribution(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Few classes: with many, most probabilities would be below bfloat16's eps."""
    x = torch.randn(ELEMENTS // 10, 10, generator=generator, dtype=torch.float64)
    return x.softmax(1), torch.randint(10, (ELEMENTS // 10,), generator=generator)


@dataclass(frozen=True)
class Loss:
    name: str
    draw: Draw
    truth: Formula
    eager: Callable[..., Tensor]


@dataclass(frozen=True)
class Truth:
    """A loss's results for an input. A value that all elements share is stored once."""

    each: Wide  # with reduction="none"
    mean: Wide
    gradient: Wide  # of the mean

    @staticmethod
    def plain(value: Wide, slope: Wide) -> Truth:
        """For losses in which all elements or rows count alike."""
        return Truth(value, np.asarray(value.mean()), slope / value.size)


@dataclass(frozen=True)
class Hard:
    """A hard input: its tensors, the loss's options, and the exact results."""

    title: str
    loss: str
    dtypes: tuple[torch.dtype, ...]
    draw: Callable[[torch.dtype], tuple[Tensor, Tensor, dict[str, Any], Truth]]


def _all_equal(formula: Formula, x: float, y: float, dtype: torch.dtype) -> Any:
    one = torch.tensor([[x], [y]], dtype=dtype)
    value, slope = (np.asarray(part[0]) for part in formula(*wide(one)))
    return *one.expand(2, EQUAL).contiguous(), {}, Truth(value, value, slope / EQUAL)


def _far_apart(dtype: torch.dtype) -> Any:
    """Twice the difference is out of range, but the gradient of the mean is not."""
    x = torch.linspace(-0.75, 0.75, 1000, dtype=torch.float64) * torch.finfo(dtype).max
    x, y = x.to(dtype), torch.zeros(1000, dtype=dtype)
    return x, y, {}, Truth.plain(*_mse(wide(x), wide(y)))


def _confident(dtype: torch.dtype) -> Any:
    x, y = _classes(torch.Generator().manual_seed(0))
    x = x.scatter_(1, y[:, None], 40.0).to(dtype)
    return x, y, {}, Truth.plain(*_cross_entropy(wide(x), y.numpy()))


def _equal_classes(dtype: torch.dtype) -> Any:
    """A confident class beside many that are all equal, over K dimensions. How their roundings add
    up depends on their exponential, so each row has another one."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 32, MANY_CLASSES)
    y = torch.randint(MANY_CLASSES, shape[:2], generator=generator)
    logits = torch.randn(*shape[:2], 1, generator=generator).expand(shape).to(dtype)
    logits = logits.scatter(2, y[..., None], 20.0)
    value, slope = _cross_entropy(wide(logits).reshape(-1, MANY_CLASSES), y.flatten().numpy())
    x = logits.movedim(2, 1).contiguous()
    slope = np.moveaxis(slope.reshape(shape), 2, 1)
    return x, y, {}, Truth.plain(value.reshape(shape[:2]), slope)


def _heavy_class(dtype: torch.dtype) -> Any:
    """Label smoothing, with one class that weighs more than all others together."""
    x, y = _classes(torch.Generator().manual_seed(0))
    x = x.to(dtype)
    weight = torch.ones(CLASSES, dtype=dtype)
    weight[0] = 1e4
    smoothing = 0.1
    logits, w, t = wide(x), wide(weight), y.numpy()
    share = np.longdouble(smoothing) / CLASSES
    shifted = logits - logits.max(1, keepdims=True)
    total = np.exp(shifted).sum(1, keepdims=True)
    plain, slope = _cross_entropy(logits, t)
    own = (1 - np.longdouble(smoothing)) * w[t]
    each = own * plain + share * ((np.log(total) - shifted) * w).sum(1)
    slope = own[:, None] * slope + share * (w.sum() * np.exp(shifted) / total - w)
    whole = w[t].sum()
    options = {"weight": weight, "label_smoothing": smoothing}
    return x, y, options, Truth(each, np.asarray(each.sum() / whole), slope / whole)


_REAL = (torch.float64, torch.float32)
_EQUAL_TERMS: tuple[tuple[str, Formula, float, float], ...] = (
    ("mse_loss", _mse, 1.1, 0),
    ("l1_loss", _l1, 1.1, 0),
    ("smooth_l1_loss", _huber, 1.1, 0),
    ("huber_loss", _huber, 1.1, 0),
    ("binary_cross_entropy", _bce, 0.5, 0),
    ("binary_cross_entropy_with_logits", _bce_with_logits, 0, 0),
)
HARD = (
    *(
        Hard(f"2^24 times {x:g}, target {y:g}", name, _REAL, partial(_all_equal, formula, x, y))
        for name, formula, x, y in _EQUAL_TERMS
    ),
    Hard("differences of up to 0.75 of the largest number", "mse_loss", DTYPES, _far_apart),
    Hard(
        "confident rows", "cross_entropy", DTYPES[:3], _confident
    ),  # float16 has no such small loss
    Hard("confident rows of 32,000 classes, K dimensions", "cross_entropy", _REAL, _equal_classes),
    Hard("label smoothing, one class of weight 10,000", "cross_entropy", _REAL, _heavy_class),
)


LOSSES = (
    Loss("mse_loss", _real, _mse, F.mse_loss),
    Loss("l1_loss", _real, _l1, F.l1_loss),
    Loss("smooth_l1_loss", _real, _huber, F.smooth_l1_loss),
    Loss("huber_loss", _real, _huber, F.huber_loss),
    Loss("binary_cross_entropy", _probability, _bce, F.binary_cross_entropy),
    Loss("binary_cross_entropy_with_logits", _logit, _bce_with_logits,
         F.binary_cross_entropy_with_logits),
    Loss("cross_entropy", _classes, _cross_entropy, F.cross_entropy),
    Loss("log_loss", _distribution, _log_loss, plain_log_loss),
)  # fmt: skip


def wide(t: Tensor) -> Wide:
    return t.detach().double().numpy().astype(np.longdouble)


def ulps(result: Tensor, truth: Wide) -> float:
    """The largest distance from the truth, in its units in the last place in the result's dtype."""
    info = torch.finfo(result.dtype)
    if truth.ndim == 0:
        result = torch.stack(result.aminmax())  # one of these is the farthest away
    got = wide(result)
    _, exponent = np.frexp(truth)
    spacing = np.ldexp(np.longdouble(info.eps), exponent - 1)
    smallest = np.longdouble(info.smallest_normal) * np.longdouble(info.eps)
    spacing = np.where(truth == 0, smallest, np.maximum(spacing, smallest))
    distance = np.abs(got - truth) / spacing
    distance[np.isinf(got) & (np.sign(got) * truth > info.max)] = 0  # as rounded
    distance[np.isnan(got)] = np.inf
    return float(np.max(distance))


def errors(
    call: Callable[..., Tensor], x: Tensor, y: Tensor, truth: Truth, **options: Any
) -> dict[str, float]:
    """The three columns of the table for one draw."""
    upstream = torch.tensor(UPSTREAM, dtype=x.dtype)
    input = x.clone().requires_grad_()
    mean = call(input, y, **options)
    (gradient,) = torch.autograd.grad(mean, input, upstream)
    with torch.no_grad():
        each = call(x, y, reduction="none", **options)
    return {
        "element": ulps(each, truth.each),
        "mean": ulps(mean, truth.mean),
        "gradient": ulps(gradient, truth.gradient * np.longdouble(upstream.double().item())),
    }


def worst(loss: Loss, draws: Iterable[tuple[Tensor, Tensor, dict[str, Any], Truth]]) -> Any:
    """A row of the table: the largest errors of ours and of torch's over the draws."""
    ours = getattr(FL, loss.name)
    row: dict[str, Any] = {"loss": loss.name}
    for x, y, options, truth in draws:
        row["dtype"] = str(x.dtype).removeprefix("torch.")
        told = fusedloss.explain(ours, x, y, **options)
        if told.backend != "compiled":
            sys.exit(f"{loss.name} does not run on the compiled kernels: {told}")
        for who, call in (("ours", ours), ("torch", loss.eager)):
            largest = row.setdefault(who, {})
            for column, error in errors(call, x, y, truth, **options).items():
                largest[column] = max(largest.get(column, 0.0), error)
    return row


def random_draws(loss: Loss, dtype: torch.dtype) -> Iterator[Any]:
    for seed in range(SEEDS):
        x, y = loss.draw(torch.Generator().manual_seed(seed))
        x = x.to(dtype)
        y = y.to(dtype) if y.is_floating_point() else y
        target = wide(y) if y.is_floating_point() else y.numpy()
        extra = [torch.finfo(dtype).eps] if loss.truth is _log_loss else []
        yield x, y, {}, Truth.plain(*loss.truth(wide(x), target, *extra))


def measure() -> list[dict[str, Any]]:
    return [worst(loss, random_draws(loss, dtype)) for loss in LOSSES for dtype in DTYPES]


def measure_hard() -> list[dict[str, Any]]:
    losses = {loss.name: loss for loss in LOSSES}
    return [
        {"input": hard.title, **worst(losses[hard.loss], [hard.draw(dtype)])}
        for hard in HARD
        for dtype in hard.dtypes
    ]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench numerics",
        description="Measure the largest error of every loss and dtype, in units in the last place "
        "(ULP), beside torch's; print the table and write it as JSON.",
    )
    add_out(parser)
    arguments = parser.parse_args(argv)
    if np.finfo(np.longdouble).nmant < 63:
        parser.error("numpy's longdouble is no wider than float64 here")
    rows, hard = measure(), measure_hard()
    results = {
        **report.environment(command("numerics", *argv), rounds=SEEDS),
        "elements": ELEMENTS,
        "rows_x_classes": [ROWS, CLASSES],
        "upstream": UPSTREAM,
        "rows": rows,
        "hard": hard,
    }
    print(figures.errors(results), figures.errors(results, "hard"), sep="")
    path = report.folder(arguments, "cpu") / "numerics.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")
    return 0
