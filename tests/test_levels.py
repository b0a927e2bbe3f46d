"""The level form of row losses, computed step by step with torch as a kernel would, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss
from fusedloss import math as fm
from fusedloss.custom import primitives, row_printing
from fusedloss.custom.levels import SCALE, CannotLevel, level_form
from fusedloss.custom.primitives import Expr
from fusedloss.custom.row_primitives import At
from fusedloss.custom.row_tracing import Kind
from fusedloss.custom.walks import RowProgram, Walk
from row_losses import ROW_LOSSES, RowCase, balanced, distillation, jsd

# mypy: disable-error-code="no-untyped-def"

Values = dict[Expr, Tensor]


def computed(e: Any, values: Values) -> Any:
    """A formula of primitives, as a tensor."""
    if e in values:
        return values[e]
    if e.is_number:
        return torch.tensor(float(e), dtype=torch.float64)
    args = [computed(arg, values) for arg in e.args]
    if e.is_Add:
        return sum(args[1:], args[0])
    if e.is_Mul:
        return torch.stack(torch.broadcast_tensors(*args)).prod(0)
    if e.is_Pow:
        return args[0] ** args[1]
    if isinstance(e, primitives.Where):
        return torch.where(*args)
    if isinstance(e, primitives.LogicalAnd):
        return args[0] & args[1]
    return type(e).torch(*args)


class Machine:
    """Rows that a program walks over: (N, C) elements, and row numbers of (N, 1)."""

    def __init__(self, case: RowCase, inputs: list[Tensor], scale: Tensor) -> None:
        traced = case.loss._traced
        self.program: RowProgram = case.loss._program
        program = self.program
        self.order = [s for s, _ in sorted(program.numbers.items(), key=lambda item: item[1])]
        self.values: Values = {SCALE: scale}
        numbers = {**traced.defaults, **case.parameters}
        for name, symbol in traced.parameters.items():
            self.values[symbol] = torch.tensor(numbers[name], dtype=torch.float64)
        self._name(program.constants)
        of_row = (Kind.LABEL, Kind.PER_ROW)
        for symbol, kind, t in zip(traced.inputs, traced.kinds, inputs, strict=True):
            self.values[symbol] = t[:, None] if kind in of_row else t
        self.elements = traced.of_kind(Kind.ELEMENT)
        self.shape = self.values[self.elements[0]].shape
        self.values[traced.classes] = torch.tensor(float(self.shape[1]), dtype=torch.float64)
        self.label = None if traced.label is None else self.values[traced.label]
        self.others = torch.ones(self.shape, dtype=torch.bool)
        if self.label is not None:
            self.others.scatter_(1, self.label, False)
            for symbol in (*self.elements, *traced.of_kind(Kind.PER_CLASS)):
                there = next(s for s in self.order if s.name == f"{symbol}.at")
                self.values[there] = At.torch(self.values[symbol], self.label)

    def _name(self, named: Any) -> None:
        for symbol, e in named:
            self.values[symbol] = computed(e, self.values)

    def _walked(self, walk: Walk) -> list[Tensor]:
        self._name(walk.named)
        return [torch.broadcast_to(computed(e, self.values), self.shape) for e in walk.results]

    def run(self) -> tuple[Tensor, list[Tensor]]:
        """The losses, and the gradients for element inputs and for those of a row."""
        program = self.program
        self._name(program.computed[0])
        next_number = iter(self.order[len(self.order) - self._after_given() :])
        terms = []
        for walk, maxima, after in zip(
            program.walks, program.maxima, program.computed[1:], strict=True
        ):
            terms.append(self._walked(walk))
            for i, term in enumerate(terms[-1]):
                kept = term if i < maxima else torch.where(self.others, term, 0.0)
                found = kept.amax(1, True) if i < maxima else kept.sum(1, True)
                self.values[next(next_number)] = found
            self._name(after)
        gradients = [g.clone() for g in self._walked(program.gradients)]
        for g, symbol in zip(gradients, program.at_label, strict=False):
            assert self.label is not None
            g.scatter_(1, self.label, self._row(symbol))
        for peak in program.peaks:
            first = terms[peak.level][peak.term].argmax(1, True)
            for g, more in zip(gradients, self._walked(peak.gradients), strict=True):
                g.scatter_add_(1, first, more.gather(1, first))
        of_row = [self._row(symbol) for symbol in program.of_row]
        return self._row(program.value), [*gradients, *of_row]

    def _row(self, symbol: Expr) -> Tensor:
        return torch.broadcast_to(self.values[symbol], (self.shape[0], 1))

    def _after_given(self) -> int:
        """How many row numbers are not there before the first walk: those of reductions and after."""
        given = sum(symbol in self.values for symbol in self.order)
        return len(self.order) - given + sum(s in self.values for s, _ in self.program.computed[0])


@pytest.mark.parametrize("case", ROW_LOSSES, ids=lambda case: case.id)
def test_value_and_gradients(case: RowCase) -> None:
    traced = case.loss._traced
    inputs = case.inputs((6,), 7, torch.float64)
    scale = torch.rand(6, 1, dtype=torch.float64) + 0.5
    value, gradients = Machine(case, inputs, scale).run()
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    expected = case.torch(*leaves, **case.parameters)
    kinds = (Kind.ELEMENT, Kind.PER_ROW)
    wanted = [t for t, kind in zip(leaves, traced.kinds, strict=True) if kind in kinds]
    slopes = torch.autograd.grad((expected * scale[:, 0]).sum(), wanted, allow_unused=True)
    torch.testing.assert_close(value[:, 0], expected, rtol=1e-12, atol=1e-12)
    for slope, t, gradient in zip(slopes, wanted, gradients, strict=True):
        whole = torch.zeros_like(t) if slope is None else slope
        torch.testing.assert_close(gradient.reshape(t.shape), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ROW_LOSSES, ids=lambda case: case.id)
def test_walks(case: RowCase) -> None:
    assert len(case.loss._program.walks) + 1 == case.walks <= 4


def test_sums_that_cancel_are_not_made() -> None:
    """The slopes by the mixture cancel in JSD's gradient, so no sum of them is needed."""
    assert jsd._program.sums == (0, 2, 2)
    assert distillation._program.sums == (0, 3)


def test_one_sum_for_the_softmax_of_a_label() -> None:
    assert balanced._program.sums == (0, 1)


def test_differences_with_a_row_number_stay_whole() -> None:
    """An offset of the input must not touch the gradient: x - mean is one element."""

    @fusedloss.row_loss
    def covariance(a, b):
        return fm.sum((a - fm.mean(a)) * (b - fm.mean(b)))

    form = level_form(covariance._traced)
    mean = next(iter(form.reductions))
    formulas = [r.formula for r in form.reductions.values() if r.level == 2]
    assert any(mean in e.free_symbols for e in formulas)


def test_text() -> None:
    assert level_form(distillation._traced).text.splitlines()[-2:] == [
        "then: the loss = T**2*(log(s1) - log(s3) + s4/s3)",
        "walk 3: the gradients for student, teacher",
    ]


def test_a_maximum_that_row_numbers_multiply() -> None:
    @fusedloss.row_loss
    def scaled_maximum(x):
        return fm.max(x * fm.sum(x))

    with pytest.raises(CannotLevel, match="take the maximum of the element alone"):
        level_form(scaled_maximum._traced)


def test_names_of_arguments_do_not_collide() -> None:
    """Printed formulas name constants c0 and shared parts t0."""

    @fusedloss.row_loss
    def named(t0, c0, *, c1=2.0):
        p = fm.softmax(t0)
        return c1**2 * fm.sum(p * c0) + fm.sum(p * fm.exp(c0 * c1) + fm.exp(c0 * c1))

    struct = row_printing.cpp(named._traced, named._program)
    assert "exp((c0 * x[1]))" in struct
    module, _ = row_printing.triton(named._traced, named._program)
    assert "primitives.exp((c[0] * x[1]))" in module
