"""Fused losses in code that names torch's: :func:`replace` for modules, :class:`patch` for functions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

from torch import nn
from torch.nn import functional as torch_functional

from . import functional, modules

__all__ = ["patch", "replace"]

_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(modules, name) for name in modules.__all__ if hasattr(nn, name)
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(functional, name)
    for name in functional.__all__
    if hasattr(torch_functional, name)
}


def replace(module: nn.Module) -> dict[str, nn.Module]:
    """Makes every loss of :mod:`torch.nn` inside ``module``, itself included, the fused one.

    In place: each keeps its identity, options, buffers and hooks, and only its class changes. A
    subclass of a torch loss is left alone, since it may compute something else.

    Returns:
        The losses that it changed, by their names in ``module`` (``""``: ``module`` itself).
    """
    changed = {}
    for name, child in module.named_modules():
        fused = _MODULES.get(type(child))
        if fused is not None:
            child.__class__ = fused
            changed[name] = child
    return changed


class patch(ContextDecorator):
    """Makes the losses of :mod:`torch.nn.functional` the fused ones, for code one cannot edit.

    A context manager, a decorator, or ``start()`` and ``stop()``::

        with fusedloss.patch():
            trainer.fit(model)

    torch's own modules call these functions, and so are fused as well. Not reached is a function
    that was taken out of the module before (``from torch.nn.functional import mse_loss``). The
    patch holds for all threads, and patches nest: the last one that ends puts back what the first
    one found.
    """

    _lock = threading.Lock()
    _active = 0
    _found: dict[str, Any] = {}  # noqa: RUF012 - of all instances

    def start(self) -> None:
        """Patches until :meth:`stop`."""
        with patch._lock:
            if patch._active == 0:
                patch._found = {name: getattr(torch_functional, name) for name in _FUNCTIONS}
                for name, fused in _FUNCTIONS.items():
                    setattr(torch_functional, name, fused)
            patch._active += 1

    def stop(self) -> None:
        """Ends what :meth:`start` began.

        Raises:
            RuntimeError: there is no patch to end.
        """
        with patch._lock:
            if patch._active == 0:
                raise RuntimeError("fusedloss.patch: stop() without start()")
            patch._active -= 1
            if patch._active == 0:
                for name, original in patch._found.items():
                    setattr(torch_functional, name, original)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()
