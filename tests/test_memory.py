"""New memory, the caller's memory, and the same bits every time."""

from __future__ import annotations

import pytest
import torch

import fusedloss.functional as FL
from cases import DTYPES, FAMILIES, REDUCTIONS, at_shape, dtypes
from helpers import (
    INTERPRETED,
    ROWS,
    assert_close_to_truth,
    assert_same_bits,
    draw_upstream,
    poisoned_memory,
    result_shape,
    same_bits,
    sample_truth,
    threads,
    value_and_grad,
)

BASES = [family for family in FAMILIES if "weight" not in family and "clamped" not in family]
LONG = ((3 * 2**17 + 5,), (3, 7, 129, 65))
LONG_CLASSES = ((1031, 97), (3, 70_001), (3, 7, 65, 33))
if INTERPRETED:  # more than one program, and rows of more than one tile
    LONG, LONG_CLASSES = ((2**13 + 5,), (3, 7, 9, 5)), ((131, 97), (2, 9_001), (3, 7, 9, 5))


def shapes(loss: str) -> tuple[tuple[int, ...], ...]:
    if loss == "cross_entropy":
        return LONG_CLASSES
    return LONG_CLASSES[:2] if loss in ("log_loss", *ROWS) else LONG


def test_poison_reaches_fresh_memory() -> None:
    """Otherwise the test below would prove nothing."""
    with poisoned_memory():
        assert torch.empty(9).isnan().all()
        assert torch.empty_like(torch.zeros(3, 4).t()).isnan().all()
        assert torch.empty(9, dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_memory_is_written_in_full(family: str, dtype: str, backend: str) -> None:
    for case in FAMILIES[family]:
        if torch.Size(case.shape).numel() > 20_000:
            continue
        sample = case.sample(DTYPES[dtype])
        for reduction in REDUCTIONS:
            upstream = draw_upstream(result_shape(case.loss, sample, reduction), DTYPES[dtype])
            clean = value_and_grad(getattr(FL, case.loss), sample, reduction, upstream)
            with poisoned_memory():
                poisoned = value_and_grad(getattr(FL, case.loss), sample, reduction, upstream)
            assert_same_bits(poisoned[0], clean[0], f"{case.name} {reduction} value")
            assert_same_bits(poisoned[1], clean[1], f"{case.name} {reduction} gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_callers_tensors_are_never_written(family: str, dtype: str, backend: str) -> None:
    case = at_shape(family, (9, 67))
    for reduction in REDUCTIONS:
        sample = case.sample(DTYPES[dtype])
        upstream = draw_upstream(result_shape(case.loss, sample, reduction), DTYPES[dtype])
        tensors = [sample.input, sample.target, upstream]
        tensors += [v for v in sample.options.values() if isinstance(v, torch.Tensor)]
        before = [(tensor.clone(), tensor._version) for tensor in tensors]
        value_and_grad(getattr(FL, case.loss), sample, reduction, upstream)
        with torch.no_grad():
            getattr(FL, case.loss)(
                sample.input, sample.target, reduction=reduction, **sample.options
            )
        for tensor, (copy, version) in zip(tensors, before, strict=True):
            assert same_bits(tensor, copy) and tensor._version == version, reduction


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", BASES)
def test_same_bits_again_and_on_any_number_of_threads(
    family: str, dtype: str, reduction: str, fused: str
) -> None:
    for shape in shapes(FAMILIES[family][0].loss):
        case = at_shape(family, shape)
        sample = case.sample(DTYPES[dtype])
        upstream = draw_upstream(result_shape(case.loss, sample, reduction), DTYPES[dtype])
        results = []
        for count in (1, 1, 2, 3):
            with threads(count):
                results.append(value_and_grad(getattr(FL, case.loss), sample, reduction, upstream))
        first, *rest = results
        for other in rest:
            assert_same_bits(other[0], first[0], f"{case.name} value")
            assert_same_bits(other[1], first[1], f"{case.name} gradient")


@pytest.mark.parametrize("family", BASES)
def test_forward_only_has_the_value_of_the_training_step(family: str, fused: str) -> None:
    for shape in shapes(FAMILIES[family][0].loss):
        case = at_shape(family, shape)
        for dtype in dtypes(family).values():
            sample = case.sample(dtype)
            for reduction in REDUCTIONS:
                value, _ = value_and_grad(getattr(FL, case.loss), sample, reduction)
                with torch.no_grad():
                    alone = getattr(FL, case.loss)(
                        sample.input, sample.target, reduction=reduction, **sample.options
                    )
                assert_same_bits(alone, value, f"{case.name} {dtype} {reduction}")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mse_loss", "binary_cross_entropy_with_logits"])
def test_many_elements(family: str, compiled: str) -> None:
    """Many chunks of work with a tail, above the size from which new memory gets huge pages."""
    case = at_shape(family, (2**22 + 13,))
    sample = case.sample(torch.float32)
    upstream = draw_upstream(torch.Size(), torch.float32)
    value, grad = value_and_grad(getattr(FL, case.loss), sample, "mean", upstream)
    expected = sample_truth(case.loss, sample, "mean", upstream)
    assert_close_to_truth(value, expected.value, expected.value_scale, "value")
    assert_close_to_truth(grad, expected.grad, expected.grad_scale, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 32_003), (9, 128_256), (3, 21, 200, 199)])
def test_many_logits(shape: tuple[int, ...], compiled: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sample = at_shape("cross_entropy", shape).sample(dtype)
        upstream = draw_upstream(torch.Size(), dtype)
        value, grad = value_and_grad(FL.cross_entropy, sample, "mean", upstream)
        expected = sample_truth("cross_entropy", sample, "mean", upstream)
        assert_close_to_truth(value, expected.value, expected.value_scale, f"{dtype} value")
        assert_close_to_truth(grad, expected.grad, expected.grad_scale, f"{dtype} gradient")
