"""The differentiable operators, predictions, and gradients of gradients.

The autograd Functions themselves are in csrc/autograd.cpp and backends/triton/operators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import backends, reference

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_REDUCTION_NAMES = {number: name for name, number in REDUCTIONS.items()}


def traced() -> bool:
    """Whether calls are being traced, or go to a dispatch mode: then nothing real is touched."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
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


def new_prediction(input: Tensor) -> Tensor:
    """A call site's, on input's device: an upstream gradient, and the confidence in it (0 to 3)."""
    prediction = torch.ones(2, dtype=torch.float64, device=input.device)
    prediction[1].fill_(3.0)
    return prediction


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


# ---- create_graph=True, and batched upstream gradients ------------------------------------------


def _reference_gradient(
    loss: Callable[[Tensor], Tensor], input: Tensor, grad_output: Tensor, create_graph: bool
) -> Tensor:
    with torch.enable_grad():
        # Not input itself, whose hooks the outer backward runs.
        alias = input.view_as(input)
        value = loss(alias)
    return torch.autograd.grad(value, alias, grad_output, create_graph=create_graph)[0]


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t


def pointwise_reference_gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    parameter: float,
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor:
    def value(input: Tensor) -> Tensor:
        return reference.pointwise(
            loss,
            _cast(input, dtype),
            _cast(target, dtype),
            None if weight is None else _cast(weight, dtype),
            None if pos_weight is None else _cast(pos_weight, dtype),
            parameter,
            ignore_index,
            _REDUCTION_NAMES[reduction],
        )

    return _reference_gradient(value, input, grad_output, torch.is_grad_enabled())


def custom_reference_gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: str,
    parameters: list[float],
    reduction: int,
    dtype: torch.dtype,
    of_input: bool,
    of_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    from .custom import loss_named

    *values, bound = parameters
    with torch.enable_grad():
        # Not the tensors themselves, whose hooks the outer backward runs.
        x, y = input.view_as(input), target.view_as(target)
        value = loss_named(loss)._reference(
            _cast(x, dtype),
            _cast(y, dtype),
            _REDUCTION_NAMES[reduction],
            None if weight is None else _cast(weight, dtype),
            bound,
            tuple(values),
        )
    wanted = [t for t, of in ((x, of_input), (y, of_target)) if of]
    gradients = iter(
        torch.autograd.grad(
            value, wanted, grad_output, create_graph=torch.is_grad_enabled(), materialize_grads=True
        )
    )
    return next(gradients) if of_input else None, next(gradients) if of_target else None


def cross_entropy_reference_gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor:
    def value(input: Tensor) -> Tensor:
        return reference.cross_entropy(
            _cast(input, dtype),
            _cast(target, dtype),
            None if weight is None else _cast(weight, dtype),
            ignore_index=ignore_index,
            reduction=_REDUCTION_NAMES[reduction],
            label_smoothing=label_smoothing,
        )

    return _reference_gradient(value, input, grad_output, torch.is_grad_enabled())


if backends.extension is not None:
    _torch_library: Any = torch.library  # untyped in some of the releases
    _library = _torch_library.Library("fusedloss", "IMPL")
    for _name, _implementation in (
        ("pointwise_reference_gradient", pointwise_reference_gradient),
        ("custom_reference_gradient", custom_reference_gradient),
        ("cross_entropy_reference_gradient", cross_entropy_reference_gradient),
    ):
        _library.impl(_name, _implementation, "CompositeImplicitAutograd")
