"""Custom losses as modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..modules import _Predicting

if TYPE_CHECKING:
    from .loss import CustomLoss, PointwiseLoss
    from .rows import RowLoss


class _CustomLossModule(_Predicting):
    weight: Tensor | None

    def __init__(
        self,
        loss: CustomLoss,
        reduction: str,
        weight: Tensor | None,
        parameters: Mapping[str, float],
    ) -> None:
        super().__init__()
        loss._values(parameters)
        loss._reduction(reduction)
        self.loss: Any = loss
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.parameters_of_loss = dict(parameters)

    def _options(self) -> dict[str, Any]:
        """The options behind reduction and weight, by name, as calls take them."""
        raise NotImplementedError

    def _get_name(self) -> str:
        name: str = self.loss.__name__
        return name

    def extra_repr(self) -> str:
        values = zip(self.loss._names, self.loss._values(self.parameters_of_loss), strict=True)
        shown = [f"{name}={value:g}" for name, value in values]
        shown.append(f"reduction={self.reduction!r}")
        for name, value in self._options().items():
            if value != self.loss._options[name]:
                shown.append(f"{name}={value:g}")
        return f"{self.loss.formula}, {', '.join(shown)}"

    def forward(self, *inputs: Tensor) -> Any:
        if len(inputs) != self.loss.inputs:
            inputs = self.loss._by_name(inputs, {})  # which says what is wrong
        return self.loss._call(
            inputs,
            self.reduction,
            self.weight,
            *self._options().values(),
            self.parameters_of_loss,
            self._prediction(inputs[0]),
        )


class PointwiseLossModule(_CustomLossModule):
    """A custom loss as a module; see :meth:`PointwiseLoss.module`."""

    def __init__(
        self,
        loss: PointwiseLoss,
        reduction: str,
        weight: Tensor | None,
        clip_grad: float | None,
        parameters: Mapping[str, float],
    ) -> None:
        super().__init__(loss, reduction, weight, parameters)
        loss._bound(clip_grad)
        self.clip_grad = clip_grad

    def _options(self) -> dict[str, Any]:
        return {"clip_grad": self.clip_grad}


class RowLossModule(_CustomLossModule):
    """A custom loss of rows as a module; see :meth:`RowLoss.module`."""

    def __init__(
        self,
        loss: RowLoss,
        reduction: str,
        weight: Tensor | None,
        dim: int,
        ignore_index: int,
        parameters: Mapping[str, float],
    ) -> None:
        super().__init__(loss, reduction, weight, parameters)
        self.dim = dim
        self.ignore_index = ignore_index

    def _options(self) -> dict[str, Any]:
        return {"dim": self.dim, "ignore_index": self.ignore_index}
