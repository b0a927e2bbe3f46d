"""Fused losses in code that names torch's: :func:`replace` for modules, :class:`patch` for functions."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ContextDecorator
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional
from torch.nn.modules.loss import _Loss

from . import _caller, _dispatch, _others, modules
from ._dispatch import Call, Explanation

__all__ = ["patch", "replace", "restore"]

_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(modules, name) for name in modules.__all__ if hasattr(nn, name)
}
# Only together: NLLLoss alone gains nothing.
_PAIR = (nn.LogSoftmax, nn.NLLLoss)
# Why torch's losses without a fused kernel have none.
_NO_KERNEL = {
    nn.NLLLoss: "there is no LogSoftmax before it; alone, torch's own leaves nothing to save",
    nn.CTCLoss: "each step needs the one before, so it is no sum over elements or rows",
    nn.MultiLabelMarginLoss: "a row's targets are a list of any length",
    nn.TripletMarginWithDistanceLoss: "its distance is a function of yours",
    nn.AdaptiveLogSoftmaxWithLoss: "it holds layers of its own",
}
_FUSED = (modules._Predicting, modules.LinearCrossEntropyLoss)
_TORCHS = {fused: theirs for theirs, fused in _MODULES.items()}
_FUNCTIONS = {fused.__name__: fused for fused in _dispatch.TORCHS}


# ---- modules -------------------------------------------------------------------------------------


class Changed(dict[str, nn.Module]):
    """The losses that :func:`replace` or :func:`restore` changed, by name; prints as a table.

    ``left`` has the losses that it found and did not change, by name, and why.
    """

    def __init__(self, changed: Mapping[str, nn.Module], left: Mapping[str, str]) -> None:
        super().__init__(changed)
        self.left = dict(left)

    def __str__(self) -> str:
        rows = [(name, f"{type(m).__module__.split('.')[0]}.{m!r}") for name, m in self.items()]
        rows += [(name, f"left: {why}") for name, why in self.left.items()]
        return _columns([(name or "(itself)", what) for name, what in rows]) or "nothing changed"


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


# Types of objects that hold no loss, or in which none can be changed in place.
_PLAIN = (Tensor, type, ModuleType, FunctionType, str, bytes, int, float, complex, type(None))
_MOST_OBJECTS = 100_000
_UNSEARCHED = object()  # stands for the objects that were not searched


def _parts(thing: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of an object, by attribute, key or index, but not the children of a module."""
    if isinstance(thing, dict):
        yield from list(thing.items())
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        yield from enumerate(list(thing))
    elif isinstance(thing, partial):
        yield from (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords))
    for name, value in list(getattr(thing, "__dict__", {}).items()):
        if name != "_modules" or not isinstance(thing, nn.Module):
            yield name, value
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name != "__dict__" and hasattr(thing, name):
                yield name, getattr(thing, name)


def _held(thing: Any, who: str) -> Iterator[tuple[str, Any]]:
    """All objects that ``thing`` holds, itself first, each once."""
    if isinstance(thing, type | FunctionType):
        kind = "class" if isinstance(thing, type) else "function"
        raise TypeError(
            f"fusedloss.{who} takes an object that holds losses, such as a model, not the {kind} "
            f"{thing.__qualname__}"
        )
    waiting, seen = deque([("", thing)]), {id(thing)}
    while waiting:
        name, held = waiting.popleft()
        group = [(name, held)]
        if isinstance(held, nn.Module):
            children = list(held.named_modules())[1:]
            group += [
                (f"{name}.{path}" if name else path, child)
                for path, child in children
                if id(child) not in seen
            ]
            seen.update(id(child) for _, child in children)
        yield from group
        for name, held in group:
            if isinstance(held, _PLAIN):
                continue
            for part, value in _parts(held):
                looked_at = isinstance(value, FunctionType) or not isinstance(value, _PLAIN)
                if not looked_at or id(value) in seen:
                    continue
                if len(seen) >= _MOST_OBJECTS:
                    yield "...", _UNSEARCHED
                    return
                seen.add(id(value))
                waiting.append((f"{name}.{part}" if name else str(part), value))


def _why_left(held: Any) -> str | None:
    """Why a loss is not fused after :func:`replace`; None: it is fused, or the object is no loss."""
    if held is _UNSEARCHED:
        return f"the search ended after {_MOST_OBJECTS} objects: pass what holds the loss itself"
    if isinstance(held, FunctionType) and held in _dispatch.OURS:
        name = held.__name__
        return f"the function torch.nn.functional.{name}: put fusedloss.functional.{name} there"
    if isinstance(held, torch.jit.ScriptModule):
        scripted = getattr(held, "original_name", "")
        return "TorchScript" if any(kind.__name__ == scripted for kind in _MODULES) else None
    if type(held) in _NO_KERNEL:
        return f"{type(held).__name__} stays torch's: {_NO_KERNEL[type(held)]}"
    if not isinstance(held, _Loss) or isinstance(held, _FUSED):
        return None
    for kind in _MODULES:
        if isinstance(held, kind):
            return f"a subclass of {kind.__name__}, which may compute something else"
    return f"{type(held).__name__} has no fused kernel"


def replace(holder: Any) -> Changed:
    """Replaces every loss of :mod:`torch.nn` in ``holder``, or ``holder`` itself, by the fused one.

    :class:`torch.nn.NLLLoss` is replaced where there is a :class:`torch.nn.LogSoftmax` too, which is
    replaced with it: the two are computed as cross-entropy of the logits.

    In place: each loss keeps its identity, options, buffers and hooks, and only its class changes;
    :func:`restore` undoes it. A subclass of a torch loss is left alone, since it may compute
    something else.

    Args:
        holder: a model, or any other object, such as a trainer. The search covers its modules and
            attributes, and the items of its lists and dictionaries.

    Returns:
        The losses that it changed, by their names in ``holder`` (``""``: ``holder`` itself), and in
        ``left`` those that it left alone, and why. Prints as a table.

    Raises:
        TypeError: ``holder`` is a class or a function.

    Warns:
        UserWarning: there is nothing to replace, or a loss was left.
    """
    changed, left, fused = {}, {}, False
    everything = list(_held(holder, "replace"))
    paired = {type(held) for _, held in everything}.issuperset(_PAIR)
    for name, held in everything:
        kind = _MODULES.get(type(held)) if paired or type(held) not in _PAIR else None
        why = None if kind else _why_left(held)
        if kind is not None:
            held.__class__ = kind
            held.__dict__["_replaced"] = True
            changed[name] = held
        elif why is not None:
            left[name] = why
        fused = fused or isinstance(held, _FUSED)
    if left:
        shown = [f"{name or type(holder).__name__} ({why})" for name, why in left.items()]
        more = f", and {len(shown) - 5} more" if len(shown) > 5 else ""
        _caller.warn(f"fusedloss.replace left {', '.join(shown[:5])}{more}")
    elif not fused:
        _caller.warn(
            f"fusedloss.replace found no loss of torch.nn in {type(holder).__name__}; what calls "
            "torch.nn.functional is reached by fusedloss.patch"
        )
    return Changed(changed, left)


def restore(holder: Any) -> Changed:
    """Undoes :func:`replace`: the losses that it changed in ``holder`` get torch's class back, in place.

    Args, returns and errors: see :func:`replace`. Losses that were fused before stay fused.

    Warns:
        UserWarning: there is nothing to undo.
    """
    changed = {}
    for name, held in _held(holder, "restore"):
        if type(held) in _TORCHS and held.__dict__.pop("_replaced", False):
            held.__dict__.pop("_module_prediction", None)
            held.__class__ = _TORCHS[type(held)]
            changed[name] = held
    if not changed:
        _caller.warn(
            f"fusedloss.restore found nothing in {type(holder).__name__} that replace had changed"
        )
    return Changed(changed, {})


# ---- functions -----------------------------------------------------------------------------------


class patch(ContextDecorator):
    """Makes the losses of :mod:`torch.nn.functional` the fused ones, for code that you cannot edit.

    A context manager, a decorator, or ``start()`` and ``stop()``::

        with fusedloss.patch() as patched:
            trainer.fit(model)
        print(patched)

    torch's modules call these functions, and so are fused as well; so are some losses of timm, torchvision,
    transformers and segmentation_models_pytorch. The patch does not reach a function that was imported
    before (``from torch.nn.functional import mse_loss``). It holds for all threads, and patches nest: the
    last one that ends puts back the functions that the first one found.

    The patch prints as a table of the calls that it reached: each line outside of torch and fusedloss
    that called a loss (by whatever name), how many calls, and which path they took and why. A graph of
    torch.compile is counted when it is traced, not when it runs. ``calls`` has the table's rows.

    While it is on, ``torch.jit.script`` and ``torch.jit.trace`` get torch's functions.
    """

    _lock = threading.Lock()
    _active = 0
    _found: dict[str, Any] = {}  # noqa: RUF012 - shared by all instances

    def __init__(self) -> None:
        self._table: dict[Any, Call] = {}
        self._depth = 0

    @property
    def calls(self) -> list[Call]:
        """The calls of losses while the patch was on: a row for each line, loss and path."""
        rows: dict[Any, Call] = {}
        for call in list(self._table.values()):  # a line may have several in it
            key = call.file, call.line, call.function, call.loss, call.path
            calls = call.calls + (rows[key].calls if key in rows else 0)
            rows[key] = dataclasses.replace(call, calls=calls)
        return list(rows.values())

    def __str__(self) -> str:
        if not self._table:
            return (
                "fusedloss.patch reached no loss: none was called by its name in "
                "torch.nn.functional, nor by a module of torch.nn"
            )
        rows: list[tuple[str, ...]] = [("call site", "loss", "calls", "path")]
        shown: Counter[Any] = Counter()
        for call in self.calls:
            place = call.file, call.line, call.function, call.loss
            shown[place] += 1
            if shown[place] > _MOST_PATHS:
                continue
            file = call.file.removeprefix(os.getcwd() + os.sep)
            site = f"{file}:{call.line} {call.function}"
            rows.append((site, call.loss, str(call.calls or "traced"), _path(call.path)))
        hidden = sum(count - _MOST_PATHS for count in shown.values() if count > _MOST_PATHS)
        more = f"\n{hidden} more rows, of the same lines with other reasons, are in calls"
        return _columns(rows) + (more if hidden else "")

    def start(self) -> None:
        """Patches until :meth:`stop`."""
        with patch._lock:
            if patch._active == 0:
                patch._found = {name: getattr(torch_functional, name) for name in _FUNCTIONS}
                for name, fused in _FUNCTIONS.items():
                    setattr(torch_functional, name, fused)
                _others.start()
            patch._active += 1
            if not any(table is self._table for table in _dispatch._counted):
                _dispatch._counted = (*_dispatch._counted, self._table)
                self._depth = 0  # it may be more if the stop() of another patch ended this one
            self._depth += 1

    def stop(self) -> None:
        """Ends what :meth:`start` began.

        Raises:
            RuntimeError: there is no patch to end.
        """
        with patch._lock:
            if patch._active == 0:
                raise RuntimeError("fusedloss.patch: stop() without start()")
            patch._active -= 1
            self._depth = max(self._depth - 1, 0)
            if self._depth == 0:
                others = (table for table in _dispatch._counted if table is not self._table)
                _dispatch._counted = tuple(others)
            if patch._active == 0:
                # This stop() ends all patches, whichever patch it belongs to.
                _dispatch._counted = ()
                _others.stop()
                for name, original in patch._found.items():
                    setattr(torch_functional, name, original)

    def __enter__(self) -> patch:  # noqa: PYI034 - there is no Self in Python 3.10
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


_MOST_PATHS = 3  # of a line, before the table leaves the rest out


def _path(path: Explanation) -> str:
    reasons = "; ".join(reason for reason in path.reasons if reason != _dispatch._FUSED)
    head = f"fused, {path.backend}" if path.fused else "plain PyTorch"
    return f"{head}: {reasons}" if reasons else head
