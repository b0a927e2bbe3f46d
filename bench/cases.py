"""What is measured, between whom, and what it has to reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Column:
    """A ratio of two contestants, `of` / `over`; its bar is a floor or a ceiling."""

    heading: str
    of: str
    over: str
    at_least: bool


COLUMNS = {
    "eager": Column("eager / ours", "eager", "ours", at_least=True),
    "compile": Column("torch.compile / ours", "compile", "ours", at_least=True),
    "limit": Column("ours / limit", "ours", "limit", at_least=False),
    "unit": Column("ours / ours at upstream 1", "ours", "unit", at_least=False),
    "memory": Column("ours / eager", "ours", "eager", at_least=False),
}


@dataclass(frozen=True)
class Table:
    title: str
    contestants: tuple[str, ...]
    columns: tuple[str, ...]


TABLES = {
    "speed": Table(
        "Forward + backward",
        ("eager", "compile", "ours", "limit"),
        ("eager", "compile", "limit"),
    ),
    "upstream": Table(
        "Forward + backward, upstream gradient other than 1, steady state",
        ("eager", "ours", "unit"),
        ("eager", "unit"),
    ),
    "small": Table("Forward + backward, small inputs", ("eager", "ours"), ("eager",)),
    "none": Table('Forward + backward, reduction="none"', ("eager", "ours"), ("eager",)),
    "forward": Table("Forward only, no gradient wanted", ("eager", "ours"), ("eager",)),
    "memory": Table(
        "Peak memory of forward + backward, beyond its inputs", ("eager", "ours"), ("memory",)
    ),
}

MODULES = {
    "mse_loss": "MSELoss",
    "l1_loss": "L1Loss",
    "smooth_l1_loss": "SmoothL1Loss",
    "huber_loss": "HuberLoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "binary_cross_entropy": "BCELoss",
    "cross_entropy": "CrossEntropyLoss",
}


@dataclass(frozen=True)
class Case:
    name: str
    table: str
    loss: str
    shape: tuple[int, ...]
    bars: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    probabilities: bool = False
    upstream: float = 1.0
    quick: bool = False

    @property
    def id(self) -> str:
        return f"{self.table}: {self.name}"

    @property
    def reduction(self) -> str:
        return "none" if self.table == "none" else "mean"

    @property
    def autocast(self) -> bool:
        return self.dtype != torch.float32

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The leaf and its target, the same on every call; written in place, so that making
        them leaves no mark in a process's peak memory."""
        generator = torch.Generator().manual_seed(0)
        x = torch.empty(self.shape, dtype=self.dtype)
        if self.loss == "binary_cross_entropy":
            x.uniform_(1e-3, 1 - 1e-3, generator=generator)
        else:
            x.normal_(generator=generator)
        if self.loss != "cross_entropy":
            t = torch.empty(self.shape, dtype=self.dtype)
            if self.loss.startswith("binary"):
                t.bernoulli_(0.5, generator=generator)
            else:
                t.normal_(generator=generator)
        elif self.probabilities:
            t = torch.empty(self.shape, dtype=self.dtype).uniform_(generator=generator)
            t /= t.sum(1, keepdim=True)
        else:
            t = torch.empty(self.shape[:1] + self.shape[2:], dtype=torch.int64)
            t.random_(self.shape[1], generator=generator)
        return x.requires_grad_(), t


def _bars(*values: float | None) -> dict[str, float]:
    """Bars of the speed table, in the order of its columns."""
    named = zip(TABLES["speed"].columns, values, strict=False)
    return {column: value for column, value in named if value is not None}


# loss: label, then the bars (x eager, x compile, x limit) at 2^18, 2^22 and 2^24 elements
_POINTWISE = {
    "mse_loss": ("mse", (1.8, 1.5), (2.4, 1.4, 1.25), (2.0, 1.4, 1.25)),
    "l1_loss": ("l1", (3, 1.5), (4, 1.5, 1.25), (4, 1.5, 1.25)),
    "smooth_l1_loss": ("smooth_l1", (1.6, 1.5), (2.2, 1.4, 1.4), (1.8, 1.4, 1.4)),
    "huber_loss": ("huber", (), (2.2, 1.4, 1.4), (1.8, 1.4, 1.4)),
    "binary_cross_entropy_with_logits": (
        "bce_with_logits",
        (3.5, 1.5),
        (4, 1.8, 2.4),
        (2.5, 1.8, 2.4),
    ),
    "binary_cross_entropy": ("bce", (10, 1.5), (10, 2, 3), (5, 2, 3)),
}
_POWERS = (18, 22, 24)

_CROSS_ENTROPY: tuple[tuple[tuple[int, ...], tuple[float | None, ...]], ...] = (
    ((4096, 1000), (2.5, 2.5, 2.4)),
    ((512, 32000), (2.4, 1.5, 1.6)),
    ((128, 128256), (2.4, 1.5, 1.6)),
    ((4, 21, 256, 256), (3, None, 2.7)),
)

# Enough for a first look: each table, and the losses whose cost differs most.
_QUICK = {
    "speed: mse 2^22",
    "speed: bce_with_logits 2^22",
    "speed: cross_entropy 4096x1000",
    "speed: cross_entropy 512x32000",
    "upstream: mse 2^22, upstream 65536",
    "small: mse 32",
    "small: cross_entropy 32x10",
    "none: mse 2^22",
    "forward: mse 2^22",
    "forward: cross_entropy 4096x1000",
    "memory: mse 2^24",
    "memory: cross_entropy 512x32000",
}


def _case(
    table: str,
    label: str,
    loss: str,
    shape: tuple[int, ...],
    bars: Mapping[str, float],
    *,
    dtype: torch.dtype = torch.float32,
    probabilities: bool = False,
    upstream: float = 1.0,
) -> Case:
    if loss == "cross_entropy":
        size = "x".join(map(str, shape))
    else:
        power = math.log2(shape[0])
        size = f"2^{power:.0f}" if power.is_integer() and power > 14 else str(shape[0])
    name = f"{label} {size}"
    if probabilities:
        name += ", class probabilities"
    if dtype == torch.bfloat16:
        name += ", bf16 under autocast"
    if upstream != 1:
        name += f", upstream {upstream:.4g}" if upstream < 1 else f", upstream {upstream:.0f}"
    quick = f"{table}: {name}" in _QUICK
    return Case(name, table, loss, shape, bars, dtype, probabilities, upstream, quick)


def _cases() -> tuple[Case, ...]:
    cases = []
    for loss, (label, *bars) in _POINTWISE.items():
        for power, goals in zip(_POWERS, bars, strict=True):
            cases.append(_case("speed", label, loss, (2**power,), _bars(*goals)))
    ce = ("cross_entropy", "cross_entropy")
    for shape, values in _CROSS_ENTROPY:
        cases.append(_case("speed", *ce, shape, _bars(*values)))
    cases.append(_case("speed", *ce, (4096, 1000), _bars(2), probabilities=True))
    cases.append(_case("speed", *ce, (512, 32000), _bars(4), dtype=torch.bfloat16))

    for upstream in (65536.0, 1 / 3):
        steady = {"unit": 1.05}
        for loss in ("mse_loss", "binary_cross_entropy_with_logits"):
            cases.append(
                _case("upstream", _POINTWISE[loss][0], loss, (2**22,), steady, upstream=upstream)
            )
        for shape in ((4096, 1000), (512, 32000)):
            cases.append(_case("upstream", *ce, shape, steady, upstream=upstream))

    for loss, (label, *_) in _POINTWISE.items():
        for elements in (1, 32, 1024, 16384):
            cases.append(_case("small", label, loss, (elements,), _bars(1.1)))
    cases.append(_case("small", *ce, (32, 10), _bars(1.1)))

    for table in ("none", "forward"):
        for loss, (label, *_) in _POINTWISE.items():
            for power in (18, 22):
                cases.append(_case(table, label, loss, (2**power,), _bars(1)))
        for shape, _ in _CROSS_ENTROPY:
            cases.append(_case(table, *ce, shape, _bars(1)))

    for loss, (label, *_) in _POINTWISE.items():
        cases.append(_case("memory", label, loss, (2**24,), {"memory": 1}))
    for shape, _ in _CROSS_ENTROPY:
        cases.append(_case("memory", *ce, shape, {"memory": 1}))
    cases.append(_case("memory", *ce, (4096, 1000), {"memory": 1}, probabilities=True))
    cases.append(_case("memory", *ce, (512, 32000), {"memory": 1}, dtype=torch.bfloat16))
    return tuple(cases)


CASES = _cases()
