"""Looks at a loss: what a training run would stumble over, told in words; and its picture.

Everything is computed in float64, by the formulas that the kernels are printed from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor

from . import words
from .words import INPUT, TARGET

if TYPE_CHECKING:
    from . import PointwiseLoss

_POINTS = 2000
_NEAR, _FAR = 3.0, 1e4
_STEP = 1e-6


@dataclass(frozen=True)
class Report:
    """What was found; prints as text."""

    loss: str
    errors: tuple[str, ...]  # what is wrong: value or gradient
    remarks: tuple[str, ...]  # what to know: kinks, slopes without bound, slopes that vanish

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; remarks are no errors."""
        return not self.errors

    def __str__(self) -> str:
        head = f"{self.loss}: {'ok' if self.ok else 'wrong'}"
        lines = [f"  wrong: {error}" for error in self.errors]
        return "\n".join([head, *lines, *(f"  {remark}" for remark in self.remarks)])


class _Probe:
    """Value and slopes of a loss at points, in float64."""

    def __init__(self, loss: PointwiseLoss, values: tuple[float, ...]) -> None:
        self.loss, self.values = loss, values
        self.numbers = ", ".join(
            f"{name}={value:g}" for name, value in zip(loss._names, values, strict=True)
        )

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss._elements(x, y, self.values)

    def slopes(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        of_x, of_y = self.loss._bounded_slopes(x, y, math.inf, self.values)
        return torch.broadcast_to(of_x, x.shape), torch.broadcast_to(of_y, x.shape)


def check(loss: PointwiseLoss, values: tuple[float, ...]) -> Report:
    """See :meth:`fusedloss.custom.PointwiseLoss.check`."""
    probe = _Probe(loss, values)
    errors: list[str] = []
    remarks: list[str] = []
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return (torch.rand(_POINTS, generator=generator, dtype=torch.float64) * 2 - 1) * _NEAR

    kinks = list(_kinks(probe))
    for found, into in (
        (_undefined(probe, draw(), draw()), remarks),
        (_without_slope(probe, kinks, draw(), draw()), errors),
        (_gradients(probe, draw(), draw()), errors),
        (_kernels(probe, draw(), draw()), errors),
    ):
        into.extend(found)
    if not errors:
        remarks.insert(0, f"gradient: agrees with finite differences at {_POINTS} random points")
    remarks.extend(_kinks_in_words(probe, kinks))
    remarks.extend(_far_slopes(probe))
    name = f"{loss.__name__}({probe.numbers})" if probe.numbers else loss.__name__
    return Report(name, tuple(errors), tuple(remarks))


def _at(x: Any, y: Any) -> str:
    return f"input {float(x):.4g}, target {float(y):.4g}"


def _within(low: float, high: float, *draws: Tensor) -> Iterator[Tensor]:
    yield from (low + (high - low) * (t / (2 * _NEAR) + 0.5) for t in draws)


def _undefined(probe: _Probe, x: Tensor, y: Tensor) -> list[str]:
    """Where the value is not finite: a domain to keep to, such as that of a logarithm."""
    found = []
    for low, high in ((-_NEAR, _NEAR), (0.0, 1.0)):
        a, b = _within(low, high, x, y)
        bad = ~probe.value(a, b).isfinite()
        if bad.any():
            share, first = bad.double().mean().item(), int(bad.nonzero()[0])
            found.append(
                f"domain: the value is not finite at {share:.0%} of the points in "
                f"[{low:g}, {high:g}], first at {_at(a[first], b[first])}"
            )
    return found


def _without_slope(
    probe: _Probe, kinks: list[tuple[sympy.Expr, Tensor, Tensor]], x: Tensor, y: Tensor
) -> list[str]:
    """Where the value is finite and a slope nan, kinks included: one such element ruins a step."""
    at_kinks = [(_exact(a), b) for _, a, b in kinks]
    points = [(x, y), tuple(_within(0.0, 1.0, x, y)), *at_kinks]
    x, y = (torch.cat(side) for side in zip(*points, strict=True))
    value, found = probe.value(x, y), []
    for name, slope in zip((INPUT, TARGET), probe.slopes(x, y), strict=True):
        bad = value.isfinite() & slope.isnan()
        if bad.any():
            at = int(bad.nonzero()[0])
            found.append(
                f"the slope by {name} at {_at(x[at], y[at])} is nan, and the value "
                f"{value[at].item():.4g}"
            )
    return found


def _exact(x: Tensor) -> Tensor:
    """A kink as it was meant, for what bisection found."""
    return x.round(decimals=9)


def _gradients(probe: _Probe, x: Tensor, y: Tensor) -> list[str]:
    found = []
    computed = probe.slopes(x, y)
    for name, slope, dx, dy in (
        (INPUT, computed[0], _STEP, 0.0),
        (TARGET, computed[1], 0.0, _STEP),
    ):
        sides = [probe.value(x + k * dx, y + k * dy) for k in (-2, -1, 1, 2)]
        # `fine` is of fourth order. Where the second-order `coarse` is far off it, a kink is near.
        coarse = (sides[2] - sides[1]) / (2 * _STEP)
        fine = (8 * (sides[2] - sides[1]) - (sides[3] - sides[0])) / (12 * _STEP)
        scale = slope.abs() + probe.value(x, y).abs() + 1
        smooth = fine.isfinite() & ((fine - coarse).abs() < 1e-5 * scale)
        off = smooth & ~((slope - fine).abs() < 1e-5 * scale)
        if off.any():
            at = int(off.nonzero()[0])
            found.append(
                f"the slope by {name} at {_at(x[at], y[at])} is {slope[at].item():.6g}, and finite "
                f"differences say {fine[at].item():.6g}"
            )
    return found


def _kernels(probe: _Probe, x: Tensor, y: Tensor) -> list[str]:
    """The kernels, where there are any, against the formulas."""
    from .. import explain

    loss = probe.loss
    parameters: dict[str, Any] = dict(zip(loss._names, probe.values, strict=True))
    if not explain(loss, x, y, **parameters).fused:
        return []
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = loss(a, b, reduction="none", **parameters)
    gradients = torch.autograd.grad(value, (a, b), torch.ones_like(value))
    found = []
    pairs = zip(
        ("value", f"gradient for {INPUT}", f"gradient for {TARGET}"),
        (value.detach(), *gradients),
        (probe.value(x, y), *probe.slopes(x, y)),
        strict=True,
    )
    for name, ours, theirs in pairs:
        off = ~torch.isclose(ours, theirs, rtol=1e-9, atol=1e-12, equal_nan=True)
        if off.any():
            at = int(off.nonzero()[0])
            found.append(
                f"the kernel's {name} at {_at(x[at], y[at])} is {ours[at].item():.9g}, not "
                f"{theirs[at].item():.9g}"
            )
    return found


# ---- kinks ---------------------------------------------------------------------------------------


def _switches(value: sympy.Expr) -> list[sympy.Expr]:
    """What is 0 where the formula changes from one piece to another."""
    found: dict[sympy.Expr, None] = {}
    for node in sympy.preorder_traversal(value):
        if isinstance(node, words.Abs | words.Sign | words.Relu):
            found[node.args[0]] = None
        elif isinstance(node, words.Maximum | words.Minimum):
            found[node.args[0] - node.args[1]] = None
        elif isinstance(node, words.Clamp):
            for bound in node.args[1:]:
                if bound.is_finite is not False:
                    found[node.args[0] - bound] = None
        elif isinstance(node, words.Comparison):
            found[node.lhs - node.rhs] = None
    return [e for e in found if {str(s) for s in e.free_symbols} & {INPUT, TARGET}]


def _kinks(probe: _Probe) -> Iterator[tuple[sympy.Expr, Tensor, Tensor]]:
    """Of each switch: points where it is 0, as input and target, found by bisection along input."""
    from . import printing

    traced = probe.loss._traced
    targets = torch.tensor([-1.3, -0.4, 0.0, 0.3, 0.6, 1.0, 1.7], dtype=torch.float64)
    grid = torch.linspace(-10.0013, 9.9987, 4001, dtype=torch.float64)
    x, y = (t.flatten() for t in torch.meshgrid(grid, targets, indexing="ij"))
    for switch in _switches(traced.value):
        at = replace(traced, value=switch)
        run = printing.torch_function(at, at.reference)

        def where(a: Tensor, b: Tensor, run: Any = run) -> Tensor:
            return torch.broadcast_to(torch.as_tensor(run(a, b, probe.values)[0]), a.shape)

        side = where(x, y).view(len(grid), -1) > 0
        rows, columns = (side[1:] != side[:-1]).nonzero(as_tuple=True)
        low, high, target = grid[rows], grid[rows + 1], targets[columns]
        below = side[rows, columns]
        for _ in range(60):
            middle = (low + high) / 2
            same = (where(middle, target) > 0) == below
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        if len(target):
            yield switch, (low + high) / 2, target


def _kinks_in_words(probe: _Probe, kinks: list[tuple[sympy.Expr, Tensor, Tensor]]) -> Iterator[str]:
    for switch, x, y in kinks:
        width = 1e-7 * (1 + x.abs())
        (before, after) = (probe.slopes(x + s * width, y)[0] for s in (-1, 1))
        jump = (after - before).abs()
        values = [probe.value(x + s * width, y) for s in (-1, 1)]
        step = (values[1] - values[0]).abs()
        where = f"{_text(switch)} = 0"
        broken = step > 1e-4 * (1 + values[0].abs())
        kinked = jump > 1e-4 * (1 + before.abs())
        if broken.any():
            at = int(broken.nonzero()[0])
            yield (
                f"jump: at {where} the value steps from {values[0][at].item():.4g} to "
                f"{values[1][at].item():.4g} ({_at(x[at], y[at])}), of which no gradient tells"
            )
        elif kinked.any():
            at = int(kinked.nonzero()[0])
            exact = probe.slopes(_exact(x[at : at + 1]), y[at : at + 1])[0].item()
            yield (
                f"kink: at {where} the slope steps from {before[at].item():.4g} to "
                f"{after[at].item():.4g} ({_at(x[at], y[at])}), and is {exact:.4g} there"
            )


def _text(e: sympy.Expr) -> str:
    return " ".join(str(e).split())


# ---- slopes far away -----------------------------------------------------------------------------


def _far_slopes(probe: _Probe) -> Iterator[str]:
    """How the slope by input grows or fades as input leaves for either side."""
    y = torch.full((3,), 0.5, dtype=torch.float64)
    scales = torch.tensor([_FAR / 100, _FAR / 10, _FAR], dtype=torch.float64)
    for name, sign in (("+inf", 1.0), ("-inf", -1.0)):
        x = sign * scales
        slope = probe.slopes(x, y)[0]
        if not slope.isfinite().all():
            if probe.value(x, y).isfinite().any():
                at = int((~slope.isfinite()).nonzero()[0])
                yield f"slope: not finite at {_at(x[at], y[at])}, on the way to {name}"
            continue
        size = slope.abs()
        if size[2] > 1.5 * size[1] > 2.25 * size[0]:
            yield (
                f"slope: grows without bound as input goes to {name} (at {x[2].item():g} it is "
                f"{slope[2].item():.4g}): single outliers rule the gradient; clip_grad= bounds it"
            )
        elif size[2] < 1e-3 and size[2] <= size[0]:
            yield (
                f"slope: vanishes as input goes to {name} (at {x[2].item():g} it is "
                f"{slope[2].item():.4g}): an element that far off is not learnt from"
            )
    near = torch.tensor([1e-3, 1e-6, 1e-9], dtype=torch.float64)
    for edge in (0.0, 1.0):
        for sign in (1.0, -1.0):
            slope = probe.slopes(edge + sign * near, y)[0].abs()
            if slope.isfinite().all() and slope[2] > 10 * slope[1] > 100 * slope[0] > 0:
                yield (
                    f"slope: grows without bound as input goes to {edge:g} from "
                    f"{'above' if sign > 0 else 'below'} (at a distance of 1e-09 it is "
                    f"{slope[2].item():.4g}); clip_grad= bounds it"
                )


# ---- picture -------------------------------------------------------------------------------------


def plot(loss: PointwiseLoss, values: tuple[float, ...], path: str | Path) -> None:
    """See :meth:`fusedloss.custom.PointwiseLoss.plot`."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a plot needs matplotlib: pip install matplotlib") from error

    probe = _Probe(loss, values)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    targets = (0.0, 1.0) if _of_two_values(probe) else (0.0,)
    for target in targets:
        x = torch.linspace(-4, 4, 1601, dtype=torch.float64).requires_grad_()
        y = torch.full_like(x, target, requires_grad=False)
        slope = probe.slopes(x, y)[0]
        curvature = torch.zeros_like(x)
        if slope.requires_grad:
            (curvature,) = torch.autograd.grad(slope.sum(), x)
        for axis, line in zip(axes, (probe.value(x, y), slope, curvature), strict=True):
            finite = torch.where(line.isfinite(), line, torch.nan)
            axis.plot(x.detach(), finite.detach(), label=f"target {target:g}")
    for axis, title in zip(axes, ("value", "slope by input", "curvature by input"), strict=True):
        axis.set(title=title, xlabel="input")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{loss.__name__}({probe.numbers})" if probe.numbers else loss.__name__)
    figure.savefig(path, dpi=120)


def _of_two_values(probe: _Probe) -> bool:
    """Whether another target is another curve, not the same one moved aside."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    here, there = probe.value(x, torch.zeros_like(x)), probe.value(x + 1, torch.ones_like(x))
    return not torch.allclose(here, there, equal_nan=True)
