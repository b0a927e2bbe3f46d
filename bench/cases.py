"""What is measured, between whom, and the goals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import fusedloss.functional as fused

from . import linear, row_losses

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Column:
    """A ratio of two contestants, `of` / `over`; its goal is a minimum or a maximum."""

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
    "products": Column("ours / products", "ours", "products", at_least=False),
    "gradients": Column("ours / gradients", "ours", "gradients", at_least=False),
    "mebibytes": Column("ours, MiB", "ours", "mebibyte", at_least=False),
    # The second backend, and peers if they are installed and cover the case.
    "triton": Column("triton backend / ours", "triton", "ours", at_least=True),
    "liger": Column("Liger-Kernel / ours", "liger", "ours", at_least=True),
    "quack": Column("quack / ours", "quack", "ours", at_least=True),
    "flash_attn": Column("flash-attn / ours", "flash_attn", "ours", at_least=True),
    "apex": Column("apex / ours", "apex", "ours", at_least=True),
    "chunked": Column("torch, chunked / ours", "chunked", "ours", at_least=True),
}


@dataclass(frozen=True)
class Table:
    title: str
    contestants: tuple[str, ...]
    columns: tuple[str, ...]
    peers: bool = False  # whether installed peers join it, where they cover a case
    repeats: int = 1  # more rounds where goals lie within a few per cent
    unit: str = "s"  # of what is measured: or "bytes"


TABLES = {
    "speed": Table(
        "Forward + backward",
        ("eager", "compile", "ours", "limit", "copy"),
        ("eager", "compile", "limit"),
        peers=True,
    ),
    "own": Table(
        "Forward + backward, custom losses",
        ("eager", "compile", "ours", "limit", "copy"),
        ("eager", "compile", "limit"),
        peers=True,
    ),
    "rows": Table(
        "Forward + backward, custom losses over rows",
        ("eager", "compile", "ours", "limit", "copy"),
        ("eager", "compile", "limit"),
        peers=True,
    ),
    "curve": Table(
        "Forward + backward, by size",
        ("eager", "ours", "limit", "copy"),
        ("eager", "limit"),
        peers=True,
    ),
    "upstream": Table(
        "Forward + backward, upstream gradient other than 1, steady state",
        ("eager", "ours", "unit"),
        ("eager", "unit"),
        peers=True,
        repeats=3,
    ),
    "small": Table(
        "Forward + backward, small inputs, host time", ("eager", "ours"), ("eager",), peers=True
    ),
    "graph": Table(
        "Forward + backward, small inputs, replayed in a CUDA graph",
        ("eager", "ours"),
        ("eager",),
        peers=True,
    ),
    "none": Table('Forward + backward, reduction="none"', ("eager", "ours"), ("eager",), repeats=3),
    "forward": Table(
        "Forward only, no gradient wanted", ("eager", "ours"), ("eager",), peers=True, repeats=3
    ),
    "memory": Table(
        "Peak memory of forward + backward, beyond its inputs",
        ("eager", "ours"),
        ("memory",),
        peers=True,
        unit="bytes",
    ),
    "rows_memory": Table(
        "Peak memory of forward + backward, custom losses over rows, beyond their inputs",
        ("eager", "ours"),
        ("memory", "gradients"),
        unit="bytes",
    ),
    "linear": Table(
        "Forward + backward, behind a linear layer",
        ("eager", "ours", "products"),
        ("eager", "products"),
        peers=True,
    ),
    "linear_memory": Table(
        "Peak memory of forward + backward behind a linear layer, beyond its inputs and gradients",
        ("eager", "ours"),
        ("memory", "mebibytes"),
        peers=True,
        unit="bytes",
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
    "soft_margin_loss": "SoftMarginLoss",
    "hinge_embedding_loss": "HingeEmbeddingLoss",
    "kl_div": "KLDivLoss",
    "poisson_nll_loss": "PoissonNLLLoss",
}


def plain_log_loss(x: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    """Log loss with torch's functions, since torch has none of that name."""
    log_p = x.clamp(torch.finfo(x.dtype).eps, 1).log()
    return torch.nn.functional.nll_loss(log_p, t, reduction=reduction)


def _with_variance(function: Loss) -> Loss:
    def gaussian_nll(x: Tensor, t: Tensor, **options: str) -> Tensor:
        return function(x, t[0], t[1], **options)

    return gaussian_nll


# Its target holds the variances too.
GAUSSIAN = {
    "eager": _with_variance(torch.nn.functional.gaussian_nll_loss),
    "ours": _with_variance(fused.gaussian_nll_loss),
}


@dataclass(frozen=True)
class Case:
    """One loss at one shape.

    A loss that is in neither torch.nn.functional nor fusedloss.functional brings its own callables
    in `functions`, called as ``function(x, t, reduction=...)``: "eager" (which is also compiled for
    "compile" and gives the expected result in float64) and "ours"; and `draw`, which returns the
    leaf and its target. The custom losses, in the table "own" and those over rows, are in
    bench/own.py and bench/row_losses.py. A case behind a linear layer has a `layer` and the shape
    (rows, width, classes); see bench/linear.py.
    """

    name: str
    table: str
    loss: str
    shape: tuple[int, ...]
    bars: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    probabilities: bool = False
    upstream: float = 1.0
    autocast: bool = False
    quick: bool = False
    device: str = "cpu"
    expanded: bool = False  # reduction "none" under one upstream gradient, as from .sum()
    functions: Mapping[str, Loss] = field(default_factory=dict)
    draw: Callable[[Case], tuple[Tensor, Tensor]] | None = None
    layer: linear.Layer | None = None

    @property
    def id(self) -> str:
        return f"{self.table}: {self.name}"

    @property
    def reduction(self) -> str:
        return "none" if self.table == "none" else "mean"

    @property
    def over_rows(self) -> bool:
        """Whether it is a custom loss over rows."""
        return self.table in ("rows", "rows_memory")

    @property
    def by_rows(self) -> bool:
        """Whether a row of classes has one target: a class index, or a distribution over
        classes."""
        if self.over_rows:
            return row_losses.LOSSES[self.loss][0]
        return self.loss in ("cross_entropy", "log_loss")

    @property
    def gradients(self) -> int:
        """For how many inputs, leaf and target, there is a gradient."""
        if self.layer is not None:
            return 1 if self.layer.frozen else 2
        return row_losses.LOSSES[self.loss][1] if self.over_rows else 1

    @property
    def least_bytes(self) -> int:
        """The least that forward and backward must move, as the limit does: input, target and
        gradient. Class indices are next to nothing."""
        if self.layer is not None:
            rows, width, classes = self.shape
            numbers = 2 * rows * width + self.gradients * classes * width
            if self.loss == "distillation":  # the teacher
                numbers += (rows + classes) * width
            return numbers * self.dtype.itemsize
        tensors = 2 if self.by_rows and not self.probabilities else 3
        tensors += self.loss in ("gaussian_nll_loss", "triplet")  # the variances, the negatives
        tensors += self.gradients - 1
        return tensors * math.prod(self.shape) * self.dtype.itemsize

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The leaf and its target, the same on every call. They are written in place, so that
        making them does not show in the peak memory of the process."""
        if self.draw is not None:
            return self.draw(self)
        if self.layer is not None:
            return linear.inputs(self)
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if self.loss == "binary_cross_entropy":
            x.uniform_(1e-3, 1 - 1e-3, generator=generator)
        elif self.loss == "log_loss":
            x.uniform_(1e-3, 1, generator=generator)
            x /= x.sum(1, keepdim=True)
        elif self.loss == "kl_div":
            x.uniform_(1e-3, 1, generator=generator).log_()
        else:
            x.normal_(generator=generator)
        if self.loss == "gaussian_nll_loss":
            t = torch.empty((2, *self.shape), dtype=self.dtype, device=self.device)
            t.uniform_(0.25, 2, generator=generator)
        elif not self.by_rows:
            t = torch.empty_like(x)
            if self.loss.startswith("binary") or self.loss == "focal":
                t.bernoulli_(0.5, generator=generator)
            elif self.loss in ("soft_margin_loss", "hinge_embedding_loss"):
                t.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            elif self.loss == "kl_div":
                t.uniform_(0, 1, generator=generator)
            elif self.loss == "poisson_nll_loss":
                t.uniform_(0, 5, generator=generator).round_()
            else:
                t.normal_(generator=generator)
        elif self.probabilities:
            t = torch.empty_like(x).uniform_(generator=generator)
            t /= t.sum(1, keepdim=True)
        else:
            rows = self.shape[:1] + self.shape[2:]
            t = torch.empty(rows, dtype=torch.int64, device=self.device)
            t.random_(self.shape[1], generator=generator)
        return x.requires_grad_(), t.requires_grad_(self.gradients > 1)


def bars(**named: float | None) -> dict[str, float]:
    return {column: value for column, value in named.items() if value is not None}


# Goals on `limit`: a loss without a logarithm or an exponential should reach 65 % of a copy's speed,
# another, which is bound by arithmetic, 40 %.
_RATIONAL, _TRANSCENDENTAL = 1 / 0.65, 1 / 0.4

# loss: label, then the goals on the CPU (eager, compile, limit) at 2^18, 2^22 and 2^24 elements
_POINTWISE = {
    "mse_loss": ("mse", (1.8, 1.5), (2.4, 1.4, _RATIONAL), (2.0, 1.4, _RATIONAL)),
    "l1_loss": ("l1", (3, 1.5), (4, 1.5, _RATIONAL), (4, 1.5, _RATIONAL)),
    "smooth_l1_loss": ("smooth_l1", (1.6, 1.5), (2.2, 1.4, _RATIONAL), (1.8, 1.4, _RATIONAL)),
    "huber_loss": ("huber", (), (2.2, 1.4, _RATIONAL), (1.8, 1.4, _RATIONAL)),
    "binary_cross_entropy_with_logits": (
        "bce_with_logits",
        (3.5, 1.5),
        (4, 1.8, _TRANSCENDENTAL),
        (2.5, 1.8, _TRANSCENDENTAL),
    ),
    "binary_cross_entropy": (
        "bce",
        (10, 1.5),
        (10, 2, _TRANSCENDENTAL),
        (5, 2, _TRANSCENDENTAL),
    ),
}
# The other losses of torch.nn: label, and the goals at 2^22 and 2^24.
_OTHERS = {
    "kl_div": ("kl_div", (3, 1.3, _TRANSCENDENTAL)),
    "poisson_nll_loss": ("poisson_nll", (4, 1.3, _TRANSCENDENTAL)),
    "soft_margin_loss": ("soft_margin", (6, 1.3, _TRANSCENDENTAL)),
    "hinge_embedding_loss": ("hinge_embedding", (6, 1.3, _RATIONAL)),
    "gaussian_nll_loss": ("gaussian_nll", (6, 1.3, _TRANSCENDENTAL)),
}
_POWERS = (18, 22, 24)
LABELS = {loss: label for loss, (label, *_) in (_POINTWISE | _OTHERS).items()}
LABELS |= {"cross_entropy": "cross_entropy", "log_loss": "log_loss"}

_CROSS_ENTROPY: tuple[tuple[tuple[int, ...], tuple[float | None, ...]], ...] = (
    ((4096, 1000), (2.5, 2.5, _TRANSCENDENTAL)),
    ((512, 32000), (2.4, 1.5, _TRANSCENDENTAL)),
    ((128, 128256), (2.4, 1.5, _TRANSCENDENTAL)),
    ((4, 21, 256, 256), (3, None, _TRANSCENDENTAL)),
)

# Custom losses, and their goals on `limit`.
_OWN = {
    "charbonnier": _RATIONAL,
    "quantile": _RATIONAL,
    "asymmetric": _RATIONAL,
    "tukey": _RATIONAL,
    "log_cosh": _TRANSCENDENTAL,
    "cauchy": _TRANSCENDENTAL,
    "welsch": _TRANSCENDENTAL,
    "smooth_quantile": _TRANSCENDENTAL,
    "poisson": _TRANSCENDENTAL,
    "focal": _TRANSCENDENTAL,
}

# Losses over rows, and their goals on `eager` and `compile`.
_ROWS = {
    "distillation": (6, 2.0),
    "jsd": (10, 1.8),
    "focal": (2.5, 1.5),
    "grpo": (6, 1.8),
    "cosine": (6, 1.3),
    "triplet": (3, 1.3),
    "cross_entropy": (None, None),
}

# A first look: something of each table, and the losses whose costs differ most.
_QUICK = {
    "speed: mse 2^22",
    "speed: bce_with_logits 2^22",
    "speed: cross_entropy 4096x1000",
    "speed: cross_entropy 512x32000",
    "own: charbonnier 2^20",
    "own: focal 2^20",
    "rows: distillation 4096x1000",
    "curve: mse 2^12",
    "curve: mse 2^16",
    "curve: mse 2^20",
    "curve: cross_entropy 65536x64",
    "curve: cross_entropy 4096x1024",
    "curve: log_loss 4096x1024",
    "upstream: mse 2^22, upstream 65536",
    "small: mse 32",
    "small: cross_entropy 32x10",
    "none: mse 2^22",
    "forward: mse 2^22",
    "forward: cross_entropy 4096x1000",
    "memory: mse 2^24",
    "memory: cross_entropy 512x32000",
    "rows_memory: distillation 4096x1000",
    "linear: cross_entropy 512x64x8192",
    "linear_memory: cross_entropy 512x64x8192",
}
_QUICK_CUDA = {
    "speed: mse 2^28",
    "speed: bce_with_logits 2^28, bf16",
    "speed: cross_entropy 8192x128256, bf16",
    "speed: cross_entropy 16384x32000, bf16",
    "speed: cross_entropy 32768x4096, bf16",
    "own: charbonnier 2^28",
    "rows: distillation 16384x32000, bf16",
    "curve: mse 2^16",
    "curve: mse 2^22",
    "curve: cross_entropy 131072x4096, bf16",
    "upstream: mse 2^28, upstream 65536",
    "upstream: cross_entropy 8192x128256, bf16, upstream 65536",
    "small: mse 32",
    "small: cross_entropy 32x10",
    "graph: mse 16384",
    "graph: cross_entropy 32x10",
    "none: mse 2^28",
    "forward: cross_entropy 8192x128256, bf16",
    "memory: mse 2^28",
    "memory: cross_entropy 8192x128256, bf16",
    "rows_memory: cross_entropy 16384x32000, bf16",
    "linear: cross_entropy 32768x768x50304, bf16",
    "linear_memory: cross_entropy 8192x4096x128256, bf16",
}


def case(
    table: str,
    loss: str,
    shape: tuple[int, ...],
    bars: Mapping[str, float],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    probabilities: bool = False,
    upstream: float = 1.0,
    autocast: bool = False,
    expanded: bool = False,
    layer: linear.Layer | None = None,
) -> Case:
    """A case, named after its loss, size and options."""
    if len(shape) > 1:
        size = "x".join(map(str, shape))
    else:
        power = math.log2(shape[0])
        # Small sizes read better as plain numbers, except in a curve, where all are powers.
        short = power.is_integer() and (power > 14 or table == "curve")
        size = f"2^{power:.0f}" if short else str(shape[0])
    name = f"{LABELS.get(loss, loss)} {size}"
    if probabilities:
        name += ", class probabilities"
    if dtype == torch.bfloat16:
        name += ", bf16 under autocast" if autocast else ", bf16"
    if upstream != 1:
        name += f", upstream {upstream:.4g}" if upstream < 1 else f", upstream {upstream:.0f}"
    if expanded:
        name += ", one upstream gradient expanded"
    if layer is not None:
        name += layer.note
    quick = f"{table}: {name}" in (_QUICK if device == "cpu" else _QUICK_CUDA)
    return Case(
        *(name, table, loss, shape, bars, dtype, probabilities, upstream, autocast, quick, device),
        expanded=expanded,
        layer=layer,
    )


_FUNCTIONS: Mapping[str, Mapping[str, Loss]] = {
    "log_loss": {"eager": plain_log_loss},
    "gaussian_nll_loss": GAUSSIAN,
}


def _with_own_functions(cases: list[Case]) -> tuple[Case, ...]:
    return tuple(
        replace(case, functions=_FUNCTIONS[case.loss]) if case.loss in _FUNCTIONS else case
        for case in cases
    )


def _cpu() -> tuple[Case, ...]:
    bf16 = torch.bfloat16
    cases = []
    for loss, (_, *goals) in _POINTWISE.items():
        for power, (eager, compiled, limit) in zip(
            _POWERS, (((*g, None, None, None)[:3]) for g in goals), strict=True
        ):
            reach = bars(eager=eager, compile=compiled, limit=limit)
            cases.append(case("speed", loss, (2**power,), reach))
    for shape, (eager, compiled, limit) in _CROSS_ENTROPY:
        reach = bars(eager=eager, compile=compiled, limit=limit)
        cases.append(case("speed", "cross_entropy", shape, reach))
    for loss, (_, (eager, compiled, limit)) in _OTHERS.items():
        for power in (22, 24):
            reach = bars(eager=eager, compile=compiled, limit=limit)
            cases.append(case("speed", loss, (2**power,), reach))
        for elements in (32, 16384):
            cases.append(case("small", loss, (elements,), bars(eager=1)))
    ce = "cross_entropy"
    cases.append(case("speed", ce, (4096, 1000), bars(eager=2), probabilities=True))
    cases.append(case("speed", ce, (512, 32000), bars(eager=4), dtype=bf16, autocast=True))
    for loss in ("mse_loss", "binary_cross_entropy_with_logits"):
        cases.append(case("speed", loss, (2**22,), {}, dtype=bf16))
    cases.append(case("speed", ce, (512, 32000), {}, dtype=bf16))
    cases.append(case("speed", "log_loss", (4096, 1000), {}))

    for loss, limit in _OWN.items():
        for power in (20, 24):  # the former in the cache, where memory is no limit
            reach = bars(eager=3, compile=1.3, limit=limit if power == 24 else None)
            cases.append(case("own", loss, (2**power,), reach))

    for loss, (eager, compiled) in _ROWS.items():
        for shape in ((4096, 1000), (512, 32000)):
            cases.append(case("rows", loss, shape, bars(eager=eager, compile=compiled)))
            cases.append(case("rows_memory", loss, shape, bars(gradients=1.05)))

    for loss in _POINTWISE:
        for power in range(10, 25, 2):
            cases.append(case("curve", loss, (2**power,), {}))
    # The same number of logits each time, in ever longer rows.
    for loss, powers in ((ce, range(4, 17, 2)), ("log_loss", range(6, 15, 4))):
        for power in powers:
            cases.append(case("curve", loss, (2 ** (22 - power), 2**power), {}))

    for upstream in (65536.0, 1 / 3):
        steady = {"unit": 1.05}
        for loss in ("mse_loss", "binary_cross_entropy_with_logits"):
            cases.append(case("upstream", loss, (2**22,), steady, upstream=upstream))
        for shape in ((4096, 1000), (512, 32000)):
            cases.append(case("upstream", ce, shape, steady, upstream=upstream))

    for loss in _POINTWISE:
        for elements in (1, 32, 1024, 16384):
            cases.append(case("small", loss, (elements,), bars(eager=1.1)))
    cases.append(case("small", ce, (32, 10), bars(eager=1.1)))

    for table in ("none", "forward"):
        for loss in _POINTWISE:
            for power in (18, 22):
                cases.append(case(table, loss, (2**power,), bars(eager=1)))
        for shape, _ in _CROSS_ENTROPY:
            cases.append(case(table, ce, shape, bars(eager=1)))

    for loss in ("mse_loss", "binary_cross_entropy"):
        cases.append(case("none", loss, (2**22,), bars(eager=1), expanded=True))

    for loss in _POINTWISE:
        cases.append(case("memory", loss, (2**24,), {"memory": 1}))
    for shape, _ in _CROSS_ENTROPY:
        cases.append(case("memory", ce, shape, {"memory": 1}))
    cases.append(case("memory", ce, (4096, 1000), {"memory": 1}, probabilities=True))
    cases.append(case("memory", ce, (512, 32000), {"memory": 1}, dtype=bf16, autocast=True))

    plain, large, small = linear.Layer(), (2048, 768, 50257), (512, 64, 8192)
    for shape, layer, eager in (
        (large, plain, 1.05),
        ((4096, 64, 50257), plain, 1.67),
        (large, linear.Layer(ignored=0.75), 2.85),
        (large, linear.Layer(frozen=True), None),
        (small, plain, None),
    ):
        cases.append(case("linear", ce, shape, bars(eager=eager), layer=layer))
    cases.append(case("linear", ce, large, bars(eager=1), dtype=bf16, layer=plain))
    cases.append(case("linear", "distillation", (1024, 256, 32000), {}, layer=plain))
    for loss, shape, most in (
        (ce, large, 64),
        (ce, small, None),
        ("distillation", (1024, 256, 32000), 128),
    ):
        cases.append(case("linear_memory", loss, shape, bars(mebibytes=most), layer=plain))
    return _with_own_functions(cases)


def _cuda() -> tuple[Case, ...]:
    bf16 = torch.bfloat16
    cases = []

    def add(
        table: str, loss: str, shape: tuple[int, ...], bars: Mapping[str, float], **options: object
    ) -> None:
        cases.append(case(table, loss, shape, bars, device="cuda", **options))  # type: ignore[arg-type]

    # The most important first: a run that is short of time leaves out the last.
    aims = {
        "mse_loss": 2.4,
        "l1_loss": 3.6,
        "binary_cross_entropy": 2.7,
        "binary_cross_entropy_with_logits": 6.5,
    }
    rows = partial(bars, compile=1.5, liger=1.6, quack=1.3)
    add("speed", "cross_entropy", (8192, 128256), rows(eager=2.8, limit=1.1), dtype=bf16)
    for shape, limit in (
        ((16384, 32000), 1.1),
        ((32768, 4096), 1.15),
        ((65536, 1024), 1.18),
        ((131072, 256), 1.25),
    ):
        add("speed", "cross_entropy", shape, rows(eager=2.5, limit=limit), dtype=bf16)
    for loss, eager in aims.items():
        for dtype in (torch.float32, bf16):
            aim = bars(eager=eager, compile=1.5, limit=1.08)
            add("speed", loss, (2**28,), aim, dtype=dtype)
    for loss in ("smooth_l1_loss", "huber_loss"):
        add("speed", loss, (2**28,), bars(compile=1.5, limit=1.08))
    add("speed", "cross_entropy", (8192, 128256), rows(limit=1.1))
    add("speed", "cross_entropy", (16384, 32000), rows(limit=1.1), dtype=bf16, autocast=True)
    add("speed", "cross_entropy", (16, 21, 1024, 1024), bars(compile=1.5, limit=1.25))
    soft = bars(compile=1.3, limit=1.3)
    add("speed", "cross_entropy", (16384, 8192), soft, probabilities=True)
    add("speed", "log_loss", (16384, 8192), bars(compile=1.5, limit=1.3))

    steady = {"unit": 1.03}
    add("upstream", "cross_entropy", (8192, 128256), steady, dtype=bf16, upstream=65536.0)
    add("upstream", "mse_loss", (2**28,), steady, upstream=65536.0)
    add("upstream", "cross_entropy", (16384, 32000), steady, dtype=bf16, upstream=1 / 3)

    for loss in LABELS:
        shapes = ((32, 10),) if loss in ("cross_entropy", "log_loss") else ((32,), (16384,))
        for shape in shapes:
            add("small", loss, shape, bars(eager=1))
            add("graph", loss, shape, {})

    for power in range(6, 19, 2):
        add("curve", "cross_entropy", (2 ** (29 - power), 2**power), {}, dtype=bf16)
    for loss in _POINTWISE:
        for power in range(16, 29, 2):
            add("curve", loss, (2**power,), {})

    for shape in ((8192, 128256), (16384, 32000)):
        add("memory", "cross_entropy", shape, {"memory": 1}, dtype=bf16)
        add("forward", "cross_entropy", shape, bars(eager=1), dtype=bf16)
        add("none", "cross_entropy", shape, bars(eager=1), dtype=bf16)
    for loss in _POINTWISE:
        add("memory", loss, (2**28,), {"memory": 1})
        add("forward", loss, (2**28,), bars(eager=1))
        add("none", loss, (2**28,), bars(eager=1))
    for loss in ("mse_loss", "binary_cross_entropy"):
        add("none", loss, (2**28,), bars(eager=1), expanded=True)
    for loss in _OWN:
        add("own", loss, (2**28,), bars(compile=1.5, limit=1.15))
    for shape in ((8192, 128256), (16384, 32000), (65536, 1024)):
        add("rows", "distillation", shape, bars(compile=2, limit=1.3), dtype=bf16)
    for loss in ("cross_entropy", "focal", "grpo", "jsd"):
        add("rows", loss, (16384, 32000), bars(compile=1.5), dtype=bf16)
        add("rows_memory", loss, (16384, 32000), bars(gradients=1.05), dtype=bf16)

    behind = partial(add, dtype=bf16, layer=linear.Layer())
    large, peers = (8192, 4096, 128256), partial(bars, chunked=1.5, liger=3, quack=0.93)
    for shape, most in (
        (large, 1.08),
        ((16384, 2048, 151936), 1.08),
        ((32768, 768, 50304), 1.3),
    ):
        behind("linear", "cross_entropy", shape, peers(products=most))
    behind("linear", "cross_entropy", large, bars(products=1.08), layer=linear.Layer(frozen=True))
    # Another upstream gradient may cost 3 % more.
    behind("linear", "cross_entropy", large, bars(products=1.11), upstream=65536.0)
    behind("linear_memory", "cross_entropy", large, bars(mebibytes=614))
    return _with_own_functions(cases)


CASES = {"cpu": _cpu(), "cuda": _cuda()}
