"""What the Triton engines share: the upstream gradient's prediction, the second stage of a sum,
what a mean divides by, and faults.

Kernels are compiled without contraction to fused multiply-add, and one compiled kernel serves every
pass: a gradient has the same bits whichever of them forms it. A sum's second stage is a kernel of
one program, for only the end of a kernel orders the memory of its programs on every GPU.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import backends

NO_FUSION = {"enable_fp_fusion": False}
SUM_BLOCK, COUNTS_EACH = 1024, 4096

# ---- passes --------------------------------------------------------------------------------------

# The kernels' `step`. BACKWARD: the gradient may be right already; FRESH: there is none yet.
VALUE, FORWARD, BACKWARD, FRESH = 0, 1, 2, 3
IS_FORWARD = tl.constexpr(FORWARD)
IS_BACKWARD = tl.constexpr(BACKWARD)
IS_FRESH = tl.constexpr(FRESH)


@dataclass
class Pass:
    """What an engine does with the operands of a call."""

    step: int
    # Two float64. FORWARD finds the prediction there. VALUE and FORWARD leave there the upstream
    # gradient that the gradient was written for (nan: it was not) and what the loss was divided by.
    forward_state: Tensor
    gradient: Tensor | None = None
    target_gradient: Tensor | None = None
    prediction: Tensor | None = None  # BACKWARD and FRESH update it
    grad_output: Tensor | None = None

    @property
    def forward(self) -> bool:
        return self.step < BACKWARD


# ---- numbers -------------------------------------------------------------------------------------

# Triton's interpreter truncates to bfloat16, where a GPU rounds.
_TRUNCATES = tl.constexpr(backends.INTERPRETED)


@triton.jit
def narrow(x, D: tl.constexpr):
    """Rounded to D."""
    if _TRUNCATES and D == tl.bfloat16:
        b = x.to(tl.float32).to(tl.int32, bitcast=True)
        even = (b + 0x7FFF + ((b >> 16) & 1)) & -0x10000
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(D)


def halves(x: float) -> tuple[int, int]:
    """The bits of a float64, for Triton passes a float as float32.

    Odd, and too large for 32 bits: Triton compiles a kernel anew for numbers that are not.
    """
    low, high = struct.unpack("<II", struct.pack("<d", x))
    return 2 * high + 1 + (1 << 40), 2 * low + 1 + (1 << 40)


@triton.jit
def from_halves(halves):
    bits = ((halves[0] >> 1) << 32) | ((halves[1] >> 1) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


# ---- arguments of the kernels --------------------------------------------------------------------
# Numbers that must not be specialised are arguments of their own: Triton specialises all those in
# a tuple.


class Operand(NamedTuple):
    pointer: Any
    strides: Any


class Outputs(NamedTuple):
    """What a kernel writes; None: it does not."""

    value: Any  # of every element or row: with reduction "none"
    gradient: Any
    target_gradient: Any
    partials: Any  # a sum of values for each program
    fault: Any


class Scaling(NamedTuple):
    """Where a kernel finds what the gradient is multiplied by."""

    forward_state: Any
    prediction: Any
    grad_output: Any
    counts: Any


# ---- the upstream gradient -----------------------------------------------------------------------

TRUSTED_CONFIDENCE = tl.constexpr(2.0)
MAX_CONFIDENCE = tl.constexpr(3.0)
MAX_COUNTS = tl.constexpr(256)


@triton.jit
def same_sign_and_value(a, b):
    """nan is the same as nothing."""
    return (a == b) & (a.to(tl.int64, bitcast=True) == b.to(tl.int64, bitcast=True))


@triton.jit
def normalizer_of(counts, parts, divisor):
    """What the loss is divided by: the sum of `counts`, or where there are none `divisor`."""
    normalizer = divisor.to(tl.float64)
    if parts > 0:
        i = tl.arange(0, MAX_COUNTS)
        normalizer = tl.sum(tl.load(counts + i, mask=i < parts, other=0.0))
    return normalizer


@triton.jit
def update_predictor(prediction, upstream):
    predicted, confidence = tl.load(prediction), tl.load(prediction + 1)
    right = same_sign_and_value(predicted, upstream)
    more = tl.minimum(confidence + 1.0, MAX_CONFIDENCE)
    tl.store(prediction, upstream)
    tl.store(prediction + 1, tl.where(right, more, tl.maximum(confidence - 1.0, 0.0)))


@triton.jit
def begin(scaling, parts, divisor, step, UNREDUCED: tl.constexpr):
    """Returns whether the gradient must be written, and the factor of all its elements. The first
    program of a backward updates the prediction.

    UNREDUCED: every element or row has its own upstream gradient, which no forward predicts.
    """
    if UNREDUCED:
        return step == IS_FRESH, step.to(tl.float64) * 0.0 + 1.0
    else:
        forward = step < IS_BACKWARD
        first, second = tl.load(scaling.forward_state), tl.load(scaling.forward_state + 1)
        upstream = tl.where(forward, first, tl.load(scaling.grad_output).to(tl.float64))
        normalizer = normalizer_of(scaling.counts, parts, divisor)
        normalizer = tl.where(forward, normalizer, second)
        trusted = (step == IS_FORWARD) & (second >= TRUSTED_CONFIDENCE)
        wrong = (step == IS_BACKWARD) & (same_sign_and_value(first, upstream) == 0)
        if step >= IS_BACKWARD:
            if tl.program_id(0) == 0:
                update_predictor(scaling.prediction, upstream)
        return trusted | wrong | (step == IS_FRESH), upstream / normalizer


# ---- sums ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "parts", "divisor", "step"])
def finish(
    partials, n, loss, scaling, parts, divisor, step, NAN_IF_EMPTY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss from the programs' sums, always in the same order; and what backward needs."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, n, BLOCK):
        total += tl.load(partials + begin + i, mask=begin + i < n, other=0.0)
    normalizer = normalizer_of(scaling.counts, parts, divisor)
    value = tl.sum(total) / normalizer
    if NAN_IF_EMPTY:
        value = tl.where(normalizer == 0.0, float("nan"), value)
    if loss.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(loss, narrow(value, loss.dtype.element_ty))
    state = scaling.forward_state
    trusted = (step == IS_FORWARD) & (tl.load(state + 1) >= TRUSTED_CONFIDENCE)
    tl.store(state, tl.where(trusted, tl.load(state), float("nan")))
    tl.store(state + 1, normalizer)


@triton.jit(do_not_specialize=["n", "each", "classes", "ignore_index"])
def count_classes(
    indices, weight, counts, n, each, classes, ignore_index, BLOCK: tl.constexpr
):  # fmt: skip
    """For each program's share of the indices: how many count, or the sum of their weights. An index
    out of range counts for nothing."""
    begin = tl.program_id(0).to(tl.int64) * each
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, each, BLOCK):
        inside = (first + i < each) & (begin + first + i < n)
        index = tl.load(indices + begin + first + i, mask=inside, other=-1)
        counted = inside & (index >= 0) & (index < classes) & (index != ignore_index)
        if weight is None:
            total += counted.to(tl.float64)
        else:
            total += tl.load(weight + index, mask=counted, other=0.0).to(tl.float64)
    tl.store(counts + tl.program_id(0), tl.sum(total))


@dataclass
class Divisor:
    """What the loss is divided by: the sum of counts, or without them a number."""

    number: int = 1
    counts: Tensor | None = None

    @classmethod
    def of_classes(
        cls, indices: Tensor, weight: Tensor | None, classes: int, ignore_index: int
    ) -> Divisor:
        """How many of the class indices count, or the sum of their weights."""
        n = indices.numel()
        parts = min(MAX_COUNTS.value, triton.cdiv(n, COUNTS_EACH))
        counts = indices.new_empty(parts, dtype=torch.float64)
        count_classes[(parts,)](
            indices, weight, counts, n, triton.cdiv(n, parts), classes, ignore_index,
            BLOCK=SUM_BLOCK, **NO_FUSION,
        )  # fmt: skip
        return cls(counts=counts)


def launch(
    kernel: Any,
    programs: int,
    do: Pass,
    device: torch.device,
    result: Tensor | None,
    *,
    unreduced: bool,
    divisor: Divisor,
    nan_if_empty: bool,
    gradient: Any,
    **arguments: Any,
) -> Tensor | None:
    """Launches a kernel and, for a reduced loss, the second stage of its sum.

    What a pass does not use is another tensor of its type: one compiled kernel serves them all.
    """
    state = do.forward_state
    partials = state.new_empty(programs) if do.forward else state
    value = result if unreduced else None
    counts = divisor.counts
    common = {
        "scaling": Scaling(
            forward_state=state,
            prediction=state if do.prediction is None else do.prediction,
            grad_output=do.grad_output if result is None else result,
            counts=state if counts is None else counts,
        ),
        "parts": 0 if counts is None else counts.numel(),
        "divisor": divisor.number,
        "step": do.step,
        **NO_FUSION,
    }
    outputs = Outputs(value, gradient, do.target_gradient, partials, fault_of(device))
    with on_device(device):
        kernel[(programs,)](outputs=outputs, **arguments, **common)
        if result is not None and not unreduced:
            finish[(1,)](
                partials, programs, result, NAN_IF_EMPTY=nan_if_empty, BLOCK=SUM_BLOCK, **common
            )
    return result


# ---- faults --------------------------------------------------------------------------------------
# The first input of a device that a loss cannot take, written by a kernel into page-locked memory,
# where the host looks whenever it likes: state, what, position, value, classes.

_NONE, _BEING_WRITTEN, _READY = 0, 1, 2
TARGET_CLASS = tl.constexpr(0)
INPUT_OUTSIDE_UNIT = tl.constexpr(1)
TARGET_OUTSIDE_UNIT = tl.constexpr(2)
NO_FAULT = tl.constexpr(1 << 62)  # a position behind all others
_faults: dict[torch.device, Tensor] = {}


@triton.jit
def report_error(fault, what, position, value, classes):
    """Tells the host; the first to come is told. value: an int64, or the bits of a float64."""
    zero = position * 0
    if tl.atomic_cas(fault, zero, zero + 1, scope="sys") == 0:
        tl.store(fault + 1, zero + what)
        tl.store(fault + 2, position)
        tl.store(fault + 3, value)
        tl.store(fault + 4, zero + classes)
        tl.atomic_xchg(fault, zero + 2, sem="release", scope="sys")


def fault_of(device: torch.device) -> Tensor:
    fault = _faults.get(device)
    if fault is None:
        pinned = device.type != "cpu"
        fault = torch.zeros(5, dtype=torch.int64, device="cpu", pin_memory=pinned)
        fault = _faults.setdefault(device, fault)
    return fault


def raise_faults() -> None:
    """Raises what a kernel has found wrong with its input since the last time, if it is known."""
    when = " (In an earlier call of fusedloss, whose loss and gradient are nan there.)"
    for fault in tuple(_faults.values()):
        state, what, position, value, classes = fault.tolist()
        if state != _READY:
            continue
        fault[0] = _NONE
        if what == TARGET_CLASS.value:
            raise IndexError(
                f"Target {value} is out of bounds. It stands at target.flatten()[{position}]; "
                f"there are {classes} classes.{when}"
            )
        name = "input" if what == INPUT_OUTSIDE_UNIT.value else "target"
        number = struct.unpack("<d", struct.pack("<q", value))[0]
        raise RuntimeError(
            f"all elements of {name} should be between 0 and 1, but element {position} in memory "
            f"order is {number:.9g}{when}"
        )


# ---- tensors -------------------------------------------------------------------------------------


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device. The interpreter is NumPy, which warns of every nan."""
    if device.type == "cpu":
        import numpy as np

        return np.errstate(all="ignore")
    context: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return context


def aligned(tensor: Tensor) -> Tensor:
    """Memory that a caller brought along may begin between two elements: a copy does not."""
    fits = tensor.data_ptr() % tensor.element_size() == 0
    return tensor if fits else tensor.clone(memory_format=torch.preserve_format)


def is_dense(tensor: Tensor) -> bool:
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense.default(tensor)
    return dense


def empty_like(input: Tensor, dtype: torch.dtype) -> Tensor:
    """In the order of input's strides where they are dense, else row-major."""
    order = torch.preserve_format if is_dense(input) else torch.contiguous_format
    return torch.empty_like(input, dtype=dtype, requires_grad=False, memory_format=order)


def lies_like_gradient(gradient: Tensor, input: Tensor, dtype: torch.dtype) -> bool:
    """Whether it lies in memory as ``empty_like(input, dtype)`` would."""
    if (gradient.shape, gradient.dtype, gradient.device) != (input.shape, dtype, input.device):
        return False
    return gradient.stride() == input.stride() if is_dense(input) else gradient.is_contiguous()


def empty_forward_state(input: Tensor) -> Tensor:
    return input.new_empty(2, dtype=torch.float64)


def class_dim(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def check_shapes(input: Tensor, target: Tensor) -> None:
    expected = list(input.shape)
    if target.dtype is torch.int64:
        if not expected:
            raise ValueError("fusedloss: input of shape () has no class dimension")
        del expected[class_dim(input)]
    if list(target.shape) != expected:
        raise ValueError(
            f"fusedloss: target of shape {list(target.shape)} does not fit input of shape "
            f"{list(input.shape)}"
        )


def check_rows(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """The same for losses over rows, which need a class, and one weight for each class."""
    check_shapes(input, target)
    classes = input.shape[class_dim(input)] if input.dim() else 0
    if classes == 0:
        raise ValueError(f"fusedloss: input of shape {list(input.shape)} has no classes")
    if weight is not None and weight.numel() != classes:
        raise ValueError(
            f"fusedloss: {classes} classes need a weight of shape ({classes}), not "
            f"{list(weight.shape)}"
        )


def check_pair(name: str, pair: Tensor, input: Tensor) -> None:
    """Of a prediction and of forward_state: two float64 where input is."""
    if pair.device != input.device or pair.dtype is not torch.float64 or pair.shape != (2,):
        raise ValueError(
            f"fusedloss: {name} of {list(pair.shape)} {pair.dtype} on {pair.device}, not of two "
            f"float64 on {input.device}"
        )


def check_number(grad_output: Tensor, input: Tensor) -> None:
    """The upstream gradient of a reduction: one number, where input is."""
    one = grad_output.numel() == 1 and grad_output.is_floating_point()
    if not one or grad_output.device != input.device:
        raise ValueError(
            f"fusedloss: grad_output of shape {list(grad_output.shape)} and dtype "
            f"{grad_output.dtype} on {grad_output.device} is not one real number on {input.device}"
        )
