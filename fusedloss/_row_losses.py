"""The losses of torch.nn that are custom losses of rows: compiled at their first use, and cached.

A definition has the name of its loss, and of the option that makes it another one. _dispatch.py imports
this module when it needs a kernel, since SymPy takes a while.
"""

from __future__ import annotations

import functools
from typing import Any

from . import math as fm
from .custom import RowLoss, prepare, row_loss


def cosine_embedding_loss(input1: Any, input2: Any, target: fm.PerRow, *, margin: float) -> Any:
    eps = 9.999999960041972e-13  # torch's 1e-12, which is a float
    squares = (fm.sum(input1**2) + eps) * (fm.sum(input2**2) + eps)
    cosine = fm.sum(input1 * input2) / fm.sqrt(squares)
    apart = fm.where(fm.equal(target, -1), fm.relu(cosine - margin), 0)
    return fm.where(fm.equal(target, 1), 1 - cosine, apart)


def triplet_margin_loss(
    anchor: Any, positive: Any, negative: Any, *, margin: float, eps: float
) -> Any:
    near, far = fm.norm(anchor - positive + eps), fm.norm(anchor - negative + eps)
    return fm.relu(margin + near - far)


def triplet_margin_loss_swap(
    anchor: Any, positive: Any, negative: Any, *, margin: float, eps: float
) -> Any:
    near, far = fm.norm(anchor - positive + eps), fm.norm(anchor - negative + eps)
    return fm.relu(margin + near - fm.minimum(far, fm.norm(positive - negative + eps)))


def multi_margin_loss(input: Any, target: fm.Label, *, margin: float, p: float) -> Any:
    z = margin - fm.at(input, target) + input
    # Not relu(): torch's kernel skips what is nan.
    h = fm.where(z > 0, fm.where(fm.equal(p, 1), z, z**2), 0)
    return (fm.sum(h) - fm.at(h, target)) / fm.classes


def multi_margin_loss_weight(
    input: Any, target: fm.Label, class_weight: fm.PerClass, *, margin: float, p: float
) -> Any:
    return fm.at(class_weight, target) * multi_margin_loss(input, target, margin=margin, p=p)


@functools.cache
def _defined(definition: str) -> RowLoss:
    return row_loss(globals()[definition])


def prepared(definition: str, device: str) -> tuple[str, str, str]:
    """See :func:`fusedloss.custom.prepare.prepared`. Without a kernel torch's function runs, as it would
    without this package, so nothing is worth a warning."""
    return prepare.prepared(_defined(definition)._number, device, warns=False)
