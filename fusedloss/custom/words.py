"""The words of a loss of one's own, as SymPy functions: what each means, and its derivative.

SymPy simplifies as mathematics allows, which rounding does not: ``log(1 + exp(x))`` overflows where
``softplus(x)`` does not. These functions are opaque to it. Each says

    derivatives()  by each argument, finite wherever the function's slope is
    lowered()      itself in the words that kernels have; by default it is one of them
    torch()        itself on tensors, in PyTorch, and on Python numbers' float64 tensors

A condition is a SymPy relation, or an And, Or or Not of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import sympy
import torch
from sympy import Integer, Rational
from torch import Tensor
from torch.nn import functional as F

Expr = Any  # SymPy is untyped
INPUT, TARGET = "input", "target"  # the symbols' names

ONE, ZERO, HALF = Integer(1), Integer(0), Rational(1, 2)


class Word(sympy.Function):  # type: ignore[misc]
    """A function of real numbers."""

    torch: ClassVar[Any]
    is_commutative = True  # SymPy does not see it of one with a condition: W**2 / W would stay so

    def derivatives(self) -> tuple[Expr, ...]:
        raise NotImplementedError(f"{self.func.__name__} is a word of kernels alone")

    def lowered(self) -> Expr:
        return self

    # SymPy's own hook. A word whose arguments do not all count everywhere chooses among their
    # derivatives instead of multiplying by 0: what is infinite there must not make a nan.
    def _eval_derivative(self, symbol: Expr) -> Expr:
        total = ZERO
        for slope, arg in zip(self.derivatives(), self.args, strict=True):
            inner = arg.diff(symbol)
            if inner != 0:
                total += slope * inner
        return total


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
# Of arguments known to be in the domain of the name: what derivatives and lowered forms are made of.
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

    def _eval_derivative(self, symbol: Expr) -> Expr:
        condition, yes, no = self.args
        return Where(condition, yes.diff(symbol), no.diff(symbol))


class _Extremum(Word):
    nargs = 2

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        return a if a == b else None

    def _between(self, symbol: Expr, a: Expr, b: Expr) -> Expr:
        """The derivative where the first argument rules at a, the second at b; where they are
        equal, or one is nan, half of either."""
        first, second = (arg.diff(symbol) for arg in self.args)
        return Where(a > b, first, Where(a < b, second, HALF * first + HALF * second))


class Maximum(_Extremum):
    torch = staticmethod(torch.maximum)

    def _eval_derivative(self, symbol: Expr) -> Expr:
        return self._between(symbol, *self.args)


class Minimum(_Extremum):
    torch = staticmethod(torch.minimum)

    def _eval_derivative(self, symbol: Expr) -> Expr:
        return self._between(symbol, *self.args[::-1])


class Clamp(Word):
    """x bounded below, then above; the slope at a bound itself is x's."""

    nargs = 3

    @staticmethod
    def torch(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        # Not torch.clamp, whose gradient at the bounds depends on the release.
        return torch.where(x < low, low, torch.where(x > high, high, x))

    def _eval_derivative(self, symbol: Expr) -> Expr:
        x, low, high = self.args
        inside = Where(x > high, high.diff(symbol), x.diff(symbol))
        return Where(x < low, low.diff(symbol), inside)


class Relu(Word):
    nargs = 1
    torch = staticmethod(torch.relu)

    def _eval_derivative(self, symbol: Expr) -> Expr:
        return Where(self.args[0] > 0, self.args[0].diff(symbol), ZERO)


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
        limit = Where(sympy.Eq(exponent, 0), ZERO, exponent * Power(ZERO, exponent - 1))
        by_base = Where(sympy.Eq(base, 0), limit, exponent * self / base)
        vanishes = sympy.And(sympy.Eq(base, 0), exponent >= 0)
        return by_base, Where(vanishes, ZERO, self * Log(base))

    def _eval_derivative(self, symbol: Expr) -> Expr:
        base, exponent = self.args
        if isinstance(base, Sigmoid) and not exponent.has(symbol):
            # The power itself again, and nothing that could be 0 / 0.
            x = base.args[0]
            return exponent * self * Sigmoid(-x) * x.diff(symbol)
        return super()._eval_derivative(symbol)


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
        at_zero = sympy.Eq(x, 0)
        return Where(sympy.And(at_zero, y <= 0), ZERO, Log(y)), Where(at_zero, ZERO, x / y)


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
        # Of x and -x by one condition.
        return Where(-x < 0, large, small) if _is_negated(x) else Where(x < 0, small, large)


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
        args = [rewrite(arg) for arg in node.args]
        if isinstance(node, sympy.Pow):
            return _power(*args)
        if isinstance(node, sympy.exp):
            return Exp(*args)
        if isinstance(node, sympy.Max | sympy.Min):
            extremum: Any = Maximum if isinstance(node, sympy.Max) else Minimum
            return functools.reduce(extremum, args)
        if isinstance(node, sympy.Piecewise):
            value, condition = args[-1].args
            result = value if condition == sympy.true else Where(condition, value, sympy.nan)
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


def lowered(expression: Expr) -> Expr:
    """The expression in words that kernels have."""
    if not expression.args:
        return expression
    node = expression.func(*map(lowered, expression.args))
    if isinstance(node, Word):
        deeper = node.lowered()
        return deeper if deeper == node else lowered(deeper)
    return node
