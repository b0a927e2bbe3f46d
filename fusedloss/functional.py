"""The losses, under the names and with the signatures of :mod:`torch.nn.functional`.

Each takes what the torch function takes and gives what it gives: dtype, shape, gradients, warnings
and errors. A call that the fused kernels cover computes value and gradient in one pass; any other
goes to :mod:`fusedloss.reference`. :func:`explain` says which, and why.

All tensors are unitless. ``reduction`` is ``"mean"``, ``"sum"`` or ``"none"``. ``size_average`` and
``reduce`` are torch's deprecated forms of it. Low-precision inputs are computed in float32.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn._reduction import legacy_get_string
from torch.overrides import (
    TorchFunctionMode,
    _pop_mode,
    _push_mode,
    handle_torch_function,
    has_torch_function,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _caller, autograd, backends, reference

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "explain",
    "huber_loss",
    "l1_loss",
    "log_loss",
    "mae_loss",
    "mse_loss",
    "smooth_l1_loss",
]

_C: Any = backends.extension
NO_TORCHSCRIPT = (
    "fusedloss does not go into TorchScript, which is deprecated: use torch.compile or "
    "torch.export, or torch.nn's own losses where it must be torch.jit"
)
_DISABLED = torch._C._disabled_torch_function_impl
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


# ---- which path a call takes ---------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """The path that a call takes, and why."""

    backend: str
    fused: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        if self.fused:
            return f"fused, on the {self.backend} backend: {'; '.join(self.reasons)}"
        return f"plain PyTorch, through fusedloss.reference: {'; '.join(self.reasons)}"


class _Explained(BaseException):
    """Carries an explanation out of a call that is explained instead of run."""


_explaining: int | None = None  # the thread that is explaining a call
_explaining_lock = threading.RLock()  # what is explained may explain in turn


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Which path ``fn(*args, **kwargs)`` takes, and why, without computing it.

    Args:
        fn: what calls a fused loss: a function of :mod:`fusedloss.functional`, a module of
            :mod:`fusedloss`, a loss of your own, or a whole model whose forward pass ends in one.
            It runs as far as its first fused loss, whose path is the answer.

    Raises:
        TypeError: ``fn`` called no fused loss.
    """
    global _explaining
    with _explaining_lock:
        outer, _explaining = _explaining, threading.get_ident()
        try:
            fn(*args, **kwargs)
        except _Explained as answer:
            explanation: Explanation = answer.args[0]
            return explanation
        finally:
            _explaining = outer
    raise TypeError(f"{fn!r} calls no loss of fusedloss: there is no path to explain")


@dataclass(slots=True)
class Call:
    """A line that calls a loss, the path that its calls take, and how many there were: 0 where a
    compiler has traced it, since the graph that it made counts nothing."""

    file: str
    line: int
    function: str
    loss: str
    path: Explanation
    calls: int
    code: CodeType  # keeps its id


_FUSED = "value and gradient in one pass over the inputs"
# What patch() counts: a table for each patch that is on, by place in the code, loss and path (None:
# the short way, which is fused).
_counted: tuple[dict[Any, Call], ...] = ()


def _count(loss: str, path: Explanation | None = None, calls: int = 1) -> None:
    frame = _caller.frame(sys._getframe(2))  # the first two are here
    while not calls and frame.f_code.co_filename == "<string>" and frame.f_back:
        frame = _caller.frame(frame.f_back)  # that one is of torch.fx
    code = frame.f_code
    key = (id(code), frame.f_lasti, loss, path)
    for table in _counted:
        call = table.get(key)
        if call is None:
            told = path or Explanation("compiled", True, (_FUSED,))
            call = table[key] = Call(
                code.co_filename, frame.f_lineno or 0, code.co_name, loss, told, 0, code
            )
        call.calls += calls


def _listening() -> bool:
    """Whether anyone wants to know which path a call takes."""
    return _explaining is not None or bool(_counted)


def _backend(reason: str | None, input: Any) -> str | None:
    """The first backend for input's device, if the call is fused."""
    return backends.fused_on[input.device.type] if reason is None else None


@autograd.constant_when_traced
def _report(loss: str, reason: str | None, backend: str | None, *more: str) -> None:
    """The path of a call that did not take the short way, to whoever asked for it.

    reason: why it is not fused; backend: which takes it if it is; more: on the why."""
    path = Explanation("reference", False, (reason,)) if reason is not None else None
    if path is None:
        path = Explanation(backend or "", True, (_FUSED, *more))
    if _explaining == threading.get_ident():
        raise _Explained(path)
    _count(loss, path, calls=0 if torch.compiler.is_compiling() else 1)


@autograd.constant_when_traced
def _transformed() -> bool:
    """Whether a torch.func transform is active; a tracing compiler is inside of it as well."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@autograd.constant_when_traced
def _draft_exported() -> bool:
    """Whether torch.export.draft_export is tracing."""
    config = sys.modules.get("torch._functorch.config")
    return getattr(config, "fake_tensor_propagate_real_tensors", False)


def _sees_functions(value: Any) -> bool:
    """Whether it is a tensor of a class of its own that sees torch functions."""
    kind = type(value)
    if kind is Tensor or kind is Parameter:
        return False
    return getattr(kind, "__torch_function__", _DISABLED) is not _DISABLED


def _overrides(value: Any) -> bool:
    """Whether a tensor's own class is to see torch functions, or holds other tensors."""
    return _sees_functions(value) or is_traceable_wrapper_subclass(value)


def _obstacle(input: Any, target: Any, *others: Any, target_gradient: bool = False) -> str | None:
    """Why no fused kernel takes these tensors, before their shapes and dtypes; None: one does.

    target_gradient: a kernel gives the gradient for target too.
    """
    if torch._C._get_tracing_state() is not None:
        if _counted:  # patch() is on: the call may be in code that knows nothing of fusedloss
            return "torch.jit is tracing"
        raise RuntimeError(NO_TORCHSCRIPT)
    if any(map(_overrides, (input, target, *others))):
        return "a tensor subclass is involved"
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        return "input and target are not both tensors"
    if input.device != target.device:
        return f"input is on {input.device} and target on {target.device}"
    if input.device.type not in backends.fused_on:
        return backends.obstacle(input.device.type)
    if input.layout is not torch.strided or target.layout is not torch.strided:
        return f"layouts {input.layout} and {target.layout} are not both strided"
    if input.is_nested or target.is_nested:
        return "a nested tensor is involved"
    # It runs each operator to see whether that writes to its arguments, and takes an optional tensor
    # that is None for one that was written to.
    if torch.compiler.is_exporting() and _draft_exported():
        return "torch.export.draft_export is tracing"
    if _transformed():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    grad = torch.is_grad_enabled()
    if grad and target.requires_grad and not target_gradient:
        return "a gradient for target is wanted"
    # Ours needs them in backward, and torch may do without. (A compiler does not trace the question.)
    wanted = input.requires_grad or target.requires_grad
    saved = grad and wanted and not torch.compiler.is_compiling()
    if saved and target.is_inference():
        return "target is an inference tensor, which cannot be saved for backward"
    if saved and input.is_inference():
        return "input is an inference tensor, which cannot be saved for backward"
    for other in others:
        if other is not None:
            if not isinstance(other, Tensor) or other.device != input.device:
                return "a weight is not a tensor on input's device"
            if grad and other.requires_grad:
                return "a gradient for a weight is wanted"
            if saved and other.is_inference():
                return "a weight is an inference tensor, which cannot be saved for backward"
            if other.layout is not torch.strided:
                return f"a weight's layout is {other.layout}"
    if input.numel() == 0:
        return "input is empty"
    return None


# ---- subclasses and modes ------------------------------------------------------------------------


def _overridden(*tensors: Any) -> bool:
    """Whether a tensor's class or a mode sees torch functions. (A compiler sees to that itself.)"""
    return not torch.compiler.is_compiling() and has_torch_function(tensors)


def _active_modes() -> list[TorchFunctionMode]:
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def _set_modes(modes: Sequence[TorchFunctionMode]) -> None:
    for _ in range(torch._C._len_torch_function_stack()):
        _pop_mode()  # type: ignore[no-untyped-call]
    for mode in modes:
        _push_mode(mode)  # type: ignore[no-untyped-call]


@contextmanager
def _only_modes(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """These alone are on; the last one is asked first."""
    found = _active_modes()
    _set_modes(modes)
    try:
        yield
    finally:
        _set_modes(found)


class _BelowModes(TorchFunctionMode):
    """Below the caller's modes: a call that they let pass comes back from torch's function to ours."""

    def __init__(self, function: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self._offered = function, options
        self.reached = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reached = True
        ours = _OURS.get(func, func)
        function, options = self._offered
        # torch's l1_loss leaves its weight out where it hands a call on.
        left_out = options if ours is function else {}
        return ours(*args, **{**left_out, **(kwargs or {})})


def _offer(
    function: Any,
    tensors: tuple[Any, ...],
    args: tuple[Any, ...],
    options: dict[str, Any],
    again: Callable[[], Any],
) -> Any:
    """Offers ``function(*args, **options)`` to what overrides it, as a call of torch's own function.

    torch's own offers the function that its name stands for, and under patch() that is ours: no
    handler would know it. again: makes the same call, where nobody overrides it; a partial, since
    a closure would make every call allocate its cells.
    """
    from torch.utils._device import DeviceContext  # there as soon as one is on

    theirs = _TORCHS.get(function, function)
    active = _active_modes()
    # A loss makes no tensor, so a default device has no part in it.
    devices = [mode for mode in active if type(mode) is DeviceContext]
    if len(devices) < len(active):
        ours = _BelowModes(function, options)
        if not any(type(mode) is _BelowModes for mode in active):
            others = [mode for mode in active if type(mode) is not DeviceContext]
            active = [*devices, ours, *others]
        with _only_modes(active):
            value = handle_torch_function(theirs, tensors, *args, **options)
        if _listening() and not ours.reached:
            _report(function.__name__, "a TorchFunctionMode has computed it", None)
        return value
    if any(map(_sees_functions, tensors)):
        if _listening():
            _report(function.__name__, "a tensor subclass is involved", None)
        with _only_modes(()):
            return handle_torch_function(theirs, tensors, *args, **options)
    with torch._C.DisableTorchFunction():
        return again()


# ---- what a call needs ---------------------------------------------------------------------------


def _autocast_refuses(device: str) -> bool:
    """Whether autocast is on where torch then refuses binary_cross_entropy, with an error."""
    return device != "cpu" and torch.is_autocast_enabled(device)


def _result_dtype(input: Tensor, *others: Tensor | None) -> torch.dtype | str:
    """The dtype of the loss; or, as text, why no fused kernel takes these dtypes."""
    dtype = input.dtype
    if dtype not in _DTYPES:
        return f"dtype {dtype} has no fused kernel"
    # Under autocast torch computes every loss in float32; ours reads the tensors as they are.
    if torch.is_autocast_enabled(input.device.type) and dtype is not torch.float64:
        for other in others:
            if other is not None and (other.dtype not in _DTYPES or other.dtype is torch.float64):
                return f"dtypes {dtype} and {other.dtype} under autocast"
        return torch.float32
    for other in others:
        if other is not None and other.dtype is not dtype:
            return f"dtypes differ: {dtype} and {other.dtype}"
    return dtype


def _broadcasts_to(small: Tensor, big: Tensor) -> bool:
    shape = big.shape
    if small.shape == shape:
        return True
    offset = len(shape) - small.dim()
    return offset >= 0 and all(n in (1, shape[offset + d]) for d, n in enumerate(small.shape))


@autograd.constant_when_traced
def _legacy(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that these deprecated options mean, with torch's warning."""
    return _caller.at_callers_line(legacy_get_string, size_average, reduce)


def _options(function: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """All arguments behind input and target, by their names, as torch offers them."""
    return dict(zip(function.__code__.co_varnames[2:], args[2:], strict=False))


def _plain_calls() -> bool:
    """Whether the short way into the operators is open: it explains and traces nothing."""
    return not torch.compiler.is_compiling() and backends.compiled_runs and _explaining is None


def _left_to_inductor(input: Any, least: int) -> bool:
    """Whether torch.compile gets a loss in plain PyTorch: one of few elements, as in torch's own.

    least: the elements from which on one pass saves more than an operator costs a compiled step. That
    is some 30 us, for its call and its guards, and since Inductor fuses nothing into it.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and backends.unchosen
        and isinstance(input, Tensor)
        and input.numel() < least
    )


def _pointwise(
    loss: str,
    torch_loss: Callable[..., Tensor],
    args: tuple[Any, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    parameter: float,
    reduction: str,
    unfit: str | None,
    broadcast_weight: bool,
    prediction: Tensor | None,
) -> Tensor:
    """Runs a pointwise loss fused, or else ``torch_loss(*args)``; unfit: why its options are not."""
    if unfit is None and _plain_calls():
        number = reference.REDUCTIONS.get(reduction) if type(reduction) is str else None
        if number is not None:
            value = _C.pointwise(
                input, target, weight, pos_weight, broadcast_weight, loss, parameter, number,
                prediction,
            )  # fmt: skip
            if value is not None:
                if _counted:
                    _count(torch_loss.__name__)
                return value  # type: ignore[no-any-return]
    if _left_to_inductor(input, 1 << 12 if loss.startswith("binary_cross_entropy") else 1 << 18):
        if _listening():
            _report(torch_loss.__name__, "few elements, which are left to the compiler", None)
        return torch_loss(*args)
    if _overridden(input, target, weight, pos_weight):
        function = globals()[torch_loss.__name__]
        return _offer(  # type: ignore[no-any-return]
            function, (input, target, weight, pos_weight), args[:2], _options(function, args),
            partial(
                _pointwise, loss, torch_loss, args, input, target, weight, pos_weight, parameter,
                reduction, unfit, broadcast_weight, prediction,
            ),
        )  # fmt: skip
    dtype: torch.dtype | str | None = None
    reason = unfit or _obstacle(input, target, weight, pos_weight)
    if reason is None:
        dtype = _result_dtype(input, target, weight, pos_weight)
        if type(reduction) is not str or reduction not in reference.REDUCTIONS:
            reason = f"reduction {reduction!r}"
        elif input.shape != target.shape:
            reason = f"shapes differ: {tuple(input.shape)} and {tuple(target.shape)}"
        elif isinstance(dtype, str):
            reason = dtype
        elif loss == "binary_cross_entropy" and _autocast_refuses(input.device.type):
            reason = "torch refuses it under autocast, as unsafe"
        elif (
            weight is not None
            and not broadcast_weight
            and torch.is_autocast_enabled(input.device.type)
        ):
            reason = "autocast leaves a weighted regression loss in its inputs' dtype"
        else:
            for w in (weight, pos_weight):
                if (
                    w is not None
                    and w.shape != input.shape
                    and not (broadcast_weight and _broadcasts_to(w, input))
                ):
                    reason = f"a weight of shape {tuple(w.shape)}"
    if _listening():
        _report(torch_loss.__name__, reason, _backend(reason, input))
    if reason is not None:
        traced = torch._C._get_tracing_state() is not None  # and warns of each comparison
        if traced or getattr(input, "shape", None) == getattr(target, "shape", None):
            return torch_loss(*args)
        return _caller.at_callers_line(torch_loss, *args)  # which warns, or raises an error
    assert isinstance(dtype, torch.dtype)
    more = [] if pos_weight is None else [pos_weight]
    parameters = [parameter] if loss in ("smooth_l1_loss", "huber_loss") else []
    return autograd.loss(
        backends.fused_on[input.device.type], input, target, weight, more, loss, parameters,
        0, reference.REDUCTIONS[reduction], dtype, prediction,
    )  # fmt: skip


# ---- regression ----------------------------------------------------------------------------------


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error: :math:`\ell_i = w_i (x_i - y_i)^2`.

    Args:
        input: predictions :math:`x`, any shape.
        target: :math:`y`, of input's shape and dtype; another shape is broadcast, with a warning,
            as in torch.
        weight: :math:`w`, of input's shape. With it, ``"mean"`` divides by its sum.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three, or weight is not of input's shape.
        RuntimeError: shapes that do not broadcast.

    Source: :func:`torch.nn.functional.mse_loss`.
    """
    return _mse_loss(input, target, size_average, reduce, reduction, weight)


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    weight: Tensor | None,
    prediction: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:
        size_average, reduce, reduction = None, None, _legacy(size_average, reduce)
    return _pointwise(
        "mse_loss", reference.mse_loss, (input, target, size_average, reduce, reduction, weight),
        input, target, weight, None, 0.0, reduction, None, False, prediction,
    )  # fmt: skip


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean absolute error (MAE): :math:`\ell_i = w_i |x_i - y_i|`.

    The gradient at the kink :math:`x_i = y_i` is 0, as in torch.

    Args, returns and errors: see :func:`mse_loss`.

    Source: :func:`torch.nn.functional.l1_loss`.
    """
    return _l1_loss(input, target, size_average, reduce, reduction, weight)


def _l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    weight: Tensor | None,
    prediction: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:
        size_average, reduce, reduction = None, None, _legacy(size_average, reduce)
    return _pointwise(
        "l1_loss", reference.l1_loss, (input, target, size_average, reduce, reduction, weight),
        input, target, weight, None, 0.0, reduction, None, False, prediction,
    )  # fmt: skip


mae_loss = l1_loss


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Smooth L1: with :math:`d = x_i - y_i`, :math:`d^2 / (2 \beta)` where :math:`|d| < \beta`,
    else :math:`|d| - \beta / 2`.

    Args:
        input: predictions :math:`x`, any shape.
        target: :math:`y`, of input's shape and dtype; another shape is broadcast, with a warning.
        beta: where the parabola ends, in input's unit; 0 makes it :func:`l1_loss`.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three.
        RuntimeError: beta is negative, or the shapes do not broadcast.

    Source: :func:`torch.nn.functional.smooth_l1_loss`.
    """
    return _smooth_l1_loss(input, target, size_average, reduce, reduction, beta)


def _smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    beta: float,
    prediction: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:
        size_average, reduce, reduction = None, None, _legacy(size_average, reduce)
    # The kernel divides by beta's reciprocal, a number like any other.
    fits = isinstance(beta, float | int) and (beta == 0 or 1e-30 <= beta <= 1e30)
    unfit = None if fits else f"beta {beta!r}"
    return _pointwise(
        "l1_loss" if fits and beta == 0 else "smooth_l1_loss", reference.smooth_l1_loss,
        (input, target, size_average, reduce, reduction, beta),
        input, target, None, None, float(beta) if fits else 0.0, reduction,
        unfit, False, prediction,
    )  # fmt: skip


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Huber: with :math:`d = x_i - y_i`, :math:`w_i d^2 / 2` where :math:`|d| \le \delta`, else
    :math:`w_i \delta (|d| - \delta / 2)`.

    Args:
        input: predictions :math:`x`, any shape.
        target: :math:`y`, of input's shape and dtype; another shape is broadcast, with a warning.
        delta: where the parabola ends, in input's unit; positive.
        weight: :math:`w`, of input's shape. ``"mean"`` divides by the number of elements all the
            same.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three, or weight is not of input's shape.
        RuntimeError: delta is not positive, or the shapes do not broadcast.

    Source: :func:`torch.nn.functional.huber_loss`.
    """
    return _huber_loss(input, target, reduction, delta, weight)


def _huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str,
    delta: float,
    weight: Tensor | None,
    prediction: Tensor | None = None,
) -> Tensor:
    fits = isinstance(delta, float | int) and delta > 0
    unfit = None if fits else f"delta {delta!r}"
    return _pointwise(
        "huber_loss", reference.huber_loss, (input, target, reduction, delta, weight),
        input, target, weight, None, float(delta) if fits else 0.0, reduction,
        unfit, False, prediction,
    )  # fmt: skip


# ---- classification ------------------------------------------------------------------------------


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross-entropy of probabilities:
    :math:`\ell_i = -w_i (y_i \log x_i + (1 - y_i) \log(1 - x_i))`.

    Each logarithm is bounded below by -100, and the denominator of the gradient
    :math:`(x_i - y_i) / (x_i (1 - x_i))` by 1e-12, as in torch.

    Args:
        input: probabilities :math:`x` in [0, 1], any shape.
        target: :math:`y` in [0, 1], of input's shape and dtype.
        weight: :math:`w`, broadcast to input's shape.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        RuntimeError: an element of input or target outside [0, 1]; names the first.
        ValueError: target is not of input's shape, or reduction none of the three.

    Source: :func:`torch.nn.functional.binary_cross_entropy`.
    """
    return _binary_cross_entropy(input, target, weight, size_average, reduce, reduction)


def _binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    prediction: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:
        size_average, reduce, reduction = None, None, _legacy(size_average, reduce)
    return _pointwise(
        "binary_cross_entropy", reference.binary_cross_entropy,
        (input, target, weight, size_average, reduce, reduction),
        input, target, weight, None, 0.0, reduction, None, True, prediction,
    )  # fmt: skip


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy of logits, stable for any of them:
    :math:`\ell_i = -w_i (p_i y_i \log \sigma(x_i) + (1 - y_i) \log(1 - \sigma(x_i)))`.

    Args:
        input: logits :math:`x`, any shape.
        target: :math:`y`, of input's shape and dtype, normally in [0, 1].
        weight: :math:`w`, broadcast to input's shape.
        pos_weight: :math:`p`, weight of the positive answer, broadcast to input's shape.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: target is not of input's shape, or reduction none of the three.

    Source: :func:`torch.nn.functional.binary_cross_entropy_with_logits`.
    """
    return _binary_cross_entropy_with_logits(
        input, target, weight, size_average, reduce, reduction, pos_weight
    )


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    pos_weight: Tensor | None,
    prediction: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:
        size_average, reduce, reduction = None, None, _legacy(size_average, reduce)
    name = "binary_cross_entropy_with_logits"
    return _pointwise(
        name if pos_weight is None else name + "_pos_weight",
        reference.binary_cross_entropy_with_logits,
        (input, target, weight, size_average, reduce, reduction, pos_weight),
        input, target, weight, pos_weight, 0.0, reduction, None, True, prediction,
    )  # fmt: skip


def _int64(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _rows_obstacle(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: Any, reduction: str
) -> str | None:
    """Why a loss over a class dimension is not fused for these shapes and options."""
    if type(reduction) is not str or reduction not in reference.REDUCTIONS:
        return f"reduction {reduction!r}"
    if input.dim() == 0:
        return "input has no class dimension"
    shape = input.shape
    if target.dtype is torch.int64:
        if target.shape != shape[:1] + shape[2:] if len(shape) > 1 else target.dim() != 0:
            return f"shapes {tuple(shape)} and {tuple(target.shape)}"
    elif target.shape != shape:
        return f"shapes differ: {tuple(shape)} and {tuple(target.shape)}"
    if weight is not None and weight.shape != (shape[1] if len(shape) > 1 else shape[0],):
        return f"a weight of shape {tuple(weight.shape)}"
    if not _int64(ignore_index):
        return f"ignore_index {ignore_index!r}"
    if ignore_index >= 0 and target.dtype is not torch.int64:
        return "ignore_index is given with class probabilities"
    classes = shape[1] if len(shape) > 1 else shape[0]
    if classes > 1 << 24:
        # Far beyond what the kernels have been tested with.
        return f"{classes} classes"
    return None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy of logits: :math:`\ell = -\sum_c w_c q_c \log \mathrm{softmax}(x)_c` of a row,
    :math:`q = (1 - \varepsilon) y + \varepsilon / C`.

    Args:
        input: logits :math:`x` of shape (C), (N, C) or (N, C, d1, ..., dk).
        target: class indices, int64, of input's shape without C; or class probabilities :math:`y`,
            of input's shape and dtype.
        weight: :math:`w` of shape (C). With class indices ``"mean"`` divides by the weights of the
            targets; with probabilities, by the number of rows.
        ignore_index: rows of this class index count for nothing, and their gradient is 0.
        label_smoothing: :math:`\varepsilon` in [0, 1].

    Returns:
        A 0-d tensor, or one of input's shape without C for ``"none"``; nan where ``"mean"`` finds
        every row ignored.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index; names it and its place.
        RuntimeError, ValueError: shapes that do not fit, label_smoothing outside [0, 1].

    Source: :func:`torch.nn.functional.cross_entropy`.
    """
    return _cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
    prediction: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:
        size_average, reduce, reduction = None, None, _legacy(size_average, reduce)
    if (
        _plain_calls()
        and type(label_smoothing) in (float, int)
        and _int64(ignore_index)
        and type(reduction) is str
    ):
        number = reference.REDUCTIONS.get(reduction)
        if number is not None:
            value = _C.cross_entropy(
                input, target, weight, ignore_index, label_smoothing, number, prediction
            )
            if value is not None:
                if _counted:
                    _count("cross_entropy")
                return value  # type: ignore[no-any-return]
    args = (
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )  # fmt: skip
    if _left_to_inductor(input, 1 << 14):
        if _listening():
            _report("cross_entropy", "few elements, which are left to the compiler", None)
        return reference.cross_entropy(*args)
    if _overridden(input, target, weight):
        return _offer(  # type: ignore[no-any-return]
            cross_entropy, (input, target, weight), args[:2], _options(cross_entropy, args),
            partial(_cross_entropy, *args, prediction),
        )  # fmt: skip
    if type(label_smoothing) is int:
        label_smoothing = float(label_smoothing)
    dtype: torch.dtype | str | None = None
    reason = _obstacle(input, target, weight)
    if reason is None:
        indices = target.dtype is torch.int64
        dtype = _result_dtype(input, weight, None if indices else target)
        if isinstance(dtype, str):
            reason = dtype
        elif type(label_smoothing) is not float or not 0 <= label_smoothing <= 1:
            reason = f"label_smoothing {label_smoothing!r}"
        else:
            reason = _rows_obstacle(input, target, weight, ignore_index, reduction)
    if _listening():
        _report("cross_entropy", reason, _backend(reason, input))
    if reason is not None:
        return reference.cross_entropy(*args)
    # The engine walks the dimensions behind C as one; in channels_last they are.
    if input.dim() > 3 and not (
        input.is_contiguous()
        or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))
    ):
        input = input.contiguous()
    assert isinstance(dtype, torch.dtype)
    return autograd.loss(
        backends.fused_on[input.device.type], input, target, weight, [], "cross_entropy",
        [label_smoothing], ignore_index, reference.REDUCTIONS[reduction], dtype, prediction,
    )  # fmt: skip


def log_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Multi-class log loss of probabilities: :math:`-\frac{1}{n} \sum_i \sum_c w_c y_{ic} \log
    p_{ic}`.

    Each :math:`p` is first bounded to [eps, 1], eps that of input's dtype; the gradient outside
    these bounds is 0. Rows are not normalised.

    Args:
        input: probabilities :math:`p` of shape (C), (N, C) or (N, C, d1, ..., dk).
        target: class indices, int64, of input's shape without C; or class probabilities :math:`y`,
            of input's shape and dtype.
        weight: :math:`w` of shape (C). With class indices ``"mean"`` divides by the weights of the
            targets; with probabilities, by the number of rows.
        ignore_index: rows of this class index count for nothing, and their gradient is 0.

    Returns:
        A 0-d tensor, or one of input's shape without C for ``"none"``.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index; names it and its place.
        ValueError, RuntimeError, TypeError: shapes, options or dtypes that do not fit.

    Source: :func:`sklearn.metrics.log_loss`. In float64 and float32 the two differ by no more than
    rounding up to :math:`p = 1 - eps`. Above it scikit-learn, which bounds :math:`p` to [eps, 1 - eps],
    gives eps, and this gives :math:`-\log p`, which is 0 at 1.
    """
    return _log_loss(input, target, weight, reduction, ignore_index)


def _log_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    prediction: Tensor | None = None,
) -> Tensor:
    if _plain_calls() and _int64(ignore_index) and type(reduction) is str:
        number = reference.REDUCTIONS.get(reduction)
        if number is not None:
            value = _C.log_loss(input, target, weight, ignore_index, number, prediction)
            if value is not None:
                if _counted:
                    _count("log_loss")
                return value  # type: ignore[no-any-return]
    args = (input, target, weight, reduction, ignore_index)
    if _overridden(input, target, weight):
        return _offer(  # type: ignore[no-any-return]
            log_loss, (input, target, weight), args[:2], _options(log_loss, args),
            partial(_log_loss, *args, prediction),
        )  # fmt: skip
    dtype: torch.dtype | str | None = None
    reason = _obstacle(input, target, weight)
    if reason is None:
        indices = target.dtype is torch.int64
        dtype = _result_dtype(input, weight, None if indices else target)
        if isinstance(dtype, str):
            reason = dtype
        else:
            reason = _rows_obstacle(input, target, weight, ignore_index, reduction)
            if indices and input.dim() > 8 and not input.is_cpu:
                reason = f"class indices over {input.dim()} dimensions"
    if _listening():
        _report("log_loss", reason, _backend(reason, input))
    if reason is not None:
        return reference.log_loss(*args)
    if weight is not None:
        weight = reference.class_weight(weight, input)
    eps = torch.finfo(input.dtype).eps
    assert isinstance(dtype, torch.dtype)
    # Elements that are added up to rows are rounded after that, once.
    wide = torch.promote_types(dtype, torch.float32) if reduction == "none" else dtype
    loss = autograd.loss(
        backends.fused_on[input.device.type], input, target, weight, [], "log_loss", [eps],
        ignore_index, reference.REDUCTIONS[reduction], wide, prediction,
    )  # fmt: skip
    if reduction != "none":
        return loss
    return loss.sum(1 if input.dim() > 1 else 0).to(dtype)


# torch's own of these names, and back: what handlers of torch functions know.
_TORCHS: dict[Any, Any] = {
    globals()[name]: getattr(torch.nn.functional, name)
    for name in __all__
    if hasattr(torch.nn.functional, name)
}
_OURS = {theirs: ours for ours, theirs in _TORCHS.items()}


def _scriptable(function: Any) -> Callable[[], Any]:
    def prepare() -> Any:
        if _counted and function in _TORCHS:  # patch() is on: the code may name torch's
            return _TORCHS[function]
        raise RuntimeError(NO_TORCHSCRIPT)

    return prepare


# What torch.jit.script asks of a function before it compiles it.
for _name in __all__:
    globals()[_name].__prepare_scriptable__ = _scriptable(globals()[_name])
