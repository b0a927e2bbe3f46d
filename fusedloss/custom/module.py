"""A custom loss as a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ..modules import _Predicting
from ..reference import REDUCTIONS

if TYPE_CHECKING:
    from .loss import PointwiseLoss


class PointwiseLossModule(_Predicting):
    """A custom loss as a module; see :meth:`PointwiseLoss.module`."""

    weight: Tensor | None

    def __init__(
        self,
        loss: PointwiseLoss,
        reduction: str,
        weight: Tensor | None,
        clip_grad: float | None,
        parameters: Mapping[str, float],
    ) -> None:
        super().__init__()
        loss._values(parameters)
        loss._bound(clip_grad)
        if reduction not in REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        self.loss = loss
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.clip_grad = clip_grad
        self.parameters_of_loss = dict(parameters)

    def _get_name(self) -> str:
        return self.loss.__name__

    def extra_repr(self) -> str:
        values = zip(self.loss._names, self.loss._values(self.parameters_of_loss), strict=True)
        shown = [f"{name}={value:g}" for name, value in values]
        shown.append(f"reduction={self.reduction!r}")
        if self.clip_grad is not None:
            shown.append(f"clip_grad={self.clip_grad:g}")
        return f"{self.loss.formula}, {', '.join(shown)}"

    def forward(self, *inputs: Tensor) -> Tensor:
        if len(inputs) != self.loss.inputs:
            inputs = self.loss._by_name(inputs, {})  # which says what is wrong
        return self.loss._call(
            inputs,
            self.reduction,
            self.weight,
            self.clip_grad,
            self.parameters_of_loss,
            self._prediction(inputs[0]),
        )
