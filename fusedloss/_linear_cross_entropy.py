"""Cross-entropy behind a linear layer, and of logits with the options of language models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _caller, _dispatch, _linear, backends, reference
from ._linear import Kind, Layer, Operands, Plan, Rows

OUTPUTS = ("lse", "logprob", "entropy", "correct", "argmax", "count")
_OF_KERNEL = OUTPUTS[:4]
_DIFFERENTIABLE = OUTPUTS[:3]

Result = Tensor | tuple[Tensor, dict[str, Tensor]]


@dataclass(eq=False)
class Call:
    """The arguments of :func:`fusedloss.functional.linear_cross_entropy` by name. ``cross_entropy`` has
    no layer, and its input is the logits."""

    input: Tensor
    target: Tensor
    linear_weight: Tensor | None = None
    linear_bias: Tensor | None = None
    weight: Tensor | None = None
    reduction: str = "mean"
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    options: Any = None
    num_items: Any = None
    token_weight: Tensor | None = None
    shift: int = 0
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    outputs: Sequence[str] = ()
    logits_dtype: torch.dtype | None = None
    drop_ignored: bool | None = None
    memory: str | None = None

    @property
    def name(self) -> str:
        return "cross_entropy" if self.linear_weight is None else "linear_cross_entropy"

    @property
    def ignored(self) -> int:
        return -100 if self.ignore_index is None else self.ignore_index

    @property
    def classes(self) -> int:
        if self.linear_weight is not None:
            return self.linear_weight.shape[0]
        return self.input.shape[min(1, self.input.dim() - 1)]

    @property
    def for_tokens(self) -> bool:
        """Whether there is an option that torch's function lacks, and that changes the result."""
        return (
            self.num_items is not None
            or self.token_weight is not None
            or self.shift != 0
            or self.needs_formula
            or len(self.outputs) > 0
        )

    @property
    def needs_formula(self) -> bool:
        """Whether the built-in kernel computes another loss."""
        return self.logit_scale != 1 or self.softcap is not None or self.z_loss != 0

    def check(self) -> None:
        """
        Raises:
            TypeError, ValueError: an option does not fit.
        """
        name, target = self.name, self.target
        if isinstance(self.linear_weight, Tensor) and self.linear_weight.numel() == 0:
            raise ValueError(
                f"{name}(): linear_weight of shape {tuple(self.linear_weight.shape)} has no elements: a "
                "parameter that ZeRO-3 has partitioned must be gathered for the call"
            )
        if self.reduction not in reference.REDUCTIONS:
            raise ValueError(f"{self.reduction} is not a valid value for reduction")
        for option in ("logit_scale", "z_loss", "softcap"):
            value = getattr(self, option)
            if value is None and option == "softcap":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name}(): {option} must be a number, not {value!r}")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"{name}(): softcap must be a positive number, not {self.softcap}")
        if isinstance(self.outputs, str) or not set(self.outputs).issubset(OUTPUTS):
            raise ValueError(
                f"{name}(): outputs must be some of {', '.join(OUTPUTS)}, not {self.outputs!r}"
            )
        if self.memory not in (None, "low"):
            raise ValueError(f"{name}(): memory must be None or 'low', not {self.memory!r}")
        if self.for_tokens and target.dtype is not torch.int64:
            raise TypeError(
                f"{name}(): class probabilities ({target.dtype}) have none of the options for tokens; "
                "with class indices the target is an int64"
            )
        if not isinstance(self.shift, int) or self.shift < 0:
            raise ValueError(f"{name}(): shift must be an int of at least 0, not {self.shift!r}")
        if self.shift and target.dim() == 0:
            raise ValueError(f"{name}(): shift moves the target's last dimension, and it has none")
        if self.token_weight is not None and self.token_weight.shape != target.shape:
            raise ValueError(
                f"{name}(): token_weight has shape {tuple(self.token_weight.shape)}, and target "
                f"{tuple(target.shape)}"
            )
        if self.num_items is not None:
            if self.reduction != "mean":
                raise ValueError(
                    f"{name}(): num_items is what a mean divides by, and reduction is "
                    f"{self.reduction!r}"
                )
            items = self.num_items
            one = (
                items.numel() == 1 if isinstance(items, Tensor) else isinstance(items, int | float)
            )
            if not one or isinstance(items, bool):
                raise TypeError(f"{name}(): num_items must be one number, not {self.num_items!r}")

    def shifted(self) -> Call:
        """The same call with each position's target at the position, which is that many before it."""
        n = self.shift
        if n == 0:
            return self

        def moved(t: Tensor, fill: float) -> Tensor:
            ahead = t[..., n:]
            return torch.cat(
                [ahead, t.new_full((*t.shape[:-1], t.shape[-1] - ahead.shape[-1]), fill)], -1
            )

        weight = None if self.token_weight is None else moved(self.token_weight, 0)
        return replace(self, shift=0, target=moved(self.target, self.ignored), token_weight=weight)


@dataclass(frozen=True)
class Formula:
    """What the formula of a row has: what is left out costs nothing. See _token_losses.py.

    Attributes:
        parameters: some of label_smoothing, logit_scale, softcap and z_loss.
        weighted: whether each class has a weight.
        outputs: the further results of a row.
        combined: whether the loss is the sum of all results, each times one more number of the row.
    """

    parameters: tuple[str, ...]
    weighted: bool
    outputs: tuple[str, ...]
    combined: bool = False

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The names of these further numbers of a row."""
        return tuple(f"of_{name}" for name in ("loss", *self.outputs)) if self.combined else ()


def run(call: Call) -> Result:
    """See :func:`fusedloss.functional.linear_cross_entropy`."""
    call.check()
    call = call.shifted()
    tensors = call.input, call.linear_weight, call.target, call.linear_bias, call.weight
    if call.linear_weight is not None and not call.for_tokens and _dispatch._overridden(*tensors):
        options = {
            name: getattr(call, name)
            for name in ("linear_bias", "weight", "reduction", "ignore_index", "label_smoothing", "options")
        }  # fmt: skip
        function = _dispatch.PUBLIC["linear_cross_entropy"]
        return _dispatch._offer(function, tensors, tensors[:3], options, partial(run, call))  # type: ignore[no-any-return]
    reason = _why_not_fused(call)
    if reason is None:
        if call.linear_weight is None and not call.outputs:
            return _loss_of_logits(call)
        plan = _prepared(call)
        if not isinstance(plan, str):
            if _dispatch._listening():
                _dispatch._report(call.name, None, plan.rows.backend)
            return _fused(call, plan)
        reason = plan
    if _dispatch._listening():
        _dispatch._report(call.name, reason)
    return _plain(call)


# ---- which path ----------------------------------------------------------------------------------


def _why_not_fused(call: Call) -> str | None:
    layer = {"linear_weight": call.linear_weight, "linear_bias": call.linear_bias}
    named = {"input": call.input, **{k: t for k, t in layer.items() if t is not None}}
    gradients = len(named)
    named["target"] = call.target
    reason = _dispatch._why_not_fused(named, call.weight, call.token_weight, gradients=gradients)
    if reason is not None:
        return reason
    input, linear_weight, target = call.input, call.linear_weight, call.target
    shape = tuple(input.shape)
    if linear_weight is not None:
        if linear_weight.dim() != 2:
            return f"linear_weight has shape {tuple(linear_weight.shape)}"
        if input.dim() == 0 or shape[-1] != linear_weight.shape[1]:
            return f"shapes {shape} and {tuple(linear_weight.shape)}"
        shape = (*shape[:-1], linear_weight.shape[0])
        bias = call.linear_bias
        if bias is not None and bias.shape != shape[-1:]:
            return f"linear_bias has shape {tuple(bias.shape)}"
        differ = _linear.dtypes_differ(input, linear_weight, bias)
        if differ is not None:
            return differ
        classes = shape[-1:]
        of_rows = shape[:-1]
        # Only hidden states with labels have more than one leading dimension.
        if target.is_floating_point() and (len(shape) > 2 or target.shape != shape):
            return f"shapes {shape} and {tuple(target.shape)}"
    else:
        classes = shape[1:2] if len(shape) > 1 else shape
        of_rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    if input.dtype not in _dispatch._FLOATING:
        return f"dtype {input.dtype} has no fused kernel"
    if classes[0] == 0 or classes[0] > 1 << 24:
        return f"{classes[0]} classes"
    if target.is_floating_point():
        if call.ignore_index is not None:
            return "ignore_index is given with class probabilities"
        if target.dtype not in (input.dtype, torch.float32):
            return f"dtypes {input.dtype} and {target.dtype}"
    elif target.dtype is not torch.int64 or target.shape != of_rows:
        return f"a target of shape {tuple(target.shape)} and dtype {target.dtype}"
    if call.weight is not None and call.weight.shape != classes:
        return f"a weight of shape {tuple(call.weight.shape)}"
    if not 0 <= call.label_smoothing <= 1:
        return f"label_smoothing {call.label_smoothing}"
    if not -(1 << 63) <= call.ignored < 1 << 63:
        return f"ignore_index {call.ignored}"
    return None


def _result_dtype(call: Call) -> torch.dtype:
    input = call.input
    autocast = torch.is_autocast_enabled(input.device.type) and input.dtype is not torch.float64
    return torch.float32 if autocast else input.dtype


def _formula(call: Call) -> Formula:
    off = {"label_smoothing": 0, "logit_scale": 1, "softcap": None, "z_loss": 0}
    parameters = tuple(name for name, value in off.items() if getattr(call, name) != value)
    outputs = tuple(name for name in _OF_KERNEL if name in call.outputs)
    return Formula(parameters, call.weight is not None, outputs)


@_caller.constant_when_traced
def _prepared_formula(device: str, *formula: Any) -> tuple[str, str, str]:
    """See custom/prepare.py. The module imports SymPy."""
    tokens = import_module("fusedloss._token_losses")
    found: tuple[str, str, str] = tokens.prepared(Formula(*formula), device)
    return found


def _rows(call: Call, formula: Formula | None, chunk: int, wide: bool) -> Rows | str:
    """How the rows' results are computed, or why they are not. No formula: by the built-in kernel."""
    device, auxiliary = call.input.device.type, 0
    kinds: tuple[Kind, ...] = Kind.ELEMENT, Kind.LABEL
    parameters: tuple[float, ...] = (float(call.label_smoothing),)
    backend, key = backends.fused_on[device], "cross_entropy"
    if formula is not None:
        backend, key, why_not = _prepared_formula(
            device, formula.parameters, formula.weighted, formula.outputs, formula.combined
        )
        if not backend:
            return why_not
        parameters = tuple(float(getattr(call, name)) for name in formula.parameters)
        kinds += (Kind.PER_CLASS,) * formula.weighted + (Kind.PER_ROW,) * len(formula.coefficients)
        auxiliary = 0 if formula.combined else len(formula.outputs)
    elif call.target.is_floating_point():
        kinds = Kind.ELEMENT, Kind.ELEMENT
    return Rows(
        backend=backend,
        loss=key,
        parameters=parameters,
        ignore_index=call.ignored,
        dtype=torch.float64 if call.input.dtype is torch.float64 else torch.float32,
        kinds=kinds,
        places=() if call.linear_weight is None else (0,),
        auxiliary=auxiliary,
        logits=call.logits_dtype,
        chunk=chunk,
        wide=wide,
        argmax="argmax" in call.outputs,
    )


def _prepared(call: Call) -> Plan | str:
    input, target = call.input, call.target
    rows = max(1, target.numel() // (call.classes if target.is_floating_point() else 1))
    dtype = call.logits_dtype or _linear.layer_dtype(input)
    chunk = rows
    if call.linear_weight is not None:
        chunk = _linear.chunk_of(rows, call.classes, dtype, input.device.type)
        if (asked := getattr(call.options, "batch_chunk_size", None)) is not None:
            chunk = asked
    policy = getattr(call.options, "acc_policy", "auto")
    chunks = -(-rows // chunk)
    wide = policy != "compact" and chunks > (1 if policy == "accurate" else _linear.MOST_NARROW)
    formula = _formula(call)
    if not (call.needs_formula or formula.outputs):
        return _plan(call, _rows(call, None, chunk, wide), None)
    combined = None
    if any(name in _DIFFERENTIABLE for name in formula.outputs) and torch.is_grad_enabled():
        combined = _rows(call, replace(formula, combined=True), chunk, wide)
    return _plan(call, _rows(call, formula, chunk, wide), combined)


def _plan(call: Call, rows: Rows | str, combined: Rows | str | None) -> Plan | str:
    for found in (rows, combined):
        if isinstance(found, str):
            return found
    assert isinstance(rows, Rows)
    assert not isinstance(combined, str)
    options = call.reduction, call.memory, _reference(call)
    return _linear.plan_of(rows, *options, [call.input], combined)


def _reference(call: Call) -> Any:
    """All results of the rows in plain PyTorch."""
    outputs = [name for name in _OF_KERNEL if name in call.outputs]
    options = call.label_smoothing, call.logit_scale, call.softcap, call.z_loss

    def results(inputs: list[Tensor], weight: Tensor | None) -> list[Tensor]:
        logits, target, *more = inputs
        weight = more[0] if more else weight
        if target.is_floating_point():
            smoothing = call.label_smoothing
            return [
                F.cross_entropy(logits, target, weight, reduction="none", label_smoothing=smoothing)
            ]
        found = reference.token_cross_entropy(logits, target, weight, call.ignored, *options)
        return [found[name] for name in ("loss", *outputs)]

    return results


# ---- fused ---------------------------------------------------------------------------------------


def _counted(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """What each row's loss is multiplied by, and what the sum is divided by; None: 1."""
    factor = None if call.token_weight is None else call.token_weight.reshape(-1).double()
    if call.reduction != "mean":
        return factor, None
    if call.num_items is not None:
        return factor, torch.as_tensor(
            call.num_items, dtype=torch.float64, device=call.target.device
        ).reshape(())
    label = call.target.reshape(-1)
    if label.is_floating_point():
        rows = 1 if call.target.dim() == 1 else call.target.shape[0]
        return None, torch.full((), rows, dtype=torch.float64, device=label.device)
    counts = label != call.ignored
    weights = counts.double() if factor is None else counts * factor
    if call.weight is not None:
        inside = (label >= 0) & (label < call.weight.shape[0])
        weights = weights * call.weight.double()[torch.where(inside, label, 0)]
    return factor, weights.sum()


def _loss_of_logits(call: Call) -> Tensor:
    """Through the loss's own call, which takes one pass and says which path it takes."""
    tokens = import_module("fusedloss._token_losses")
    formula = _formula(call)
    _dispatch.check_label("target", call.target, call.classes, call.ignored)
    factor, divisor = _counted(call)
    weight = factor
    if divisor is not None:
        ones = torch.ones(call.target.numel(), dtype=torch.float64, device=call.input.device)
        weight = (ones if factor is None else factor) / divisor
    if weight is not None:
        weight = weight.to(torch.promote_types(call.input.dtype, torch.float32))
        weight = weight.reshape(call.target.shape)
    tensors = (call.input, call.target, *((call.weight,) if formula.weighted else ()))
    parameters = {name: float(getattr(call, name)) for name in formula.parameters}
    return tokens.defined(formula)(  # type: ignore[no-any-return]
        *tensors,
        reduction="none" if call.reduction == "none" else "sum",
        weight=weight,
        dim=1 if call.input.dim() > 1 else 0,
        ignore_index=call.ignored,
        **parameters,
    )


def _fused(call: Call, plan: Plan) -> Result:
    factor, divisor = _counted(call)
    target, shape = call.target, call.target.shape
    if target.is_floating_point():
        shape = shape[:-1]
        labels = target.reshape(-1, target.shape[-1])
    else:
        _dispatch.check_label("target", target, call.classes, call.ignored)
        labels = target.reshape(-1)
    input = call.input
    if call.linear_weight is None and input.dim() > 1:
        input = input.movedim(1, -1)
    rows = input.reshape(-1, input.shape[-1])
    kept = None
    if call.linear_weight is not None and not target.is_floating_point():
        kept = _linear.rows_that_count(labels, call.ignored, call.drop_ignored)
    if kept is not None:
        rows, labels = rows.index_select(0, kept), labels.index_select(0, kept)
        factor = None if factor is None else factor.index_select(0, kept)
    others: list[Any] = [labels]
    weight = call.weight
    if Kind.PER_CLASS in plan.rows.kinds:
        others, weight = [labels, call.weight], None
    layers = []
    if call.linear_weight is None:
        others = [rows, *others]
    else:
        layers.append(Layer(rows, call.linear_weight, call.linear_bias).cast())
    given = Operands(layers, others)
    loss, best, *auxiliary = _linear.loss(plan, given, weight, factor, divisor)
    if call.reduction == "none":
        loss = _linear.spread(loss, kept, shape)
    if call.outputs:
        best, *auxiliary = (_linear.spread(t, kept, shape) for t in (best, *auxiliary))
    return _results(call, loss.to(_result_dtype(call)), best, auxiliary)


def _results(call: Call, loss: Tensor, best: Tensor, auxiliary: Sequence[Tensor]) -> Result:
    if not call.outputs:
        return loss
    written = (name for name in _OF_KERNEL if name in call.outputs)
    found = dict(zip(written, auxiliary, strict=True))
    counts = (call.target != call.ignored).reshape(-1)
    found["argmax"] = torch.where(counts, best.reshape(-1), 0)
    found = {name: t.reshape(call.target.shape) for name, t in found.items()}
    if "count" in call.outputs:
        found["count"] = counts.sum()
    return loss, {
        name: found[name] if name in _DIFFERENTIABLE else found[name].detach()
        for name in call.outputs
    }


# ---- plain PyTorch -------------------------------------------------------------------------------


def _plain(call: Call) -> Result:
    """With all logits at once."""
    if not call.for_tokens and call.linear_weight is not None:
        input, target = call.input, call.target
        if input.dim() > 2 and target.shape == input.shape[:-1]:
            flat = replace(call, input=input.flatten(0, -2), target=target.flatten())
            value = _plain(flat)
            assert isinstance(value, Tensor)
            return value.reshape(target.shape) if call.reduction == "none" else value
        return reference.linear_cross_entropy(
            input,
            call.linear_weight,
            target,
            linear_bias=call.linear_bias,
            weight=call.weight,
            reduction=call.reduction,
            ignore_index=call.ignore_index,
            label_smoothing=call.label_smoothing,
        )
    factor, divisor = _counted(call)
    if call.linear_weight is not None:
        logits = F.linear(call.input, call.linear_weight, call.linear_bias)
    else:
        logits = call.input.movedim(1, -1) if call.input.dim() > 1 else call.input
    if logits.shape[:-1] != call.target.shape:
        raise ValueError(
            f"{call.name}(): target has shape {tuple(call.target.shape)}, and the logits "
            f"{tuple(logits.shape)}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    if wide.dim() == 1:
        wide = wide[None]
    results = reference.token_cross_entropy(
        wide,
        call.target.reshape(-1),
        call.weight,
        call.ignored,
        call.label_smoothing,
        call.logit_scale,
        call.softcap,
        call.z_loss,
    )
    loss = results["loss"] if factor is None else results["loss"] * factor.to(wide.dtype)
    if call.reduction == "none":
        loss = loss.reshape(call.target.shape)
    else:
        loss = loss.sum() if divisor is None else loss.sum() / divisor.to(wide.dtype)
    names = [name for name in _OF_KERNEL if name in call.outputs]
    return _results(
        call, loss.to(_result_dtype(call)), results["argmax"], [results[n] for n in names]
    )
