"""The losses in plain PyTorch: tests compare the kernels with them, and calls that no fused kernel
covers come here.

If PyTorch has the loss, its function *is* the reference, taken when this module is imported: nothing
else has exactly its promotions, warnings, errors and higher derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn._reduction import get_enum, legacy_get_string

from ._caller import at_callers_line

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the numbers that operators take

mse_loss = F.mse_loss
_l1_loss: Callable[..., Tensor] = F.l1_loss  # its stub lacks weight
smooth_l1_loss = F.smooth_l1_loss
huber_loss: Callable[..., Tensor] = F.huber_loss  # its stub lacks weight
binary_cross_entropy = F.binary_cross_entropy
binary_cross_entropy_with_logits = F.binary_cross_entropy_with_logits
cross_entropy = F.cross_entropy
soft_margin_loss = F.soft_margin_loss
multilabel_soft_margin_loss = F.multilabel_soft_margin_loss
hinge_embedding_loss = F.hinge_embedding_loss
margin_ranking_loss = F.margin_ranking_loss
poisson_nll_loss = F.poisson_nll_loss
gaussian_nll_loss = F.gaussian_nll_loss
cosine_embedding_loss = F.cosine_embedding_loss
triplet_margin_loss = F.triplet_margin_loss
multi_margin_loss = F.multi_margin_loss
_nll_loss = F.nll_loss


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """F.l1_loss, but F.l1_loss loses the weight under a TorchFunctionMode such as
    ``with torch.device(...)``."""
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    if weight is None or weight.size() != input.size() or reduction not in REDUCTIONS:
        return at_callers_line(_l1_loss, input, target, reduction=reduction, weight=weight)
    if target.size() == input.size():
        # Like torch, not by l1_loss itself, whose dtype autocast would change.
        each = torch.abs(input - target)
    else:
        each = at_callers_line(_l1_loss, input, target, reduction="none")  # which warns
    return reduced(each, weight, reduction)


mae_loss = l1_loss


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """F.kl_div without its warning about reduction "mean", which the fused function gives itself."""
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    by_batch = reduction == "batchmean"
    enum = get_enum("sum" if by_batch else reduction)
    value = torch.kl_div(input, target, enum, log_target=log_target)
    return value / input.shape[0] if by_batch and input.dim() > 0 else value


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """The loss of all logits at once, with the errors of torch's function, which older releases lack."""
    if input.dim() < 1 or input.dim() > 2:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    features, shape = input.shape[-1], tuple(linear_weight.shape)
    if features != shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {features} and {shape[-1]}, respectively"
        )
    if linear_bias is not None and tuple(linear_bias.shape) != shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {shape[:-1]}, got {tuple(linear_bias.shape)}"
        )
    if len(shape) > 2 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {shape} requires batched input, "
            f"(N, {features}), got unbatched input with shape {tuple(input.shape)}"
        )
    of_logits = (*input.shape[:-1], *shape[:-1])
    if target.shape == of_logits and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    bias = None if linear_bias is None else linear_bias.flatten()
    return cross_entropy(
        F.linear(input, linear_weight.flatten(0, -2), bias).reshape(of_logits),
        target,
        weight=weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def token_cross_entropy(
    logits: Tensor,
    label: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> dict[str, Tensor]:
    """The results of each row of (N, C) logits by name; those of rows that do not count are 0."""
    x = logits * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    counts = label != ignore_index
    safe = torch.where(counts, label, 0)
    log_p, lse = x.log_softmax(-1), x.logsumexp(-1)
    of_label = log_p.gather(-1, safe[:, None])[:, 0]
    loss = cross_entropy(
        x,
        label,
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    best = x.argmax(-1)
    results = {
        "loss": loss + z_loss * lse**2 if z_loss else loss,
        "lse": lse,
        "logprob": of_label,
        "entropy": -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1),
        "correct": (x.gather(-1, safe[:, None])[:, 0] == x.amax(-1)).to(x.dtype),
        "argmax": best,
    }
    return {name: torch.where(counts, t, 0) for name, t in results.items()}


def log_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Multi-class log loss on probabilities; see :func:`fusedloss.functional.log_loss`."""
    for name, tensor in {"input": input, "target": target}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"log_loss needs a tensor as {name}, not {type(tensor).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"log_loss needs probabilities of a floating dtype, not {input.dtype}")
    if input.dim() == 0:
        raise ValueError("log_loss needs an input of shape (C), (N, C) or (N, C, d1, ...), not ()")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    eps = torch.finfo(input.dtype).eps
    if torch.is_autocast_enabled(input.device.type) and input.dtype is not torch.float64:
        # In float32, like the kernels and cross_entropy, although autocast would choose per step.
        input = input.float()
        target = target.float() if target.is_floating_point() else target
        weight = None if weight is None else weight.float()
    log_p = _bounded_log(input, eps)
    if not target.is_floating_point():
        return _nll_loss(
            log_p, target, weight=weight, ignore_index=ignore_index, reduction=reduction
        )
    if target.shape != input.shape:
        raise ValueError(
            f"log_loss with class probabilities needs a target of input's shape "
            f"{tuple(input.shape)}, not {tuple(target.shape)}"
        )
    if not isinstance(ignore_index, int):
        raise TypeError(f"log_loss needs an int as ignore_index, not {ignore_index!r}")
    if ignore_index >= 0:
        raise ValueError(
            f"log_loss has no ignore_index for class probabilities, and it is {ignore_index}"
        )
    dim = 1 if input.dim() > 1 else 0
    if weight is not None:
        if weight.shape != (input.shape[dim],):
            raise ValueError(
                f"log_loss needs a weight of shape ({input.shape[dim]},), one for each class, not "
                f"{tuple(weight.shape)}"
            )
        target = target * class_weight(weight, input)
    rows = -(target * log_p).sum(dim)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.mean()


def _bounded_log(p: Tensor, eps: float) -> Tensor:
    # Not clamp(), whose gradient at the bounds depends on the release of torch.
    outside = (p < eps) | (p > 1)
    return torch.where(outside, p.detach().clamp(eps, 1), p).log()


def log_loss_elements(
    input: Tensor, target: Tensor, weight: Tensor | None, eps: float, ignore_index: int
) -> Tensor:
    """The terms of :func:`log_loss` before any sum. weight broadcasts to input's shape."""
    if not target.is_floating_point():
        dim = 1 if input.dim() > 1 else 0
        classes = torch.arange(input.shape[dim], device=input.device)
        kept = target.masked_fill(target == ignore_index, -1).unsqueeze(dim)
        target = (kept == classes.view(-1, *[1] * (input.dim() - dim - 1))).to(input.dtype)
    terms = -target * _bounded_log(input, eps)
    return terms if weight is None else terms * weight


def reduced(value: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The losses of elements, weighted and reduced; a mean divides by the sum of the weights."""
    if weight is not None:
        value = value * weight
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    return value.mean() if weight is None else value.sum() / weight.sum()


def class_weight(weight: Tensor, input: Tensor) -> Tensor:
    """A weight of shape (C), shaped to broadcast against ``input``."""
    return weight.view(-1, *[1] * (input.dim() - 2)) if input.dim() > 2 else weight
