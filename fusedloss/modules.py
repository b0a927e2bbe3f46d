"""The losses as modules: subclasses of torch.nn's, with the same options and state_dict."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary
from torch.utils.weak import WeakTensorKeyDictionary

from . import _dispatch, backends
from ._dispatch import NO_TORCHSCRIPT, run, warn_of_mean
from ._losses import LOSSES
from .functional import linear_cross_entropy

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LogLoss",
    "LogSoftmax",
    "MAELoss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "PoissonNLLLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "TripletMarginLoss",
]


class _Predicting(nn.Module):
    """Keeps a prediction of the module's upstream gradient, which is no part of its state."""

    def _prediction(self, input: Any) -> Tensor | None:
        # While a compiler traces, or under a dispatch mode, no real tensor may be touched.
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        if traced or not isinstance(input, Tensor):
            return None
        if has_torch_function_unary(input):  # its class would see every access to an attribute
            with torch._C.DisableTorchFunction():
                return self._prediction(input)
        if input.device.type not in backends.fused_on:
            return None
        prediction: Tensor | None = self.__dict__.get("_module_prediction")
        if prediction is None or prediction.device != input.device:
            prediction = backends.new_prediction(input)
            self.__dict__["_module_prediction"] = prediction
        return prediction

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script calls this before it compiles a module.
        raise RuntimeError(NO_TORCHSCRIPT)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is another call site, with a prediction of its own.
        return {k: v for k, v in self.__dict__.items() if k != "_module_prediction"}


class MSELoss(_Predicting, nn.MSELoss):
    """:class:`torch.nn.MSELoss`, fused; see :func:`fusedloss.functional.mse_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, None, None, self.reduction, None
        return run(LOSSES["mse_loss"], args, self._prediction(input))


class L1Loss(_Predicting, nn.L1Loss):
    """:class:`torch.nn.L1Loss` (MAE), fused; see :func:`fusedloss.functional.l1_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, None, None, self.reduction, None
        return run(LOSSES["l1_loss"], args, self._prediction(input))


MAELoss = L1Loss


class SmoothL1Loss(_Predicting, nn.SmoothL1Loss):
    """:class:`torch.nn.SmoothL1Loss`, fused; see :func:`fusedloss.functional.smooth_l1_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, None, None, self.reduction, self.beta
        return run(LOSSES["smooth_l1_loss"], args, self._prediction(input))


class HuberLoss(_Predicting, nn.HuberLoss):
    """:class:`torch.nn.HuberLoss`, fused; see :func:`fusedloss.functional.huber_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, self.reduction, self.delta, None
        return run(LOSSES["huber_loss"], args, self._prediction(input))


class BCELoss(_Predicting, nn.BCELoss):
    """:class:`torch.nn.BCELoss`, fused; see :func:`fusedloss.functional.binary_cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, self.weight, None, None, self.reduction
        return run(LOSSES["binary_cross_entropy"], args, self._prediction(input))


class BCEWithLogitsLoss(_Predicting, nn.BCEWithLogitsLoss):
    """:class:`torch.nn.BCEWithLogitsLoss`, fused; see
    :func:`fusedloss.functional.binary_cross_entropy_with_logits`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, self.weight, None, None, self.reduction, self.pos_weight
        return run(LOSSES["binary_cross_entropy_with_logits"], args, self._prediction(input))


class CrossEntropyLoss(_Predicting, nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss`, fused; see
    :func:`fusedloss.functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = (
            input,
            target,
            self.weight,
            None,
            self.ignore_index,
            None,
            self.reduction,
            self.label_smoothing,
        )
        return run(LOSSES["cross_entropy"], args, self._prediction(input))


class SoftMarginLoss(_Predicting, nn.SoftMarginLoss):
    """:class:`torch.nn.SoftMarginLoss`, fused; see
    :func:`fusedloss.functional.soft_margin_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, None, None, self.reduction
        return run(LOSSES["soft_margin_loss"], args, self._prediction(input))


class MultiLabelSoftMarginLoss(_Predicting, nn.MultiLabelSoftMarginLoss):
    """:class:`torch.nn.MultiLabelSoftMarginLoss`, fused; see
    :func:`fusedloss.functional.multilabel_soft_margin_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, self.weight, None, None, self.reduction
        return run(LOSSES["multilabel_soft_margin_loss"], args, self._prediction(input))


class HingeEmbeddingLoss(_Predicting, nn.HingeEmbeddingLoss):
    """:class:`torch.nn.HingeEmbeddingLoss`, fused; see
    :func:`fusedloss.functional.hinge_embedding_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, self.margin, None, None, self.reduction
        return run(LOSSES["hinge_embedding_loss"], args, self._prediction(input))


class MarginRankingLoss(_Predicting, nn.MarginRankingLoss):
    """:class:`torch.nn.MarginRankingLoss`, fused; see
    :func:`fusedloss.functional.margin_ranking_loss`."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        args = input1, input2, target, self.margin, None, None, self.reduction
        return run(LOSSES["margin_ranking_loss"], args, self._prediction(input1))


class KLDivLoss(_Predicting, nn.KLDivLoss):
    """:class:`torch.nn.KLDivLoss`, fused; see :func:`fusedloss.functional.kl_div`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        warn_of_mean(None, None, self.reduction)
        args = input, target, None, None, self.reduction, self.log_target
        return run(LOSSES["kl_div"], args, self._prediction(input))


class PoissonNLLLoss(_Predicting, nn.PoissonNLLLoss):
    """:class:`torch.nn.PoissonNLLLoss`, fused; see
    :func:`fusedloss.functional.poisson_nll_loss`."""

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        args = (
            *(log_input, target, self.log_input, self.full, None, self.eps, None),
            self.reduction,
        )
        return run(LOSSES["poisson_nll_loss"], args, self._prediction(log_input))


class GaussianNLLLoss(_Predicting, nn.GaussianNLLLoss):
    """:class:`torch.nn.GaussianNLLLoss`, fused; see
    :func:`fusedloss.functional.gaussian_nll_loss`."""

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        args = input, target, var, self.full, self.eps, self.reduction
        return run(LOSSES["gaussian_nll_loss"], args, self._prediction(input))


class CosineEmbeddingLoss(_Predicting, nn.CosineEmbeddingLoss):
    """:class:`torch.nn.CosineEmbeddingLoss`, fused; see
    :func:`fusedloss.functional.cosine_embedding_loss`."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        args = input1, input2, target, self.margin, None, None, self.reduction
        return run(LOSSES["cosine_embedding_loss"], args, self._prediction(input1))


class TripletMarginLoss(_Predicting, nn.TripletMarginLoss):
    """:class:`torch.nn.TripletMarginLoss`, fused; see
    :func:`fusedloss.functional.triplet_margin_loss`."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        options = self.margin, self.p, self.eps, self.swap, None, None, self.reduction
        args = anchor, positive, negative, *options
        return run(LOSSES["triplet_margin_loss"], args, self._prediction(anchor))


class MultiMarginLoss(_Predicting, nn.MultiMarginLoss):
    """:class:`torch.nn.MultiMarginLoss`, fused; see
    :func:`fusedloss.functional.multi_margin_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, self.p, self.margin, self.weight, None, None, self.reduction
        return run(LOSSES["multi_margin_loss"], args, self._prediction(input))


# ---- LogSoftmax and NLLLoss --------------------------------------------------------------------------
# Torch's nll_loss reads one number a row and writes the gradient once: nothing is left to save. But
# behind a LogSoftmax the two are cross-entropy, whose gradient reaches the logits without a backward
# pass through the LogSoftmax.


@dataclass
class _Logits:
    logits: Tensor
    versions: tuple[int, int]  # those of both tensors: a write in place changes one


_logits: MutableMapping[Tensor, _Logits] = WeakTensorKeyDictionary()  # by log probabilities


class LogSoftmax(nn.LogSoftmax):
    """:class:`torch.nn.LogSoftmax`, which remembers its input for :class:`NLLLoss` as long as its output
    lives."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        class_dim = 1 if input.dim() > 1 else 0
        over_classes = input.dim() > 0 and self.dim in (class_dim, class_dim - input.dim())
        if over_classes and type(output) is Tensor and not torch.compiler.is_compiling():
            _logits[output] = _Logits(input, (output._version, input._version))
        return output


class NLLLoss(_Predicting, nn.NLLLoss):
    """:class:`torch.nn.NLLLoss`. Of the output of :class:`LogSoftmax` it is computed as
    :func:`fusedloss.functional.cross_entropy` of that one's input; of anything else, by torch."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        logits = self._logits_of(input)
        if logits is None:
            if _dispatch._listening():
                _dispatch._report(
                    "nll_loss", "input is not what a fusedloss.LogSoftmax has returned"
                )
            return super().forward(input, target)
        weight, ignore_index = self.weight, self.ignore_index
        args = logits, target, weight, None, ignore_index, None, self.reduction, 0.0
        return run(LOSSES["cross_entropy"], args, self._prediction(logits))

    def _logits_of(self, input: Any) -> Tensor | None:
        """The logits of these log probabilities, if nobody would see that no gradient reaches these."""
        if type(input) is not Tensor or torch.compiler.is_compiling():
            return None
        known = _logits.get(input)
        seen = input.retains_grad or bool(input._backward_hooks)
        if known is None or seen or input.requires_grad is not known.logits.requires_grad:
            return None
        unchanged = known.versions == (input._version, known.logits._version)
        return known.logits if unchanged else None


class _LinearCrossEntropyLoss(nn.modules.loss._WeightedLoss):
    """torch's module, which its releases before 2.13 lack."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(
                f"expected label_smoothing to be in range [0, 1], got {label_smoothing}"
            )
        super().__init__(weight, None, None, reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        of_layer = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, of_layer, bias=bias, device=device, dtype=dtype)
        self.options = options


class LinearCrossEntropyLoss(getattr(nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss)):  # type: ignore[misc]
    """:class:`torch.nn.LinearCrossEntropyLoss`, fused: a linear layer, ``linear``, and the loss of its
    logits, which are never all in memory; see :func:`fusedloss.functional.linear_cross_entropy`.

    ``forward(input, target, **options)`` takes that function's ``num_items``, ``token_weight`` and
    others for one call.
    """

    _more: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **more: Any,
    ) -> LinearCrossEntropyLoss:
        """The loss behind a layer that exists, such as the ``lm_head`` of a language model, whose
        parameters it shares, tied ones as well.

        Args:
            layer: what becomes ``linear``. Under FSDP2 shard the loss (``fully_shard(loss)``): hooks of
                the layer itself do not run, and its weight, if that is sharded, is gathered for the call.
            weight: of the classes, shape (C).
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.
            ignore_index: rows of this class index are left out.
            label_smoothing: in [0, 1].
            options: a :class:`torch.nn.LinearCrossEntropyOptions` or None.
            more: other keywords of :func:`fusedloss.functional.linear_cross_entropy`, for every call.

        Raises:
            TypeError: ``layer`` is no linear layer.
        """
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"LinearCrossEntropyLoss.of takes a torch.nn.Linear, not {type(layer).__name__}"
            )
        with torch.device("meta"):
            loss = cls(
                layer.in_features,
                layer.out_features,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                options=options,
            )
        loss.weight = weight
        loss.linear = layer
        loss._more = dict(more)
        return loss

    def forward(self, input: Tensor, target: Tensor, **more: Any) -> Any:
        weight, bias = (_whole(t, input) for t in (self.linear.weight, self.linear.bias))
        assert weight is not None
        if self.out_features:
            shape = self.num_classes, *self.out_features
            weight = weight.reshape(*shape, self.linear.in_features)
            bias = None if bias is None else bias.reshape(shape)
        return linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **{**self._more, **more},
        )

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(NO_TORCHSCRIPT)


def _whole(parameter: Any, input: Any) -> Tensor | None:
    """A parameter that is sharded, as a DTensor, gathered for an input that is not."""
    sharded = hasattr(parameter, "full_tensor") and not hasattr(input, "full_tensor")
    return parameter.full_tensor() if sharded else parameter  # type: ignore[no-any-return]


class LogLoss(_Predicting):
    """Multi-class log loss of probabilities; see :func:`fusedloss.functional.log_loss`."""

    weight: Tensor | None

    def __init__(
        self, weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        args = input, target, self.weight, self.reduction, self.ignore_index
        return run(LOSSES["log_loss"], args, self._prediction(input))
