"""Calls, tolerances and comparisons that the tests share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import formulas
import fusedloss
import fusedloss.functional as FL
from cases import DEVICE, Case, Sample

Loss = Callable[..., Tensor]
T = TypeVar("T")

# The module of each loss of the table in cases.py.
MODULES = {
    "mse_loss": fusedloss.MSELoss,
    "l1_loss": fusedloss.L1Loss,
    "smooth_l1_loss": fusedloss.SmoothL1Loss,
    "huber_loss": fusedloss.HuberLoss,
    "binary_cross_entropy": fusedloss.BCELoss,
    "binary_cross_entropy_with_logits": fusedloss.BCEWithLogitsLoss,
    "soft_margin_loss": fusedloss.SoftMarginLoss,
    "multilabel_soft_margin_loss": fusedloss.MultiLabelSoftMarginLoss,
    "hinge_embedding_loss": fusedloss.HingeEmbeddingLoss,
    "margin_ranking_loss": fusedloss.MarginRankingLoss,
    "kl_div": fusedloss.KLDivLoss,
    "poisson_nll_loss": fusedloss.PoissonNLLLoss,
    "gaussian_nll_loss": fusedloss.GaussianNLLLoss,
    "cross_entropy": fusedloss.CrossEntropyLoss,
    "log_loss": fusedloss.LogLoss,
    "cosine_embedding_loss": fusedloss.CosineEmbeddingLoss,
    "triplet_margin_loss": fusedloss.TripletMarginLoss,
    "multi_margin_loss": fusedloss.MultiMarginLoss,
}

ROWS = ("cosine_embedding_loss", "triplet_margin_loss", "multi_margin_loss")

# The CUDA operators stand for the CPU's, over the emulator: see tests/cuda_emulator/extension.py.
EMULATED = os.environ.get("FUSEDLOSS_EMULATED") == "1"
# The backend of the tests of fused kernels. With "triton" only the tests with the fixtures `fused`
# and `backend` run, on Triton's kernels; without a GPU, in its interpreter.
FUSED = os.environ.get("FUSEDLOSS_TEST_BACKEND", "compiled")
INTERPRETED = FUSED == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
NAMESPACE = "fusedloss_triton" if FUSED == "triton" else "fusedloss"  # of the backend's operators
# A CPU stands for a GPU: results of its kernels are compared with the truth, not with torch's.
FOR_A_GPU = EMULATED or INTERPRETED
host_sees_errors = pytest.mark.skipif(
    FOR_A_GPU or DEVICE == "cuda", reason="the host hears of them later: test_faults.py"
)

# The dtype of the arithmetic.
COMPUTE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

# Tolerance in eps of the compute dtype, relative to the terms of a result. The longest formula
# chains some ten operations of half an eps each, and an exponential or logarithm of one ulp; a sum
# over a chunk in vector lanes adds a few.
ROUNDINGS = 8


def torch_log_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Log loss with torch's functions, since torch has no loss of that name."""
    eps = torch.finfo(input.dtype).eps
    # The bounds count as inside; the gradient of clamp() there differs between releases.
    inside = (input >= eps) & (input <= 1)
    log_p = torch.where(inside, input, input.detach().clamp(eps, 1)).log()
    if not target.is_floating_point():
        return F.nll_loss(log_p, target, weight, reduction=reduction, ignore_index=ignore_index)
    terms = -log_p * target if weight is None else -log_p * target * weight
    rows = terms.sum(-1)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / rows.numel()


def torch_l1_loss(*args: Any, **options: Any) -> Tensor:
    """F.l1_loss without any `with torch.device(...)`, under which it ignores its weight."""
    with torch._C.DisableTorchFunction():
        return F.l1_loss(*args, **options)


def torch_loss(loss: str) -> Loss:
    """torch's function for the loss."""
    own = {"log_loss": torch_log_loss, "l1_loss": torch_l1_loss}
    return own.get(loss) or getattr(F, loss)


def operators() -> Any:
    """torch.ops.* of the backend under test, which its first use defines."""
    return getattr(torch.ops, NAMESPACE)


def leaf(tensor: Tensor) -> Tensor:
    """A new leaf that requires a gradient, in the same layout."""
    return tensor.detach().requires_grad_()


def result_shape(loss: str, sample: Sample, reduction: str) -> torch.Size:
    """Shape of the loss."""
    if reduction != "none":
        return torch.Size()
    if loss in ("log_loss", "multilabel_soft_margin_loss", *ROWS):
        return sample.input.shape[:-1]
    if loss == "cross_entropy":
        unbatched = sample.input.dim() == 1
        return torch.Size() if unbatched else sample.input.shape[:1] + sample.input.shape[2:]
    return sample.input.shape


def draw_upstream(shape: torch.Size, dtype: torch.dtype, seed: int = 7) -> Tensor:
    """An upstream gradient of both signs, never 1, never all equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    return (sign * (0.3 + uniform)).to(DEVICE, dtype)


def value_and_grad(
    function: Loss, sample: Sample, reduction: str, upstream: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """The loss and the input's gradient for an upstream gradient (1 where none is given)."""
    input = leaf(sample.input)
    value = function(input, sample.target, reduction=reduction, **sample.options)
    if upstream is None:
        upstream = torch.ones_like(value)
    elif not isinstance(upstream, Tensor):
        upstream = torch.full_like(value, upstream)
    (grad,) = torch.autograd.grad(value, input, upstream)
    return value.detach(), grad


@lru_cache(maxsize=64)
def drawn(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Sample, formulas.Elements]:
    """A sample with its unreduced truth, cached while a test loops over the reductions."""
    sample = case.sample(dtype, seed)
    return sample, formulas.elements(case.loss, sample.input, sample.target, sample.options)


def sample_truth(loss: str, sample: Sample, reduction: str, upstream: Any = 1.0) -> formulas.Truth:
    return formulas.truth(loss, sample.input, sample.target, sample.options, reduction, upstream)


def assert_close_to_truth(result: Tensor, truth: Tensor, scale: Tensor, what: str) -> None:
    """Each element is within the roundings of its terms, and so is the whole in norm.

    The tolerance is one rounding to the result's dtype (half an eps if the arithmetic is wider),
    plus ``ROUNDINGS`` eps of the arithmetic's dtype relative to the scale of the terms. Below the
    smallest normal number only the absolute spacing counts. Results that overflow must be infinite,
    and nan must be nan.
    """
    assert result.shape == truth.shape, f"{what}: shape {result.shape}, not {truth.shape}"
    info, compute = torch.finfo(result.dtype), torch.finfo(COMPUTE[result.dtype])
    once = 0.0 if info.eps == compute.eps else info.eps / 2
    many = ROUNDINGS * compute.eps
    result = result.double()
    # Within a rounding of the overflow both are right.
    edge = (truth.abs() / info.max - 1).abs() < info.eps
    expected = torch.where(truth.abs() > info.max, truth.sign() * torch.inf, truth)
    if not bool((result.isfinite() & expected.isfinite()).all()):
        finite = result.isfinite() & expected.isfinite()
        same = (result == expected) | (result.isnan() & expected.isnan()) | edge
        wrong = ~finite & ~same
        if bool(wrong.any()):
            place = tuple(torch.nonzero(wrong)[0].tolist())
            raise AssertionError(
                f"{what}: {result[place].item()} at {list(place)}, not {truth[place].item()}"
            )
        result, expected, scale = result[finite], expected[finite], scale[finite]
    if not result.numel():
        return
    error = (result - expected).abs()
    # A kernel may flush the arithmetic's subnormal numbers to 0, before weight and upstream
    # gradient (here below 2^8) scale them.
    spacing = info.smallest_normal * info.eps + 2**8 * compute.smallest_normal
    allowed = (once * expected.abs() + many * scale) * (1 + info.eps) + spacing
    excess = error - allowed
    if bool((excess > 0).any()):
        worst = excess.argmax()
        raise AssertionError(
            f"{what}: off {expected.flatten()[worst]:.9g} by {error.flatten()[worst]:.3g}, "
            f"allowed {allowed.flatten()[worst]:.3g}"
        )
    norm = torch.linalg.vector_norm
    allowed_norm = once * norm(expected) + many * norm(scale) + spacing * error.numel() ** 0.5
    assert norm(error) <= allowed_norm * (1 + info.eps), (
        f"{what}: norm of the error {norm(error):.3g}, allowed {allowed_norm:.3g}"
    )


def assert_no_worse(result: Tensor, eager: Tensor, truth: Tensor, what: str) -> None:
    """The error, in norm and at its largest, is at most torch's, or that of a few roundings.

    Arithmetic in a wider dtype is rounded once. In the dtype itself, correct algorithms round at
    different places: about four times, once for all elements together (the factor of upstream
    gradient and mean), and about as often again for a sum in vector lanes. The norm of many
    elements tells the better one, to a tenth. The largest error is a matter of chance, so 1.5 times
    passes.
    """
    if not truth.numel():
        return
    info = torch.finfo(result.dtype)
    comparable = truth.isfinite() & (truth.abs() < info.max)
    truth = truth.where(comparable, 0.0)
    ours, theirs = (
        # Where torch is nan or infinite, nothing is worse.
        (tensor.double().where(comparable, 0.0) - truth).abs().nan_to_num(torch.inf, torch.inf)
        for tensor in (result, eager)
    )
    # The error of the wider arithmetic shows where a result lies between two numbers.
    rounding = info.eps / 2 * (1 + 2**-8)
    spacing = info.smallest_normal * info.eps
    wider = COMPUTE[result.dtype] is not result.dtype
    if FOR_A_GPU and not wider:
        return  # a GPU's kernels are compared with torch's on a GPU
    if wider:
        checks = [(torch.linalg.vector_norm, "error in norm", 1.0, 1), (inf_norm, "error", 1.0, 1)]
    else:
        checks = [(inf_norm, "largest error", 1.5, 4 if truth.dim() else 8)]
        if truth.count_nonzero() >= 1000:
            checks.append((torch.linalg.vector_norm, "error in norm", 1.1, 2))
    for norm, kind, factor, roundings in checks:
        floor = roundings * rounding * norm(truth) + spacing * truth.numel() ** 0.5
        allowed = max(factor * norm(theirs), floor)
        assert norm(ours) <= allowed, f"{what}: {kind} {norm(ours):.3g}, torch's {norm(theirs):.3g}"


def assert_near(result: Tensor, truth: Tensor, what: str) -> None:
    """Off by a few roundings of the terms, about as large as truth's largest, and of the result."""
    assert result.shape == truth.shape, f"{what}: shape {result.shape}, not {truth.shape}"
    info, compute = torch.finfo(result.dtype), torch.finfo(COMPUTE[result.dtype])
    many = 64 if result.dtype is torch.float64 else 16
    allowed = many * compute.eps * truth.abs().max() + truth.abs() * info.eps / 2
    excess = (result.double() - truth).abs() - allowed - info.smallest_normal
    excess = excess.where(result != truth.to(result.dtype), 0.0)  # both infinite
    assert excess.max() <= 0, f"{what}: {excess.max():.3g} beyond {allowed.max():.3g}"


def affordable(things: Sequence[T], most: int) -> Sequence[T]:
    """All cases; in Triton's interpreter, at 10 ms per kernel, some of them."""
    return things[:: -(-len(things) // most)] if INTERPRETED else things


def inf_norm(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal bit for bit: -0.0 is not 0.0, and any nan equals any other."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not first.is_floating_point():
        return torch.equal(first, second)
    as_integer = _AS_INTEGER[first.element_size()]
    equal = first.contiguous().view(as_integer) == second.contiguous().view(as_integer)
    return bool((equal | (first.isnan() & second.isnan()).reshape(equal.shape)).all())


def assert_same_bits(first: Tensor, second: Tensor, what: str) -> None:
    assert same_bits(first, second), f"{what}: differs in its bits"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds nan (integers: the largest), from at::empty in C++ as well."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None, list[str]]:
    """Result, exception and warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, error = call(), None
        except Exception as exception:  # noqa: BLE001 - the exception is what is compared
            result, error = None, exception
    return result, error, [f"{w.category.__name__}: {w.message}" for w in caught]


def compare_with_torch(
    loss: str,
    input: Tensor,
    target: Tensor,
    /,
    *,
    input_wants: bool = True,
    target_wants: bool = False,
    function: Loss | None = None,
    **options: Any,
) -> None:
    """Same result, gradients and warnings as torch, or the same error.

    The result and the gradients have torch's dtype and shape. Their values may differ by torch's
    own error, which is large in reduced precision: half the digits are compared.
    """
    wants = [value for value in options.values() if isinstance(value, Tensor)]
    wants = [value for value in wants if value.requires_grad]

    def run(function: Loss) -> tuple[Tensor, list[Tensor | None]]:
        # Detached, not cloned: the layout is part of the call.
        x, y = input.detach(), target.detach()
        x.requires_grad_(input_wants and x.is_floating_point())
        y.requires_grad_(target_wants and y.is_floating_point())
        value = function(x, y, **options)
        leaves = [t for t in (x, y, *wants) if t.requires_grad]
        if not leaves:
            assert not value.requires_grad
            return value, []
        upstream = draw_upstream(value.shape, value.dtype)
        return value.detach(), list(torch.autograd.grad(value, leaves, upstream, allow_unused=True))

    ours, our_error, our_warnings = outcome(lambda: run(function or getattr(FL, loss)))
    theirs, their_error, their_warnings = outcome(lambda: run(torch_loss(loss)))
    assert_same_error(our_error, their_error)
    assert our_warnings == their_warnings
    if ours is None:
        return
    results = zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True)
    for i, (mine, expected) in enumerate(results):
        what = "value" if i == 0 else f"gradient {i}"
        if expected is None:
            assert mine is None, what
            continue
        assert mine is not None, what
        assert mine.dtype == expected.dtype, f"{what}: {mine.dtype}, torch's {expected.dtype}"
        assert mine.shape == expected.shape, f"{what}: {mine.shape}, torch's {expected.shape}"
        if not expected.numel():
            continue
        tensors = [t for t in (input, target, *options.values()) if isinstance(t, Tensor)]
        floats = [t.dtype for t in tensors if t.is_floating_point()]
        eps = max(torch.finfo(dtype).eps for dtype in (*floats, torch.float64))
        finite = expected[expected.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        torch.testing.assert_close(
            mine,
            expected,
            rtol=eps**0.5 if eps > 1e-4 else 64 * eps,
            atol=(4 if eps > 1e-4 else 64) * eps * largest,
            equal_nan=True,
            msg=lambda text, what=what: f"{what}: {text}",
        )


def assert_same_error(ours: BaseException | None, theirs: BaseException | None) -> None:
    """Same type; our message contains torch's."""
    if theirs is None:
        if ours is not None:
            raise AssertionError(f"torch accepts it; {type(ours).__name__}: {ours}") from ours
        return
    assert ours is not None, f"accepted; torch raises {type(theirs).__name__}: {theirs}"
    assert type(ours) is type(theirs), f"{ours!r}, torch's {theirs!r}"
    assert first_line(theirs) in str(ours), f"{ours!r} does not say {theirs!r}"


def first_line(error: BaseException) -> str:
    """The message, without the C++ stack that some builds append."""
    return str(error).split("\nException raised from")[0].strip().splitlines()[0]
