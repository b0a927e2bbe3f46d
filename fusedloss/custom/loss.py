"""The object that :func:`pointwise_loss` makes, and what it shares with row losses: what the loss is, and
how it is called."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from .. import _caller, _dispatch, backends
from ..reference import REDUCTIONS, reduced
from .module import PointwiseLossModule
from .prepare import define, prepared

if TYPE_CHECKING:
    from pathlib import Path

    from .checking import Report
    from .tracing import Definition, Traced

_C: Any = backends.extension
# The names of the inputs in formulas. (Here, since it takes no SymPy to call a loss.)
INPUTS = ("input", "target", *(f"input{i}" for i in range(3, 9)))


def as_float(loss: str, name: str, value: Any) -> float:
    """A number of a loss, as kernels take it."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{loss}: {name} is beyond the largest float64, 1.8e308") from None


def _shown(value: Any) -> str:
    """A value in a message."""
    if not isinstance(value, Tensor):
        return reprlib.repr(value)
    if value.requires_grad:
        return (
            "a tensor that requires a gradient, which parameters do not get: to learn it, expand it to "
            "input's shape and pass it as input or target"
        )
    if value.numel() == 1:
        return "a tensor of one number: pass tensor.item()"
    return f"a tensor of shape {tuple(value.shape)}: a parameter is one number for the whole call"


class CustomLoss:
    """What custom losses of elements and of rows have in common."""

    _decorator: ClassVar[str]
    _options: ClassVar[dict[str, Any]]  # of each call, with their defaults
    _aliases: ClassVar[tuple[str, ...]] = ()  # keywords that the inputs have beside their names

    _traced: Definition
    _struct: Any  # of the loss in C++; a text

    def __init__(self, function: Callable[..., Any]) -> None:
        from . import tracing

        traced = self._traced
        # Its name in the compiled operators, by type of device, for the short way.
        self._keys: dict[str, str] = {}
        self._prepared: dict[tuple[str, tuple[str, ...]], tuple[str, str, str]] = {}
        self._number = define(self)
        self.inputs = len(traced.inputs)
        named = self._aliases[:2]
        self._operands = (*named, *traced.arguments[len(named) :])[: self.inputs]
        self._names = tuple(traced.parameters)
        self._defaults = tuple(traced.defaults.get(name) for name in self._names)
        self._default_values = self._values({}) if None not in self._defaults else None
        self.function = function
        self.__wrapped__ = function
        definition = tracing.definition(function)
        self.__name__: str = traced.name
        self.__qualname__: str = getattr(definition, "__qualname__", self.__name__)
        self.__module__: str = getattr(definition, "__module__", "")
        self.__doc__ = definition.__doc__
        arguments = [*inspect.signature(function).parameters.values()]
        for name, default in self._options.items():
            kind = inspect.Parameter.KEYWORD_ONLY
            arguments.append(inspect.Parameter(name, kind, default=default))
        self.__signature__ = inspect.Signature(arguments)

    # ---- the definition --------------------------------------------------------------------------

    def __repr__(self) -> str:
        given = "".join(
            f", {name}" if default is None else f", {name}={default:g}"
            for name, default in zip(self._names, self._defaults, strict=True)
        )
        head = f"{self.__name__}({', '.join(self._operands)}{', *' if given else ''}{given})"
        return f"<fusedloss.{self._decorator} {head} = {self.formula}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickled by name, like a function, if that name leads to it; else by its function."""
        try:
            found = operator.attrgetter(self.__qualname__)(sys.modules.get(self.__module__))
        except AttributeError:
            found = None
        return self.__qualname__ if found is self else (type(self), (self.function,))

    def __deepcopy__(self, memo: Any = None) -> CustomLoss:
        return self  # like a function

    __copy__ = __deepcopy__

    @property
    def formula(self) -> str:
        """The loss of one element, or of one row, as text."""
        return self._traced.text(self._traced.value)

    # ---- arguments -------------------------------------------------------------------------------

    def _values(self, parameters: Mapping[str, Any]) -> tuple[float, ...]:
        """The numbers of the parameters, in order."""
        values = []
        for name, default in zip(self._names, self._defaults, strict=True):
            value = parameters.get(name, default)
            if isinstance(value, bool) or not isinstance(value, Real):
                if value is None and name not in parameters:
                    raise TypeError(f"{self.__name__}() needs its parameter {name!r}, a number")
                raise TypeError(f"{self.__name__}(): {name} must be a number, not {_shown(value)}")
            values.append(as_float(self._traced.name, name, value))
        for name in parameters:
            if name not in self._names:
                known = ", ".join((*self._names, *self._options))
                raise TypeError(f"{self.__name__}() has no parameter {name!r}; it has {known}")
        return tuple(values)

    def _by_name(self, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
        """The inputs, the later ones from keywords with their names in the definition."""
        names = self._traced.arguments
        if len(inputs) > len(names):
            raise TypeError(
                f"{self.__name__}() takes {len(names)} tensors, {', '.join(names)}, and was given "
                f"{len(inputs)}; its parameters are keywords"
            )
        found = list(inputs)
        for place in range(len(inputs), len(names)):
            also = self._aliases[place : place + 1]
            known = [name for name in (names[place], *also) if name in keywords]
            if not known:
                raise TypeError(
                    f"{self.__name__}() needs {len(names)} tensors; {names[place]!r} is missing"
                )
            found.append(keywords.pop(known[0]))
        return tuple(found)

    def _refuse(self, inputs: Sequence[Any]) -> None:
        """Raises the error for an input that is not a tensor."""
        for operand, name in zip(inputs, self._traced.arguments, strict=True):
            if not isinstance(operand, Tensor):
                raise TypeError(
                    f"{self.__name__}(): {name} must be a tensor, not {_shown(operand)}: "
                    "torch.full_like makes one of a number"
                )

    @staticmethod
    def _reduction(reduction: Any) -> int:
        """Its number in the operators."""
        number = REDUCTIONS.get(reduction) if type(reduction) is str else None
        if number is None:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        return number

    def _dtypes(self, inputs: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype]:
        """The dtype of the result, and the one to compute in."""
        result = functools.reduce(torch.promote_types, (t.dtype for t in inputs))
        if not result.is_floating_point:
            raise TypeError(f"{self.__name__}() needs floating-point tensors, not {result}")
        if torch.is_autocast_enabled(inputs[0].device.type) and result is not torch.float64:
            result = torch.float32
        # Reduced precision is computed in float32, like in the kernels.
        return result, result if result is torch.float64 else torch.float32

    # ---- kernels ---------------------------------------------------------------------------------

    def compile(self, device: str = "cpu") -> None:
        """Compiles the kernels now instead of at the first call. Triton still compiles its kernels at
        their first use, once per dtype and layout.

        Args:
            device: the type of the tensors' device: ``"cpu"``, or ``"cuda"``, whose kernels NVRTC
                makes for the GPUs of this machine, or for those of ``TORCH_CUDA_ARCH_LIST``.

        Raises:
            RuntimeError: they cannot be compiled here; the message says why.
        """
        if device not in backends.fused_on:
            backend, why_not = "", backends.why_not_fused(device)
        else:
            backend, _, why_not = prepared(self._number, device)
        if not backend:
            raise RuntimeError(f"{self.__name__} cannot be compiled: {why_not}")

    def _reference(
        self,
        inputs: Sequence[Tensor],
        weight: Tensor | None,
        numbers: Sequence[float],
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        """In plain PyTorch, by the arguments of the operators: two inputs where the loss takes one."""
        raise NotImplementedError


class PointwiseLoss(CustomLoss):
    """A custom loss, as :func:`pointwise_loss` makes it."""

    _decorator = "pointwise_loss"
    _options: ClassVar[dict[str, Any]] = {"reduction": "mean", "weight": None, "clip_grad": None}
    _aliases = INPUTS
    _traced: Traced

    def __init__(self, function: Callable[..., Any]) -> None:
        from . import printing, tracing

        self._traced = tracing.trace(function)
        super().__init__(function)
        self._struct = printing.cpp(self._traced)
        self._value = printing.torch_function(self._traced, self._traced.reference)
        self._slopes = printing.torch_function(self._traced, self._traced.reference_slopes)

    @property
    def slopes(self) -> tuple[str, ...]:
        """Its derivatives with respect to its inputs, as text."""
        return tuple(map(self._traced.text, self._traced.slopes))

    # ---- calls -----------------------------------------------------------------------------------

    # `self, /`: a parameter may have any name.
    def __call__(
        self,
        /,
        *inputs: Tensor,
        reduction: str = "mean",
        weight: Tensor | None = None,
        clip_grad: float | None = None,
        **parameters: Any,
    ) -> Tensor:
        """The loss.

        Args:
            inputs: the tensors of the definition, mostly input (predictions) and target. The first one
                has any shape, and float32, float64, bfloat16 or float16 as dtype; the latter two are
                computed in float32. The others may have other dtypes; the loss has the one that torch
                promotes all of them to. The second one has the first one's shape, and is broadcast with
                a warning if not; later ones may broadcast to it. Each may require a gradient. As
                keywords they have their names in the definition; the first two may also be called input
                and target.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.
            weight: multiplies each element's loss; broadcast to input's shape. With it ``"mean"``
                divides by its sum, as :func:`torch.nn.functional.mse_loss`'s does: a weighted mean.
            clip_grad: bounds the slope of each element, before weight and upstream gradient, to
                [-clip_grad, clip_grad]; the value stays.
            parameters: the loss's parameters, numbers. A new number does not compile anything again.
                Parameters get no gradient.

        Returns:
            A 0-d tensor, or one of input's shape for ``"none"``, of the inputs' dtype (float32 under
            autocast).

        Raises:
            TypeError: a parameter is unknown, missing or not a number; an input is missing; an input or
                weight is not a tensor.
            ValueError: reduction is none of the three, clip_grad is not positive, weight does not
                broadcast to input's shape, or a parameter is beyond float64.
            RuntimeError: the shapes do not broadcast.
        """
        if len(inputs) != self.inputs:
            inputs = self._by_name(inputs, parameters)
        return self._call(inputs, reduction, weight, clip_grad, parameters, None)

    def _bound(self, clip_grad: float | None) -> float:
        if clip_grad is None:
            return math.inf
        if isinstance(clip_grad, bool) or not isinstance(clip_grad, Real) or not clip_grad > 0:
            raise ValueError(f"{self.__name__}(): clip_grad must be positive, not {clip_grad!r}")
        return as_float(self._traced.name, "clip_grad", clip_grad)

    def _call(
        self,
        inputs: tuple[Tensor, ...],
        reduction: str,
        weight: Tensor | None,
        clip_grad: float | None,
        parameters: Mapping[str, Any],
        prediction: Tensor | None,
    ) -> Tensor:
        values = self._default_values
        if parameters or values is None:
            values = self._values(parameters)
        number = self._reduction(reduction)
        bound = self._bound(clip_grad)
        input = inputs[0]
        is_tensor = isinstance(input, Tensor)
        if is_tensor and _dispatch._plain_calls() and not has_torch_function_unary(input):
            known = self._keys.get(input.device.type)
            if known is not None:
                numbers = (*values, bound)
                loss = _C.custom(inputs, weight, known, numbers, number, prediction)
                if loss is not None:
                    if _dispatch._counted:
                        _dispatch._count(self.__name__)
                    return loss  # type: ignore[no-any-return]
        if not all(isinstance(t, Tensor) for t in inputs):
            self._refuse(inputs)
        if _dispatch._overridden(*inputs, weight):
            options = {"reduction": reduction, "weight": weight, "clip_grad": clip_grad}
            return _dispatch._offer(  # type: ignore[no-any-return]
                self, (*inputs, weight), inputs, {**options, **parameters},
                partial(self._call, inputs, reduction, weight, clip_grad, parameters, prediction),
            )  # fmt: skip
        if weight is not None:
            weight = self._weight(input, weight)
        reason = _dispatch._why_not_fused(
            dict(zip(self._operands, inputs, strict=True)), weight, gradients=len(inputs)
        )
        backend = key = why_not = ""
        dtype: torch.dtype | str | None = None
        if reason is None:
            kinds = ("any",) * len(inputs)
            dtype = _dispatch._result_dtype(inputs, kinds, ((weight, "any"),), "inputs")
            unfit = [t for i, t in enumerate(inputs[1:], 1) if not self._fits(i, t, input)]
            if isinstance(dtype, str):
                reason = dtype
            elif unfit:
                reason = f"shapes differ: {tuple(input.shape)} and {tuple(unfit[0].shape)}"
            else:
                backend, key, why_not = prepared(self._number, input.device.type)
                reason = None if backend else why_not
        if _dispatch._listening():
            _dispatch._report(self.__name__, reason, backend, *filter(None, (why_not,)))
        if reason is not None:
            return self.reference(
                *inputs, reduction=reduction, weight=weight, clip_grad=clip_grad, **parameters
            )
        # A loss of one input has it as target too.
        target, more = inputs[-1] if len(inputs) == 1 else inputs[1], inputs[2:]
        value: Tensor = _dispatch.operator(backend)(
            input, target, weight, [t.expand_as(input) for t in more], key, [*values, bound], 0,
            number, dtype, prediction,
        )  # fmt: skip
        return value

    @staticmethod
    def _fits(place: int, t: Tensor, input: Tensor) -> bool:
        """Whether the kernels take an input of this shape. A target of another shape mostly is a
        mistake, so the reference warns; later inputs may broadcast."""
        return t.shape == input.shape or (place > 1 and _dispatch._broadcasts_to(t, input))

    def _weight(self, input: Any, weight: Any) -> Any:
        """The weight in input's shape, since a mean divides by its sum."""
        if not isinstance(weight, Tensor):
            raise TypeError(f"{self.__name__}(): weight must be a tensor, not {_shown(weight)}")
        if weight.shape != input.shape:
            if not _dispatch._broadcasts_to(weight, input):
                raise ValueError(
                    f"{self.__name__}(): weight of shape {tuple(weight.shape)} does not broadcast "
                    f"to input's {tuple(input.shape)}"
                )
            weight = weight.expand_as(input)
        return weight

    # ---- plain PyTorch ---------------------------------------------------------------------------

    def reference(
        self,
        /,
        *inputs: Tensor,
        reduction: str = "mean",
        weight: Tensor | None = None,
        clip_grad: float | None = None,
        **parameters: Any,
    ) -> Tensor:
        """The same loss in plain PyTorch, differentiable to any order. Tests compare the kernels with
        it, and calls that they do not cover use it. Arguments and errors: see :meth:`__call__`."""
        if len(inputs) != self.inputs:
            inputs = self._by_name(inputs, parameters)
        self._refuse(inputs)
        input = inputs[0]
        values = self._values(parameters)
        if weight is not None:
            weight = self._weight(input, weight)
        unfit = [t for i, t in enumerate(inputs[1:], 1) if not self._fits(i, t, input)]
        if unfit:
            name = "target" if unfit[0] is inputs[1] else "an input"
            _caller.warn(
                f"{self.__name__}: {name} of shape {tuple(unfit[0].shape)} differs from input's "
                f"{tuple(input.shape)}, and is broadcast; make sure that this is intended"
            )
        return self._reference(inputs, weight, (*values, self._bound(clip_grad)), 0, reduction)

    def _reference(
        self,
        inputs: Sequence[Tensor],
        weight: Tensor | None,
        numbers: Sequence[float],
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        """numbers: of the parameters, and the bound of the slopes."""
        inputs = inputs[: self.inputs]
        *values, bound = numbers
        result, compute = self._dtypes(inputs)
        shape = torch.broadcast_shapes(*(t.shape for t in inputs))  # type: ignore[no-untyped-call]
        wide_inputs = [t.to(compute).expand(shape) for t in inputs]
        if bound == math.inf:
            value = self._elements(wide_inputs, tuple(values))
        else:
            value = _Clipped.apply(self, bound, tuple(values), *wide_inputs)
        wide = None if weight is None else weight.to(compute)
        return reduced(value, wide, reduction).to(result)

    def _elements(self, inputs: Sequence[Tensor], values: tuple[float, ...]) -> Tensor:
        (value,) = self._value(inputs, values)
        # A piece that is constant has a gradient as well, 0, like in the kernels.
        for t in inputs:
            value = value + t[None][:0].sum()
        return value

    def _bounded_slopes(
        self, inputs: Sequence[Tensor], bound: float, values: tuple[float, ...]
    ) -> list[Tensor]:
        return [slope.clamp(-bound, bound) for slope in self._slopes(inputs, values)]

    # ---- modules, checks, plots ------------------------------------------------------------------

    def module(
        self,
        /,
        *,
        reduction: str = "mean",
        weight: Tensor | None = None,
        clip_grad: float | None = None,
        **parameters: float,
    ) -> PointwiseLossModule:
        """The loss as an :class:`torch.nn.Module` with these options; see :meth:`__call__`.

        Raises:
            TypeError, ValueError: as a call with these options does.
        """
        return PointwiseLossModule(self, reduction, weight, clip_grad, parameters)

    def check(self, /, **parameters: float) -> Report:
        """Looks for what makes a loss hard to train with, at random points and along lines.

        Args:
            parameters: numbers for the loss's parameters.

        Returns:
            A report that prints, and whose ``ok`` says whether value and gradient are right.
        """
        from .checking import check

        with torch.device("cpu"):
            return check(self, self._values(parameters))

    def plot(self, path: str | Path, /, **parameters: float) -> None:
        """Draws value, slope and curvature against input, for a few targets.

        Args:
            path: the picture's file; its suffix, such as ``.png`` or ``.svg``, is the format.
            parameters: numbers for the loss's parameters.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from .checking import plot

        with torch.device("cpu"):
            plot(self, self._values(parameters), path)


def pointwise_loss(function: Callable[..., Any]) -> PointwiseLoss:
    """Makes a loss of one line of maths: value and gradients come from one fused kernel.

    Args:
        function: takes up to eight tensors, mostly ``input`` and ``target``, one element of each, and
            keyword parameters behind a ``*``; returns the element's loss, by the functions of
            :mod:`fusedloss.math` and Python's operators. It is called once, with symbols.

    Returns:
        The loss, to be called like those of :mod:`fusedloss.functional`; see
        :meth:`PointwiseLoss.__call__`.

    Raises:
        TypeError, ValueError: the function defines no such loss; the message says what to write
            instead.
    """
    return PointwiseLoss(function)


class _Clipped(torch.autograd.Function):
    """The values of elements, with bounded slopes instead of the derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        loss: PointwiseLoss, bound: float, values: tuple[float, ...], *inputs: Tensor
    ) -> Tensor:
        return loss._elements(inputs, values).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.loss, ctx.bound, ctx.values, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.loss._bounded_slopes(ctx.saved_tensors, ctx.bound, ctx.values)
        return None, None, None, *(grad * slope for slope in slopes)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        slopes = ctx.loss._bounded_slopes(ctx.saved_tensors, ctx.bound, ctx.values)
        pairs = [(s, t) for s, t in zip(slopes, tangents[3:], strict=True) if t is not None]
        return sum((s * t for s, t in pairs), torch.zeros_like(slopes[0]))
