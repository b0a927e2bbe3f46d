"""The custom losses of the gallery, which the tests compare with independent formulas.

Each is one line with functions of fusedloss.math. Eager PyTorch and torch.compile get the same
line, with torch's functions instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fusedloss.custom import PointwiseLoss

TESTS = Path(__file__).parent.parent / "tests"


@cache
def ours(name: str) -> PointwiseLoss:
    """The loss. Imported when it is needed, since SymPy then traces the whole gallery."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import custom_losses

    loss: PointwiseLoss = getattr(custom_losses, name)
    return loss


@cache
def torch_words() -> SimpleNamespace:
    from fusedloss import math

    other_names = {
        "softplus": F.softplus,
        "log_sigmoid": F.logsigmoid,
        "equal": torch.eq,
        "not_equal": torch.ne,
        "is_nan": torch.isnan,
    }
    return SimpleNamespace(
        **{word: other_names.get(word) or getattr(torch, word, None) for word in math.__all__}
    )


@cache
def eager(name: str) -> Callable[..., Tensor]:
    """The same line in PyTorch, called as ``function(x, t, reduction=...)``."""
    function = ours(name).function
    line = FunctionType(function.__code__, {**function.__globals__, "fm": torch_words()}, name)
    line.__kwdefaults__ = function.__kwdefaults__

    def loss(x: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
        value: Tensor = getattr(line(x, t), reduction)()
        return value

    return loss
