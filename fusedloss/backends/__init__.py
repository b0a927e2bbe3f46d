"""What can run a fused call: one ordered table, each row knowing why it cannot.

A call goes to the first backend of the table that is available and covers it; ``backend(name)``
makes that one name's. Whatever no fused backend covers runs on the reference.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any

import torch

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
    devices: frozenset[str]  # the types of device it covers; of the reference: any
    fused: bool = True
    unasked: bool = True  # it runs without being chosen by name


_built: dict[str, Any] = {} if extension is None else extension.build_info()
_compiled_devices = frozenset(("cpu", "cuda") if _built.get("cuda") else ("cpu",))

# Triton's decorators read it when they run, which is once.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_has_triton = find_spec("triton") is not None


def _no_triton() -> str | None:
    if not _has_triton:
        return "Triton is not installed"
    # Asked when somebody wants to know: it starts the drivers.
    if not INTERPRETED and not torch.cuda.is_available() and not torch.xpu.is_available():
        return "there is no GPU, and TRITON_INTERPRET=1 was not set when fusedloss was imported"
    return None


BACKENDS = (
    Backend("compiled", lambda: _no_extension, _compiled_devices),
    Backend(
        "triton",
        _no_triton,
        frozenset(("cpu",) if INTERPRETED else ("cuda", "xpu")),
        # The interpreter is there to find mistakes: it is far slower than plain PyTorch.
        unasked=_has_triton and not INTERPRETED,
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
# Read at every call, so kept ready: the fused backend of each type of device, whether the compiled
# kernels are one, and that none was chosen by name.
fused_on: dict[str, str] = {}
compiled_runs = False
unchosen = True


def compiles_for(device: str) -> bool:
    """Whether the compiled extension has kernels for a type of device."""
    return extension is not None and device in _compiled_devices


def in_order(device: str) -> tuple[str, ...]:
    """The fused backends that take calls on ``device``: what the first has no kernel for, such as a
    custom loss that it cannot compile, the next takes, unless one was chosen by name."""
    first = _BY_NAME[fused_on[device]]
    later = BACKENDS[BACKENDS.index(first) + 1 :] if _chosen is None else ()
    return (first.name, *(row.name for row in later if row.unasked and device in row.devices))


def obstacle(device: str) -> str:
    """Why no fused backend takes calls on ``device``, which ``fused_on`` lacks."""
    if _chosen is not None and not _chosen.fused:
        return f"backend {_chosen.name!r} was chosen"
    rows = [row for row in BACKENDS if row.fused] if _chosen is None else [_chosen]
    reasons = []
    for row in rows:
        why_not = row.why_not()
        if why_not is not None:
            reasons.append(f"{row.name}: {why_not}")
        elif not row.unasked and _chosen is None:
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
        if self._entered:  # again: kept in a variable
            self._previous.append(_chosen)
        self._entered = True
        _choose(self._row)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choose(self._previous.pop())


def _choose(row: Backend | None) -> None:
    global _chosen, fused_on, compiled_runs, unchosen
    _chosen = row
    unchosen = row is None
    rows = [row] if row is not None else [row for row in BACKENDS if row.unasked]
    if _no_extension is not None:
        rows = [row for row in rows if row.name != "compiled"]
    # Whether there is a GPU need not be asked: only then are there tensors of its type.
    fused_on = {device: row.name for row in reversed(rows) for device in row.devices}
    compiled_runs = "compiled" in fused_on.values()


_choose(None)


def check() -> None:
    """Waits for the GPUs, and raises what a fused kernel has found wrong with its input there.

    On a GPU, and on the Triton backend anywhere, nothing waits for a kernel: of a target out of
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
