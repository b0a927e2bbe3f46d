"""The cross-entropy engine: a program has a tile of rows by classes, in one kernel for every pass.

Rows that fit a tile whole are read once and stay in registers until their gradient leaves: 2 N
elements. Longer ones, and those whose classes lie apart, go by in tiles twice, the second time out
of the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import losses, runtime
from .runtime import Divisor, Operand, Pass

TILE = 4096  # elements of a tile of several rows
MAX_WHOLE_BYTES = 32768  # of a row that one tile holds
LONG_TILE = 8192  # classes of a tile of a longer row
STRIDED_CLASSES = 32  # of a tile, where the classes of a row lie apart
ELEMENTS_PER_THREAD = 16


class Rows(NamedTuple):
    """The rows of a program: each is a block of them, or the same for all."""

    exists: Any
    classes: Any
    logits: Any  # an Operand: the first class of each row, and the stride to the next
    probabilities: Any  # for class probabilities, likewise
    target: Any  # for class indices: the target class, -1 where it does not count
    uncounted: Any  # the loss and gradient of a row whose target does not count
    weight: Any  # of the classes
    smoothing: Any


class Smoothing(NamedTuple):
    confidence: Any  # 1 - label_smoothing
    eps_per_class: Any  # label_smoothing / classes
    weight_sum: Any  # of the classes' weights


# ---- tiles ---------------------------------------------------------------------------------------


@triton.jit
def classes_of(operand, row, inner, UNIT: tl.constexpr):
    """The rows' first classes, and the stride to the next."""
    strides = operand.strides
    offset = row // inner * strides[0] + row % inner * strides[2]
    return Operand(operand.pointer + offset * UNIT, strides[1])


@triton.jit
def elements(classes, cols):
    return classes.pointer[:, None] + (cols * classes.strides)[None, :]


@triton.jit
def load_logits(rows, cols, T: tl.constexpr):
    inside = rows.exists[:, None] & (cols < rows.classes)[None, :]
    return tl.load(elements(rows.logits, cols), mask=inside, other=float("-inf")).to(T)


@triton.jit
def target_shares(rows, cols, T: tl.constexpr):
    """q of every element of a tile; 0 outside."""
    real = cols < rows.classes
    inside = rows.exists[:, None] & real[None, :]
    if rows.probabilities is None:
        q = tl.full([1, 1], 1.0, T)
    else:
        y = tl.load(elements(rows.probabilities, cols), mask=inside, other=0.0).to(T)
        q = y * rows.smoothing.confidence + rows.smoothing.eps_per_class
    if rows.weight is not None:
        q = q * tl.load(rows.weight + cols, mask=real, other=0.0).to(T)[None, :]
    return tl.where(inside, q, 0.0)


@triton.jit
def reduce_tile(
    rows, x, cols, SUMS_TARGETS: tl.constexpr, NARROW: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    others = x
    if rows.probabilities is None:
        others = tl.where(cols[None, :] == rows.target[:, None], float("-inf"), x)
    if SUMS_TARGETS:
        inside = rows.exists[:, None] & (cols < rows.classes)[None, :]
        return losses.reduce(x, others, target_shares(rows, cols, T), inside, NARROW)
    else:
        return losses.reduce(x, others, None, None, NARROW)


@triton.jit
def write_gradient(output, rows, e, cols, slope, SUMS_TARGETS: tl.constexpr, T: tl.constexpr):
    if SUMS_TARGETS:
        g = losses.gradient(slope, e, target_shares(rows, cols, T))
    else:
        g = losses.gradient(slope, e, None)
    if rows.probabilities is None:
        g = tl.where(cols[None, :] == rows.target[:, None], slope.target_gradient[:, None], g)
        g = tl.where((rows.target >= 0)[:, None], g, rows.uncounted[:, None])
    inside = rows.exists[:, None] & (cols < rows.classes)[None, :]
    D: tl.constexpr = output.pointer.dtype.element_ty
    tl.store(elements(output, cols), runtime.narrow(g, D), mask=inside)


# ---- rows ----------------------------------------------------------------------------------------


@triton.jit
def load_smoothing(label_smoothing, weight_sum, classes, T: tl.constexpr):
    label_smoothing = runtime.from_halves(label_smoothing)
    total = label_smoothing * 0.0 + classes
    if weight_sum is not None:
        total = tl.load(weight_sum)
    eps_per_class = label_smoothing / classes
    return Smoothing((1.0 - label_smoothing).to(T), eps_per_class.to(T), total.to(T))


@triton.jit
def load_targets(target, row, exists, classes, ignore_index):
    """Class indices: -1 for those that do not count, and which of them are out of range."""
    index = tl.load(target + row, mask=exists, other=ignore_index)
    valid = (index >= 0) & (index < classes)
    used = exists & (index != ignore_index)
    return tl.where(used & valid, index, -1), used & (valid == 0)


@triton.jit
def finish_rows(rows, state, scale, SMOOTH: tl.constexpr, T: tl.constexpr):
    """The loss and slope of complete rows."""
    if rows.probabilities is not None:
        return losses.finish_probabilities(state, scale)
    else:
        counts = rows.target >= 0
        logits = rows.logits.pointer + rows.target * rows.logits.strides
        logit = tl.load(logits, mask=counts, other=0.0).to(T)
        weight = tl.full(logit.shape, 1.0, T)
        if rows.weight is not None:
            weight = tl.load(rows.weight + rows.target, mask=counts, other=0.0).to(T)
        loss, slope = losses.finish_indices(state, logit, weight, scale, rows.smoothing, SMOOTH)
        return tl.where(counts, loss, rows.uncounted), slope


@triton.jit(do_not_specialize=["row_count", "class_units", "ignore_index", "divisor", "step"])
def cross_entropy(
    input, target, weight, weight_sum, upstream, outputs, row_count, class_units, inner,
    ignore_index, label_smoothing, scaling, divisor, step,
    SMOOTH: tl.constexpr, T: tl.constexpr, CLASS_INDEX: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Rows are the vectors along the middle one of three dimensions: outer, classes and inner.

    upstream: the upstream gradient of every row, in a backward of reduction "none".
    """
    UNREDUCED: tl.constexpr = upstream is not None or outputs.value is not None
    INDICES: tl.constexpr = target.pointer.dtype.element_ty == tl.int64
    SUMS_TARGETS: tl.constexpr = SMOOTH or not INDICES
    NARROW: tl.constexpr = T == tl.float32 and input.pointer.dtype.element_ty != tl.float32
    write, factor = runtime.begin_backward(scaling, step, UNREDUCED)
    if step >= runtime.IS_BACKWARD:
        if not write:
            return
    classes = class_units * PLAN.unit
    row = tl.program_id(0).to(tl.int64) * PLAN.rows + tl.arange(0, PLAN.rows)
    exists = row < row_count
    logits = classes_of(input, row, inner, PLAN.unit)
    smoothing = load_smoothing(label_smoothing, weight_sum, classes, T)
    if INDICES:
        index, faulty = load_targets(target.pointer, row, exists, classes, ignore_index)
        uncounted = tl.where(faulty, float("nan"), 0.0).to(T)
        index = index.to(CLASS_INDEX)
        rows = Rows(exists, classes, logits, None, index, uncounted, weight, smoothing)
    else:
        probabilities = classes_of(target, row, inner, 1)
        rows = Rows(exists, classes, logits, probabilities, None, None, weight, smoothing)

    cols = tl.arange(0, PLAN.classes).to(CLASS_INDEX)
    if PLAN.whole:
        x = load_logits(rows, cols, T)
    if step < runtime.IS_BACKWARD:
        number = divisor.to(tl.float64)
        if INDICES and not UNREDUCED:
            if divisor == runtime.COUNTED_BY_ALL:
                number = runtime.sum_class_weights(
                    target.pointer, weight, row_count, classes, ignore_index
                )
        write, factor = runtime.begin_forward(scaling, outputs, number, step, UNREDUCED)
    if PLAN.whole:
        state, e = reduce_tile(rows, x, cols, SUMS_TARGETS, NARROW, T)
    else:
        state = losses.empty_state(PLAN.rows, SUMS_TARGETS, T)
        for begin in range(0, classes, PLAN.classes):
            x = load_logits(rows, begin + cols, T)
            more, _ = reduce_tile(rows, x, begin + cols, SUMS_TARGETS, NARROW, T)
            state = losses.merge(state, more)

    scale = tl.full([PLAN.rows], 1.0, tl.float64) * factor
    if upstream is not None:
        scale = scale * tl.load(upstream + row, mask=exists, other=0.0).to(tl.float64)
    loss, slope = finish_rows(rows, state, scale.to(T), SMOOTH, T)
    if INDICES:
        # In a backward pass too, since the target may have changed and leads to memory.
        bad = tl.min(tl.where(faulty, row, runtime.NO_FAULT))
        if bad < runtime.NO_FAULT:
            given = tl.load(target.pointer + bad)
            runtime.report_error(outputs.fault, runtime.TARGET_CLASS, bad, given, classes)

    if step < runtime.IS_BACKWARD:
        if outputs.value is not None:
            value = runtime.narrow(loss, outputs.value.dtype.element_ty)
            tl.store(outputs.value + row, value, mask=exists)
        if not UNREDUCED:
            total = tl.sum(tl.where(exists, loss, 0.0).to(tl.float64))
            tl.store(outputs.partials + tl.program_id(0), total)
    if write:
        output = classes_of(outputs.gradients[0], row, inner, PLAN.unit)
        if PLAN.whole:
            # One exponential an element: e has the registers of x.
            slope = losses.for_exponentials(slope, state.max)
            write_gradient(output, rows, e, cols, slope, SUMS_TARGETS, T)
        else:
            for begin in range(0, classes, PLAN.classes):
                x = load_logits(rows, begin + cols, T)
                e = losses.exp_of_logit(x - slope.max[:, None], NARROW)
                write_gradient(output, rows, e, begin + cols, slope, SUMS_TARGETS, T)
    if step < runtime.IS_BACKWARD:
        if not UNREDUCED:
            runtime.finish(scaling, outputs, True)


# ---- calls ---------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How rows are laid over programs."""

    rows: int  # of a tile
    classes: int  # of a tile
    whole: bool  # a tile has all classes of its rows
    unit: int  # divides what strides count and the number of classes, so that Triton knows it


def plan_for(
    classes: int, rows: int, element_size: int, contiguous: bool, unit: int, inputs: int = 1
) -> Plan:
    """element_size: of all inputs together, which share the registers."""
    each = runtime.next_power_of_2(inputs)
    width = runtime.next_power_of_2(classes)
    whole = width * element_size <= MAX_WHOLE_BYTES if contiguous else width <= STRIDED_CLASSES
    if not whole:
        width = LONG_TILE // each if contiguous else STRIDED_CLASSES
    height = min(max(1, TILE // each // width), runtime.next_power_of_2(rows))
    return Plan(height, width, whole, unit)


def warps_for(plan: Plan, inputs: int = 1) -> int:
    each = max(ELEMENTS_PER_THREAD // inputs, 8)  # of an input: 16 bytes of half precision
    warps = runtime.next_power_of_2(runtime.ceil_divide(plan.rows * plan.classes, 32 * each))
    return min(max(warps, 1), 16)


class Steps(NamedTuple):
    """From row to row outside of the classes, from class to class, and from row to row inside of
    them; 0 where there is nowhere to go."""

    outer: int
    classes: int
    inner: int


NOWHERE = Steps(0, 0, 0)


def steps_of(shape: Sequence[int], strides: Sequence[int]) -> Steps | None:
    """None: the dimensions behind the classes do not step evenly."""
    steps = [step if size > 1 else 0 for size, step in zip(shape, strides, strict=True)]
    if len(steps) == 1:
        return Steps(0, steps[0], 0)
    size = step = 0
    for more, next_step in zip(reversed(shape[2:]), reversed(steps[2:]), strict=True):
        if more == 1:
            continue
        if size == 0:
            size, step = 1, next_step
        elif next_step != size * step:
            return None
        size *= more
    return Steps(steps[0], steps[1], step)


@dataclass(frozen=True, eq=False)
class Layout:
    """What the shapes and strides of a call decide; each is its own key."""

    plan: Plan
    rows: int
    classes: int
    inner: int
    class_index: tl.dtype
    num_warps: int
    steps: tuple[Steps, Steps, Steps]  # of input, target and gradient, in the kernel's units


@functools.lru_cache(maxsize=1024)
def layout_of(
    shape: tuple[int, ...],
    element_size: int,
    input_strides: tuple[int, ...],
    target_strides: tuple[int, ...] | None,
    gradient_strides: tuple[int, ...],
) -> Layout | None:
    """target_strides: None for class indices. None: the tensors must be copied."""
    outer, classes = shape[:2] if len(shape) > 1 else (1, *shape)
    inner = math.prod(shape[2:])
    rows = outer * inner
    x, g = steps_of(shape, input_strides), steps_of(shape, gradient_strides)
    y = NOWHERE if target_strides is None else steps_of(shape, target_strides)
    if x is None or y is None or g is None:
        return None
    contiguous = x.classes <= 1
    # What a row begins at a multiple of decides how wide its accesses are.
    unit = math.gcd(16, classes, x.outer, x.inner, g.outer, g.inner) if contiguous else 1
    plan = plan_for(classes, rows, element_size, contiguous, unit)
    furthest = (classes + plan.classes) * max(1, x.classes, y.classes, g.classes)
    in_units = [Steps(t.outer // unit, t.classes, t.inner // unit) for t in (x, g)]
    return Layout(
        plan, rows, classes, inner,
        class_index=tl.int32 if furthest < 1 << 31 else tl.int64,
        num_warps=warps_for(plan),
        steps=(in_units[0], y, in_units[1]),
    )  # fmt: skip


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
    unreduced = reduction == 0
    if weight is not None:
        weight = runtime.aligned(weight.contiguous())
    indices, smooth = target.dtype is torch.int64, label_smoothing != 0
    x, y = runtime.aligned(input), runtime.aligned(target.contiguous() if indices else target)
    g = x if do.gradients[0] is None else do.gradients[0]

    def layout() -> Layout | None:
        strides = x.stride(), None if indices else y.stride(), g.stride()
        return layout_of(input.shape, input.element_size(), *strides)

    lies = layout()
    if lies is None:
        x, y = x.contiguous(), y.contiguous()
        g = x if do.gradients[0] is None else do.gradients[0]
        lies = layout()
    if lies is None:
        raise RuntimeError("fusedloss: the dimensions of input behind the classes must be joinable")
    upstream = None
    if unreduced and do.grad_output is not None:
        upstream = runtime.aligned(do.grad_output.contiguous())
    divisor = Divisor()
    if do.forward and reduction == 1:
        divisor = Divisor(lies.rows)
        if indices and lies.rows <= runtime.MAX_COUNTED_BY_ALL:
            divisor = Divisor(runtime.COUNTED_BY_ALL.value)
        elif indices:
            divisor = Divisor.of_classes(y, weight, lies.classes, ignore_index)
    weight_sum = weight.sum(dtype=torch.float64) if weight is not None and smooth else None
    steps_of_x, steps_of_y, steps_of_g = lies.steps
    return runtime.launch(
        cross_entropy,
        max(1, runtime.ceil_divide(lies.rows, lies.plan.rows)),
        do,
        input.device,
        empty_loss(input, reduction, dtype) if do.forward else None,
        tensors=(x, y, g, weight, weight_sum, upstream),
        numbers=(lies, ignore_index, smooth, dtype),
        unreduced=unreduced,
        divisor=divisor,
        gradients=(Operand(g, steps_of_g),),
        num_warps=lies.num_warps,
        input=Operand(x, steps_of_x),
        target=Operand(y, steps_of_y),
        weight=weight,
        weight_sum=weight_sum,
        upstream=upstream,
        row_count=lies.rows,
        class_units=lies.classes // lies.plan.unit,
        inner=max(1, lies.inner),
        ignore_index=ignore_index,
        label_smoothing=runtime.halves(label_smoothing),
        SMOOTH=smooth,
        T=tl.float64 if dtype is torch.float64 else tl.float32,
        CLASS_INDEX=lies.class_index,
        PLAN=lies.plan,
    )
