"""Losses behind a linear layer: the leaf is the hidden states, and the second tensor is the layer's weight.

The others, class indices or the two tensors of a teacher, are drawn here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedloss
import fusedloss.functional as FL

from . import row_losses

if TYPE_CHECKING:
    from .cases import Case

Loss = Callable[..., Tensor]
T = 2.0  # the temperature of distillation
# With logits of this size the classes that are not the target's have a part of the gradient that no
# tolerance hides.
LOGITS = 3.0
IGNORED = -100
EXACT_LOGITS = 2**25  # so many at a time, in float64


@dataclass(frozen=True)
class Layer:
    """What is special about a case behind a linear layer."""

    ignored: float = 0.0  # the share of the rows that do not count
    frozen: bool = False  # no gradient for the weight

    @property
    def note(self) -> str:
        """Behind the case's name."""
        ignored = f", {self.ignored:.0%} ignored".replace("%", " %") if self.ignored else ""
        return ignored + (", frozen weight" if self.frozen else "")


def _pair(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight, written in place; see `Case.inputs`."""
    generator = torch.Generator(case.device).manual_seed(seed)
    rows, width, classes = case.shape
    hidden, weight = (
        torch.empty(size, width, dtype=case.dtype, device=case.device) for size in (rows, classes)
    )
    hidden.normal_(generator=generator)
    weight.normal_(generator=generator).mul_(LOGITS / width**0.5)
    return hidden, weight


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    hidden, weight = _pair(case, seed=0)
    return hidden.requires_grad_(), weight.requires_grad_(case.gradients > 1)


def labels(case: Case) -> Tensor:
    """A class index for each row. The ignored rows lie between the others."""
    assert case.layer is not None
    rows, _, classes = case.shape
    generator = torch.Generator(case.device).manual_seed(1)
    found = torch.randint(classes, (rows,), generator=generator, device=case.device)
    order = torch.randperm(rows, generator=generator, device=case.device)
    found[order[: round(case.layer.ignored * rows)]] = IGNORED
    return found


def with_labels(case: Case, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """A loss of hidden states, weight and labels as the bench calls it."""
    target = labels(case)
    return lambda x, w, reduction="mean": function(x, w, target)


def _rows(case: Case) -> Any:
    """The definition in tests/row_losses.py."""
    return row_losses.known(case.loss)


def ours(case: Case) -> Loss:
    if case.loss == "cross_entropy":
        return with_labels(case, FL.linear_cross_entropy)
    function, teacher = fusedloss.linear(_rows(case).loss), _pair(case, seed=1)
    return lambda x, w, reduction="mean": function(x, w, teacher, T=T, reduction=reduction)


def eager(case: Case) -> Loss:
    if case.loss == "cross_entropy":
        return with_labels(case, lambda x, w, t: F.cross_entropy(F.linear(x, w), t))
    function, (hidden, weight) = _rows(case).torch, _pair(case, seed=1)

    def loss(x: Tensor, w: Tensor, reduction: str = "mean") -> Tensor:
        value: Tensor = function(F.linear(x, w), F.linear(hidden, weight), T=T).mean()
        return value

    return loss


def exact(case: Case) -> Loss:
    """As eager, for float64: some rows at a time, since all logits in float64 fit into no GPU."""
    chunk = max(1, EXACT_LOGITS // case.shape[2])
    if case.loss == "cross_entropy":
        second = labels(case)
        counted = int((second != IGNORED).sum())

        def rows_of(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, w), t, reduction="sum")

    else:
        function, (hidden, weight) = _rows(case).torch, _pair(case, seed=1)
        second, weight, counted = hidden, weight.double(), len(hidden)

        def rows_of(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
            teacher = F.linear(t.double(), weight)
            value: Tensor = function(F.linear(x, w), teacher, T=T).sum()
            return value

    def loss(x: Tensor, w: Tensor, reduction: str = "mean") -> Tensor:
        parts = zip(x.split(chunk), second.split(chunk), strict=True)
        once_more = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        total: Tensor = sum(once_more(rows_of, part, w, t) for part, t in parts)  # type: ignore[misc, assignment]
        return total / counted

    return loss


def products(case: Case, x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """The matrix products that a step needs and nothing else, in place of one. Rows that do not count
    need none."""
    hidden, weight, teacher = x.detach(), w.detach(), None
    if case.loss == "distillation":
        teacher = _pair(case, seed=1)
    else:
        hidden = hidden[labels(case) != IGNORED]
    logits = hidden.new_empty(len(hidden), len(weight))

    @torch.no_grad()
    def step() -> Tensor:
        x.grad = w.grad = None
        if teacher is not None:
            torch.mm(teacher[0], teacher[1].t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        if w.requires_grad:
            w.grad = torch.mm(logits.t(), hidden)
        return torch.mm(logits, weight)

    return step
