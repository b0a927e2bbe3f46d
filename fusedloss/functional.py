"""The losses, under the names and with the signatures of :mod:`torch.nn.functional`.

Each takes the torch function's arguments and returns the same dtype, shape, gradients, warnings and
errors. A call that the fused kernels cover computes value and gradient in one pass; any other goes to
:mod:`fusedloss.reference`. :func:`explain` says which, and why.

All tensors are unitless. ``reduction`` is ``"mean"``, ``"sum"`` or ``"none"``. ``size_average`` and
``reduce`` are torch's deprecated forms of it. Low-precision inputs are computed in float32. A target or
weight may have another dtype than input where torch allows that; the loss has torch's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, _linear_cross_entropy
from ._dispatch import explain, run, warn_of_mean
from ._losses import LOSSES

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cross_entropy",
    "explain",
    "gaussian_nll_loss",
    "hinge_embedding_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "log_loss",
    "mae_loss",
    "margin_ranking_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_soft_margin_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
]

_MSE = LOSSES["mse_loss"]
_L1 = LOSSES["l1_loss"]
_SMOOTH_L1 = LOSSES["smooth_l1_loss"]
_HUBER = LOSSES["huber_loss"]
_BCE = LOSSES["binary_cross_entropy"]
_BCE_WITH_LOGITS = LOSSES["binary_cross_entropy_with_logits"]
_CROSS_ENTROPY = LOSSES["cross_entropy"]
_LOG_LOSS = LOSSES["log_loss"]
_SOFT_MARGIN = LOSSES["soft_margin_loss"]
_MULTILABEL_SOFT_MARGIN = LOSSES["multilabel_soft_margin_loss"]
_HINGE_EMBEDDING = LOSSES["hinge_embedding_loss"]
_MARGIN_RANKING = LOSSES["margin_ranking_loss"]
_KL_DIV = LOSSES["kl_div"]
_POISSON_NLL = LOSSES["poisson_nll_loss"]
_GAUSSIAN_NLL = LOSSES["gaussian_nll_loss"]
_COSINE_EMBEDDING = LOSSES["cosine_embedding_loss"]
_TRIPLET_MARGIN = LOSSES["triplet_margin_loss"]
_MULTI_MARGIN = LOSSES["multi_margin_loss"]


# ---- regression ----------------------------------------------------------------------------------


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error: :math:`\ell_i = w_i (x_i - y_i)^2`.

    Args:
        input: predictions :math:`x`, any shape.
        target: :math:`y`, of input's shape, and of any real dtype; another shape is broadcast, with a
            warning, as in torch.
        weight: :math:`w`, of input's shape. With it, ``"mean"`` divides by its sum.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three, or weight is not of input's shape.
        RuntimeError: shapes that do not broadcast.

    Source: :func:`torch.nn.functional.mse_loss`.
    """
    return run(_MSE, (input, target, size_average, reduce, reduction, weight))


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean absolute error (MAE): :math:`\ell_i = w_i |x_i - y_i|`.

    The gradient at the kink :math:`x_i = y_i` is 0, as in torch.

    Args, returns and errors: see :func:`mse_loss`.

    Source: :func:`torch.nn.functional.l1_loss`.
    """
    return run(_L1, (input, target, size_average, reduce, reduction, weight))


mae_loss = l1_loss


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Smooth L1: with :math:`d = x_i - y_i`, :math:`d^2 / (2 \beta)` where :math:`|d| < \beta`,
    else :math:`|d| - \beta / 2`.

    Args:
        input: predictions :math:`x`, any shape.
        target: :math:`y`, of input's shape and dtype; another shape is broadcast, with a warning.
        beta: where the parabola ends, in input's unit; 0 makes it :func:`l1_loss`.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three.
        RuntimeError: beta is negative, or the shapes do not broadcast.

    Source: :func:`torch.nn.functional.smooth_l1_loss`.
    """
    return run(_SMOOTH_L1, (input, target, size_average, reduce, reduction, beta))


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Huber: with :math:`d = x_i - y_i`, :math:`w_i d^2 / 2` where :math:`|d| \le \delta`, else
    :math:`w_i \delta (|d| - \delta / 2)`.

    Args:
        input: predictions :math:`x`, any shape.
        target: :math:`y`, of input's shape and dtype; another shape is broadcast, with a warning.
        delta: where the parabola ends, in input's unit; positive.
        weight: :math:`w`, of input's shape. ``"mean"`` still divides by the number of elements.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three, or weight is not of input's shape.
        RuntimeError: delta is not positive, or the shapes do not broadcast.

    Source: :func:`torch.nn.functional.huber_loss`.
    """
    return run(_HUBER, (input, target, reduction, delta, weight))


# ---- likelihoods and divergences ---------------------------------------------------------------------


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log likelihood of a normal distribution:
    :math:`\ell_i = \frac{1}{2} \left(\log v_i + (x_i - y_i)^2 / v_i\right)`,
    :math:`v_i = \max(\mathrm{var}_i, \varepsilon)`.

    Input, target and var may each require a gradient. Where var is below eps, its gradient is that of
    :math:`v`, as in torch.

    Args:
        input: means :math:`x`, any shape.
        target: :math:`y`, of input's shape and dtype.
        var: variances, not negative, of input's shape and dtype. The last dimension may be absent, or
            one dimension be 1. A number runs on plain PyTorch.
        full: whether the constant :math:`\log(2 \pi) / 2` is added.
        eps: :math:`\varepsilon`, not negative, in var's unit.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: an element of var is negative; names the first. A GPU does not wait for it: see
            :func:`fusedloss.check`. Also shapes that do not fit, or a reduction that is none of the
            three.

    Source: :func:`torch.nn.functional.gaussian_nll_loss`.
    """
    return run(_GAUSSIAN_NLL, (input, target, var, full, eps, reduction))


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log likelihood of a Poisson distribution: :math:`e^{x_i} - y_i x_i`, or
    :math:`x_i - y_i \log(x_i + \varepsilon)` with ``log_input=False``.

    Args:
        input: :math:`x`, the logarithm of the rate, or the rate; any shape.
        target: counts :math:`y`, of input's shape and dtype.
        log_input: which of the two input is.
        full: whether Stirling's approximation of :math:`\log y_i!` is added where :math:`y_i > 1`.
        eps: :math:`\varepsilon`, not negative, in the rate's unit.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three.
        RuntimeError: shapes that do not broadcast.

    Source: :func:`torch.nn.functional.poisson_nll_loss`.
    """
    return run(_POISSON_NLL, (input, target, log_input, full, size_average, eps, reduce, reduction))


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence of log probabilities: :math:`\ell_i = y_i (\log y_i - x_i)`, 0 where
    :math:`y_i = 0`.

    Args:
        input: log probabilities :math:`x`, any shape.
        target: probabilities :math:`y`, or their logarithms; of input's shape and dtype.
        reduction: besides the three also ``"batchmean"``, the sum divided by the size of the first
            dimension, which is the divergence as it is defined.
        log_target: whether target is the logarithm of :math:`y`.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the four.
        RuntimeError: shapes that do not broadcast.

    Warns:
        UserWarning: reduction is ``"mean"``, as in torch.

    Source: :func:`torch.nn.functional.kl_div`.
    """
    warn_of_mean(size_average, reduce, reduction)
    return run(_KL_DIV, (input, target, size_average, reduce, reduction, log_target))


# ---- margins ---------------------------------------------------------------------------------------


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Soft margin: :math:`\log(1 + e^{-x_i y_i})`. It is finite for every finite product, where torch's
    overflows.

    Args:
        input: scores :math:`x`, any shape.
        target: :math:`y`, 1 or -1, of input's shape and dtype.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three.
        RuntimeError: shapes that do not broadcast.

    Source: :func:`torch.nn.functional.soft_margin_loss`.
    """
    return run(_SOFT_MARGIN, (input, target, size_average, reduce, reduction))


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Hinge embedding: :math:`x_i` where :math:`y_i = 1`, :math:`\max(0, m - x_i)` where
    :math:`y_i = -1`.

    Args:
        input: distances :math:`x`, any shape.
        target: :math:`y`, 1 or -1, of input's shape and dtype.
        margin: :math:`m`, in input's unit.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three.
        RuntimeError: shapes that do not broadcast.

    Source: :func:`torch.nn.functional.hinge_embedding_loss`.
    """
    return run(_HINGE_EMBEDDING, (input, target, margin, size_average, reduce, reduction))


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Margin ranking: :math:`\max(0, m - y_i (a_i - b_i))`.

    Both inputs may require a gradient.

    Args:
        input1: scores :math:`a`, any shape.
        input2: scores :math:`b`, of the same shape and dtype.
        target: :math:`y`, 1 where :math:`a` belongs before :math:`b`, else -1; of the same shape and
            dtype.
        margin: :math:`m`, in the scores' unit.

    Returns:
        A 0-d tensor, or one of input1's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three.
        RuntimeError: shapes that do not fit.

    Source: :func:`torch.nn.functional.margin_ranking_loss`.
    """
    return run(_MARGIN_RANKING, (input1, input2, target, margin, size_average, reduce, reduction))


# ---- margins of rows -------------------------------------------------------------------------------
# A kernel of these is compiled at its first use, which takes seconds, and cached. Inputs of fewer than
# 2^14 elements stay with plain PyTorch.


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cosine embedding: :math:`1 - c` where :math:`y = 1`, :math:`\max(0, c - m)` where
    :math:`y = -1`; :math:`c = a \cdot b / \sqrt{(|a|^2 + \varepsilon) (|b|^2 + \varepsilon)}`,
    :math:`\varepsilon = 10^{-12}`.

    Both inputs may require a gradient. Any other target makes its row's loss 0.

    Args:
        input1: vectors :math:`a` of shape (N, D) or (D).
        input2: vectors :math:`b`, of the same shape.
        target: :math:`y`, 1 or -1, of shape (N) or ().
        margin: :math:`m`, a cosine.

    Returns:
        A 0-d tensor, or one of target's shape for ``"none"``.

    Raises:
        ValueError: reduction is none of the three.
        RuntimeError: shapes that do not fit.

    Source: :func:`torch.nn.functional.cosine_embedding_loss`.
    """
    args = input1, input2, target, margin, size_average, reduce, reduction
    return run(_COSINE_EMBEDDING, args)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Triplet margin: :math:`\max(0, m + d(a, b) - d(a, n))`,
    :math:`d(x, y) = \|x - y + \varepsilon\|_p`.

    All three inputs may require a gradient.

    Args:
        anchor: vectors :math:`a` of shape (..., D).
        positive: vectors :math:`b`, close to them, of the same shape.
        negative: vectors :math:`n`, far from them, of the same shape.
        margin: :math:`m`, positive, a distance.
        p: the norm; any but 2 runs on plain PyTorch.
        eps: :math:`\varepsilon`, in the inputs' unit.
        swap: whether :math:`d(b, n)` counts instead of :math:`d(a, n)` where it is smaller.

    Returns:
        A 0-d tensor, or one of anchor's shape without D for ``"none"``.

    Raises:
        ValueError: reduction is none of the three, or margin is not positive.
        RuntimeError: shapes that do not fit.

    Source: :func:`torch.nn.functional.triplet_margin_loss`.
    """
    args = anchor, positive, negative, margin, p, eps, swap, size_average, reduce, reduction
    return run(_TRIPLET_MARGIN, args)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Multi-class margin: :math:`\frac{w_y}{C} \sum_{c \ne y} \max(0, m - x_y + x_c)^p`.

    Args:
        input: scores :math:`x` of shape (N, C) or (C).
        target: class indices :math:`y`, int64, of shape (N) or ().
        p: 1 or 2.
        margin: :math:`m`, in the scores' unit.
        weight: :math:`w` of shape (C). ``"mean"`` divides by the number of rows all the same.

    Returns:
        A 0-d tensor, or one of target's shape for ``"none"``.

    Raises:
        RuntimeError: a class index outside [0, C), or shapes that do not fit.
        ValueError: p is neither 1 nor 2, or reduction none of the three.

    Source: :func:`torch.nn.functional.multi_margin_loss`.
    """
    return run(_MULTI_MARGIN, (input, target, p, margin, weight, size_average, reduce, reduction))


# ---- classification ------------------------------------------------------------------------------


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross-entropy of probabilities:
    :math:`\ell_i = -w_i (y_i \log x_i + (1 - y_i) \log(1 - x_i))`.

    Each logarithm is bounded below by -100, and the denominator of the gradient
    :math:`(x_i - y_i) / (x_i (1 - x_i))` by 1e-12, as in torch.

    Args:
        input: probabilities :math:`x` in [0, 1], any shape.
        target: :math:`y` in [0, 1], of input's shape and dtype.
        weight: :math:`w`, broadcast to input's shape.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        RuntimeError: an element of input or target outside [0, 1]; names the first.
        ValueError: target is not of input's shape, or reduction none of the three.

    Source: :func:`torch.nn.functional.binary_cross_entropy`.
    """
    return run(_BCE, (input, target, weight, size_average, reduce, reduction))


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy of logits, stable for any of them:
    :math:`\ell_i = -w_i (p_i y_i \log \sigma(x_i) + (1 - y_i) \log(1 - \sigma(x_i)))`.

    Args:
        input: logits :math:`x`, any shape.
        target: :math:`y`, of input's shape and dtype, normally in [0, 1].
        weight: :math:`w`, broadcast to input's shape.
        pos_weight: :math:`p`, weight of the positive answer, broadcast to input's shape.

    Returns:
        A 0-d tensor, or one of input's shape for ``"none"``.

    Raises:
        ValueError: target is not of input's shape, or reduction none of the three.

    Source: :func:`torch.nn.functional.binary_cross_entropy_with_logits`.
    """
    return run(
        _BCE_WITH_LOGITS, (input, target, weight, size_average, reduce, reduction, pos_weight)
    )


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross-entropy of logits, averaged over the classes of a row:
    :math:`\ell = -\frac{1}{C} \sum_c w_c (y_c \log \sigma(x_c) + (1 - y_c) \log(1 - \sigma(x_c)))`.

    Args:
        input: logits :math:`x` of shape (..., C).
        target: :math:`y`, of input's shape and dtype, normally 0 or 1.
        weight: :math:`w`, broadcast to input's shape; normally (C).

    Returns:
        A 0-d tensor, or one of input's shape without C for ``"none"``.

    Raises:
        ValueError: reduction is none of the three.
        RuntimeError: shapes that do not broadcast.

    Source: :func:`torch.nn.functional.multilabel_soft_margin_loss`.
    """
    return run(_MULTILABEL_SOFT_MARGIN, (input, target, weight, size_average, reduce, reduction))


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    num_items: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    shift: int = 0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    outputs: Sequence[str] = (),
) -> Any:
    r"""Cross-entropy of logits: :math:`\ell = -\sum_c w_c q_c \log \mathrm{softmax}(x)_c` of a row,
    :math:`q = (1 - \varepsilon) y + \varepsilon / C`.

    Args:
        input: logits :math:`x` of shape (C), (N, C) or (N, C, d1, ..., dk).
        target: class indices, int64, of input's shape without C; or class probabilities :math:`y`,
            of input's shape and dtype.
        weight: :math:`w` of shape (C). With class indices ``"mean"`` divides by the weights of the
            targets; with probabilities, by the number of rows.
        ignore_index: rows of this class index are left out, and their gradient is 0.
        label_smoothing: :math:`\varepsilon` in [0, 1].

    The keywords behind label_smoothing are options of language models, which torch's function lacks; see
    :func:`linear_cross_entropy`. Most of them need a kernel that is compiled at its first use.

    Returns:
        A 0-d tensor, or one of input's shape without C for ``"none"``; nan if ``"mean"`` has no row
        left. With outputs a pair: the loss, and a dict of them.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index; names it and its place.
        RuntimeError, ValueError, TypeError: shapes or options that do not fit, label_smoothing
            outside [0, 1].

    Source: :func:`torch.nn.functional.cross_entropy`.
    """
    if (
        num_items is not None
        or token_weight is not None
        or shift != 0
        or logit_scale != 1
        or softcap is not None
        or z_loss != 0
        or outputs
    ):
        if size_average is not None or reduce is not None:
            reduction = _dispatch._legacy(size_average, reduce)
        return _linear_cross_entropy.run(
            _linear_cross_entropy.Call(
                input, target, None, None, weight, reduction, ignore_index, label_smoothing, None,
                num_items, token_weight, shift, logit_scale, softcap, z_loss, outputs,
            )
        )  # fmt: skip
    return run(
        _CROSS_ENTROPY,
        (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing),
    )


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
    num_items: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    shift: int = 0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    outputs: Sequence[str] = (),
    logits_dtype: torch.dtype | None = None,
    drop_ignored: bool | None = None,
    memory: str | None = None,
) -> Any:
    r"""Cross-entropy of the logits :math:`x W^T + b` of a linear layer, which are never all in memory.

    The rows are taken in chunks: torch's matrix product makes their logits, and one kernel turns these
    into the losses and, in the same memory, into the gradient. With the options of language models the
    loss of a row is :math:`\ell(z) + \zeta \, \mathrm{lse}(z)^2`, :math:`\ell` the :func:`cross_entropy` of
    :math:`z = c \tanh(s (x W^T + b) / c)`.

    Args:
        input: hidden states :math:`x` of shape (D) or (N, D), or with class indices of any shape
            (..., D).
        linear_weight: :math:`W` of shape (C, D). A shape (C, d1, ..., dk, D) makes all logits at once, in
            plain PyTorch.
        target: class indices, int64, of input's shape without D; or class probabilities of shape (C)
            or (N, C).
        linear_bias: :math:`b` of shape (C), or None.
        weight: of the classes, shape (C); see :func:`cross_entropy`.
        ignore_index: rows of this class index are left out, and their gradient is 0. None: -100.
        label_smoothing: in [0, 1]; see :func:`cross_entropy`.
        options: a :class:`torch.nn.LinearCrossEntropyOptions` or None. ``batch_chunk_size`` is how many
            rows a chunk has. ``acc_policy="compact"`` adds up the weight's gradient in the weight's
            dtype, ``"accurate"`` in float32, and ``"auto"`` in float32 from five chunks on. The rest
            changes nothing.
        num_items: what ``"mean"`` divides by, in place of the number of rows that count: that of a whole
            batch, say, of which a call sees a part.
        token_weight: a factor of each row's loss, of target's shape, without a gradient. ``"mean"``
            divides by the sum of those that count.
        shift: how many positions ahead along target's last dimension the target of a position stands: 1
            where input predicts the next token. Positions without one do not count.
        logit_scale: :math:`s`.
        softcap: :math:`c`, positive; None: :math:`z = s (x W^T + b)`.
        z_loss: :math:`\zeta`.
        outputs: names of further results. Of each row, and of target's shape: ``"lse"``, the
            log-sum-exp of :math:`z`; ``"logprob"`` of the target; ``"entropy"`` of the softmax, in nats;
            ``"correct"``, 1 where no logit is larger than the target's; and ``"argmax"``. And ``"count"``,
            how many rows count. The first three have gradients, for which backward makes the logits
            again. Rows that do not count have 0.
        logits_dtype: the dtype of the logits; None: that of the layer.
        drop_ignored: whether rows that do not count take part in no product. None: on a CPU, since a GPU
            would have to wait for their number.
        memory: ``"low"`` makes the logits again in backward, instead of keeping the gradients for input
            and linear_weight from forward to backward.

    Returns:
        A 0-d tensor, or one of target's shape without C for ``"none"``, of input's dtype, float32 under
        autocast; nan if ``"mean"`` has no row left. With outputs a pair: the loss, and a dict of them.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index; names it and its place.
        RuntimeError, ValueError, TypeError: shapes, dtypes or options that do not fit.

    Source: :func:`torch.nn.functional.linear_cross_entropy` of PyTorch 2.13 and later.
    """
    return _linear_cross_entropy.run(
        _linear_cross_entropy.Call(
            input, target, linear_weight, linear_bias, weight, reduction, ignore_index,
            label_smoothing, options, num_items, token_weight, shift, logit_scale, softcap, z_loss,
            outputs, logits_dtype, drop_ignored, memory,
        )
    )  # fmt: skip


def log_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Multi-class log loss of probabilities: :math:`-\frac{1}{n} \sum_i \sum_c w_c y_{ic} \log
    p_{ic}`.

    Each :math:`p` is first bounded to [eps, 1], eps that of input's dtype; the gradient outside
    these bounds is 0. Rows are not normalised.

    Args:
        input: probabilities :math:`p` of shape (C), (N, C) or (N, C, d1, ..., dk).
        target: class indices, int64, of input's shape without C; or class probabilities :math:`y`,
            of input's shape and dtype.
        weight: :math:`w` of shape (C). With class indices ``"mean"`` divides by the weights of the
            targets; with probabilities, by the number of rows.
        ignore_index: rows of this class index are left out, and their gradient is 0.

    Returns:
        A 0-d tensor, or one of input's shape without C for ``"none"``.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index; names it and its place.
        ValueError, RuntimeError, TypeError: shapes, options or dtypes that do not fit.

    Source: :func:`sklearn.metrics.log_loss`. In float64 and float32 the two differ by no more than
    rounding up to :math:`p = 1 - eps`. Above it scikit-learn, which bounds :math:`p` to [eps, 1 - eps],
    gives eps, and this gives :math:`-\log p`, which is 0 at 1.
    """
    return run(_LOG_LOSS, (input, target, weight, reduction, ignore_index))


def _scriptable(function: Any) -> Callable[[], Any]:
    def prepare() -> Any:
        # Under patch() the caller may mean torch's function.
        if _dispatch._counted and function in _dispatch.TORCHS:
            return _dispatch.TORCHS[function]
        raise RuntimeError(_dispatch.NO_TORCHSCRIPT)

    return prepare


for _name in __all__:
    _function = globals()[_name]
    # torch.jit.script calls this before it compiles a function.
    _function.__prepare_scriptable__ = _scriptable(_function)
    _dispatch.PUBLIC[_name] = _function
    if hasattr(torch.nn.functional, _name):
        _dispatch.TORCHS[_function] = getattr(torch.nn.functional, _name)
        _dispatch.OURS[_dispatch.TORCHS[_function]] = _function
