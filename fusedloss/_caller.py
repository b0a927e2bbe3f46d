"""The line outside of fusedloss and torch that a call comes from: warnings point there."""

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
Function = TypeVar("Function", bound=Callable[..., Any])

_INSIDE = (
    *(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__)),
    "<frozen ",  # the import system
)
# By file name, since patch() looks at frames in every call that it counts.
_inside: dict[str, bool] = {}
_CALL = compile("call()", "", "eval")


def constant_when_traced(function: Function) -> Function:
    """:func:`torch.compiler.assume_constant_result`, which imports the whole compiler to set a mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def frame(start: FrameType | None = None) -> FrameType:
    """The innermost frame outside of fusedloss and torch, or else the outermost frame."""
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
    """``function(*args, **options)``, called as if from that line, so that Python shows, filters and
    counts torch's warnings with ``stacklevel=2`` as the caller's."""
    if torch.compiler.is_dynamo_compiling():  # it traces, and there are no frames
        return function(*args, **options)
    found = frame()
    code = _CALL.replace(
        co_filename=found.f_code.co_filename,
        co_firstlineno=found.f_lineno or 1,
        co_name=found.f_code.co_name,
    )
    result: Result = eval(code, found.f_globals, {"call": partial(function, *args, **options)})
    return result


@constant_when_traced
def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at that line."""
    at_callers_line(warnings.warn, message, category)
