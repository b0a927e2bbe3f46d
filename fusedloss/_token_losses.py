"""Cross-entropy with the options of language models, as losses of rows in the words of
:mod:`fusedloss.math`: compiled at their first use, and cached.

_linear_cross_entropy.py imports this module when it needs a kernel, since SymPy takes a while.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from . import math as fm
from ._linear_cross_entropy import Formula
from .custom import RowLoss, prepare, row_loss


def _results(formula: Formula, t: dict[str, Any]) -> dict[str, Any]:
    """All results of a row by name, from the tensors and parameters by name."""
    logits, label = t["logits"], t["label"]
    if "logit_scale" in formula.parameters:
        logits = t["logit_scale"] * logits
    if "softcap" in formula.parameters:
        logits = t["softcap"] * fm.tanh(logits / t["softcap"])
    log_p, lse = fm.log_softmax(logits), fm.logsumexp(logits)
    of_label = fm.at(log_p, label)
    loss = -of_label
    if formula.weighted:
        loss = fm.at(t["class_weight"], label) * loss
    if "label_smoothing" in formula.parameters:
        of_classes = t["class_weight"] * log_p if formula.weighted else log_p
        smooth = -fm.mean(of_classes)
        loss = (1 - t["label_smoothing"]) * loss + t["label_smoothing"] * smooth
    if "z_loss" in formula.parameters:
        loss = loss + t["z_loss"] * lse**2
    results = {"loss": loss, "lse": lse, "logprob": of_label}
    if "entropy" in formula.outputs:
        results["entropy"] = -fm.sum(fm.exp(log_p) * log_p)
    if "correct" in formula.outputs:
        right = fm.equal(fm.at(logits, label), fm.max(logits))
        results["correct"] = fm.where(right, 1, 0)
    return results


@functools.cache
def defined(formula: Formula) -> RowLoss:
    """The loss of this formula. Its tensors are logits, label, class_weight if there is one, and the
    coefficients."""

    def cross_entropy(*tensors: Any, **parameters: Any) -> Any:
        names = inspect.signature(cross_entropy).parameters
        results = _results(formula, {**dict(zip(names, tensors, strict=False)), **parameters})
        if formula.combined:
            coefficients = tensors[len(tensors) - len(formula.coefficients) :]
            chosen = (results[name] for name in ("loss", *formula.outputs))
            return sum(c * r for c, r in zip(coefficients, chosen, strict=True))
        extras = {name: results[name] for name in formula.outputs}
        return (results["loss"], extras) if extras else results["loss"]

    kinds: dict[str, Any] = {"logits": inspect.Parameter.empty, "label": fm.Label}
    if formula.weighted:
        kinds["class_weight"] = fm.PerClass
    kinds.update(dict.fromkeys(formula.coefficients, fm.PerRow))
    tensor, number = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    signature = [inspect.Parameter(name, tensor, annotation=kind) for name, kind in kinds.items()]
    signature += [inspect.Parameter(name, number) for name in formula.parameters]
    cross_entropy.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    return row_loss(cross_entropy)


def prepared(formula: Formula, device: str) -> tuple[str, str, str]:
    """See :func:`fusedloss.custom.prepare.prepared`."""
    return prepare.prepared(defined(formula)._number, device)
