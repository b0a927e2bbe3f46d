"""The differentiable operators, predictions, and gradients of gradients.

The autograd Functions of the compiled operators are in csrc/autograd.cpp; those here do the same
for operators that need no compiled extension.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import backends, reference

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_REDUCTION_NAMES = {number: name for name, number in REDUCTIONS.items()}


def traced() -> bool:
    """Whether calls are being traced, or go to a dispatch mode: then nothing real is touched."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _operators(input: Tensor) -> Any:
    if backends.fused_on[input.device.type] == "compiled":
        return torch.ops.fusedloss
    return _triton_operators()


def _triton_operators() -> Any:
    from .backends import triton

    return triton.operators


def _new_prediction(input: Tensor) -> Tensor:
    """An upstream gradient, and the confidence in it: see csrc/ops_cpu.cpp."""
    prediction = torch.ones(2, dtype=torch.float64, device=input.device)
    prediction[1].fill_(3.0)
    return prediction


_shared: dict[tuple[Any, ...], Tensor] = {}
_shared_lock = threading.Lock()
_MOST_SHARED = 512


def _shared_prediction(loss: str, input: Tensor, reduction: int) -> Tensor:
    """That of calls that have no module to keep theirs, by what tells call sites apart."""
    key = (loss, input.device, input.dtype, input.numel(), reduction)
    with _shared_lock:
        prediction = _shared.get(key)
        if prediction is None:
            if len(_shared) >= _MOST_SHARED:
                _shared.clear()
            prediction = _shared[key] = _new_prediction(input)
        return prediction


new_prediction: Callable[[Tensor], Tensor] = _new_prediction
shared_prediction: Callable[[str, Tensor, int], Tensor] = _shared_prediction
if backends.extension is not None:
    # One table with the short way's calls.
    new_prediction = backends.extension.new_prediction
    shared_prediction = backends.extension.shared_prediction


def _site(prediction: Tensor | None, loss: str, input: Tensor, reduction: int) -> Tensor:
    """The prediction of a call: its own, or that of calls like it; traced, a new one."""
    if traced():
        return torch.tensor([1.0, 3.0], dtype=torch.float64, device=input.device)
    if prediction is not None:
        return prediction
    return shared_prediction(loss, input, reduction)


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
    site = _site(prediction, loss, input, number)
    value: Tensor = _operators(input).pointwise.default(
        input, target, weight, pos_weight, loss, parameter, ignore_index, number, dtype, site
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
    site = _site(prediction, "cross_entropy", input, number)
    value: Tensor = _operators(input).cross_entropy.default(
        input, target, weight, ignore_index, label_smoothing, number, dtype, site
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


def _pointwise_reference_gradient(
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


def _cross_entropy_reference_gradient(
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
        ("pointwise_reference_gradient", _pointwise_reference_gradient),
        ("cross_entropy_reference_gradient", _cross_entropy_reference_gradient),
    ):
        _library.impl(_name, _implementation, "CompositeImplicitAutograd")


# ---- the autograd Functions ----------------------------------------------------------------------


class _OnePass(torch.autograd.Function):
    """The forward pass writes the gradient already, for a predicted upstream gradient; backward has
    it put right where the prediction was wrong."""

    operator: ClassVar[str]
    tensors: ClassVar[int]  # that a call begins with
    reference_gradient: ClassVar[Callable[..., Tensor]]

    @classmethod
    def forward(cls, ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        *call, prediction = args
        # Hooks take what is saved away until backward: a gradient written already would stay.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        with torch._C._AutoDispatchBelowADInplaceOrView():
            predicted = prediction.new_zeros(2) if hooked else prediction
            forward = getattr(_triton_operators(), cls.operator + "_forward").default
            value, gradient, ctx.scales = forward(*call, predicted)
        ctx.save_for_backward(*call[: cls.tensors])
        ctx.gradient = None if hooked else gradient
        ctx.options = call[cls.tensors :]
        ctx.prediction = prediction
        return value  # type: ignore[no-any-return]

    @classmethod
    def backward(cls, ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_output,) = grad_outputs
        operands = ctx.saved_tensors
        nothing = (None,) * (len(operands) + len(ctx.options))
        if torch.is_grad_enabled() or _is_batched(grad_output):
            reference_gradient = cls.reference_gradient
            return reference_gradient(grad_output, *operands, *ctx.options), *nothing
        # The buffer leaves with the first backward: autograd is its only owner then.
        gradient, ctx.gradient = ctx.gradient, None
        fresh = gradient is None
        if fresh:
            gradient = _triton_operators().empty_gradient.default(operands[0])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            backward_ = getattr(_triton_operators(), cls.operator + "_backward_").default
            backward_(
                gradient, grad_output, ctx.scales, fresh, *operands, *ctx.options, ctx.prediction
            )
        return gradient, *nothing


def _is_batched(t: Tensor) -> bool:
    functorch = torch._C._functorch
    return (
        functorch.is_batchedtensor(t)
        or functorch.is_gradtrackingtensor(t)
        or functorch.is_legacy_batchedtensor(t)
    )


class PointwiseFunction(_OnePass):
    operator = "pointwise"
    tensors = 4
    reference_gradient = staticmethod(_pointwise_reference_gradient)


class CrossEntropyFunction(_OnePass):
    operator = "cross_entropy"
    tensors = 3
    reference_gradient = staticmethod(_cross_entropy_reference_gradient)
