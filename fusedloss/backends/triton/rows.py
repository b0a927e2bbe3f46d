"""The cross-entropy engine: a program has a tile of rows by classes, in one kernel for every pass.

Rows that fit a tile whole are read once and stay in registers until their gradient leaves: 2 N
elements. Longer ones, and those whose classes lie apart, go by in tiles twice, the second time out
of the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import losses, runtime, words
from .runtime import Divisor, Pass

TILE = 4096  # elements of a tile of several rows
MOST_WHOLE = 32768  # bytes of a row that one tile holds
LONG_TILE = 8192  # classes of a row that does not fit
APART_CLASSES = 32  # of a tile, where the classes of a row lie apart
LANES = 16  # elements a thread has of a tile


@triton.jit
def load_logits(rows, cols, exists, classes, stride, T: tl.constexpr):
    inside = exists[:, None] & (cols < classes)[None, :]
    at = rows[:, None] + (cols * stride)[None, :]
    return tl.load(at, mask=inside, other=float("-inf")).to(T)


@triton.jit
def share(
    y_rows, weight, cols, exists, classes, stride, keep, spread, SOFT: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """q of every class of a tile, for the dot and for a gradient element; 0 outside."""
    there = cols < classes
    inside = exists[:, None] & there[None, :]
    if SOFT:
        y = tl.load(y_rows[:, None] + (cols * stride)[None, :], mask=inside, other=0.0).to(T)
        q = y * keep + spread
    else:
        q = tl.full([1, 1], 1.0, T)
    if weight is not None:
        q = q * tl.load(weight + cols, mask=there, other=0.0).to(T)[None, :]
    return tl.where(inside, q, 0.0)


@triton.jit
def add_up(
    x, cols, target, classes, y_rows, weight, exists, y_stride, keep, spread,
    SOFT: tl.constexpr, SMOOTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """max, sum, dot and mass of a tile's rows; the target's own logit is not in max and sum."""
    others = x
    if not SOFT:
        others = tl.where(cols[None, :] == target[:, None], float("-inf"), x)
    max = tl.max(others, 1)
    top = losses.finite_max(max)[:, None]
    e = words.exp_nonpositive(others - top)
    if SOFT or SMOOTH:
        # More than the target counts: the loss of a row that is sure of another class needs the
        # digits of what the others, small beside it, add up to.
        e = e.to(tl.float64)
    sum = tl.sum(e, 1)
    dot = tl.zeros_like(max)
    mass = tl.zeros_like(max)
    if SOFT or SMOOTH:
        q = share(y_rows, weight, cols, exists, classes, y_stride, keep, spread, SOFT, T)
        inside = exists[:, None] & (cols < classes)[None, :]
        dot = tl.sum(tl.where(inside, q * (x - top), 0.0), 1)
        mass = tl.sum(q, 1)
    return max, sum, dot, mass


@triton.jit
def write_gradient(
    x, rows, cols, stride, max, factor, at_target, scale, rest, target, live, classes,
    y_rows, weight, exists, y_stride, keep, spread,
    SOFT: tl.constexpr, SMOOTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    g = words.exp_nonpositive(x - max[:, None]) * factor[:, None]
    if SOFT or SMOOTH:
        q = share(y_rows, weight, cols, exists, classes, y_stride, keep, spread, SOFT, T)
        g = g - q * scale[:, None]
    if not SOFT:
        g = tl.where(cols[None, :] == target[:, None], at_target[:, None], g)
        g = tl.where(live[:, None], g, rest[:, None])
    inside = exists[:, None] & (cols < classes)[None, :]
    tl.store(
        rows[:, None] + (cols * stride)[None, :],
        runtime.narrow(g, rows.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=["rows", "class_units", "ignore_index", "parts", "divisor", "step"])
def cross_entropy(
    input, target, weight, weight_sum, upstream, value, gradient,
    rows, class_units, inner, input_strides, target_strides, gradient_strides,
    ignore_index, label_smoothing, partials, forward_state, prediction, grad_output, counts,
    parts, divisor, fault, step,
    T: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr, WHOLE: tl.constexpr,
    UNIT: tl.constexpr, CLASS_INDEX: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Rows are the vectors along the middle one of three dimensions, outer, classes and inner.
    upstream (backward), value (forward): of reduction "none" alone. UNIT: divides what strides count
    and how many classes there are, so that Triton knows it."""
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
    classes = class_units * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    outer, behind = row // inner, row % inner
    x_rows = input + (outer * input_strides[0] + behind * input_strides[2]) * UNIT
    x_stride = input_strides[1]

    # The target of a row: -1 where there is none, and then its loss and gradient are `rest`.
    live = exists
    faulty = exists & (row < 0)
    index = row * 0 - 1
    y_rows = x_rows
    y_stride = x_stride
    if SOFT:
        y_rows = target + outer * target_strides[0] + behind * target_strides[2]
        y_stride = target_strides[1]
    else:
        given = tl.load(target + row, mask=exists, other=ignore_index)
        inside = (given >= 0) & (given < classes)
        ignored = given == ignore_index
        live = exists & inside & (ignored == 0)
        faulty = exists & (inside == 0) & (ignored == 0)
        index = tl.where(live, given, -1)
    at = index.to(CLASS_INDEX)
    rest = tl.where(faulty, float("nan"), 0.0).to(T)

    smoothing = runtime.from_halves(label_smoothing)
    weights = smoothing * 0.0 + classes
    if weight_sum is not None:
        weights = tl.load(weight_sum)
    spread = (smoothing / classes).to(T)
    keep = (1.0 - smoothing).to(T)

    cols = tl.arange(0, CLASSES).to(CLASS_INDEX)
    if WHOLE:
        x = load_logits(x_rows, cols, exists, classes, x_stride, T)
        max, sum, dot, mass = add_up(
            x, cols, at, classes, y_rows, weight, exists, y_stride, keep, spread, SOFT, SMOOTH, T
        )
    else:
        max = tl.full([ROWS], float("-inf"), T)
        sum = tl.zeros([ROWS], T)
        if SOFT or SMOOTH:
            sum = sum.to(tl.float64)
        dot = tl.zeros([ROWS], T)
        mass = tl.zeros([ROWS], T)
        for begin in range(0, classes, CLASSES):
            here = begin + cols
            x = load_logits(x_rows, here, exists, classes, x_stride, T)
            m, s, d, q = add_up(
                x, here, at, classes, y_rows, weight, exists, y_stride, keep, spread,
                SOFT, SMOOTH, T,
            )  # fmt: skip
            max, sum, dot, mass = losses.merge(max, sum, dot, mass, m, s, d, q)

    row_scale = tl.full([ROWS], 1.0, tl.float64) * factor
    if upstream is not None:
        row_scale = row_scale * tl.load(upstream + row, mask=exists, other=0.0).to(tl.float64)
    scale = row_scale.to(T)
    if SOFT:
        loss, row_factor = losses.soft_row(sum, dot, mass, scale)
        at_target = scale
    else:
        logit = tl.load(x_rows + index * x_stride, mask=live, other=0.0).to(T)
        top = tl.maximum(max, logit)
        sum, dot = losses.rescale(top, max, sum, dot, mass)
        max = top
        own = tl.full([ROWS], 1.0, T)
        if weight is not None:
            own = tl.load(weight + index, mask=live, other=0.0).to(T)
        loss, row_factor, at_target = losses.hard_row(
            max, sum, dot, logit, own, scale, keep, spread, weights.to(T), SMOOTH
        )
        loss = tl.where(live, loss, rest)
        scale = spread * scale
        # In a backward pass too: what a target has become leads to memory.
        bad = tl.min(tl.where(faulty, row, runtime.NO_FAULT))
        if bad < runtime.NO_FAULT:
            runtime.report_error(fault, runtime.TARGET_CLASS, bad, tl.load(target + bad), classes)

    if step < runtime.IS_BACKWARD:
        if value is not None:
            tl.store(value + row, runtime.narrow(loss, value.dtype.element_ty), mask=exists)
        tl.store(partials + tl.program_id(0), tl.sum(tl.where(exists, loss, 0.0).to(tl.float64)))
    if write:
        g_rows = gradient + (outer * gradient_strides[0] + behind * gradient_strides[2]) * UNIT
        if WHOLE:
            write_gradient(
                x, g_rows, cols, gradient_strides[1], max, row_factor, at_target, scale, rest, at,
                live, classes, y_rows, weight, exists, y_stride, keep, spread, SOFT, SMOOTH, T,
            )  # fmt: skip
        else:
            for begin in range(0, classes, CLASSES):
                here = begin + cols
                x = load_logits(x_rows, here, exists, classes, x_stride, T)
                write_gradient(
                    x, g_rows, here, gradient_strides[1], max, row_factor, at_target, scale, rest,
                    at, live, classes, y_rows, weight, exists, y_stride, keep, spread,
                    SOFT, SMOOTH, T,
                )  # fmt: skip


# ---- calls ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How rows are laid over programs."""

    rows: int  # of a tile
    classes: int
    whole: bool  # a tile has all classes of its rows
    warps: int


def plan_for(classes: int, rows: int, element_size: int, side_by_side: bool) -> Plan:
    width = triton.next_power_of_2(classes)
    whole = width * element_size <= MOST_WHOLE if side_by_side else width <= APART_CLASSES
    if not whole:
        width = LONG_TILE if side_by_side else APART_CLASSES
    height = min(max(1, TILE // width), triton.next_power_of_2(rows))
    warps = triton.next_power_of_2(triton.cdiv(height * width, 32 * LANES))
    return Plan(height, width, whole, min(max(warps, 1), 16))


def as_rows(tensor: Tensor) -> Tensor:
    """(outer, classes, inner), without a copy where the inner dimensions step evenly."""
    if tensor.dim() == 1:
        return tensor.view(1, -1, 1)
    return tensor.unsqueeze(2) if tensor.dim() == 2 else tensor.flatten(2)


def steps_of(tensor: Tensor) -> tuple[int, int, int]:
    """Strides, 0 where there is nowhere to go."""
    outer, classes, inner = (
        step if size > 1 else 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return outer, classes, inner


def empty_loss(input: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    shape = list(input.shape) if reduction == 0 else []
    if shape:
        del shape[runtime.class_dim(input)]
    return input.new_empty(shape, dtype=dtype)


def run(
    do: Pass,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """As pointwise.run()."""
    runtime.check_rows(input, target, weight)
    each = reduction == 0
    classes = input.shape[runtime.class_dim(input)]
    if weight is not None:
        weight = runtime.aligned(weight.contiguous())
    soft, smooth = target.dtype is not torch.int64, label_smoothing != 0
    x = as_rows(runtime.aligned(input))
    y = as_rows(runtime.aligned(target)) if soft else runtime.aligned(target.contiguous())
    g = x if do.gradient is None else as_rows(do.gradient)
    if do.gradient is not None and g.data_ptr() != do.gradient.data_ptr():
        raise RuntimeError("fusedloss: the dimensions of input behind the classes must be joinable")
    rows, inner = x.shape[0] * x.shape[2], x.shape[2]
    result = empty_loss(input, reduction, dtype) if do.forward else None
    upstream = None
    if each and do.grad_output is not None:
        upstream = runtime.aligned(do.grad_output.contiguous())
    divisor = Divisor()
    if do.forward and reduction == 1:
        divisor = Divisor(rows)
        if not soft:
            divisor = Divisor.of_classes(y, weight, classes, ignore_index)

    x_steps, y_steps, g_steps = steps_of(x), steps_of(y) if soft else (0, 0, 0), steps_of(g)
    side_by_side = x_steps[1] <= 1
    # What a row begins at a multiple of decides how wide its accesses are.
    unit = 1
    if side_by_side:
        unit = math.gcd(16, classes, x_steps[0], x_steps[2], g_steps[0], g_steps[2])
    plan = plan_for(classes, rows, input.element_size(), side_by_side)
    programs = triton.cdiv(rows, plan.rows)
    partials = do.forward_state.new_empty(programs) if do.forward else do.forward_state
    far = (classes + plan.classes) * max(1, x_steps[1], y_steps[1], g_steps[1])
    arguments = {
        "forward_state": do.forward_state,
        "step": do.step,
        **divisor.arguments(do.forward_state),
    }

    def in_units(outer: int, classes: int, inner: int) -> tuple[int, int, int]:
        return outer // unit, classes, inner // unit

    with runtime.on_device(input):
        cross_entropy[(programs,)](
            x,
            y,
            weight,
            weight.sum(dtype=torch.float64) if weight is not None and smooth else None,
            upstream=upstream,
            value=result if each else None,
            gradient=g,
            rows=rows,
            class_units=classes // unit,
            inner=inner,
            input_strides=in_units(*x_steps),
            target_strides=y_steps,
            gradient_strides=in_units(*g_steps),
            ignore_index=ignore_index,
            label_smoothing=runtime.halves(label_smoothing),
            partials=partials,
            prediction=do.forward_state if do.prediction is None else do.prediction,
            grad_output=do.grad_output if result is None else result,
            fault=runtime.fault_of(input.device),
            T=tl.float64 if dtype is torch.float64 else tl.float32,
            SOFT=soft,
            SMOOTH=smooth,
            WHOLE=plan.whole,
            UNIT=unit,
            CLASS_INDEX=tl.int32 if far < 1 << 31 else tl.int64,
            ROWS=plan.rows,
            CLASSES=plan.classes,
            num_warps=plan.warps,
            **runtime.NO_FUSION,
            **arguments,
        )
        if result is not None and not each:
            runtime.finish[(1,)](
                partials, programs, result, **arguments,
                NAN_OF_NOTHING=True, BLOCK=runtime.FINISH_BLOCK, **runtime.NO_FUSION,
            )  # fmt: skip
    return result
