"""The losses over rows that are measured: ours, and in eager PyTorch, as the tests have them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .own import TESTS

if TYPE_CHECKING:
    from .cases import Case

Loss = Callable[..., Tensor]
# By loss: whether its second input is a label, and for how many inputs there is a gradient.
LOSSES = {
    "distillation": (False, 1),
    "jsd": (False, 1),
    "focal": (True, 1),
    "grpo": (True, 1),
    "cosine": (False, 2),
    "triplet": (False, 2),
    "cross_entropy": (True, 1),
}
_PARAMETERS: dict[str, dict[str, float]] = {"distillation": {"T": 2.0}, "grpo": {"entropy": 0.01}}


@cache
def known(name: str) -> Any:
    """Imported when it is needed, since SymPy then traces the whole table."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import row_losses

    return next(case for case in row_losses.ROW_LOSSES if case.id == name)


@cache
def _others(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """The inputs besides the first two, without a gradient."""
    generator = torch.Generator(device).manual_seed(2)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(generator=generator)

    if name == "triplet":
        return [normal(*shape)]
    return [normal(shape[0]) - 8, normal(shape[0])] if name == "grpo" else []


def ours(case: Case) -> Loss:
    return _called(case, known(case.loss).loss)


def eager(case: Case) -> Loss:
    rows = known(case.loss).torch

    def line(*args: Any, reduction: str, **options: Any) -> Tensor:
        value: Tensor = getattr(rows(*args, **options), reduction)()
        return value

    return _called(case, line)


def _called(case: Case, function: Callable[..., Any]) -> Loss:
    others = _others(case.loss, case.shape, case.dtype, case.device)
    parameters = _PARAMETERS.get(case.loss, {})

    def loss(x: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
        value: Tensor = function(x, t, *others, reduction=reduction, **parameters)
        return value

    return loss
