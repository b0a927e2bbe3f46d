"""The backends: one ordered table, whose rows know why they cannot run.

A call goes to the first available backend of the table that covers it, or to the one that
``backend(name)`` chose. A call that no fused backend covers runs on the reference.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _caller, doctor
from .._version import __version__


def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled extension, or why there is none."""
    try:
        _C = import_module("fusedloss._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return None, doctor.no_extension()
        return None, f"the extension does not load: {error}"
    built: str = _C.build_info()["torch"]
    if built.split("+")[0] != torch.__version__.split("+")[0]:
        return None, (
            f"the extension was built against torch {built}, and this is torch "
            f"{torch.__version__}: reinstall fusedloss"
        )
    return _C, None


extension, _no_extension = _load()


@dataclass(frozen=True)
class Backend:
    """One row of the table."""

    name: str
    why_not: Callable[[], str | None]  # why it cannot run here; None: it can
    devices: frozenset[str]  # the types of device that its kernels cover
    fused: bool = True
    automatic: bool = True  # it runs without being chosen by name


_built: dict[str, Any] = {} if extension is None else extension.build_info()
_compiled_devices = frozenset(("cpu", "cuda") if _built.get("cuda") else ("cpu",))

# Triton's decorators read it once, when they run.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_has_triton = find_spec("triton") is not None


def _no_triton() -> str | None:
    if not _has_triton:
        return "Triton is not installed"
    # Not at import, since the question starts the drivers.
    if not INTERPRETED and not torch.cuda.is_available() and not torch.xpu.is_available():
        return "there is no GPU, and TRITON_INTERPRET=1 was not set when fusedloss was imported"
    return None


BACKENDS = (
    Backend("compiled", lambda: _no_extension, _compiled_devices),
    Backend(
        "triton",
        _no_triton,
        frozenset(("cpu",) if INTERPRETED else ("cuda", "xpu")),
        # The interpreter serves to find mistakes: it is far slower than plain PyTorch.
        automatic=_has_triton and not INTERPRETED,
    ),
    Backend("reference", lambda: None, frozenset(), fused=False),
)
_BY_NAME = {row.name: row for row in BACKENDS}

if _no_extension is not None:
    _instead = "on plain PyTorch, and on Triton for a GPU's tensors"
    if not _has_triton:
        _instead = "on plain PyTorch"
    if not doctor.handing_over():
        _caller.warn(
            f"fusedloss runs {_instead}, without compiled kernels: {_no_extension}",
            RuntimeWarning,
        )

_chosen: Backend | None = None
# Computed once, since every call reads them: the fused backend of each type of device, and whether the
# compiled kernels are one of them.
fused_on: dict[str, str] = {}
compiled_runs = False


def automatic() -> bool:
    """Whether no backend was chosen by name."""
    return _chosen is None


def candidates(device: str) -> tuple[str, ...]:
    """The fused backends that take calls on ``device``, in order. A custom loss that the first one
    cannot compile goes to the next, unless a backend was chosen by name."""
    first = _BY_NAME[fused_on[device]]
    later = BACKENDS[BACKENDS.index(first) + 1 :] if automatic() else ()
    return (first.name, *(row.name for row in later if row.automatic and device in row.devices))


def why_not_fused(device: str) -> str:
    """Why no fused backend takes calls on ``device``, which ``fused_on`` lacks."""
    if _chosen is not None and not _chosen.fused:
        return f"backend {_chosen.name!r} was chosen"
    rows = [row for row in BACKENDS if row.fused] if _chosen is None else [_chosen]
    reasons = []
    for row in rows:
        why_not = row.why_not()
        if why_not is not None:
            reasons.append(f"{row.name}: {why_not}")
        elif not row.automatic and _chosen is None:
            reasons.append(f"{row.name}: its interpreter was not chosen")
        elif device not in row.devices:
            covered = " and ".join(sorted(row.devices))
            reasons.append(f"{row.name}: has kernels for {covered} tensors, not {device}")
    return "; ".join(reasons)


class backend:
    """Choose the backend of every call from here on; as a context manager, until it is left.

    Args:
        name: ``"compiled"`` (C++ and CUDA kernels), ``"triton"`` (for GPUs; on CPU tensors in
            Triton's interpreter, if ``TRITON_INTERPRET=1`` was set when fusedloss was imported) or
            ``"reference"`` (plain PyTorch), or ``None`` for the first that can run, the default.

    A call that the chosen backend's kernels do not cover runs on the reference;
    :func:`fusedloss.explain` says so. The choice holds for all threads.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it cannot run here; the message says why.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in _BY_NAME:
            raise ValueError(f"no backend {name!r}; there are {', '.join(map(repr, _BY_NAME))}")
        row = None if name is None else _BY_NAME[name]
        why_not = None if row is None else row.why_not()
        if why_not is not None:
            raise RuntimeError(f"backend {name!r} cannot run here: {why_not}")
        self._row = row
        self._previous = [_chosen]
        self._entered = False
        _choose(row)

    def __enter__(self) -> None:
        if self._entered:  # a second `with` on the same object
            self._previous.append(_chosen)
        self._entered = True
        _choose(self._row)

    def __exit__(self, *error: object) -> None:
        _choose(self._previous.pop())


def _choose(row: Backend | None) -> None:
    global _chosen, fused_on, compiled_runs
    _chosen = row
    rows = [row] if row is not None else [row for row in BACKENDS if row.automatic]
    if _no_extension is not None:
        rows = [row for row in rows if row.name != "compiled"]
    # No need to look for a GPU: without one there are no tensors of its type.
    fused_on = {device: row.name for row in reversed(rows) for device in row.devices}
    compiled_runs = "compiled" in fused_on.values()


_choose(None)


# ---- predictions ---------------------------------------------------------------------------------
# A prediction is a call site's guess of its upstream gradient, for which forward writes the gradient.
# It is two numbers on the device: the upstream gradient that the last backward saw, and the confidence
# in it, 0 to 3. Forward uses it from 2 on; every backward updates both. See docs/one-pass.md.


_cuda: Any = torch.cuda  # untyped in some of the releases


def is_captured(input: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


def new_prediction(input: Tensor) -> Tensor:
    """A new call site's prediction, on input's device: 1, with full confidence."""
    if extension is not None and input.device.type in _compiled_devices:
        made: Tensor = extension.new_prediction(input)
        return made
    with ExitStack() as stack:
        if is_captured(input):
            # Written on another stream: every replay of the graph would write it again.
            side = _cuda.Stream(input.device)
            stack.callback(side.synchronize)
            stack.enter_context(torch.cuda.stream(side))
        prediction = torch.ones(2, dtype=torch.float64, device=input.device)
        prediction[1].fill_(3.0)
    return prediction


# ---- for users -----------------------------------------------------------------------------------


def check() -> None:
    """Waits for the GPUs, and raises the error that a fused kernel has found in its input there.

    On a GPU, and on the Triton backend anywhere, nothing waits for a kernel: for a target out of
    range the loss and the gradient are nan, and the next fused call, or this function, raises.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index.
        RuntimeError: an input or target of binary_cross_entropy outside [0, 1].
    """
    gpus: tuple[Any, ...] = (torch.cuda, torch.xpu)  # untyped in some of the releases
    for gpu in gpus:
        if gpu.is_initialized():
            for device in range(gpu.device_count()):
                gpu.synchronize(device)
    if extension is not None and _built["cuda"]:
        extension.raise_faults()
    triton = sys.modules.get("fusedloss.backends.triton")
    if triton is not None:
        triton.raise_faults()


@dataclass(frozen=True)
class Info:
    """What was built, what runs, and why the rest does not."""

    version: str
    torch: str
    compiled: bool
    cpu_capability: str | None
    backends: dict[str, str | None]  # name: why it cannot run; None: it can
    build: dict[str, Any]

    def __str__(self) -> str:
        lines = [f"fusedloss {self.version}, torch {self.torch}"]
        for name, why in self.backends.items():
            lines.append(f"  {name:<10} {'runs' if why is None else f'does not run: {why}'}")
        if self.compiled:
            built = ", ".join(self.build["cpu_capabilities"])
            cuda = self.build["cuda"]
            lines += [
                f"CPU kernels built for {built}; {self.cpu_capability} runs here",
                f"CUDA kernels built by nvcc {cuda}" if cuda else "no CUDA kernels were built",
                f"built against torch {self.build['torch']} by compiler {self.build['compiler']}",
            ]
        return "\n".join(lines)


def info() -> Info:
    """What was built, what runs, and why the rest does not; prints as text."""
    return Info(
        version=__version__,
        torch=torch.__version__,
        compiled=extension is not None,
        cpu_capability=_built.get("cpu_capability"),
        backends={row.name: row.why_not() for row in BACKENDS},
        build=_built,
    )
