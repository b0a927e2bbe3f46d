"""The primitives of custom losses, as SymPy functions: what each means, and its derivative.

SymPy simplifies by the rules of mathematics and ignores rounding: ``log(1 + exp(x))`` overflows where
``softplus(x)`` does not. So these functions are opaque to it. Each defines

    derivatives()  its derivatives by each argument, finite wherever the function's slope is
    pieces()       itself as a Where, if it chooses among its arguments (instead of derivatives)
    lowered()      itself in primitives that the kernels have; by default it is one of them
    torch()        itself in PyTorch, on tensors and on float64 tensors of Python numbers
    nargs          for those that are classes: SymPy sorts terms by it, and so sums keep their order

Conditions are opaque as well: to SymPy ``t == t`` is true and ``not x > a`` is ``x <= a``, which does
not hold for nan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import sympy
import torch
from sympy import Integer, Rational
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.nn import functional as F

from .loss import INPUTS

Expr = Any  # SymPy is untyped
INPUT, TARGET = INPUTS[:2]

ONE, ZERO, HALF = Integer(1), Integer(0), Rational(1, 2)

NO_TRUTH_VALUE = "the truth value of a symbol or condition depends on the element"


class Input(sympy.Symbol):  # type: ignore[misc]
    """The symbol of what differs from element to element, or from row to row."""


def inputs_in(e: Expr) -> list[Expr]:
    """The symbols of inputs in a formula."""
    return [symbol for symbol in e.free_symbols if isinstance(symbol, Input)]


def overflows(number: Expr) -> bool:
    """Whether a finite number is beyond float64."""
    try:
        return math.isinf(float(number))
    except OverflowError:
        return True


# ---- conditions ----------------------------------------------------------------------------------


class Condition(Boolean):  # type: ignore[misc]
    """A condition with the meaning of IEEE 754: for nan, only "differs" holds."""

    operation: ClassVar[str]  # its name in kernels

    def __and__(self, other: Any) -> Condition:
        return LogicalAnd(self, condition(other))

    def __or__(self, other: Any) -> Condition:
        return LogicalOr(self, condition(other))

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Condition:
        return LogicalNot(self)

    def __bool__(self) -> bool:
        raise TypeError(NO_TRUTH_VALUE)

    def _sympystr(self, printer: Any) -> str:
        return f"{self.func.__name__}({', '.join(map(printer._print, self.args))})"


class Comparison(Condition):
    operator: ClassVar[str]
    lhs = property(lambda self: self.args[0])
    rhs = property(lambda self: self.args[1])

    def _sympystr(self, printer: Any) -> str:
        return f"{printer._print(self.lhs)} {self.operator} {printer._print(self.rhs)}"


def _comparison(name: str, operator: str, function: Callable[..., Tensor]) -> Any:
    return type(name, (Comparison,), {"operator": operator, "torch": staticmethod(function)})


Greater: Any = _comparison("Greater", ">", torch.gt)
GreaterEqual: Any = _comparison("GreaterEqual", ">=", torch.ge)
Less: Any = _comparison("Less", "<", torch.lt)
LessEqual: Any = _comparison("LessEqual", "<=", torch.le)
Equal: Any = _comparison("Equal", "==", torch.eq)
NotEqual: Any = _comparison("NotEqual", "!=", torch.ne)


class LogicalAnd(Condition):
    operation = "logical_and"


class LogicalOr(Condition):
    operation = "logical_or"


class LogicalNot(Condition):
    operation = "logical_not"


def condition(given: Any) -> Any:
    """SymPy's conditions as ours.

    Raises:
        TypeError: it is not a condition.
    """
    if isinstance(given, Condition):
        return given
    kind = _CONDITION_OF_SYMPY.get(getattr(given, "func", None))
    if kind is None:
        raise TypeError(f"{given!r} is no condition of symbols, such as input > target")
    if issubclass(kind, Comparison):
        return kind(*map(canonical, given.args))
    args = map(condition, given.args)
    return LogicalNot(*args) if kind is LogicalNot else functools.reduce(kind, args)


_CONDITION_OF_SYMPY: dict[Any, Any] = {
    sympy.Gt: Greater,
    sympy.Ge: GreaterEqual,
    sympy.Lt: Less,
    sympy.Le: LessEqual,
    sympy.Eq: Equal,
    sympy.Ne: NotEqual,
    sympy.And: LogicalAnd,
    sympy.Or: LogicalOr,
    sympy.Not: LogicalNot,
}


# ---- primitives and their derivatives ------------------------------------------------------------


class Primitive(sympy.Function):  # type: ignore[misc]
    """A function of real numbers."""

    torch: ClassVar[Any]
    is_commutative = True  # SymPy cannot tell if an argument is a condition, and keeps P**2 / P

    def derivatives(self) -> tuple[Expr, ...]:
        raise NotImplementedError(f"{self.func.__name__} is a primitive of kernels only")

    def pieces(self) -> Where | None:
        return None

    def lowered(self) -> Expr:
        return self


def derivative(e: Expr, symbol: Expr, outer: Expr = ONE) -> Expr:
    """outer times the derivative of a formula of primitives.

    A branch that is not taken has no influence. outer may be infinite where a Where inside of e cuts
    the symbol off, and infinity times that branch's 0 would be nan. So outer is multiplied inside of the
    branches, as in PyTorch's backward.
    """
    if not _depends(e, symbol):
        return ZERO
    if e == symbol:
        return outer
    if outer != 1:
        if not _cuts_off(e, symbol):
            return outer * derivative(e, symbol)
        if e.is_Add:  # the terms that are not cut off stay one sum
            whole = [term for term in e.args if not _cuts_off(term, symbol)]
            cut = [derivative(t, symbol, outer) for t in e.args if t not in whole]
            return sympy.Add(derivative(sympy.Add(*whole), symbol, outer), *cut)
        # A factor that is the same for all elements is finite where the value is.
        factor, rest = outer.as_independent(*inputs_in(outer), as_Add=False)
        if factor != 1:
            return factor * derivative(e, symbol, rest)
    chosen = e.pieces() if isinstance(e, Primitive) else None
    if chosen is not None:
        holds, yes, no = chosen.args
        return Where(holds, derivative(yes, symbol, outer), derivative(no, symbol, outer))
    total = ZERO
    for slope, arg in _slopes(e, symbol):
        total += derivative(arg, symbol, outer * slope)
    return total


def _slopes(e: Expr, symbol: Expr) -> Iterator[tuple[Expr, Expr]]:
    """The arguments of a formula that is not a choice, each after the derivative by it."""
    if e.is_Add:
        yield from ((ONE, term) for term in e.args)
    elif e.is_Mul:
        for i, factor in enumerate(e.args):
            yield sympy.Mul(*e.args[:i], *e.args[i + 1 :]), factor
    elif e.is_Pow:
        yield e.exp * e.base ** (e.exp - 1), e.base
    elif (
        isinstance(e, Power) and isinstance(e.args[0], Sigmoid) and not _depends(e.args[1], symbol)
    ):
        # In terms of the power itself, where nothing can be 0 / 0.
        x = e.args[0].args[0]
        yield e.args[1] * e * Sigmoid(-x), x
    else:
        yield from zip(e.derivatives(), e.args, strict=True)


def _depends(e: Expr, symbol: Expr) -> bool:
    """Whether the symbol is in the formula, and not only inside of a Detach."""
    if isinstance(e, Detach) or symbol not in e.free_symbols:
        return False
    return e == symbol or any(_depends(arg, symbol) for arg in e.args)


def _cuts_off(e: Expr, symbol: Expr) -> bool:
    """Whether a branch of a Where in the formula does not depend on the symbol, but another does."""
    if e == symbol or not _depends(e, symbol):
        return False
    chosen = e.pieces() if isinstance(e, Primitive) else None
    if chosen is None:
        return any(_cuts_off(arg, symbol) for arg in e.args)
    depend = [_depends(branch, symbol) for branch in chosen.args[1:]]
    return depend[0] != depend[1] or any(_cuts_off(branch, symbol) for branch in chosen.args[1:])


def _primitive(name: str, function: Callable[..., Tensor], **methods: Any) -> Any:
    methods["torch"] = staticmethod(function)
    return type(name, (Primitive,), methods)


# ---- primitives that kernels have ----------------------------------------------------------------

Exp: Any = _primitive("exp", torch.exp, derivatives=lambda self: (self,))
Expm1: Any = _primitive("expm1", torch.expm1, derivatives=lambda self: (Exp(self.args[0]),))
Log: Any = _primitive("log", torch.log, derivatives=lambda self: (1 / self.args[0],))
Log1p: Any = _primitive("log1p", torch.log1p, derivatives=lambda self: (1 / (1 + self.args[0]),))
Sqrt: Any = _primitive("sqrt", torch.sqrt, derivatives=lambda self: (HALF / self,))
Sin: Any = _primitive("sin", torch.sin, derivatives=lambda self: (Cos(self.args[0]),))
Cos: Any = _primitive("cos", torch.cos, derivatives=lambda self: (-Sin(self.args[0]),))
Tanh: Any = _primitive("tanh", torch.tanh, derivatives=lambda self: (SechSquared(self.args[0]),))
TWO_BY_ROOT_PI = sympy.Float(1.1283791670955126)
Erf: Any = _primitive(
    "erf", torch.erf, derivatives=lambda self: (TWO_BY_ROOT_PI * ExpMinusSquare(self.args[0]),)
)
Erfc: Any = _primitive(
    "erfc", torch.erfc, derivatives=lambda self: (-TWO_BY_ROOT_PI * ExpMinusSquare(self.args[0]),)
)
Lgamma: Any = _primitive("lgamma", torch.lgamma, derivatives=lambda self: (Digamma(self.args[0]),))
Digamma: Any = _primitive(
    "digamma", torch.digamma, derivatives=lambda self: (Trigamma(self.args[0]),)
)
# Not torch.polygamma(1, x), whose error is 1e-9.
Trigamma: Any = _primitive("trigamma", lambda x: torch.special.zeta(2.0, x))
# For derivatives and lowered forms, whose arguments are known to be in the domain.
ExpNonpositive: Any = _primitive("exp_nonpositive", torch.exp)
Log1pUnit: Any = _primitive("log1p_unit", torch.log1p)
# e^(-x^2), without the rounding error of x^2.
ExpMinusSquare: Any = _primitive("exp_minus_square", lambda x: torch.exp(-x * x))
# 1 / x as one division that powers and quotients share.
Reciprocal: Any = _primitive("reciprocal", torch.reciprocal)


def _is_negated(x: Expr) -> bool:
    return bool(x.as_coeff_Mul()[0].is_negative)


class Abs(Primitive):
    """|x|, slope 0 at the kink."""

    nargs = 1
    torch = staticmethod(torch.abs)

    @classmethod
    def eval(cls, x: Expr) -> Expr | None:
        return cls(-x) if _is_negated(x) else None

    def derivatives(self) -> tuple[Expr, ...]:
        return (Sign(self.args[0]),)


class Sign(Primitive):
    """-1, 0 or 1."""

    nargs = 1
    torch = staticmethod(torch.sign)

    def derivatives(self) -> tuple[Expr, ...]:
        return (ZERO,)


class Where(Primitive):
    """The second argument where the condition, the first argument, holds, else the third."""

    nargs = 3

    @classmethod
    def eval(cls, condition: Expr, yes: Expr, no: Expr) -> Expr | None:
        if condition == sympy.true or yes == no:
            return yes
        return no if condition == sympy.false else None

    def pieces(self) -> Where:
        return self


class _Extremum(Primitive):
    nargs = 2

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        return a if a == b else None

    def _between(self, low: Expr, high: Expr) -> Where:
        """The first argument where high > low, the second where high < low, else half of each."""
        first, second = self.args
        half = HALF * first + HALF * second
        return Where(Greater(high, low), first, Where(Less(high, low), second, half))


class Maximum(_Extremum):
    torch = staticmethod(torch.maximum)

    def pieces(self) -> Where:
        return self._between(self.args[1], self.args[0])


class Minimum(_Extremum):
    torch = staticmethod(torch.minimum)

    def pieces(self) -> Where:
        return self._between(*self.args)


class Clamp(Primitive):
    """x bounded below, then above; the slope at a bound itself is x's. nan if a bound is."""

    nargs = 3

    @staticmethod
    def torch(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        # Not torch.clamp, whose gradient at the bounds depends on the release.
        x = torch.where((x < low) | low.isnan(), low, x)
        return torch.where((x > high) | high.isnan(), high, x)

    def lowered(self) -> Expr:
        x, low, high = self.args
        if low.is_number and high.is_number and low <= high:
            return self
        return Minimum(Maximum(x, low), high)

    def pieces(self) -> Where:
        x, low, high = self.args
        return Where(Less(x, low), low, Where(Greater(x, high), high, x))


class Relu(Primitive):
    nargs = 1
    torch = staticmethod(torch.relu)

    def pieces(self) -> Where:
        x = self.args[0]
        return Where(Greater(x, ZERO), x, ZERO)


class Power(Primitive):
    """b^e for an exponent that is not a small whole number."""

    nargs = 2
    torch = staticmethod(torch.pow)

    def lowered(self) -> Expr:
        base, exponent = self.args
        twice = _twice(exponent)
        if twice is None:
            return self
        whole = twice // 2
        return base**whole * Sqrt(base) if whole >= 0 else base ** (whole + 1) / Sqrt(base)

    def derivatives(self) -> tuple[Expr, ...]:
        base, exponent = self.args
        if _twice(exponent) is not None:
            return exponent * _power(base, exponent - 1), ZERO
        if not inputs_in(exponent):
            return PowerSlope(base, exponent, self), ZERO
        # e b^e / b, which reuses b^e; at 0 its limit.
        at_zero = Equal(base, ZERO)
        limit = Where(Equal(exponent, ZERO), ZERO, exponent * Power(ZERO, exponent - 1))
        by_base = Where(at_zero, limit, exponent * self / base)
        vanishes = LogicalAnd(at_zero, GreaterEqual(exponent, ZERO))
        return by_base, Where(vanishes, ZERO, self * Log(base))


class PowerSlope(Primitive):
    """The derivative of b^e by b, from b, e and b^e. e is the same for all elements."""

    nargs = 3

    @staticmethod
    def torch(base: Tensor, exponent: Tensor, value: Tensor) -> Tensor:
        return torch.where(exponent == 0, 0.0, exponent * base ** (exponent - 1))


class Detach(Primitive):
    """Its argument, without a gradient: another formula until the slopes are known, the same one in a
    kernel. None is inside of another."""

    nargs = 1
    torch = staticmethod(torch.detach)

    @classmethod
    def eval(cls, x: Expr) -> Expr | None:
        if not inputs_in(x):
            return x
        inside = attached(x)
        return cls(inside) if inside != x else None


def attached(e: Expr) -> Expr:
    """The formula as a kernel computes it: the arguments of Detach instead of it."""
    return e.xreplace({node: node.args[0] for node in e.atoms(Detach)})


class XLogY(Primitive):
    """x log(y), 0 where x is 0 (unless y is nan)."""

    nargs = 2
    torch = staticmethod(torch.xlogy)

    def derivatives(self) -> tuple[Expr, ...]:
        x, y = self.args
        at_zero = Equal(x, ZERO)
        log = Where(LogicalAnd(at_zero, LessEqual(y, ZERO)), ZERO, Log(y))
        return log, Where(at_zero, ZERO, x / y)


# ---- primitives made of others -------------------------------------------------------------------
# All use e = exp(-|x|) in [0, 1], so that those of one x share it, and nothing overflows.


def _decay(x: Expr) -> Expr:
    return ExpNonpositive(-Abs(x))


def _sigmoids(x: Expr) -> tuple[Expr, Expr]:
    """The smaller of sigmoid(x) and sigmoid(-x), and the larger."""
    e = _decay(x)
    large = Reciprocal(1 + e)
    return e * large, large


class Sigmoid(Primitive):
    nargs = 1
    torch = staticmethod(torch.sigmoid)

    def derivatives(self) -> tuple[Expr, ...]:
        return (SigmoidSlope(self.args[0]),)

    def lowered(self) -> Expr:
        x = self.args[0]
        small, large = _sigmoids(x)
        # One condition serves x and -x.
        if _is_negated(x):
            return Where(Less(-x, ZERO), large, small)
        return Where(Less(x, ZERO), small, large)


class SigmoidSlope(Primitive):
    nargs = 1

    def lowered(self) -> Expr:
        small, large = _sigmoids(self.args[0])
        return small * large


class LogSigmoid(Primitive):
    nargs = 1
    torch = staticmethod(F.logsigmoid)

    def derivatives(self) -> tuple[Expr, ...]:
        return (Sigmoid(-self.args[0]),)

    def lowered(self) -> Expr:
        return -Softplus(-self.args[0]).lowered()  # the sign merges with other factors' signs


class Softplus(Primitive):
    nargs = 1

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        # Not F.softplus, which returns x from 20 on, with an error of 1e-10.
        return -F.logsigmoid(-x)

    def derivatives(self) -> tuple[Expr, ...]:
        return (Sigmoid(self.args[0]),)

    def lowered(self) -> Expr:
        return Relu(self.args[0]) + Log1pUnit(_decay(self.args[0]))


class SechSquared(Primitive):
    """The slope of tanh: 1 - tanh^2 without cancellation."""

    nargs = 1

    def lowered(self) -> Expr:
        e = ExpNonpositive(-2 * Abs(self.args[0]))
        return 4 * e * Reciprocal(1 + e) ** 2


def canonical(expression: Expr) -> Expr:
    """SymPy's functions and powers as primitives. Functions without one stay, and the caller refuses
    them. Whole powers up to 16 stay powers, which print as products; halves become square roots.
    """

    def rewrite(node: Expr) -> Expr:
        if not node.args:
            return node
        if isinstance(node, Boolean) and not isinstance(node, Condition | sympy.Symbol):
            return condition(node)
        args = [rewrite(arg) for arg in node.args]
        if isinstance(node, sympy.Pow):
            return _power(*args)
        if isinstance(node, sympy.Max | sympy.Min):
            extremum: Any = Maximum if isinstance(node, sympy.Max) else Minimum
            return functools.reduce(extremum, args)
        if isinstance(node, sympy.Piecewise):
            value, last = args[-1].args
            result = value if last == sympy.true else Where(last, value, sympy.nan)
            for pair in args[-2::-1]:
                result = Where(pair.args[1], pair.args[0], result)
            return result
        return _OF_SYMPY.get(node.func, node.func)(*args)

    return rewrite(expression)


_OF_SYMPY: dict[Any, Any] = {
    sympy.Abs: Abs,
    sympy.exp: Exp,
    sympy.sign: Sign,
    sympy.log: Log,
    sympy.sin: Sin,
    sympy.cos: Cos,
    sympy.tanh: Tanh,
    sympy.erf: Erf,
    sympy.erfc: Erfc,
}


def _power(base: Expr, exponent: Expr) -> Expr:
    if base == sympy.E:
        return Exp(exponent)
    twice = _twice(exponent)
    if twice is not None:
        exponent = Rational(twice, 2)
        if exponent.is_Integer:
            return base**exponent
        if exponent == HALF:
            return Sqrt(base)
    return Power(base, exponent)


def _twice(exponent: Expr) -> int | None:
    """Twice a small whole or half exponent; None: it is not one."""
    twice = 2 * float(exponent) if exponent.is_number else math.inf  # to SymPy 3.0 is not 3
    return int(twice) if abs(twice) <= 32 and twice.is_integer() else None


def lowered(expression: Expr, known: dict[Expr, Expr] | None = None) -> Expr:
    """The expression in primitives that kernels have. known: results of earlier calls."""
    known = {} if known is None else known
    if not expression.args:
        return expression
    if expression not in known:
        node = expression.func(*(lowered(arg, known) for arg in expression.args))
        deeper = node.lowered() if isinstance(node, Primitive) else node
        known[expression] = deeper if deeper == node else lowered(deeper, known)
    return known[expression]
