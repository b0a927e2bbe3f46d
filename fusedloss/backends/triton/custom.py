"""Custom losses: printed functions, made jit functions for the pointwise and the row engine."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .custom_rows import RowLoss
from .losses import PointwiseLoss

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Loaded:
    loss: PointwiseLoss | RowLoss
    parameters: int  # of a call
    numbers: Callable[[Numbers], Numbers]  # that the kernel takes, from a call's parameters


_loaded: dict[str, Loaded] = {}


def load(
    name: str, source: str, inputs: int, parameters: int, constants: Callable[[Numbers], Numbers]
) -> str:
    """Makes a loss known to the operators, once: what they call it.

    source: as ``fusedloss.custom.printing.triton`` prints it.
    parameters: of a call: the loss's own, from which the kernel's constants follow, and the bound of
        the slopes.
    """

    def loss(printed: dict[str, Any]) -> PointwiseLoss:
        return PointwiseLoss(printed["loss"], mean="weights", inputs=inputs, gradients=inputs)

    def numbers(given: Numbers) -> Numbers:
        *own, bound = given
        return (*constants(tuple(own)), bound)

    return _load(name, source, loss, parameters, numbers)


def load_rows(
    name: str, source: str, parameters: int, constants: Callable[[Numbers], Numbers]
) -> str:
    """The same for a row loss, as ``fusedloss.custom.row_printing.triton`` prints it."""
    return _load(name, source, RowLoss, parameters, constants)


def _load(
    name: str,
    source: str,
    loss: Callable[[dict[str, Any]], PointwiseLoss | RowLoss],
    parameters: int,
    numbers: Callable[[Numbers], Numbers],
) -> str:
    """Triton compiles the source at its first use, and keeps what it has compiled by the source."""
    key = f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    if key not in _loaded:
        # Triton asks inspect for the source. There is no file that might be lost, or half written.
        file = f"<fusedloss {key}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        namespace: dict[str, Any] = {"__name__": f"{__name__}.{key}"}
        exec(compile(source, file, "exec"), namespace)  # noqa: S102 - of our own print
        _loaded[key] = Loaded(loss(namespace), parameters, numbers)
    return key


def known(name: str) -> Loaded:
    """A custom loss."""
    found = _loaded.get(name)
    if found is None:
        raise RuntimeError(
            f"fusedloss: no loss {name!r} is known: import the module that defines it, and call it once"
        )
    return found


def loaded(name: str, parameters: Sequence[float]) -> tuple[PointwiseLoss | RowLoss, Numbers]:
    """A custom loss, and the numbers that its kernel takes."""
    found = known(name)
    if len(parameters) != found.parameters:
        raise ValueError(
            f"fusedloss: {name!r} has {found.parameters} parameters, and the call {len(parameters)}"
        )
    return found.loss, found.numbers(tuple(parameters))
