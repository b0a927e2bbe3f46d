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

# The reference of each custom loss, under the name that the operators know it by.
custom_references: dict[str, Callable[..., Tensor]] = {}


def loss_reference_gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    more: list[Tensor],
    loss: str,
    parameters: list[float],
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
    gradients: int,
) -> list[Tensor]:
    """The gradients whose bits are set in ``gradients``, with a graph where one is wanted."""

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    with torch.enable_grad():
        # Not the tensors themselves, whose hooks the outer backward runs.
        x, y = (t.view_as(t) for t in (input, target))
        operands = (
            cast(x),
            cast(y),
            None if weight is None else cast(weight),
            [cast(t) for t in more],
        )
        options = parameters, ignore_index, _REDUCTION_NAMES[reduction]
        custom = custom_references.get(loss)
        value = custom(*operands, *options) if custom else reference.call(loss, *operands, *options)
    wanted = [t for i, t in enumerate((x, y)) if gradients >> i & 1]
    create_graph = torch.is_grad_enabled()
    return list(
        torch.autograd.grad(
            value, wanted, grad_output, create_graph=create_graph, materialize_grads=True
        )
    )


if backends.extension is not None:
    _torch_library: Any = torch.library  # untyped in some of the releases
    _library = _torch_library.Library("fusedloss", "IMPL")
    # Batched: what is_grads_batched=True makes of an upstream gradient. Each step below is batched.
    for _key in ("CompositeImplicitAutograd", "Batched", "FuncTorchBatchedDecomposition"):
        _library.impl("loss_reference_gradient", loss_reference_gradient, _key)
