"""The differentiable operators.

The autograd Functions themselves are in csrc/torch/operators.cpp and backends/triton/operators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

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


def loss(
    backend: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    more: list[Tensor],
    name: str,
    parameters: list[float],
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
    prediction: Tensor | None,
) -> Tensor:
    """One fused call. more: the loss's inputs besides input and target."""
    if backend == "compiled":
        operators: Any = torch.ops.fusedloss
    else:
        _load_triton()
        operators = torch.ops.fusedloss_triton
    value: Tensor = operators.loss.default(
        input, target, weight, more, name, parameters, ignore_index, reduction, dtype, prediction
    )
    return value
