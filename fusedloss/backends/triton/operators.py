"""The operators torch.ops.fusedloss_triton.*: those of csrc/torch/operators.cpp and one_pass.h, with
their schemas and their ways, in Python: they need no compiled extension.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import second_order
from ...backends import is_captured, new_prediction
from . import custom, custom_rows, pointwise, rows, runtime
from .custom_rows import RowLoss
from .losses import POINTWISE, PointwiseLoss
from .runtime import Pass

DEVICES = ("CPU", "CUDA", "XPU")  # CPU: in Triton's interpreter

_torch_library: Any = torch.library  # untyped in some of the releases
_library = _torch_library.Library("fusedloss_triton", "DEF")
operators: Any = torch.ops.fusedloss_triton


# ---- what a forward leaves for its backward ------------------------------------------------------


Gradients = tuple[Tensor | None, ...]  # of the inputs that have one; None: is not wanted


@dataclass
class SavedGradients:
    """Lives and dies with the memory of a forward's state, as in csrc/torch/one_pass.h."""

    gradients: Gradients  # (): not written, or handed over already
    prediction: Tensor
    input_shape: torch.Size
    input_dtype: torch.dtype
    addresses: tuple[int, ...]  # of the inputs


def attach(state: Tensor, saved: SavedGradients) -> None:
    state.untyped_storage().saved = saved  # type: ignore[attr-defined]


def saved_in(state: Tensor) -> SavedGradients | None:
    """None for a state that is no longer where forward left it."""
    return getattr(state.untyped_storage(), "saved", None)


def _drop_gradients_of_other_memory(state: Tensor, inputs: Sequence[Tensor]) -> None:
    """Where an input has been given other memory since forward (``input.data = ...``), backward must
    see the numbers there."""
    saved = saved_in(state)
    if saved is not None and saved.addresses != tuple(t.data_ptr() for t in inputs):
        saved.gradients = ()


# A CUDA graph writes to the predictions of its capture at every replay, and nobody knows how long a
# graph lives: those predictions are never freed.
_captured: dict[int, Tensor] = {}


def _keep_if_captured(prediction: Tensor) -> Tensor:
    if is_captured(prediction):
        _captured[id(prediction)] = prediction
    return prediction


_MAX_SHARED = 512  # on a device
_shared: dict[tuple[Any, ...], Tensor] = {}
_sharing = threading.Lock()


def _prediction_of(own: Tensor | None, loss: str, input: Tensor, reduction: int) -> Tensor:
    """A call's own prediction, or, for one that has none, that of all calls like it."""
    if own is not None:
        runtime.check_pair("prediction", own, input)
        return _keep_if_captured(own)
    key = (loss, input.device, input.dtype, input.numel(), reduction)
    known = _shared.get(key)
    if known is None:
        # A CUDA graph holds predictions by their addresses, so none is ever freed: of too many
        # sites the oldest leaves its own to the latest.
        with _sharing:
            here = [site for site in _shared if site[1] == input.device]
            new = len(here) < _MAX_SHARED
            spare = new_prediction(input) if new else _shared.pop(here[0])
            known = _shared.setdefault(key, spare)
    return known


# ---- autograd ------------------------------------------------------------------------------------


class OnePass(torch.autograd.Function):
    """The forward pass writes the gradient already, for a predicted upstream gradient; the backward
    operator has it computed where the prediction was wrong."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        input, target, weight, *more = (t for t in args[: -len(OPTIONS)])
        *options, prediction = args[-len(OPTIONS) :]
        # The weight stands in between, and has none.
        wanted = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3 : 3 + len(more)])
        ctx.wanted = wanted[: _variables(options[0])]
        ctx.mask = sum(1 << i for i, one in enumerate(ctx.wanted) if one)
        gradients = ctx.mask & ((1 << _row(options[0]).gradients) - 1)
        hooked = second_order.saves_through_hooks()
        if hooked:
            prediction = input.new_zeros(2, dtype=torch.float64)  # no confidence in it
        with torch._C._AutoDispatchBelowADInplaceOrView():
            forward = _loss_forward if _directly(input, target) else operators.loss_forward.default
            value, state = forward(input, target, weight, more, *options, gradients, prediction)
        if hooked:
            state = state.clone()
        ctx.save_for_backward(state, input, target, weight, *more)
        ctx.options = *options, gradients
        return value  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_output,) = grad_outputs
        if isinstance(row := _row(ctx.options[0]), RowLoss) and row.auxiliary:
            grad_output = grad_output[0]
        state, input, target, weight, *more = ctx.saved_tensors
        call = input, target, weight, more, *ctx.options
        _drop_gradients_of_other_memory(state, (input, target, *more))
        if second_order.needs_reference(grad_output):
            found = second_order.loss_reference_gradient(grad_output, *(*call[:-1], ctx.mask))
        else:
            direct = _directly(input, target, grad_output, state)
            backward = _loss_backward if direct else operators.loss_backward.default
            found = backward(grad_output, state, *call)
            if len(found) < sum(ctx.wanted):  # the loss is symmetric
                found.append(-found[0])
        left = iter(found)
        given = [next(left) if one else None for one in ctx.wanted]
        given += [None] * (2 + len(more) - len(given))
        rest = len(ctx.needs_input_grad) - 3 - len(more)
        return *given[:2], None, *given[2:], *(None,) * rest


def _directly(*tensors: Tensor) -> bool:
    """Whether a call goes to the kernels by the shortest way: each operator in between costs as much as
    a launch. Not where a mode, a subclass, a compiler or a profiler waits for the operators, nor on
    devices that have none."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
        or tensors[0].is_meta
    )


def _differentiable(
    input: Tensor, target: Tensor, weight: Tensor | None, more: list[Tensor], *options: Any
) -> Tensor:
    grad = torch.is_grad_enabled()
    wanted = [t.requires_grad for t in (input, target, *more)] if grad else []
    if any(wanted[: _variables(options[0])]):
        if _row(options[0]).symmetric and _other_gradient_comes_first(input, target):
            input, target = target, input
        # Autograd looks for tensors among the arguments, not inside of lists.
        return OnePass.apply(input, target, weight, *more, *options)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowADInplaceOrView():
        call = _loss if _directly(input, target) else operators.loss.default
        return call(input, target, weight, more, *options)  # type: ignore[no-any-return]


def _other_gradient_comes_first(input: Tensor, target: Tensor) -> bool:
    """As in csrc/torch/operators.cpp."""
    if not target.requires_grad or input.dtype is target.dtype:
        return target.requires_grad and not input.requires_grad
    wide = torch.promote_types(input.dtype, target.dtype) is target.dtype
    return wide or not input.requires_grad


def loss(input: Tensor, target: Tensor, *call: Any) -> Tensor:
    """The operator of that name."""
    function = _differentiable if _directly(input, target) else operators.loss.default
    value: Tensor = function(input, target, *call)
    return value


# ---- operators -----------------------------------------------------------------------------------

OPTIONS = ("loss", "parameters", "ignore_index", "reduction", "dtype", "prediction")


_CROSS_ENTROPY = PointwiseLoss(None)  # as far as gradients go


def _row(loss: str) -> PointwiseLoss | RowLoss:
    if loss == "cross_entropy":
        return _CROSS_ENTROPY
    return POINTWISE.get(loss) or custom.known(loss).loss


def _variables(loss: str) -> int:
    """How many of the inputs, from the first on, can have a gradient."""
    row = _row(loss)
    return 2 if row.symmetric else row.gradients


def _empty_gradients(call: Sequence[Any], mask: int, written: Gradients = ()) -> Gradients:
    """Those whose bits are set: new ones, but for those written that lie in memory as new ones would.
    (An input may have been given other memory: ``input.data = ...``.)"""
    input, target, _, more, loss, *_ = call
    of_rows = isinstance(_row(loss), RowLoss)  # whose inputs have several shapes

    def gradient(i: int, t: Tensor) -> Tensor | None:
        if not mask >> i & 1:
            return None
        there, like = written[i] if written else None, t if of_rows else input
        if there is not None and runtime.lies_like_gradient(there, like, t.dtype):
            return there
        return runtime.empty_like(like, t.dtype)

    inputs = (input, target, *more)[: _row(loss).gradients]
    return tuple(gradient(i, t) for i, t in enumerate(inputs))


def _none(call: Sequence[Any]) -> Gradients:
    return (None,) * _row(call[4]).gradients


def _listed(gradients: Gradients) -> list[Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


def _run(
    do: Pass,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    more: Sequence[Tensor],
    loss: str,
    parameters: Sequence[float],
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """The engine of the loss: a forward's loss, or None."""
    if loss == "cross_entropy":
        (label_smoothing,) = parameters
        return rows.run(do, input, target, weight, ignore_index, label_smoothing, reduction, dtype)
    known = POINTWISE.get(loss)
    numbers = tuple(parameters)
    if known is None:
        own, numbers = custom.loaded(loss, parameters)
        if isinstance(own, RowLoss):
            inputs = (input, target, *more) if own.gradients > 1 else (input,)
            return custom_rows.run(do, own, inputs, weight, numbers, ignore_index, reduction, dtype)
        known = own
    elif len(numbers) != known.parameters:
        raise ValueError(
            f"fusedloss: {loss!r} has {known.parameters} parameters, and the call {len(numbers)}"
        )
    return pointwise.run(
        do, known, input, target, weight, more, numbers, ignore_index, reduction, dtype
    )


def _loss(*args: Any) -> Any:
    *call, _ = args
    runtime.raise_faults()
    return _run(Pass(runtime.VALUE, runtime.empty_forward_state(call[0]), _none(call)), *call)


def _loss_forward(*args: Any) -> tuple[Any, Tensor]:
    *call, mask, own = args
    input, target, loss, reduction = call[0], call[1], call[4], call[7]
    runtime.raise_faults()
    if reduction == 0:
        state = runtime.empty_forward_state(input)
        return _run(Pass(runtime.VALUE, state, _none(call)), *call), state
    prediction = _prediction_of(own, loss, input, reduction)
    state = runtime.empty_forward_state(input)
    gradients = _empty_gradients(call, mask)
    value = _run(Pass(runtime.FORWARD, state, gradients, prediction), *call)
    addresses = tuple(t.data_ptr() for t in (input, target, *call[3]))
    attach(state, SavedGradients(gradients, prediction, input.shape, input.dtype, addresses))
    return value, state


def _loss_backward(grad_output: Tensor, state: Tensor, *args: Any) -> list[Tensor]:
    *call, mask = args
    input, reduction = call[0], call[7]
    saved = saved_in(state)
    written: Gradients = ()
    runtime.check_pair("state", state, input)
    if reduction != 0:
        runtime.check_number(grad_output, input)
    if saved is None:
        prediction = torch.empty_like(state)
    else:
        if (saved.input_shape, saved.input_dtype) != (input.shape, input.dtype):
            raise RuntimeError(
                f"fusedloss: backward's input is a {input.dtype} tensor of shape "
                f"{list(input.shape)}, and forward's was a {saved.input_dtype} tensor of shape "
                f"{list(saved.input_shape)}: between the two, leave input.data as it is"
            )
        written, saved.gradients = saved.gradients, ()
        prediction = _keep_if_captured(saved.prediction)
    gradients = _empty_gradients(call, mask, written)
    reused = all(new is old for new, old in zip(gradients, written or _none(call), strict=True))
    step = runtime.BACKWARD if reused else runtime.FRESH
    _run(Pass(step, state, gradients, prediction, grad_output), *call)
    return _listed(gradients)


def _loss_with_gradients(upstream: Tensor, *args: Any) -> Any:
    """By two launches, the value's and then backward's, which reads the rows once more."""
    *call, mask, out = args
    value = _loss(*call, None)
    given = iter(out)
    gradients = tuple(
        next(given) if mask >> i & 1 else None for i in range(_row(call[4]).gradients)
    )
    state = runtime.empty_forward_state(call[0])
    _run(Pass(runtime.FRESH, state, gradients, torch.empty_like(state), upstream), *call)
    return value


def _loss_meta(*args: Any) -> Tensor:
    input, loss, reduction, dtype = args[0], args[4], args[7], args[8]
    if isinstance(row := _row(loss), RowLoss):
        return custom_rows.empty_result(row, input, reduction, dtype)
    empty_loss = rows.empty_loss if loss == "cross_entropy" else pointwise.empty_loss
    return empty_loss(input, reduction, dtype)


def _loss_forward_meta(*args: Any) -> tuple[Tensor, Tensor]:
    return _loss_meta(*args), runtime.empty_forward_state(args[0])


def _loss_backward_meta(grad_output: Tensor, state: Tensor, *args: Any) -> list[Tensor]:
    return _listed(_empty_gradients(args, args[-1]))


CALL = (
    "Tensor input, Tensor target, Tensor? weight, Tensor[] more, str loss, float[] parameters, "
    "int ignore_index, int reduction, ScalarType dtype"
)
# As in csrc/torch/operators.cpp: traced by compilers, but not into a CUDA graph.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
for _schema, _kernel, _meta in (
    (f"loss({CALL}, Tensor? prediction) -> Tensor", _loss, _loss_meta),
    (
        f"loss_forward({CALL}, int gradients, Tensor? prediction) -> (Tensor loss, Tensor state)",
        _loss_forward,
        _loss_forward_meta,
    ),
    (
        f"loss_backward(Tensor grad_output, Tensor state, {CALL}, int gradients) -> Tensor[]",
        _loss_backward,
        _loss_backward_meta,
    ),
    (
        f"loss_with_gradients_(Tensor upstream, {CALL}, int gradients, Tensor(a!)[] out) -> Tensor",
        _loss_with_gradients,
        lambda upstream, *args: _loss_meta(*args),
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=TAGS)
    for _device in DEVICES:
        _library.impl(_name, _kernel, _device)
    _library.impl(_name, _meta, "Meta")
_library.impl("loss", _differentiable, "Autograd")
