"""Gradients of gradients, and of batches of upstream gradients: by the losses in plain PyTorch.

Backward takes this path under create_graph=True, on every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from ._losses import OPERATORS

_REDUCTION_NAMES = {number: name for name, number in reference.REDUCTIONS.items()}

# Custom losses in plain PyTorch, by the operators' name of each.
custom_references: dict[str, Callable[..., Tensor]] = {}


def needs_reference(grad_output: Tensor) -> bool:
    """create_graph, and batches of upstream gradients (is_grads_batched)."""
    functorch = torch._C._functorch
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return (
        functorch.is_batchedtensor(grad_output)
        or functorch.is_gradtrackingtensor(grad_output)
        or functorch.is_legacy_batchedtensor(grad_output)
    )


def saves_through_hooks() -> bool:
    """They take what is saved away until backward: a gradient written already would stay."""
    if torch.compiler.is_compiling():  # the hooks see what the compiled graph saves
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def reference_value(
    name: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    more: list[Tensor],
    parameters: list[float],
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """A loss in plain PyTorch, by the operators' name and arguments.

    Raises:
        ValueError: there is no such loss.
    """
    if name in custom_references:
        operands = (input, target, *more), weight, parameters
        return custom_references[name](*operands, ignore_index, reduction)
    if name not in OPERATORS:
        raise ValueError(f"fusedloss: no loss is named {name!r}")
    loss, is_variant = OPERATORS[name]
    if name == "log_loss":
        if reduction == "none":
            (eps,) = parameters
            return reference.log_loss_elements(input, target, weight, eps, ignore_index)
        weight = None if weight is None else weight.reshape(-1)
    options: dict[str, Any] = {"reduction": reduction}
    if weight is not None:
        options["weight"] = weight
    inputs = (input, target, *more)[: loss.inputs]
    if loss.variant == "pos_weight":
        options["pos_weight"] = more[0] if is_variant else None
    elif loss.variant:
        options[loss.variant] = is_variant
    for key, number in zip(
        loss.parameters, parameters, strict=False
    ):  # log_loss: eps is no argument
        options[key] = bool(number) if key == "full" else number
    if loss.over_classes:
        options["ignore_index"] = ignore_index
    return loss.reference(*inputs, **options)


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
    """The gradients whose bits are set in ``gradients``, with a graph if autograd needs one."""

    def cast(t: Tensor) -> Tensor:
        return t.to(torch.promote_types(t.dtype, dtype)) if t.is_floating_point() else t

    with torch.enable_grad():
        # Views, since the outer backward runs the hooks of the tensors themselves.
        inputs = [t.view_as(t) for t in (input, target, *more)]
        x, y, *others = map(cast, inputs)
        operands = x, y, None if weight is None else cast(weight), others
        options = parameters, ignore_index, _REDUCTION_NAMES[reduction]
        value = reference_value(loss, *operands, *options)
    needed = [t for i, t in enumerate(inputs) if gradients >> i & 1]
    create_graph = torch.is_grad_enabled()
    return list(
        torch.autograd.grad(
            value, needed, grad_output, create_graph=create_graph, materialize_grads=True
        )
    )


if backends.extension is not None:
    _torch_library: Any = torch.library  # untyped in some of the releases
    _library = _torch_library.Library("fusedloss", "IMPL")
    # Batched: is_grads_batched=True makes such an upstream gradient, and each step above is batched.
    for _key in ("CompositeImplicitAutograd", "Batched", "FuncTorchBatchedDecomposition"):
        _library.impl("loss_reference_gradient", loss_reference_gradient, _key)
