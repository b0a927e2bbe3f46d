"""Makes a custom loss ready for a device: which backend computes it, compiled if it is not yet."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import torch

from .. import _caller, backends, second_order
from .building import CPU, CPU_ROWS, CUDA, CUDA_ROWS, CannotCompile, cpu_library, key_of, load_cuda

if TYPE_CHECKING:
    from .loss import CustomLoss, PointwiseLoss
    from .rows import RowLoss

_C: Any = backends.extension
_count = itertools.count()
_defined: WeakValueDictionary[int, CustomLoss] = WeakValueDictionary()


def define(loss: CustomLoss) -> int:
    """The number of a new loss. (A tracing compiler takes a number for a constant, but no loss.)"""
    number = next(_count)
    _defined[number] = loss
    return number


@_caller.constant_when_traced
def prepared(number: int, device: str, warns: bool = True) -> tuple[str, str, str]:
    """Which backend computes a loss on that device, the name of the loss in its operators, and why the
    backends before that one cannot. Without any such backend the first two are "", and a warning says
    so, once, unless warns is False."""
    loss = _defined[number]
    candidates = backends.candidates(device)
    found = loss._prepared.get((device, candidates))
    if found is None:
        found = loss._prepared[device, candidates] = _prepare(loss, device, candidates)
        if warns and not found[0]:
            _caller.warn(
                f"{loss.__name__} runs on plain PyTorch, without fused kernels: {found[2]}",
                RuntimeWarning,
            )
    return found


def _prepare(loss: CustomLoss, device: str, candidates: tuple[str, ...]) -> tuple[str, str, str]:
    reasons = []
    for backend in candidates:
        load = _LOADERS[loss._decorator].get((backend, device))
        try:
            if load is None:
                raise CannotCompile(f"has no kernels of custom losses for {device} tensors")
            key = load(loss)
        except (CannotCompile, OSError) as error:
            reasons.append(f"{backend}: {error}")
            continue
        second_order.custom_references.setdefault(key, loss._reference)
        if backend == "compiled":
            loss._keys[device] = key
        return backend, key, "; ".join(reasons)
    return "", "", "; ".join(reasons)


def _load_cpu(loss: CustomLoss) -> str:
    engine = CPU_ROWS if loss._decorator == "row_loss" else CPU
    library = cpu_library(loss._traced.identifier, loss._struct, engine)
    if library.key not in second_order.custom_references:
        library.load(partial(_C.load_custom, library.key))
    return library.key


def _load_cuda(loss: CustomLoss) -> str:
    name, of_rows = loss._traced.identifier, loss._decorator == "row_loss"
    engine = CUDA_ROWS if of_rows else CUDA
    key = key_of(name, engine, engine.source(loss._struct))

    def load(architecture: str, path: str) -> None:
        if not torch.cuda.is_available():  # it is for the cache alone
            return
        capability = int(architecture.rstrip("af"))  # of 90a and 100f, say
        if of_rows:
            _load_cuda_rows(cast("RowLoss", loss), key, capability, path)
        else:
            _C.load_custom_kernels(key, loss.inputs, len(loss._names) + 1, capability, path)

    if key not in second_order.custom_references:
        load_cuda(name, loss._struct, load, engine)
    return key


def _load_cuda_rows(loss: RowLoss, key: str, capability: int, path: str) -> None:
    kinds = [[*type(kind)].index(kind) for kind in loss._kinds]
    auxiliary = len(loss._program.auxiliary)
    sizes = loss._program.gpu_sizes
    _C.load_custom_rows_kernels(key, kinds, len(loss._names), sizes, auxiliary, capability, path)


def _load_triton(loss: PointwiseLoss) -> str:
    from ..backends import triton
    from . import printing

    constants = printing.host_constants(loss._traced, loss._traced.kernel)
    source = printing.triton(loss._traced)
    name = loss._traced.identifier
    key: str = triton.load(name, source, loss.inputs, len(loss._names) + 1, constants)
    return key


def _load_triton_rows(loss: RowLoss) -> str:
    from ..backends import triton
    from .row_printing import triton as printed

    source, constants = printed(loss._traced, loss._program)
    key: str = triton.load_rows(loss._traced.identifier, source, len(loss._names), constants)
    return key


# By decorator, then by backend and type of device: a function that loads the kernels of a loss, and
# returns the name of the loss in the operators. It raises CannotCompile if there are no kernels.
_LOADERS: dict[str, dict[tuple[str, str], Callable[[Any], str]]] = {
    "pointwise_loss": {
        ("compiled", "cpu"): _load_cpu,
        ("compiled", "cuda"): _load_cuda,
        **{("triton", device): _load_triton for device in ("cpu", "cuda", "xpu")},
    },
    "row_loss": {
        ("compiled", "cpu"): _load_cpu,
        ("compiled", "cuda"): _load_cuda,
        **{("triton", device): _load_triton_rows for device in ("cpu", "cuda", "xpu")},
    },
}
