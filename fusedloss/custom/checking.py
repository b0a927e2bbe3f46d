"""Checks a loss for properties that make training hard, and plots it.

Everything is computed in float64, by the formulas of which the kernels are made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor

from . import primitives, printing

if TYPE_CHECKING:
    from .loss import CustomLoss, PointwiseLoss

_POINTS = 2000
_NEAR, _FAR = 3.0, 1e4
_STEP = 1e-6


@dataclass(frozen=True)
class Report:
    """The results of a check; prints as text."""

    loss: str
    errors: tuple[str, ...]  # wrong values or gradients
    remarks: tuple[str, ...]  # kinks, slopes without bound, slopes that vanish

    @property
    def ok(self) -> bool:
        """Whether there are no errors; remarks do not count."""
        return not self.errors

    def __str__(self) -> str:
        head = f"{self.loss}: {'ok' if self.ok else 'wrong'}"
        lines = [f"  wrong: {error}" for error in self.errors]
        return "\n".join([head, *lines, *(f"  {remark}" for remark in self.remarks)])


class _Probe:
    """Value and slopes of a loss at points, in float64."""

    def __init__(self, loss: PointwiseLoss, values: tuple[float, ...]) -> None:
        self.loss, self.values, self.names = loss, values, loss._operands

    def value(self, *inputs: Tensor) -> Tensor:
        return self.loss._elements(inputs, self.values)

    def slopes(self, *inputs: Tensor) -> list[Tensor]:
        return list(self.loss._slopes(inputs, self.values))

    @functools.cached_property
    def detached(self) -> dict[sympy.Expr, sympy.Symbol]:
        """What the loss detaches, and a symbol for each."""
        nodes = sorted(self.loss._traced.value.atoms(primitives.Detach), key=str)
        return {node: sympy.Dummy(f"d{i}", real=True) for i, node in enumerate(nodes)}

    def value_around(self, *inputs: Tensor) -> Callable[..., Tensor]:
        """The value as a function of the inputs, for which what is detached stays as it is here."""
        traced, symbols = self.loss._traced, self.detached
        if not symbols:
            return self.value
        run = printing.torch_function
        at = (replace(traced, value=node.args[0]) for node in symbols)
        held = [run(each, each.reference)(inputs, self.values)[0] for each in at]
        of = (*traced.inputs, *symbols.values())
        around = replace(traced, inputs=of, value=traced.value.xreplace(symbols))
        function = run(around, around.reference)
        return lambda *moved: function((*moved, *held), self.values)[0]

    def along_input(self, x: Tensor, target: Any) -> tuple[Tensor, ...]:
        """All inputs on a line along the first one: target as it is given, later ones 1."""
        y = torch.as_tensor(target, dtype=x.dtype).expand_as(x)
        return (x, y, *(torch.ones_like(x),) * self.loss.inputs)[: self.loss.inputs]

    def at(self, inputs: Any, place: int) -> str:
        numbers = (
            f"{name} {float(t[place]):.4g}" for name, t in zip(self.names, inputs, strict=True)
        )
        return ", ".join(numbers)


def check(loss: PointwiseLoss, values: tuple[float, ...]) -> Report:
    """See :meth:`fusedloss.custom.PointwiseLoss.check`."""
    probe = _Probe(loss, values)
    errors: list[str] = []
    remarks: list[str] = []
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        shape = loss.inputs, _POINTS
        return list((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * _NEAR)

    kinks = list(_kinks(probe))
    for found, into in (
        (_undefined(probe, draw()), remarks),
        (_without_slope(probe, kinks, draw()), errors),
        (_gradients(probe, draw()), errors),
        (_kernels(probe, draw()), errors),
    ):
        into.extend(found)
    if not errors:
        held = ", for which what is detached does not move" if probe.detached else ""
        remarks.insert(
            0, f"gradient: agrees with finite differences at {_POINTS} random points{held}"
        )
    remarks.extend(_kink_remarks(probe, kinks))
    remarks.extend(_far_slopes(probe))
    return Report(_titled(loss, values), tuple(errors), tuple(remarks))


def _titled(loss: CustomLoss, values: tuple[float, ...]) -> str:
    """The name of a loss, with its parameters."""
    pairs = zip(loss._names, values, strict=True)
    numbers = ", ".join(f"{name}={value:g}" for name, value in pairs)
    return f"{loss.__name__}({numbers})" if numbers else loss.__name__


def _first(where: Tensor) -> int | None:
    """The first index where it holds."""
    found = where.nonzero()
    return int(found[0]) if len(found) else None


def _within(low: float, high: float, draws: list[Tensor]) -> list[Tensor]:
    return [low + (high - low) * (t / (2 * _NEAR) + 0.5) for t in draws]


def _undefined(probe: _Probe, draws: list[Tensor]) -> list[str]:
    """Where the value is not finite: outside of a domain, such as a logarithm's."""
    found = []
    for low, high in ((-_NEAR, _NEAR), (0.0, 1.0)):
        inputs = _within(low, high, draws)
        bad = ~probe.value(*inputs).isfinite()
        if (first := _first(bad)) is not None:
            share = bad.double().mean().item()
            found.append(
                f"domain: the value is not finite at {share:.0%} of the points in "
                f"[{low:g}, {high:g}], first at {probe.at(inputs, first)}"
            )
    return found


def _without_slope(
    probe: _Probe, kinks: list[tuple[sympy.Expr, Tensor, Tensor]], draws: list[Tensor]
) -> list[str]:
    """Where the value is finite and a slope is nan, also at kinks: one such element ruins a step."""
    at_kinks = [probe.along_input(_exact(x), target) for _, x, target in kinks]
    points = [draws, _within(0.0, 1.0, draws), *at_kinks]
    inputs = [torch.cat(side) for side in zip(*points, strict=True)]
    value, found = probe.value(*inputs), []
    for name, slope in zip(probe.names, probe.slopes(*inputs), strict=True):
        if (at := _first(value.isfinite() & slope.isnan())) is not None:
            found.append(
                f"the slope by {name} at {probe.at(inputs, at)} is nan, and the value "
                f"{value[at].item():.4g}"
            )
    return found


def _exact(x: Tensor) -> Tensor:
    """The kink's exact place, from the one that bisection found."""
    return x.round(decimals=9)


def _gradients(probe: _Probe, inputs: list[Tensor]) -> list[str]:
    found = []
    value, computed = probe.value_around(*inputs), probe.slopes(*inputs)
    for place, (name, slope) in enumerate(zip(probe.names, computed, strict=True)):

        def moved(k: int, place: int = place) -> Tensor:
            return value(*inputs[:place], inputs[place] + k * _STEP, *inputs[place + 1 :])

        size = probe.value(*inputs).abs()
        fine, off = _differences(moved, slope, size)
        if (at := _first(off)) is not None:
            found.append(
                f"the slope by {name} at {probe.at(inputs, at)} is {slope[at].item():.6g}, and finite "
                f"differences say {fine[at].item():.6g}"
            )
    return found


def _differences(
    moved: Callable[[int], Tensor], slope: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Finite differences of values at steps from a point, and where a slope is off. size: of the values."""
    sides = [moved(k) for k in (-2, -1, 1, 2)]
    # If the second-order `coarse` differs much from the fourth-order `fine`, a kink is near.
    coarse = (sides[2] - sides[1]) / (2 * _STEP)
    fine = (8 * (sides[2] - sides[1]) - (sides[3] - sides[0])) / (12 * _STEP)
    scale = slope.abs() + size + 1
    smooth = fine.isfinite() & ((fine - coarse).abs() < 1e-5 * scale)
    return fine, smooth & ~((slope - fine).abs() < 1e-5 * scale)


def _kernels(probe: _Probe, inputs: list[Tensor]) -> list[str]:
    """Where the kernels, if there are any, differ from the formulas."""
    from .. import explain

    loss = probe.loss
    parameters: dict[str, Any] = dict(zip(loss._names, probe.values, strict=True))
    if not explain(loss, *inputs, **parameters).fused:
        return []
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = loss(*leaves, reduction="none", **parameters)
    gradients = torch.autograd.grad(value, leaves, torch.ones_like(value))
    found = []
    pairs = zip(
        ("value", *(f"gradient for {name}" for name in probe.names)),
        (value.detach(), *gradients),
        (probe.value(*inputs), *probe.slopes(*inputs)),
        strict=True,
    )
    for name, ours, theirs in pairs:
        off = ~torch.isclose(ours, theirs, rtol=1e-9, atol=1e-12, equal_nan=True)
        if (at := _first(off)) is not None:
            found.append(
                f"the kernel's {name} at {probe.at(inputs, at)} is {ours[at].item():.9g}, not "
                f"{theirs[at].item():.9g}"
            )
    return found


# ---- kinks ---------------------------------------------------------------------------------------


def _switches(value: sympy.Expr) -> list[sympy.Expr]:
    """Formulas that are 0 where the loss's formula changes from one piece to another."""
    found: dict[sympy.Expr, None] = {}
    for node in sympy.preorder_traversal(value):
        if isinstance(node, primitives.Abs | primitives.Sign | primitives.Relu):
            found[node.args[0]] = None
        elif isinstance(node, primitives.Maximum | primitives.Minimum):
            found[node.args[0] - node.args[1]] = None
        elif isinstance(node, primitives.Clamp):
            for bound in node.args[1:]:
                if bound.is_finite is not False:
                    found[node.args[0] - bound] = None
        elif isinstance(node, primitives.Comparison):
            found[node.lhs - node.rhs] = None
    return [e for e in found if primitives.inputs_in(e)]


def _kinks(probe: _Probe) -> Iterator[tuple[sympy.Expr, Tensor, Tensor]]:
    """Each switch, and input and target of points where it is 0, found by bisection along input."""
    traced = probe.loss._traced
    targets = torch.tensor([-1.3, -0.4, 0.0, 0.3, 0.6, 1.0, 1.7], dtype=torch.float64)
    grid = torch.linspace(-10.0013, 9.9987, 4001, dtype=torch.float64)
    x, y = (t.flatten() for t in torch.meshgrid(grid, targets, indexing="ij"))
    for switch in _switches(traced.value):
        at = replace(traced, value=switch)
        run = printing.torch_function(at, at.reference)

        def is_positive(a: Tensor, b: Tensor, run: Any = run) -> Tensor:
            positive: Tensor = run(probe.along_input(a, b), probe.values)[0] > 0
            return positive

        side = is_positive(x, y).view(len(grid), -1)
        rows, columns = (side[1:] != side[:-1]).nonzero(as_tuple=True)
        low, high, target = grid[rows], grid[rows + 1], targets[columns]
        below = side[rows, columns]
        for _ in range(60):
            middle = (low + high) / 2
            same = is_positive(middle, target) == below
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        if len(target):
            yield switch, (low + high) / 2, target


def _kink_remarks(probe: _Probe, kinks: list[tuple[sympy.Expr, Tensor, Tensor]]) -> Iterator[str]:
    for switch, x, y in kinks:
        width = 1e-7 * (1 + x.abs())
        sides = [probe.along_input(x + s * width, y) for s in (-1, 1)]
        slopes = [probe.slopes(*side)[0] for side in sides]
        values = [probe.value(*side) for side in sides]
        here = probe.along_input(x, y)
        where = f"{probe.loss._traced.text(switch)} = 0"
        if (at := _first_step(*values)) is not None:
            yield (
                f"jump: at {where} the value steps from {values[0][at].item():.4g} to "
                f"{values[1][at].item():.4g} ({probe.at(here, at)}), which no gradient shows"
            )
        elif (at := _first_step(*slopes)) is not None:
            exact = probe.slopes(*probe.along_input(_exact(x[at : at + 1]), y[at : at + 1]))[
                0
            ].item()
            yield (
                f"kink: at {where} the slope steps from {slopes[0][at].item():.4g} to "
                f"{slopes[1][at].item():.4g} ({probe.at(here, at)}), and is {exact:.4g} there"
            )


def _first_step(before: Tensor, after: Tensor) -> int | None:
    return _first((after - before).abs() > 1e-4 * (1 + before.abs()))


# ---- slopes far away -----------------------------------------------------------------------------


def _far_slopes(probe: _Probe) -> Iterator[str]:
    """How the slope by input grows or vanishes as input goes to infinity, or to 0 or 1."""
    scales = torch.tensor([_FAR / 100, _FAR / 10, _FAR], dtype=torch.float64)
    for name, sign in (("+inf", 1.0), ("-inf", -1.0)):
        x = sign * scales
        line = probe.along_input(x, 0.5)
        slope = probe.slopes(*line)[0]
        if not slope.isfinite().all():
            if probe.value(*line).isfinite().any():
                at = int((~slope.isfinite()).nonzero()[0])
                yield f"slope: not finite at {probe.at(line, at)}, on the way to {name}"
            continue
        size = slope.abs()
        if size[2] > 1.5 * size[1] > 2.25 * size[0]:
            yield (
                f"slope: grows without bound as input goes to {name} (at {x[2].item():g} it is "
                f"{slope[2].item():.4g}): single outliers dominate the gradient; clip_grad= bounds it"
            )
        elif size[2] < 1e-3 and size[2] <= size[0]:
            yield (
                f"slope: vanishes as input goes to {name} (at {x[2].item():g} it is "
                f"{slope[2].item():.4g}): training learns nothing from elements that far off"
            )
    near = torch.tensor([1e-3, 1e-6, 1e-9], dtype=torch.float64)
    for edge in (0.0, 1.0):
        for sign in (1.0, -1.0):
            slope = probe.slopes(*probe.along_input(edge + sign * near, 0.5))[0].abs()
            if slope.isfinite().all() and slope[2] > 10 * slope[1] > 100 * slope[0] > 0:
                yield (
                    f"slope: grows without bound as input goes to {edge:g} from "
                    f"{'above' if sign > 0 else 'below'} (at a distance of 1e-09 it is "
                    f"{slope[2].item():.4g}); clip_grad= bounds it"
                )


# ---- picture -------------------------------------------------------------------------------------


def plot(loss: PointwiseLoss, values: tuple[float, ...], path: str | Path) -> None:
    """See :meth:`fusedloss.custom.PointwiseLoss.plot`."""
    probe = _Probe(loss, values)
    figure = _figure()
    axes = figure.subplots(1, 3)
    others = probe.names[1:]
    targets = (0.0, 1.0) if others and _of_two_values(probe) else (0.0,)
    for target in targets:
        numbers = zip(others, (target, *(1.0,) * len(others)), strict=False)
        label = ", ".join(f"{name} {number:g}" for name, number in numbers)
        x = torch.linspace(-4, 4, 1601, dtype=torch.float64).requires_grad_()
        line = probe.along_input(x, target)
        slope = probe.slopes(*line)[0]
        curvature = torch.zeros_like(x)
        if slope.requires_grad:
            (curvature,) = torch.autograd.grad(slope.sum(), x)
        for axis, curve in zip(axes, (probe.value(*line), slope, curvature), strict=True):
            finite = torch.where(curve.isfinite(), curve, torch.nan)
            axis.plot(x.detach(), finite.detach(), label=label)
    for axis, title in zip(axes, ("value", "slope by input", "curvature by input"), strict=True):
        axis.set(title=title, xlabel="input")
        axis.grid(alpha=0.3)
    if others:
        axes[0].legend()
    figure.suptitle(_titled(loss, values))
    figure.savefig(path, dpi=120)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a plot needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(12, 3.6), layout="constrained")


def _of_two_values(probe: _Probe) -> bool:
    """Whether another target gives another curve, and not the same one shifted."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    here, there = (probe.value(*probe.along_input(x + k, k)) for k in (0, 1))
    return not torch.allclose(here, there, equal_nan=True)
