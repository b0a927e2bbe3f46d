"""Losses over rows behind linear layers; see ``_linear.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _dispatch, _linear
from .._linear import Kind, Layer, Operands, Plan, Rows
from .loss import _shown
from .prepare import prepared

if TYPE_CHECKING:
    from .rows import RowLoss

# What makes the logits of an input: hidden states, a weight and maybe a bias.
Parts = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


class LinearRowLoss:
    """A loss of rows behind linear layers, as :func:`linear` makes it."""

    def __init__(self, loss: RowLoss) -> None:
        self.loss = loss
        self.__name__ = f"linear({loss.__name__})"
        self.__doc__ = loss.__doc__

    def __repr__(self) -> str:
        return f"<fusedloss.linear of {self.loss!r}>"

    def __call__(
        self,
        hidden: Tensor,
        linear_weight: Tensor,
        /,
        *inputs: Tensor | Parts,
        bias: Tensor | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        logits_dtype: torch.dtype | None = None,
        drop_ignored: bool | None = None,
        memory: str | None = None,
        **parameters: Any,
    ) -> Any:
        """The loss of the logits ``hidden @ linear_weight.T + bias``, which are never all in memory.

        Args:
            hidden: hidden states of shape (..., D).
            linear_weight: the layer's weight of shape (C, D).
            inputs: the other tensors of the definition, in its order. Instead of logits of shape (..., C)
                there may be a pair ``(hidden, linear_weight)``, or a triple with a bias, of any D: logits
                of a teacher, say. A label (int64) and what is one number for each row have shape (...),
                and what is one number for each class has shape (C).
            bias: the layer's bias of shape (C), or None.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``; see :meth:`RowLoss.__call__`.
            weight: multiplies each row's loss: one number for each row.
            ignore_index: the label of rows that do not count.
            logits_dtype: the dtype of the logits; None: that of the hidden states.
            drop_ignored: whether rows with the label ``ignore_index`` are left out before the product.
                None: on a CPU, since a GPU would have to wait for their number.
            memory: ``"low"`` makes the logits once more in backward instead of keeping gradients from
                forward to backward.
            parameters: the loss's parameters, numbers.

        Returns:
            What :meth:`RowLoss.__call__` returns for the logits.

        Raises:
            TypeError, ValueError, IndexError: an argument does not fit; see :meth:`RowLoss.__call__`.
        """
        layers: list[Any] = [(hidden, linear_weight, bias), *inputs]
        options = {
            "reduction": reduction, "weight": weight, "ignore_index": ignore_index,
            "logits_dtype": logits_dtype, "drop_ignored": drop_ignored, "memory": memory,
        }  # fmt: skip
        return _Call(self, layers, options, parameters).run()


class _Call:
    """One call: what is a layer's is a triple, and any other input a tensor."""

    def __init__(
        self,
        of: LinearRowLoss,
        inputs: list[Any],
        options: dict[str, Any],
        parameters: Mapping[str, Any],
    ) -> None:
        self.of, self.loss, self.options = of, of.loss, options
        self.parameters = parameters
        self.values = self.loss._values(parameters)
        self.loss._reduction(options["reduction"])
        names, element = self.loss._operands, self.loss._element
        if len(inputs) != len(names):
            raise TypeError(
                f"{of.__name__}() takes {', '.join(names)}: {len(names)} inputs, not {len(inputs)}"
            )
        self.inputs: list[Any] = []
        for name, given, kind in zip(names, inputs, self.loss._kinds, strict=True):
            if isinstance(given, tuple) and kind is element and len(given) in (2, 3):
                self.inputs.append((*given, None)[:3])
                self._check_layer(name, *self.inputs[-1])
            elif isinstance(given, Tensor):
                self.inputs.append(given)
            else:
                pair = " or a pair (hidden, linear_weight)" if kind is element else ""
                raise TypeError(
                    f"{of.__name__}(): {name} must be a tensor{pair}, not {_shown(given)}"
                )
        if options["memory"] not in (None, "low"):
            raise ValueError(
                f"{of.__name__}(): memory must be None or 'low', not {options['memory']!r}"
            )

    def _check_layer(self, name: str, hidden: Any, weight: Any, bias: Any) -> None:
        for what, t in {"hidden": hidden, "linear_weight": weight, "bias": bias}.items():
            if not isinstance(t, Tensor) and not (what == "bias" and t is None):
                raise TypeError(
                    f"{self.of.__name__}(): {what} of {name} must be a tensor, not {_shown(t)}"
                )
        fits = hidden.dim() > 0 and weight.dim() == 2 and hidden.shape[-1] == weight.shape[1]
        if not fits or (bias is not None and bias.shape != weight.shape[:1]):
            shapes = [tuple(t.shape) for t in (hidden, weight, bias) if t is not None]
            raise ValueError(
                f"{self.of.__name__}(): {name} is made of hidden (..., D), linear_weight (C, D) and bias "
                f"(C), not of {' and '.join(map(str, shapes))}"
            )

    @property
    def layers(self) -> list[Any]:
        return [given for given in self.inputs if isinstance(given, tuple)]

    def run(self) -> Any:
        # Stand for the logits: their shape and dtype, without memory.
        logits = [_stand_in(*given) if isinstance(given, tuple) else given for given in self.inputs]
        weight = self.options["weight"]
        self.loss._laid_out(logits, weight, -1, self.options["ignore_index"])
        tensors = [
            t for given in self.inputs for t in (given if isinstance(given, tuple) else [given])
        ]
        reason = self._why_not_fused(tensors, logits)
        plan: Plan | str | None = None
        if reason is None:
            plan = self._plan(logits)
            reason = plan if isinstance(plan, str) else None
        if _dispatch._listening():
            backend = plan.rows.backend if isinstance(plan, Plan) else ""
            _dispatch._report(self.of.__name__, reason, backend)
        if not isinstance(plan, Plan):
            full = [
                F.linear(*given) if isinstance(given, tuple) else given for given in self.inputs
            ]
            names = ("reduction", "weight", "ignore_index")
            options = {name: self.options[name] for name in names}
            return self.loss.reference(*full, **options, **self.parameters)
        return self._fused(plan, logits)

    def _why_not_fused(self, tensors: list[Any], logits: list[Tensor]) -> str | None:
        named = {f"input {i}": t for i, t in enumerate(tensors) if t is not None}
        weight = self.options["weight"]
        reason = _dispatch._why_not_fused(named, weight, gradients=len(named))
        if reason is None and logits[0].shape[-1] > 1 << 24:
            reason = f"{logits[0].shape[-1]} classes"
        for t, kind in zip(self.inputs, self.loss._kinds, strict=True):
            if kind is self.loss._per_class and t.requires_grad and torch.is_grad_enabled():
                reason = reason or "a gradient for a number of each class is wanted"
        for layer in self.layers:
            reason = reason or _linear.dtypes_differ(*layer)
        return reason

    def _plan(self, logits: list[Tensor]) -> Plan | str:
        loss, options = self.loss, self.options
        result = loss._result_dtype(logits, options["weight"])
        if isinstance(result, str):
            return result
        first = logits[0]
        backend, key, why_not = prepared(loss._number, first.device.type)
        if not backend:
            return why_not
        rows, classes = first[..., 0].numel(), first.shape[-1]
        dtype = options["logits_dtype"] or first.dtype
        chunk = _linear.chunk_of(rows, classes, dtype, first.device.type)
        places = [i for i, given in enumerate(self.inputs) if isinstance(given, tuple)]
        spec = Rows(
            backend,
            key,
            tuple(self.values),
            options["ignore_index"],
            torch.float64 if result is torch.float64 else torch.float32,
            tuple(Kind[kind.name] for kind in loss._kinds),
            tuple(places),
            len(loss._auxiliary),
            options["logits_dtype"],
            chunk,
            -(-rows // chunk) > _linear.MOST_NARROW,
        )

        def reference(inputs: list[Tensor], weight: Tensor | None) -> list[Tensor]:
            return [loss._reference(inputs, weight, self.values, spec.ignore_index, "none")]

        hidden = [layer[0] for layer in self.layers]
        return _linear.plan_of(spec, options["reduction"], options["memory"], reference, hidden)

    def _fused(self, plan: Plan, logits: list[Tensor]) -> Any:
        shape, loss = logits[0].shape[:-1], self.loss
        kinds = dict(zip(loss._kinds, self.inputs, strict=True))
        label, weight = kinds.get(loss._label), self.options["weight"]
        ignored = self.options["ignore_index"]
        kept = None
        if label is not None:
            loss._check_label(label, logits[0].shape[-1], ignored)
            kept = _linear.rows_that_count(label.reshape(-1), ignored, self.options["drop_ignored"])

        def rows_of(t: Tensor, width: tuple[int, ...] = ()) -> Tensor:
            flat = t.reshape(-1, *width)
            return flat if kept is None else flat.index_select(0, kept)

        layers, others = [], []
        for given, kind in zip(self.inputs, loss._kinds, strict=True):
            if isinstance(given, tuple):
                hidden, *of_layer = given
                layers.append(Layer(rows_of(hidden, hidden.shape[-1:]), *of_layer).cast())
            elif kind is loss._per_class:
                others.append(given)
            else:
                others.append(rows_of(given, given.shape[-1:] if kind is loss._element else ()))
        of_rows = None if weight is None else rows_of(weight)
        operands = Operands(layers, others)
        divisor = self._divisor(of_rows, label, kept)
        value, _, *auxiliary = _linear.loss(plan, operands, of_rows, None, divisor)
        result = loss._result_dtype(logits, weight)
        found = [_linear.spread(t, kept, shape) for t in auxiliary]
        if self.options["reduction"] == "none":
            value = _linear.spread(value, kept, shape)
        value = value.to(result)
        if not loss._auxiliary:
            return value
        return value, {name: t.to(result) for name, t in zip(loss._auxiliary, found, strict=True)}

    def _divisor(
        self, weight: Tensor | None, label: Tensor | None, kept: Tensor | None
    ) -> Tensor | None:
        if self.options["reduction"] != "mean":
            return None
        first: Tensor = self.inputs[0][0]
        if label is None:
            if weight is not None:
                return weight.sum(dtype=torch.float64)
            rows = first[..., 0].numel()
            return torch.full((), rows, dtype=torch.float64, device=first.device)
        counts = (label != self.options["ignore_index"]).reshape(-1)
        counted: Tensor = counts
        if weight is not None:
            counted = weight if kept is not None else weight * counts
        return counted.sum(dtype=torch.float64)


def _stand_in(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty((), dtype=_linear.layer_dtype(hidden)).expand(
        *hidden.shape[:-1], weight.shape[0]
    )


def linear(loss: RowLoss) -> LinearRowLoss:
    """Makes a row loss one of hidden states: the logits come from a linear layer, some rows at a time, and
    are never all in memory.

    Args:
        loss: what :func:`row_loss` has made.

    Returns:
        The loss, to be called with hidden states and the layer's weight; see
        :meth:`LinearRowLoss.__call__`.

    Raises:
        TypeError: ``loss`` is no row loss.
        ValueError: a parameter of it has the name of an option of the call.
    """
    from .rows import RowLoss

    if not isinstance(loss, RowLoss):
        raise TypeError(f"fusedloss.linear takes what fusedloss.row_loss makes, not {_shown(loss)}")
    taken = {"bias", "logits_dtype", "drop_ignored", "memory"}.intersection(loss._names)
    if taken:
        raise ValueError(
            f"fusedloss.linear: {loss.__name__} has a parameter {min(taken)!r}, which is an option of "
            "the call: give it another name"
        )
    return LinearRowLoss(loss)
