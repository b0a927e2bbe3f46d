"""Which path a call takes, and why.

A plain call takes the short way, in C++ (csrc/torch/python.cpp), which returns None for all others.
The long way below finds the reason why a call cannot be fused, or calls the operator.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn._reduction import legacy_get_string
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
    handle_torch_function,
    has_torch_function,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _caller, backends
from ._losses import Loss
from .reference import REDUCTIONS, class_weight

_C: Any = backends.extension
NO_TORCHSCRIPT = (
    "fusedloss does not go into TorchScript, which is deprecated: use torch.compile or "
    "torch.export, or torch.nn's own losses where it must be torch.jit"
)
_DISABLED = torch._C._disabled_torch_function_impl
NOTHING_IGNORED = -(1 << 63)  # an ignore_index
# What an operand may be beside an input of another dtype: see Loss.targets.
_MOST = {"same": 0, "floating": 1, "signed": 2, "integers": 3, "any": 4}
_FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_KINDS = {
    **dict.fromkeys(_FLOATING, 1),
    **dict.fromkeys((torch.int64, torch.int32, torch.int16, torch.int8), 2),
    torch.uint8: 3,
    torch.bool: 4,
}

# The public functions by name, and the pairs of torch's function, which handlers of torch functions
# know, and ours. fusedloss.functional fills them in.
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
_explaining_lock = threading.RLock()  # explain() may be called by the function that it explains


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Which path ``fn(*args, **kwargs)`` takes, and why, without computing it.

    Args:
        fn: anything that calls a fused loss: a function of :mod:`fusedloss.functional`, a module of
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
    """A line that calls a loss, the path that its calls take, and how many there were: 0 if a compiler
    has traced it, since the compiled graph counts nothing."""

    file: str
    line: int
    function: str
    loss: str
    path: Explanation
    calls: int
    code: CodeType  # keeps its id


_FUSED = "value and gradient in one pass over the inputs"
# A table of calls for each patch() that is on, by place in the code, loss and path (None: the short
# way, which is fused).
_counted: tuple[dict[Any, Call], ...] = ()


def _count(loss: str, path: Explanation | None = None, calls: int = 1) -> None:
    frame = _caller.frame(sys._getframe(2))  # the first two are of this file
    while not calls and frame.f_code.co_filename == "<string>" and frame.f_back:
        frame = _caller.frame(frame.f_back)  # the one before is code that torch.fx has made
    code = frame.f_code
    key = (id(code), frame.f_lasti, loss, path)
    for table in _counted:
        call = table.get(key)
        if call is None:
            shown = path or Explanation("compiled", True, (_FUSED,))
            call = table[key] = Call(
                code.co_filename, frame.f_lineno or 0, code.co_name, loss, shown, 0, code
            )
        call.calls += calls


def _listening() -> bool:
    """Whether calls report their paths, to explain() or patch()."""
    return _explaining is not None or bool(_counted)


@_caller.constant_when_traced
def _report(loss: str, reason: str | None, backend: str = "", *more: str) -> None:
    """Reports the path of a call that did not take the short way to explain() or patch().

    reason: why it is not fused. backend: the one that computes a fused call; more: why that one."""
    if reason is not None:
        path = Explanation("reference", False, (reason,))
    else:
        path = Explanation(backend, True, (_FUSED, *more))
    if _explaining == threading.get_ident():
        raise _Explained(path)
    _count(loss, path, calls=0 if torch.compiler.is_compiling() else 1)


@_caller.constant_when_traced
def _transformed() -> bool:
    """Whether a torch.func transform is active. (A compiler that traces its inside sees it as well.)"""
    return torch._C._functorch.peek_interpreter_stack() is not None


@_caller.constant_when_traced
def _draft_exported() -> bool:
    """Whether torch.export.draft_export is tracing."""
    config = sys.modules.get("torch._functorch.config")
    return getattr(config, "fake_tensor_propagate_real_tensors", False)


def _sees_functions(value: Any) -> bool:
    """Whether the value is a tensor of a subclass that overrides torch functions."""
    kind = type(value)
    if kind is Tensor or kind is Parameter:
        return False
    return getattr(kind, "__torch_function__", _DISABLED) is not _DISABLED


def _overrides(value: Any) -> bool:
    """Whether a tensor's subclass overrides torch functions or wraps other tensors."""
    return _sees_functions(value) or is_traceable_wrapper_subclass(value)


def _why_not_fused(named: Mapping[str, Any], *others: Any, gradients: int = 1) -> str | None:
    """Why no fused kernel takes these tensors, apart from shapes and dtypes; None: one does.

    named: the inputs, mostly input and target, in order. gradients: for how many of them, from the
    first on, the kernels give one.
    """
    inputs = list(named.values())
    input = inputs[0]
    if torch._C._get_tracing_state() is not None:
        if _counted:  # under patch() the calling code may not know fusedloss
            return "torch.jit is tracing"
        raise RuntimeError(NO_TORCHSCRIPT)
    if any(map(_overrides, (*inputs, *others))):
        return "a tensor subclass is involved"
    if not all(isinstance(t, Tensor) for t in inputs):
        return f"{' and '.join(named)} are not all tensors"
    for name, t in named.items():
        if t.device != input.device:
            return f"input is on {input.device} and {name} on {t.device}"
    if input.device.type not in backends.fused_on:
        return backends.why_not_fused(input.device.type)
    if any(t.layout is not torch.strided for t in inputs):
        layouts = " and ".join(str(t.layout) for t in inputs)
        return f"layouts {layouts} are not all strided"
    if any(t.is_nested for t in inputs):
        return "a nested tensor is involved"
    # draft_export runs each operator to see whether it writes to its arguments, and mistakes an
    # optional tensor that is None for one that was written to.
    if torch.compiler.is_exporting() and _draft_exported():
        return "torch.export.draft_export is tracing"
    if _transformed():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    grad = torch.is_grad_enabled()
    for name, t in list(named.items())[gradients:]:
        if grad and t.requires_grad:
            return f"a gradient for {name} is wanted"
    # Our backward needs both, and torch's may not. (A compiler cannot trace is_inference.)
    needs_gradient = any(t.requires_grad for t in inputs)
    saved = grad and needs_gradient and not torch.compiler.is_compiling()
    for name, t in named.items():
        if saved and t.is_inference():
            return f"{name} is an inference tensor, which cannot be saved for backward"
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


def has_numbers() -> bool:
    """Whether the tensors of a call hold numbers, and no compiler or tracer records what is done with them."""
    return not (
        torch.compiler.is_compiling() or _transformed() or torch._C._len_torch_dispatch_stack() > 0
    )


def check_label(name: str, label: Tensor, classes: int, ignore_index: int) -> None:
    """Raises the error for a label that is no class, where that can be known without waiting. (The loss of
    its row is nan elsewhere.)"""
    if label.device.type != "cpu" or not has_numbers():
        return
    wrong = ((label < 0) | (label >= classes)) & (label != ignore_index)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        at = f"[{', '.join(map(str, place))}]" if place else ""
        raise IndexError(
            f"Target {label[place].item()} is out of bounds. It stands at {name}{at}; there are "
            f"{classes} classes."
        )


# ---- subclasses and modes ------------------------------------------------------------------------


def _overridden(*tensors: Any) -> bool:
    """Whether a tensor's class or a mode overrides torch functions. (A compiler handles that itself.)"""
    return not torch.compiler.is_compiling() and has_torch_function(tensors)


def _carried_metadata(tensors: Sequence[Any]) -> type | None:
    """The class of the result, if the only subclass among the tensors has nothing to say about a loss:
    torch's own __torch_function__ makes the result one of it, torchvision's a plain tensor."""
    kinds = {type(t) for t in tensors if _sees_functions(t)}
    if len(kinds) != 1 or torch._C._len_torch_function_stack():
        return None
    (kind,) = kinds
    handler: Any = getattr(kind.__torch_function__, "__func__", None)
    if handler is Tensor.__torch_function__.__func__:  # type: ignore[attr-defined]
        return kind
    vision = sys.modules.get("torchvision.tv_tensors")
    if vision is None or handler is not vision.TVTensor.__torch_function__.__func__:
        return None
    return kind if vision._torch_function_helpers._must_return_subclass() else Tensor


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if _sees_functions(value) else value


def _set_modes(modes: Sequence[TorchFunctionMode]) -> None:
    for _ in range(torch._C._len_torch_function_stack()):
        _pop_mode()  # type: ignore[no-untyped-call]
    for mode in modes:
        _push_mode(mode)  # type: ignore[no-untyped-call]


@contextmanager
def _only_modes(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Only these are on; torch calls the last one first."""
    found = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    _set_modes(modes)
    try:
        yield
    finally:
        _set_modes(found)


class _BelowModes(TorchFunctionMode):
    """Lies below the caller's modes, and replaces torch's function by ours in a call that they pass on."""

    def __init__(self, function: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self._offered = function, options
        self.reached = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reached = True
        ours = OURS.get(func, func)
        function, options = self._offered
        # torch's l1_loss leaves its weight out when it passes a call on.
        left_out = options if ours is function else {}
        return ours(*args, **{**left_out, **(kwargs or {})})


def _offer(
    function: Any,
    tensors: tuple[Any, ...],
    args: tuple[Any, ...],
    options: dict[str, Any],
    again: Callable[[], Any],
) -> Any:
    """Offers ``function(*args, **options)`` to the modes and subclasses that override it.

    It offers torch's function itself. (torch would offer the function that has its name in torch.nn.
    functional, which is ours under patch(), and which no handler knows.) again: makes the same call
    if nobody overrides it. It is a partial, since a closure would allocate its cells in every call.
    """
    from torch.utils._device import DeviceContext  # imported already if one is on

    theirs = TORCHS.get(function, function)
    active = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    # A default device changes nothing, since a loss makes no tensor.
    devices = [mode for mode in active if type(mode) is DeviceContext]
    if len(devices) < len(active):
        ours = _BelowModes(function, options)
        if not any(type(mode) is _BelowModes for mode in active):
            others = [mode for mode in active if type(mode) is not DeviceContext]
            active = [*devices, ours, *others]
        with _only_modes(active):
            value = handle_torch_function(theirs, tensors, *args, **options)
        if _listening() and not ours.reached:
            _report(function.__name__, "a TorchFunctionMode has computed it")
        return value
    if any(map(_sees_functions, tensors)):
        if _listening():
            _report(function.__name__, "a tensor subclass is involved")
        with _only_modes(()):
            return handle_torch_function(theirs, tensors, *args, **options)
    with torch._C.DisableTorchFunction():
        return again()


# ---- what a call needs ---------------------------------------------------------------------------


def _autocast_refuses(device: str) -> bool:
    """Whether torch raises an error for binary_cross_entropy, which it does under GPU autocast."""
    return device != "cpu" and torch.is_autocast_enabled(device)


def _result_dtype(
    inputs: Sequence[Tensor | None],
    kinds: Sequence[str],
    weights: Sequence[tuple[Tensor | None, str]],
    result: str,
) -> torch.dtype | str:
    """The dtype of the loss; or, as text, why no fused kernel takes these dtypes.

    kinds: what each input may be beside a first input of another dtype, as in ``Loss.targets``; None
    stands for class indices. weights: each with what it may be. result: as in ``Loss.result``; or
    ``"inputs"``, promoted from all but weights.
    """
    first = inputs[0]
    assert first is not None
    dtype = first.dtype
    if dtype not in _FLOATING:
        return f"dtype {dtype} has no fused kernel"
    # Under autocast torch casts the inputs of every loss to float32; our kernels read them as they are.
    autocast = torch.is_autocast_enabled(first.device.type) and dtype is not torch.float64
    found = {dtype}
    for place, (t, kind) in enumerate((*zip(inputs, kinds, strict=True), *weights)):
        if t is None or t.dtype is first.dtype:
            continue
        most = max(_MOST[kind], autocast)
        if _KINDS.get(t.dtype, len(_MOST)) > most:
            return f"dtypes differ: {first.dtype} and {t.dtype}"
        if result == "inputs" and place >= len(inputs):
            continue
        if result in ("promoted", "inputs"):
            dtype = torch.promote_types(dtype, t.dtype)
        elif result == "target" and place == 1:
            dtype = t.dtype
        if t.dtype in _FLOATING:
            found.add(t.dtype)
    if autocast and torch.float64 not in found:
        return torch.float32
    # The kernels compute in float32, or in float64 for a loss of that dtype: no operand may have more
    # digits than that. Nor may each of two gradients have digits that the other one lacks.
    digits_stay = dtype in found and (torch.float64 not in found or dtype is torch.float64)
    if digits_stay and not autocast:
        return dtype
    names = " and ".join(sorted(map(str, found)))
    return f"dtypes {names} under autocast" if autocast else f"dtypes {names} for a loss of {dtype}"


def _dtype(loss: Loss, call: dict[str, Any]) -> torch.dtype | str:
    """:func:`_result_dtype` of a call."""
    if loss.rows:
        return _dtype_of_rows(loss, call)
    input, target, *more = (call[name] for name in loss.arguments[: loss.inputs])
    kinds = ["same", *("floating",) * (loss.inputs - 1)]
    kinds[loss.arguments.index("target")] = loss.targets
    of_weight = "any"
    if loss.over_classes:
        of_weight = "same"
        if target.dtype is torch.int64:
            target = None
    weight = call.get("weight")
    one_number = weight is not None and weight.dim() == 0 and input.dim() > 0
    if loss.result == "promoted" and one_number:
        of_weight = "same"  # torch does not let one number decide
    weights = (weight, of_weight), (call.get("pos_weight"), "signed")
    dtype = _result_dtype((input, target, *more), kinds, weights, loss.result)
    if loss.over_classes and dtype is torch.float64 and input.dtype is not dtype:
        return f"dtypes differ: {input.dtype} and {dtype}"  # the row engines compute as for input
    return dtype


def _dtype_of_rows(loss: Loss, call: dict[str, Any]) -> torch.dtype | str:
    """:func:`_result_dtype` of a call of a loss in _row_losses.py."""
    input = call[loss.arguments[0]]
    inputs = [call[name] for name in loss.arguments[: loss.rows]]
    kinds = ("same", *("floating",) * (loss.rows - 1))
    target: Any = call.get("target")
    if loss.over_classes:
        if target.dtype is not torch.int64:
            return f"a target of {target.dtype}"
        target = None
        # Torch's function takes these on a GPU only.
        low = input.dtype in (torch.bfloat16, torch.float16)
        if low and input.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return f"torch has no {loss.name} of {input.dtype} on the CPU"
    others = (target, loss.targets), (call.get("weight"), "same")
    return _result_dtype(inputs, kinds, others, loss.result)


def _broadcasts_to(small: Tensor, big: Tensor) -> bool:
    shape = big.shape
    if small.shape == shape:
        return True
    offset = len(shape) - small.dim()
    return offset >= 0 and all(n in (1, shape[offset + d]) for d, n in enumerate(small.shape))


@_caller.constant_when_traced
def _legacy(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that the deprecated options stand for, with torch's warning."""
    return _caller.at_callers_line(legacy_get_string, size_average, reduce)


def _plain_calls() -> bool:
    """Whether the short way into the operators is open: it can neither explain nor trace."""
    return not torch.compiler.is_compiling() and backends.compiled_runs and _explaining is None


def _left_to_inductor(input: Any, least: int) -> bool:
    """Whether torch.compile gets the loss in plain PyTorch, which it does for few elements.

    least: from that many elements on, one pass saves more time than an operator costs in a compiled
    step: about 30 us, for its call, its guards, and because Inductor cannot fuse anything into it.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and backends.automatic()
        and isinstance(input, Tensor)
        and input.numel() < least
    )


def warn_of_mean(size_average: bool | None, reduce: bool | None, reduction: str) -> None:
    """Torch's warning about the mean of a divergence."""
    if reduction == "mean" and size_average is None and reduce is None:
        _caller.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release."
        )


# ---- one call ------------------------------------------------------------------------------------


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
    call = dict(zip(loss.arguments, args, strict=True))
    if call.get("size_average") is not None or call.get("reduce") is not None:
        call["reduction"] = _legacy(call["size_average"], call["reduce"])
        call["size_average"] = call["reduce"] = None
        args = tuple(call.values())
    input, target = args[:2]
    weights = call.get("weight"), call.get("pos_weight")
    inputs = dict(zip(loss.arguments[: loss.inputs], args, strict=False))
    if _left_to_inductor(input, loss.few):
        if _listening():
            _report(loss.name, "few elements, which are left to the compiler")
        return loss.reference(*args)
    if _overridden(*inputs.values(), *weights):
        kind = _carried_metadata((*inputs.values(), *weights))
        if kind is not None:
            value = run(loss, tuple(map(_plain, args)), prediction)
            return value if kind is Tensor else value.as_subclass(kind)
        options = dict(zip(loss.arguments[loss.inputs :], args[loss.inputs :], strict=True))
        again = partial(run, loss, args, prediction)
        tensors = *inputs.values(), *weights
        return _offer(PUBLIC[loss.name], tensors, args[: loss.inputs], options, again)  # type: ignore[no-any-return]
    backend, dtype = "", None
    reason = _unfit(loss, call) or _why_not_fused(inputs, *weights, gradients=loss.gradients)
    if reason is None:
        dtype = _dtype(loss, call)
        if isinstance(dtype, str):
            reason = dtype
        else:
            reason = _unfit_call(loss, call)
    key = why_not = ""
    if reason is None:
        backend = backends.fused_on[input.device.type]
        if loss.rows:
            backend, key, why_not = _prepared_rows(_definition(loss, call), input.device.type)
            reason = None if backend else why_not
    if _listening():
        _report(loss.name, reason, backend, *filter(None, (why_not,)))
    if reason is not None:
        traced = torch._C._get_tracing_state() is not None  # and warns about every comparison
        if traced or getattr(input, "shape", None) == getattr(target, "shape", None):
            return loss.reference(*args)
        return _caller.at_callers_line(loss.reference, *args)  # it warns, or raises an error
    assert isinstance(dtype, torch.dtype)
    if loss.rows:
        return _run_rows(loss, call, backend, key, dtype, prediction)
    return _run_fused(loss, call, backend, dtype, prediction)


def _unfit(loss: Loss, call: dict[str, Any]) -> str | None:
    """Why the kernels do not take the loss's parameters."""
    for place, name in enumerate(loss.parameters):
        value = call[name]
        fits = _is_number(value)
        if place == 0:
            at_zero = bool(loss.at_zero) and value == 0
            fits = fits and (loss.low <= value <= loss.high or at_zero)
        elif not loss.rows:
            fits = isinstance(value, bool)
        if not fits:
            return f"{name} {value!r} is outside of the kernels' domain"
    if loss.powers and not (_is_number(call["p"]) and call["p"] in loss.powers):
        return f"there are no kernels for p {call['p']!r}"
    variant = call.get(loss.variant)
    if loss.variant in ("", "weight", "pos_weight") or isinstance(variant, bool):
        return None
    return f"{loss.variant} {variant!r} is no bool"


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _unfit_call(loss: Loss, call: dict[str, Any]) -> str | None:
    """Why a loss is not fused for these shapes and options."""
    if loss.rows:
        return _unfit_custom_rows(loss, call)
    return (_unfit_rows if loss.over_classes else _unfit_elements)(loss, call)


def _unfit_elements(loss: Loss, call: dict[str, Any]) -> str | None:
    """Why a loss over elements is not fused for these shapes and options."""
    input, weight = call[loss.arguments[0]], call.get("weight")
    reduction = call["reduction"]
    if type(reduction) is not str or reduction not in (*REDUCTIONS, *_also(loss)):
        return f"reduction {reduction!r}"
    for name in loss.arguments[1 : loss.inputs]:
        if name == "var" and _expanded_variance(call["var"], input) is not None:
            continue
        if call[name].shape != input.shape and not _is_expanded(loss, call):
            return f"shapes differ: {tuple(input.shape)} and {tuple(call[name].shape)}"
    if loss.operator and input.dim() == 0:
        return "input has no class dimension"
    if loss.name == "binary_cross_entropy" and _autocast_refuses(input.device.type):
        return "torch refuses it under autocast, as unsafe"
    broadcasts = loss.weight == "broadcasts"
    if weight is not None and not broadcasts and torch.is_autocast_enabled(input.device.type):
        return "autocast leaves a weighted regression loss in its inputs' dtype"
    for w in (weight, call.get("pos_weight")):
        if w is None or w.shape == input.shape or (broadcasts and _broadcasts_to(w, input)):
            continue
        return f"a weight of shape {tuple(w.shape)}"
    return None


def _is_expanded(loss: Loss, call: dict[str, Any]) -> bool:
    """Whether the kernels read the target through an expanded view, which has no gradient of its own."""
    if not loss.expands or torch.compiler.is_compiling():  # a compiler cannot trace the warning
        return False
    input, target = call["input"], call["target"]
    wanted = torch.is_grad_enabled() and target.requires_grad
    return not wanted and _broadcasts_to(target, input)


def _also(loss: Loss) -> tuple[str, ...]:
    """Further reductions."""
    return ("batchmean",) if loss.name == "kl_div" else ()


def _expanded_variance(var: Tensor, input: Tensor) -> Tensor | None:
    """A variance in input's shape; it may lack the last dimension, or be 1 along one. None: it does
    not fit."""
    if input.dim() > 0 and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    if var.dim() != input.dim():
        return None
    off = [n for n, size in zip(var.shape, input.shape, strict=True) if n != size]
    return var.expand_as(input) if off in ([], [1]) else None


def _unfit_rows(loss: Loss, call: dict[str, Any]) -> str | None:
    """Why a loss over a class dimension is not fused for these shapes and options."""
    input, target, weight = call["input"], call["target"], call["weight"]
    ignore_index = call["ignore_index"]
    if type(call["reduction"]) is not str or call["reduction"] not in REDUCTIONS:
        return f"reduction {call['reduction']!r}"
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
    if weight is not None and weight.shape != (classes,):
        return f"a weight of shape {tuple(weight.shape)}"
    if type(ignore_index) is not int or not -(1 << 63) <= ignore_index < 1 << 63:
        return f"ignore_index {ignore_index!r}"
    if ignore_index >= 0 and not indices:
        return "ignore_index is given with class probabilities"
    if classes > 1 << 24:
        # Far beyond the sizes that the kernels have been tested with.
        return f"{classes} classes"
    return None


# ---- the losses of _row_losses.py ----------------------------------------------------------------


def _unfit_custom_rows(loss: Loss, call: dict[str, Any]) -> str | None:
    """Why a loss of _row_losses.py is not fused for these shapes and options."""
    input, weight = call[loss.arguments[0]], call.get("weight")
    if input.numel() < loss.few and backends.automatic():
        return f"fewer than {loss.few} elements, for which no kernel is compiled"
    if torch.compiler.is_exporting():
        return "torch.export is tracing, and the kernel is compiled on each machine"
    if type(call["reduction"]) is not str or call["reduction"] not in REDUCTIONS:
        return f"reduction {call['reduction']!r}"
    if input.dim() == 0:
        return "input has no class dimension"
    for place, name in enumerate(loss.arguments[: loss.inputs]):
        shape = input.shape if place < loss.rows else input.shape[:-1]
        if call[name].shape != shape:
            return f"shapes {tuple(input.shape)} and {tuple(call[name].shape)}"
    if loss.rows < loss.inputs and input.dim() > 2:
        return f"a target of shape {tuple(input.shape[:-1])}"
    if weight is not None and weight.shape != input.shape[-1:]:
        return f"a weight of shape {tuple(weight.shape)}"
    return None


def _definition(loss: Loss, call: dict[str, Any]) -> str:
    """The name of the definition in _row_losses.py that computes a call."""
    variant = call.get(loss.variant)
    return loss.name if variant is None or variant is False else f"{loss.name}_{loss.variant}"


@_caller.constant_when_traced
def _prepared_rows(definition: str, device: str) -> tuple[str, str, str]:
    """See custom/prepare.py. The module imports SymPy."""
    found: tuple[str, str, str] = import_module("fusedloss._row_losses").prepared(
        definition, device
    )
    return found


def _run_rows(
    loss: Loss, call: dict[str, Any], backend: str, key: str, dtype: torch.dtype,
    prediction: Tensor | None,
) -> Tensor:  # fmt: skip
    tensors = [call[name] for name in loss.arguments[: loss.inputs]]
    class_dim = min(1, tensors[0].dim() - 1)
    for place, t in enumerate(tensors):
        if place < loss.rows:
            moved = t.movedim(-1, class_dim)
            joins = moved.dim() <= 3 or _joins_inner_dimensions(moved)
            tensors[place] = moved if joins else moved.contiguous()
        elif t.dtype is torch.float64 and dtype is not t.dtype:
            # The kernels would round it to one that they compare with.
            tensors[place] = (t == 1).to(dtype) - (t == -1).to(dtype)
    if call.get("weight") is not None:
        tensors.append(call["weight"])
    input, target, *more = tensors
    numbers = [float(call[name]) for name in loss.parameters]
    try:
        value: Tensor = operator(backend)(
            input, target, None, more, key, numbers, NOTHING_IGNORED,
            REDUCTIONS[call["reduction"]], dtype, prediction,
        )  # fmt: skip
    except IndexError as error:  # what torch's function says, and where it is
        raise RuntimeError(f"target out of range: {error}") from None
    return value


# ---- kernels -------------------------------------------------------------------------------------


@_caller.constant_when_traced
def _load_triton() -> bool:
    """Defines Triton's operators, at their first use and outside of a compiler's trace."""
    import_module("fusedloss.backends.triton")
    return True


def operator(backend: str) -> Any:
    """The operator of a backend that computes a fused call, and is differentiable."""
    if backend == "compiled":
        return torch.ops.fusedloss.loss.default
    _load_triton()
    if not torch.compiler.is_compiling():
        return sys.modules["fusedloss.backends.triton"].loss
    return torch.ops.fusedloss_triton.loss.default


def operator_with_gradients(backend: str) -> Any:
    """The operator that computes the losses of rows, and their gradients into given memory."""
    if backend == "compiled":
        return torch.ops.fusedloss.loss_with_gradients_.default
    _load_triton()
    return torch.ops.fusedloss_triton.loss_with_gradients_.default


def _run_fused(
    loss: Loss, call: dict[str, Any], backend: str, dtype: torch.dtype, prediction: Tensor | None
) -> Tensor:
    input, target, *more = (call[name] for name in loss.arguments[: loss.inputs])
    if loss.expands and target.shape != input.shape:
        _caller.warn(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size."
        )
        target = target.expand_as(input)
    weight = call.get("weight")
    reduction, pos_weight = call["reduction"], call.get("pos_weight")
    name, parameters = loss.operator or loss.name, [float(call[key]) for key in loss.parameters]
    if loss.at_zero and parameters[0] == 0:
        name, parameters = loss.at_zero, []
    if loss.name == "gaussian_nll_loss":
        more = [_expanded_variance(call["var"], input)]
    if pos_weight is not None:
        more = [pos_weight]
    variant = call.get(loss.variant)
    if variant is not None and variant is not False:
        name += f"_{loss.variant}"
    wide = dtype
    # Losses over rows that are sums of elements' losses.
    class_dim = -1 if loss.operator else 1 if input.dim() > 1 else 0
    rows_of_elements = loss.name == "log_loss" or bool(loss.operator)
    if loss.name == "log_loss":
        parameters = [torch.finfo(input.dtype).eps]
        weight = None if weight is None else class_weight(weight, input)
    divides = reduction == "batchmean" or (bool(loss.operator) and reduction != "mean")
    if divides or (rows_of_elements and reduction == "none"):
        # What is left to be done below is rounded only once, after that.
        wide = torch.promote_types(dtype, torch.float32)
    elif loss.over_classes and input.dim() > 3 and not _joins_inner_dimensions(input):
        input = input.contiguous()
    value: Tensor = operator(backend)(
        input, target, weight, more, name, parameters, call.get("ignore_index") or 0,
        REDUCTIONS["sum" if reduction == "batchmean" else reduction], wide, prediction,
    )  # fmt: skip
    if rows_of_elements and reduction == "none":
        value = value.sum(class_dim)
    if loss.operator and reduction != "mean":
        value = value / input.shape[-1]
    if reduction == "batchmean" and input.dim() > 0:
        value = value / input.shape[0]
    return value.to(dtype)


def _joins_inner_dimensions(input: Tensor) -> bool:
    """Whether the row engines can walk the dimensions behind the classes as one."""
    return input.is_contiguous() or (
        input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    )
