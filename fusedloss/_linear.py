"""Losses over rows of logits that a linear layer makes, without ever holding all of the logits.

The rows are taken in chunks. For each, torch's matrix product makes the logits, a row kernel turns them
into the losses and, in the same memory, the gradient, and two more products carry that on to the
hidden states and to the layer's weight. So forward leaves finished gradients behind, for the upstream
gradient 1, and backward scales them: nothing is predicted, and a call depends on its inputs alone.
Where each row has an upstream gradient of its own (``reduction="none"``, or gradients of further
results), and where forward should leave nothing behind (``memory="low"``, checkpointing), backward
makes the logits again, chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _dispatch, backends, second_order

_BLOCK = 64  # a chunk has a multiple of that many rows, as matrix products work in blocks
_MIB = 1 << 20


class Kind(IntEnum):
    """What an input holds; see :class:`fusedloss.custom.row_tracing.Kind`."""

    ELEMENT = 0
    LABEL = 1
    PER_ROW = 2
    PER_CLASS = 3


# ---- chunks --------------------------------------------------------------------------------------


def chunk_of(rows: int, classes: int, dtype: torch.dtype, device: str) -> int:
    """How many rows a chunk has.

    On a GPU, products of fewer than 1,024 rows would wait for memory, which holds the weight and its
    gradient: chunks that fit into a cache would be three to eight times slower. On a CPU a product
    that is added to the gradient of a low-precision weight costs a pass over that, so chunks are larger
    there.
    """
    low = dtype.itemsize < 4
    budget, least = (128 if low else 40, 512 if low else 64) if device == "cpu" else (512, 1024)
    most = max(budget * _MIB // (classes * dtype.itemsize) // _BLOCK * _BLOCK, least)
    chunks = math.ceil(rows / most)
    return min(math.ceil(rows / chunks / _BLOCK) * _BLOCK, rows)


# So many roundings of the gradient for a low-precision weight, one a chunk, err no more than the one product
# of all logits does; beyond it is added up in float32.
MOST_NARROW = 4


def layer_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which a linear layer reads a tensor, under autocast as well."""
    device = t.device.type
    if torch.is_autocast_enabled(device) and t.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return t.dtype


def dtypes_differ(*tensors: Tensor | None) -> str | None:
    """Why the tensors of a layer make no product; None: they do."""
    dtypes = {layer_dtype(t) for t in tensors if t is not None}
    return f"dtypes {' and '.join(sorted(map(str, dtypes)))}" if len(dtypes) > 1 else None


def rows_that_count(label: Tensor, ignore_index: int, drops: bool | None) -> Tensor | None:
    """Their places, where the others should be left out; None: all rows stay.

    drops None: on a CPU. On a GPU the host waits for their number.
    """
    if not _dispatch.has_numbers() or not (label.device.type == "cpu" if drops is None else drops):
        return None
    kept = (label != ignore_index).nonzero()[:, 0]
    return None if kept.numel() in (0, label.numel()) else kept


def spread(rows: Tensor, kept: Tensor | None, shape: torch.Size) -> Tensor:
    """Numbers of the rows that stay as numbers of all rows, of that shape: 0 for the others."""
    if kept is not None:
        rows = rows.new_zeros(math.prod(shape)).index_copy(0, kept, rows)
    return rows.reshape(shape)


# ---- what a call computes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A loss over rows as the operators know it, and how a call hands it logits.

    Attributes:
        backend, loss, parameters, ignore_index: the operator's arguments.
        dtype: of the rows' losses, float32 or float64.
        kinds: of all inputs of the loss.
        places: which of them are logits that a linear layer makes; the first one is.
        auxiliary: how many further results each row has.
        logits: the dtype of the logits; None: that of the hidden states.
        chunk: how many rows are taken at a time.
        wide: whether the gradients for weights are added up in float32, whatever they are.
        argmax: whether the largest of a row's logits is looked for.
    """

    backend: str
    loss: str
    parameters: tuple[float, ...]
    ignore_index: int
    dtype: torch.dtype
    kinds: tuple[int, ...]
    places: tuple[int, ...]
    auxiliary: int
    logits: torch.dtype | None
    chunk: int
    wide: bool
    argmax: bool = False

    @property
    def weighs_classes(self) -> bool:
        """Whether the operator's weight is one of each class, and not of each row."""
        return self.loss == "cross_entropy"

    @property
    def numbers(self) -> tuple[Any, ...]:
        """All of them, as an operator takes them."""
        return (
            self.backend, self.loss, [*self.parameters], self.ignore_index, self.dtype,
            [*map(int, self.kinds)], [*self.places], self.auxiliary, self.logits, self.chunk, self.wide,
            self.argmax,
        )  # fmt: skip


class Layer(NamedTuple):
    """The tensors that make logits, ``hidden @ weight.T + bias``; or the gradients for them."""

    hidden: Any
    weight: Any
    bias: Any

    def cast(self) -> Layer:
        """As autocast has it."""
        return Layer(*(t if t is None else t.to(layer_dtype(t)) for t in self))


@dataclass(frozen=True)
class Operands:
    """The tensors of a call, or the gradients for them: of each layer, and of the loss's other inputs in
    order."""

    layers: list[Layer]
    others: list[Any]

    @staticmethod
    def of(tensors: Sequence[Any], layers: int) -> Operands:
        """From what :attr:`all` gives."""
        found = [Layer(*tensors[3 * i : 3 * i + 3]) for i in range(layers)]
        return Operands(found, [*tensors[3 * layers :]])

    @property
    def all(self) -> list[Any]:
        return [*chain.from_iterable(self.layers), *self.others]

    @property
    def first(self) -> Tensor:
        """One whose first dimension is the rows."""
        found: Tensor = self.layers[0].hidden if self.layers else self.others[0]
        return found

    def inputs(self, spec: Rows, logits: Sequence[Any], part: slice = slice(None)) -> list[Any]:
        """The inputs of the loss in its order, for a part of the rows."""
        of_layers, others = iter(logits), iter(self.others)
        found = []
        for place, kind in enumerate(spec.kinds):
            t = next(of_layers if place in spec.places else others)
            whole = t is None or place in spec.places or kind == Kind.PER_CLASS
            found.append(t if whole else t[part])
        return found


# ---- all chunks ----------------------------------------------------------------------------------


def run(
    spec: Rows, given: Operands, weight: Tensor | None, factor: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Goes through all chunks.

    Args:
        weight: of each class for ``"cross_entropy"``, of each row for any other loss.
        factor: the upstream gradient of the rows, one number or one for each.
        wanted: for which of ``given.all`` there should be gradients.

    Returns:
        The results of the rows, (1 + auxiliary, N); the classes of the largest logits, or zeros; and the
        gradients.
    """
    if not torch.compiler.is_compiling():
        return _run(spec, given, weight, factor, wanted)
    # For a compiler one operator, which it does not look into.
    mask = [one and t is not None for one, t in zip(wanted, given.all, strict=True)]
    results, best, *found = torch.ops.fusedloss_linear.rows(
        given.all, len(given.layers), weight, factor, mask, *spec.numbers
    )
    left = iter(found)
    return results, best, [next(left) if one else None for one in mask]


def _run(
    spec: Rows, given: Operands, weight: Tensor | None, factor: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    rows = given.first.shape[0]
    gradients = _empty_gradients(spec, given, wanted)
    to = Operands.of(gradients, len(given.layers))
    results = given.first.new_empty((1 + spec.auxiliary, rows), dtype=spec.dtype)
    best = torch.zeros(rows, dtype=torch.int64, device=given.first.device)
    chunk = min(spec.chunk, rows)
    buffers = [_buffer(chunk, layer, spec.logits) for layer in given.layers]
    upstream = factor.expand(rows)
    for begin in range(0, rows, chunk):
        part = slice(begin, min(begin + chunk, rows))
        logits = [buffer[: part.stop - begin] for buffer in buffers]
        for z, layer in zip(logits, given.layers, strict=True):
            _make_logits(z, layer, part)
        inputs = given.inputs(spec, logits, part)
        if spec.argmax:
            torch.argmax(inputs[0], 1, out=best[part])
        # The gradients for logits are written over these.
        outs = [
            z if any(g is not None for g in layer) else None
            for z, layer in zip(logits, to.layers, strict=True)
        ]
        of_part = weight if weight is None or spec.weighs_classes else weight[part]
        found = _run_rows(spec, inputs, of_part, upstream[part], to.inputs(spec, outs, part))
        results[:, part] = found.view(1 + spec.auxiliary, -1)
        for slopes, layer, to_layer in zip(outs, given.layers, to.layers, strict=True):
            if slopes is not None:
                _carry_on(slopes, layer, to_layer, part)
    return results, best, gradients


def _run_rows(
    spec: Rows, inputs: list[Tensor], weight: Tensor | None, upstream: Tensor, gradients: list[Any]
) -> Tensor:
    """The results of some rows, and their gradients, written where there are tensors for them."""
    input, target, *more = inputs if len(inputs) > 1 else inputs * 2  # of one input: target too
    call = (
        input, target, weight, more, spec.loss, [*spec.parameters], spec.ignore_index, 0, spec.dtype
    )  # fmt: skip
    mask = sum(1 << i for i, gradient in enumerate(gradients) if gradient is not None)
    out = [gradient for gradient in gradients if gradient is not None]
    found: Tensor
    if out:
        found = _dispatch.operator_with_gradients(spec.backend)(upstream, *call, mask, out)
    else:
        found = _dispatch.operator(spec.backend)(*call, None)
    return found


def _empty_gradients(spec: Rows, given: Operands, wanted: Sequence[bool]) -> list[Tensor | None]:
    """In the order of ``given.all``."""
    roles = [*Layer._fields] * len(given.layers) + [""] * len(given.others)
    return [
        torch.empty(t.shape, dtype=_gradient_dtype(spec, t.dtype, role), device=t.device)
        if one and t is not None
        else None
        for t, role, one in zip(given.all, roles, wanted, strict=True)
    ]


def _gradient_dtype(spec: Rows, dtype: torch.dtype, role: str) -> torch.dtype:
    """The dtype in which a gradient is added up."""
    # The range of float16 ends before that of a sum of gradients does.
    wide = role == "bias" or dtype is torch.float16 or (role == "weight" and spec.wide)
    return torch.float32 if role and wide and dtype.itemsize < 4 else dtype


def _buffer(rows: int, layer: Layer, dtype: torch.dtype | None) -> Tensor:
    """Memory for logits. On a GPU each row begins at a whole line of memory."""
    classes, hidden = layer.weight.shape[0], layer.hidden
    padded = math.ceil(classes / _BLOCK) * _BLOCK if hidden.is_cuda else classes
    found: Tensor = hidden.new_empty((rows, padded), dtype=dtype or hidden.dtype)
    return found[:, :classes]


def _make_logits(out: Tensor, layer: Layer, part: slice) -> None:
    hidden, weight, bias = layer.hidden[part], layer.weight.t(), layer.bias
    if out.dtype is not hidden.dtype and not hidden.is_cuda:
        hidden, weight = hidden.to(out.dtype), weight.to(out.dtype)
    if bias is None:
        _add_product(out, hidden, weight, first=True)
    elif hidden.is_cuda and out.dtype is hidden.dtype:
        torch.addmm(bias, hidden, weight, out=out)  # which needs no further pass
    else:
        _add_product(out.copy_(bias), hidden, weight, first=False)


def _carry_on(slopes: Tensor, layer: Layer, to: Layer, part: slice) -> None:
    """From the gradient for the logits of some rows to those for hidden states, weight and bias."""
    first = part.start == 0
    slopes = slopes.to(layer.hidden.dtype)
    if to.hidden is not None:
        _add_product(to.hidden[part], slopes, layer.weight, first=True)
    if to.weight is not None:
        _add_product(to.weight, slopes.t(), layer.hidden[part], first)
    if to.bias is not None:
        total = torch.sum(slopes, 0, dtype=to.bias.dtype)
        to.bias.copy_(total) if first else to.bias.add_(total)


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``out = a @ b`` for the first chunk, ``out += a @ b`` for the others. out may be wider."""
    if out.dtype is a.dtype:
        if a.device.type == "cpu" and backends.extension is not None:
            torch.ops.fusedloss.product_(out, a, b, not first)
        else:
            torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif a.is_cuda:  # without a product of low precision in between
        if first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        product = a.new_empty(out.shape)
        _add_product(product, a, b, first=True)
        out.copy_(product) if first else out.add_(product)


_torch_library: Any = torch.library  # untyped in some of the releases
_library = _torch_library.Library("fusedloss_linear", "DEF")
_library.define(
    "rows(Tensor?[] operands, int layers, Tensor? weight, Tensor factor, bool[] wanted, str backend, "
    "str loss, float[] parameters, int ignore_index, ScalarType dtype, int[] kinds, int[] places, "
    "int auxiliary, ScalarType? logits, int chunk, bool wide, bool argmax) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _of_operator(operands: list[Any], layers: int, *args: Any) -> tuple[Rows, Operands]:
    backend, loss, parameters, ignore_index, dtype, kinds, places, *rest = args[3:]
    fixed = (*parameters,), ignore_index, dtype, (*kinds,), (*places,)
    return Rows(backend, loss, *fixed, *rest), Operands.of(operands, layers)


def _rows(*args: Any) -> list[Tensor]:
    results, best, gradients = _run(*_of_operator(*args), *args[2:5])
    return [results, best, *(g for g in gradients if g is not None)]


def _rows_meta(*args: Any) -> list[Tensor]:
    spec, given = _of_operator(*args)
    rows = given.first.shape[0]
    results = given.first.new_empty((1 + spec.auxiliary, rows), dtype=spec.dtype)
    best = given.first.new_empty(rows, dtype=torch.int64)
    gradients = _empty_gradients(spec, given, args[4])
    return [results, best, *(g for g in gradients if g is not None)]


_library.impl("rows", _rows, "CompositeExplicitAutograd")
_library.impl("rows", _rows_meta, "Meta")


# ---- autograd ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a call computes of the results of its rows.

    Attributes:
        rows: how these are computed.
        reduction: ``"mean"`` and ``"sum"`` add up the losses.
        reference: all results of the rows in plain PyTorch, from the loss's inputs and the weight.
        keeps: whether forward leaves the gradients for the upstream gradient 1 behind.
        scales_late: whether they have not been divided by the mean's divisor yet, since float16 would
            round numbers of that size to 0.
        combined: the loss of the rows that is the sum of all their results, each times one more input:
            gradients of auxiliary results come from it. None: they have none.
    """

    rows: Rows
    reduction: str
    reference: Callable[[list[Tensor], Tensor | None], Sequence[Tensor]]
    keeps: bool
    scales_late: bool
    combined: Rows | None = None


def plan_of(
    rows: Rows,
    reduction: str,
    memory: str | None,
    reference: Callable[[list[Tensor], Tensor | None], Sequence[Tensor]],
    hidden: Sequence[Tensor],
    combined: Rows | None = None,
) -> Plan:
    """The plan of a call with these options and hidden states."""
    keeps = reduction != "none" and memory != "low"
    half = any(layer_dtype(t) is torch.float16 for t in hidden)
    return Plan(rows, reduction, reference, keeps, half and reduction == "mean", combined)


def _total(rows: Tensor) -> Tensor:
    """The sum, in float64. On a CPU one after the other, so that no number of threads changes it."""
    wide = rows.double()
    return wide.cumsum(0)[-1] if rows.device.type == "cpu" else wide.sum()


class LinearLoss(torch.autograd.Function):
    """The loss of a call, and the auxiliary results of its rows."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, layers: int, *tensors: Any) -> Any:
        """tensors: the weight that the operator takes; what the loss of a row is multiplied by, one number
        or one for each row; what the sum is divided by; and the operands."""
        weight, factor, divisor, *operands = tensors
        ctx.plan, ctx.layers, ctx.wanted = plan, layers, ctx.needs_input_grad[5:]
        keeps = plan.keeps and not second_order.saves_through_hooks()
        wanted = [keeps and one for one in ctx.wanted]
        unit = factor if plan.scales_late else factor / divisor
        results, best, ctx.unit = run(
            plan.rows, Operands.of(operands, layers), weight, unit, wanted
        )
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        losses, *auxiliary = results.unbind()
        ctx.mark_non_differentiable(best, *(auxiliary if plan.combined is None else ()))
        value = losses * factor if plan.reduction == "none" else _total(losses * factor) / divisor
        return value.to(losses.dtype), best, *auxiliary

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> Any:
        weight, factor, divisor, *operands = ctx.saved_tensors
        plan, wanted = ctx.plan, ctx.wanted
        given = Operands.of(operands, ctx.layers)
        upstream, _, *more = upstreams
        upstreams = upstream, *more
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if any(g is not None and second_order.needs_reference(g) for g in upstreams):
            found = _reference_gradients(ctx, given, weight, factor / divisor, upstreams)
        elif any(g is not None for g in more):
            assert plan.combined is not None
            of_rows = _coefficients(upstreams, factor / divisor, given.first.shape[0])
            extended = replace(given, others=[*given.others, *of_rows])
            mask = [*wanted, *(False for _ in of_rows)]
            *_, gradients = run(plan.combined, extended, None, factor.new_ones(()), mask)
            gradients = gradients[: len(operands)]
            found = [_scaled(g, t) for g, t in zip(gradients, operands, strict=True)]
        elif upstream is not None and plan.reduction == "none":
            *_, gradients = run(plan.rows, given, weight, upstream * factor, wanted)
            found = [_scaled(g, t) for g, t in zip(gradients, operands, strict=True)]
        elif upstream is not None:
            unit, ctx.unit = ctx.unit, ()  # for another backward they are made again
            if all(g is None for g in unit):
                by = factor if plan.scales_late else factor / divisor
                *_, unit = run(plan.rows, given, weight, by, wanted)
            scale = upstream.double() / divisor if plan.scales_late else upstream
            found = [_scaled(g, t, scale) for g, t in zip(unit, operands, strict=True)]
        return None, None, None, None, None, *found


def _scaled(
    gradient: Tensor | None, like: Tensor | None, scale: Tensor | None = None
) -> Tensor | None:
    """A gradient times a number, in the dtype of its tensor. May write over the gradient."""
    if gradient is None or like is None:
        return None
    if scale is None:
        return gradient.to(like.dtype)
    if torch.compiler.is_compiling():
        return (gradient * scale).to(like.dtype)
    # To look at a number on a GPU is to wait for it.
    if scale.device.type == "cpu" and _dispatch.has_numbers() and scale.item() == 1:
        return gradient.to(like.dtype)
    if gradient.dtype is like.dtype:
        return gradient.mul_(scale)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=like.dtype))


def _coefficients(upstreams: Sequence[Tensor | None], factor: Tensor, rows: int) -> list[Tensor]:
    """What each result of each row counts."""
    upstream, *more = upstreams
    first = factor.new_zeros(()) if upstream is None else upstream * factor
    found = [first, *(first.new_zeros(()) if g is None else g for g in more)]
    return [t.expand(rows).contiguous() for t in found]


def _reference_gradients(
    ctx: Any,
    given: Operands,
    weight: Tensor | None,
    factor: Tensor,
    upstreams: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients in plain PyTorch, with a graph if autograd needs one."""
    plan, create_graph = ctx.plan, torch.is_grad_enabled()
    dtype = plan.rows.dtype

    def cast(t: Tensor | None) -> Any:
        if t is None or not t.is_floating_point():
            return t
        return t.to(torch.promote_types(t.dtype, dtype))

    with torch.enable_grad():
        # Views, since the outer backward runs the hooks of the tensors themselves.
        views = [None if t is None else t.view_as(t) for t in given.all]
        wide = Operands.of([*map(cast, views)], ctx.layers)
        logits = [F.linear(*layer) for layer in wide.layers]
        losses, *auxiliary = plan.reference(wide.inputs(plan.rows, logits), cast(weight))
        losses = losses * factor
        results = [losses if plan.reduction == "none" else losses.sum(), *auxiliary]
    pairs = [(r, g.to(r.dtype)) for r, g in zip(results, upstreams, strict=False) if g is not None]
    needed = [t for t, one in zip(views, ctx.wanted, strict=True) if one and t is not None]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            needed,
            [upstream for _, upstream in pairs],
            create_graph=create_graph,
            materialize_grads=True,
        )
    )
    return [next(found) if one else None for one in ctx.wanted]


def loss(
    plan: Plan,
    given: Operands,
    weight: Tensor | None,
    factor: Tensor | None = None,
    divisor: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The loss of a call, and the auxiliary results of its rows; see :meth:`LinearLoss.forward`."""
    device = given.first.device
    # Two tensors: a compiler does not trace a Function that takes one of them twice.
    factor, divisor = (
        torch.ones((), dtype=torch.float64, device=device) if t is None else t
        for t in (factor, divisor)
    )
    found: tuple[Tensor, ...] = LinearLoss.apply(
        plan, len(given.layers), weight, factor, divisor, *given.all
    )
    return found
