"""Losses of other packages that :class:`fusedloss.patch` replaces while it is on, as soon as their package
is imported. Each row computes what the original does; what the kernels do not cover goes to the original.

The others of these packages that call torch.nn.functional's losses are reached there.
tests/test_others.py compares each row with its package.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dispatch
from . import functional as FL

Function = Callable[..., Any]
_NONE_IGNORED = -(1 << 63)


class Row(NamedTuple):
    """module: where the original is defined. name: a function, or a class and its method. fused: takes its
    arguments, and returns NotImplemented for those that the original has to compute."""

    module: str
    name: str
    fused: Function


def _cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Any:
    """The loss of two-byte logits in float32, as if they were converted before."""
    if logits.dtype not in (torch.bfloat16, torch.float16):
        return FL.cross_entropy(logits, target, **options)
    with torch.autocast(logits.device.type, torch.bfloat16):
        return FL.cross_entropy(logits, target, **options)


def _are_tensors(*values: Any) -> bool:
    return all(isinstance(value, Tensor) for value in values)


# ---- timm ----------------------------------------------------------------------------------------


def _label_smoothing(self: Any, x: Any, target: Any) -> Any:
    fits = _are_tensors(x, target) and x.dim() == 2 and target.dtype is torch.int64
    if not fits or target.dim() != 1 or not 0 <= self.smoothing <= 1:
        return NotImplemented
    return FL.cross_entropy(x, target, label_smoothing=self.smoothing, ignore_index=_NONE_IGNORED)


def _soft_target(self: Any, x: Any, target: Any) -> Any:
    fits = _are_tensors(x, target) and x.dim() == 2 and target.is_floating_point()
    return FL.cross_entropy(x, target) if fits and target.shape == x.shape else NotImplemented


@functools.cache
def _asymmetric() -> Function:
    from . import math as fm
    from .custom import pointwise_loss

    @pointwise_loss
    def asymmetric_loss(
        input: Any, target: Any, *, gamma_neg: float, gamma_pos: float, clip: float, eps: float
    ) -> Any:
        p = fm.sigmoid(input)
        q = fm.minimum(fm.sigmoid(-input) + clip, 1)
        no = 1 - target
        log_likelihood = target * fm.log(fm.maximum(p, eps)) + no * fm.log(fm.maximum(q, eps))
        miss = 1 - (p * target + q * no)
        return -log_likelihood * miss ** (gamma_pos * target + gamma_neg * no)

    return asymmetric_loss


def _asymmetric_multi_label(self: Any, x: Any, y: Any) -> Any:
    fits = _are_tensors(x, y) and x.shape == y.shape and x.is_floating_point()
    # The slope of a power below 1 is infinite where the power's base is 0, and torch's may be nan.
    plain = self.weight is None and self.pos_weight is None and not self.smoothing
    plain = plain and not self.disable_torch_grad_focal_loss
    plain = plain and min(self.gamma_neg, self.gamma_pos) >= 1
    if not (fits and plain) or torch.float64 in (x.dtype, y.dtype) or y.requires_grad:
        return NotImplemented
    numbers = {
        name: float(getattr(self, name) or 0) for name in ("gamma_neg", "gamma_pos", "clip", "eps")
    }
    reduction = "sum" if self.reduction == "batchmean" else self.reduction
    with torch.autocast(x.device.type, torch.bfloat16):  # the result is float32
        loss = _asymmetric()(x, y, reduction=reduction, **numbers)
    return loss / x.shape[0] if self.reduction == "batchmean" else loss


# ---- torchvision ---------------------------------------------------------------------------------


@functools.cache
def _focal() -> Function:
    from . import math as fm
    from .custom import pointwise_loss

    @pointwise_loss
    def sigmoid_focal_loss(input: Any, target: Any, *, alpha: float, gamma: float) -> Any:
        no = 1 - target
        miss = fm.sigmoid(-input) * target + fm.sigmoid(input) * no
        share = fm.where(fm.equal(alpha, -1), 1, alpha * target + (1 - alpha) * no)
        return share * miss**gamma * (fm.softplus(input) - target * input)

    return sigmoid_focal_loss


def _sigmoid_focal(
    inputs: Any, targets: Any, alpha: Any = 0.25, gamma: Any = 2, reduction: Any = "none"
) -> Any:
    fits = _are_tensors(inputs, targets) and inputs.shape == targets.shape
    fits = fits and inputs.dtype is targets.dtype and inputs.is_floating_point()
    fits = fits and isinstance(gamma, int | float) and gamma >= 1  # see the asymmetric loss
    fits = fits and isinstance(alpha, int | float) and (0 <= alpha <= 1 or alpha == -1)
    if not fits or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    numbers = {"alpha": float(alpha), "gamma": float(gamma)}
    return _focal()(inputs, targets, reduction=reduction, **numbers)


# ---- transformers --------------------------------------------------------------------------------


def _label_smoother(
    self: Any,
    model_output: Any,
    labels: Any,
    shift_labels: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
    if not 0 <= self.epsilon <= 1 or labels.dim() != logits.dim() - 1:
        return NotImplemented
    if shift_labels:  # the last position predicts nothing
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=self.ignore_index)
    ignored = labels.eq(self.ignore_index)
    # Other negative labels count as class 0.
    target = labels.clamp(min=0).masked_fill(ignored, _NONE_IGNORED).flatten()
    rows = logits.reshape(-1, logits.shape[-1])
    loss = _cross_entropy(
        rows, target, ignore_index=_NONE_IGNORED, reduction="sum", label_smoothing=self.epsilon
    )
    count = ignored.numel() - ignored.sum() if num_items_in_batch is None else num_items_in_batch
    return _divided(loss, count)


def _masked_language_model(
    logits: Any,
    labels: Any,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Any:
    """Without the float32 copy of the logits."""
    if logits.dtype is torch.float64:  # which the original rounds
        return NotImplemented
    loss = _cross_entropy(
        logits.view(-1, vocab_size),
        labels.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    return loss if num_items_in_batch is None else _divided(loss, num_items_in_batch)


def _causal_language_model(
    logits: Any,
    labels: Any,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Any = None,
    **kwargs: Any,
) -> Any:
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return _masked_language_model(
        logits, shift_labels, vocab_size, num_items_in_batch, ignore_index
    )


def _divided(loss: Tensor, count: Any) -> Tensor:
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


# ---- segmentation_models_pytorch -----------------------------------------------------------------


def _soft_cross_entropy(self: Any, y_pred: Any, y_true: Any) -> Any:
    fits = _are_tensors(y_pred, y_true) and self.dim == 1 and y_true.dtype is torch.int64
    fits = fits and y_true.dim() == y_pred.dim() - 1 and self.reduction in ("mean", "sum")
    if not fits or self.smooth_factor is None or not 0 <= self.smooth_factor <= 1:
        return NotImplemented
    ignored = _NONE_IGNORED if self.ignore_index is None else self.ignore_index
    loss = _cross_entropy(
        y_pred, y_true, reduction="sum", ignore_index=ignored, label_smoothing=self.smooth_factor
    )
    if self.reduction == "mean":  # over the ignored positions too
        loss = loss / y_true.numel()
    return loss if torch.is_autocast_enabled(y_pred.device.type) else loss.to(y_pred.dtype)


ROWS = (
    Row("timm.loss.cross_entropy", "LabelSmoothingCrossEntropy.forward", _label_smoothing),
    Row("timm.loss.cross_entropy", "SoftTargetCrossEntropy.forward", _soft_target),
    Row("timm.loss.asymmetric_loss", "AsymmetricLossMultiLabel.forward", _asymmetric_multi_label),
    Row("torchvision.ops.focal_loss", "sigmoid_focal_loss", _sigmoid_focal),
    Row("transformers.trainer_pt_utils", "LabelSmoother.__call__", _label_smoother),
    Row("transformers.loss.loss_utils", "ForCausalLMLoss", _causal_language_model),
    Row("transformers.loss.loss_utils", "ForMaskedLMLoss", _masked_language_model),
    Row(
        "segmentation_models_pytorch.losses.soft_ce",
        "SoftCrossEntropyLoss.forward",
        _soft_cross_entropy,
    ),
)


# ---- putting them there --------------------------------------------------------------------------

_replaced: dict[Row, tuple[Function, Function]] = {}  # the original, and what stands there


def _ours(row: Row, original: Function) -> Function:
    @functools.wraps(original)
    def ours(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the original is compiled with the code around it
            return original(*args, **kwargs)
        value = row.fused(*args, **kwargs)
        if value is not NotImplemented:
            return value
        if _dispatch._listening():
            _dispatch._report(row.name, "fusedloss.patch leaves these arguments to the package")
        return original(*args, **kwargs)

    return ours


def _put(row: Row, old: Function, new: Function) -> None:
    """Where the package has it: in its class; a function, also where its modules have imported it, and in
    the tables of its own module."""
    module = sys.modules.get(row.module)
    if module is None:
        return
    kind, _, method = row.name.rpartition(".")
    if kind:
        setattr(getattr(module, kind), method, new)
        return
    package = row.module.partition(".")[0]
    for name, one in list(sys.modules.items()):
        if name.partition(".")[0] == package and getattr(one, "__dict__", {}).get(row.name) is old:
            setattr(one, row.name, new)
    for table in [value for value in vars(module).values() if type(value) is dict]:
        table.update({key: new for key, value in table.items() if value is old})


def _replace() -> None:
    """In what has been imported; a package of another version may lack a row."""
    for row in ROWS:
        found: Any = sys.modules.get(row.module)
        for name in row.name.split("."):
            found = getattr(found, name, None)
        if found is not None and row not in _replaced:
            ours = _ours(row, found)
            _replaced[row] = found, ours
            _put(row, found, ours)


class _Imports(MetaPathFinder):
    """Replaces in a module of the table after it has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if all(name != row.module for row in ROWS):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_replace(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    _replace()

            spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


_imports = _Imports()


def start() -> None:
    sys.meta_path.insert(0, _imports)
    _replace()


def stop() -> None:
    sys.meta_path.remove(_imports)
    for row, (original, ours) in _replaced.items():
        _put(row, ours, original)
    _replaced.clear()
