"""From the level form of a row loss to what a kernel computes, walk by walk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
from sympy.core.parameters import distribute

from . import primitives
from .levels import MAX, SCALE, LevelForm, is_weight, level_form
from .primitives import Exp, ExpNonpositive, Expr, Input
from .row_primitives import Origin, Together, Weighted
from .row_tracing import Kind, TracedRows
from .tracing import _repeated, hoisted

# What a later walk reads back instead of computing it again.
_COSTLY = ("exp", "exp_nonpositive", "expm1", "log", "log1p", "log1p_unit", "sin", "cos", "tanh", "erf",
           "erfc", "lgamma", "digamma", "trigamma", "exp_minus_square", "power")  # fmt: skip

Named = tuple[tuple[Expr, Expr], ...]  # symbols and their formulas, in the order of computation


@dataclass(frozen=True)
class Walk:
    """What is computed of an element in one walk over the row."""

    named: Named  # what several formulas share, and the values that are kept for later walks
    results: tuple[Expr, ...]  # the terms of its maxima, then of its sums; or the gradients


@dataclass(frozen=True)
class Peak:
    """A maximum whose slope counts, and what is added to the gradients at its first position."""

    level: int
    term: int
    gradients: Walk


@dataclass(frozen=True)
class RowProgram:
    """A row loss as a kernel computes it; see csrc/math/custom_rows.h, which has the same parts."""

    constants: Named  # of the call's parameters
    levels: tuple[tuple[Expr, ...], ...]  # the maxima of each, then its sums
    maxima: tuple[int, ...]  # of each level, how many
    sums: tuple[int, ...]
    numbers: dict[Expr, int]  # the places of the row numbers
    computed: tuple[Named, ...]  # row numbers, by level: before any walk, then after each
    walks: tuple[Walk, ...]
    gradients: Walk
    peaks: tuple[Peak, ...]
    kept: tuple[tuple[Expr, int, int], ...]  # symbol, and the walks that compute and last read it
    kept_narrow: int  # how many of them a GPU keeps for two-byte rows
    held: int  # classes whose numbers fit in a GPU thread's registers, or 0
    held_narrow: int  # the same of two-byte rows
    value: Expr
    at_label: tuple[Expr, ...]
    of_row: tuple[Expr, ...]
    auxiliary: tuple[Expr, ...]

    @property
    def gpu_sizes(self) -> tuple[int, int, int, int]:
        """What a GPU's launch plan must know."""
        return len(self.kept), self.kept_narrow, self.held, self.held_narrow

    def is_read(self, maximum: Expr) -> bool:
        """Whether more than an origin is made of it."""
        walks = *self.walks, self.gradients, *(peak.gradients for peak in self.peaks)
        named = itertools.chain(*self.computed, *(walk.named for walk in walks))

        def reads(e: Expr) -> bool:
            return e == maximum or not isinstance(e, Origin) and any(map(reads, e.args))

        formulas = itertools.chain((e for _, e in named), *(walk.results for walk in walks))
        results = self.value, *self.at_label, *self.of_row, *self.auxiliary
        return any(map(reads, (*formulas, *results)))


def row_program(traced: TracedRows) -> RowProgram:
    """
    Raises:
        CannotLevel: see level_form().
    """
    with distribute(False):
        return _Assembly(level_form(traced)).program()


class _Assembly:
    """Makes formulas of elements and of rows into what is computed when."""

    def __init__(self, form: LevelForm) -> None:
        self.form = form
        self.elements = form.traced.of_kind(Kind.ELEMENT)
        self.parameters = set(form.traced.parameters.values())
        self.constants: dict[Expr, Expr] = {}  # by formula: symbol
        self.numbers: dict[Expr, Expr] = {}  # the same of row numbers

    def program(self) -> RowProgram:
        form, traced = self.form, self.form.traced
        by_level = form.by_level
        walks = [self.of_elements(form.reductions[s].formula for s in level) for level in by_level]
        walks.append(self.of_elements(form.gradients))
        peaks = [self.of_elements(formulas) for formulas in form.peaks.values()]
        results = [
            tuple(map(self.number, es))
            for es in ([form.value], form.at_label, form.of_row, form.auxiliary)
        ]
        given = [SCALE, traced.classes, *traced.of_kind(Kind.PER_ROW), *form.at.values()]
        order = [*given, *itertools.chain(*by_level), *self.numbers.values()]
        computed = self.computed()
        kept = {
            e: (Input(f"{i}.kept", real=True), first, last)
            for i, (e, first, last) in enumerate(_keep(walks, form.is_element))
        }
        found = [_walk(formulas, kept, at) for at, formulas in enumerate(walks)]
        found_peaks = []
        for symbol, formulas in zip(form.peaks, peaks, strict=True):
            level = form.reductions[symbol].level - 1
            found_peaks.append(Peak(level, by_level[level].index(symbol), _walk(formulas)))
        maxima = [sum(form.reductions[s].kind == MAX for s in level) for level in by_level]
        return RowProgram(
            tuple((symbol, e) for e, symbol in self.constants.items()),
            tuple(map(tuple, by_level)),
            tuple(maxima),
            tuple(len(level) - count for level, count in zip(by_level, maxima, strict=True)),
            {symbol: place for place, symbol in enumerate(order)},
            computed,
            tuple(found[:-1]),
            found[-1],
            tuple(found_peaks),
            tuple(kept.values()),
            len(kept) if any(map(_is_costly_for_narrow, kept)) else 0,
            *self._held(found, kept.values(), bool(found_peaks)),
            results[0][0],
            *results[1:],
        )

    def _held(
        self, walks: Sequence[Walk], kept: Iterable[tuple[Expr, int, int]], has_peaks: bool
    ) -> tuple[int, int]:
        """How many classes a GPU's thread holds in registers from one walk to the next: of floats, and of
        two-byte rows. 0 where the kernel for that does not have what the loss needs, where less than two
        vectors of 16 bytes would fit, and where so many copies of costly formulas take long to compile."""
        formulas = [{*walk.results, *(e for _, e in walk.named)} for walk in walks]
        costly = sum(_is_costly_for_narrow(e) for walk in formulas for e in walk)
        used = [set().union(*(e.free_symbols for e in walk)) for walk in formulas]
        reads_classes = set().union(*used) & {*self.elements}
        per_class = self.form.traced.of_kind(Kind.PER_CLASS)
        if has_peaks or costly > 1 or per_class or not reads_classes:
            return 0, 0

        def held(registers: int, of_input: float) -> int:
            needed = [
                of_input * len(set().union(*used[at:]) & {*self.elements})
                + sum(first < at <= last for _, first, last in kept)
                for at in range(len(walks))
            ]
            classes = 2 ** int(math.log2(min(registers / max(needed), most)))
            return classes if classes * of_input >= 8 else 0

        # A thread has 128 registers, where 512 of them run on one processor. An exponential of two bytes
        # takes none besides its result. What a class has in many walks is at hand together.
        most = 64 if len(walks) <= 3 else 16
        return held(64, 1), held(96, 0.5)

    def of_elements(self, formulas: Iterable[Expr]) -> list[Expr]:
        """Formulas of elements as kernels compute them, without what is the same for a whole row."""
        known: dict[Expr, Expr] = {}
        lowered = [
            primitives.lowered(self._guarded(primitives.attached(e)), known) for e in formulas
        ]
        return [self._together(self._without_numbers(_centered(e))) for e in lowered]

    def _together(self, e: Expr) -> Expr:
        """With the inputs of a sum added up first: the difference of two close numbers is exact."""
        if not e.args:
            return e
        args = list(map(self._together, e.args))
        inputs = [a for a in args if a.as_coeff_Mul()[1] in self.elements] if e.is_Add else []
        if not 1 < len(inputs) < len(args):
            return e.func(*args)
        return sympy.Add(Together(sympy.Add(*inputs)), *(a for a in args if a not in inputs))

    def number(self, e: Expr) -> Expr:
        """The symbol of a row number. What is the same for all rows becomes one, too."""
        e = _centered(primitives.lowered(primitives.attached(e)))
        return e if isinstance(e, Input) else self._number(e)

    def _number(self, e: Expr) -> Expr:
        return self.numbers.setdefault(e, Input(f"{len(self.numbers)}.computed", real=True))

    def _guarded(self, e: Expr) -> Expr:
        """What has no share of a softmax does not count, even where it is infinite: 0 log 0 = 0."""
        if not e.args:
            return e
        args = list(map(self._guarded, e.args))
        weights = [a for a in args if is_weight(a)]
        rest = [a for a in args if a not in weights and self.form.is_element(a)]
        if not (e.is_Mul and weights and rest):
            return e.func(*args)
        numbers = [a for a in args if a not in weights and a not in rest]
        return sympy.Mul(*numbers, Weighted(sympy.Mul(*weights), sympy.Mul(*rest)))

    def _symbol(self, e: Expr) -> Expr:
        if e in self.parameters or not primitives.inputs_in(e):
            return self.constants.setdefault(e, sympy.Symbol(f"c{len(self.constants)}", real=True))
        return self._number(e)

    def _without_numbers(self, e: Expr) -> Expr:
        def is_same(e: Expr) -> bool:
            return (
                isinstance(e, sympy.Expr) and bool(e.free_symbols) and not self.form.is_element(e)
            )

        return hoisted(e, is_same, lambda e: e if isinstance(e, Input) else self._symbol(e))

    def without_constants(self, e: Expr) -> Expr:
        def is_constant(e: Expr) -> bool:
            return (
                isinstance(e, sympy.Expr) and bool(e.free_symbols) and not primitives.inputs_in(e)
            )

        return hoisted(e, is_constant, self._symbol)

    def computed(self) -> tuple[Named, ...]:
        """The row numbers by level, with what several of a level share."""
        by_level: list[dict[Expr, Expr]] = [{} for _ in range(len(self.form.by_level) + 1)]
        for formula, symbol in self.numbers.items():
            by_level[self.form.level(formula)][symbol] = formula
        earlier: dict[Expr, Expr] = {}
        found = []
        for numbers in by_level:
            formulas = [self.without_constants(e.xreplace(earlier)) for e in numbers.values()]
            shared, formulas = _repeated(formulas, sympy.numbered_symbols("t"))
            found.append((*shared, *zip(numbers, formulas, strict=True)))
            earlier |= {formula: symbol for symbol, formula in numbers.items()}
        return tuple(found)


def _centered(e: Expr) -> Expr:
    """e^(x - m), which is at most 1."""
    return e.xreplace(
        {node: ExpNonpositive(*node.args) for node in e.atoms(Exp) if is_weight(node)}
    )


def _walk(
    formulas: list[Expr], kept: Mapping[Expr, tuple[Expr, int, int]] | None = None, at: int = 0
) -> Walk:
    kept = kept or {}
    symbols = {e: symbol for e, (symbol, _, _) in kept.items()}
    ours = {symbol: e for e, (symbol, first, _) in kept.items() if first == at}
    # A kept value may be made of others: each by its arguments.
    made = [e.func(*(arg.xreplace(symbols) for arg in e.args)) for e in ours.values()]
    results = [e.xreplace(symbols) for e in formulas]
    shared, found = _repeated([*made, *results], sympy.numbered_symbols("t"))
    waiting = dict(shared) | dict(zip(ours, found, strict=False))
    named: dict[Expr, Expr] = {}

    def name(e: Expr) -> None:
        for symbol in sorted(e.free_symbols & waiting.keys() - named.keys(), key=str):
            name(waiting[symbol])
            named.setdefault(symbol, waiting[symbol])

    for e in found:
        name(e)
    for symbol in ours:
        name(symbol)
    return Walk(tuple(named.items()), tuple(found[len(ours) :]))


def _subexpressions(e: Expr) -> set[Expr]:
    return set(sympy.preorder_traversal(e))


def _is_costly_for_narrow(e: Expr) -> bool:
    """Whether it is more than exponentials: a GPU has an instruction for those, which is as exact as the
    gradients of two bytes need, and computing one again takes less than keeping it."""
    names = {type(part).__name__.lower() for part in _subexpressions(e)}
    return not names.isdisjoint({*_COSTLY} - {"exp_nonpositive"})


def _keep(
    walks: list[list[Expr]], is_element: Callable[[Expr], bool]
) -> list[tuple[Expr, int, int]]:
    """Costly formulas of elements that more than one walk computes: each, its first walk and its last."""
    there = [set().union(*map(_subexpressions, walk)) if walk else set() for walk in walks]
    found: dict[Expr, list[int]] = {}

    def look(e: Expr, at: int) -> None:
        if type(e).__name__.lower() in _COSTLY and is_element(e):
            first = next(w for w in range(at + 1) if e in there[w])
            if first < at:
                found.setdefault(e, [first, at])[1] = at
                return
        for arg in e.args:
            look(arg, at)

    for at, walk in enumerate(walks):
        for e in walk:
            look(e, at)
    return [(e, first, last) for e, (first, last) in found.items()]
