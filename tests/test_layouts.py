"""Unusual strides, offsets, dtypes and shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
import fusedloss.functional as FL
from cases import BASIC, DEVICE, DTYPES, Sample, at_shape
from helpers import (
    FOR_A_GPU,
    assert_close_to_truth,
    assert_near,
    compare_with_torch,
    draw_upstream,
    leaf,
    result_shape,
    sample_truth,
    value_and_grad,
)

Layout = Callable[[Tensor], Tensor]
POINTWISE = [loss for loss in BASIC if loss not in ("cross_entropy", "log_loss")]


def embedded(tensor: Tensor, before: int, after: int, step: int, dim: int) -> Tensor:
    """The same numbers as a slice of a larger tensor, whose other elements are nan."""
    shape = list(tensor.shape)
    shape[dim] = before + step * shape[dim] + after
    fill = float("nan") if tensor.is_floating_point() else -(2**40)
    larger = torch.full(shape, fill, dtype=tensor.dtype)
    view = larger.narrow(dim, before, step * tensor.shape[dim])
    view = view[(slice(None),) * (dim % tensor.dim()) + (slice(None, None, step),)]
    view.copy_(tensor)
    return view


def reversed_order(tensor: Tensor) -> Tensor:
    dims = tuple(reversed(range(tensor.dim())))
    return tensor.permute(dims).contiguous().permute(dims)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def byte_offset(tensor: Tensor) -> Tensor:
    """Starts in the middle of a vector register, aligned to its element only."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.copy_(tensor.reshape(-1)).view(tensor.shape)


def unaligned(tensor: Tensor) -> Tensor:
    """Not even aligned to its own element, as read from a packed buffer."""
    size = tensor.element_size()
    buffer = bytearray(1 + size * tensor.numel())
    result = torch.frombuffer(buffer, dtype=tensor.dtype, offset=1, count=tensor.numel())
    result.copy_(tensor.reshape(-1))
    return result.view(tensor.shape)


LAYOUTS: dict[str, Layout] = {
    "transposed": transposed,
    "every second row": lambda t: embedded(t, 0, 0, 2, 0),
    "every second column": lambda t: embedded(t, 1, 0, 2, -1),
    "inner columns": lambda t: embedded(t, 1, 2, 1, -1),
    "all but the last column": lambda t: embedded(t, 0, 1, 1, -1),
    "inner rows": lambda t: embedded(t, 3, 1, 1, 0),
    "offset": byte_offset,
}
LAYOUTS_4D: dict[str, Layout] = {
    **LAYOUTS,
    "channels last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else transposed(t)
    ),
    "permuted": reversed_order,
    "inner channels": lambda t: embedded(t, 1, 1, 1, 1),
}


def check(loss: str, sample: Sample, what: str, backend: str) -> None:
    for reduction in ("none", "mean"):
        if backend == "reference":  # it is torch's result, and as right
            compare_with_torch(
                loss, sample.input, sample.target, reduction=reduction, **sample.options
            )
            continue
        upstream = draw_upstream(result_shape(loss, sample, reduction), sample.input.dtype)
        value, grad = value_and_grad(getattr(FL, loss), sample, reduction, upstream)
        expected = sample_truth(loss, sample, reduction, upstream)
        assert_close_to_truth(value, expected.value, expected.value_scale, f"{what} value")
        assert_close_to_truth(grad, expected.grad, expected.grad_scale, f"{what} gradient")


def laid_out(sample: Sample, layout: Layout, which: str) -> Sample:
    change: Layout = layout if "options" in which else lambda t: t
    return Sample(
        input=layout(sample.input) if "input" in which else sample.input,
        target=layout(sample.target) if "target" in which else sample.target,
        options={k: change(v) if isinstance(v, Tensor) else v for k, v in sample.options.items()},
    )


WHICH = ("input", "target", "input and target", "input, target and options")
WEIGHTED = {
    "mse_loss": "mse_loss-weight",
    "l1_loss": "l1_loss-weight",
    "huber_loss": "huber_loss-delta2-weight",
    "binary_cross_entropy": "binary_cross_entropy-weight",
    "binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits-weight-pos_weight",
    "cross_entropy": "cross_entropy-probabilities-weight",
    "log_loss": "log_loss-probabilities-weight",
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", [(6, 35), pytest.param((300, 257), marks=pytest.mark.slow), (2, 5, 6, 7)], ids=str
)
@pytest.mark.parametrize("loss", [loss for loss in BASIC if loss != "log_loss"])
def test_layouts(loss: str, shape: tuple[int, ...], dtype: str, backend: str) -> None:
    family = WEIGHTED.get(loss, loss)
    sample = at_shape(family, shape).sample(DTYPES[dtype])
    layouts = LAYOUTS_4D if len(shape) == 4 else LAYOUTS
    for (name, layout), which in itertools.product(layouts.items(), WHICH):
        if loss == "cross_entropy" and "options" in which:
            continue  # vectors have no such layouts; see test_class_weight_layouts
        check(loss, laid_out(sample, layout, which), f"{name} {which}", backend)


@pytest.mark.parametrize("loss", ["cross_entropy", "log_loss"])
def test_rows(loss: str, backend: str) -> None:
    for family, dtype in itertools.product((loss, f"{loss}-probabilities"), DTYPES.values()):
        sample = at_shape(family, (6, 35)).sample(dtype)
        for name, layout in LAYOUTS.items():
            check(loss, Sample(layout(sample.input), sample.target, {}), f"{name} input", backend)
            target = sample.target
            if target.dim() == 1:
                # Labels as a column of a matrix, with another stride.
                for column in (torch.stack([target, target * 0 - 9], 1)[:, 0], byte_offset(target)):
                    check(loss, Sample(sample.input, column, {}), "column of labels", backend)
            else:
                check(loss, Sample(sample.input, layout(target), {}), f"{name} target", backend)


@pytest.mark.parametrize("loss", ["cross_entropy", "log_loss"])
def test_class_weight_layouts(loss: str, backend: str) -> None:
    sample = at_shape(f"{loss}-weight", (6, 35)).sample(torch.float32)
    weight = sample.options["weight"]
    for other in (
        torch.stack([weight, weight * float("nan")], 1)[:, 0],
        byte_offset(weight),
        weight[:1].expand(35),
    ):
        check(loss, Sample(sample.input, sample.target, {"weight": other}), "class weight", backend)


def test_shifted_language_model(backend: str) -> None:
    """logits[:, :-1] against labels[:, 1:], as (N, C) and as (B, C, T)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 37, generator=generator, device="cpu").to(DEVICE)
    labels = torch.randint(37, (3, 9), generator=generator, device="cpu").to(DEVICE)
    labels[0, 3] = -100
    flat = Sample(logits[:, :-1].reshape(-1, 37), labels[:, 1:].reshape(-1), {})
    check("cross_entropy", flat, "flattened", backend)
    check("cross_entropy", Sample(logits[0, :-1], labels[0, 1:], {}), "one sequence", backend)
    check(
        "cross_entropy",
        Sample(logits[:, :-1].transpose(1, 2), labels[:, 1:], {}),
        "transposed",
        backend,
    )
    check("cross_entropy", Sample(logits.permute(0, 2, 1), labels, {}), "permuted", backend)
    check("cross_entropy", Sample(logits[:, 2], labels.t()[2], {}), "one column", backend)
    check(
        "cross_entropy",
        Sample(logits[:, ::2, 1:][:, 0], labels[:, ::2][:, 0] % 36, {}),
        "steps",
        backend,
    )


@pytest.mark.parametrize("layout", LAYOUTS_4D)
def test_segmentation(layout: str, backend: str) -> None:
    """(N, C, H, W) logits and (N, H, W) labels, each in every layout."""
    sample = at_shape("cross_entropy-weight-smoothing-ignored", (3, 21, 9, 13)).sample(
        torch.float32
    )
    change = LAYOUTS_4D[layout]
    for input, target in (
        (change(sample.input), sample.target),
        (sample.input, transposed(sample.target)),
        (change(sample.input), embedded(sample.target, 1, 1, 2, -1)),
        (sample.input, sample.target[:, :1, :1].expand(3, 9, 13)),
    ):
        check("cross_entropy", Sample(input, target, sample.options), layout, backend)


@pytest.mark.skipif(FOR_A_GPU, reason="for the caches of a CPU")
@pytest.mark.parametrize("rest", ((224, 224), (223, 225)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_segmentation_beyond_the_caches(
    rest: tuple[int, int], dtype: torch.dtype, compiled: str
) -> None:
    """A gradient of more than 16 MiB is written with streaming stores if its rows are aligned."""
    generator = torch.Generator(DEVICE).manual_seed(5)
    x = torch.randn((4, 21, *rest), dtype=dtype, generator=generator)
    t = torch.randint(21, (4, *rest), generator=generator)
    t[torch.rand(t.shape, generator=generator) < 0.1] = -100
    for options, reduction in (({}, "mean"), ({"label_smoothing": 0.1}, "sum")):
        _, gradient = value_and_grad(FL.cross_entropy, Sample(x, t, options), reduction)
        doubles = Sample(x.double(), t, options)
        _, truth = value_and_grad(F.cross_entropy, doubles, reduction)
        assert_near(gradient, truth, f"gradient, {options}")
        assert (gradient.movedim(1, -1)[t == -100] == 0).all()


@pytest.mark.parametrize("loss", BASIC)
def test_expanded(loss: str, backend: str) -> None:
    """Stride 0, along rows, along columns and in full: input, target and both."""
    sample = at_shape(loss, (6, 35)).sample(torch.float32)
    expansions: dict[str, Layout] = {
        "rows": lambda t: t[:1].expand(t.shape),
        "columns": lambda t: t[..., :1].expand(t.shape),
        "everything": lambda t: t.flatten()[0].expand(t.shape),
    }
    for (name, expand), which in itertools.product(expansions.items(), WHICH[:3]):
        check(loss, laid_out(sample, expand, which), f"{name} {which}", backend)


def test_overlapping(backend: str) -> None:
    """A sliding window: one element of memory appears in many places."""
    series = at_shape("mse_loss", (60,)).sample(torch.float32).input
    windows = series.unfold(0, 9, 1)
    check("mse_loss", Sample(windows, windows.flip(0), {}), "windows", backend)
    check("cross_entropy", Sample(windows, torch.arange(52) % 9, {}), "windows", backend)
    # Their gradients add up in the series.
    results = []
    for function in (FL.mse_loss, torch.nn.functional.mse_loss):
        source = series.clone().requires_grad_()
        function(source.unfold(0, 9, 1), windows.flip(0)).backward()
        results.append(source.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", BASIC)
def test_memory_on_no_boundary(loss: str, dtype: str, backend: str) -> None:
    for shape in ((1, 5), (9, 67)):
        sample = at_shape(loss, shape).sample(DTYPES[dtype])
        # On a GPU torch cannot make a tensor that is not aligned to its element.
        for change in (byte_offset, unaligned) if DEVICE == "cpu" else (byte_offset,):
            check(loss, laid_out(sample, change, "input and target"), change.__name__, backend)


@pytest.mark.parametrize("dims", [0, 1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("loss", POINTWISE)
def test_any_number_of_dimensions(loss: str, dims: int, backend: str) -> None:
    sample = at_shape(loss, (3,) * dims).sample(torch.float32)
    check(loss, sample, f"{dims} dimensions", backend)


@pytest.mark.parametrize("loss", BASIC)
def test_dimensions_that_do_not_join(loss: str, backend: str) -> None:
    """Ten dimensions; each operand has another order of strides."""
    sample = at_shape(loss, (2, 3, 2, 2, 1, 2, 2, 2, 2, 2)).sample(torch.float64)
    if loss == "log_loss":
        input = torch.softmax(
            at_shape("mse_loss", sample.input.shape).sample(torch.float64).input, 1
        )
        sample = Sample(input, torch.randint(3, (2, 2, 2, 1, 2, 2, 2, 2, 2)), {})
    order = [3, 8, 0, 5, 9, 1, 7, 2, 6, 4]
    back = [order.index(d) for d in range(10)]
    shuffled = sample.input.permute(order).contiguous().permute(back)
    compare_with_torch(loss, shuffled, sample.target)
    compare_with_torch(loss, sample.input, transposed(sample.target))
    compare_with_torch(loss, shuffled[..., ::2, :, :], transposed(sample.target)[..., ::2, :, :])


FLOATS = tuple(DTYPES.values())


@pytest.mark.parametrize("target_dtype", [*DTYPES, "int64", "bool"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", POINTWISE)
def test_mixed_dtypes(loss: str, dtype: str, target_dtype: str, backend: str) -> None:
    """The pair of dtypes gives torch's result dtype, value and gradients, or torch's error."""
    sample = at_shape(loss, (5, 7)).sample(torch.float64)
    other = {**DTYPES, "int64": torch.int64, "bool": torch.bool}[target_dtype]
    target = sample.target if other.is_floating_point else sample.target.round()
    for reduction in ("none", "mean", "sum"):
        compare_with_torch(
            loss, sample.input.to(DTYPES[dtype]), target.to(other), reduction=reduction
        )


@pytest.mark.parametrize("option", ["weight", "pos_weight"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", POINTWISE)
def test_mixed_dtypes_of_options(loss: str, dtype: str, option: str, backend: str) -> None:
    if loss == "smooth_l1_loss" or (option == "pos_weight" and "logits" not in loss):
        pytest.skip(f"{loss} has no {option}")
    sample = at_shape(loss, (5, 7)).sample(DTYPES[dtype])
    for other in FLOATS:
        weight = torch.linspace(0.25, 2, 35).view(5, 7).to(other)
        for reduction in ("none", "mean", "sum"):
            compare_with_torch(
                loss, sample.input, sample.target, reduction=reduction, **{option: weight}
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", [*DTYPES, "int64", "int32", "uint8", "bool"])
def test_mixed_dtypes_of_classes(dtype: str, target_dtype: str, backend: str) -> None:
    others = {**DTYPES, "int64": torch.int64, "int32": torch.int32}
    others |= {"uint8": torch.uint8, "bool": torch.bool}
    family = "cross_entropy-probabilities" if target_dtype in DTYPES else "cross_entropy"
    sample = at_shape(family, (5, 7)).sample(torch.float64)
    compare_with_torch(
        "cross_entropy", sample.input.to(DTYPES[dtype]), sample.target.to(others[target_dtype])
    )
    for weight_dtype in FLOATS:
        compare_with_torch(
            "cross_entropy",
            sample.input.to(DTYPES[dtype]),
            sample.target.to(others[target_dtype]),
            weight=torch.linspace(0.5, 2, 7).to(weight_dtype),
        )


BROADCAST: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((5, 7), (7,)),
    ((5, 1), (5, 7)),
    ((5, 7), (1, 1)),
    ((5, 7), ()),
    ((), (5, 7)),
    ((7,), (5, 7)),
    ((5, 1), (5,)),
    ((2, 1, 4), (3, 1)),
    ((5, 0), (1, 1)),
    ((5, 7), (5, 6)),
    ((4, 3), (2, 3)),
)


@pytest.mark.parametrize(("input_shape", "target_shape"), BROADCAST, ids=str)
@pytest.mark.parametrize("loss", POINTWISE)
def test_broadcast_between_input_and_target(
    loss: str, input_shape: tuple[int, ...], target_shape: tuple[int, ...], backend: str
) -> None:
    """torch's result with torch's warning, or torch's error."""
    input = at_shape(loss, input_shape).sample(torch.float32).input
    target = at_shape(loss, target_shape).sample(torch.float32, seed=1).target
    for reduction in ("none", "mean", "sum"):
        compare_with_torch(loss, input, target, reduction=reduction)


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_which_targets_are_expanded(loss: str, fused: str) -> None:
    """Those that fit input's shape and want no gradient, which would be a sum."""
    function, x = getattr(FL, loss), torch.randn(2, 5, 7)
    for shape in ((7,), (5, 1), (2, 1, 7), (1, 1, 1), ()):
        target = torch.randn(shape)
        assert fusedloss.explain(function, leaf(x), target).fused, shape
        assert not fusedloss.explain(function, leaf(x), leaf(target)).fused, shape
        stepped = x.transpose(0, 2).contiguous().transpose(0, 2)
        compare_with_torch(loss, stepped, target, reduction="sum")
        compare_with_torch(loss, x, target, target_wants=True)
    for shape in ((3, 2, 5, 7), (1, 2, 5, 7)):
        assert not fusedloss.explain(function, leaf(x), torch.randn(shape)).fused, shape
    if loss != "huber_loss":
        compare_with_torch(loss, x, torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("weight_shape", [(5, 7), (7,), (1, 7), (5, 1), (1,), (), (5,), (3, 5, 7)])
@pytest.mark.parametrize("loss", POINTWISE)
def test_broadcast_of_options(loss: str, weight_shape: tuple[int, ...], backend: str) -> None:
    if loss == "smooth_l1_loss":
        pytest.skip("smooth_l1_loss has no weight")
    sample = at_shape(loss, (5, 7)).sample(torch.float32)
    weight = torch.linspace(0.25, 2, torch.Size(weight_shape).numel()).view(weight_shape)
    options: list[dict[str, Any]] = [{"weight": weight}]
    if loss == "binary_cross_entropy_with_logits":
        options += [{"pos_weight": weight}, {"weight": weight, "pos_weight": 3 * weight}]
    for chosen, reduction in itertools.product(options, ("none", "mean", "sum")):
        compare_with_torch(loss, sample.input, sample.target, reduction=reduction, **chosen)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("wants", ["target", "input and target", "weight", "all"])
@pytest.mark.parametrize("loss", BASIC)
def test_gradients_of_the_other_arguments(
    loss: str, wants: str, reduction: str, backend: str
) -> None:
    """Target, weight and pos_weight that want a gradient get torch's."""
    family = WEIGHTED.get(loss, loss)
    sample = at_shape(family, (5, 7)).sample(torch.float64)
    options: dict[str, Any] = {
        key: leaf(value) if isinstance(value, Tensor) and wants in ("weight", "all") else value
        for key, value in sample.options.items()
    }
    compare_with_torch(
        loss,
        sample.input,
        sample.target,
        reduction=reduction,
        input_wants=wants != "target",
        target_wants="target" in wants or wants == "all",
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("loss", [loss for loss in BASIC if loss != "log_loss"])
def test_inputs_that_are_not_real(loss: str, dtype: torch.dtype, backend: str) -> None:
    """Integers, booleans and complex numbers: torch's result or torch's error."""
    sample = at_shape(loss, (5, 7)).sample(torch.float32)
    for input, target in (
        (sample.input.to(dtype), sample.target),
        (sample.input.to(dtype), sample.target.to(dtype)),
        (sample.input, sample.target.to(dtype)),
    ):
        compare_with_torch(loss, input, target, input_wants=input.is_floating_point())


FEW_ROWS: dict[str, Callable[[], Tensor]] = {
    "one": lambda: torch.randn(3000, 2)[:, 0],
    "one, ignored": lambda: torch.randn(3000, 2)[:, 1],
    "transposed": lambda: torch.randn(3000, 3).t(),
    "steps": lambda: torch.randn(5, 6000)[:, ::2],
    "steps of many": lambda: torch.randn(40, 600)[:, ::2],
    "inner": lambda: torch.randn(2, 3000, 3),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", FEW_ROWS)
def test_few_rows_whose_classes_are_apart(layout: str, dtype: torch.dtype, compiled: str) -> None:
    """Values, and gradients in the order of the input; for rows, and for equally strided
    probabilities."""
    input = FEW_ROWS[layout]().to(dtype)
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    target = torch.randint(input.shape[min(1, input.dim() - 1)], shape)
    if layout == "one, ignored":
        target = torch.tensor(-100)
    elif shape:
        target.view(-1)[0] = -100
    soft = input.double().softmax(min(1, input.dim() - 1)).to(dtype)
    for wanted, options in ((target, {}), (target, {"label_smoothing": 0.1}), (soft, {})):
        sample = Sample(input, wanted, options)
        truth = sample_truth("cross_entropy", sample, "sum")
        value, grad = value_and_grad(FL.cross_entropy, sample, "sum")
        assert_close_to_truth(value, truth.value, truth.value_scale, "value")
        assert_close_to_truth(grad, truth.grad, truth.grad_scale, "gradient")
