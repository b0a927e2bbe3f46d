"""The pointwise engine: any loss over any operands, in one kernel for every pass.

Fewest bytes for value and gradient: read input, read target, write gradient, 3 N elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .losses import POINTWISE, PointwiseLoss

WARPS = 4
PACKETS = 2  # of 16 bytes, of each operand, in flight a thread
TILES = 8  # a program
PACKET = tl.constexpr(4)  # elements added up in the compute type, before float64
FINISH_BLOCK = 1024
MOST_DIMS = 8  # of operands that are not all contiguous; more are made so

NO_FAULT = tl.constexpr(1 << 62)


@triton.jit
def place(at, sizes, strides):
    """Where the element at a linear position lies in memory."""
    if len(strides) == 0:
        return at
    else:
        offset = at.to(tl.int64) * 0
        for i in tl.static_range(len(sizes)):
            d: tl.constexpr = len(sizes) - 1 - i
            outer = at // sizes[d]
            offset += (at - outer * sizes[d]).to(tl.int64) * strides[d]
            at = outer
        return offset


@triton.jit
def fetch(source, at, mask, sizes, T: tl.constexpr):
    pointer, strides = source
    return tl.load(pointer + place(at, sizes, strides), mask=mask).to(T)


@triton.jit
def fetch_target(source, at, mask, sizes, CLASS_DIM: tl.constexpr, T: tl.constexpr):
    """Class indices are read as one-hot rows: 1 where the position along CLASS_DIM is the index."""
    if CLASS_DIM < 0:
        return fetch(source, at, mask, sizes, T)
    else:
        index = fetch(source, at, mask, sizes, tl.int64)
        for i in tl.static_range(len(sizes) - 1 - CLASS_DIM):
            at = at // sizes[len(sizes) - 1 - i]
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
    at, mask, input, target, weight, pos_weight, upstream, value, gradient, sizes,
    parameter, scale, write, step,
    LOSS: tl.constexpr, UNIT_INTERVAL: tl.constexpr, CLASS_DIM: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Some elements: writes what is wanted of them, and gives the sums of PACKETs of values."""
    x = fetch(input, at, mask, sizes, T)
    y = fetch_target(target, at, mask, sizes, CLASS_DIM, T)
    p = parameter
    if pos_weight is not None:
        p = fetch(pos_weight, at, mask, sizes, T)
    v, slope = LOSS(x, y, p, parameter)
    if UNIT_INTERVAL:
        outside = is_outside_unit(x) | is_outside_unit(y)
        v = tl.where(outside, float("nan"), v)
        slope = tl.where(outside, float("nan"), slope)
    if weight is not None:
        w = fetch(weight, at, mask, sizes, T)
        v = v * w
        slope = slope * w
    if value is not None:
        if step == 0:
            tl.store(value + at, common.narrow(v, value.dtype.element_ty), mask=mask)
    if write:
        g = slope
        if upstream is not None:
            g = g * fetch(upstream, at, mask, sizes, T)
        tl.store(gradient + at, common.narrow(g * scale, gradient.dtype.element_ty), mask=mask)
    if mask is not None:
        v = tl.where(mask, v, 0.0)
    return tl.sum(tl.reshape(v, [v.shape[0] // PACKET, PACKET]), 1).to(tl.float64)


@triton.jit
def tell_first(at, mask, input, target, sizes, fault, first, CLASS_DIM: tl.constexpr,
               T: tl.constexpr):  # fmt: skip
    """Looks for the first element that a loss cannot take, unless one is found already."""
    if CLASS_DIM < 0:
        bad = is_outside_unit(fetch(input, at, mask, sizes, T))
        bad = bad | is_outside_unit(fetch(target, at, mask, sizes, T))
    else:
        bad = is_class_fault(fetch(target, at, mask, sizes, tl.int64), sizes[CLASS_DIM])
    return tl.minimum(first, tl.min(tl.where(bad & mask, at.to(tl.int64), NO_FAULT)))


@triton.jit(do_not_specialize=["parameter", "parts", "divisor", "step"])
def pointwise(
    input, target, weight, pos_weight, upstream, value, gradient, sizes, numel,
    parameter: tl.int64, partials, scales, prediction, grad_output, counts, parts, divisor,
    fault, step,
    LOSS: tl.constexpr, UNIT_INTERVAL: tl.constexpr, CLASS_DIM: tl.constexpr, T: tl.constexpr,
    INDEX: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Operands are pairs of a pointer and strides, () where they lie in the order of `sizes`, as
    value and gradient do. upstream, value: reduction "none" alone."""
    write, factor, seen = common.scaling(
        step, scales, grad_output, counts, parts, divisor, upstream is not None
    )
    if step != 0:
        if upstream is None:
            if tl.program_id(0) == 0:
                common.teach(prediction, seen)
        if not write:
            return
    scale = factor.to(T)
    number = common.from_bits(parameter).to(T)
    first = tl.program_id(0).to(INDEX) * (TILE * TILES)
    at = first + tl.arange(0, TILE)
    total = tl.zeros([TILE // PACKET], tl.float64)
    # Without a mask elements are read 16 bytes at a time, however many there are.
    if first + TILE * TILES <= numel:
        for t in range(TILES):
            total += tile(
                at + t * TILE, None, input, target, weight, pos_weight, upstream, value, gradient,
                sizes, number, scale, write, step, LOSS, UNIT_INTERVAL, CLASS_DIM, T,
            )  # fmt: skip
    else:
        for t in range(tl.cdiv(numel - first, TILE)):
            total += tile(
                at + t * TILE, at + t * TILE < numel, input, target, weight, pos_weight, upstream,
                value, gradient, sizes, number, scale, write, step, LOSS, UNIT_INTERVAL, CLASS_DIM,
                T,
            )  # fmt: skip
    if step == 0:
        sum = tl.sum(total)
        tl.store(partials + tl.program_id(0), sum)
        if UNIT_INTERVAL or CLASS_DIM >= 0:
            # What a loss cannot take has made the sum nan.
            if sum != sum:
                bad = tl.full((), NO_FAULT, tl.int64)
                for t in range(TILES):
                    here = at + t * TILE
                    bad = tell_first(
                        here, here < numel, input, target, sizes, fault, bad, CLASS_DIM, T
                    )
                if bad < NO_FAULT:
                    if CLASS_DIM >= 0:
                        pointer, strides = target
                        offset = place(bad, sizes, strides)
                        index = tl.load(pointer + offset)
                        common.tell(
                            fault, common.TARGET_CLASS, offset, index, sizes[CLASS_DIM]
                        )
                    else:
                        x = fetch(input, bad, None, sizes, tl.float64)
                        y = fetch(target, bad, None, sizes, tl.float64)
                        in_input = is_outside_unit(x)
                        what = tl.where(
                            in_input, common.INPUT_OUTSIDE_UNIT, common.TARGET_OUTSIDE_UNIT
                        )
                        number_bits = tl.where(in_input, x, y).to(tl.int64, bitcast=True)
                        common.tell(fault, what, bad, number_bits, 0)


# ---- calls ---------------------------------------------------------------------------------------

_IGNORED = -(1 << 63)  # a class index that is no class, and is not to count either


@dataclass
class Space:
    """The order in which a call walks its elements: the gradient's memory order."""

    sizes: tuple[int, ...]  # outermost first; (): all operands are contiguous
    class_dim: int
    operands: list[Tensor | None]
    strides: list[tuple[int, ...]]

    def source(self, k: int) -> tuple[Tensor, tuple[int, ...]] | None:
        operand = self.operands[k]
        return None if operand is None else (operand, self.strides[k])


def walk(input: Tensor, others: Sequence[Tensor | None], class_dim: int) -> Space:
    """input and operands of its shape; class_dim >= 0: the first of them is class indices."""
    operands = [input, *others]
    there = [k for k, operand in enumerate(operands) if operand is not None]
    if class_dim < 0 and all(operands[k].is_contiguous() for k in there):  # type: ignore[union-attr]
        return Space((), -1, operands, [()] * len(operands))
    order = list(range(input.dim()))
    if common.is_dense(input):
        order.sort(key=lambda d: -input.stride(d))
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    joined_class_dim = -1
    for d in order:
        if input.shape[d] == 1 and d != class_dim:
            continue
        steps = {k: operands[k].stride(d) for k in there}  # type: ignore[union-attr]
        # A dimension continues the one outside it where every operand steps evenly over both.
        joins = (
            bool(sizes)
            and class_dim < 0
            and all(strides[k][-1] == steps[k] * input.shape[d] for k in there)
        )
        if joins:
            sizes[-1] *= input.shape[d]
        else:
            sizes.append(input.shape[d])
        if d == class_dim:
            joined_class_dim = len(sizes) - 1
        for k in there:
            strides[k][-1 if joins else len(strides[k]) :] = [steps[k]]
    if len(sizes) > MOST_DIMS:
        if class_dim >= 0:
            raise RuntimeError(f"fusedloss: class indices of {len(sizes)} dimensions")
        copies = [None if t is None else t.permute(order).contiguous() for t in operands]
        return Space((), -1, copies, [()] * len(operands))
    in_order = [0] * len(sizes)
    step = 1
    for d in reversed(range(len(sizes))):
        in_order[d] = step
        step *= sizes[d]
    kept = [() if s == in_order else tuple(s) for s in strides]
    if class_dim >= 0:
        kept[1] = tuple(strides[1])
    return Space(tuple(sizes), joined_class_dim, operands, kept)


def empty_loss(input: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    if reduction != 0:
        return input.new_empty((), dtype=dtype)
    return common.empty_like(input, dtype)


def run(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    parameter: float,
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
    *,
    gradient: Tensor | None,
    scales: Tensor,
    prediction: Tensor,
    grad_output: Tensor | None = None,
    fresh: bool = False,
) -> Tensor | None:
    """Forward, where there is no grad_output: the loss, and the gradient if wanted and predicted.
    Else backward: makes the gradient that of grad_output."""
    common.check_shapes(input, target)
    what: PointwiseLoss = POINTWISE[loss]
    each, forward = reduction == 0, grad_output is None
    indices = common.aligned(target.contiguous()) if target.dtype is torch.int64 else None
    class_dim = -1
    if indices is not None:
        class_dim = common.class_dim(input)
        target = indices.masked_fill(indices.eq(ignore_index), _IGNORED)
        target = target.unsqueeze(class_dim).expand(input.shape)
    result = empty_loss(input, reduction, dtype) if forward else None
    upstream = (result if forward else grad_output) if each else None
    others = (
        None if t is None else common.aligned(t).expand(input.shape)
        for t in (target, weight, pos_weight, None if forward else upstream)
    )
    space = walk(common.aligned(input), tuple(others), class_dim)
    counts, divisor = None, 1
    if forward and reduction == 1:
        counts, divisor = _divisor(what, input, indices, weight, ignore_index)
    numel = input.numel()
    block = 16 // input.element_size() * PACKETS * WARPS * 32
    programs = triton.cdiv(numel, block * TILES)
    partials = scales if not forward else scales.new_empty(programs)
    arguments: dict[str, Any] = {
        "scales": scales,
        "counts": scales if counts is None else counts,
        "divisor": divisor,
        "parts": 0 if counts is None else counts.numel(),
    }
    with common.on_device(input):
        pointwise[(programs,)](
            *(space.source(k) for k in range(4)),
            upstream=(result, ()) if each and forward else space.source(4),
            value=(grad_output if result is None else result) if each else None,
            # Without a wish for the gradient nothing is predicted, and so nothing written.
            gradient=input if gradient is None else gradient,
            sizes=space.sizes,
            numel=numel,
            parameter=common.bits(parameter),
            partials=partials,
            prediction=prediction,
            grad_output=result if forward else grad_output,
            fault=common.fault_of(input.device),
            step=common.FORWARD if forward else common.BACKWARD + fresh,
            LOSS=what.function,
            UNIT_INTERVAL=what.unit_interval,
            CLASS_DIM=space.class_dim,
            T=tl.float64 if dtype is torch.float64 else tl.float32,
            INDEX=tl.int32 if numel + block * TILES < 1 << 31 else tl.int64,
            TILE=block,
            TILES=TILES,
            num_warps=WARPS,
            **common.NO_FUSION,
            **arguments,
        )
        if forward and not each:
            common.finish[(1,)](
                partials, programs, result, **arguments,
                NAN_OF_NOTHING=False, BLOCK=FINISH_BLOCK, **common.NO_FUSION,
            )  # fmt: skip
    return result


def _divisor(
    what: PointwiseLoss,
    input: Tensor,
    indices: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor | None, int]:
    """What a mean divides by: the sum of the first, or the second."""
    if what.mean == "weights" and weight is not None:
        return weight.sum(dtype=torch.float64), 1
    if what.mean != "rows":
        return None, input.numel()
    classes = input.shape[common.class_dim(input)]
    if indices is None:
        return None, input.numel() // classes
    flat = None if weight is None else weight.flatten().contiguous()
    return common.sum_class_weights(indices, flat, classes, ignore_index), 1
