"""The differentiable operators.

The autograd Functions themselves are in csrc/autograd.cpp and backends/triton/operators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backends
from .reference import REDUCTIONS

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_traced(function: Function) -> Function:
    """:func:`torch.compiler.assume_constant_result`, which imports the whole compiler to set a mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def traced() -> bool:
    """Whether calls are being traced, or go to a dispatch mode: then nothing real is touched."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@constant_when_traced
def _load_triton() -> bool:
    """Defines its operators: at their first use, and not inside of what a compiler traces."""
    import_module("fusedloss.backends.triton")
    return True


def _operators(input: Tensor) -> Any:
    return _operators_of(backends.fused_on[input.device.type])


def _operators_of(backend: str) -> Any:
    if backend == "compiled":
        return torch.ops.fusedloss
    _load_triton()
    return torch.ops.fusedloss_triton


def pointwise(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    parameter: float,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    prediction: Tensor | None,
) -> Tensor:
    """One fused pointwise call."""
    number = REDUCTIONS[reduction]
    value: Tensor = _operators(input).pointwise.default(
        input, target, weight, pos_weight, loss, parameter, ignore_index, number, dtype, prediction
    )
    return value


def custom(
    backend: str,
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    parameters: list[float],
    reduction: int,
    dtype: torch.dtype,
    prediction: Tensor | None,
) -> Tensor:
    """One fused call of a loss of one's own, on a backend that has made it ready."""
    value: Tensor = _operators_of(backend).custom.default(
        input, target, weight, loss, parameters, reduction, dtype, prediction
    )
    return value


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
    prediction: Tensor | None,
) -> Tensor:
    """One fused cross-entropy call."""
    number = REDUCTIONS[reduction]
    value: Tensor = _operators(input).cross_entropy.default(
        input, target, weight, ignore_index, label_smoothing, number, dtype, prediction
    )
    return value
