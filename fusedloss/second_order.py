"""Gradients of gradients, and of batches of upstream gradients: by the losses in plain PyTorch.

What backward turns to under create_graph=True, on every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, reference

_REDUCTION_NAMES = {number: name for name, number in reference.REDUCTIONS.items()}

# Of losses of one's own, by what the operators call them.
custom_references: dict[str, Callable[..., Tensor]] = {}


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
    *values, bound = parameters
    with torch.enable_grad():
        # Not the tensors themselves, whose hooks the outer backward runs.
        x, y = input.view_as(input), target.view_as(target)
        value = custom_references[loss](
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
