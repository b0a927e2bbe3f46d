"""Checks a row loss, and plots it: by its formula in float64, and by its kernels where there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sympy.core.parameters import distribute
from torch import Tensor

from . import primitives, printing
from .checking import _STEP, Report, _differences, _figure, _titled
from .row_primitives import is_element
from .row_tracing import Kind

if TYPE_CHECKING:
    from .rows import RowLoss

_ROWS, _CLASSES = 64, 7
# How far off a result may be, relative to the largest: its dtype's digits but for what a row loses.
_SMALL = {torch.float64: 1e-9, torch.float32: 1e-4}


def check(loss: RowLoss, values: tuple[float, ...]) -> Report:
    """See :meth:`fusedloss.custom.RowLoss.check`."""
    errors: list[str] = []
    remarks: list[str] = []
    errors.extend(_gradients(loss, values))
    for name, inputs in _cases(loss).items():
        wrong, said = _tried(loss, values, name, inputs)
        errors.extend(wrong)
        remarks.extend(said)
    if not errors:
        held = ", for which what is detached does not move" if _detached(loss) else ""
        remarks.insert(0, f"gradient: agrees with finite differences at {_ROWS} random rows{held}")
    remarks.extend(f"rewritten: {note}" for note in loss._traced.notes)
    return Report(_titled(loss, values), tuple(errors), tuple(remarks))


# ---- rows ----------------------------------------------------------------------------------------


def _draw(loss: RowLoss, classes: int = _CLASSES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    of_kind: dict[Kind, Callable[[], Tensor]] = {
        Kind.ELEMENT: lambda: draw(_ROWS, classes),
        Kind.LABEL: lambda: torch.randint(classes, (_ROWS,), generator=generator),
        Kind.PER_ROW: lambda: draw(_ROWS),
        Kind.PER_CLASS: lambda: draw(classes).abs() + 0.5,
    }
    return [of_kind[kind]() for kind in loss._kinds]


def _cases(loss: RowLoss) -> dict[str, list[Tensor]]:
    """Inputs by what is special about their rows."""
    kinds = loss._kinds

    def elements(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        pairs = zip(_draw(loss), kinds, strict=True)
        return [change(t) if kind is Kind.ELEMENT else t for t, kind in pairs]

    label = next((t for t, k in zip(_draw(loss), kinds, strict=True) if k is Kind.LABEL), None)
    sure = torch.zeros(_ROWS, dtype=torch.int64) if label is None else label
    at = torch.arange(_CLASSES) == sure[:, None]
    masked = ~at & (torch.arange(_CLASSES) % 3 == 1)
    return {
        "random rows": _draw(loss),
        "rows with 1e4 added": elements(lambda t: t + 1e4),
        "rows times 100": elements(lambda t: t * 100),
        "rows that are sure of a class": elements(lambda t: t + 30.0 * at),
        "rows of equal numbers": elements(torch.zeros_like),
        "rows with entries of -inf": elements(lambda t: t.masked_fill(masked, -torch.inf)),
        "rows of one class": _draw(loss, 1),
    }


# The kernels' gradients. (One by a number of each class is of all rows together, and plain PyTorch's.)
_SLOPED = (Kind.ELEMENT, Kind.PER_ROW)


def _wanting(loss: RowLoss, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [
        (t.to(dtype) if t.is_floating_point() else t.clone()).requires_grad_(kind in _SLOPED)
        for t, kind in zip(inputs, loss._kinds, strict=True)
    ]


def _differentiated(value: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The values of rows, and the gradients."""
    loss: Tensor = value[0] if isinstance(value, tuple) else value
    leaves = [t for t in inputs if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


# ---- what is found -------------------------------------------------------------------------------


def _tried(
    loss: RowLoss, values: tuple[float, ...], case: str, inputs: list[Tensor]
) -> tuple[list[str], list[str]]:
    """Errors and remarks."""
    from .. import explain

    given: dict[str, Any] = {**dict(zip(loss._names, values, strict=True)), "reduction": "none"}
    errors, remarks = [], []
    # What is exact in float32, so that both dtypes compute the same.
    inputs = [t.float().double() if t.is_floating_point() else t for t in inputs]
    names = ["value", *(f"gradient for {name}" for name in _differentiable(loss))]
    leaves = _wanting(loss, inputs, torch.float64)
    truth = _differentiated(loss.reference(*leaves, **given), leaves)
    finite = truth[0].isfinite()
    if not finite.all():
        share = (~finite).double().mean().item()
        remarks.append(f"domain: the value is not finite at {share:.0%} of {case}")
    leaves = _wanting(loss, inputs, torch.float64)
    fused = explain(loss, *leaves, **given).fused
    # A kernel leaves out the classes that have no share, so only PyTorch multiplies 0 by inf there.
    called = _differentiated(loss(*leaves, **given), leaves) if fused else truth
    why = "where a slope is 0 * inf or inf - inf"
    for name, *both in zip(names[1:], called[1:], truth[1:], strict=True):
        ours, plain = ((g.reshape(_ROWS, -1).isnan().any(1) & finite).any() for g in both)
        if ours:
            errors.append(f"the {name} is nan in {case}, {why}, and the value finite")
        elif plain:
            said = f"plain PyTorch's {name} is nan in {case}, {why}; the kernel's is not"
            remarks.append(f"domain: {said}")
    if errors or remarks:
        return errors, remarks
    for dtype, small in _SMALL.items():
        leaves = _wanting(loss, inputs, dtype)
        fused = explain(loss, *leaves, **given).fused
        if not fused and dtype is torch.float64:
            continue
        found = _differentiated(loss(*leaves, **given), leaves)
        for name, ours, exact in zip(names, found, truth, strict=True):
            size = exact.abs().max() + 1e-2
            off = ((ours.double() - exact).abs().max() / size).item()
            if not off <= small:
                where = "the kernel's" if fused else "PyTorch's"
                said = f"{where} {name} is off by {off:.1e} of the largest in {case}, in {dtype}"
                (errors if fused and dtype is torch.float64 else remarks).append(f"digits: {said}")
    return errors, remarks


def _differentiable(loss: RowLoss) -> list[str]:
    pairs = zip(loss._operands, loss._kinds, strict=True)
    return [name for name, kind in pairs if kind in _SLOPED]


def _detached(loss: RowLoss) -> list[Any]:
    return sorted(loss._traced.value.atoms(primitives.Detach), key=str)


def _value_around(
    loss: RowLoss, values: tuple[float, ...], inputs: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """The values of rows as a function of the inputs, for which what is detached stays as it is here."""
    traced, nodes = loss._traced, _detached(loss)
    if not nodes:
        return lambda *moved: loss._rows(moved, values)[0].squeeze(-1)
    held = [
        printing.torch_rows(replace(traced, value=node.args[0], auxiliary={}))(inputs, values)[0]
        for node in nodes
    ]
    symbols = {node: primitives.Input(f"{i}.held", real=True) for i, node in enumerate(nodes)}
    kinds = (
        Kind.ELEMENT if is_element(node.args[0], traced.elements) else Kind.PER_ROW
        for node in nodes
    )
    with distribute(False):
        around = replace(
            traced,
            inputs=(*traced.inputs, *symbols.values()),
            kinds=(*traced.kinds, *kinds),
            value=traced.value.xreplace(symbols),
            auxiliary={},
        )
    run = printing.torch_rows(around)
    return lambda *moved: run((*moved, *held), values)[0].squeeze(-1)


def _gradients(loss: RowLoss, values: tuple[float, ...]) -> Iterator[str]:
    drawn = _draw(loss)
    leaves = _wanting(loss, drawn, torch.float64)
    given: dict[str, Any] = dict(zip(loss._names, values, strict=True))
    found = _differentiated(loss.reference(*leaves, reduction="none", **given), leaves)
    size, gradients = found[0].abs(), iter(found[1:])
    laid = [
        t[:, None] if kind in (Kind.LABEL, Kind.PER_ROW) else t
        for t, kind in zip(drawn, loss._kinds, strict=True)
    ]
    value = _value_around(loss, values, laid)
    for place, (name, kind) in enumerate(zip(loss._operands, loss._kinds, strict=True)):
        if kind not in _SLOPED:
            continue
        columns = next(gradients).reshape(_ROWS, -1)
        for j in range(columns.shape[1]):

            def moved(k: int, place: int = place, j: int = j) -> Tensor:
                step = torch.zeros_like(laid[place])
                step[:, j] = k * _STEP
                return value(*laid[:place], laid[place] + step, *laid[place + 1 :])

            fine, off = _differences(moved, columns[:, j], size)
            if off.any():
                row = int(off.nonzero()[0])
                yield (
                    f"the gradient for {name} of class {j} is {columns[row, j].item():.6g}, and finite "
                    f"differences say {fine[row].item():.6g}"
                )


# ---- picture -------------------------------------------------------------------------------------


def plot(loss: RowLoss, values: tuple[float, ...], path: str | Path) -> None:
    """See :meth:`fusedloss.custom.RowLoss.plot`."""
    figure = _figure()
    value_axis, slope_axis, classes_axis = figure.subplots(1, 3)
    name = loss._operands[0]
    difference = torch.linspace(-8, 8, 801, dtype=torch.float64)
    first = torch.stack((difference / 2, -difference / 2), 1)
    for label in (0, 1):
        value, slope = _at(loss, values, first, label)
        about = f"label {label}" if Kind.LABEL in loss._kinds else f"the second prefers {label}"
        for axis, curve in ((value_axis, value), (slope_axis, slope[:, 0])):
            axis.plot(difference, torch.where(curve.isfinite(), curve, torch.nan), label=about)
    value_axis.set(title="value, two classes", xlabel=f"{name}: class 0 minus class 1")
    slope_axis.set(title=f"gradient for {name} of class 0", xlabel=f"{name}: class 0 minus class 1")
    value_axis.legend()
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(1, 24, generator=generator, dtype=torch.float64).sort(descending=True)[0]
    _, slope = _at(loss, values, 2 * many, 5)
    classes_axis.bar(range(many.shape[1]), slope[0].tolist())
    classes_axis.set(
        title=f"gradient for {name} of 24 classes", xlabel=f"class, by falling {name}; 5 is wanted"
    )
    for axis in (value_axis, slope_axis, classes_axis):
        axis.grid(alpha=0.3)
    figure.suptitle(_titled(loss, values))
    figure.savefig(path, dpi=120)


def _at(
    loss: RowLoss, values: tuple[float, ...], first: Tensor, label: int
) -> tuple[Tensor, Tensor]:
    """Values and gradients for the first input. The second prefers a class, a third the next one, and so
    on, since a difference of equal inputs would show nothing; what is no element is 1."""
    rows, classes = first.shape
    first = first.clone().requires_grad_()
    of_kind = {
        Kind.LABEL: torch.full((rows,), label),
        Kind.PER_ROW: torch.ones(rows, dtype=torch.float64),
        Kind.PER_CLASS: torch.ones(classes, dtype=torch.float64),
    }
    one_hot = 2.0 * torch.eye(classes, dtype=torch.float64).expand(rows, classes, classes)
    others = [
        one_hot[:, (label + place) % classes] if kind is Kind.ELEMENT else of_kind[kind]
        for place, kind in enumerate(loss._kinds[1:])
    ]
    given: dict[str, Any] = dict(zip(loss._names, values, strict=True))
    found = loss.reference(first, *others, reduction="none", **given)
    value, slope = _differentiated(found, [first])
    return value, slope
