"""Fused losses of other packages, and PyTorch's own behind a linear layer, measured if they are
installed: all are cross-entropy on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear
from .cases import Case, Loss


@dataclass(frozen=True)
class Peer:
    name: str  # in COLUMNS
    package: str  # the name that pip knows
    module: str
    load: Callable[[], Loss] | None = None
    # Its loss of hidden states, weight and class indices.
    load_linear: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]] | None = None
    # It writes the gradient over its input, so it is timed on its own copy.
    overwrites_input: bool = False

    @property
    def version(self) -> str | None:
        """The installed version; None if it is not installed."""
        try:
            found = find_spec(self.module) is not None
        except ModuleNotFoundError:  # not even the parent package
            found = False
        if not found:
            return None
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return "of unknown version"

    def covers(self, case: Case) -> bool:
        """Class indices for the rows of a matrix, on a GPU, value and gradient of a mean."""
        return (
            case.loss == "cross_entropy"
            and case.device == "cuda"
            and (len(case.shape) == 2 or case.layer is not None)
            and (self.load if case.layer is None else self.load_linear) is not None
            and not case.probabilities
            and not case.functions
            and case.reduction == "mean"
        )

    def loss(self, case: Case) -> Loss:
        if case.layer is not None:
            assert self.load_linear is not None
            return linear.with_labels(case, self.load_linear())
        assert self.load is not None
        return self.load()

    def overwrites(self, case: Case) -> bool:
        return self.overwrites_input and case.layer is None


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda x, t: liger_cross_entropy(x, t)  # type: ignore[no-any-return]


def _liger_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, w, t: liger_fused_linear_cross_entropy(x, w, t)  # type: ignore[no-any-return]


def _quack_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w, t: chunked_linear_cross_entropy(x, w, t, reduction="mean")  # type: ignore[no-any-return]


def _chunked() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # From torch 2.13 on.
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda x, t: cross_entropy(x, t, reduction="mean")  # type: ignore[no-any-return]


def _flash_attn() -> Loss:
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return CrossEntropyLoss()  # type: ignore[no-any-return]


def _apex() -> Loss:
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    def loss(x: Tensor, t: Tensor) -> Tensor:
        # smoothing 0; and a padding index, whose default 0 is a class here
        mean: Tensor = SoftmaxCrossEntropyLoss.apply(x, t, 0.0, -100).mean()
        return mean

    return loss


PEERS = {
    peer.name: peer
    for peer in (
        Peer("liger", "liger-kernel", "liger_kernel", _liger, _liger_linear, overwrites_input=True),
        Peer("quack", "quack-kernels", "quack.cross_entropy", _quack, _quack_linear),
        Peer("flash_attn", "flash-attn", "flash_attn.losses", _flash_attn),
        Peer("apex", "apex", "apex.contrib.xentropy", _apex),
        Peer("chunked", "torch", "torch", load_linear=_chunked),
    )
}
