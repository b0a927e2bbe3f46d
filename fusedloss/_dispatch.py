"""Which path a call takes, and why; and the way there.

A plain call takes the short way, in C++ (csrc/torch/python.cpp), which answers None to any other.
The long way below finds the reason why a call cannot be fused, or calls the operator.
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

from . import _caller, autograd, backends
from ._losses import Loss
from .reference import REDUCTIONS, class_weight

_C: Any = backends.extension
NO_TORCHSCRIPT = (
    "fusedloss does not go into TorchScript, which is deprecated: use torch.compile or "
    "torch.export, or torch.nn's own losses where it must be torch.jit"
)
_DISABLED = torch._C._disabled_torch_function_impl
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

# The public functions by name; torch's own of these names, and back: what handlers of torch
# functions know. fusedloss.functional fills them in.
PUBLIC: dict[str, Callable[..., Any]] = {}
TORCHS: dict[Any, Any] = {}
OURS: dict[Any, Any] = {}


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
            :mod:`fusedloss`, a custom loss, or a whole model whose forward pass ends in one.
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
        ours = OURS.get(func, func)
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

    theirs = TORCHS.get(function, function)
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


def _plain_calls() -> bool:
    """Whether the short way into the operators is open: it explains and traces nothing."""
    return not torch.compiler.is_compiling() and backends.compiled_runs and _explaining is None


def left_to_inductor(input: Any, least: int) -> bool:
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


# ---- one call ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Operands:
    """What the kernels take of a call's arguments."""

    input: Any
    target: Any
    weight: Any
    pos_weight: Any
    reduction: Any
    parameter: Any
    ignore_index: Any

    @staticmethod
    def of(loss: Loss, args: tuple[Any, ...]) -> Operands:
        return Operands(
            args[0],
            args[1],
            loss.value(args, "weight"),
            loss.value(args, "pos_weight"),
            loss.value(args, "reduction"),
            loss.value(args, loss.parameter),
            loss.value(args, "ignore_index"),
        )


def run(loss: Loss, args: tuple[Any, ...], prediction: Tensor | None = None) -> Tensor:
    """One call of a loss, with all arguments of its public function in order."""
    if _plain_calls():
        value = _C.loss(loss.number, args, prediction)
        if value is not None:
            if _counted:
                _count(loss.name)
            return value  # type: ignore[no-any-return]
    return _run_any(loss, args, prediction)


def _run_any(loss: Loss, args: tuple[Any, ...], prediction: Tensor | None) -> Tensor:
    if loss.value(args, "size_average") is not None or loss.value(args, "reduce") is not None:
        args = _without_legacy(loss, args)
    call = Operands.of(loss, args)
    tensors = call.input, call.target, call.weight, call.pos_weight
    if left_to_inductor(call.input, loss.few):
        if _listening():
            _report(loss.name, "few elements, which are left to the compiler", None)
        return loss.reference(*args)
    if _overridden(*tensors):
        options = dict(zip(loss.arguments[2:], args[2:], strict=True))
        again = partial(run, loss, args, prediction)
        return _offer(PUBLIC[loss.name], tensors, args[:2], options, again)  # type: ignore[no-any-return]
    dtype: torch.dtype | str | None = None
    reason = _unfit(loss, call) or _obstacle(*tensors)
    if reason is None:
        indices = loss.over_classes and call.target.dtype is torch.int64
        dtype = _result_dtype(call.input, None if indices else call.target, *tensors[2:])
        if isinstance(dtype, str):
            reason = dtype
        else:
            reason = (_unfit_rows if loss.over_classes else _unfit_elements)(loss, call)
    if _listening():
        _report(loss.name, reason, _backend(reason, call.input))
    if reason is not None:
        traced = torch._C._get_tracing_state() is not None  # and warns of each comparison
        if traced or getattr(args[0], "shape", None) == getattr(args[1], "shape", None):
            return loss.reference(*args)
        return _caller.at_callers_line(loss.reference, *args)  # which warns, or raises an error
    assert isinstance(dtype, torch.dtype)
    return _call_operator(loss, call, dtype, prediction)


def _without_legacy(loss: Loss, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with the deprecated options' meaning in ``reduction``."""
    changed = dict(zip(loss.arguments, args, strict=True))
    changed["reduction"] = _legacy(changed["size_average"], changed["reduce"])
    changed["size_average"] = changed["reduce"] = None
    return tuple(changed.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _int64(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _unfit(loss: Loss, call: Operands) -> str | None:
    """Why the kernels do not take the loss's parameter."""
    if not loss.parameter:
        return None
    value = call.parameter
    if _is_number(value) and (loss.low <= value <= loss.high or (loss.at_zero and value == 0)):
        return None
    return f"{loss.parameter} {value!r} is outside of the kernels' domain"


def _unfit_elements(loss: Loss, call: Operands) -> str | None:
    """Why a loss of elements is not fused for these shapes and options."""
    input, target = call.input, call.target
    if type(call.reduction) is not str or call.reduction not in REDUCTIONS:
        return f"reduction {call.reduction!r}"
    if input.shape != target.shape:
        return f"shapes differ: {tuple(input.shape)} and {tuple(target.shape)}"
    if loss.name == "binary_cross_entropy" and _autocast_refuses(input.device.type):
        return "torch refuses it under autocast, as unsafe"
    broadcasts = loss.weight == "broadcasts"
    if call.weight is not None and not broadcasts and torch.is_autocast_enabled(input.device.type):
        return "autocast leaves a weighted regression loss in its inputs' dtype"
    for w in (call.weight, call.pos_weight):
        if w is None or w.shape == input.shape or (broadcasts and _broadcasts_to(w, input)):
            continue
        return f"a weight of shape {tuple(w.shape)}"
    return None


def _unfit_rows(loss: Loss, call: Operands) -> str | None:
    """Why a loss over a class dimension is not fused for these shapes and options."""
    input, target = call.input, call.target
    if type(call.reduction) is not str or call.reduction not in REDUCTIONS:
        return f"reduction {call.reduction!r}"
    if input.dim() == 0:
        return "input has no class dimension"
    shape = input.shape
    classes = shape[1] if len(shape) > 1 else shape[0]
    indices = target.dtype is torch.int64
    if indices:
        if target.shape != shape[:1] + shape[2:] if len(shape) > 1 else target.dim() != 0:
            return f"shapes {tuple(shape)} and {tuple(target.shape)}"
    elif target.shape != shape:
        return f"shapes differ: {tuple(shape)} and {tuple(target.shape)}"
    if call.weight is not None and call.weight.shape != (classes,):
        return f"a weight of shape {tuple(call.weight.shape)}"
    if not _int64(call.ignore_index):
        return f"ignore_index {call.ignore_index!r}"
    if call.ignore_index >= 0 and not indices:
        return "ignore_index is given with class probabilities"
    if classes > 1 << 24:
        # Far beyond what the kernels have been tested with.
        return f"{classes} classes"
    if loss.name == "log_loss" and indices and input.dim() > 8 and not input.is_cpu:
        return f"class indices over {input.dim()} dimensions"
    return None


def _call_operator(
    loss: Loss, call: Operands, dtype: torch.dtype, prediction: Tensor | None
) -> Tensor:
    """The fused call of what _run_any has found to fit."""
    input, weight = call.input, call.weight
    name, parameters = loss.name, [float(call.parameter)] if loss.parameter else []
    if loss.at_zero and call.parameter == 0:
        name, parameters = loss.at_zero, []
    more = [] if call.pos_weight is None else [call.pos_weight]
    if more:
        name += "_pos_weight"
    wide = dtype
    rows_of_elements = name == "log_loss"
    if rows_of_elements:
        parameters = [torch.finfo(input.dtype).eps]
        weight = None if weight is None else class_weight(weight, input)
        # Elements that are added up to rows are rounded after that, once.
        if call.reduction == "none":
            wide = torch.promote_types(dtype, torch.float32)
    elif loss.over_classes and input.dim() > 3 and not _joins_inner_dimensions(input):
        input = input.contiguous()
    value = autograd.loss(
        backends.fused_on[input.device.type], input, call.target, weight, more, name, parameters,
        call.ignore_index or 0, REDUCTIONS[call.reduction], wide, prediction,
    )  # fmt: skip
    if rows_of_elements and call.reduction == "none":
        return value.sum(1 if input.dim() > 1 else 0).to(dtype)
    return value


def _joins_inner_dimensions(input: Tensor) -> bool:
    """Whether the row engines can walk the dimensions behind the classes as one."""
    return input.is_contiguous() or (
        input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    )
