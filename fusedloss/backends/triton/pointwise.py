"""The pointwise engine: any loss over any operands, in one kernel for every pass.

Fewest bytes for value and gradient: read input, read target, write gradient, 3 N elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import runtime
from .losses import PointwiseLoss
from .runtime import Divisor, Pass
from .words import divide

# Fixed: a program of 4 warps, 8 elements a thread at a time (16 bytes of half precision), whose
# registers leave room for several programs on a multiprocessor.
WARPS, TILE, TILES = 4, 1024, 8
PACKET = tl.constexpr(4)  # elements of two bytes, added up in the compute type before float64
MOST_DIMS = 8  # of operands that are not all contiguous; more are made so


@triton.jit
def place(at, sizes, strides):
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
def fetch(source, at, mask, sizes, T: tl.constexpr):
    pointer, strides = source
    return tl.load(pointer + place(at, sizes, strides), mask=mask).to(T)


@triton.jit
def store(pointer, x, mask):
    tl.store(pointer, runtime.narrow(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def fetch_target(source, at, mask, sizes, CLASS_DIM: tl.constexpr, T: tl.constexpr):
    """Class indices are read as one-hot rows: 1 where the position along CLASS_DIM is the index."""
    if CLASS_DIM < 0:
        return fetch(source, at, mask, sizes, T)
    else:
        index = fetch(source, at, mask, sizes, tl.int64)
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
def tile(
    at, mask, input, target, weight, operands, upstream, value, gradient, target_gradient, sizes,
    parameters, scale, write, step,
    LOSS: tl.constexpr, UNIT_INTERVAL: tl.constexpr, CLASS_DIM: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Some elements: writes what is wanted of them, and gives the sums of PACKETs of values."""
    x = fetch(input, at, mask, sizes, T)
    y = fetch_target(target, at, mask, sizes, CLASS_DIM, T)
    more = ()
    for k in tl.static_range(len(operands)):
        more = more + (fetch(operands[k], at, mask, sizes, T),)  # type: ignore[assignment]
    result = LOSS(x, y, *more, *parameters)
    v, factor = result[0], scale
    if UNIT_INTERVAL:
        outside = is_outside_unit(x) | is_outside_unit(y)
        v = tl.where(outside, float("nan"), v)
        factor = tl.where(outside, float("nan"), factor)
    w = 1.0
    if weight is not None:
        w = fetch(weight, at, mask, sizes, T)
        v = v * w
    if CLASS_DIM >= 0:
        # The elements of other classes count for nothing, whatever weight they meet.
        v = tl.where(y == 0.0, 0.0, v)
    if value is not None:
        store(value + at, v, mask)
    # Not in the branch on `write`: Triton lets no variable leave that with another type.
    if upstream is not None:
        w = w * fetch(upstream, at, mask, sizes, T)
    if write:
        if gradient is not None:
            g = result[1] * w * factor
            if len(result) == 4:
                g = divide(g, result[3])
            if CLASS_DIM >= 0:
                g = tl.where(y == 0.0, result[1], g)
            store(gradient + at, g, mask)
        if target_gradient is not None:
            store(target_gradient + at, result[2] * w * factor, mask)
    if mask is not None:
        v = tl.where(mask, v, 0.0)
    # Roundings of float32 would add up where many values are equal.
    if input[0].dtype.element_ty == tl.float32:
        v = v.to(tl.float64)
    return tl.sum(tl.reshape(v, [v.shape[0] // PACKET, PACKET]), 1).to(tl.float64)


@triton.jit
def first_fault(
    at, mask, input, target, sizes, CLASS_DIM: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """The position of the first element that a loss cannot take, or NO_FAULT."""
    if CLASS_DIM < 0:
        bad = is_outside_unit(fetch(input, at, mask, sizes, T))
        bad = bad | is_outside_unit(fetch(target, at, mask, sizes, T))
    else:
        bad = is_class_fault(fetch(target, at, mask, sizes, tl.int64), sizes[CLASS_DIM])
    return tl.min(tl.where(bad & mask, at.to(tl.int64), runtime.NO_FAULT))


@triton.jit
def tell_fault(bad, input, target, sizes, fault, CLASS_DIM: tl.constexpr):
    if CLASS_DIM >= 0:
        pointer, strides = target
        offset = place(bad, sizes, strides)
        index = tl.load(pointer + offset)
        runtime.report_error(fault, runtime.TARGET_CLASS, offset, index, sizes[CLASS_DIM])
    else:
        x = fetch(input, bad, None, sizes, tl.float64)
        y = fetch(target, bad, None, sizes, tl.float64)
        in_input = is_outside_unit(x)
        what = tl.where(in_input, runtime.INPUT_OUTSIDE_UNIT, runtime.TARGET_OUTSIDE_UNIT)
        number = tl.where(in_input, x, y).to(tl.int64, bitcast=True)
        runtime.report_error(fault, what, bad, number, 0)


@triton.jit(do_not_specialize=["numel", "parts", "divisor", "step"])
def pointwise(
    input, target, weight, operands, upstream, value, gradient, target_gradient, sizes, numel,
    parameters, partials, forward_state, prediction, grad_output, counts, parts, divisor, fault, step,
    LOSS: tl.constexpr, SLOPE_UNIT: tl.constexpr, UNIT_INTERVAL: tl.constexpr,
    CLASS_DIM: tl.constexpr, T: tl.constexpr, INDEX: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Operands are pairs of a pointer and strides, () where they lie in the order of `sizes`, as
    what is written does. upstream (backward), value (forward): of reduction "none" alone."""
    EACH: tl.constexpr = upstream is not None or value is not None
    write, factor, seen = runtime.scaling(
        step, forward_state, grad_output, counts, parts, divisor, EACH
    )
    if step >= runtime.IS_BACKWARD:
        if not EACH:
            if tl.program_id(0) == 0:
                runtime.update_predictor(prediction, seen)
        if not write:
            return
    scale = (factor * SLOPE_UNIT).to(T)
    numbers = ()
    for k in tl.static_range(len(parameters)):
        numbers = numbers + (runtime.from_halves(parameters[k]).to(T),)  # type: ignore[assignment]
    first = tl.program_id(0).to(INDEX) * (TILE * TILES)
    at = first + tl.arange(0, TILE)
    total = tl.zeros([TILE // PACKET], tl.float64)
    # Without a mask elements are read 16 bytes at a time, however many there are.
    if first + TILE * TILES <= numel:
        for t in range(TILES):
            total += tile(
                at + t * TILE, None, input, target, weight, operands, upstream, value, gradient,
                target_gradient, sizes, numbers, scale, write, step, LOSS, UNIT_INTERVAL,
                CLASS_DIM, T,
            )  # fmt: skip
    else:
        for t in range(tl.cdiv(numel - first, TILE)):
            total += tile(
                at + t * TILE, at + t * TILE < numel, input, target, weight, operands, upstream,
                value, gradient, target_gradient, sizes, numbers, scale, write, step, LOSS,
                UNIT_INTERVAL, CLASS_DIM, T,
            )  # fmt: skip
    if step < runtime.IS_BACKWARD:
        sum = tl.sum(total)
        tl.store(partials + tl.program_id(0), sum)
        if UNIT_INTERVAL or CLASS_DIM >= 0:
            # What a loss cannot take has made the sum nan.
            if sum != sum:
                bad = tl.full((), runtime.NO_FAULT, tl.int64)
                for t in range(TILES):
                    here = at + t * TILE
                    found = first_fault(here, here < numel, input, target, sizes, CLASS_DIM, T)
                    bad = tl.minimum(bad, found)
                if bad < runtime.NO_FAULT:
                    tell_fault(bad, input, target, sizes, fault, CLASS_DIM)


# ---- calls ---------------------------------------------------------------------------------------

_IGNORED = -(1 << 63)  # a class index that is no class, and is not to count either
_Source = tuple[Tensor, tuple[int, ...]]


@dataclass
class Space:
    """The order in which a call walks its elements: the gradient's memory order."""

    sizes: tuple[int, ...]  # outermost first; (): all operands are contiguous
    class_dim: int
    sources: list[_Source | None]  # operands, and their strides: () where they are in order


def walk(operands: Sequence[Tensor | None], class_dim: int) -> Space:
    """input, target and others of their shape; class_dim >= 0: target is class indices."""
    input = operands[0]
    assert input is not None
    there = [t for t in operands if t is not None]
    if class_dim < 0 and all(t.is_contiguous() for t in there):
        return Space((), -1, [None if t is None else (t, ()) for t in operands])
    order = list(range(input.dim()))
    if runtime.is_dense(input):
        steps = input.stride()
        order.sort(key=lambda d: -steps[d])
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in there]
    joined_class_dim = -1
    for d in order:
        if input.shape[d] == 1 and d != class_dim:
            continue
        # A dimension continues the one outside it where every operand steps evenly over both.
        joins = (
            bool(sizes)
            and d != class_dim
            and joined_class_dim != len(sizes) - 1
            and all(
                s[-1] == t.stride(d) * input.shape[d] for s, t in zip(strides, there, strict=True)
            )
        )
        if joins:
            sizes[-1] *= input.shape[d]
        else:
            sizes.append(input.shape[d])
        if d == class_dim:
            joined_class_dim = len(sizes) - 1
        for s, t in zip(strides, there, strict=True):
            s[-1 if joins else len(s) :] = [t.stride(d)]
    if len(sizes) > MOST_DIMS:
        copies = [None if t is None else t.permute(order).contiguous() for t in operands]
        return walk(copies, order.index(class_dim) if class_dim >= 0 else -1)
    in_order = [0] * len(sizes)
    step = 1
    for d in reversed(range(len(sizes))):
        in_order[d] = step
        step *= sizes[d]
    kept = [(t, () if s == in_order else tuple(s)) for s, t in zip(strides, there, strict=True)]
    found = iter(kept)
    return Space(
        tuple(sizes), joined_class_dim, [None if t is None else next(found) for t in operands]
    )


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
    operands: Sequence[Tensor],
    parameters: Sequence[float],
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Forward: the loss. Backward: what of the gradients is not right yet is written.

    Gradients lie in memory as ``runtime.empty_like(input)`` does.
    """
    runtime.check_shapes(input, target)
    if target.dtype is torch.int64:
        runtime.check_rows(input, target, weight)
    each = reduction == 0
    indices = runtime.aligned(target.contiguous()) if target.dtype is torch.int64 else None
    class_dim = -1
    if indices is not None:
        class_dim = runtime.class_dim(input)
        # What is wrong must not read as ignored.
        target = indices.clamp_min(_IGNORED + 1).masked_fill_(indices.eq(ignore_index), _IGNORED)
        target = target.unsqueeze(class_dim).expand(input.shape)
    result = empty_loss(input, reduction, dtype) if do.forward else None
    upstream = None if do.forward or not each else do.grad_output
    space = walk(
        [
            None if t is None else runtime.aligned(t).expand(input.shape)
            for t in (input, target, weight, upstream, *operands)
        ],
        class_dim,
    )
    divisor = Divisor()
    if do.forward and reduction == 1:
        divisor = _divisor(loss, input, indices, weight, ignore_index)
    numel = input.numel()
    programs = triton.cdiv(numel, TILE * TILES)
    partials = do.forward_state.new_empty(programs) if do.forward else do.forward_state
    # What a pass does not use is another tensor of its type: one compiled kernel serves them all.
    arguments = {
        "forward_state": do.forward_state,
        "step": do.step,
        **divisor.arguments(do.forward_state),
    }
    with runtime.on_device(input):
        pointwise[(programs,)](
            *space.sources[:3],
            operands=tuple(space.sources[4:]),
            upstream=space.sources[3],
            value=result if each else None,
            gradient=do.gradient if do.writes else input,
            target_gradient=do.target_gradient,
            sizes=space.sizes,
            numel=numel,
            parameters=tuple(map(runtime.halves, parameters)),
            partials=partials,
            prediction=do.forward_state if do.prediction is None else do.prediction,
            grad_output=do.grad_output if result is None else result,
            fault=runtime.fault_of(input.device),
            LOSS=loss.function,
            SLOPE_UNIT=loss.slope_unit,
            UNIT_INTERVAL=loss.unit_interval,
            CLASS_DIM=space.class_dim,
            T=tl.float64 if dtype is torch.float64 else tl.float32,
            INDEX=tl.int32 if numel + TILE * TILES < 1 << 31 else tl.int64,
            TILE=TILE,
            TILES=TILES,
            num_warps=WARPS,
            **runtime.NO_FUSION,
            **arguments,
        )
        if result is not None and not each:
            runtime.finish[(1,)](
                partials, programs, result, **arguments,
                NAN_OF_NOTHING=False, BLOCK=runtime.FINISH_BLOCK, **runtime.NO_FUSION,
            )  # fmt: skip
    return result


def _divisor(
    loss: PointwiseLoss,
    input: Tensor,
    indices: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> Divisor:
    """What a mean divides by."""
    if loss.mean == "weights" and weight is not None:
        return Divisor(counts=weight.sum(dtype=torch.float64).view(1))
    if loss.mean != "rows":
        return Divisor(input.numel())
    classes = input.shape[runtime.class_dim(input)]
    if indices is None:
        return Divisor(input.numel() // classes)
    flat = None if weight is None else weight.flatten().contiguous()
    return Divisor.of_classes(indices, flat, classes, ignore_index)
