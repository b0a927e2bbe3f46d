"""Any shape, layout, dtype, option and upstream gradient, drawn at random, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedloss.functional as FL
from cases import DTYPES, FAMILIES, REDUCTIONS, Sample, at_shape
from helpers import assert_close_to_truth, leaf, sample_truth, threads
from test_layouts import LAYOUTS, POINTWISE

pytestmark = pytest.mark.usefixtures("compiled")

LAYOUT = st.sampled_from(["contiguous", *LAYOUTS, "byte offset"])
UPSTREAM = st.sampled_from([1.0, 0.3, -2.0, 1e-3, 60.0, 0.0])
SEED = st.integers(0, 2**16)


def laid(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout not in LAYOUTS or tensor.dim() == 0 or not tensor.numel():
        return tensor
    return LAYOUTS[layout](tensor)


def check(loss: str, sample: Sample, reduction: str, upstream: float, count: int) -> None:
    input = leaf(sample.input)
    with threads(count):
        value = getattr(FL, loss)(input, sample.target, reduction=reduction, **sample.options)
        rounded = torch.full_like(value, upstream)
        rounded = rounded * torch.linspace(0.5, 2, max(value.numel(), 1)).to(value.dtype)[
            : value.numel()
        ].view_as(value)
        rounded = rounded.detach()
        (grad,) = torch.autograd.grad(value, input, rounded)
    expected = sample_truth(loss, sample, reduction, rounded)
    assert_close_to_truth(value.detach(), expected.value, expected.value_scale, "value")
    assert_close_to_truth(grad, expected.grad, expected.grad_scale, "gradient")


@settings(max_examples=150)
@given(
    family=st.sampled_from(
        [f for f in FAMILIES if FAMILIES[f][0].loss in POINTWISE and "poles" not in f]
    ),
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(
        lambda shape: torch.Size(shape).numel() < 50_000
    ),
    dtype=st.sampled_from(sorted(DTYPES)),
    reduction=st.sampled_from(REDUCTIONS),
    layouts=st.tuples(LAYOUT, LAYOUT, LAYOUT),
    upstream=UPSTREAM,
    seed=SEED,
    count=st.integers(1, 3),
)
def test_pointwise(
    family: str,
    shape: list[int],
    dtype: str,
    reduction: str,
    layouts: tuple[str, str, str],
    upstream: float,
    seed: int,
    count: int,
) -> None:
    case = at_shape(family, tuple(shape))
    sample = case.sample(DTYPES[dtype], seed)
    options: dict[str, Any] = {
        key: laid(value, layouts[2])
        if isinstance(value, torch.Tensor) and value.dim() == len(shape)
        else value
        for key, value in sample.options.items()
    }
    sample = Sample(laid(sample.input, layouts[0]), laid(sample.target, layouts[1]), options)
    check(case.loss, sample, reduction, upstream, count)


@settings(max_examples=150)
@given(
    family=st.sampled_from([f for f in FAMILIES if f.startswith("cross_entropy")]),
    rows=st.integers(1, 40),
    classes=st.integers(2, 300),
    inner=st.lists(st.integers(1, 9), max_size=2),
    dtype=st.sampled_from(sorted(DTYPES)),
    reduction=st.sampled_from(REDUCTIONS),
    layouts=st.tuples(LAYOUT, LAYOUT),
    smoothing=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    upstream=UPSTREAM,
    seed=SEED,
    count=st.integers(1, 3),
)
def test_cross_entropy(
    family: str,
    rows: int,
    classes: int,
    inner: list[int],
    dtype: str,
    reduction: str,
    layouts: tuple[str, str],
    smoothing: float,
    spread: float,
    upstream: float,
    seed: int,
    count: int,
) -> None:
    case = at_shape(family, (rows, classes, *inner))
    sample = case.sample(DTYPES[dtype], seed)
    sample = Sample(
        laid((sample.input.double() * spread).to(DTYPES[dtype]), layouts[0]),
        laid(sample.target, layouts[1]),
        {**sample.options, "label_smoothing": smoothing},
    )
    check("cross_entropy", sample, reduction, upstream, count)


@given(
    family=st.sampled_from([f for f in FAMILIES if f.startswith("log_loss")]),
    rows=st.integers(1, 40),
    classes=st.integers(2, 300),
    dtype=st.sampled_from(sorted(DTYPES)),
    reduction=st.sampled_from(REDUCTIONS),
    layouts=st.tuples(LAYOUT, LAYOUT),
    upstream=UPSTREAM,
    seed=SEED,
)
def test_log_loss(
    family: str,
    rows: int,
    classes: int,
    dtype: str,
    reduction: str,
    layouts: tuple[str, str],
    upstream: float,
    seed: int,
) -> None:
    case = at_shape(family, (rows, classes))
    sample = case.sample(DTYPES[dtype], seed)
    sample = Sample(laid(sample.input, layouts[0]), laid(sample.target, layouts[1]), sample.options)
    check("log_loss", sample, reduction, upstream, 1)


@given(
    loss=st.sampled_from(["mse_loss", "binary_cross_entropy_with_logits", "cross_entropy"]),
    steps=st.lists(
        st.tuples(st.sampled_from([1.0, 0.5, 3.0, -1.0, 0.0, -0.0]), st.integers(1, 3)),
        min_size=1,
        max_size=12,
    ),
)
def test_any_sequence_of_steps(loss: str, steps: list[tuple[float, int]]) -> None:
    """Forward and backward, once or more, in any sequence of upstream gradients: one answer."""
    sample = at_shape(loss, (3, 19)).sample(torch.float32)
    answers: dict[str, torch.Tensor] = {}
    for upstream, backwards in steps:
        input = leaf(sample.input)
        value = getattr(FL, loss)(input, sample.target)
        for _ in range(backwards):
            (grad,) = torch.autograd.grad(value, input, torch.tensor(upstream), retain_graph=True)
            bits = grad.view(torch.int32).clone()
            assert torch.equal(answers.setdefault(str(upstream), bits), bits)
            grad.fill_(float("nan"))
