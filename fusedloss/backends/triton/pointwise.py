"""The pointwise engine: any loss over any operands, in one kernel for every pass.

Fewest bytes for value and gradient: read input, read target, write gradient, 3 N elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import runtime
from .losses import PointwiseLoss
from .primitives import divide
from .runtime import Divisor, Operand, Pass

# Fixed: a program of 4 warps, 8 elements a thread at a time (16 bytes of half precision), whose
# registers leave room for several programs on a multiprocessor.
WARPS = 4
TILE = tl.constexpr(1024)
TILES = tl.constexpr(8)
GROUP = tl.constexpr(4)  # elements of two bytes, added up in the compute type before float64
MAX_DIMS = 8  # of operands that are not all contiguous; those of more are copied


class Sources(NamedTuple):
    """What the kernel reads; None where a call has no such operand."""

    inputs: Any  # a tuple: input, target ...
    weight: Any
    upstream: Any  # the upstream gradient of every element: in a backward of reduction "none"


@triton.jit
def offset_of(at, sizes, strides):
    """Where the element at a linear position lies in memory."""
    if len(strides) == 0:
        return at
    else:
        offset = at.to(tl.int64) * 0
        for d in tl.static_range(len(sizes) - 1, -1, -1):
            outer = at // sizes[d]
            offset += (at - outer * sizes[d]).to(tl.int64) * strides[d]
            at = outer
        return offset


@triton.jit
def load(operand, at, mask, sizes, T: tl.constexpr):
    return tl.load(operand.pointer + offset_of(at, sizes, operand.strides), mask=mask).to(T)


@triton.jit
def store(pointer, x, mask):
    tl.store(pointer, runtime.narrow(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_target(target, at, mask, sizes, CLASS_DIM: tl.constexpr, T: tl.constexpr):
    """Class indices are read as one-hot rows: 1 where the position along CLASS_DIM is the index."""
    if CLASS_DIM < 0:
        return load(target, at, mask, sizes, T)
    else:
        index = load(target, at, mask, sizes, tl.int64)
        for d in tl.static_range(len(sizes) - 1, CLASS_DIM, -1):
            at = at // sizes[d]
        position = at % sizes[CLASS_DIM]
        hot = tl.where(index == position, 1.0, 0.0).to(T)
        return tl.where(is_class_fault(index, sizes[CLASS_DIM]), float("nan"), hot)


@triton.jit
def is_class_fault(index, classes):
    # An ignored index is the lowest of all numbers, and a row of nothing but 0.
    return ((index < 0) | (index >= classes)) & (index != -(1 << 63))


@triton.jit
def is_outside_unit(x):
    """nan is outside."""
    return ((x >= 0.0) & (x <= 1.0)) == 0


@triton.jit
def lie_outside(inputs, DOMAIN: tl.constexpr):
    if DOMAIN == "variance":
        return inputs[2] < 0.0
    else:
        return is_outside_unit(inputs[0]) | is_outside_unit(inputs[1])


@triton.jit
def load_inputs(sources, at, mask, sizes, CLASS_DIM: tl.constexpr, T: tl.constexpr):
    inputs = (load(sources.inputs[0], at, mask, sizes, T),)
    for k in tl.static_range(1, len(sources.inputs)):
        if k == 1:
            x = load_target(sources.inputs[k], at, mask, sizes, CLASS_DIM, T)
        else:
            x = load(sources.inputs[k], at, mask, sizes, T)
        inputs = inputs + (x,)  # type: ignore[assignment]
    return inputs


@triton.jit
def tile(
    at, mask, sources, outputs, sizes, parameters, scale, write,
    LOSS: tl.constexpr, QUOTIENT: tl.constexpr, DOMAIN: tl.constexpr, CLASS_DIM: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Writes what the call wants for some elements; returns the sums of GROUPs of values."""
    inputs = load_inputs(sources, at, mask, sizes, CLASS_DIM, T)
    result = LOSS(*inputs, *parameters)
    v, factor = result[0], scale
    if DOMAIN != "":
        outside = lie_outside(inputs, DOMAIN)
        v = tl.where(outside, float("nan"), v)
        factor = tl.where(outside, float("nan"), factor)
    w = 1.0
    if sources.weight is not None:
        w = load(sources.weight, at, mask, sizes, T)
        v = v * w
    if CLASS_DIM >= 0:
        # The elements of other classes count for nothing, whatever weight they meet.
        v = tl.where(inputs[1] == 0.0, 0.0, v)
    if outputs.value is not None:
        store(outputs.value + at, v, mask)
    # Not in the branch on `write`: Triton lets no variable leave that with another type.
    if sources.upstream is not None:
        w = w * load(sources.upstream, at, mask, sizes, T)
    if write:
        for k in tl.static_range(len(outputs.gradients)):
            if outputs.gradients[k] is not None:
                g = result[1 + k] * w * factor
                if QUOTIENT:
                    g = divide(g, result[2])
                if CLASS_DIM >= 0:
                    g = tl.where(inputs[1] == 0.0, result[1], g)
                store(outputs.gradients[k] + at, g, mask)
    if mask is not None:
        v = tl.where(mask, v, 0.0)
    # Roundings of float32 would add up where many values are equal.
    for k in tl.static_range(len(sources.inputs)):
        if sources.inputs[k].pointer.dtype.element_ty == tl.float32:
            v = v.to(tl.float64)
    return tl.sum(tl.reshape(v, [v.shape[0] // GROUP, GROUP]), 1).to(tl.float64)


@triton.jit
def first_fault(
    sources, at, mask, sizes, DOMAIN: tl.constexpr, CLASS_DIM: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """The position of the first element that a loss cannot take, or NO_FAULT."""
    if CLASS_DIM < 0:
        bad = lie_outside(load_inputs(sources, at, mask, sizes, CLASS_DIM, T), DOMAIN)
    else:
        bad = is_class_fault(load(sources.inputs[1], at, mask, sizes, tl.int64), sizes[CLASS_DIM])
    return tl.min(tl.where(bad & mask, at.to(tl.int64), runtime.NO_FAULT))


@triton.jit
def report_fault(fault, sources, bad, sizes, DOMAIN: tl.constexpr, CLASS_DIM: tl.constexpr):
    if CLASS_DIM >= 0:
        offset = offset_of(bad, sizes, sources.inputs[1].strides)
        index = tl.load(sources.inputs[1].pointer + offset)
        runtime.report_error(fault, runtime.TARGET_CLASS, offset, index, sizes[CLASS_DIM])
    elif DOMAIN == "variance":
        variance = load(sources.inputs[2], bad, None, sizes, tl.float64)
        number = variance.to(tl.int64, bitcast=True)
        runtime.report_error(fault, runtime.NEGATIVE_VARIANCE, bad, number, 0)
    else:
        x = load(sources.inputs[0], bad, None, sizes, tl.float64)
        y = load(sources.inputs[1], bad, None, sizes, tl.float64)
        in_input = is_outside_unit(x)
        what = tl.where(in_input, runtime.INPUT_OUTSIDE_UNIT, runtime.TARGET_OUTSIDE_UNIT)
        number = tl.where(in_input, x, y).to(tl.int64, bitcast=True)
        runtime.report_error(fault, what, bad, number, 0)


@triton.jit(do_not_specialize=["numel", "divisor", "step"])
def pointwise(
    sources, outputs, sizes, numel, parameters, scaling, divisor, step,
    LOSS: tl.constexpr, SLOPE_UNIT: tl.constexpr, QUOTIENT: tl.constexpr, DOMAIN: tl.constexpr,
    CLASS_DIM: tl.constexpr, T: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What is written lies in the order of `sizes`, and so does a source whose strides are ()."""
    UNREDUCED: tl.constexpr = sources.upstream is not None or outputs.value is not None
    write, factor = runtime.begin_backward(scaling, step, UNREDUCED)
    if step >= runtime.IS_BACKWARD:
        if not write:
            return
    else:
        write, factor = runtime.begin_forward(scaling, outputs, divisor, step, UNREDUCED)
    scale = (factor * SLOPE_UNIT).to(T)
    numbers = ()
    for k in tl.static_range(len(parameters)):
        numbers = numbers + (runtime.from_halves(parameters[k]).to(T),)  # type: ignore[assignment]
    first = tl.program_id(0).to(INDEX) * (TILE * TILES)
    at = first + tl.arange(0, TILE)
    total = tl.zeros([TILE // GROUP], tl.float64)
    # Without a mask elements are read 16 bytes at a time, however many there are.
    if first + TILE * TILES <= numel:
        for t in range(TILES):
            total += tile(
                at + t * TILE, None, sources, outputs, sizes, numbers, scale, write,
                LOSS, QUOTIENT, DOMAIN, CLASS_DIM, T,
            )  # fmt: skip
    else:
        for t in range(tl.cdiv(numel - first, TILE)):
            total += tile(
                at + t * TILE, at + t * TILE < numel, sources, outputs, sizes, numbers, scale, write,
                LOSS, QUOTIENT, DOMAIN, CLASS_DIM, T,
            )  # fmt: skip
    if step < runtime.IS_BACKWARD:
        sum = tl.sum(total)
        if not UNREDUCED:
            tl.store(outputs.partials + tl.program_id(0), sum)
            runtime.finish(scaling, outputs, False)
        if DOMAIN != "" or CLASS_DIM >= 0:
            # What a loss cannot take has made the sum nan.
            if sum != sum:
                bad = tl.full((), runtime.NO_FAULT, tl.int64)
                for t in range(TILES):
                    here = at + t * TILE
                    found = first_fault(sources, here, here < numel, sizes, DOMAIN, CLASS_DIM, T)
                    bad = tl.minimum(bad, found)
                if bad < runtime.NO_FAULT:
                    report_fault(outputs.fault, sources, bad, sizes, DOMAIN, CLASS_DIM)


# ---- calls ---------------------------------------------------------------------------------------

_IGNORED = -(1 << 63)  # a class index that is no class, and does not count either


@dataclass
class IterationSpace:
    """The order in which a call visits its elements: the gradient's memory order."""

    sizes: tuple[int, ...]  # outermost first; (): all operands are contiguous
    class_dim: int
    operands: list[Operand | None]  # strides: () where the elements lie in this order


def coalesce_dimensions(tensors: Sequence[Tensor | None], class_dim: int) -> IterationSpace:
    """input, and others of its shape; class_dim >= 0: target is class indices."""
    input = tensors[0]
    assert input is not None
    if class_dim < 0 and all(t is None or t.is_contiguous() for t in tensors):
        return IterationSpace((), -1, [None if t is None else Operand(t, ()) for t in tensors])
    order = list(range(input.dim()))
    if runtime.is_dense(input):
        steps = input.stride()
        order.sort(key=lambda d: -steps[d])
    # For each dimension that is left: its size, and the strides of the tensors.
    sizes: list[int] = []
    strides: list[list[int]] = []
    new_class_dim = -1
    for d in order:
        size = input.shape[d]
        step = [0 if t is None else t.stride(d) for t in tensors]
        if d == class_dim:
            new_class_dim = len(sizes)
        elif size == 1:
            continue
        elif sizes and new_class_dim != len(sizes) - 1:
            # It continues the dimension outside it where every tensor steps evenly over both.
            if strides[-1] == [s * size for s in step]:
                sizes[-1] *= size
                strides[-1] = step
                continue
        sizes.append(size)
        strides.append(step)
    if len(sizes) > MAX_DIMS:
        copies = [None if t is None else t.permute(order).contiguous() for t in tensors]
        return coalesce_dimensions(copies, order.index(class_dim) if class_dim >= 0 else -1)
    in_order = tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes)))
    operands: list[Operand | None] = []
    for i, t in enumerate(tensors):
        steps = tuple(step[i] for step in strides)
        operands.append(None if t is None else Operand(t, () if steps == in_order else steps))
    return IterationSpace(tuple(sizes), new_class_dim, operands)


def empty_loss(input: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    if reduction != 0:
        return input.new_empty((), dtype=dtype)
    return runtime.empty_like(input, dtype)


def run(
    do: Pass,
    loss: PointwiseLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    more: Sequence[Tensor],
    parameters: Sequence[float],
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Forward: returns the loss. Backward: writes what is not right yet of the gradients.

    Gradients lie in memory as ``runtime.empty_like(input)`` does.
    """
    of_classes = loss.mean == "rows" and target.dtype is torch.int64
    runtime.check_shapes(input, target, indices=of_classes)
    class_dim, indices = -1, None
    if of_classes:
        runtime.check_rows(input, target, weight)
        class_dim = runtime.class_dim(input)
        indices = runtime.aligned(target.contiguous())
        # What is wrong must not read as ignored.
        target = indices.clamp_min(_IGNORED + 1).masked_fill_(indices.eq(ignore_index), _IGNORED)
        target = target.unsqueeze(class_dim).expand(input.shape)
    unreduced = reduction == 0
    upstream = do.grad_output if unreduced and not do.forward else None
    shape = input.shape
    read = *(input, target, *more)[: loss.inputs], weight, upstream
    given = [None if t is None else runtime.aligned(t) for t in read]
    tensors = [t if t is None or t.shape == shape else t.expand(shape) for t in given]
    space = coalesce_dimensions(tensors, class_dim)
    *inputs, of_weight, of_upstream = space.operands
    divisor = Divisor()
    if do.forward and reduction == 1:
        divisor = _divisor(loss, input, indices, weight, ignore_index)
    numel, of_program = input.numel(), TILE.value * TILES.value
    no_gradient = all(gradient is None for gradient in do.gradients)
    gradients = (input, *do.gradients[1:]) if no_gradient else do.gradients
    return runtime.launch(
        pointwise,
        max(1, runtime.ceil_divide(numel, of_program)),
        do,
        input.device,
        empty_loss(input, reduction, dtype) if do.forward else None,
        tensors=(*gradients, *[operand and operand.pointer for operand in space.operands]),
        numbers=(
            loss.function.fn,
            loss.slope_unit,
            loss.quotient,
            loss.domain,
            space.sizes,
            *[operand and operand.strides for operand in space.operands],
            numel,
            space.class_dim,
            dtype,
            len(parameters),
        ),
        unreduced=unreduced,
        divisor=divisor,
        gradients=gradients,
        sources=Sources(tuple(inputs), of_weight, of_upstream),
        sizes=space.sizes,
        numel=numel,
        parameters=tuple(map(runtime.halves, parameters)),
        LOSS=loss.function,
        SLOPE_UNIT=loss.slope_unit,
        QUOTIENT=loss.quotient,
        DOMAIN=loss.domain,
        CLASS_DIM=space.class_dim,
        T=tl.float64 if dtype is torch.float64 else tl.float32,
        INDEX=tl.int32 if numel + of_program < 1 << 31 else tl.int64,
        num_warps=WARPS,
    )


def _divisor(
    loss: PointwiseLoss,
    input: Tensor,
    indices: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> Divisor:
    """What a mean divides by."""
    if loss.mean == "weights" and weight is not None:
        return Divisor(runtime.COUNTED.value, weight.sum(dtype=torch.float64))
    if loss.mean != "rows":
        return Divisor(input.numel())
    classes = input.shape[runtime.class_dim(input)]
    if indices is None:
        return Divisor(input.numel() // classes)
    flat = None if weight is None else weight.flatten().contiguous()
    return Divisor.of_classes(indices, flat, classes, ignore_index)
