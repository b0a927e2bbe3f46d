"""From a Python function to the formula of a row loss."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from .primitives import Expr


class Kind(Enum):
    """What a tensor of a row loss holds."""

    ELEMENT = "element"  # a number for each class of each row
    LABEL = "label"  # the index of a class for each row
    PER_ROW = "per row"  # a number for each row
    PER_CLASS = "per class"  # a number for each class


@dataclass(frozen=True)
class TracedRows:
    """A row loss as formulas of the words of row_primitives.py."""

    name: str
    arguments: tuple[str, ...]  # the function's names for its inputs
    kinds: tuple[Kind, ...]
    inputs: tuple[Expr, ...]  # their symbols, of type Input
    classes: Expr  # the symbol of the number of classes, an Input as well
    parameters: dict[str, Expr]  # by name, in order
    defaults: dict[str, float]
    value: Expr  # a row number
    auxiliary: dict[str, Expr]  # further row numbers, by name

    @property
    def identifier(self) -> str:
        """The name for sources and file names, without characters that could do harm there."""
        return re.sub(r"\W+", "_", self.name, flags=re.ASCII).strip("_")[:40] or "loss"

    def text(self, e: Expr) -> str:
        return " ".join(str(e).split())

    def of_kind(self, kind: Kind) -> tuple[Expr, ...]:
        return tuple(s for s, k in zip(self.inputs, self.kinds, strict=True) if k is kind)

    @property
    def label(self) -> Expr | None:
        return next(iter(self.of_kind(Kind.LABEL)), None)
