"""Custom losses: printed functions, made jit functions for the pointwise engine."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .losses import PointwiseLoss

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Loaded:
    loss: PointwiseLoss
    parameters: int  # of a call: the loss's own, and the bound of the slopes
    constants: Callable[[Numbers], Numbers]  # of the kernel, from the loss's own parameters


_loaded: dict[str, Loaded] = {}


def load(
    name: str, source: str, inputs: int, parameters: int, constants: Callable[[Numbers], Numbers]
) -> str:
    """Makes a loss known to the operators, once: what they call it.

    source: as ``fusedloss.custom.printing.triton`` prints it. Triton compiles it at its first use,
    and keeps what it has compiled by the source.
    """
    key = f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    if key not in _loaded:
        # Triton asks inspect for the source. There is no file that might be lost, or half written.
        file = f"<fusedloss {key}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        namespace: dict[str, Any] = {"__name__": f"{__name__}.{key}"}
        exec(compile(source, file, "exec"), namespace)  # noqa: S102 - of our own print
        function = namespace["loss"]
        loss = PointwiseLoss(function, mean="weights", inputs=inputs, gradients=inputs)
        _loaded[key] = Loaded(loss, parameters, constants)
    return key


def known(name: str) -> Loaded:
    """A custom loss."""
    found = _loaded.get(name)
    if found is None:
        raise RuntimeError(
            f"fusedloss: no loss {name!r} is known: import the module that defines it, and call it once"
        )
    return found


def loaded(name: str, parameters: Sequence[float]) -> tuple[PointwiseLoss, Numbers]:
    """A custom loss, and the numbers that its kernel takes."""
    found = known(name)
    if len(parameters) != found.parameters:
        raise ValueError(
            f"fusedloss: {name!r} has {found.parameters} parameters, and the call {len(parameters)}"
        )
    *own, bound = parameters
    return found.loss, (*found.constants(tuple(own)), bound)
