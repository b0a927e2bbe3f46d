"""Formulas of rows that lose digits or overflow, as the words that do not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import sympy

from .primitives import Exp, Expm1, Expr, Log, Sqrt
from .row_primitives import (
    CLASSES,
    At,
    LogSoftmax,
    LogSumExp,
    Norm,
    OneMinusSoftmax,
    Softmax,
    Sum,
    Weighted,
    is_element,
)


@dataclass(frozen=True)
class _Rewrite:
    part: Expr  # what was written
    by: Expr
    whole: Expr  # the formula with it
    why: str


class Rewriter:
    """Rewrites formulas, and notes what it did."""

    def __init__(self, elements: Collection[Expr]) -> None:
        self.elements = elements
        self.notes: dict[str, None] = {}  # in order
        self._known: dict[Expr, Expr] = {}

    def __call__(self, e: Expr) -> Expr:
        if not e.args:
            return e
        if e not in self._known:
            node = e.func(*map(self, e.args))
            found = next(self._rewrites(node), None)
            if found is not None:
                self.notes[f"{found.part} is computed as {found.by}, {found.why}"] = None
                node = self(found.whole)
            self._known[e] = node
        return self._known[e]

    def _rewrites(self, e: Expr) -> Iterator[_Rewrite]:
        if e.is_Mul:
            yield from _shares(e)
        elif e.is_Add:
            yield from _log_shares(e)
            yield from _other_shares(e)
            yield from _variances(e)
        elif isinstance(e, Log):
            yield from _logarithms(e)
        elif isinstance(e, Exp):
            yield from self._exponentials(e)
        elif isinstance(e, Expm1):
            share, place = _placed(e.args[0])
            if isinstance(share, LogSoftmax):
                by = place(OneMinusSoftmax(*share.args))
                yield _Rewrite(-e, by, -by, _EXACT)
        elif isinstance(e, Sqrt) and isinstance(e.args[0], Sum):
            root = _root(e.args[0].args[0])
            if root is not None:
                by = Norm(root)
                yield _Rewrite(e, by, by, "whose slope is 0 where all are 0")

    def _exponentials(self, e: Expr) -> Iterator[_Rewrite]:
        share, place = _placed(e.args[0])
        if isinstance(share, LogSoftmax):
            by = place(Softmax(*share.args))
            yield _Rewrite(e, by, by, "whose product with a logarithm is 0 where it is 0")
        terms = sympy.Add.make_args(e.args[0])
        logs = [term for term in terms if isinstance(term, LogSoftmax)]
        rest = sympy.Add(*(term for term in terms if term not in logs))
        if len(logs) == 1 and rest != 0 and not is_element(rest, self.elements):
            by = Softmax(*logs[0].args) * Exp(rest)
            yield _Rewrite(e, by, by, "whose product with a logarithm is 0 where it is 0")


_BOUNDED = "which does not overflow"
_EXACT = "which keeps its digits where the softmax is nearly 1"


def _placed(e: Expr) -> tuple[Expr, Callable[[Expr], Expr]]:
    """An element's formula, which may be inside of an At, and what puts another one in its place."""
    if isinstance(e, At):
        return e.args[0], lambda x: At(x, e.args[1])
    return e, lambda x: x


def _logarithms(e: Expr) -> Iterator[_Rewrite]:
    x = e.args[0]
    if isinstance(x, Sum) and isinstance(x.args[0], Exp):
        by = LogSumExp(*x.args[0].args)
        yield _Rewrite(e, by, by, _BOUNDED)
    share, place = _placed(x)
    if isinstance(share, Softmax):
        by = place(LogSoftmax(*share.args))
        yield _Rewrite(e, by, by, "which is finite where the softmax is 0")


def _shares(e: Expr) -> Iterator[_Rewrite]:
    """e^u / sum(e^u)."""
    powers = [factor.as_base_exp() for factor in e.args]
    for total, below in powers:
        if not (isinstance(total, Sum) and isinstance(total.args[0], Exp) and _whole(-below)):
            continue
        for factor, above in powers:
            exponential, place = _placed(factor)
            if exponential == total.args[0] and _whole(above):
                times = min(above, -below)
                by = place(Softmax(*exponential.args))
                whole = e * factor**-times * total**times * by**times
                yield _Rewrite(factor / total, by, whole, _BOUNDED)


def _whole(exponent: Expr) -> bool:
    return bool(exponent.is_Integer and exponent > 0)


def _log_shares(e: Expr) -> Iterator[_Rewrite]:
    """u - logsumexp(u), also at the label."""
    for term in e.args:
        sign, log = term.as_coeff_Mul()
        if not isinstance(log, LogSumExp) or abs(sign) != 1:
            continue
        (u,) = log.args
        at = [node for node in e.atoms(At) if node.args[0] == u]
        for x in (u, *at):
            _, place = _placed(x) if x in at else (x, lambda y: y)
            # A sum is one term among the others, or each of its terms is.
            for terms in ({-sign * x}, {-sign * part for part in sympy.Add.make_args(x)}):
                if terms <= set(e.args):
                    by = place(LogSoftmax(u))
                    rest = (t for t in e.args if t not in terms and t != term)
                    whole = sympy.Add(*rest, -sign * by)
                    yield _Rewrite(x - log, by, whole, "in which an offset of all does not cancel")


def _other_shares(e: Expr) -> Iterator[_Rewrite]:
    """1 - softmax(u), also at the label."""
    for term in e.args:
        sign, x = term.as_coeff_Mul()
        share, place = _placed(x)
        one = next((t for t in e.args if t.is_Number and t == -sign), None)
        if isinstance(share, Softmax) and abs(sign) == 1 and one is not None:
            by = place(OneMinusSoftmax(*share.args))
            rest = (t for t in e.args if t not in (term, one))
            yield _Rewrite(1 - x, by, sympy.Add(*rest, -sign * by), _EXACT)


def _variances(e: Expr) -> Iterator[_Rewrite]:
    """mean(x^2) - mean(x)^2."""
    for total in sorted(e.atoms(Sum), key=str):
        (x,) = total.args
        mean = total / CLASSES
        both = {Sum(x**2) / CLASSES, -(mean**2)}
        if both <= set(e.args):
            by = Sum((x - mean) ** 2) / CLASSES
            rest = (t for t in e.args if t not in both)
            why = "in which a large mean does not cancel"
            yield _Rewrite(sympy.Add(*both), by, sympy.Add(*rest, by), why)


def _root(square: Expr) -> Expr | None:
    """x, if the formula is x^2."""
    roots = []
    for factor in sympy.Mul.make_args(square):
        base, exponent = (sympy.sqrt(factor), 2) if factor.is_Number else factor.as_base_exp()
        if exponent != 2 or base.is_real is False:
            return None
        roots.append(base)
    return sympy.Mul(*roots)


def guarded(e: Expr, elements: Collection[Expr]) -> Expr:
    """For PyTorch: a product of a softmax with another element is 0 where the softmax is, even if the
    other one is infinite there."""
    known: dict[Expr, Expr] = {}

    def rewrite(e: Expr) -> Any:
        if not e.args:
            return e
        if e not in known:
            args = [rewrite(arg) for arg in e.args]
            weights = [a for a in args if _is_weight(a)]
            rest = [a for a in args if a not in weights and is_element(a, elements)]
            if e.is_Mul and weights and rest:
                numbers = (a for a in args if a not in weights and a not in rest)
                weighted = Weighted(sympy.Mul(*weights), sympy.Mul(*rest))
                known[e] = sympy.Mul(*numbers, weighted)
            else:
                known[e] = e.func(*args)
        return known[e]

    return rewrite(e)


def _is_weight(e: Expr) -> bool:
    if not isinstance(e, sympy.Expr):  # a condition
        return False
    base, exponent = e.as_base_exp()
    return isinstance(base, Softmax) and _whole(exponent)
