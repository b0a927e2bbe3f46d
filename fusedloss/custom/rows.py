"""The object that :func:`row_loss` makes: what the loss is, and how it is called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import _dispatch
from .building import CannotCompile
from .loss import CustomLoss, _shown
from .module import RowLossModule
from .prepare import prepared

if TYPE_CHECKING:
    from pathlib import Path

    from .checking import Report
    from .row_tracing import Kind, TracedRows
    from .walks import RowProgram

Auxiliary = dict[str, Tensor]


class RowLoss(CustomLoss):
    """A custom loss of rows, as :func:`row_loss` makes it."""

    _decorator = "row_loss"
    _options: ClassVar[dict[str, Any]] = {
        "reduction": "mean",
        "weight": None,
        "dim": -1,
        "ignore_index": -100,
    }
    _traced: TracedRows

    def __init__(self, function: Callable[..., Any]) -> None:
        from . import printing, row_tracing

        self._traced = row_tracing.trace_rows(function)
        super().__init__(function)
        self._kinds = self._traced.kinds
        self._rows = printing.torch_rows(self._traced)
        kinds = row_tracing.Kind
        self._element, self._label, self._per_row, self._per_class = kinds
        self._auxiliary = tuple(self._traced.auxiliary)

    @functools.cached_property
    def _program(self) -> RowProgram:
        from .levels import CannotLevel
        from .walks import row_program

        try:
            return row_program(self._traced)
        except CannotLevel as error:
            raise CannotCompile(str(error)) from error

    @functools.cached_property
    def _struct(self) -> str:
        from .row_printing import cpp

        return cpp(self._traced, self._program)

    @property
    def levels(self) -> str:
        """The walks over a row that a kernel makes on chip, as text."""
        from .levels import level_form

        return level_form(self._traced).text

    @property
    def passes(self) -> str:
        """What a kernel reads and writes in memory, if a row fits on chip, as text."""
        from .levels import level_form

        return level_form(self._traced).passes

    # ---- calls -----------------------------------------------------------------------------------

    # `self, /`: a parameter may have any name.
    def __call__(
        self,
        /,
        *inputs: Tensor,
        reduction: str = "mean",
        weight: Tensor | None = None,
        dim: int = -1,
        ignore_index: int = -100,
        **parameters: Any,
    ) -> Any:
        """The loss.

        Args:
            inputs: the tensors of the definition, in its order or as keywords. Those with a value for
                each class have one shape of any number of dimensions, of which ``dim`` is the classes. A
                label (int64) and what is one number for each row have that shape without ``dim``, and
                what is one number for each class has shape (C). float32, float64, bfloat16 and float16
                may be mixed, and the loss has the dtype that torch promotes all but the label to; the
                latter two are computed in float32.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean is over the rows that count, weighted
                if there is a weight: its divisor is the sum of their weights.
            weight: multiplies each row's loss: one number for each row.
            dim: the dimension of the classes.
            ignore_index: the label of rows that do not count: their loss and gradients are 0.
            parameters: the loss's parameters, numbers. A new number does not compile anything again.
                Parameters get no gradient.

        Returns:
            A 0-d tensor, or one number for each row for ``"none"``, float32 under autocast. A definition
            with auxiliary results gives a pair: the loss, and a dict of detached tensors with one number
            for each row.

        Raises:
            TypeError: a parameter is unknown, missing or not a number; an input is missing; an input or
                weight is not a tensor; the label is not int64; ignore_index is not an int.
            ValueError: reduction is none of the three; a shape does not fit the first input's; a
                parameter is beyond float64.
            IndexError: there is no dimension ``dim``; on the CPU, a label is no class.
        """
        if len(inputs) != self.inputs:
            inputs = self._by_name(inputs, parameters)
        return self._call(inputs, reduction, weight, dim, ignore_index, parameters, None)

    def _call(
        self,
        inputs: tuple[Tensor, ...],
        reduction: str,
        weight: Tensor | None,
        dim: int,
        ignore_index: int,
        parameters: Mapping[str, Any],
        prediction: Tensor | None,
    ) -> Any:
        values = self._default_values
        if parameters or values is None:
            values = self._values(parameters)
        number = self._reduction(reduction)
        options = {
            "reduction": reduction, "weight": weight, "dim": dim, "ignore_index": ignore_index
        }  # fmt: skip
        if not all(isinstance(t, Tensor) for t in inputs):
            self._refuse(inputs)
        if _dispatch._overridden(*inputs, weight):
            return _dispatch._offer(
                self, (*inputs, weight), inputs, {**options, **parameters},
                partial(
                    self._call, inputs, reduction, weight, dim, ignore_index, parameters, prediction
                ),
            )  # fmt: skip
        laid = self._laid_out(inputs, weight, dim, ignore_index)
        reason = self._why_not_fused(inputs, weight)
        backend = key = why_not = ""
        dtype: torch.dtype | str | None = None
        if reason is None:
            dtype = self._result_dtype(inputs, weight)
            if isinstance(dtype, str):
                reason = dtype
            else:
                backend, key, why_not = prepared(self._number, inputs[0].device.type)
                reason = None if backend else why_not
        if _dispatch._listening():
            _dispatch._report(self.__name__, reason, backend, *filter(None, (why_not,)))
        if reason is not None:
            return self._results(laid, weight, values, ignore_index, reduction)
        input, *others = map(_joined, laid)
        # A loss of one input has it as target too.
        target, *more = others or [input]
        result: Tensor = _dispatch.operator(backend)(
            input, target, weight, more, key, [*values], ignore_index, number, dtype, prediction
        )
        if not self._auxiliary:
            return result
        # The loss, and behind it the numbers of the rows.
        dim = min(1, input.dim() - 1)
        shape = (*input.shape[:dim], *input.shape[dim + 1 :])
        extras = result.detach()[1:].reshape(len(self._auxiliary), *shape)
        return result[0], dict(zip(self._auxiliary, extras, strict=True))

    def _why_not_fused(self, inputs: Sequence[Tensor], weight: Tensor | None) -> str | None:
        named = dict(zip(self._operands, inputs, strict=True))
        reason = _dispatch._why_not_fused(named, weight, gradients=len(inputs))
        if reason is not None:
            return reason
        for (name, t), kind in zip(named.items(), self._kinds, strict=True):
            if kind is self._per_class and t.requires_grad and torch.is_grad_enabled():
                return f"a gradient for {name} is wanted"
        return None

    def _result_dtype(self, inputs: Sequence[Tensor], weight: Tensor | None) -> torch.dtype | str:
        numbers = [
            None if k is self._label else t for t, k in zip(inputs, self._kinds, strict=True)
        ]
        kinds = ("any",) * len(inputs)
        return _dispatch._result_dtype(numbers, kinds, ((weight, "any"),), "inputs")

    # ---- shapes ----------------------------------------------------------------------------------

    def _laid_out(
        self, inputs: Sequence[Tensor], weight: Any, dim: Any, ignore_index: Any
    ) -> list[Tensor]:
        """The inputs with the classes in dimension 1, or 0 if it is the only one.

        Raises:
            TypeError, ValueError, IndexError: see :meth:`__call__`.
        """
        first = inputs[0]
        name, dims = self._operands[0], first.dim()
        if not isinstance(dim, int) or isinstance(dim, bool) or not -dims <= dim < dims:
            raise IndexError(
                f"{self.__name__}(): {name} of shape {tuple(first.shape)} has no dimension {dim!r}"
            )
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise TypeError(
                f"{self.__name__}(): ignore_index must be an int, not {_shown(ignore_index)}"
            )
        if first.shape[dim] == 0:
            raise ValueError(
                f"{self.__name__}(): {name} of shape {tuple(first.shape)} has no classes along dim={dim}"
            )
        for operand, t, kind in zip(self._operands, inputs, self._kinds, strict=True):
            if kind is self._label and t.dtype is not torch.int64:
                raise TypeError(
                    f"{self.__name__}(): {operand} is the index of a class, an int64, and not "
                    f"{t.dtype}: pass {operand}.long()"
                )
            self._check_shape(operand, t, kind, first, dim)
        if weight is not None:
            if not isinstance(weight, Tensor):
                raise TypeError(f"{self.__name__}(): weight must be a tensor, not {_shown(weight)}")
            self._check_shape("weight", weight, self._per_row, first, dim)
        moved = min(1, dims - 1)
        return [
            t.movedim(dim, moved) if kind is self._element else t
            for t, kind in zip(inputs, self._kinds, strict=True)
        ]

    def _check_shape(self, name: str, t: Tensor, kind: Kind, first: Tensor, dim: int) -> None:
        shape = tuple(first.shape)

        def fitting(dim: int) -> tuple[int, ...]:
            if kind is self._element:
                return shape
            rest = [*shape]
            size = rest.pop(dim)
            return (size,) if kind is self._per_class else tuple(rest)

        if tuple(t.shape) == fitting(dim):
            return
        others = [d for d in range(len(shape)) if tuple(t.shape) == fitting(d)]
        cure = f"; pass dim={others[0]} if they lie there" if others else ""
        raise ValueError(
            f"{self.__name__}(): {name} has shape {tuple(t.shape)}, not {fitting(dim)}: the classes of "
            f"{self._operands[0]} {shape} lie along dim={dim}{cure}"
        )

    # ---- plain PyTorch ---------------------------------------------------------------------------

    def reference(
        self,
        /,
        *inputs: Tensor,
        reduction: str = "mean",
        weight: Tensor | None = None,
        dim: int = -1,
        ignore_index: int = -100,
        **parameters: Any,
    ) -> Any:
        """The same loss in plain PyTorch, differentiable to any order. Tests compare the kernels with
        it, and calls that they do not cover use it. Arguments and errors: see :meth:`__call__`."""
        if len(inputs) != self.inputs:
            inputs = self._by_name(inputs, parameters)
        self._refuse(inputs)
        self._reduction(reduction)
        laid = self._laid_out(inputs, weight, dim, ignore_index)
        return self._results(laid, weight, self._values(parameters), ignore_index, reduction)

    def _reference(
        self,
        inputs: Sequence[Tensor],
        weight: Tensor | None,
        numbers: Sequence[float],
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        inputs = inputs[: self.inputs]
        found = self._results(inputs, weight, tuple(numbers), ignore_index, reduction)
        value: Tensor = found[0] if self._auxiliary else found
        return value

    def _results(
        self,
        inputs: Sequence[Tensor],
        weight: Tensor | None,
        values: tuple[float, ...],
        ignore_index: int,
        reduction: str,
    ) -> Any:
        """What a call returns, for inputs whose classes are dimension 1, or the only one."""
        kinds = dict(zip(self._kinds, inputs, strict=True))
        pairs = list(zip(inputs, self._kinds, strict=True))
        result, compute = self._dtypes([t for t, kind in pairs if kind is not self._label])
        counts = safe = inside = None
        if (label := kinds.get(self._label)) is not None:
            classes = inputs[0].shape[min(1, inputs[0].dim() - 1)]
            counts = label != ignore_index
            inside = (label >= 0) & (label < classes)
            self._check_label(label, classes, ignore_index)
            safe = torch.where(inside, label, 0).unsqueeze(-1)
        operands = []
        for t, kind in pairs:
            if kind is self._label:
                assert safe is not None
                operands.append(safe)
                continue
            wide = t.to(compute)
            if kind is self._element:
                wide = wide.movedim(min(1, t.dim() - 1), -1)
            elif kind is self._per_row:
                wide = wide.unsqueeze(-1)
            if counts is not None and kind is not self._per_class:
                # What does not count may be nan or infinite, and its slopes as well.
                wide = torch.where(counts.unsqueeze(-1), wide, 0.0)
            operands.append(wide)
        value, *more = (t.squeeze(-1) for t in self._rows(operands, values))
        # An input that the value does not depend on has a gradient as well, 0, like in the kernels.
        for t, kind in zip(operands, self._kinds, strict=True):
            if kind is not self._label:
                value = value + t[None][:0].sum()
        if counts is not None:
            assert inside is not None
            value = torch.where(counts, value * torch.where(inside, 1.0, torch.nan), 0.0)
            more = [torch.where(counts, t, 0.0) for t in more]
        wide_weight = None if weight is None else weight.to(compute)
        loss = _reduced(value, wide_weight, counts, reduction).to(result)
        if not self._auxiliary:
            return loss
        extras = (t.detach().to(result) for t in more)
        return loss, dict(zip(self._auxiliary, extras, strict=True))

    def _check_label(self, label: Tensor, classes: int, ignore_index: int) -> None:
        name = self._operands[self._kinds.index(self._label)]
        _dispatch.check_label(name, label, classes, ignore_index)

    # ---- modules, checks, plots ------------------------------------------------------------------

    def module(
        self,
        /,
        *,
        reduction: str = "mean",
        weight: Tensor | None = None,
        dim: int = -1,
        ignore_index: int = -100,
        **parameters: float,
    ) -> RowLossModule:
        """The loss as an :class:`torch.nn.Module` with these options; see :meth:`__call__`.

        Raises:
            TypeError, ValueError: as a call with these options does.
        """
        return RowLossModule(self, reduction, weight, dim, ignore_index, parameters)

    def check(self, /, **parameters: float) -> Report:
        """Looks for what makes a loss wrong or hard to train with: at random rows, at rows with an offset,
        at large, sure, equal and masked ones, and at one class.

        Args:
            parameters: numbers for the loss's parameters.

        Returns:
            A report that prints, and whose ``ok`` says whether value and gradient are right. It says as
            well how the formula was rewritten.
        """
        from .row_checking import check

        with torch.device("cpu"):
            return check(self, self._values(parameters))

    def plot(self, path: str | Path, /, **parameters: float) -> None:
        """Draws value and gradient for two classes, against the difference of their logits, and the
        gradient of each of many classes.

        Args:
            path: the picture's file; its suffix, such as ``.png`` or ``.svg``, is the format.
            parameters: numbers for the loss's parameters.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from .row_checking import plot

        with torch.device("cpu"):
            plot(self, self._values(parameters), path)


def _joined(t: Tensor) -> Tensor:
    """With dimensions behind the classes that step as one, which the kernels walk as one."""
    inner = range(2, t.dim() - 1)
    steps = all(t.stride(d) == t.stride(d + 1) * t.shape[d + 1] for d in inner)
    return t if steps else t.contiguous()


def _reduced(value: Tensor, weight: Tensor | None, counts: Tensor | None, reduction: str) -> Tensor:
    """The losses of rows, weighted and reduced; a mean is over the rows that count."""
    if weight is not None:
        if counts is not None:
            weight = torch.where(counts, weight, 0.0)
        value = value * weight
    if reduction == "none":
        return value
    total = value.sum()
    if reduction == "sum":
        return total
    if weight is not None:
        return total / weight.sum()
    return value.mean() if counts is None else total / counts.sum()


def row_loss(function: Callable[..., Any]) -> RowLoss:
    """Makes a loss of a row of logits from its maths: value and gradients come from one fused kernel.

    Args:
        function: takes up to eight tensors, and keyword parameters behind a ``*``. The tensors that have
            a value for each class come first; the others are marked as :class:`fusedloss.math.Label`,
            :class:`~fusedloss.math.PerRow` or :class:`~fusedloss.math.PerClass`. It returns the row's
            loss, by the functions of :mod:`fusedloss.math` and Python's operators; or that and a dict of
            up to four further numbers of the row, such as an entropy, to be logged. It is called once,
            with symbols.

    Returns:
        The loss, to be called like those of :mod:`fusedloss.functional`; see :meth:`RowLoss.__call__`.

    Raises:
        TypeError, ValueError: the function defines no such loss; the message says what to write
            instead.
    """
    return RowLoss(function)
