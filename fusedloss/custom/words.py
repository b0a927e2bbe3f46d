"""The primitives of custom losses, as SymPy functions: what each means, and its derivative.

SymPy simplifies as mathematics allows, which rounding does not: ``log(1 + exp(x))`` overflows where
``softplus(x)`` does not. These functions are opaque to it. Each says

    derivatives()  by each argument, finite wherever the function's slope is
    pieces()       or, where it chooses among its arguments, itself as a Where of them
    lowered()      itself in the words that kernels have; by default it is one of them
    torch()        itself on tensors, in PyTorch, and on Python numbers' float64 tensors

Conditions are opaque as well: to SymPy ``t == t`` is true and ``not x > a`` is ``x <= a``, which nan
is an exception to.
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

Expr = Any  # SymPy is untyped
INPUT, TARGET = "input", "target"  # the symbols' names

ONE, ZERO, HALF = Integer(1), Integer(0), Rational(1, 2)

NO_TRUTH_VALUE = "the truth value of a symbol or condition depends on the element"


def overflows(number: Expr) -> bool:
    """Whether a finite number is beyond float64."""
    try:
        return math.isinf(float(number))
    except OverflowError:
        return True


# ---- conditions ----------------------------------------------------------------------------------


class Condition(Boolean):  # type: ignore[misc]
    """What holds or does not, as IEEE 754 has it: nothing holds of nan but that it differs."""

    operation: ClassVar[str]  # in kernels

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


def _comparison(name: str, operator: str) -> Any:
    return type(name, (Comparison,), {"operator": operator})


Greater: Any = _comparison("Greater", ">")
GreaterEqual: Any = _comparison("GreaterEqual", ">=")
Less: Any = _comparison("Less", "<")
LessEqual: Any = _comparison("LessEqual", "<=")
Equal: Any = _comparison("Equal", "==")
NotEqual: Any = _comparison("NotEqual", "!=")


class LogicalAnd(Condition):
    operation = "logical_and"


class LogicalOr(Condition):
    operation = "logical_or"


class LogicalNot(Condition):
    operation = "logical_not"


def condition(given: Any) -> Any:
    """SymPy's own conditions as ours.

    Raises:
        TypeError: it is no condition.
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


# ---- words and their derivatives -----------------------------------------------------------------


class Word(sympy.Function):  # type: ignore[misc]
    """A function of real numbers."""

    torch: ClassVar[Any]
    is_commutative = True  # SymPy does not see it of one with a condition: W**2 / W would stay so

    def derivatives(self) -> tuple[Expr, ...]:
        raise NotImplementedError(f"{self.func.__name__} is a word of kernels alone")

    def pieces(self) -> Where | None:
        return None

    def lowered(self) -> Expr:
        return self


def derivative(e: Expr, symbol: Expr, outer: Expr = ONE) -> Expr:
    """outer times the derivative of a formula in our words.

    What is not taken never counts: outer may be infinite where a Where inside of e cuts the symbol off,
    and so goes into the branches, as PyTorch's gradient does, instead of meeting their 0.
    """
    if symbol not in e.free_symbols:
        return ZERO
    if e == symbol:
        return outer
    if outer != 1:
        if not _cuts_off(e, symbol):
            return outer * derivative(e, symbol)
        if e.is_Add:  # the terms that are not cut keep their sum
            whole = [term for term in e.args if not _cuts_off(term, symbol)]
            cut = [derivative(t, symbol, outer) for t in e.args if t not in whole]
            return sympy.Add(derivative(sympy.Add(*whole), symbol, outer), *cut)
        # What is the same for all elements is finite where the value is.
        elements = [s for s in outer.free_symbols if s.name in (INPUT, TARGET)]
        factor, rest = outer.as_independent(*elements, as_Add=False)
        if factor != 1:
            return factor * derivative(e, symbol, rest)
    chosen = e.pieces() if isinstance(e, Word) else None
    if chosen is not None:
        holds, yes, no = chosen.args
        return Where(holds, derivative(yes, symbol, outer), derivative(no, symbol, outer))
    total = ZERO
    for slope, arg in _slopes(e, symbol):
        total += derivative(arg, symbol, outer * slope)
    return total


def _slopes(e: Expr, symbol: Expr) -> Iterator[tuple[Expr, Expr]]:
    """The arguments that a formula depends on by other than a choice, each after the derivative by
    it."""
    if e.is_Add:
        yield from ((ONE, term) for term in e.args)
    elif e.is_Mul:
        for i, factor in enumerate(e.args):
            yield sympy.Mul(*e.args[:i], *e.args[i + 1 :]), factor
    elif e.is_Pow:
        yield e.exp * e.base ** (e.exp - 1), e.base
    elif isinstance(e, Power) and isinstance(e.args[0], Sigmoid) and not e.args[1].has(symbol):
        # The power itself again, and nothing that could be 0 / 0.
        x = e.args[0].args[0]
        yield e.args[1] * e * Sigmoid(-x), x
    else:
        yield from zip(e.derivatives(), e.args, strict=True)


def _cuts_off(e: Expr, symbol: Expr) -> bool:
    """Whether a branch of a Where in the formula does not depend on the symbol, but another does."""
    if e == symbol or symbol not in e.free_symbols:
        return False
    chosen = e.pieces() if isinstance(e, Word) else None
    if chosen is None:
        return any(_cuts_off(arg, symbol) for arg in e.args)
    depend = [symbol in branch.free_symbols for branch in chosen.args[1:]]
    return depend[0] != depend[1] or any(_cuts_off(branch, symbol) for branch in chosen.args[1:])


def _word(name: str, function: Callable[..., Tensor], **methods: Any) -> Any:
    methods["torch"] = staticmethod(function)
    return type(name, (Word,), methods)


# ---- words that kernels have ---------------------------------------------------------------------

Exp: Any = _word("exp", torch.exp, derivatives=lambda self: (self,))
Expm1: Any = _word("expm1", torch.expm1, derivatives=lambda self: (Exp(self.args[0]),))
Log: Any = _word("log", torch.log, derivatives=lambda self: (1 / self.args[0],))
Log1p: Any = _word("log1p", torch.log1p, derivatives=lambda self: (1 / (1 + self.args[0]),))
Sqrt: Any = _word("sqrt", torch.sqrt, derivatives=lambda self: (HALF / self,))
Sin: Any = _word("sin", torch.sin, derivatives=lambda self: (Cos(self.args[0]),))
Cos: Any = _word("cos", torch.cos, derivatives=lambda self: (-Sin(self.args[0]),))
Tanh: Any = _word("tanh", torch.tanh, derivatives=lambda self: (SechSquared(self.args[0]),))
Erf: Any = _word(
    "erf",
    torch.erf,
    derivatives=lambda self: (
        sympy.Float(1.1283791670955126) * ExpNonpositive(-(self.args[0] ** 2)),
    ),
)
# Their arguments are known to be in the domain: derivatives and lowered forms are made of these.
ExpNonpositive: Any = _word("exp_nonpositive", torch.exp)
Log1pUnit: Any = _word("log1p_unit", torch.log1p)
# 1 / x as one division, which powers and quotients share.
Reciprocal: Any = _word("reciprocal", torch.reciprocal)


def _is_negated(x: Expr) -> bool:
    return bool(x.as_coeff_Mul()[0].is_negative)


class Abs(Word):
    """|x|, slope 0 at the kink."""

    nargs = 1
    torch = staticmethod(torch.abs)

    @classmethod
    def eval(cls, x: Expr) -> Expr | None:
        return cls(-x) if _is_negated(x) else None

    def derivatives(self) -> tuple[Expr, ...]:
        return (Sign(self.args[0]),)


class Sign(Word):
    """-1, 0 or 1."""

    nargs = 1
    torch = staticmethod(torch.sign)

    def derivatives(self) -> tuple[Expr, ...]:
        return (ZERO,)


class Where(Word):
    """The second argument where the first, a condition, holds, else the third."""

    nargs = 3

    @classmethod
    def eval(cls, condition: Expr, yes: Expr, no: Expr) -> Expr | None:
        if condition == sympy.true or yes == no:
            return yes
        return no if condition == sympy.false else None

    def pieces(self) -> Where:
        return self


class _Extremum(Word):
    nargs = 2

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        return a if a == b else None

    def _between(self, low: Expr, high: Expr) -> Where:
        """The first argument where high is above low, the second where it is below; where they are
        equal, or one is nan, half of either."""
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


class Clamp(Word):
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


class Relu(Word):
    nargs = 1
    torch = staticmethod(torch.relu)

    def pieces(self) -> Where:
        x = self.args[0]
        return Where(Greater(x, ZERO), x, ZERO)


class Power(Word):
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
        of_element = {str(s) for s in exponent.free_symbols} & {INPUT, TARGET}
        if not of_element:
            return PowerSlope(base, exponent, self), ZERO
        # e b^e / b, b^e being there already; at 0 its limit.
        at_zero = Equal(base, ZERO)
        limit = Where(Equal(exponent, ZERO), ZERO, exponent * Power(ZERO, exponent - 1))
        by_base = Where(at_zero, limit, exponent * self / base)
        vanishes = LogicalAnd(at_zero, GreaterEqual(exponent, ZERO))
        return by_base, Where(vanishes, ZERO, self * Log(base))


class PowerSlope(Word):
    """The derivative of b^e by b, from b, an e that is the same for all elements, and b^e."""

    nargs = 3

    @staticmethod
    def torch(base: Tensor, exponent: Tensor, value: Tensor) -> Tensor:
        return torch.where(exponent == 0, 0.0, exponent * base ** (exponent - 1))


class XLogY(Word):
    """x log(y), 0 where x is 0 (unless y is nan)."""

    nargs = 2
    torch = staticmethod(torch.xlogy)

    def derivatives(self) -> tuple[Expr, ...]:
        x, y = self.args
        at_zero = Equal(x, ZERO)
        log = Where(LogicalAnd(at_zero, LessEqual(y, ZERO)), ZERO, Log(y))
        return log, Where(at_zero, ZERO, x / y)


# ---- words made of others ------------------------------------------------------------------------
# All of e = exp(-|x|) in [0, 1], so that the words of one x share it, and nothing overflows.


def _decay(x: Expr) -> Expr:
    return ExpNonpositive(-Abs(x))


def _sigmoids(x: Expr) -> tuple[Expr, Expr]:
    """The smaller of sigmoid(x) and sigmoid(-x), and the larger."""
    e = _decay(x)
    large = Reciprocal(1 + e)
    return e * large, large


class Sigmoid(Word):
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


class SigmoidSlope(Word):
    nargs = 1

    def lowered(self) -> Expr:
        small, large = _sigmoids(self.args[0])
        return small * large


class LogSigmoid(Word):
    nargs = 1
    torch = staticmethod(F.logsigmoid)

    def derivatives(self) -> tuple[Expr, ...]:
        return (Sigmoid(-self.args[0]),)

    def lowered(self) -> Expr:
        return -Softplus(-self.args[0]).lowered()  # its sign joins those of the factors beside it


class Softplus(Word):
    nargs = 1

    @staticmethod
    def torch(x: Tensor) -> Tensor:
        # Not F.softplus, which is x from 20 on: off by 1e-10 there.
        return -F.logsigmoid(-x)

    def derivatives(self) -> tuple[Expr, ...]:
        return (Sigmoid(self.args[0]),)

    def lowered(self) -> Expr:
        return Relu(self.args[0]) + Log1pUnit(_decay(self.args[0]))


class SechSquared(Word):
    """The slope of tanh, 1 - tanh^2 without its cancellation."""

    nargs = 1

    def lowered(self) -> Expr:
        e = ExpNonpositive(-2 * Abs(self.args[0]))
        return 4 * e * Reciprocal(1 + e) ** 2


def canonical(expression: Expr) -> Expr:
    """SymPy's own functions and powers in our words; other functions stay, for whoever looks.

    Whole powers up to 16 stay powers, to be printed as products, and halves are square roots.
    """

    def rewrite(node: Expr) -> Expr:
        if not node.args:
            return node
        if isinstance(node, Boolean) and not isinstance(node, Condition | sympy.Symbol):
            return condition(node)
        args = [rewrite(arg) for arg in node.args]
        if isinstance(node, sympy.Pow):
            return _power(*args)
        if isinstance(node, sympy.exp):
            return Exp(*args)
        if isinstance(node, sympy.Max | sympy.Min):
            extremum: Any = Maximum if isinstance(node, sympy.Max) else Minimum
            return functools.reduce(extremum, args)
        if isinstance(node, sympy.Piecewise):
            value, last = args[-1].args
            result = value if last == sympy.true else Where(last, value, sympy.nan)
            for pair in args[-2::-1]:
                result = Where(pair.args[1], pair.args[0], result)
            return result
        word = _OF_SYMPY.get(node.func)
        if word is not None:
            return word(*args)
        return node.func(*args)

    return rewrite(expression)


_OF_SYMPY: dict[Any, Any] = {
    sympy.Abs: Abs,
    sympy.sign: Sign,
    sympy.log: Log,
    sympy.sin: Sin,
    sympy.cos: Cos,
    sympy.tanh: Tanh,
    sympy.erf: Erf,
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
    """Twice a small whole or half exponent; None: it is none."""
    twice = 2 * float(exponent) if exponent.is_number else math.inf  # SymPy tells 3.0 from 3
    return int(twice) if abs(twice) <= 32 and twice.is_integer() else None


def lowered(expression: Expr, known: dict[Expr, Expr] | None = None) -> Expr:
    """The expression in words that kernels have. known: what was lowered before."""
    known = {} if known is None else known
    if not expression.args:
        return expression
    if expression not in known:
        node = expression.func(*(lowered(arg, known) for arg in expression.args))
        deeper = node.lowered() if isinstance(node, Word) else node
        known[expression] = deeper if deeper == node else lowered(deeper, known)
    return known[expression]
