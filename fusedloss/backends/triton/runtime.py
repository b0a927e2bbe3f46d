"""What the Triton engines share: the upstream gradient's prediction, the second stage of a sum,
what a mean divides by, launches, and faults.

Kernels are compiled without contraction to fused multiply-add, and one compiled kernel serves every
pass: a gradient has the same bits whichever of them forms it. The program that finishes last adds up
what all programs leave: a kernel of its own for that would cost the host as much as the first one.
"""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Callable, Collection, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import backends

NO_FUSION = {"enable_fp_fusion": False}
SUM_BLOCK = tl.constexpr(1024)
MAX_COUNTING = tl.constexpr(256)  # programs that count classes
COUNTS_EACH = 4096  # indices, at least
MAX_COUNTED_BY_ALL = 2048  # so few that every program of a row engine counts them

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
    # Two float64. VALUE and FORWARD leave there the upstream gradient that the gradient was written
    # for (nan: it was not) and what the loss was divided by.
    forward_state: Tensor
    gradients: tuple[Tensor | None, ...] = (None,)  # of the inputs that have one
    prediction: Tensor | None = None  # FORWARD reads it, BACKWARD and FRESH update it
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
        x = x.to(tl.float32)
        b = x.to(tl.int32, bitcast=True)
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
    gradients: Any  # a tuple: of the inputs
    loss: Any
    partials: Any  # of each program: its sum of values, and behind all sums what it has predicted
    ticket: Any
    fault: Any


class Scaling(NamedTuple):
    """Where a kernel finds what the gradient is multiplied by, and leaves it for the next one.

    known: the prediction in a forward, forward's state in a backward. learned: the other way round.
    """

    known: Any
    learned: Any
    grad_output: Any
    count: Any


# ---- the upstream gradient -----------------------------------------------------------------------

TRUSTED_CONFIDENCE = tl.constexpr(2.0)
MAX_CONFIDENCE = tl.constexpr(3.0)
# Divisors: what a kernel has counted, and the class indices, which every program counts.
COUNTED = tl.constexpr(-1)
COUNTED_BY_ALL = tl.constexpr(-2)


@triton.jit
def same_sign_and_value(a, b):
    """nan is the same as nothing."""
    return (a == b) & (a.to(tl.int64, bitcast=True) == b.to(tl.int64, bitcast=True))


@triton.jit
def read_once(pointer):
    """A float64 that other streams may write meanwhile. An atomic operation reads it once for all
    threads of the program, which a load does not, and changes nothing."""
    bits = tl.atomic_or(pointer.to(tl.pointer_type(tl.int64), bitcast=True), 0, sem="relaxed")
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def update_predictor(prediction, upstream):
    predicted, confidence = tl.load(prediction), tl.load(prediction + 1)
    right = same_sign_and_value(predicted, upstream)
    more = tl.minimum(confidence + 1.0, MAX_CONFIDENCE)
    tl.store(prediction, upstream)
    tl.store(prediction + 1, tl.where(right, more, tl.maximum(confidence - 1.0, 0.0)))


@triton.jit
def begin_backward(scaling, step, UNREDUCED: tl.constexpr):
    """Returns whether the gradient must be written, and the factor of all its elements; in a forward,
    what begin_forward() replaces. The first program of a backward updates the prediction.

    UNREDUCED: every element or row has its own upstream gradient, which no forward predicts.
    """
    write = step == IS_FRESH
    factor = step.to(tl.float64) * 0.0 + 1.0
    if not UNREDUCED:
        if step >= IS_BACKWARD:
            upstream = tl.load(scaling.grad_output).to(tl.float64)
            write = write | (same_sign_and_value(tl.load(scaling.known), upstream) == 0)
            factor = upstream / tl.load(scaling.known + 1)
            if tl.program_id(0) == 0:
                update_predictor(scaling.learned, upstream)
    return write, factor


@triton.jit
def begin_forward(scaling, outputs, divisor, step, UNREDUCED: tl.constexpr):
    """The same; in a backward, nothing of use. What can be loaded meanwhile is loaded before it, for it
    waits for memory. A program leaves what it takes for the upstream gradient, nan where it writes no
    gradient."""
    write = step > IS_BACKWARD
    factor = step.to(tl.float64) * 0.0 + 1.0
    if not UNREDUCED:
        normalizer = factor * divisor
        upstream = factor * float("nan")
        if divisor == COUNTED:
            normalizer = tl.load(scaling.count)
        if step == IS_FORWARD:
            # Value and confidence may come from two updates: any number may be predicted, because
            # forward_state names it.
            write = read_once(scaling.known + 1) >= TRUSTED_CONFIDENCE
            upstream = tl.where(write, read_once(scaling.known), upstream)
        program = tl.program_id(0)
        tl.store(outputs.partials + tl.num_programs(0) + program.to(tl.int64), upstream)
        if program == 0:
            tl.store(scaling.learned + 1, normalizer)
        factor = upstream / normalizer
    return write, factor


# ---- sums ----------------------------------------------------------------------------------------


@triton.jit
def is_last(ticket):
    """Whether all other programs have come here before: what they stored can be loaded. By ".cv", past
    every cache, since only this thread's are up to date on some GPUs. The ticket is 0 again for the next
    kernel."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def finish(scaling, outputs, NAN_IF_EMPTY: tl.constexpr):
    """The loss from the sums in partials, and what backward needs.

    Programs may have read different predictions; then the state says that the gradient is not written.
    """
    n = tl.num_programs(0).to(tl.int64)
    if is_last(outputs.ticket):
        normalizer = tl.load(scaling.learned + 1, cache_modifier=".cv")
        upstream = tl.load(outputs.partials + n, cache_modifier=".cv")
        i = tl.arange(0, SUM_BLOCK)
        total = tl.zeros([SUM_BLOCK], tl.float64)
        others = tl.zeros([SUM_BLOCK], tl.int32)
        for begin in range(0, n, SUM_BLOCK):
            at, inside = outputs.partials + begin + i, begin + i < n
            total += tl.load(at, mask=inside, other=0.0, cache_modifier=".cv")
            seen = tl.load(at + n, mask=inside, other=upstream, cache_modifier=".cv")
            others += tl.where(same_sign_and_value(seen, upstream), 0, 1)
        value = tl.sum(total) / normalizer
        if NAN_IF_EMPTY:
            value = tl.where(normalizer == 0.0, float("nan"), value)
        if outputs.loss.dtype.element_ty != tl.float64:
            value = value.to(tl.float32)
        tl.store(outputs.loss, narrow(value, outputs.loss.dtype.element_ty))
        tl.store(scaling.learned, tl.where(tl.sum(others) == 0, upstream, float("nan")))


@triton.jit
def sum_class_weights(indices, weight, n, classes, ignore_index):
    """How many class indices count, or the sum of their weights. An index out of range counts for
    nothing."""
    i = tl.arange(0, SUM_BLOCK)
    total = tl.zeros([SUM_BLOCK], tl.float64)
    for first in range(0, n, SUM_BLOCK):
        inside = first + i < n
        index = tl.load(indices + first + i, mask=inside, other=-1)
        counted = inside & (index >= 0) & (index < classes) & (index != ignore_index)
        if weight is None:
            total += counted.to(tl.float64)
        else:
            total += tl.load(weight + index, mask=counted, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit(do_not_specialize=["n", "each", "classes", "ignore_index"])
def count_classes(indices, weight, counts, ticket, n, each, classes, ignore_index):
    """Leaves the sum, and behind it each program's part."""
    begin = tl.program_id(0).to(tl.int64) * each
    share = tl.minimum(n - begin, each)
    part = sum_class_weights(indices + begin, weight, share, classes, ignore_index)
    tl.store(counts + 1 + tl.program_id(0), part)
    if is_last(ticket):
        i = tl.arange(0, MAX_COUNTING)
        parts = tl.load(
            counts + 1 + i, mask=i < tl.num_programs(0), other=0.0, cache_modifier=".cv"
        )
        tl.store(counts, tl.sum(parts))


@dataclass
class Divisor:
    """What the loss is divided by: a number, or one that a kernel has counted."""

    number: int = 1
    count: Tensor | None = None

    @classmethod
    def of_classes(
        cls, indices: Tensor, weight: Tensor | None, classes: int, ignore_index: int
    ) -> Divisor:
        """How many of the class indices count, or the sum of their weights."""
        n = indices.numel()
        programs = max(1, min(MAX_COUNTING.value, ceil_divide(n, COUNTS_EACH)))
        counts = indices.new_empty(1 + programs, dtype=torch.float64)
        tensors = {
            "indices": indices,
            "weight": weight,
            "counts": counts,
            "ticket": ticket_of(indices),
        }
        numbers = {
            "n": n,
            "each": ceil_divide(n, programs),
            "classes": classes,
            "ignore_index": ignore_index,
        }
        start(
            count_classes,
            programs,
            indices.device,
            {**tensors, **numbers},
            tensors.values(),
            tuple(numbers.values()),
        )
        return cls(COUNTED.value, counts)


# ---- launches ------------------------------------------------------------------------------------


def ceil_divide(a: int, b: int) -> int:
    """Triton's own, and its next power of two, take the host many times as long."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# The versions whose compiled kernels are known to be called as here.
_VERSIONS = ("3.7.", "3.8.")
binds_once = not backends.INTERPRETED and triton.__version__.startswith(_VERSIONS)
MAX_KNOWN = 4096


class Launcher(NamedTuple):
    """A kernel as Triton has compiled and loaded it for arguments like these."""

    run: Any
    function: Any
    metadata: Any
    in_order: Callable[[dict[str, Any]], tuple[Any, ...]]


_launchers: dict[Hashable, Launcher] = {}


def _observed() -> bool:
    """Whether a profiler listens to Triton's launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def key_of(
    kernel: Any,
    device: torch.device,
    tensors: Collection[Tensor | None],
    numbers: Hashable,
    num_warps: int,
) -> Hashable:
    """All that decides which compiled kernel a launch takes. tensors, numbers: as start() has them."""
    # What Triton looks at of a tensor.
    seen: list[Hashable] = [t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    if torch.version.hip:
        seen += [t if t is None else t.untyped_storage().size() < 1 << 31 for t in tensors]
    return (kernel.fn, device, numbers, num_warps, *seen)


def start(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: dict[str, Any],
    tensors: Collection[Tensor | None],
    numbers: Hashable,
    num_warps: int = 4,
) -> None:
    """Launches a kernel on the device's current stream.

    Triton finds out at every launch which compiled kernel takes the arguments, which costs more than
    the launch. So the answer is kept, with all that it depends on: tensors are those of the arguments,
    and numbers decide all other arguments; what they leave open must not change the kernel, such as
    numbers that Triton does not specialize, always of the same width.
    """
    # Triton for Intel's GPUs is another package, with a launcher of its own.
    keeps = binds_once and device.type != "xpu" and not _observed()
    with on_device(device):
        if keeps:
            key = key_of(kernel, device, tensors, numbers, num_warps)
            known = _launchers.get(key)
            if known is not None:
                known.run(
                    programs, 1, 1, stream_of(device), known.function, known.metadata,
                    None, None, None, *known.in_order(arguments),
                )  # fmt: skip
                return
        compiled = kernel[(programs,)](**arguments, num_warps=num_warps, **NO_FUSION)
        if keeps:
            if len(_launchers) >= MAX_KNOWN:
                _launchers.clear()
            in_order = operator.itemgetter(*kernel.arg_names)
            metadata = compiled.packed_metadata
            _launchers[key] = Launcher(compiled.run, compiled.function, metadata, in_order)


def stream_of(device: torch.device) -> Any:
    """Its current stream, as Triton calls it. The interpreter has none."""
    if backends.INTERPRETED:
        return None
    return triton.runtime.driver.active.get_current_stream(device.index)


# A stream's kernels run one after the other, so they share a ticket, which is never freed. A graph
# that is being captured may run beside its stream later, and has one for each of its kernels.
_tickets: dict[tuple[torch.device, Any], Tensor] = {}


def ticket_of(input: Tensor) -> Tensor:
    if backends.is_captured(input):
        return input.new_zeros(1, dtype=torch.int64)
    key = input.device, stream_of(input.device)
    ticket = _tickets.get(key)
    if ticket is None:
        ticket = _tickets.setdefault(key, input.new_zeros(1, dtype=torch.int64))
    return ticket


def launch(
    kernel: Any,
    programs: int,
    do: Pass,
    device: torch.device,
    result: Tensor | None,
    *,
    tensors: Collection[Tensor | None],
    numbers: Hashable,
    unreduced: bool,
    divisor: Divisor,
    gradients: tuple[Any, ...],
    num_warps: int,
    **arguments: Any,
) -> Tensor | None:
    """Launches an engine's kernel. tensors, numbers: as start() takes them, for `arguments` and
    `gradients`.

    What a pass does not use is another tensor of its type: one compiled kernel serves them all.
    """
    state, fault = do.forward_state, fault_of(device)
    upstream = do.grad_output if result is None else result
    learned = state if do.forward else do.prediction
    value = loss = partials = ticket = None
    if unreduced:
        value, upstream = result, None
    elif do.forward:
        loss, partials, ticket = result, state.new_empty(2 * programs), ticket_of(state)
    else:
        loss, partials, ticket = upstream, state, fault
    scaling = Scaling(
        known=do.prediction if do.step == FORWARD else state,
        learned=learned,
        grad_output=upstream,
        count=state if divisor.count is None else divisor.count,
    )
    outputs = Outputs(value, gradients, loss, partials, ticket, fault)
    arguments |= {
        "outputs": outputs,
        "scaling": scaling,
        "divisor": divisor.number,
        "step": do.step,
    }
    tensors = (*tensors, value, loss, partials, ticket, fault, *scaling)
    numbers = numbers, divisor.number
    start(kernel, programs, device, arguments, tensors, numbers, num_warps)
    return result


# ---- faults --------------------------------------------------------------------------------------
# The first input of a device that a loss cannot take, written by a kernel into page-locked memory,
# where the host looks whenever it likes: state, what, position, value, classes.

_NONE, _BEING_WRITTEN, _READY = 0, 1, 2
TARGET_CLASS = tl.constexpr(0)
INPUT_OUTSIDE_UNIT = tl.constexpr(1)
TARGET_OUTSIDE_UNIT = tl.constexpr(2)
NEGATIVE_VARIANCE = tl.constexpr(3)
NO_FAULT = tl.constexpr(1 << 62)  # a position behind all others
_faults: dict[torch.device, Tensor] = {}
_states: list[Any] = []  # of all of them, the number that says whether there is a fault


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
        _states[:] = [ctypes.c_int64.from_address(f.data_ptr()) for f in _faults.values()]
    return fault


def raise_faults() -> None:
    """Raises what a kernel has found wrong with its input since the last time, if it is known."""
    if not any(state.value == _READY for state in _states):
        return
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
        number = struct.unpack("<d", struct.pack("<q", value))[0]
        if what == NEGATIVE_VARIANCE.value:
            raise ValueError(
                f"all elements of var should be at least 0, but element {position} in memory order is "
                f"{number:.9g}{when}"
            )
        name = "input" if what == INPUT_OUTSIDE_UNIT.value else "target"
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
    module = torch.get_device_module(device)
    if device.index == module.current_device():
        return nullcontext()
    context: AbstractContextManager[Any] = module.device(device)
    return context


def aligned(tensor: Tensor) -> Tensor:
    """Memory that a caller brought along may begin between two elements: a copy does not."""
    fits = tensor.data_ptr() % tensor.element_size() == 0
    return tensor if fits else tensor.clone(memory_format=torch.preserve_format)


def is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or bool(
        torch.ops.aten.is_non_overlapping_and_dense.default(tensor)
    )


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


def check_shapes(input: Tensor, target: Tensor, *, indices: bool) -> None:
    if not indices and target.shape == input.shape:
        return
    expected = list(input.shape)
    if indices:
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
    check_shapes(input, target, indices=target.dtype is torch.int64)
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
