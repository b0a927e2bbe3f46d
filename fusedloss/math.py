"""The primitives that custom losses are written in; see :func:`fusedloss.pointwise_loss` and
:func:`fusedloss.row_loss`.

Value and slope are stable over the whole domain, and follow PyTorch's convention at kinks. The
functions take the symbols that a loss is traced with, numbers, and tensors; for tensors they are the
PyTorch functions of that meaning. Arguments are real numbers, elementwise and unitless. Use Python's
operators for arithmetic, powers and comparisons, and ``&``, ``|``, ``~`` to join conditions. Conditions
follow IEEE 754: for nan only ``!=`` holds, and ``~`` negates what holds and what does not.

The words from :func:`sum` on are those of row losses: they see all classes of a row, which for tensors are
the last dimension. What they give for a row as a whole has size 1 there (``keepdim=True``).
"""

from __future__ import annotations

from typing import Any

import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from .custom import primitives, row_primitives, tracing
from .custom.row_tracing import Kind

__all__ = [
    "Label",
    "PerClass",
    "PerRow",
    "abs",
    "at",
    "clamp",
    "classes",
    "cos",
    "detach",
    "digamma",
    "equal",
    "erf",
    "erfc",
    "exp",
    "expm1",
    "is_nan",
    "lgamma",
    "log",
    "log1p",
    "log_sigmoid",
    "log_softmax",
    "logaddexp",
    "logsumexp",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "norm",
    "not_equal",
    "one_minus_softmax",
    "pow",
    "relu",
    "sigmoid",
    "sign",
    "sin",
    "softmax",
    "softplus",
    "sqrt",
    "sum",
    "tanh",
    "where",
    "xlogy",
]

Operand = Any  # a traced expression, a number or a tensor


def _tensors(*args: Operand) -> list[Tensor] | None:
    """All of them as tensors, if one of them is a tensor."""
    like = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if like is None or any(isinstance(arg, tracing.Formula) for arg in args):
        return None
    return [
        arg if isinstance(arg, Tensor) else torch.as_tensor(arg, dtype=like.dtype).to(like.device)
        for arg in args
    ]


def _call(primitive: Any, *args: Operand) -> Any:
    tensors = _tensors(*args)
    if tensors is not None:
        return primitive.torch(*tensors)
    traced = primitive(*map(tracing.expression, args))
    return traced if isinstance(traced, Boolean) else tracing.Formula(traced)


def __getattr__(name: str) -> Any:
    raise AttributeError(tracing.instead_of(name))


def exp(x: Operand) -> Any:
    """:math:`e^x`."""
    return _call(primitives.Exp, x)


def expm1(x: Operand) -> Any:
    """:math:`e^x - 1`, exact to rounding near 0."""
    return _call(primitives.Expm1, x)


def log(x: Operand) -> Any:
    """Natural logarithm: -inf at 0, nan below. See :func:`xlogy` for ``x * log(y)``."""
    return _call(primitives.Log, x)


def log1p(x: Operand) -> Any:
    """:math:`\\log(1 + x)`, exact to rounding near 0."""
    return _call(primitives.Log1p, x)


def sqrt(x: Operand) -> Any:
    """Square root: nan below 0; the slope at 0 is infinite."""
    return _call(primitives.Sqrt, x)


def abs(x: Operand) -> Any:
    """:math:`|x|`. Slope at the kink: 0."""
    return _call(primitives.Abs, x)


def sign(x: Operand) -> Any:
    """-1, 0 or 1; 0 for nan. Slope: 0."""
    return _call(primitives.Sign, x)


def sin(x: Operand) -> Any:
    """Sine of radians."""
    return _call(primitives.Sin, x)


def cos(x: Operand) -> Any:
    """Cosine of radians."""
    return _call(primitives.Cos, x)


def tanh(x: Operand) -> Any:
    """Hyperbolic tangent; its slope does not cancel where it saturates."""
    return _call(primitives.Tanh, x)


def sigmoid(x: Operand) -> Any:
    """:math:`1 / (1 + e^{-x})`."""
    return _call(primitives.Sigmoid, x)


def log_sigmoid(x: Operand) -> Any:
    """:math:`\\log(1 / (1 + e^{-x}))`, never infinite for a finite x."""
    return _call(primitives.LogSigmoid, x)


def logaddexp(a: Operand, b: Operand) -> Any:
    """:math:`\\log(e^a + e^b)`, never infinite for finite a and b."""
    return _call(row_primitives.LogAddExp, a, b)


def softplus(x: Operand) -> Any:
    """:math:`\\log(1 + e^x)`, never infinite for a finite x. Exact: without torch's threshold."""
    return _call(primitives.Softplus, x)


def erf(x: Operand) -> Any:
    """Gauss's error function."""
    return _call(primitives.Erf, x)


def erfc(x: Operand) -> Any:
    """:math:`1 - \\operatorname{erf}(x)`, without cancellation for a large x."""
    return _call(primitives.Erfc, x)


def lgamma(x: Operand) -> Any:
    """:math:`\\log |\\Gamma(x)|`: infinite at 0, -1, -2, ..."""
    return _call(primitives.Lgamma, x)


def digamma(x: Operand) -> Any:
    """The slope of :func:`lgamma`: infinite at 0, nan at -1, -2, ..."""
    return _call(primitives.Digamma, x)


def detach(x: Operand) -> Any:
    """x as a number that no gradient passes through, as :meth:`torch.Tensor.detach`."""
    return _call(primitives.Detach, x)


def pow(x: Operand, exponent: Operand) -> Any:
    """:math:`x^p`, as ``x ** p``: nan for a negative x unless p is whole. A whole or half p that is
    written down is computed by products and square roots, any other by logarithms."""
    tensors = _tensors(x, exponent)
    if tensors is None:
        return tracing.Formula(tracing.expression(x) ** tracing.expression(exponent))
    return primitives.Power.torch(*tensors)


def maximum(a: Operand, b: Operand) -> Any:
    """The larger; nan where either is. If they are equal, each gets half the slope; otherwise the larger
    gets all of it, and the other has no influence, as in :func:`where`."""
    return _call(primitives.Maximum, a, b)


def minimum(a: Operand, b: Operand) -> Any:
    """The smaller; nan where either is. If they are equal, each gets half the slope; otherwise the
    smaller gets all of it, and the other has no influence, as in :func:`where`."""
    return _call(primitives.Minimum, a, b)


def clamp(x: Operand, min: Operand | None = None, max: Operand | None = None) -> Any:
    """x, at least min and at most max; nan where one of the three is. The slope is 1 inside and at the
    bounds. Outside it is 0, and x has no influence, as in :func:`where`.

    Raises:
        TypeError: neither bound is given.
    """
    if min is None and max is None:
        raise TypeError("clamp needs min, max or both")
    low = float("-inf") if min is None else min
    high = float("inf") if max is None else max
    return _call(primitives.Clamp, x, low, high)


def relu(x: Operand) -> Any:
    """:math:`\\max(x, 0)`; nan for nan. Slope at the kink: 0. Below it x has no influence, as in
    :func:`where`."""
    return _call(primitives.Relu, x)


def xlogy(x: Operand, y: Operand) -> Any:
    """:math:`x \\log y`, and 0 where x is 0."""
    return _call(primitives.XLogY, x, y)


def where(condition: Any, yes: Operand, no: Operand) -> Any:
    """``yes`` where the condition holds, else ``no``. The other one has no influence on value or slope:
    it may be infinite or nan there, and so may the slope of an outer function, as in
    ``sqrt(where(x > 0, x, 0))``, whose slope is 0 where x is not positive.

    Raises:
        TypeError: the condition is not one of symbols, but for example a Python bool.
    """
    if isinstance(condition, Tensor):
        like = yes if isinstance(yes, Tensor) else no
        pair = _tensors(yes, no) if isinstance(like, Tensor) else [yes, no]
        assert pair is not None
        return torch.where(condition, *pair)
    if isinstance(condition, bool) or not isinstance(condition, Boolean):
        raise TypeError(
            f"where needs a condition of symbols, such as input > target, not {condition!r}"
        )
    sides = map(tracing.expression, (yes, no))
    return tracing.Formula(primitives.Where(primitives.condition(condition), *sides))


def equal(a: Operand, b: Operand) -> Any:
    """The condition a = b, as ``a == b``; nan equals nothing."""
    return _call(primitives.Equal, a, b)


def not_equal(a: Operand, b: Operand) -> Any:
    """The condition a ≠ b, as ``a != b``; nan differs from everything, itself included."""
    return _call(primitives.NotEqual, a, b)


def is_nan(x: Operand) -> Any:
    """The condition that x is nan."""
    return not_equal(x, x)


# ---- rows ----------------------------------------------------------------------------------------


class Label:
    """Marks a tensor of a row loss, by ``label: fm.Label``, as the index of a class for each row, an
    int64, which :func:`at` takes. Rows whose label is the call's ignore_index do not count."""

    kind = Kind.LABEL


class PerRow:
    """Marks a tensor of a row loss, by ``advantage: fm.PerRow``, as one number for each row."""

    kind = Kind.PER_ROW


class PerClass:
    """Marks a tensor of a row loss, by ``balance: fm.PerClass``, as one number for each class."""

    kind = Kind.PER_CLASS


# The number of classes of a row, while a row loss is traced.
classes: Any = tracing.Formula(row_primitives.CLASSES)


def sum(x: Operand) -> Any:
    """The sum over a row's classes; for tensors over the last dimension, which stays with size 1."""
    return _call(row_primitives.Sum, x)


def mean(x: Operand) -> Any:
    """The mean over a row's classes: ``sum(x) / classes``. For tensors over the last dimension, which
    stays with size 1."""
    return x.mean(-1, keepdim=True) if isinstance(x, Tensor) else sum(x) / classes


def max(x: Operand) -> Any:
    """The largest of a row's classes; the slope goes to the first of equal ones. For tensors over the
    last dimension, which stays with size 1."""
    return _call(row_primitives.Max, x)


def min(x: Operand) -> Any:
    """The smallest of a row's classes; the slope goes to the first of equal ones. For tensors over the
    last dimension, which stays with size 1."""
    return -_call(row_primitives.Max, -x)


def logsumexp(x: Operand) -> Any:
    """:math:`\\log \\sum_j e^{x_j}` over a row's classes, without overflow. For tensors over the last
    dimension, which stays with size 1."""
    return _call(row_primitives.LogSumExp, x)


def norm(x: Operand) -> Any:
    """The root of the sum of squares over a row's classes; the slope is 0 where all are 0. For tensors
    over the last dimension, which stays with size 1."""
    return _call(row_primitives.Norm, x)


def softmax(x: Operand) -> Any:
    """:math:`e^{x_i} / \\sum_j e^{x_j}`, for each of a row's classes, which for tensors are the last
    dimension. In a row loss its product with another element, such as ``p * log(p)``, is 0 where it is
    0 itself."""
    return _call(row_primitives.Softmax, x)


def log_softmax(x: Operand) -> Any:
    """``x - logsumexp(x)``, for each of a row's classes, which for tensors are the last dimension."""
    return _call(row_primitives.LogSoftmax, x)


def one_minus_softmax(x: Operand) -> Any:
    """``1 - softmax(x)`` with all its digits, for each of a row's classes, which for tensors are the
    last dimension: the share of the other classes, which is tiny where the model is sure."""
    return _call(row_primitives.OneMinusSoftmax, x)


def at(x: Operand, label: Operand) -> Any:
    """x at the row's label, a tensor that is marked :class:`Label`. For tensors x at these indices of the
    last dimension, which stays with size 1; the label may lack it."""
    if isinstance(x, Tensor) and isinstance(label, Tensor) and label.dim() == x.dim() - 1:
        label = label[..., None]
    return _call(row_primitives.At, x, label)
