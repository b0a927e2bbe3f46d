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
        arguments: the names of both functions' arguments, in order; the inputs come first.
        inputs: how many there are: mostly input and target.
        gradients: for how many of them, from the first on, the kernels give a gradient.
        weight: there is one ``weight`` for each "element", or for each "class", or it "broadcasts"
            to the elements. A loss over classes is one over rows.
        parameters: the arguments that are numbers for the kernel.
        low, high: the kernel's domain of the first of them.
        at_zero: the operators' loss for the number 0, which takes no parameter.
        variant: the argument with which the operators' loss is another one: ``name_variant``.
        operator: the operators' loss, if it has another name.
        result: where the loss's dtype comes from, as in torch, if its operands have several:
            ``"promoted"`` from all, or from the ``"inputs"`` of rows, or the dtype of ``"input"`` or
            ``"target"``.
        targets: what the target may be beside an input of another dtype, each including those before:
            the ``"same"`` only, ``"floating"``, ``"signed"`` integers, all ``"integers"``, ``"any"``
            (bool too). Torch raises for the rest, or negates the target or compares it with -1, where
            uint8 would wrap.
        expands: a target of another shape is broadcast to input's, with torch's warning.
        few: below that many elements torch.compile gets the loss in plain PyTorch; see
            ``_dispatch._left_to_inductor``. For so few no kernel of _row_losses.py is compiled.
        rows: for a loss in _row_losses.py, how many of the inputs, from the first on, have a value for
            each class of a row, along the last dimension; the others have one number for each row. Its
            parameters but the first are any numbers.
        powers: the exponents ``p`` that its kernels take.
    """

    name: str
    reference: Callable[..., Tensor]
    arguments: tuple[str, ...]
    inputs: int = 2
    gradients: int = 1
    weight: str = "element"
    parameters: tuple[str, ...] = ()
    low: float = -_LARGEST
    high: float = _LARGEST
    at_zero: str = ""
    variant: str = ""
    operator: str = ""
    result: str = "promoted"
    targets: str = "same"
    expands: bool = False
    few: int = 1 << 18
    rows: int = 0
    powers: tuple[int, ...] = ()

    @cached_property
    def number(self) -> int:
        """The loss's number in the short way in C++, where it has no inputs if it is made of another, or in
        _row_losses.py."""
        inputs = 0 if self.operator or self.rows else self.inputs
        number: int = _C.define(
            self.name, self.arguments, inputs, self.gradients, self.weight, self.parameters,
            self.low, self.high, self.at_zero, self.variant, self.result, self.targets,
        )  # fmt: skip
        return number

    def operators(self) -> dict[str, bool]:
        """The names of the operators' losses, and whether each is the variant."""
        name = self.operator or self.name
        return {name: False, **({f"{name}_{self.variant}": True} if self.variant else {})}

    @property
    def over_classes(self) -> bool:
        return self.weight == "class"


_LEGACY = ("size_average", "reduce", "reduction")
LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            "mse_loss",
            reference.mse_loss,
            ("input", "target", *_LEGACY, "weight"),
            gradients=2,
            targets="any",
            expands=True,
        ),
        Loss(
            "l1_loss",
            reference.l1_loss,
            ("input", "target", *_LEGACY, "weight"),
            gradients=2,
            targets="integers",
            expands=True,
        ),
        Loss(
            "smooth_l1_loss",
            reference.smooth_l1_loss,
            ("input", "target", *_LEGACY, "beta"),
            gradients=2,
            parameters=("beta",),
            # The kernel multiplies by 1 / beta, which must be a normal float as well.
            low=1e-30,
            high=1e30,
            at_zero="l1_loss",
            targets="integers",
            expands=True,
        ),
        Loss(
            "huber_loss",
            reference.huber_loss,
            ("input", "target", "reduction", "delta", "weight"),
            gradients=2,
            parameters=("delta",),
            low=5e-324,
            high=float("inf"),
            expands=True,
        ),
        Loss(
            "binary_cross_entropy",
            reference.binary_cross_entropy,
            ("input", "target", "weight", *_LEGACY),
            weight="broadcasts",
            result="input",
            few=1 << 12,
        ),
        Loss(
            "binary_cross_entropy_with_logits",
            reference.binary_cross_entropy_with_logits,
            ("input", "target", "weight", *_LEGACY, "pos_weight"),
            weight="broadcasts",
            variant="pos_weight",
            result="target",
            targets="floating",
            few=1 << 12,
        ),
        Loss(
            "soft_margin_loss",
            reference.soft_margin_loss,
            ("input", "target", *_LEGACY),
            result="input",
            targets="signed",
            few=1 << 12,
        ),
        Loss(
            "multilabel_soft_margin_loss",
            reference.multilabel_soft_margin_loss,
            ("input", "target", "weight", *_LEGACY),
            weight="broadcasts",
            operator="binary_cross_entropy_with_logits",
            targets="signed",
            few=1 << 12,
        ),
        Loss(
            "hinge_embedding_loss",
            reference.hinge_embedding_loss,
            ("input", "target", "margin", *_LEGACY),
            parameters=("margin",),
            result="input",
            targets="signed",
        ),
        Loss(
            "margin_ranking_loss",
            reference.margin_ranking_loss,
            ("input1", "input2", "target", "margin", *_LEGACY),
            inputs=3,
            gradients=2,
            parameters=("margin",),
            targets="signed",
        ),
        Loss(
            "kl_div",
            reference.kl_div,
            ("input", "target", *_LEGACY, "log_target"),
            variant="log_target",
            targets="floating",
            few=1 << 12,
        ),
        Loss(
            "poisson_nll_loss",
            reference.poisson_nll_loss,
            (*("input", "target", "log_input", "full", "size_average", "eps"), *_LEGACY[1:]),
            parameters=("eps", "full"),
            low=0.0,
            variant="log_input",
            targets="integers",
            few=1 << 12,
        ),
        Loss(
            "gaussian_nll_loss",
            reference.gaussian_nll_loss,
            ("input", "target", "var", "full", "eps", "reduction"),
            inputs=3,
            gradients=3,
            parameters=("eps", "full"),
            low=0.0,
            targets="integers",
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
            parameters=("label_smoothing",),
            low=0.0,
            high=1.0,
            targets="floating",
            few=1 << 14,
        ),
        Loss(
            "log_loss",
            reference.log_loss,
            ("input", "target", "weight", "reduction", "ignore_index"),
            weight="class",
            few=0,
        ),
        Loss(
            "cosine_embedding_loss",
            reference.cosine_embedding_loss,
            ("input1", "input2", "target", "margin", *_LEGACY),
            inputs=3,
            gradients=2,
            parameters=("margin",),
            result="inputs",
            targets="signed",
            few=1 << 14,
            rows=2,
        ),
        Loss(
            "triplet_margin_loss",
            reference.triplet_margin_loss,
            ("anchor", "positive", "negative", "margin", "p", "eps", "swap", *_LEGACY),
            inputs=3,
            gradients=3,
            parameters=("margin", "eps"),
            low=5e-324,
            variant="swap",
            result="inputs",
            few=1 << 14,
            rows=3,
            powers=(2,),
        ),
        Loss(
            "multi_margin_loss",
            reference.multi_margin_loss,
            ("input", "target", "p", "margin", "weight", *_LEGACY),
            weight="class",
            parameters=("margin", "p"),
            variant="weight",
            result="inputs",
            few=1 << 14,
            rows=1,
            powers=(1, 2),
        ),
    )
}
# By the operators' name: the loss, and whether it is its variant.
OPERATORS: dict[str, tuple[Loss, bool]] = {
    name: (loss, is_variant)
    for loss in LOSSES.values()
    if not (loss.operator or loss.rows)
    for name, is_variant in loss.operators().items()
}
