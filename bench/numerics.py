"""The largest error of every loss and dtype, ours and torch's: `python -m bench numerics`.

The truth is computed in x86's 80-bit floating point, which has 11 bits more than float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
UPSTREAM = 1000 / 3  # a loss scale, say; rounded to the dtype
SEEDS = 3
ELEMENTS, ROWS, CLASSES = 250_000, 512, 1000


def _mse(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    return (x - y) ** 2, 2 * (x - y)


def _l1(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    return np.abs(x - y), np.sign(x - y)


def _huber(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    """Smooth L1 too, at beta 1 and delta 1."""
    d = x - y
    slope = np.clip(d, -1, 1)
    return slope * (d - slope / 2), slope


def _bce(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    return -(y * np.log(x) + (1 - y) * np.log1p(-x)), (x - y) / (x * (1 - x))


def _bce_with_logits(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    """Each term is positive, so that none cancels another."""
    positive, negative = np.logaddexp(0, -x), np.logaddexp(0, x)
    slope = (1 - y) / (1 + np.exp(-x)) - y / (1 + np.exp(x))
    return y * positive + (1 - y) * negative, slope


def _cross_entropy(x: Wide, y: npt.NDArray[np.int64]) -> tuple[Wide, Wide]:
    rows = np.arange(len(y))
    e = np.exp(x - x.max(1, keepdims=True))
    chosen = e[rows, y].copy()
    total = e.sum(1)
    e[rows, y] = 0
    # 1 - p of the target's class as the sum of the others, of which none is lost.
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
    """Few classes: most of many would be below bfloat16's eps."""
    x = torch.randn(ELEMENTS // 10, 10, generator=generator, dtype=torch.float64)
    return x.softmax(1), torch.randint(10, (ELEMENTS // 10,), generator=generator)


@dataclass(frozen=True)
class Loss:
    name: str
    draw: Draw
    truth: Formula
    eager: Callable[..., Tensor]


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
    """The largest distance, in units in the last place of the truth in the result's dtype."""
    info = torch.finfo(result.dtype)
    _, exponent = np.frexp(truth)
    spacing = np.ldexp(np.longdouble(info.eps), exponent - 1)
    smallest = np.longdouble(info.smallest_normal) * np.longdouble(info.eps)
    spacing = np.where(truth == 0, smallest, np.maximum(spacing, smallest))
    return float(np.max(np.abs(wide(result) - truth) / spacing))


def errors(
    call: Callable[..., Tensor], x: Tensor, y: Tensor, value: Wide, slope: Wide
) -> dict[str, float]:
    """The three columns of the table for one draw."""
    upstream = torch.tensor(UPSTREAM, dtype=x.dtype)
    input = x.clone().requires_grad_()
    mean = call(input, y)
    (gradient,) = torch.autograd.grad(mean, input, upstream)
    factor = np.longdouble(upstream.double().item()) / value.size
    with torch.no_grad():
        each = call(x, y, reduction="none")
    return {
        "element": ulps(each, value),
        "mean": ulps(mean, np.asarray(value.mean())),
        "gradient": ulps(gradient, slope * factor),
    }


def measure() -> list[dict[str, Any]]:
    rows = []
    for loss in LOSSES:
        for dtype in DTYPES:
            row: dict[str, Any] = {"loss": loss.name, "dtype": str(dtype).removeprefix("torch.")}
            for seed in range(SEEDS):
                x, y = loss.draw(torch.Generator().manual_seed(seed))
                x = x.to(dtype)
                y = y.to(dtype) if y.is_floating_point() else y
                told = fusedloss.explain(getattr(FL, loss.name), x, y)
                if told.backend != "compiled":
                    sys.exit(f"{loss.name} does not run on the compiled kernels: {told}")
                target = wide(y) if y.is_floating_point() else y.numpy()
                extra = [torch.finfo(dtype).eps] if loss.truth is _log_loss else []
                truth = loss.truth(wide(x), target, *extra)
                for who, call in (("ours", getattr(FL, loss.name)), ("torch", loss.eager)):
                    worst = row.setdefault(who, {})
                    for column, error in errors(call, x, y, *truth).items():
                        worst[column] = max(worst.get(column, 0.0), error)
            rows.append(row)
    return rows


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
    rows = measure()
    results = {
        **report.environment(command("numerics", *argv), rounds=SEEDS),
        "elements": ELEMENTS,
        "rows_x_classes": [ROWS, CLASSES],
        "upstream": UPSTREAM,
        "rows": rows,
    }
    print(figures.errors(results))
    path = report.folder(arguments, "cpu") / "numerics.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")
    return 0
