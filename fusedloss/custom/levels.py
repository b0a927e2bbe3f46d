"""From the formula of a row loss to walks over a row: its level form, with the gradient.

A reduction (a sum or a maximum over the classes) makes a row number of elements. Its level is 1 + the
highest level of a reduction inside of it; a row is walked over once for each level. Three things keep
the levels few:

- Row numbers leave the sums that are linear in them: sum(e^(t-m) / z * (t - s)) is one sum, divided by z.
- The gradient needs the derivative of the loss by each reduction, its cotangent. That of a reduction
  inside of another one needs sums of the outer one's level, which are added up in the same walk. So the
  gradient takes one more walk, whatever the loss is.
- With a label, every sum leaves out the label's class, which is added as a row number. So nothing
  cancels where the label has nearly all of the probability.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.parameters import distribute

from . import primitives
from .primitives import ONE, ZERO, Exp, ExpNonpositive, Expr, Input, Log
from .row_primitives import (
    At,
    Centered,
    LabelShare,
    LogAddExp,
    LogLabelShare,
    LogSoftmax,
    LogSumExp,
    LogTotal,
    Max,
    Norm,
    OneMinusSoftmax,
    Origin,
    OtherShare,
    Root,
    Share,
    Softmax,
    Sum,
    Total,
    is_element,
)
from .row_tracing import Kind, TracedRows

SCALE = Input("scale.", real=True)  # what the gradients are multiplied by. No argument has a dot.
MAX, SUM = "max", "sum"


@dataclass(frozen=True)
class Reduction:
    kind: str  # MAX or SUM
    formula: Expr  # of an element
    level: int  # from 1 on


@dataclass(frozen=True)
class LevelForm:
    """A row loss in reductions by level. All formulas are of elements and row numbers; symbols of
    reductions are row numbers."""

    traced: TracedRows
    at: dict[Expr, Expr]  # the symbols of the inputs at the label, if there is one, by input
    reductions: dict[Expr, Reduction]
    value: Expr
    gradients: tuple[Expr, ...]  # of the element inputs
    at_label: tuple[Expr, ...]  # of the element inputs at the label, as row numbers
    of_row: tuple[Expr, ...]  # of the inputs of kind PER_ROW
    # By maximum whose slope counts: what is added to the gradients at its first position.
    peaks: dict[Expr, tuple[Expr, ...]]
    auxiliary: tuple[Expr, ...]

    def is_element(self, e: Expr) -> bool:
        return is_element(e, self.traced.elements)

    def level(self, e: Expr) -> int:
        """The level of the highest reduction in a formula."""
        there = (self.reductions[s].level for s in e.free_symbols if s in self.reductions)
        return max(there, default=0)

    @property
    def by_level(self) -> list[list[Expr]]:
        """The reductions, of each level the maxima first."""
        depth = max((r.level for r in self.reductions.values()), default=0)
        order = [(level, kind) for level in range(1, depth + 1) for kind in (MAX, SUM)]
        parts = [
            [s for s, r in self.reductions.items() if (r.level, r.kind) == key] for key in order
        ]
        return [maxima + sums for maxima, sums in zip(parts[::2], parts[1::2], strict=True)]

    @property
    def text(self) -> str:
        """The walks for people. others(x) is the sum of x over all classes but the label."""
        plain: dict[Expr, Expr] = {}
        for symbol in (*self.reductions, SCALE, self.traced.classes):
            plain[symbol] = sympy.Symbol(symbol.name.rstrip("."), real=True)
        for symbol, there in self.at.items():
            plain[there] = At(symbol, self.traced.label)

        def text(e: Expr) -> str:
            return self.traced.text(e.xreplace(plain))

        words = {MAX: "max", SUM: "others" if self.at else "sum"}
        lines = []
        for number, level in enumerate(self.by_level, 1):
            for symbol in level:
                reduction = self.reductions[symbol]
                made = f"{text(symbol)} = {words[reduction.kind]}({text(reduction.formula)})"
                lines.append(f"walk {number}: {made}")
        lines.append(f"then: the loss = {text(self.value)}")
        names = ", ".join(map(str, self.traced.of_kind(Kind.ELEMENT)))
        lines.append(f"walk {len(self.by_level) + 1}: the gradients for {names}")
        return "\n".join(lines)

    @property
    def passes(self) -> str:
        """What a kernel reads and writes in memory, for people."""
        names = ", ".join(map(str, self.traced.of_kind(Kind.ELEMENT)))
        return f"reads {names} once, and writes the gradient for each of them that wants one, once"


class CannotLevel(ValueError):
    """Why a loss has no level form."""


def level_form(traced: TracedRows) -> LevelForm:
    """
    Raises:
        CannotLevel: the message says why, and what to write instead.
    """
    with distribute(False):
        return _Levels(traced).form()


# ---- reductions and their cotangents -------------------------------------------------------------


class _Levels:
    def __init__(self, traced: TracedRows) -> None:
        self.traced = traced
        self.elements = traced.of_kind(Kind.ELEMENT)
        self.at = {
            s: Input(f"{s.name}.at", real=True)
            for s in (*self.elements, *traced.of_kind(Kind.PER_CLASS))
            if traced.label is not None
        }
        self.reductions: dict[Expr, Reduction] = {}
        self.known: dict[tuple[str, Expr], Expr] = {}
        self.lowered: dict[tuple[bool, Expr], Expr] = {}

    # ---- formulas --------------------------------------------------------------------------------

    def is_element(self, e: Expr) -> bool:
        return is_element(e, self.traced.elements)

    def level(self, e: Expr) -> int:
        """The level of the highest reduction in a formula."""
        there = (self.reductions[s].level for s in e.free_symbols if s in self.reductions)
        return max(there, default=0)

    def reduce(self, kind: str, formula: Expr) -> Expr:
        found = self.known.get((kind, formula))
        if found is None:
            letter = "m" if kind == MAX else "s"
            found = Input(f"{letter}{len(self.reductions)}.", real=True)
            self.known[kind, formula] = found
            self.reductions[found] = Reduction(kind, formula, self.level(formula) + 1)
        return found

    def lower(self, e: Expr, at_label: bool = False) -> Expr:
        """The formula in elements, row numbers and pointwise primitives; at the label, or of an element."""
        if not e.args:
            return self.at.get(e, e) if at_label else e
        key = at_label, e
        if key not in self.lowered:
            self.lowered[key] = self._lowered(e, at_label)
        return self.lowered[key]

    def _lowered(self, e: Expr, at_label: bool) -> Expr:
        if isinstance(e, At):
            return self.lower(e.args[0], at_label=True)
        if isinstance(e, Share):
            return self._share(e, at_label)
        if isinstance(e, LogSumExp):
            return self._softmax(e.args[0]).log_sum_exp
        if isinstance(e, Norm):
            return Root(self._sum(e.args[0] ** 2))
        if isinstance(e, Sum):
            return self._sum(e.args[0])
        if isinstance(e, Max):
            return self.reduce(MAX, self.lower(e.args[0]))
        if isinstance(e, LogAddExp):
            # Two log-probabilities make the logarithm of a mixture, whose exponentials are there.
            a, b = map(_log_share, e.args)
            if a is not None and b is not None:
                return Log(self.lower(a, at_label) + self.lower(b, at_label))
        return e.func(*(self.lower(arg, at_label) for arg in e.args))

    def _softmax(self, u: Expr) -> _SoftmaxParts:
        x = self.lower(u)
        if not self.is_element(x):
            raise CannotLevel(f"softmax and its like take an element, and {u} is a row number")
        origin = Origin(self.reduce(MAX, x))
        gap = None if not self.at else Centered(self.lower(u, at_label=True), origin)
        centered = Centered(x, origin)
        return _SoftmaxParts(origin, centered, self.reduce(SUM, Exp(centered)), gap)

    def _share(self, e: Expr, at_label: bool) -> Expr:
        parts = self._softmax(e.args[0])
        if at_label:
            kinds: dict[Any, Any] = {
                Softmax: LabelShare, LogSoftmax: LogLabelShare, OneMinusSoftmax: OtherShare,
            }  # fmt: skip
            return kinds[e.func](parts.sum, parts.gap)
        if isinstance(e, Softmax):
            return Exp(parts.centered) / parts.total
        log = parts.centered - parts.log_total
        return log if isinstance(e, LogSoftmax) else -primitives.Expm1(log)

    def _sum(self, x: Expr) -> Expr:
        e = self.lower(x)
        if not self.is_element(e):
            return e * self.traced.classes
        others = self.separated(e)
        return others + self.lower(x, at_label=True) if self.at else others

    def separated(self, e: Expr) -> Expr:
        """The sum of an element's formula, without the label, from which row numbers are taken out."""
        if e == 0:
            return ZERO
        parts = self._split(e)
        if any(self._bare_numbers(x) for _, x in parts):
            # Not linear in them: a level more, for all of the sum, since its terms may cancel.
            numbers, rest = self._factors(e)
            parts = [(numbers, rest)]
        return sympy.Add(*(number * self._summed(x) for number, x in parts))

    def _summed(self, x: Expr) -> Expr:
        if not self.is_element(x):
            return x * (self.traced.classes - 1 if self.at else self.traced.classes)
        factor, rest = x.as_independent(*primitives.inputs_in(x), as_Add=False)
        return factor * self.reduce(SUM, rest)

    def _factors(self, e: Expr) -> tuple[Expr, Expr]:
        """The factors that are row numbers, and the others."""
        args = sympy.Mul.make_args(e)
        ours = [a for a in args if not self.is_element(a) and primitives.inputs_in(a)]
        return sympy.Mul(*ours), sympy.Mul(*(a for a in args if a not in ours))

    def _split(self, e: Expr) -> list[tuple[Expr, Expr]]:
        """The formula as a sum of products: a row number, and an element without any, where possible."""
        if not self.is_element(e):
            return [(e, ONE)] if primitives.inputs_in(e) else [(ONE, e)]
        if e.is_Add:
            # Else the difference of an input and a row number, which an offset of both must not touch.
            if not all(t.has(Centered) for t in e.args if self.is_element(t)):
                return [(ONE, e)]
            elements: dict[Expr, list[Expr]] = {}
            alone = []
            for number, x in itertools.chain(*map(self._split, e.args)):
                if x == 1:
                    alone.append(number)
                else:
                    elements.setdefault(number, []).append(x)
            found = [(number, sympy.Add(*xs)) for number, xs in elements.items()]
            return [*found, (sympy.Add(*alone), ONE)] if alone else found
        if e.is_Mul:
            numbers, rest = self._factors(e)
            products = [(numbers, ONE)]
            for factor in sympy.Mul.make_args(rest):
                parts = self._split(factor) if factor.is_Add else [(ONE, factor)]
                products = [(n * m, x * y) for n, x in products for m, y in parts]
            return products
        return [(ONE, e)]

    def _bare_numbers(self, e: Expr) -> bool:
        """Whether row numbers are in an element's formula, apart from origins."""
        if isinstance(e, Centered):
            return self._bare_numbers(e.args[0])
        if not e.args:
            return isinstance(e, Input) and e not in self.traced.elements
        return any(map(self._bare_numbers, e.args))

    # ---- gradients -------------------------------------------------------------------------------

    def form(self) -> LevelForm:
        value = self.lower(self.traced.value)
        auxiliary = [self.lower(e) for e in self.traced.auxiliary.values()]
        first = dict(self.reductions)
        cotangents: dict[Expr, Expr] = {}

        def slope(symbol: Expr) -> Expr:
            """The derivative of the loss by a row number."""
            total = SCALE * _derivative(value, symbol)
            known: dict[
                int, list[Expr]
            ] = {}  # by level: terms whose cotangents are there before its walk
            for outer, reduction in first.items():
                if outer not in cotangents:
                    continue
                cotangent, d = cotangents[outer], _derivative(reduction.formula, symbol)
                if not self.is_element(d) and reduction.kind == MAX:
                    total += cotangent * d
                elif reduction.kind == MAX:
                    raise CannotLevel(
                        "fm.max of a formula in which a row number multiplies an element has no "
                        "gradient in one walk: take the maximum of the element alone"
                    )
                elif self.level(cotangent) < reduction.level:
                    known.setdefault(reduction.level, []).append(cotangent * d)
                else:
                    total += cotangent * self.separated(d)
            return total + sympy.Add(
                *(self.separated(self._collected(ds)) for ds in known.values())
            )

        for symbol in sorted(first, key=lambda s: -first[s].level):
            cotangent = slope(symbol)
            if cotangent != 0:
                cotangents[symbol] = cotangent
        at_label = [slope(self.at[x]) for x in self.elements] if self.at else []
        of_row = [slope(x) for x in self.traced.of_kind(Kind.PER_ROW)]
        sums = [s for s in cotangents if first[s].kind == SUM]
        gradients = [self._gradient(x, {s: cotangents[s] for s in sums}) for x in self.elements]
        peaks = {
            s: tuple(cotangents[s] * _derivative(first[s].formula, x) for x in self.elements)
            for s in cotangents
            if first[s].kind == MAX
        }
        return LevelForm(
            self.traced, self.at, self.reductions, value, tuple(gradients), tuple(at_label),
            tuple(of_row), peaks, tuple(auxiliary),
        )  # fmt: skip

    def _gradient(self, x: Expr, cotangents: Mapping[Expr, Expr]) -> Expr:
        return self._collected(
            cotangent * _derivative(self.reductions[symbol].formula, x)
            for symbol, cotangent in cotangents.items()
        )

    def _collected(self, formulas: Iterable[Expr]) -> Expr:
        """The sum of elements' formulas. Terms with the same exponentials share them, and each part of an
        element has one row number as its factor."""
        numbers = self._by_part(itertools.chain(*map(self._terms, formulas)))
        divisors = {a.base for part in numbers for a in sympy.Mul.make_args(part) if a.is_Pow}
        for mixture in sorted(filter(lambda d: d.is_Add, divisors), key=str):
            self._cancel(mixture, numbers)
        by_weight: dict[Expr, list[Expr]] = {}
        for part, number in numbers.items():
            simple = _simplified(number)
            if simple != 0:
                args = sympy.Mul.make_args(part)
                weights = [a for a in args if is_weight(a)]
                rest = sympy.Mul(*(a for a in args if a not in weights))
                by_weight.setdefault(sympy.Mul(*weights), []).append(simple * rest)
        return sympy.Add(*(weight * sympy.Add(*terms) for weight, terms in by_weight.items()))

    def _terms(self, e: Expr) -> list[Expr]:
        """The terms that have a share of a softmax as a factor, one by one, and the sum of the others,
        which may cancel."""
        if e.is_Add:
            shares = [t for t in e.args if _has_weight(t)]
            others = sympy.Add(*(t for t in e.args if t not in shares))
            return [*itertools.chain(*map(self._terms, shares)), *([others] if others != 0 else [])]
        for factor in sympy.Mul.make_args(e):
            if factor.is_Add and any(map(_has_weight, factor.args)):
                return [e / factor * t for t in self._terms(factor)]
        return [e] if e != 0 else []

    def _by_part(self, terms: Iterable[Expr]) -> dict[Expr, Expr]:
        """Row numbers by the element that each multiplies."""
        numbers: dict[Expr, Expr] = {}
        for term in terms:
            args = sympy.Mul.make_args(term)
            part = sympy.Mul(*(a for a in args if self.is_element(a)))
            number = sympy.Mul(*(a for a in args if not self.is_element(a)))
            numbers[part] = numbers.get(part, ZERO) + number
        return numbers

    def _cancel(self, mixture: Expr, numbers: dict[Expr, Expr]) -> None:
        """(a e^s + b e^t) g / (a e^s + b e^t) = g, where the numerator is written out."""
        mixed = self._by_part(mixture.args)
        for part in list(numbers):
            rest = _quotient(part * mixture, next(iter(mixed)))
            if rest is None:
                continue
            there = {share: numbers.get(rest * share / mixture) for share in mixed}
            ratios = [
                number / mixed[share] for share, number in there.items() if number is not None
            ]
            if len(ratios) < len(mixed) or any(_written_out(r - ratios[0]) != 0 for r in ratios):
                continue
            for share in mixed:
                del numbers[rest * share / mixture]
            numbers[rest] = numbers.get(rest, ZERO) + ratios[0]


@dataclass(frozen=True)
class _SoftmaxParts:
    origin: Expr
    centered: Expr
    sum: Expr  # of e^centered, without the label
    gap: Expr | None  # centered, at the label

    @property
    def total(self) -> Expr:
        return self.sum if self.gap is None else Total(self.sum, self.gap)

    @property
    def log_total(self) -> Expr:
        return Log(self.sum) if self.gap is None else LogTotal(self.sum, self.gap)

    @property
    def log_sum_exp(self) -> Expr:
        return self.origin + self.log_total


def _derivative(e: Expr, symbol: Expr) -> Expr:
    if symbol not in e.free_symbols:
        return ZERO
    return primitives.canonical(primitives.derivative(e, symbol))


def _log_share(e: Expr) -> Expr | None:
    """A probability of which this is the logarithm: log_softmax(u) + numbers."""
    terms = sympy.Add.make_args(e)
    shares = [t for t in terms if isinstance(t, LogSoftmax)]
    rest = sympy.Add(*(t for t in terms if t not in shares))
    if len(shares) != 1 or primitives.inputs_in(rest):
        return None
    (share,) = shares
    logs = [t for t in sympy.Add.make_args(rest) if isinstance(t, Log)]
    more = sympy.Add(*(t for t in sympy.Add.make_args(rest) if t not in logs))
    factor = Exp(more) if more != 0 else ONE
    return Softmax(share.args[0]) * factor * sympy.Mul(*(log.args[0] for log in logs))


def _written_out(number: Expr) -> Expr:
    return sympy.expand(number, power_exp=False, power_base=False, log=False, multinomial=False,
                        basic=False)  # fmt: skip


def _simplified(number: Expr) -> Expr:
    """A row number with fewer terms, where products cancel when they are written out."""
    return min(number, _written_out(number), key=_terms)


def _terms(e: Expr) -> int:
    return sum(map(_terms, e.args)) if e.is_Add or e.is_Mul else 1


def is_weight(e: Expr) -> bool:
    """Whether it is a class's share of a softmax, but for a row number: 0 for a logit of -inf."""
    base, exponent = e.as_base_exp() if isinstance(e, sympy.Expr) else (e, ONE)
    is_share = isinstance(base, Exp | ExpNonpositive) and isinstance(base.args[0], Centered)
    return bool(is_share and exponent.is_positive)


def _has_weight(e: Expr) -> bool:
    return any(map(is_weight, sympy.Mul.make_args(e)))


def _quotient(e: Expr, divisor: Expr) -> Expr | None:
    """e / divisor, if the divisor's factors are there."""
    there = e.as_powers_dict()
    fits = all(there.get(b, 0) >= n for b, n in divisor.as_powers_dict().items())
    return e / divisor if fits else None
