"""The engine of custom row losses: a program has a tile of rows by classes, in one kernel for every
pass.

A row is walked over once a level, and once more for its gradient: csrc/math/custom_rows.h says what a
level is. Rows that fit a tile whole, with all inputs, are read once and stay in registers for every
walk. Longer ones, and those whose classes lie apart, go by in tiles, once a walk.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import runtime
from .primitives import maximum
from .rows import Plan, empty_loss, load_targets, plan_for, warps_for
from .runtime import Divisor, Operand, Pass

ELEMENT, LABEL, PER_ROW, PER_CLASS = "element", "label", "per row", "per class"


class RowLoss:
    """A loss as fusedloss/custom/row_printing.py prints it: a module of

        KINDS   of the inputs, in their order
        MAXIMA  by level, its maxima, the first of its terms: whether nan must reach each
        SUMS    by level, how many sums follow
        PEAKS   level and term of the maxima whose gradient goes to their first position, by level
        RESULTS the places among the row numbers of the loss, of the element inputs' gradients at the
                label, if there is one, and of the per-row inputs' gradients
        EXTRAS  the places of the auxiliary results

    and of jit functions of tuples of blocks. x are the element inputs, w the class inputs, c the
    constants, and r the row numbers so far, blocks of rows by 1: the gradients' scale, the number of
    classes, the per-row inputs, with a label the element and class inputs there, and then by level its
    terms and what row() makes of them.

        row(r, c, LEVEL)                   row numbers that follow from LEVEL; with -1, from no level
        terms(x, w, r, c, NARROW, LEVEL)   what the maxima and sums of LEVEL are of
        gradients(x, w, r, c, NARROW)      of the element inputs
        at_peak(x, w, r, c, NARROW, PEAK)  what is added to these where PEAK has its first position

    NARROW: see losses.exp_of_logit().
    """

    symmetric = False

    def __init__(self, printed: dict[str, Any]) -> None:
        self.kinds: tuple[str, ...] = printed["KINDS"]
        self.gradients = len(self.kinds)
        functions = "row", "terms", "gradients", "at_peak"
        self.auxiliary = len(printed["EXTRAS"])
        numbers = "MAXIMA", "SUMS", "PEAKS", "RESULTS", "EXTRAS"
        # As the kernel takes them. A module without peaks has no function for them.
        self.printed = {name.upper(): printed.get(name) for name in functions}
        self.printed |= {name: printed[name] for name in numbers}

    def of_kind(self, kind: str, inputs: Sequence[Any]) -> list[Any]:
        return [x for x, k in zip(inputs, self.kinds, strict=True) if k == kind]


class Rows(NamedTuple):
    """The rows of a program; blocks of rows by 1."""

    exists: Any
    elements: Any  # Operands: the first class of each row, and the stride to the next
    per_class: Any  # pointers
    classes: Any
    label: Any  # -1 where it does not count; None: the loss has none


# ---- tiles ---------------------------------------------------------------------------------------


@triton.jit
def rows_of(operand, row, sizes, UNIT: tl.constexpr):
    """The rows' first classes, and the stride to the next. sizes: of the dimensions of rows, but for
    the outermost one; their strides are followed by that of the classes."""
    strides = operand.strides
    offset = row * 0
    for d in tl.static_range(len(sizes), 0, -1):
        outer = row // sizes[d - 1]
        offset += (row - outer * sizes[d - 1]) * strides[d]
        row = outer
    offset += row * strides[0]
    return Operand(operand.pointer + offset * UNIT, strides[len(sizes) + 1])


@triton.jit
def load_elements(rows, cols, mask, T: tl.constexpr):
    x = ()
    for k in tl.static_range(len(rows.elements)):
        operand = rows.elements[k]
        number = tl.load(operand.pointer + cols * operand.strides, mask=mask, other=0.0)
        x = x + (number.to(T),)  # type: ignore[assignment]
    return x


@triton.jit
def load_per_class(rows, cols, mask, T: tl.constexpr):
    w = ()
    for k in tl.static_range(len(rows.per_class)):
        number = tl.load(rows.per_class[k] + cols, mask=mask, other=0.0)
        w = w + (number.to(T),)  # type: ignore[assignment]
    return w


@triton.jit
def load_tile(rows, cols, T: tl.constexpr):
    inside = cols < rows.classes
    return load_elements(rows, cols, rows.exists & inside, T), load_per_class(rows, cols, inside, T)


@triton.jit
def largest(x, PASSES_NAN: tl.constexpr):
    if PASSES_NAN:
        nan = tl.max((x != x).to(tl.int32), 1, keep_dims=True) != 0
        return tl.where(nan, float("nan"), tl.max(x, 1, keep_dims=True))
    else:
        return tl.max(x, 1, keep_dims=True)


@triton.jit
def empty(rows, MAXIMA: tl.constexpr, SUMS: tl.constexpr, PEAKS: tl.constexpr,
          LEVEL: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """What no class adds up to: the maxima and sums of a level, and the first positions of its peaks."""
    found = ()
    for _ in tl.static_range(len(MAXIMA[LEVEL])):
        found = found + (tl.full(rows.exists.shape, float("-inf"), T),)  # type: ignore[assignment]
    for _ in tl.static_range(SUMS[LEVEL]):
        found = found + (tl.full(rows.exists.shape, 0.0, tl.float64),)  # type: ignore[assignment]
    firsts = ()
    for p in tl.static_range(len(PEAKS)):
        if PEAKS[p][0] == LEVEL:
            nowhere = tl.where(rows.exists, rows.classes, rows.classes)
            firsts = firsts + (nowhere,)  # type: ignore[assignment]
    return found, firsts


@triton.jit
def walk(
    found, firsts, rows, x, w, r, c, cols, NARROW: tl.constexpr, TERMS: tl.constexpr,
    MAXIMA: tl.constexpr, PEAKS: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """The same with the classes of a tile."""
    inside = rows.exists & (cols < rows.classes)
    counted = inside
    if rows.label is not None:
        counted = inside & (cols != rows.label)
    terms = TERMS(x, w, r, c, NARROW, LEVEL)
    sofar = ()
    for i in tl.static_range(len(terms)):
        if i < len(MAXIMA[LEVEL]):
            more = largest(tl.where(inside, terms[i], float("-inf")), MAXIMA[LEVEL][i])
            sofar = sofar + (maximum(found[i], more),)  # type: ignore[assignment]
        else:
            more = tl.sum(tl.where(counted, terms[i], 0.0), 1, keep_dims=True)
            sofar = sofar + (found[i] + more,)  # type: ignore[assignment]
    positions = ()
    for p in tl.static_range(len(PEAKS)):
        if PEAKS[p][0] == LEVEL:
            here = inside & (terms[PEAKS[p][1]] == sofar[PEAKS[p][1]])
            first = tl.min(tl.where(here, cols, rows.classes), 1, keep_dims=True)
            before = firsts[len(positions)]
            stays = (found[PEAKS[p][1]] == sofar[PEAKS[p][1]]) & (before < rows.classes)
            first = tl.where(stays, before, first)
            positions = positions + (first,)  # type: ignore[assignment]
    return sofar, positions


@triton.jit
def write_gradients(
    outputs, rows, x, w, r, c, cols, at_label, uncounted, peaks,
    NARROW: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """peaks: of each, its first position and what it adds to the gradients there."""
    inside = rows.exists & (cols < rows.classes)
    gradients = GRADIENTS(x, w, r, c, NARROW)
    for k in tl.static_range(len(gradients)):
        if outputs[k] is not None:
            g = tl.broadcast_to(gradients[k], inside.shape)
            if rows.label is not None:
                g = tl.where(cols == rows.label, at_label[k], g)
            for p in tl.static_range(len(peaks)):
                g = tl.where(cols == peaks[p][0], g + peaks[p][1][k], g)
            store(outputs[k], rows, g, cols, inside, uncounted)


@triton.jit
def store(operand, rows, x, cols, mask, uncounted):
    if rows.label is not None:
        x = tl.where(rows.label >= 0, x, uncounted)
    D: tl.constexpr = operand.pointer.dtype.element_ty
    tl.store(operand.pointer + cols * operand.strides, runtime.narrow(x, D), mask=mask)


# ---- rows ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["row_count", "class_units", "ignore_index", "divisor", "step"])
def custom_rows(
    elements, per_row, per_class, label, weight, upstream, outputs, auxiliary, sizes, row_count,
    class_units, ignore_index, parameters, scaling, divisor, step,
    ROW: tl.constexpr, TERMS: tl.constexpr, GRADIENTS: tl.constexpr, AT_PEAK: tl.constexpr,
    MAXIMA: tl.constexpr, SUMS: tl.constexpr, PEAKS: tl.constexpr, RESULTS: tl.constexpr,
    EXTRAS: tl.constexpr,
    NARROW: tl.constexpr, T: tl.constexpr, CLASS_INDEX: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """elements, per_row, per_class: the inputs of these kinds. sizes: see rows_of().

    outputs.gradients: those of the element inputs, then those of the per-row inputs.
    upstream: the upstream gradient of every row, in a backward of reduction "none".
    auxiliary: the results of EXTRAS, each of all rows.
    """
    UNREDUCED: tl.constexpr = upstream is not None or outputs.value is not None
    write, factor = runtime.begin_backward(scaling, step, UNREDUCED)
    if step >= runtime.IS_BACKWARD:
        if not write:
            return
    classes = class_units * PLAN.unit
    row = tl.program_id(0).to(tl.int64) * PLAN.rows + tl.arange(0, PLAN.rows)[:, None]
    exists = row < row_count
    operands = ()
    for k in tl.static_range(len(elements)):
        operands = operands + (rows_of(elements[k], row, sizes, PLAN.unit),)  # type: ignore[assignment]
    uncounted = None
    if label is not None:
        index, faulty = load_targets(label, row, exists, classes, ignore_index)
        uncounted = tl.where(faulty, float("nan"), 0.0).to(T)
        rows = Rows(exists, operands, per_class, classes, index.to(CLASS_INDEX))
    else:
        rows = Rows(exists, operands, per_class, classes, None)
    cols = tl.arange(0, PLAN.classes).to(CLASS_INDEX)[None, :]
    if PLAN.whole:
        x, w = load_tile(rows, cols, T)
    if step < runtime.IS_BACKWARD:
        number = divisor.to(tl.float64)
        if label is not None and not UNREDUCED:
            if divisor == runtime.COUNTED_BY_ALL:
                number = runtime.sum_class_weights(label, None, row_count, classes, ignore_index)
        write, factor = runtime.begin_forward(scaling, outputs, number, step, UNREDUCED)

    # The row numbers.
    scale = tl.full([PLAN.rows, 1], 1.0, tl.float64) * factor
    if upstream is not None:
        scale = scale * tl.load(upstream + row, mask=exists, other=0.0).to(tl.float64)
    if weight is not None:
        of_row = tl.load(weight + row, mask=exists, other=0.0).to(T)
        scale = scale * of_row
    r = (scale.to(T), classes.to(T))
    for k in tl.static_range(len(per_row)):
        here = rows_of(per_row[k], row, sizes, 1).pointer
        r = r + (tl.load(here, mask=exists, other=0.0).to(T),)  # type: ignore[assignment]
    if label is not None:
        r = r + load_elements(rows, rows.label, rows.label >= 0, T)
        r = r + load_per_class(rows, rows.label, rows.label >= 0, T)
    c = ()
    for k in tl.static_range(len(parameters)):
        c = c + (runtime.from_halves(parameters[k]).to(T),)  # type: ignore[assignment]
    r = r + ROW(r, c, -1)
    firsts = ()
    for LEVEL in tl.static_range(len(SUMS)):
        found, positions = empty(rows, MAXIMA, SUMS, PEAKS, LEVEL, T)
        if PLAN.whole:
            found, positions = walk(
                found, positions, rows, x, w, r, c, cols, NARROW, TERMS, MAXIMA, PEAKS, LEVEL
            )
        else:
            for begin in range(0, classes, PLAN.classes):
                at = begin + cols
                x, w = load_tile(rows, at, T)
                found, positions = walk(
                    found, positions, rows, x, w, r, c, at, NARROW, TERMS, MAXIMA, PEAKS, LEVEL
                )
        for i in tl.static_range(len(found)):
            r = r + (found[i].to(T),)
        r = r + ROW(r, c, LEVEL)
        firsts = firsts + positions

    if label is not None:
        # In a backward pass too, since the label may have changed and leads to memory.
        bad = tl.min(tl.where(faulty, row, runtime.NO_FAULT))
        if bad < runtime.NO_FAULT:
            given = tl.load(label + bad)
            runtime.report_error(outputs.fault, runtime.TARGET_CLASS, bad, given, classes)
    if step < runtime.IS_BACKWARD:
        loss = tl.broadcast_to(r[RESULTS[0]], exists.shape)
        if weight is not None:
            loss = loss * of_row
        if label is not None:
            loss = tl.where(rows.label >= 0, loss, uncounted)
        if outputs.value is not None:
            value = runtime.narrow(loss, outputs.value.dtype.element_ty)
            tl.store(outputs.value + row, value, mask=exists)
        for k in tl.static_range(len(EXTRAS)):
            extra = tl.broadcast_to(r[EXTRAS[k]], exists.shape)
            if label is not None:
                extra = tl.where(rows.label >= 0, extra, uncounted)
            extra = runtime.narrow(extra, auxiliary.dtype.element_ty)
            tl.store(auxiliary + k * row_count + row, extra, mask=exists)
        if not UNREDUCED:
            total = tl.sum(tl.where(exists, loss, 0.0).to(tl.float64))
            tl.store(outputs.partials + tl.program_id(0), total)
    if write:
        FIRST: tl.constexpr = len(RESULTS) - len(per_row)  # of their gradients
        for k in tl.static_range(len(per_row)):
            if outputs.gradients[len(elements) + k] is not None:
                there = rows_of(outputs.gradients[len(elements) + k], row, sizes, 1)
                g = tl.broadcast_to(r[RESULTS[FIRST + k]], exists.shape)
                store(there, rows, g, row * 0, exists, uncounted)
        gradients = ()
        for k in tl.static_range(len(elements)):
            there = None
            if outputs.gradients[k] is not None:
                there = rows_of(outputs.gradients[k], row, sizes, PLAN.unit)
            gradients = gradients + (there,)  # type: ignore[assignment]
        at_label = ()
        for k in tl.static_range(1, FIRST):
            at_label = at_label + (r[RESULTS[k]],)  # type: ignore[assignment]
        peaks = ()
        for p in tl.static_range(len(PEAKS)):
            inside = exists & (firsts[p] < classes)
            at_peak = load_elements(rows, firsts[p], inside, T)
            more = AT_PEAK(at_peak, load_per_class(rows, firsts[p], inside, T), r, c, NARROW, p)
            peaks = peaks + ((firsts[p], more),)  # type: ignore[assignment]
        if PLAN.whole:
            write_gradients(
                gradients, rows, x, w, r, c, cols, at_label, uncounted, peaks, NARROW, GRADIENTS
            )
        else:
            for begin in range(0, classes, PLAN.classes):
                at = begin + cols
                x, w = load_tile(rows, at, T)
                write_gradients(
                    gradients, rows, x, w, r, c, at, at_label, uncounted, peaks, NARROW, GRADIENTS
                )
    if step < runtime.IS_BACKWARD:
        if not UNREDUCED:
            runtime.finish(scaling, outputs, True)


# ---- calls ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layout:
    """What the shapes and strides of a call decide; each is its own key."""

    plan: Plan
    rows: int
    classes: int
    sizes: tuple[int, ...]  # of the dimensions of rows, but for the outermost one
    class_index: tl.dtype
    num_warps: int
    steps: tuple[tuple[int, ...], ...]  # of each tensor, as rows_of() takes them


@functools.lru_cache(maxsize=1024)
def layout_of(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    classwise: int,
    inputs: int,
    element_size: int,
) -> Layout:
    """strides: of each tensor; the first ones, `classwise`, have classes, and the others are of rows.
    element_size: of all inputs together."""
    dim = 1 if len(shape) > 1 else 0
    classes, sizes, steps = shape[dim], [1], [[0] * len(strides)]
    for d, size in enumerate(shape):
        if d == dim or size == 1:
            continue
        step = [of[d] for of in strides]
        # It continues the dimension outside it where every tensor steps evenly over both.
        if sizes[-1] == 1 or steps[-1] == [s * size for s in step]:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    of_class = [of[dim] if classes > 1 else 0 for of in strides]
    contiguous = of_class[0] <= 1
    # What a row begins at a multiple of decides how wide its accesses are.
    begins = itertools.chain(*(step[:classwise] for step in steps))
    unit = math.gcd(16, classes, *begins) if contiguous else 1
    rows = math.prod(sizes)
    plan = plan_for(classes, rows, element_size, contiguous, unit, inputs)
    furthest = (classes + plan.classes) * max(1, *of_class)
    return Layout(
        plan, rows, classes, tuple(sizes[1:]),
        class_index=tl.int32 if furthest < 1 << 31 else tl.int64,
        num_warps=warps_for(plan, inputs),
        steps=tuple(
            (*(step[k] // (unit if k < classwise else 1) for step in steps), of_class[k])
            for k in range(len(strides))
        ),
    )  # fmt: skip


def check(loss: RowLoss, inputs: Sequence[Tensor], weight: Tensor | None) -> None:
    input = inputs[0]
    if len(inputs) != len(loss.kinds):
        raise ValueError(f"fusedloss: {len(loss.kinds)} inputs, not {len(inputs)}")
    runtime.check_rows(input, input, None)
    shape, dim = list(input.shape), runtime.class_dim(input)
    of_rows = shape[:dim] + shape[dim + 1 :]
    expected = {ELEMENT: shape, LABEL: of_rows, PER_ROW: of_rows, PER_CLASS: shape[dim : dim + 1]}
    given = [*zip(loss.kinds, inputs, strict=True)]
    given += [] if weight is None else [(PER_ROW, weight)]
    for kind, tensor in given:
        integral = tensor.dtype is torch.int64
        if list(tensor.shape) != expected[kind] or (kind == LABEL and not integral):
            raise ValueError(
                f"fusedloss: a {kind} input of shape {list(tensor.shape)} and dtype {tensor.dtype} "
                f"does not fit the first input's shape {shape}"
            )


def empty_result(loss: RowLoss, input: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    """As empty_loss() in csrc/torch/tensors.h: auxiliary results lie behind the loss."""
    if not loss.auxiliary:
        return empty_loss(input, reduction, dtype)
    of_rows = empty_loss(input, 0, dtype).shape
    shape = (1 + loss.auxiliary, *of_rows)
    if reduction != 0:
        shape = (1 + loss.auxiliary * math.prod(of_rows),)
    return input.new_empty(shape, dtype=dtype)


def run(
    do: Pass,
    loss: RowLoss,
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    parameters: Sequence[float],
    ignore_index: int,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """As pointwise.run(). inputs: all of them, in the loss's order. A gradient lies in memory as
    ``runtime.empty_like()`` of its input does."""
    check(loss, inputs, weight)
    input, dim = inputs[0], runtime.class_dim(inputs[0])

    def in_order(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else runtime.aligned(tensor.contiguous())

    x = [runtime.aligned(t) for t in loss.of_kind(ELEMENT, inputs)]
    per_row = [runtime.aligned(t) for t in loss.of_kind(PER_ROW, inputs)]
    per_class = [in_order(t) for t in loss.of_kind(PER_CLASS, inputs)]
    (label,) = map(in_order, loss.of_kind(LABEL, inputs) or [None])
    weight = in_order(weight)
    upstream = in_order(do.grad_output) if reduction == 0 else None
    of_x = loss.of_kind(ELEMENT, do.gradients)
    of_rows = loss.of_kind(PER_ROW, do.gradients)
    if all(gradient is None for gradient in do.gradients):
        of_x[0] = x[0]
    of_classes = [t for t in (*x, *of_x) if t is not None]
    strides = [t.stride() for t in of_classes]
    for t in (*per_row, *of_rows):
        if t is not None:
            strides.append((*t.stride()[:dim], 0, *t.stride()[dim:]))
    element_size = sum(t.element_size() for t in x)
    lies = layout_of(input.shape, tuple(strides), len(of_classes), len(x), element_size)
    steps = iter(lies.steps)
    tensors = *x, *of_x, *per_row, *of_rows
    operands = tuple(None if t is None else Operand(t, next(steps)) for t in tensors)
    rows_from = 2 * len(x)
    gradients = *operands[len(x) : rows_from], *operands[rows_from + len(per_row) :]
    divisor = Divisor()
    if do.forward and reduction == 1:
        divisor = _divisor(lies, label, weight, ignore_index)
    result = value = None
    auxiliary = do.grad_output
    if do.forward:
        result = empty_result(loss, input, reduction, dtype)
        value = result[0] if loss.auxiliary else result
        auxiliary = result.view(-1)[value.numel() :]
    runtime.launch(
        custom_rows,
        max(1, runtime.ceil_divide(lies.rows, lies.plan.rows)),
        do,
        input.device,
        value,
        tensors=(*tensors, *per_class, label, weight, upstream, auxiliary),
        numbers=(loss, lies, ignore_index, dtype),
        unreduced=reduction == 0,
        divisor=divisor,
        gradients=gradients,
        num_warps=lies.num_warps,
        elements=operands[: len(x)],
        per_row=operands[rows_from : rows_from + len(per_row)],
        per_class=tuple(per_class),
        label=label,
        weight=weight,
        upstream=upstream,
        auxiliary=auxiliary if loss.auxiliary else None,
        sizes=lies.sizes,
        row_count=lies.rows,
        class_units=lies.classes // lies.plan.unit,
        ignore_index=ignore_index,
        parameters=tuple(map(runtime.halves, parameters)),
        NARROW=dtype is not torch.float64 and all(t.element_size() == 2 for t in x),
        T=tl.float64 if dtype is torch.float64 else tl.float32,
        CLASS_INDEX=lies.class_index,
        PLAN=lies.plan,
        **loss.printed,
    )
    return result


def _divisor(
    lies: Layout, label: Tensor | None, weight: Tensor | None, ignore_index: int
) -> Divisor:
    """What a mean divides by."""
    if weight is not None:
        counted = weight if label is None else weight.masked_fill(label == ignore_index, 0.0)
        return Divisor(runtime.COUNTED.value, counted.sum(dtype=torch.float64))
    if label is None:
        return Divisor(lies.rows)
    if lies.rows <= runtime.MAX_COUNTED_BY_ALL:
        return Divisor(runtime.COUNTED_BY_ALL.value)
    return Divisor.of_classes(label, None, lies.classes, ignore_index)
