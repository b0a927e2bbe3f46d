"""The operators torch.ops.fusedloss_triton.*: those of csrc/ops.cpp and csrc/autograd.cpp, with
their schemas and their ways, in Python: they need no compiled extension.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import second_order
from ...prediction import is_captured, new_prediction
from . import common, cross_entropy, custom, pointwise
from .common import Pass
from .losses import POINTWISE

DEVICES = ("CPU", "CUDA", "XPU")  # CPU: in Triton's interpreter

_torch_library: Any = torch.library  # untyped in some of the releases
_library = _torch_library.Library("fusedloss_triton", "DEF")
operators: Any = torch.ops.fusedloss_triton


# ---- what a forward leaves for its backward ------------------------------------------------------


Gradients = tuple[Tensor | None, Tensor | None]  # for input and target; None: is not wanted


@dataclass
class Carried:
    """Lives and dies with the memory of a forward's `scales`, as in csrc/carried.h."""

    gradients: Gradients  # (None, None): not written, or handed over already
    prediction: Tensor
    input_shape: torch.Size
    input_dtype: torch.dtype
    addresses: tuple[int, int]  # of input and target


def carry(scales: Tensor, carried: Carried) -> None:
    scales.untyped_storage().carried = carried  # type: ignore[attr-defined]


def carried(scales: Tensor) -> Carried | None:
    """None for scales that are no longer where forward left them."""
    return getattr(scales.untyped_storage(), "carried", None)


def _addresses(call: Sequence[Any]) -> tuple[int, int]:
    return call[0].data_ptr(), call[1].data_ptr()


def _drop_gradients_of_other_memory(scales: Tensor, call: Sequence[Any]) -> None:
    """Where input or target has been given other memory since forward (``input.data = ...``),
    backward is to see the numbers there."""
    left = carried(scales)
    if left is not None and left.addresses != _addresses(call):
        left.gradients = None, None


# A CUDA graph writes to the predictions of its capture at every replay, and nobody knows how long a
# graph lives: those predictions are never freed.
_captured: dict[int, Tensor] = {}


def _keep_if_captured(prediction: Tensor) -> Tensor:
    if is_captured(prediction):
        _captured[id(prediction)] = prediction
    return prediction


_MOST_SHARED = 512  # on a device
_shared: dict[tuple[Any, ...], Tensor] = {}
_sharing = threading.Lock()


def _prediction_of(own: Tensor | None, loss: str, input: Tensor, reduction: int) -> Tensor:
    """A call's own prediction, or, for one that has none, that of all calls like it."""
    if own is not None:
        common.check_pair("prediction", own, input)
        return _keep_if_captured(own)
    key = (loss, input.device, input.dtype, input.numel(), reduction)
    known = _shared.get(key)
    if known is None:
        # A CUDA graph holds predictions by their addresses, so none is ever freed: of too many
        # sites the oldest leaves its own to the latest.
        with _sharing:
            here = [site for site in _shared if site[1] == input.device]
            new = len(here) < _MOST_SHARED
            spare = new_prediction(input) if new else _shared.pop(here[0])
            known = _shared.setdefault(key, spare)
    return known


# ---- autograd ------------------------------------------------------------------------------------


def _needs_reference(grad_output: Tensor) -> bool:
    """create_graph, and batches of upstream gradients (is_grads_batched)."""
    functorch = torch._C._functorch
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return (
        functorch.is_batchedtensor(grad_output)
        or functorch.is_gradtrackingtensor(grad_output)
        or functorch.is_legacy_batchedtensor(grad_output)
    )


def _saves_through_hooks() -> bool:
    """They take what is saved away until backward: a gradient written already would stay."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _differentiable(
    loss: str, tensors: int, of_target: bool, reference_gradient: Callable[..., Any]
) -> Callable[..., Tensor]:
    """The operator for autograd. A call begins with so many tensors and ends with a prediction.

    of_target: target may want a gradient too. The operators then take whose are wanted, and give
    both.
    """

    class OnePass(torch.autograd.Function):
        """The forward pass writes the gradient already, for a predicted upstream gradient; the
        backward operator has it computed where the prediction was wrong."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            *call, prediction = args
            if of_target:
                call += ctx.needs_input_grad[:2]
            hooked = _saves_through_hooks()
            if hooked:
                prediction = call[0].new_zeros(2, dtype=torch.float64)  # no confidence in it
            with torch._C._AutoDispatchBelowADInplaceOrView():
                value, scales = getattr(operators, loss + "_forward").default(*call, prediction)
            if hooked:
                scales = scales.clone()
            ctx.save_for_backward(scales, *call[:tensors])
            ctx.options = call[tensors:]
            return value  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            (grad_output,) = grad_outputs
            scales, *operands = ctx.saved_tensors
            call = (*operands, *ctx.options)
            _drop_gradients_of_other_memory(scales, call)
            if _needs_reference(grad_output):
                gradients = reference_gradient(grad_output, *call)
            else:
                backward = getattr(operators, loss + "_backward").default
                gradients = backward(grad_output, scales, *call)
            if not of_target:
                gradients = gradients, None
            return *gradients, *(None,) * (len(ctx.needs_input_grad) - 2)

    def operator(*args: Any) -> Tensor:
        wanted = args[0].requires_grad or (of_target and args[1].requires_grad)
        if torch.is_grad_enabled() and wanted:
            return OnePass.apply(*args)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return getattr(operators, loss).default(*args)  # type: ignore[no-any-return]

    return operator


# ---- operators -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """An engine behind the operators of one family. call: as in their schemas."""

    name: str
    call: str  # the arguments of a call, of which the last two are the reduction and the dtype
    run: Callable[..., Tensor | None]  # of a Pass, and those arguments
    loss: Callable[..., str]  # what tells predictions apart
    empty_loss: Callable[[Tensor, int, torch.dtype], Tensor]
    reference_gradient: Callable[..., Any]
    # Gives the gradient for target too: the operators then take whose are wanted.
    of_target: bool = False

    def _wanted(self, call: Sequence[Any]) -> tuple[Sequence[Any], tuple[bool, bool]]:
        """The arguments of a call, and whose gradients are wanted."""
        return (call[:-2], (call[-2], call[-1])) if self.of_target else (call, (True, False))

    def _gradients(
        self,
        call: Sequence[Any],
        wanted: tuple[bool, bool],
        written: Gradients = (None, None),
    ) -> Gradients:
        """Those that are wanted: new ones, but for those written that lie in memory as new ones
        would. (input and target may have been given other memory: ``input.data = ...``.)"""
        input, target = call[:2]

        def gradient(wanted: bool, dtype: torch.dtype, there: Tensor | None) -> Tensor | None:
            if not wanted:
                return None
            if there is not None and common.lies_like_gradient(there, input, dtype):
                return there
            return common.empty_like(input, dtype)

        return (
            gradient(wanted[0], input.dtype, written[0]),
            gradient(wanted[1], target.dtype, written[1]),
        )

    def _given(self, gradients: Gradients) -> Any:
        return gradients if self.of_target else gradients[0]

    def value(self, *args: Any) -> Tensor | None:
        *call, _ = args
        common.raise_faults()
        return self.run(Pass(common.VALUE, common.empty_scales(call[0])), *call)

    def forward(self, *args: Any) -> tuple[Tensor | None, Tensor]:
        call, wanted = self._wanted(args[:-1])
        input, reduction, own = call[0], call[-2], args[-1]
        common.raise_faults()
        if reduction == 0:
            scales = common.empty_scales(input)
            return self.run(Pass(common.VALUE, scales), *call), scales
        prediction = _prediction_of(own, self.loss(*call), input, reduction)
        # What other streams teach the prediction meanwhile is not this call's.
        scales, gradients = prediction.clone(), self._gradients(call, wanted)
        value = self.run(Pass(common.FORWARD, scales, *gradients), *call)
        carry(scales, Carried(gradients, prediction, input.shape, input.dtype, _addresses(call)))
        return value, scales

    def backward(self, grad_output: Tensor, scales: Tensor, *args: Any) -> Any:
        call, wanted = self._wanted(args)
        input, left = call[0], carried(scales)
        written: Gradients = None, None
        common.check_pair("scales", scales, input)
        if call[-2] != 0:
            common.check_number(grad_output, input)
        prediction = torch.empty_like(scales)
        if left is not None:
            if (left.input_shape, left.input_dtype) != (input.shape, input.dtype):
                raise RuntimeError(
                    f"fusedloss: backward's input is a {input.dtype} tensor of shape "
                    f"{list(input.shape)}, and forward's was a {left.input_dtype} tensor of shape "
                    f"{list(left.input_shape)}: between the two, leave input.data as it is"
                )
            written, left.gradients = left.gradients, (None, None)
            prediction = _keep_if_captured(left.prediction)
        gradients = self._gradients(call, wanted, written)
        reused = all(new is old for new, old in zip(gradients, written, strict=True))
        step = common.BACKWARD if reused else common.FRESH
        self.run(Pass(step, scales, *gradients, prediction, grad_output), *call)
        return self._given(gradients)

    def meta_value(self, *args: Any) -> Tensor:
        input, reduction, dtype = args[0], *args[-3:-1]
        return self.empty_loss(input, reduction, dtype)

    def meta_forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        call, _ = self._wanted(args[:-1])
        return self.meta_value(*call, None), common.empty_scales(call[0])

    def meta_backward(self, grad_output: Tensor, scales: Tensor, *args: Any) -> Any:
        call, wanted = self._wanted(args)
        return self._given(self._gradients(call, wanted))

    def define(self) -> None:
        # As in csrc/ops.cpp: traced by compilers, but not into a CUDA graph.
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
        wanted = ", bool of_input, bool of_target" if self.of_target else ""
        gradients = "(Tensor, Tensor)" if self.of_target else "Tensor"
        for name, schema, kernel, meta in (
            ("", f"({self.call}, Tensor? prediction) -> Tensor", self.value, self.meta_value),
            (
                "_forward",
                f"({self.call}{wanted}, Tensor? prediction) -> (Tensor loss, Tensor scales)",
                self.forward,
                self.meta_forward,
            ),
            (
                "_backward",
                f"(Tensor grad_output, Tensor scales, {self.call}{wanted}) -> {gradients}",
                self.backward,
                self.meta_backward,
            ),
        ):
            _library.define(self.name + name + schema, tags=tags)
            for device in DEVICES:
                _library.impl(self.name + name, kernel, device)
            _library.impl(self.name + name, meta, "Meta")
        tensors = self.call.count("Tensor")
        operator = _differentiable(self.name, tensors, self.of_target, self.reference_gradient)
        _library.impl(self.name, operator, "Autograd")


def _run_pointwise(
    do: Pass,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    name: str,
    parameter: float,
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor | None:
    if name not in POINTWISE:
        raise ValueError(f"fusedloss: no pointwise loss is named {name!r}")
    loss = POINTWISE[name]
    operands = () if pos_weight is None else (pos_weight,)
    parameters = (parameter,) * loss.parameters
    return pointwise.run(
        do, loss, input, target, weight, operands, parameters, ignore_index, reduction, dtype
    )


Engine(
    "pointwise",
    "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str loss, float parameter, "
    "int ignore_index, int reduction, ScalarType dtype",
    _run_pointwise,
    lambda *call: call[4],
    pointwise.empty_loss,
    second_order.pointwise_reference_gradient,
).define()
Engine(
    "custom",
    "Tensor input, Tensor target, Tensor? weight, str loss, float[] parameters, int reduction, "
    "ScalarType dtype",
    custom.run,
    lambda *call: call[3],
    pointwise.empty_loss,
    second_order.custom_reference_gradient,
    of_target=True,
).define()
Engine(
    "cross_entropy",
    "Tensor input, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
    "int reduction, ScalarType dtype",
    cross_entropy.run,
    lambda *call: "cross_entropy",
    cross_entropy.empty_loss,
    second_order.cross_entropy_reference_gradient,
).define()
