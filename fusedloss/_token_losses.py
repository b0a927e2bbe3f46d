"""Cross-entropy with the options of language models, as losses of rows in the words of
:mod:`fusedloss.math`: compiled at their first use, and cached.

_linear.py imports this module when it needs a kernel, since SymPy takes a while.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from . import math as fm
from .custom import RowLoss, row_loss


@dataclass(frozen=True)
class Options:
    """Which options a formula has, for each one that is left out costs nothing.

    Attributes:
        smoothed, scaled, capped, z_loss: whether there are label_smoothing, logit_scale, softcap, z_loss.
        weighted: whether each class has a weight.
        outputs: the further results of a row.
        combined: whether the loss is the sum of all results, each times one more number of the row.
    """

    smoothed: bool = False
    scaled: bool = False
    capped: bool = False
    z_loss: bool = False
    weighted: bool = False
    outputs: tuple[str, ...] = ()
    combined: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        names = {
            "label_smoothing": self.smoothed,
            "logit_scale": self.scaled,
            "softcap": self.capped,
            "z_loss": self.z_loss,
        }
        return tuple(name for name, used in names.items() if used)

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The names of these further numbers of a row."""
        return tuple(f"of_{name}" for name in ("loss", *self.outputs)) if self.combined else ()


def _results(options: Options, t: dict[str, Any]) -> dict[str, Any]:
    """All results of a row by name, from the tensors and parameters by name."""
    logits, label = t["logits"], t["label"]
    if options.scaled:
        logits = t["logit_scale"] * logits
    if options.capped:
        logits = t["softcap"] * fm.tanh(logits / t["softcap"])
    log_p, lse = fm.log_softmax(logits), fm.logsumexp(logits)
    of_label = fm.at(log_p, label)
    loss = -of_label
    if options.weighted:
        loss = fm.at(t["class_weight"], label) * loss
    if options.smoothed:
        of_classes = t["class_weight"] * log_p if options.weighted else log_p
        smooth = -fm.mean(of_classes)
        loss = (1 - t["label_smoothing"]) * loss + t["label_smoothing"] * smooth
    if options.z_loss:
        loss = loss + t["z_loss"] * lse**2
    results = {"loss": loss, "lse": lse, "logprob": of_label}
    if "entropy" in options.outputs:
        results["entropy"] = -fm.sum(fm.exp(log_p) * log_p)
    if "correct" in options.outputs:
        right = fm.equal(fm.at(logits, label), fm.max(logits))
        results["correct"] = fm.where(right, 1, 0)
    return results


@functools.cache
def defined(options: Options) -> RowLoss:
    """The loss with these options. Its tensors are logits, label, class_weight if there is one, and the
    coefficients."""

    def cross_entropy(*tensors: Any, **parameters: Any) -> Any:
        names = inspect.signature(cross_entropy).parameters
        results = _results(options, {**dict(zip(names, tensors, strict=False)), **parameters})
        if options.combined:
            coefficients = tensors[len(tensors) - len(options.coefficients) :]
            chosen = (results[name] for name in ("loss", *options.outputs))
            return sum(c * r for c, r in zip(coefficients, chosen, strict=True))
        extras = {name: results[name] for name in options.outputs}
        return (results["loss"], extras) if extras else results["loss"]

    kinds: dict[str, Any] = {"logits": inspect.Parameter.empty, "label": fm.Label}
    if options.weighted:
        kinds["class_weight"] = fm.PerClass
    kinds.update(dict.fromkeys(options.coefficients, fm.PerRow))
    tensor, number = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    signature = [inspect.Parameter(name, tensor, annotation=kind) for name, kind in kinds.items()]
    signature += [inspect.Parameter(name, number) for name in options.parameters]
    cross_entropy.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    return row_loss(cross_entropy)
