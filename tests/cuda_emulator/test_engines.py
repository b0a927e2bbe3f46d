"""The CUDA engines over the emulator, against fp64: every case, dtype, reduction and pass.

What hardware alone can show is not asked here: speed, and its own exp and log.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import formulas
from build import build
from cases import DTYPES, FAMILIES, REDUCTIONS, Case, Sample, at_shape
from engines import NOWHERE, RUNNER, SOURCES, Calls, Loss
from helpers import (
    ROWS,
    assert_close_to_truth,
    assert_same_bits,
    draw_upstream,
    drawn,
    result_shape,
)
from ways import Ways


@cache
def program(variant: str) -> Path:
    return build([*SOURCES, RUNNER], variant)


class Question(NamedTuple):
    loss: str
    sample: Sample
    elements: formulas.Elements
    what: str
    reductions: Sequence[str]


def check_all(
    variant: str,
    questions: Sequence[Question],
    shifts: tuple[int, int] = (0, 0),
    settings: Mapping[str, str] | None = None,
) -> None:
    """One run of the program for all of them."""
    calls = Calls()

    def ask(q: Question, reduction: str) -> Ways:
        def make(prediction: tuple[float, float]) -> Loss:
            return Loss(calls, q.loss, q.sample, reduction, prediction, shifts)

        shape = result_shape(q.loss, q.sample, reduction)
        return Ways(make, draw_upstream(shape, q.sample.input.dtype))

    asked = [(q, reduction, ask(q, reduction)) for q in questions for reduction in q.reductions]
    calls.run(program(variant), settings)
    for q, reduction, ways in asked:
        what = f"{q.what} {reduction}"
        value, (gradient,) = ways.results(what)
        truth = formulas.reduce(q.elements, reduction, ways.upstream)
        assert_close_to_truth(value, truth.value, truth.value_scale, f"{what} value")
        assert_close_to_truth(gradient, truth.grad, truth.grad_scale, f"{what} gradient")


def question(case: Case, dtype: str, *reductions: str) -> Question:
    sample, elements = drawn(case, DTYPES[dtype])
    return Question(case.loss, sample, elements, f"{case.name} {dtype}", reductions)


def cases_of(family: str) -> list[Case]:
    """Those that are not empty: no engine is asked for these."""
    return [case for case in FAMILIES[family] if math.prod(case.shape)]


# Those that are no sums of others' elements, and no custom losses over rows.
OWN_FAMILIES = [family for family in FAMILIES if not family.startswith(("multilabel", *ROWS))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", OWN_FAMILIES)
def test_values(family: str, dtype: str) -> None:
    check_all("plain", [question(case, dtype, *REDUCTIONS) for case in cases_of(family)])


def few_of(family: str) -> list[Question]:
    """Of small shapes some, and the largest."""
    cases = cases_of(family)
    few = {case.name: case for case in (*cases[::4], *cases[-3:])}.values()
    asked = [(question(case, "fp32", "mean"), question(case, "bf16", "none")) for case in few]
    return list(itertools.chain.from_iterable(asked))


@pytest.mark.parametrize("family", OWN_FAMILIES)
def test_bounds_and_alignment(family: str) -> None:
    check_all("address", few_of(family))


def rows_of_classes(*shapes: tuple[int, int]) -> list[Question]:
    families = ("cross_entropy", "cross_entropy-probabilities")
    return [
        question(at_shape(family, shape), "fp32", "mean") for family in families for shape in shapes
    ]


@pytest.mark.parametrize(
    "device",
    [
        {"EMULATOR_CAPABILITY": "80"},
        {"EMULATOR_CODE": "80"},
        {"EMULATOR_CLUSTER": "4"},
        {"EMULATOR_CLUSTER": "0"},
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", ["plain", "address"])
def test_without_clusters(variant: str, device: dict[str, str]) -> None:
    """On devices without them, where a driver has compiled the PTX for such a one, and on parts of
    a device that have no room for large ones, or for any."""
    check_all(variant, rows_of_classes((3, 40_001), (2, 140_000)), settings=device)


# By who shares a row that registers hold: 1 to 8 threads with 32 classes each; and with 64 classes
# each 8 to 32 threads, blocks and clusters of 2, 4 and 8. On one multiprocessor each has several.
HELD = [(781, 32), (387, 64), (195, 128), (101, 240), (101, 256), (67, 264), (67, 1024), (35, 2048)]
HELD += [(19, 2056), (13, 4096), (3, 16_384), (3, 30_000), (3, 40_000), (3, 131_072)]
HELD_FAMILIES = ("cross_entropy", "cross_entropy-weight", "cross_entropy-ignored")
ONE = {"EMULATOR_MULTIPROCESSORS": "1"}


@pytest.mark.parametrize("shape", HELD, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_held(dtype: str, shape: tuple[int, int]) -> None:
    rows, classes = shape
    asked = [question(at_shape("cross_entropy", shape), dtype, *REDUCTIONS)]
    if classes < 5000:
        # A class less or more has no whole number of vectors.
        asked += [
            question(at_shape("cross_entropy", (rows, n)), dtype, "mean")
            for n in (classes - 1, classes + 1)
        ]
        asked += [question(at_shape(name, shape), dtype, "none") for name in HELD_FAMILIES[1:]]
    check_all("plain", asked, settings=ONE)


@pytest.mark.parametrize("variant", ["address", "thread"])
def test_held_in_order(variant: str) -> None:
    # One of each kind: threads of a warp, a block, and clusters.
    asked = [
        question(at_shape(family, shape), dtype, "mean")
        for (family, dtype), shape in zip(
            itertools.cycle(zip(HELD_FAMILIES, ("fp32", "bf16", "fp16"), strict=True)),
            [(67, 264), (35, 2048), (3, 4096), (3, 16_384), (2, 40_000)],
            strict=False,
        )
    ]
    check_all(variant, asked, settings=ONE)


@pytest.mark.parametrize("device", [{"EMULATOR_CODE": "80"}, {"EMULATOR_CLUSTER": "4"}], ids=str)
def test_held_without_clusters(device: dict[str, str]) -> None:
    check_all("plain", rows_of_classes((3, 40_000), (2, 131_072)), settings=device)


@pytest.mark.parametrize("classes", [64, 1024, 4096, 40_000])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_held_special_rows(dtype: str, classes: int) -> None:
    """Rows of large numbers, of infinities, of nan: as the general kernel has them."""
    most = torch.finfo(DTYPES[dtype]).max
    inf, nan = math.inf, math.nan
    generator = torch.Generator().manual_seed(0)
    rows = []
    for base in (0.0, 100.0, -1000.0, 30_000.0, -60_000.0, most / 2, most, -most):
        rows.append(torch.randn(classes, generator=generator) * max(1.0, abs(base) / 300))
        rows[-1] = (rows[-1].double() + base).clamp(-most, most)
    for value, place in itertools.product((inf, -inf, nan, most), (0, 1, classes - 1)):
        rows.append(torch.randn(classes, generator=generator).double())
        rows[-1][place] = value
    for value in (inf, -inf, nan, 0.0, -most, most):
        rows.append(torch.full((classes,), value, dtype=torch.float64))
    # All alike but one.
    for few, many in ((-inf, 0.0), (0.0, -inf), (100.0, -inf), (most, -most)):
        rows.append(torch.full((classes,), many, dtype=torch.float64))
        rows[-1][1] = few
    # Two alike, whose products with log2(e) are rounded up and down as far as those of a half can be.
    for value in (49_984.0, 53_312.0, 58_592.0, -63_872.0):
        rows.append(torch.full((classes,), -most, dtype=torch.float64))
        rows[-1][[1, classes - 1]] = value
    input = torch.stack([*rows, *rows]).to(DTYPES[dtype])
    target = torch.tensor([1] * len(rows) + [classes - 1] * len(rows))
    target[::7] = -100
    # A class more, which counts nothing, is not held.
    more = torch.cat([input, torch.full((len(input), 1), -inf, dtype=input.dtype)], 1)
    calls = Calls()
    asked = [Loss(calls, "cross_entropy", Sample(x, target, {}), "none") for x in (input, more)]
    for loss in asked:
        loss.value()
        loss.backward(torch.ones(len(input), dtype=input.dtype))
    calls.run(program("plain"))
    found, expected = asked
    # Both kernels round to the nearest number of two bytes.
    info, roundings = torch.finfo(input.dtype), 4 if dtype == "fp32" else 1
    tiny = max(1e-30, info.smallest_normal * info.eps)
    close = {"equal_nan": True, "rtol": roundings * info.eps, "atol": tiny}
    torch.testing.assert_close(found.value_found(), expected.value_found(), **close)
    torch.testing.assert_close(found.gradient_found(), expected.gradient_found()[:, :-1], **close)


def test_shared_memory_of_several_threads() -> None:
    """A call leaves allowed what another thread's has asked for, and is about to launch with."""
    check_all("plain", rows_of_classes((2, 24_000), (2, 14_000)))


# One family per kernel: what its threads wait for does not depend on the loss.
FAMILIES_OF_KERNELS = (
    "mse_loss",
    "mse_loss-weight",
    "cross_entropy",
    "cross_entropy-ignored",
    "cross_entropy-probabilities",
    "log_loss",
)


@pytest.mark.parametrize("family", FAMILIES_OF_KERNELS)
def test_order(family: str) -> None:
    check_all("thread", few_of(family))


# Calls of every kernel with many blocks, and with one.
TAUGHT = [
    ("mse_loss", (20_000,)),
    ("mse_loss", (30,)),
    ("mse_loss-weight", (130, 140)),
    ("log_loss", (850, 20)),
    ("cross_entropy", (600, 10)),
    ("cross_entropy", (40, 1001)),
    ("cross_entropy", (9, 5001)),
    ("cross_entropy", (2, 40_001)),
    ("cross_entropy", (100, 256)),
    ("cross_entropy", (40, 1000)),
    ("cross_entropy", (9, 5000)),
    ("cross_entropy", (2, 40_000)),
    ("cross_entropy-probabilities", (40, 1000)),
    ("cross_entropy-probabilities", (2, 40_000)),
    ("cross_entropy", (3, 20, 707)),
    ("cross_entropy", (3, 20, 1600)),
    ("cross_entropy", (3, 80, 1600)),
]
IN_ORDER = ((30,), (600, 10), (40, 1001), (9, 5000), (3, 20, 707), (3, 80, 1600))


# Under ThreadSanitizer each takes ten seconds: one of each kernel.
@pytest.mark.parametrize(
    ("family", "shape", "variant"),
    [
        *((*case, "plain") for case in TAUGHT),
        *((family, shape, "thread") for family, shape in TAUGHT if shape in IN_ORDER),
    ],
    ids=str,
)
def test_taught_meanwhile(family: str, shape: tuple[int, ...], variant: str) -> None:
    """Backwards on other streams teach the prediction while forward runs. The gradient then is all
    of it for the upstream gradient that forward_state names, or backward computes all of it."""
    upstreams = [torch.tensor(u) for u in (0.5, 3.0, -1.0)]
    case = at_shape(family, shape)
    sample = case.sample(torch.float32)
    calls = Calls()
    truth = {u.item(): Loss(calls, case.loss, sample, "mean") for u in upstreams}
    for u in upstreams:
        truth[u.item()].forward()
        truth[u.item()].backward(u, fresh=True)
    alone, followed = [], []
    # From lessons between any two threads to none for the whole launch, short or long.
    for every in (2, 50, 1000, 20_000, 500_000):
        for u in [None, *upstreams]:
            loss = Loss(calls, case.loss, sample, "mean", (0.5, 3.0))
            calls.teach(loss.prediction, list(truth), every)
            loss.forward()
            calls.teach(NOWHERE)
            if u is None:
                alone.append(loss)
            else:
                loss.backward(u)
                followed.append((loss, u.item()))
    calls.run(program(variant))
    assert not any(loss.is_patchwork(truth) for loss in alone)
    assert 0 < sum(math.isnan(loss.forward_state_found()[0]) for loss in alone) < len(alone)
    for loss, u in followed:
        assert_same_bits(loss.value_found(), truth[u].value_found(), "value")
        assert_same_bits(loss.gradient_found(), truth[u].gradient_found(), "backward")


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def gaps(tensor: Tensor) -> Tensor:
    """A slice of a larger tensor, whose other elements are nan, or no classes."""
    fill = math.nan if tensor.is_floating_point() else -(2**40)
    larger = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), fill, dtype=tensor.dtype)
    return larger[..., 2:-1].copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((37, 300), transposed),
    "transposed, few classes": ((600, 21), transposed),
    "transposed, many classes": ((40, 300), transposed),
    "gaps": ((37, 1021), gaps),
    "wide rows side by side": ((300, 37, 8), lambda tensor: tensor),
    "channels last": ((3, 37, 8, 9), channels_last),
}
LAID_OUT = (
    "mse_loss-weight",
    "binary_cross_entropy_with_logits-weight-pos_weight",
    "cross_entropy",
    "cross_entropy-probabilities-weight-smoothing",
    "log_loss-weight-ignored_class",
    "log_loss-probabilities",
)


@pytest.mark.parametrize("variant", ["plain", "address"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, variant: str) -> None:
    shape, lay_out = LAYOUTS[layout]
    questions = []
    for family, dtype in itertools.product(LAID_OUT, ("fp32", "bf16")):
        if family.startswith("log_loss") and len(shape) > 2:
            continue  # the formula has its classes last
        case = at_shape(family, shape)
        plain = case.sample(DTYPES[dtype])
        whole = plain.target.shape == plain.input.shape
        sample = Sample(
            lay_out(plain.input), lay_out(plain.target) if whole else plain.target, plain.options
        )
        elements = formulas.elements(case.loss, plain.input, plain.target, plain.options)
        what = f"{case.name} {dtype} {layout}"
        questions.append(Question(case.loss, sample, elements, what, ("none", "mean")))
    check_all(variant, questions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["plain", "address", "thread"])
def test_probabilities_of_another_kind(dtype: str, variant: str) -> None:
    """Of another dtype or layout than the logits; and weights and label smoothing with all."""
    questions = []
    shapes = ((40, 9), (40, 300), (3, 1021), (3, 5000), (2, 20_001))
    for shape in shapes if variant == "plain" else shapes[1:4]:
        for family in ("cross_entropy-probabilities", LAID_OUT[3]):
            plain = at_shape(family, shape).sample(DTYPES[dtype])
            for name, target in {
                "as it is": plain.target,
                "in double": plain.target.double(),
                "in bf16": plain.target.bfloat16(),
                "transposed": transposed(plain.target),
            }.items():
                sample = Sample(plain.input, target, plain.options)
                elements = formulas.elements("cross_entropy", plain.input, target, plain.options)
                what = f"{family} {shape} {dtype} {name}"
                questions.append(Question("cross_entropy", sample, elements, what, ("mean",)))
    check_all(variant, questions)


@pytest.mark.parametrize("classes", [1, 3, 21, 68, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", ["plain", "address", "thread"])
def test_special_rows_side_by_side(dtype: str, classes: int, variant: str) -> None:
    """Ignored rows have no gradient whatever their logits, faulty ones nan, and neither touches
    the rows beside it; a row may hold -inf, +inf and nan."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn((3, classes, 600), generator=generator).to(DTYPES[dtype])
    target = torch.randint(classes, (3, 600), generator=generator)
    target[:, ::5] = -100
    target[1, :30] = -100
    input[0, :, :10], input[0, :, 10:20] = math.nan, math.inf
    input[1, :, :10], input[1, :, 10:20] = -math.inf, math.nan
    input[2, 0, 100:120] = -math.inf
    input[2, :, 120:140] = -math.inf
    input[2, classes // 2, 140:160] = math.inf
    input[2, classes - 1, 160:180] = math.nan
    calls = Calls()
    asked = Loss(calls, "cross_entropy", Sample(input, target, {}), "sum", (0.5, 3.0))
    each = Loss(calls, "cross_entropy", Sample(input, target, {}), "none")
    wrong = target.clone()
    wrong[2, 37], wrong[0, 599] = classes, -1
    faulty = Loss(calls, "cross_entropy", Sample(input, wrong, {}), "sum", (0.5, 3.0))
    for loss in (asked, each, faulty):
        loss.forward()
    each.backward(torch.full((3, 600), 0.5, dtype=input.dtype))
    calls.run(program(variant))
    leaf = input.double().requires_grad_()
    values = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    values.backward(torch.full_like(values, 0.5))
    assert leaf.grad is not None
    leaf.grad.movedim(1, 2)[target == -100] = 0  # torch's own is nan where such logits are
    tolerance = {"rtol": 8 * torch.finfo(input.dtype).eps, "atol": 1e-5, "equal_nan": True}
    gradient = asked.gradient_found()
    torch.testing.assert_close(gradient.double(), leaf.grad, **tolerance)
    torch.testing.assert_close(each.value_found().double(), values.detach(), **tolerance)
    assert_same_bits(each.gradient_found(), gradient, "each row's gradient")
    assert gradient.movedim(1, 2)[target == -100].view(torch.uint8).count_nonzero() == 0
    gradient.movedim(1, 2)[wrong != target] = math.nan
    assert_same_bits(faulty.gradient_found(), gradient, "gradient of faulty rows")
    assert calls.fault(asked.fault)[0] == 0
    assert calls.fault(faulty.fault)[0] == 2
    assert calls.fault(faulty.fault)[2] in (2 * 600 + 37, 599)


@pytest.mark.parametrize("shifts", [(1, 1), (3, 3), (1, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("variant", ["plain", "address"])
def test_unaligned(shifts: tuple[int, int], variant: str) -> None:
    """Memory that begins between two packets: all alike, or input apart."""
    questions = []
    for family, dtype in itertools.product(LAID_OUT, ("fp32", "bf16")):
        by_class = "cross_entropy" in family or "log_loss" in family
        for n in (1, 2, 3, 5, 300, 20_001):
            case = at_shape(family, (3, n) if by_class else (n,))
            questions.append(question(case, dtype, "mean"))
    check_all(variant, questions, shifts)


@pytest.mark.parametrize(
    "loss, what, spoil",
    [("cross_entropy", 0, "target"), ("binary_cross_entropy", 1, "input")]
    + [("binary_cross_entropy", 2, "target"), ("log_loss", 0, "target")],
)
@pytest.mark.parametrize("variant", ["plain", "thread"])
def test_faults(loss: str, what: int, spoil: str, variant: str) -> None:
    """What a loss cannot take is told to the host, once, and makes the loss nan."""
    case = at_shape(FAMILIES[loss][0].family, (700, 33))
    sample = case.sample(torch.float32)
    wrong = {"cross_entropy": 33, "log_loss": -7, "binary_cross_entropy": 1.5}[loss]
    places = (5, 17, 600) if spoil == "target" and what == 0 else (5, 900, 20_000)
    getattr(sample, spoil).view(-1)[list(places)] = wrong
    calls = Calls()
    asked = Loss(calls, loss, sample, "mean", (1.0, 3.0))
    asked.forward()
    calls.run(program(variant))
    state, told, position, value, index, classes = calls.fault(asked.fault)
    assert (state, told, index if what == 0 else value) == (2, what, wrong)
    assert position in places
    assert what != 0 or classes == 33
    assert asked.value_found().isnan()
    assert asked.gradient_found().isnan().any()


# What lies outside of [0, 1], by little and by much.
OUTSIDE = (1.0078125, -0.0078125, math.nan, -1.5, math.inf, -math.inf, 3.0)


@pytest.mark.parametrize("shifts", [(0, 0), (3, 3), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_of_single_elements(dtype: str, shifts: tuple[int, int]) -> None:
    """At each place of a vector, of the head and of the tail, alone and with others: exactly these
    elements become nan, and one of them is told. Minus zero lies in [0, 1]."""
    bce = "binary_cross_entropy"
    sample = at_shape(bce, (43,)).sample(DTYPES[dtype])
    for tensor in (sample.input, sample.target):
        tensor[5] = -0.0  # in other vectors it would hide what their first test sees
    calls = Calls()

    def asked(input: Tensor, target: Tensor, reduction: str) -> Loss:
        loss = Loss(calls, bce, Sample(input, target, {}), reduction, (1.0, 3.0), shifts)
        loss.forward()
        if loss.each:
            loss.backward(draw_upstream(input.shape, input.dtype))
        return loss

    right = {name: asked(sample.input, sample.target, name) for name in ("mean", "none")}
    spoilt = []
    for first, reduction in itertools.product(range(43), right):
        for places in ([first], [i for i in (first, first + 1, first + 4) if i < 43]):
            input, target = sample.input.clone(), sample.target.clone()
            (target if len(spoilt) % 3 else input)[places] = OUTSIDE[len(spoilt) % len(OUTSIDE)]
            spoilt.append((asked(input, target, reduction), places))
    calls.run(program("plain"))
    for loss in right.values():
        assert calls.fault(loss.fault)[0] == 0
    for loss, places in spoilt:
        value = right[loss.reduction].value_found()
        value[places if loss.each else ()] = math.nan
        gradient = right[loss.reduction].gradient_found()
        gradient[places] = math.nan
        found = (loss.value_found(), loss.gradient_found())
        torch.testing.assert_close(found, (value, gradient), rtol=0, atol=0, equal_nan=True)
        state, which, position, number, _, _ = calls.fault(loss.fault)
        assert state == 2 and position in places
        wrong = (loss.sample.input, loss.sample.target)[which - 1][position].item()
        assert number == wrong or (math.isnan(number) and math.isnan(wrong))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "family",
    ["mse_loss", "binary_cross_entropy", "smooth_l1_loss", "log_loss", "log_loss-probabilities"],
)
def test_one_upstream_gradient(family: str, dtype: str) -> None:
    """Where a sum follows reduction "none", all elements have one upstream gradient, and the kernel
    of reduction "sum" computes theirs: the same bits. So does it for one weight of all elements."""
    case = at_shape(family, (3, 6667))
    sample = case.sample(DTYPES[dtype])
    number = torch.tensor(0.37, dtype=DTYPES[dtype])
    calls = Calls()

    def asked(reduction: str, upstream: Tensor, **options: Tensor) -> Loss:
        loss = Loss(calls, case.loss, Sample(sample.input, sample.target, options), reduction)
        loss.forward()
        loss.backward(upstream.expand(result_shape(case.loss, sample, reduction)))
        return loss

    total, each = asked("sum", number), [asked("none", number)]
    if case.loss != "log_loss":  # whose weights are those of classes
        weight = number.expand(sample.input.shape)
        each += [asked(name, torch.ones_like(number), weight=weight) for name in ("none", "sum")]
    calls.run(program("plain"))
    for loss in each:
        assert_same_bits(loss.gradient_found(), total.gradient_found(), loss.reduction)


@pytest.mark.parametrize("variant", ["plain", "address"])
def test_one_weight_of_all_elements(variant: str) -> None:
    """Of input's dtype and of another, with upstream gradients of each element and without."""
    questions = []
    families = ("mse_loss-weight", "binary_cross_entropy-weight")
    families += ("binary_cross_entropy_with_logits-weight-pos_weight",)
    for family, dtype, wide in itertools.product(families, DTYPES, (False, True)):
        case = at_shape(family, (13, 33))
        sample = case.sample(DTYPES[dtype])
        options = {}
        for name, weight in sample.options.items():
            number = weight.flatten()[0]
            options[name] = (number.double() if wide else number).expand(sample.input.shape)
        sample = Sample(sample.input, sample.target, options)
        elements = formulas.elements(case.loss, sample.input, sample.target, options)
        questions.append(Question(case.loss, sample, elements, f"{family} {dtype}", REDUCTIONS))
    check_all(variant, questions)


@pytest.mark.parametrize("blocks", ["1", "8"])
def test_blocks_per_multiprocessor(blocks: str) -> None:
    """The workspace has room for the parts of as many as there can be."""
    families = ("mse_loss", "binary_cross_entropy-weight", "log_loss")
    asked = [question(case, "fp32", "mean") for f in families for case in cases_of(f)[-2:]]
    check_all("address", asked, settings={"EMULATOR_OCCUPANCY": blocks})
