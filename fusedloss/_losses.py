"""The table of losses: the arguments of each, and which of them its kernels take.

tests/test_losses.py compares the tables of C++ (csrc/losses.cpp) and Triton, the reference and the
tests with this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from . import backends, reference

_C: Any = backends.extension
_LARGEST = 1.7976931348623157e308


@dataclass(frozen=True, eq=False)
class Loss:
    """One loss.

    Attributes:
        name: the name of the public function, and the operators' name of the loss.
        reference: the loss in plain PyTorch.
        arguments: the names of both functions' arguments, in order; input and target come first.
        weight: there is one ``weight`` for each "element", or for each "class", or it "broadcasts"
            to the elements. A loss over classes is one over rows.
        parameter: the argument that is a number for the kernel.
        low, high: the kernel's domain of that number.
        at_zero: the operators' loss for the number 0, which takes no parameter.
        few: below that many elements torch.compile gets the loss in plain PyTorch; see
            ``_dispatch._left_to_inductor``.
    """

    name: str
    reference: Callable[..., Tensor]
    arguments: tuple[str, ...]
    weight: str = "element"
    parameter: str = ""
    low: float = -_LARGEST
    high: float = _LARGEST
    at_zero: str = ""
    few: int = 1 << 18

    @cached_property
    def number(self) -> int:
        """The loss's number in the short way in C++."""
        number: int = _C.define(
            self.name, self.arguments, self.weight, self.parameter, self.low, self.high,
            self.at_zero,
        )  # fmt: skip
        return number

    @property
    def over_classes(self) -> bool:
        return self.weight == "class"


_LEGACY = ("size_average", "reduce", "reduction")
LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("mse_loss", reference.mse_loss, ("input", "target", *_LEGACY, "weight")),
        Loss("l1_loss", reference.l1_loss, ("input", "target", *_LEGACY, "weight")),
        Loss(
            "smooth_l1_loss",
            reference.smooth_l1_loss,
            ("input", "target", *_LEGACY, "beta"),
            parameter="beta",
            # The kernel multiplies by 1 / beta, which must be a normal float as well.
            low=1e-30,
            high=1e30,
            at_zero="l1_loss",
        ),
        Loss(
            "huber_loss",
            reference.huber_loss,
            ("input", "target", "reduction", "delta", "weight"),
            parameter="delta",
            low=5e-324,
            high=float("inf"),
        ),
        Loss(
            "binary_cross_entropy",
            reference.binary_cross_entropy,
            ("input", "target", "weight", *_LEGACY),
            weight="broadcasts",
            few=1 << 12,
        ),
        Loss(
            "binary_cross_entropy_with_logits",
            reference.binary_cross_entropy_with_logits,
            ("input", "target", "weight", *_LEGACY, "pos_weight"),
            weight="broadcasts",
            few=1 << 12,
        ),
        Loss(
            "cross_entropy",
            reference.cross_entropy,
            (
                *("input", "target", "weight", "size_average", "ignore_index", "reduce"),
                *("reduction", "label_smoothing"),
            ),
            weight="class",
            parameter="label_smoothing",
            low=0.0,
            high=1.0,
            few=1 << 14,
        ),
        Loss(
            "log_loss",
            reference.log_loss,
            ("input", "target", "weight", "reduction", "ignore_index"),
            weight="class",
            few=0,
        ),
    )
}
