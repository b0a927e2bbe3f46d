"""From a Python function to the formula of a row loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import sympy
from sympy.core.parameters import distribute

from . import primitives, row_rewrites
from .primitives import Expr
from .row_primitives import CLASSES, At, Max, Reduction, Share, Sum, is_element, spoken, words_in
from .tracing import (
    Definition,
    Family,
    Program,
    called,
    definition,
    formula,
    name_of,
    signature,
)

MAX_AUXILIARY = 4  # as in csrc/call.h

ROWS = Family(
    "row_loss",
    "logits, label: fm.Label, *, scale=1.0",
    ("reduction", "weight", "dim", "ignore_index", "clip_grad"),
    (),
)


class Kind(Enum):
    """What a tensor of a row loss holds."""

    ELEMENT = "element"  # a number for each class of each row
    LABEL = "label"  # the index of a class for each row
    PER_ROW = "per row"  # a number for each row
    PER_CLASS = "per class"  # a number for each class


@dataclass(frozen=True)
class TracedRows(Definition):
    """A row loss as formulas of the words of row_primitives.py. Its inputs are of type Input, and its
    value is a row number."""

    kinds: tuple[Kind, ...]
    classes: Expr  # the symbol of the number of classes, an Input as well
    auxiliary: dict[str, Expr]  # further row numbers, by name
    notes: tuple[str, ...] = ()  # how formulas were rewritten, and why

    def of_kind(self, *kinds: Kind) -> tuple[Expr, ...]:
        return tuple(s for s, k in zip(self.inputs, self.kinds, strict=True) if k in kinds)

    @property
    def label(self) -> Expr | None:
        return next(iter(self.of_kind(Kind.LABEL)), None)

    @property
    def elements(self) -> tuple[Expr, ...]:
        """The inputs that differ from class to class."""
        return self.of_kind(Kind.ELEMENT, Kind.PER_CLASS)

    @functools.cached_property
    def reference(self) -> Program:
        """The value, then the auxiliary results, for PyTorch."""
        with distribute(False):
            formulas = [self.value, *self.auxiliary.values()]
            guarded = [row_rewrites.guarded(e, self.elements) for e in formulas]
            constants, results = self._hoist(guarded)
        return Program(constants, (), tuple(results))


def trace_rows(function: Callable[..., Any]) -> TracedRows:
    """The formulas of a row loss.

    Raises:
        TypeError, ValueError: the function does not define one; the message says why, and what to
            write instead.
    """
    name = name_of(function)
    arguments, defaults = signature(function, name, ROWS)
    kinds = _kinds(function, name, arguments)
    with distribute(False):
        inputs = tuple(primitives.Input(argument, real=True) for argument in arguments)
        parameters, result = called(function, name, inputs, defaults)
        value, auxiliary = _parts(name, result)
        known = {*inputs, *parameters.values(), CLASSES}
        formulas = {"": formula(name, value, known)}
        for key, extra in auxiliary.items():
            formulas[key] = formula(f"{name}: its {key!r}", extra, known)
        draft = TracedRows(
            name, arguments, inputs, parameters, {}, formulas[""], kinds, CLASSES, formulas
        )
        for key, e in formulas.items():
            _check(draft, key, e)
        rewriter = row_rewrites.Rewriter(draft.elements)
        value, *extras = map(rewriter, formulas.values())
    given = {key: default for key, default in defaults.items() if default is not None}
    return TracedRows(
        name,
        arguments,
        inputs,
        parameters,
        given,
        value,
        kinds,
        CLASSES,
        dict(zip(auxiliary, extras, strict=True)),
        tuple(rewriter.notes),
    )


def _kinds(function: Callable[..., Any], name: str, arguments: tuple[str, ...]) -> tuple[Kind, ...]:
    found: dict[str, Kind] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind = getattr(_resolved(function, parameter.annotation), "kind", None)
        if isinstance(kind, Kind) and parameter.name not in arguments:
            raise TypeError(
                f"{name}: {parameter.name!r} is a tensor {kind.value} by its mark, and stands behind "
                "the *: tensors stand before it"
            )
        found[parameter.name] = kind if isinstance(kind, Kind) else Kind.ELEMENT
    kinds = tuple(found[argument] for argument in arguments)
    count = kinds.count(Kind.ELEMENT)
    if count == 0 or Kind.ELEMENT in kinds[count:]:
        early = next(
            a for a, kind in zip(arguments, kinds, strict=True) if kind is not Kind.ELEMENT
        )
        raise TypeError(
            f"{name}: {early!r} stands too early: the tensors with a "
            "value for each class come first, and the others are marked fm.Label, fm.PerRow or fm.PerClass"
        )
    if kinds.count(Kind.LABEL) > 1:
        raise TypeError(f"{name}: a loss has at most one fm.Label, not {kinds.count(Kind.LABEL)}")
    return kinds


def _resolved(function: Callable[..., Any], annotation: Any) -> Any:
    """An annotation that may be a text, by ``from __future__ import annotations``."""
    from fusedloss import math

    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(definition(function), "__globals__", {}))
    except (NameError, AttributeError, SyntaxError, TypeError):
        # fusedloss.math was imported inside of a function, say.
        return getattr(math, annotation.rpartition(".")[2], None)


def _parts(name: str, result: Any) -> tuple[Any, dict[str, Any]]:
    """The value that a definition returns, and its auxiliary results by name."""
    if not isinstance(result, tuple | list):
        return result, {}
    auxiliary = result[1] if len(result) == 2 else None
    if not isinstance(auxiliary, dict) or not all(isinstance(k, str) and k for k in auxiliary):
        raise TypeError(
            f"{name} returns {len(result)} values: return one row number, or (loss, {{name: row number}}) "
            f"with at most {MAX_AUXILIARY} more"
        )
    if len(auxiliary) > MAX_AUXILIARY:
        raise TypeError(
            f"{name} returns {len(auxiliary)} auxiliary results: a loss has at most {MAX_AUXILIARY}"
        )
    return result[0], auxiliary


# What to write instead of a word of a row number.
_INSTEAD = {
    Sum: "multiply it by fm.classes instead; its mean is the number itself",
    Max: "it is the largest and the smallest itself",
}


def _check(traced: TracedRows, key: str, e: Expr) -> None:
    """Refuses formulas whose words have arguments of another kind, or that are no row number."""
    name, elements = traced.name, traced.elements
    for node in sympy.preorder_traversal(e):
        if isinstance(node, Reduction | Share) and not is_element(node.args[0], elements):
            instead = _INSTEAD.get(node.func, "it takes a value for each class")
            raise TypeError(f"{name}: fm.{spoken(node)} of a row number: {instead}")
        if isinstance(node, At):
            x, label = node.args
            if label != traced.label:
                raise TypeError(
                    f"{name}: fm.at(x, {label}) takes a class from a tensor that is marked as the label: "
                    f"def {name}(logits, label: fm.Label)"
                )
            if not is_element(x, elements):
                raise TypeError(f"{name}: fm.at of a row number: it is the same for all classes")
    if traced.label is not None and _as_number(e, traced.label):
        raise TypeError(
            f"{name}: {traced.label} is the index of a class, and no number: fm.at(x, {traced.label}) is "
            "x at that class"
        )
    if is_element(e, elements):
        what = f"gives {key!r} as" if key else "returns"
        pointwise = "" if words_in(e) else "; without such a word it is a fusedloss.pointwise_loss"
        raise TypeError(f"{name} {what} one value a class: wrap it in fm.sum or fm.mean{pointwise}")
    if not key and not words_in(e):
        raise TypeError(
            f"{name} sees no row: without a word such as fm.sum or fm.at it is a fusedloss.pointwise_loss"
        )


def _as_number(e: Expr, label: Expr) -> bool:
    """Whether the label is computed with."""
    args = e.args[:1] if isinstance(e, At) else e.args
    return bool(e == label) or any(_as_number(arg, label) for arg in args)
