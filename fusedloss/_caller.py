"""The line outside of fusedloss and torch that a call comes from: where warnings are to point."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_INSIDE = (
    *(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__)),
    "<frozen ",  # the import system
)
# By file name: a frame is asked about at every call that is counted.
_inside: dict[str, bool] = {}
_CALL = compile("call()", "", "eval")


def frame(start: FrameType | None = None) -> FrameType:
    """The innermost frame of neither fusedloss nor torch, or else the outermost one."""
    found = start or sys._getframe(1)
    known = _inside.get
    while True:
        file = found.f_code.co_filename
        inside = known(file)
        if inside is None:
            inside = _inside[file] = file.startswith(_INSIDE)
        if not inside:
            return found
        outer = found.f_back
        if outer is None:
            return found
        found = outer


def at_callers_line(function: Callable[..., Result], /, *args: Any, **options: Any) -> Result:
    """``function(*args, **options)``, called as if from that line: what torch warns of there with
    ``stacklevel=2`` is shown, filtered and counted as the caller's own."""
    if torch.compiler.is_dynamo_compiling():  # which traces: there are no frames
        return function(*args, **options)
    found = frame()
    code = _CALL.replace(
        co_filename=found.f_code.co_filename,
        co_firstlineno=found.f_lineno or 1,
        co_name=found.f_code.co_name,
    )
    result: Result = eval(code, found.f_globals, {"call": partial(function, *args, **options)})
    return result


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at that line."""
    at_callers_line(warnings.warn, message, category)


# A tracing compiler calls it while it traces: see autograd.constant_when_traced.
warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
