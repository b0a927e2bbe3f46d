"""The words of row losses, as SymPy functions: reductions over a row's classes, and what is made of them.

An element is a formula that differs from class to class; a row number is the same for all classes of a
row. Each word's ``torch`` computes it on tensors whose last dimension is the classes; row numbers have
size 1 there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import sympy
import torch
from torch import Tensor

from .primitives import (
    HALF,
    ONE,
    ZERO,
    Abs,
    Equal,
    Exp,
    ExpNonpositive,
    Expr,
    Input,
    Log,
    Log1pUnit,
    Maximum,
    Primitive,
    Sigmoid,
    Sqrt,
    Where,
)

CLASSES = Input("fm.classes", real=True)  # the number of classes
# The words in fusedloss.math, those of a mean and a minimum among them.
WORDS = (
    *("sum", "mean", "max", "min", "logsumexp", "norm"),
    *("softmax", "log_softmax", "one_minus_softmax", "at"),
)


class Word(Primitive):
    """Printed as it is written in fusedloss.math."""

    word: ClassVar[str]

    def _sympystr(self, printer: Any) -> str:
        return f"{self.word}({', '.join(map(printer._print, self.args))})"


class Reduction(Word):
    """Takes an element, gives a row number."""

    nargs = 1


class Sum(Reduction):
    word = "sum"

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)


class Max(Reduction):
    """Its slope goes to the first position of the maximum."""

    word = "max"

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        found: Tensor = x.max(-1, keepdim=True).values
        return found


class LogSumExp(Reduction):
    word = "logsumexp"

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        return torch.logsumexp(x, -1, keepdim=True)


class Norm(Reduction):
    """The root of the sum of squares; slope 0 where all are 0."""

    word = "norm"

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        found: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return found


class Share(Word):
    """Takes an element and gives one, from all classes of the row."""

    nargs = 1


class Softmax(Share):
    word = "softmax"

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        return torch.softmax(x, -1)


class LogSoftmax(Share):
    word = "log_softmax"

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        return torch.log_softmax(x, -1)


class OneMinusSoftmax(Share):
    """1 - softmax without cancellation: at the label, the share of the others."""

    word = "one_minus_softmax"

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        return -torch.expm1(torch.log_softmax(x, -1))


class At(Word):
    """An element at the row's label."""

    word = "at"
    nargs = 2  # the element, the label

    @staticmethod
    def torch(x: Tensor, label: Tensor) -> Tensor:
        shape = (*label.shape[:-1], x.shape[-1])
        return x.expand(shape).gather(-1, label)


class LogAddExp(Word):
    """log(e^a + e^b), never infinite for finite a and b."""

    word = "logaddexp"
    nargs = 2

    @staticmethod
    def torch(a: Tensor, b: Tensor) -> Tensor:
        # The slopes of torch's own are nan where both are infinite.
        same = (a == b) & a.isinf()
        finite = torch.logaddexp(torch.where(same, 0.0, a), torch.where(same, 0.0, b))
        return torch.where(same, (a + b) / 2, finite)

    def derivatives(self) -> tuple[Expr, ...]:
        a, b = self.args
        tie = Equal(a, b)  # where both are -inf, too
        return Where(tie, HALF, Sigmoid(a - b)), Where(tie, HALF, Sigmoid(b - a))

    def lowered(self) -> Expr:
        a, b = self.args
        far = Maximum(a, b) + Log1pUnit(ExpNonpositive(-Abs(a - b)))
        return Where(Equal(a, b), a + Log(sympy.Integer(2)), far)


class Weighted(Primitive):
    """weight * x, and 0 where the weight is 0, whatever x is there."""

    nargs = 2

    @staticmethod
    def torch(weight: Tensor, x: Tensor) -> Tensor:
        # Both sides of the product are cut off, so that no gradient is 0 * inf.
        absent = weight == 0
        return torch.where(absent, 0.0, weight) * torch.where(absent, 0.0, x)


# ---- in the level form ---------------------------------------------------------------------------


class Origin(Primitive):
    """A row's maximum, to be subtracted; 0 where that is -inf. The slopes by it cancel: it counts as a
    number."""

    nargs = 1

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        return torch.where(x == -torch.inf, 0.0, x)

    def _sympystr(self, printer: Any) -> str:
        return str(printer._print(self.args[0]))

    def derivatives(self) -> tuple[Expr, ...]:
        return (ZERO,)


class Centered(Primitive):
    """x minus an origin."""

    nargs = 2

    @staticmethod
    def torch(x: Tensor, origin: Tensor) -> Tensor:
        return x - origin

    def _sympystr(self, printer: Any) -> str:
        x, origin = map(printer._print, self.args)
        return f"({x} - {origin})"

    def derivatives(self) -> tuple[Expr, ...]:
        return ONE, ZERO


class Together(Primitive):
    """A sum that is not taken apart: others are added to the whole."""

    nargs = 1


class Root(Primitive):
    """The square root, with slope 0 at 0."""

    nargs = 1
    torch = staticmethod(torch.sqrt)

    def derivatives(self) -> tuple[Expr, ...]:
        return (Where(Equal(self.args[0], ZERO), ZERO, HALF / self),)

    def lowered(self) -> Expr:
        return Sqrt(self.args[0])


class LogOfSum(Primitive):
    """log(others + e), with all digits where others is small and e is 1."""

    nargs = 2

    @staticmethod
    def torch(others: Tensor, e: Tensor) -> Tensor:
        return torch.log1p(others + (e - 1))


class _OfLabel(Primitive):
    """Made of o, the sum of e^(u - m) over the other classes, and g = u - m at the label."""

    nargs = 2

    word: ClassVar[str]  # in text, where the gap goes without saying

    def _sympystr(self, printer: Any) -> str:
        return f"{self.word}({printer._print(self.args[0])})"

    @property
    def _total(self) -> Expr:
        return self.args[0] + Exp(self.args[1])


class Total(_OfLabel):
    word = "total"

    def derivatives(self) -> tuple[Expr, ...]:
        return ONE, Exp(self.args[1])

    def lowered(self) -> Expr:
        return self._total


class LogTotal(_OfLabel):
    word = "log_total"

    def derivatives(self) -> tuple[Expr, ...]:
        return 1 / Total(*self.args), LabelShare(*self.args)

    def lowered(self) -> Expr:
        return LogOfSum(self.args[0], Exp(self.args[1]))


class LogLabelShare(_OfLabel):
    word = "log_label_share"

    def derivatives(self) -> tuple[Expr, ...]:
        return -1 / Total(*self.args), OtherShare(*self.args)

    def lowered(self) -> Expr:
        return self.args[1] - LogTotal(*self.args).lowered()


class LabelShare(_OfLabel):
    word = "label_share"

    def derivatives(self) -> tuple[Expr, ...]:
        return -self / Total(*self.args), self * OtherShare(*self.args)

    def lowered(self) -> Expr:
        return Exp(self.args[1]) / self._total


class OtherShare(_OfLabel):
    word = "other_share"

    def derivatives(self) -> tuple[Expr, ...]:
        share = LabelShare(*self.args)
        return share / Total(*self.args), -share * self

    def lowered(self) -> Expr:
        return self.args[0] / self._total


def words_in(e: Any) -> set[Expr]:
    """The row words in a formula."""
    found: set[Expr] = e.atoms(Reduction, Share, At)
    return found


def spoken(word: Expr) -> str:
    """What a definition may have called a word."""
    name: str = word.word
    return {"sum": "sum or mean", "max": "max or min"}.get(name, name)


def is_element(e: Expr, elements: Collection[Expr]) -> bool:
    """Whether a formula differs from class to class. elements: the symbols that do."""
    if isinstance(e, Reduction | At):
        return False
    return isinstance(e, Share) or e in elements or any(is_element(arg, elements) for arg in e.args)
