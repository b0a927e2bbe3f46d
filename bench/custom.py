"""Losses of one's own against the same line in eager PyTorch and in torch.compile, on the CPU.

    python -m bench.custom [POWER ...]

Forward and backward of 2^POWER float32 elements, the gradient fresh each time, medians of
interleaved repeats. The limit is torch.add(x, y) into fresh memory, which moves as many bytes as
reading both operands and writing the gradient.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
from fusedloss import math as fm
from fusedloss.custom import PointwiseLoss


@fusedloss.pointwise_loss
def charbonnier(input, target, *, eps=1e-3):  # type: ignore[no-untyped-def]
    return fm.sqrt((input - target) ** 2 + eps**2)


@fusedloss.pointwise_loss
def geman_mcclure(input, target, *, c=1.0):  # type: ignore[no-untyped-def]
    square = ((input - target) / c) ** 2
    return square / (1 + square)


@fusedloss.pointwise_loss
def tukey(input, target, *, c=4.685):  # type: ignore[no-untyped-def]
    d = (input - target) / c
    return c**2 / 6 * fm.where(fm.abs(d) <= 1, 1 - (1 - d**2) ** 3, 1.0)


@fusedloss.pointwise_loss
def cauchy(input, target, *, c=1.0):  # type: ignore[no-untyped-def]
    return c**2 / 2 * fm.log1p(((input - target) / c) ** 2)


@fusedloss.pointwise_loss
def welsch(input, target, *, c=1.0):  # type: ignore[no-untyped-def]
    return c**2 / 2 * (1 - fm.exp(-(((input - target) / c) ** 2)))


@fusedloss.pointwise_loss
def focal(input, target, *, gamma=2.0, alpha=0.25):  # type: ignore[no-untyped-def]
    hit = -alpha * fm.sigmoid(-input) ** gamma * fm.log_sigmoid(input)
    miss = -(1 - alpha) * fm.sigmoid(input) ** gamma * fm.log_sigmoid(-input)
    return target * hit + (1 - target) * miss


def _tukey(x: Tensor, y: Tensor) -> Tensor:
    d = (x - y) / 4.685
    one = torch.ones((), dtype=x.dtype)
    return 4.685**2 / 6 * torch.where(d.abs() <= 1, 1 - (1 - d**2) ** 3, one)


def _geman_mcclure(x: Tensor, y: Tensor) -> Tensor:
    square = (x - y) ** 2
    return square / (1 + square)


def _focal(x: Tensor, y: Tensor) -> Tensor:
    hit = -0.25 * torch.sigmoid(-x) ** 2 * F.logsigmoid(x)
    miss = -0.75 * torch.sigmoid(x) ** 2 * F.logsigmoid(-x)
    return y * hit + (1 - y) * miss


@dataclass(frozen=True)
class Case:
    """A loss, the same line in PyTorch, and how many times the limit it may take."""

    loss: PointwiseLoss
    eager: Callable[[Tensor, Tensor], Tensor]
    allowed: float


RATIONAL, TRANSCENDENTAL = 1.5, 3.0
CASES = (
    Case(charbonnier, lambda x, y: ((x - y) ** 2 + 1e-6).sqrt(), RATIONAL),
    Case(geman_mcclure, _geman_mcclure, RATIONAL),
    Case(tukey, _tukey, RATIONAL),
    Case(cauchy, lambda x, y: 0.5 * torch.log1p((x - y) ** 2), TRANSCENDENTAL),
    Case(welsch, lambda x, y: 0.5 * (1 - torch.exp(-((x - y) ** 2))), TRANSCENDENTAL),
    Case(focal, _focal, TRANSCENDENTAL),
)


def measure(power: int, repeats: int) -> None:
    x = torch.randn(1 << power).requires_grad_()
    y = (torch.rand(1 << power) < 0.5).float()

    def trained(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(x, y), x)

    print(f"2^{power} float32 elements, {torch.get_num_threads()} threads; times the limit's")
    print(
        f"{'loss':<14}{'limit':>10}{'ours':>8}{'eager':>8}{'compile':>9}   eager/ours compile/ours"
    )
    for case in CASES:

        def eager(a: Tensor, b: Tensor, case: Case = case) -> Tensor:
            return case.eager(a, b).mean()

        detached = x.detach()
        runs: list[Callable[[], Any]] = [
            lambda detached=detached: torch.add(detached, y),  # type: ignore[misc]
            trained(case.loss),
            trained(eager),
            trained(torch.compile(eager)),
        ]
        times: list[list[float]] = [[] for _ in runs]
        for repeat in range(repeats + 3):
            for run, took in zip(runs, times, strict=True):
                started = time.perf_counter()
                run()
                if repeat >= 3:
                    took.append(time.perf_counter() - started)
        limit, ours, plain, compiled = map(statistics.median, times)
        mark = "" if ours <= case.allowed * limit else f"   over {case.allowed:g}"
        print(
            f"{case.loss.__name__:<14}{limit * 1e3:>7.3f} ms{ours / limit:>8.2f}"
            f"{plain / limit:>8.2f}{compiled / limit:>9.2f}{plain / ours:>13.2f}"
            f"{compiled / ours:>13.2f}{mark}"
        )


if __name__ == "__main__":
    for argument in sys.argv[1:] or ("20", "24"):
        measure(int(argument), 41 if int(argument) < 22 else 11)
