"""Custom losses: one line of maths, with the built-in losses' kernels.

    @fusedloss.pointwise_loss
    def charbonnier(input, target, *, eps=1e-3):
        return fm.sqrt((input - target) ** 2 + eps ** 2)

The function is traced once, with SymPy symbols; SymPy differentiates. What comes out is printed as C++
or in Triton's language and compiled where it runs, and as plain PyTorch for whatever the kernels do not
cover.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import reprlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from .. import _caller, _dispatch, autograd, backends, second_order
from ..modules import _Predicting
from ..reference import REDUCTIONS, reduced
from .building import CannotCompile, Library, cpu_library, cuda_library

if TYPE_CHECKING:
    from pathlib import Path

    from .checking import Report

__all__ = ["PointwiseLoss", "PointwiseLossModule", "pointwise_loss"]

_C: Any = backends.extension
_MISSING: Any = ...  # what no tensor is
# Every loss by number.
_defined: WeakValueDictionary[int, PointwiseLoss] = WeakValueDictionary()
_count = itertools.count()


def as_float(loss: str, name: str, value: Any) -> float:
    """A number of a loss as kernels have it."""
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
            "a tensor that wants a gradient, which parameters do not get: what should be learnt is "
            "input or target, so expand it to input's shape and make it one of them"
        )
    if value.numel() == 1:
        return "a tensor of one number: pass tensor.item()"
    return f"a tensor of shape {tuple(value.shape)}: it is one number for the whole call"


class PointwiseLoss:
    """A custom loss, as :func:`pointwise_loss` makes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        from . import printing, tracing

        self._traced = tracing.trace(function)
        self._struct = printing.cpp(self._traced)
        self._value = printing.torch_function(self._traced, self._traced.reference)
        self._slopes = printing.torch_function(self._traced, self._traced.reference_slopes)
        # What the compiled operators call it, by type of device: for the short way into them.
        self._keys: dict[str, str] = {}
        self._prepared: dict[tuple[str, tuple[str, ...]], tuple[str, str, str]] = {}
        self._number = next(_count)
        _defined[self._number] = self
        self._names = tuple(self._traced.parameters)
        self._defaults = tuple(self._traced.defaults.get(name) for name in self._names)
        self._default_values = self._values({}) if None not in self._defaults else None
        self.function = function
        self.__wrapped__ = function
        definition = tracing.definition(function)
        self.__name__: str = self._traced.name
        self.__qualname__: str = getattr(definition, "__qualname__", self.__name__)
        self.__module__: str = getattr(definition, "__module__", "")
        self.__doc__ = definition.__doc__
        self.__signature__ = self._signature()

    # ---- what it is ------------------------------------------------------------------------------

    def _signature(self) -> inspect.Signature:
        own = inspect.signature(self.function).parameters.values()
        more = (("reduction", "mean"), ("weight", None), ("clip_grad", None))
        return inspect.Signature(
            [
                *own,
                *(
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
                    for name, default in more
                ),
            ]
        )

    def __repr__(self) -> str:
        given = "".join(
            f", {name}" if default is None else f", {name}={default:g}"
            for name, default in zip(self._names, self._defaults, strict=True)
        )
        head = f"{self.__name__}(input, target{', *' if given else ''}{given})"
        return f"<fusedloss.pointwise_loss {head} = {self.formula}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Found again by name, like a function, where it has that name; else made again."""
        try:
            found = operator.attrgetter(self.__qualname__)(sys.modules.get(self.__module__))
        except AttributeError:
            found = None
        return self.__qualname__ if found is self else (pointwise_loss, (self.function,))

    def __deepcopy__(self, memo: Any = None) -> PointwiseLoss:
        return self  # like a function

    __copy__ = __deepcopy__

    @property
    def formula(self) -> str:
        """The loss of one element, as text."""
        return " ".join(str(self._traced.value).split())

    @property
    def slopes(self) -> tuple[str, str]:
        """Its derivatives with respect to input and target, as text."""
        of_input, of_target = (" ".join(str(slope).split()) for slope in self._traced.slopes)
        return of_input, of_target

    # ---- calls -----------------------------------------------------------------------------------

    # `self, /`: a parameter may have any name.
    def __call__(
        self,
        /,
        input: Tensor = _MISSING,
        target: Tensor = _MISSING,
        *,
        reduction: str = "mean",
        weight: Tensor | None = None,
        clip_grad: float | None = None,
        **parameters: float,
    ) -> Tensor:
        """The loss.

        Args:
            input: predictions, any shape, of float32, float64, bfloat16 or float16. The latter two
                are computed in float32.
            target: of input's shape and dtype; another shape is broadcast, with a warning. Both may
                want a gradient. By keyword the two go by the names in the loss's definition, too.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.
            weight: multiplies each element's loss; broadcast to input's shape. With it ``"mean"``
                divides by its sum, as :func:`torch.nn.functional.mse_loss`'s does: a weighted mean.
            clip_grad: bounds the slope of each element, before weight and upstream gradient, to
                [-clip_grad, clip_grad]; the value stays.
            parameters: the loss's own, numbers. Another number compiles nothing anew, and none gets a
                gradient.

        Returns:
            A 0-d tensor, or one of input's shape for ``"none"``, of input's dtype (float32 under
            autocast).

        Raises:
            TypeError: a parameter is unknown, missing or no number; input, target or weight is no
                tensor.
            ValueError: reduction is none of the three, clip_grad is not positive, weight does not
                broadcast to input's shape, or a parameter is beyond float64.
            RuntimeError: the shapes do not broadcast.
        """
        if input is _MISSING or target is _MISSING:
            input, target = self._by_name(input, target, parameters)
        return self._call(input, target, reduction, weight, clip_grad, parameters, None)

    def _values(self, parameters: Mapping[str, Any]) -> tuple[float, ...]:
        """The parameters' numbers, in order."""
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
                known = ", ".join((*self._names, "reduction", "weight", "clip_grad"))
                raise TypeError(f"{self.__name__}() has no parameter {name!r}; it has {known}")
        return tuple(values)

    def _by_name(self, input: Any, target: Any, keywords: dict[str, Any]) -> list[Any]:
        """Input and target, out of the keywords where they go by the names in the definition."""
        operands = []
        for given, name in zip((input, target), self._traced.arguments, strict=True):
            operand = keywords.pop(name, _MISSING) if given is _MISSING else given
            if operand is _MISSING:
                raise TypeError(f"{self.__name__}() needs two tensors; {name!r} is missing")
            operands.append(operand)
        return operands

    def _refuse(self, *operands: Any) -> None:
        """Of input and target, what is no tensor."""
        for operand, name in zip(operands, self._traced.arguments, strict=True):
            if not isinstance(operand, Tensor):
                raise TypeError(
                    f"{self.__name__}(): {name} must be a tensor, not {_shown(operand)}: "
                    "torch.full_like makes one of a number"
                )

    def _bound(self, clip_grad: float | None) -> float:
        if clip_grad is None:
            return math.inf
        if isinstance(clip_grad, bool) or not isinstance(clip_grad, Real) or not clip_grad > 0:
            raise ValueError(f"{self.__name__}(): clip_grad must be positive, not {clip_grad!r}")
        return as_float(self._traced.name, "clip_grad", clip_grad)

    def _call(
        self,
        input: Tensor,
        target: Tensor,
        reduction: str,
        weight: Tensor | None,
        clip_grad: float | None,
        parameters: Mapping[str, Any],
        prediction: Tensor | None,
    ) -> Tensor:
        values = self._default_values
        if parameters or values is None:
            values = self._values(parameters)
        number = REDUCTIONS.get(reduction) if type(reduction) is str else None
        if number is None:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        bound = self._bound(clip_grad)
        if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
            self._refuse(input, target)
        if _dispatch._plain_calls() and not has_torch_function_unary(input):
            known = self._keys.get(input.device.type)
            if known is not None:
                numbers = (*values, bound)
                loss = _C.custom(input, target, weight, known, numbers, number, prediction)
                if loss is not None:
                    if _dispatch._counted:
                        _dispatch._count(self.__name__)
                    return loss  # type: ignore[no-any-return]
        if _dispatch._overridden(input, target, weight):
            options = {"reduction": reduction, "weight": weight, "clip_grad": clip_grad}
            return _dispatch._offer(  # type: ignore[no-any-return]
                self, (input, target, weight), (input, target), {**options, **parameters},
                partial(
                    self._call, input, target, reduction, weight, clip_grad, parameters, prediction
                ),
            )  # fmt: skip
        if weight is not None:
            weight = self._weight(input, weight)
        reason = _dispatch._obstacle(input, target, weight, target_gradient=True)
        backend = key = why_not = ""
        dtype: torch.dtype | str | None = None
        if reason is None:
            dtype = _dispatch._result_dtype(input, target, weight)
            if isinstance(dtype, str):
                reason = dtype
            elif input.shape != target.shape:
                reason = f"shapes differ: {tuple(input.shape)} and {tuple(target.shape)}"
            else:
                backend, key, why_not = _prepared(self._number, input.device.type)
                reason = None if backend else why_not
        if _dispatch._listening():
            _dispatch._report(self.__name__, reason, backend, *filter(None, (why_not,)))
        if reason is not None:
            return self.reference(
                input, target, reduction=reduction, weight=weight, clip_grad=clip_grad, **parameters
            )
        assert isinstance(dtype, torch.dtype)
        return autograd.loss(
            backend, input, target, weight, [], key, [*values, bound], 0, number, dtype, prediction
        )

    def _weight(self, input: Any, weight: Any) -> Any:
        """Of input's shape, whose sum is what a mean divides by."""
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

    # ---- kernels ---------------------------------------------------------------------------------

    def compile(self, device: str = "cpu") -> None:
        """Compiles the kernels now instead of at the first call. Triton's, which are compiled for
        each dtype and layout, still are at their first use: there it is asked whether they can be.

        Args:
            device: the type of the tensors' device: ``"cpu"``, or ``"cuda"``, whose kernels ``nvcc``
                makes for the GPUs that are here, or for those of ``TORCH_CUDA_ARCH_LIST``.

        Raises:
            RuntimeError: they cannot be compiled here; the message says why.
        """
        backend, why_not = "", ""
        if device in backends.fused_on:
            backend, _, why_not = _prepared(self._number, device)
        else:
            why_not = backends.obstacle(device)
        if not backend:
            raise RuntimeError(f"{self.__name__} cannot be compiled: {why_not}")

    # ---- plain PyTorch ---------------------------------------------------------------------------

    def reference(
        self,
        /,
        input: Tensor = _MISSING,
        target: Tensor = _MISSING,
        *,
        reduction: str = "mean",
        weight: Tensor | None = None,
        clip_grad: float | None = None,
        **parameters: float,
    ) -> Tensor:
        """The same loss in plain PyTorch, differentiable to any order: what the kernels are checked
        against, and the last fall-back. Arguments and errors are the loss's own."""
        if input is _MISSING or target is _MISSING:
            input, target = self._by_name(input, target, parameters)
        self._refuse(input, target)
        values = self._values(parameters)
        if weight is not None:
            weight = self._weight(input, weight)
        if input.shape != target.shape:
            _caller.warn(
                f"{self.__name__}: target of shape {tuple(target.shape)} differs from input's "
                f"{tuple(input.shape)}, and is broadcast; make sure that is what is meant"
            )
        return self._reference(input, target, reduction, weight, self._bound(clip_grad), values)

    def _reference(
        self,
        input: Tensor,
        target: Tensor,
        reduction: str,
        weight: Tensor | None,
        bound: float,
        values: tuple[float, ...],
    ) -> Tensor:
        result = torch.promote_types(input.dtype, target.dtype)
        if not result.is_floating_point:
            raise TypeError(f"{self.__name__}() needs floating-point tensors, not {result}")
        if torch.is_autocast_enabled(input.device.type) and result is not torch.float64:
            result = torch.float32
        # Reduced precision is computed in float32, as by the kernels.
        compute = result if result is torch.float64 else torch.float32
        shape = torch.broadcast_shapes(input.shape, target.shape)  # type: ignore[no-untyped-call]
        x, y = (t.to(compute).expand(shape) for t in (input, target))
        if bound == math.inf:
            value = self._elements(x, y, values)
        else:
            value = _Clipped.apply(x, y, self, bound, values)
        wide = None if weight is None else weight.to(compute)
        return reduced(value, wide, reduction).to(result)

    def _operator_reference(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        more: list[Tensor],
        parameters: list[float],
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        """The same with the operators' arguments."""
        *values, bound = parameters
        return self._reference(input, target, reduction, weight, bound, tuple(values))

    def _elements(self, x: Tensor, y: Tensor, values: tuple[float, ...]) -> Tensor:
        (value,) = self._value(x, y, values)
        if not isinstance(value, Tensor):
            value = torch.full_like(x, value, requires_grad=False)
        # A piece that is constant still has a gradient: 0, as from the kernels.
        nothing = x[None][:0].sum() + y[None][:0].sum()
        return torch.broadcast_to(value, x.shape) + nothing

    def _bounded_slopes(
        self, x: Tensor, y: Tensor, bound: float, values: tuple[float, ...]
    ) -> list[Tensor]:
        return [
            (
                slope.clamp(-bound, bound)
                if isinstance(slope, Tensor)
                else torch.full_like(x, min(max(slope, -bound), bound), requires_grad=False)
            )
            for slope in self._slopes(x, y, values)
        ]

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
            parameters: the loss's own, for which to check it.

        Returns:
            A report that prints, and whose ``ok`` says whether value and gradient are right.
        """
        from .checking import check

        with torch.device("cpu"):
            return check(self, self._values(parameters))

    def plot(self, path: str | Path, /, **parameters: float) -> None:
        """Draws value, slope and curvature against input, for a few targets.

        Args:
            path: the picture; its name's end is its format, such as ``.png`` or ``.svg``.
            parameters: the loss's own, for which to draw it.

        Raises:
            ModuleNotFoundError: there is no matplotlib.
        """
        from .checking import plot

        with torch.device("cpu"):
            plot(self, self._values(parameters), path)


def pointwise_loss(function: Callable[..., Any]) -> PointwiseLoss:
    """Makes a loss of one line of maths: value and gradients come from one fused kernel.

    Args:
        function: takes ``input`` and ``target``, one element of each, and keyword parameters behind
            a ``*``; returns the element's loss, in the words of :mod:`fusedloss.math` and Python's
            operators. It is called once, with symbols.

    Returns:
        The loss, to be called like those of :mod:`fusedloss.functional`; see
        :meth:`PointwiseLoss.__call__`.

    Raises:
        TypeError, ValueError: the function defines no such loss; the message says what to write
            instead.
    """
    return PointwiseLoss(function)


class PointwiseLossModule(_Predicting):
    """A custom loss as a module; see :meth:`PointwiseLoss.module`."""

    weight: Tensor | None

    def __init__(
        self,
        loss: PointwiseLoss,
        reduction: str,
        weight: Tensor | None,
        clip_grad: float | None,
        parameters: Mapping[str, float],
    ) -> None:
        super().__init__()
        loss._values(parameters)
        loss._bound(clip_grad)
        if reduction not in REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        self.loss = loss
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.clip_grad = clip_grad
        self.parameters_of_loss = dict(parameters)

    def _get_name(self) -> str:
        return self.loss.__name__

    def extra_repr(self) -> str:
        numbers = zip(self.loss._names, self.loss._values(self.parameters_of_loss), strict=True)
        shown = [f"{name}={value:g}" for name, value in numbers]
        shown.append(f"reduction={self.reduction!r}")
        if self.clip_grad is not None:
            shown.append(f"clip_grad={self.clip_grad:g}")
        return f"{self.loss.formula}, {', '.join(shown)}"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss._call(
            input,
            target,
            self.reduction,
            self.weight,
            self.clip_grad,
            self.parameters_of_loss,
            self._prediction(input),
        )


class _Clipped(torch.autograd.Function):
    """The elements' values with bounded slopes, which are no longer the value's derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, loss: PointwiseLoss, bound: float, values: tuple[float, ...]
    ) -> Tensor:
        return loss._elements(x, y, values).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, *ctx.rest = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        loss, bound, values = ctx.rest
        of_x, of_y = loss._bounded_slopes(*ctx.saved_tensors, bound, values)
        return grad * of_x, grad * of_y, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, y: Tensor | None, *_: Any) -> Tensor:
        loss, bound, values = ctx.rest
        slopes = loss._bounded_slopes(*ctx.saved_tensors, bound, values)
        pairs = [(s, t) for s, t in zip(slopes, (x, y), strict=True) if t is not None]
        return sum((s * t for s, t in pairs), torch.zeros_like(slopes[0]))


@autograd.constant_when_traced
def _prepared(number: int, device: str) -> tuple[str, str, str]:
    """The first backend that can run a loss on that device, what its operators call the loss, which
    is compiled if it is not yet, and why the backends before that one cannot. No backend can: "",
    which is warned of once. (By number, since a tracing compiler knows no loss as a constant.)"""
    loss = _defined[number]
    order = backends.in_order(device)
    found = loss._prepared.get((device, order))
    if found is None:
        found = loss._prepared[device, order] = _prepare(loss, device, order)
        if not found[0]:
            _caller.warn(
                f"{loss.__name__} runs on plain PyTorch, without fused kernels: {found[2]}",
                RuntimeWarning,
            )
    return found


def _prepare(loss: PointwiseLoss, device: str, order: tuple[str, ...]) -> tuple[str, str, str]:
    reasons = []
    for backend in order:
        load = _LOADERS.get((backend, device))
        try:
            if load is None:
                raise CannotCompile(f"has no kernels of custom losses for {device} tensors")
            key = load(loss)
        except (CannotCompile, OSError) as error:
            reasons.append(f"{backend}: {error}")
            continue
        second_order.custom_references.setdefault(key, loss._operator_reference)
        if backend == "compiled":
            loss._keys[device] = key
        return backend, key, "; ".join(reasons)
    return "", "", "; ".join(reasons)


def _loaded(loss: PointwiseLoss, of: Callable[[str, str], Library]) -> str:
    library = of(loss._traced.identifier, loss._struct)
    if library.key not in second_order.custom_references:
        library.load(_C.load_custom)
    return library.key


def _load_triton(loss: PointwiseLoss) -> str:
    from ..backends import triton
    from . import printing

    constants = printing.host_constants(loss._traced)
    source = printing.triton(loss._traced)
    name = loss._traced.identifier
    key: str = triton.load(name, source, len(loss._names) + 1, constants)
    return key


# Makes a loss ready for a backend's operators on a type of device, and says what they call it; raises
# CannotCompile where it cannot.
_LOADERS: dict[tuple[str, str], Callable[[PointwiseLoss], str]] = {
    ("compiled", "cpu"): lambda loss: _loaded(loss, cpu_library),
    ("compiled", "cuda"): lambda loss: _loaded(loss, cuda_library),
    **{("triton", device): _load_triton for device in ("cpu", "cuda", "xpu")},
}
