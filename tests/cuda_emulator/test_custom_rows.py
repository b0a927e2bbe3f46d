"""Custom row losses in the CUDA engine over the emulator, against formulas in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from build import build
from cases import REDUCTIONS
from engines import NOWHERE, RUNNER, SOURCES, Calls, RowLoss, RowsCall
from fusedloss.custom.building import CUDA_ROWS
from helpers import draw_upstream
from own_losses import library
from row_losses import ROW_LOSSES, RowCase
from ways import Ways

# Together these have each kind of input, several levels, and maxima whose slopes count.
NAMES = ("cross_entropy", "distillation", "jsd", "triplet", "grpo", "balanced", "spread")
BY_NAME = {case.id: case for case in ROW_LOSSES if case.id in NAMES}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES["fp16"] = torch.float16
TOLERANCES = {  # of the gradients' and the values' own rounding, in units of the largest
    torch.float64: 1e-13,
    torch.float32: 2e-6,  # row numbers are floats
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def class_dim(shape: Sequence[int]) -> int:
    return min(1, len(shape) - 1)


def rows_of(shape: Sequence[int]) -> list[int]:
    dim = class_dim(shape)
    return [*shape[:dim], *shape[dim + 1 :]]


def kinds_of(case: RowCase) -> list[str]:
    """Their names in csrc/math/custom_rows.h."""
    return ["k" + kind.value.title().replace(" ", "") for kind in case.loss._traced.kinds]


def draw(
    case: RowCase,
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: Callable[[Sequence[int]], Tensor] = torch.randn,
) -> list[Tensor]:
    rows, classes = rows_of(shape), shape[class_dim(shape)]
    drawn: dict[str, Callable[[], Tensor]] = {
        "kElement": lambda: layout(shape).to(dtype).requires_grad_(),
        "kLabel": lambda: torch.randint(classes, rows),
        "kPerRow": lambda: torch.randn(rows).to(dtype).requires_grad_(),
        "kPerClass": lambda: torch.rand(classes).to(dtype),
    }
    return [drawn[kind]() for kind in kinds_of(case)]


def expected(
    case: RowCase,
    inputs: Sequence[Tensor],
    reduction: str,
    weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, float, list[Tensor]]:
    """The result in float64, what its error is relative to, and copies of the inputs that it was
    computed from."""
    copies = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    arguments = []
    counts = torch.ones(rows_of(inputs[0].shape), dtype=torch.bool)
    for kind, copy, t in zip(kinds_of(case), copies, inputs, strict=True):
        copy.requires_grad_(t.requires_grad)
        if kind == "kLabel":
            counts = copy != ignore_index
        moved = copy.movedim(class_dim(copy.shape), -1) if kind == "kElement" else copy
        arguments.append(moved.where(counts, 0) if kind == "kLabel" else moved)
    weights = counts.double() if weight is None else counts * weight.double()

    def reduced(rows: Tensor) -> Tensor:
        rows = weights * rows.where(counts, 0)
        divisor = weights.sum() if reduction == "mean" else 1
        return rows if reduction == "none" else rows.sum() / divisor

    values = case.torch(*arguments, **case.parameters)
    # Row numbers are floats: logarithms of a sum over classes, and norms, have their own roundings.
    size = values.detach().abs() + 1 + math.log(arguments[0].shape[-1])
    if case.id == "triplet":
        size = size + arguments[0].detach().norm(dim=-1)
    return reduced(values), reduced(size).nan_to_num(0).max().item(), copies


@cache
def program(variant: str) -> Path:
    return build([*SOURCES, RUNNER], variant)


@dataclass(frozen=True)
class Question:
    loss: RowCase
    inputs: Sequence[Tensor]
    reduction: str = "mean"
    weight: Tensor | None = None
    ignore_index: int = -100

    def __str__(self) -> str:
        shapes = [(*t.shape,) for t in self.inputs]
        dtype, weighted = self.inputs[0].dtype, self.weight is not None
        return f"{self.loss.id} {shapes} {dtype} {self.reduction} weight {weighted}"

    def call(self, variant: str) -> RowsCall:
        loss = self.loss.loss
        own = library(self.loss.id, loss._struct, variant, engine=CUDA_ROWS)
        parameters = [*{**loss._traced.defaults, **self.loss.parameters}.values()]
        numbers = (kinds_of(self.loss), loss._program.gpu_sizes, parameters)
        return RowsCall(own, *numbers, self.inputs, self.weight, self.ignore_index)

    def ask(self, calls: Calls, variant: str, shifts: tuple[int, int]) -> Ways:
        call = self.call(variant)

        def make(prediction: tuple[float, float]) -> RowLoss:
            return RowLoss(calls, call, self.reduction, prediction, shifts)

        first = self.inputs[0]
        shape = rows_of(first.shape) if self.reduction == "none" else []
        return Ways(make, draw_upstream(torch.Size(shape), first.dtype))

    def check(self, ways: Ways) -> None:
        value, gradients = ways.results(str(self))
        truth, size, copies = expected(
            self.loss, self.inputs, self.reduction, self.weight, self.ignore_index
        )
        wanted = [t for t in copies if t.requires_grad]
        truths = torch.autograd.grad(truth, wanted, ways.upstream.double())
        # The gradient for one input may be a difference of those for others.
        slope = max(right.nan_to_num(0).abs().max().item() for right in truths)
        for i, (found, right) in enumerate(zip((value, *gradients), (truth, *truths), strict=True)):
            largest = slope if i else size
            torch.testing.assert_close(
                found.double(),
                right.detach(),
                rtol=0,
                atol=TOLERANCES[found.dtype] * largest,
                equal_nan=True,
                msg=lambda text, i=i: f"{self}: {f'gradient {i - 1}' if i else 'value'}: {text}",
            )


def check_all(
    variant: str,
    questions: Iterator[Question],
    shifts: tuple[int, int] = (0, 0),
    settings: Mapping[str, str] | None = None,
) -> None:
    """One run of the program for all of them."""
    calls = Calls()
    asked = [(question, question.ask(calls, variant, shifts)) for question in questions]
    calls.run(program(variant), settings)
    for question, ways in asked:
        question.check(ways)


def questions(
    name: str,
    dtype: torch.dtype,
    shapes: Sequence[Sequence[int]],
    layout: Callable[[Sequence[int]], Tensor] = torch.randn,
) -> Iterator[Question]:
    """Each shape with each reduction, with and without weights and rows that do not count."""
    loss = BY_NAME[name]
    weighted = itertools.cycle((False, True, True, False))
    for shape, reduction in itertools.product(shapes, REDUCTIONS):
        torch.manual_seed(len(shape) + shape[-1])
        inputs = draw(loss, shape, dtype, layout)
        weight = torch.rand(rows_of(shape)) + 0.5 if next(weighted) else None
        ignored = (
            int(inputs[1].flatten()[0]) if "kLabel" in kinds_of(loss) and len(shape) > 1 else -100
        )
        yield Question(loss, inputs, reduction, weight, ignored)


# One class, parts of a warp, a warp, a block; classes that are not innermost.
SHAPES = ((1,), (7,), (1000,), (70, 1), (70, 7), (9, 21), (9, 150), (5, 1000), (3, 5000))
SHAPES = (*SHAPES, (2, 7, 33), (2, 300, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BY_NAME)
def test_values(name: str, dtype: str) -> None:
    check_all("plain", questions(name, DTYPES[dtype], SHAPES))


# For a cluster; and rows that no block or cluster has room for, with and without what is kept.
LONG = (2, 9001)
LONGER = (2, 40_000), (1, 60_001)


@pytest.mark.parametrize("name", ["cross_entropy", "distillation", "spread"])
def test_long_rows(name: str) -> None:
    check_all("plain", questions(name, torch.float32, [LONG]))
    one_block = {"EMULATOR_CLUSTER": "1"}
    check_all("plain", questions(name, torch.float32, LONGER), settings=one_block)


# Rows in registers, for parts of a warp, a warp, a block, and a cluster; threads without a class.
HELD = ((70, 264), (1, 1000), (9, 2048), (5, 2056), (2, 16_648))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["cross_entropy", "distillation", "jsd", "triplet", "grpo"])
def test_held(name: str, dtype: str) -> None:
    check_all("plain", questions(name, DTYPES[dtype], HELD))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["cross_entropy", "distillation", "jsd"])
def test_held_infinities(name: str, dtype: str) -> None:
    """Rows are nan where PyTorch's are, whether they are held or not."""
    inputs = draw(BY_NAME[name], (6, 1024), DTYPES[dtype])
    x = inputs[0].detach()
    x[0, 7], x[0, 900] = math.nan, math.inf
    x[1, 900], x[1, :100] = math.nan, -1e4
    x[2] = math.nan
    if name == "cross_entropy":  # PyTorch's others multiply a share of 0 by infinite numbers
        x[3, 5] = math.inf
        x[4, 3:9] = -math.inf
        inputs[1][:] = torch.tensor([7, 900, 0, 5, 20, -100])
    question, calls = Question(BY_NAME[name], inputs, "none"), Calls()
    asked = []
    for shift in (0, 1):
        loss = RowLoss(calls, question.call("plain"), "none", shifts=(shift, shift))
        loss.forward()
        loss.backward(torch.ones(6))
        asked.append(loss)
    calls.run(program("plain"))
    truth, _, copies = expected(question.loss, inputs, "none", None, -100)
    wanted = [t for t in copies if t.requires_grad]
    truths = torch.autograd.grad(truth.sum(), wanted)
    for loss in asked:
        assert loss.value_found().isnan().equal(truth.isnan())
        for found, right in zip(loss.gradients_found(), truths, strict=True):
            assert found.isnan().equal(right.isnan())


def test_no_rows() -> None:
    """Nothing is read, though classes would fit in registers."""
    calls = Calls()
    for shape in ((0, 1000), (5, 1000, 0)):
        inputs = draw(BY_NAME["distillation"], shape, torch.float32)
        loss = RowLoss(calls, Question(BY_NAME["distillation"], inputs).call("plain"), "none")
        loss.forward()
        loss.backward(torch.ones(rows_of(shape)))
    calls.run(program("plain"))  # and ends without a fault


FEW = ((7,), (70, 7), (5, 1000), (2, 7, 33), (2, 2056), LONG)


# A loss with a label, one whose maxima have slopes that count, and one of several inputs.
SANITIZED = [("address", "cross_entropy"), ("address", "spread")]
SANITIZED += [("thread", name) for name in ("cross_entropy", "triplet", "spread")]


@pytest.mark.parametrize(("variant", "name"), SANITIZED)
def test_sanitized(variant: str, name: str) -> None:
    """Bounds and alignment, and the order of threads."""
    for dtype in (torch.float32, torch.bfloat16):
        check_all(variant, questions(name, dtype, FEW))


def moved(shape: Sequence[int]) -> Tensor:
    """Its classes were the last dimension."""
    dim = 1 if len(shape) > 1 else 0
    return torch.randn(*rows_of(shape), shape[dim]).movedim(-1, dim)


def gaps(shape: Sequence[int]) -> Tensor:
    return torch.randn(*(2 * n for n in shape))[tuple(slice(None, None, 2) for _ in shape)]


@pytest.mark.parametrize("layout", [moved, gaps])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layouts(dtype: str, layout: Callable[[Sequence[int]], Tensor]) -> None:
    shapes = ((9,), (37, 30), (3, 5, 12), (2, 300, 5))
    for name in ("cross_entropy", "triplet"):
        check_all("plain", questions(name, DTYPES[dtype], shapes, layout))


@pytest.mark.parametrize("shifts", [(1, 1), (3, 3), (1, 0), (0, 3)], ids=str)
def test_unaligned(shifts: tuple[int, int]) -> None:
    """Memory that begins between two vectors: all alike, or the first input apart."""
    for dtype in (torch.float32, torch.bfloat16):
        check_all("plain", questions("triplet", dtype, ((2,), (9, 21), (5, 1000))), shifts)


def test_inputs_of_several_types() -> None:
    def asked() -> Iterator[Question]:
        for shape in ((9, 21), (5, 1000), (2, 7, 33)):
            student, teacher = draw(BY_NAME["distillation"], shape, torch.bfloat16)
            for inputs in (
                (student, teacher.detach().float()),
                (student.detach().float(), teacher),
            ):
                yield Question(BY_NAME["distillation"], [t.requires_grad_() for t in inputs])

    check_all("plain", asked())


def test_some_gradients() -> None:
    def asked() -> Iterator[Question]:
        for name, wanted in itertools.product(("triplet", "grpo"), range(1, 8)):
            inputs = draw(BY_NAME[name], (9, 100 * 10 ** (wanted % 2)), torch.float32)
            differentiable = [t for t in inputs if t.requires_grad]
            for i, t in enumerate(differentiable):
                t.requires_grad_(bool(wanted >> i & 1))
            yield Question(BY_NAME[name], inputs)

    check_all("plain", asked())


def test_labels_that_are_no_class() -> None:
    """Their rows are nan, and the fault names the first of a block; a mean leaves them out."""
    calls = Calls()
    inputs = draw(BY_NAME["cross_entropy"], (5, 30), torch.float32)
    inputs[1][:] = torch.tensor([3, -1, 29, 30, 7])
    call = Question(BY_NAME["cross_entropy"], inputs, ignore_index=7).call("plain")
    loss = RowLoss(calls, call, "none")
    loss.forward()
    loss.backward(torch.ones(5))
    mean = RowLoss(calls, call, "mean")
    mean.value()
    calls.run(program("plain"))
    assert loss.value_found().isnan().tolist() == [False, True, False, True, False]
    (gradient,) = loss.gradients_found()
    assert gradient.isnan().all(1).tolist() == [False, True, False, True, False]
    assert loss.value_found()[4] == 0
    assert not gradient[4].any()
    state, what, position, _, index, classes = calls.fault(loss.fault)
    assert (state, what, classes) == (2, 0, 30)
    assert (position, index) in ((1, -1), (3, 30))
    assert mean.value_found().isnan()


def test_nothing_counts() -> None:
    inputs = draw(BY_NAME["cross_entropy"], (5, 30), torch.float32)
    inputs[1].fill_(4)
    calls = Calls()
    loss = RowLoss(
        calls, Question(BY_NAME["cross_entropy"], inputs, ignore_index=4).call("plain"), "mean"
    )
    loss.value()
    calls.run(program("plain"))
    assert loss.value_found().isnan()


class OverInputs(RowLoss):
    """Its gradients are written over the inputs."""

    def _renew_gradients(self) -> None:
        seen = zip(self._engine.inputs, self.call.inputs, strict=True)
        self.places = tuple(words[0] if t.requires_grad else NOWHERE for words, t in seen)


@pytest.mark.parametrize("variant", ["plain", "thread"])
def test_in_place(variant: str) -> None:
    """They have the bits of those that are written elsewhere, for whoever computes the row."""
    names = ("cross_entropy", "triplet", "spread") if variant == "plain" else ("spread",)
    shapes = ((70, 7), (9, 150), (9, 1000), (3, 5000), LONG, (2, 40_000))
    calls, asked = Calls(), []
    for name, dtype in itertools.product(names, (torch.float32, torch.bfloat16)):
        for shape in shapes:
            call = Question(BY_NAME[name], draw(BY_NAME[name], shape, dtype)).call(variant)
            pair = [kind(calls, call, "none") for kind in (RowLoss, OverInputs)]
            for loss in pair:
                loss.backward(torch.linspace(-1, 1, shape[0]))
            asked.append(pair)
    calls.run(program(variant), {"EMULATOR_CLUSTER": "4"})
    for apart, over in asked:
        for a, b in zip(apart.gradients_found(), over.gradients_found(), strict=True):
            assert torch.equal(a, b), apart.call


def test_ties() -> None:
    """The gradient of a maximum goes to its first position alone, whoever computes it."""
    for shape in ((3, 1000), (40, 40), (2, 9001)):
        x = torch.zeros(shape)
        x[:, 5::7] = 6.0
        x[:, 3::7] = -6.0
        calls = Calls()
        call = Question(BY_NAME["spread"], [x.requires_grad_()]).call("plain")
        loss = RowLoss(calls, call, "none")
        loss.forward()
        loss.backward(torch.ones(shape[0]))
        calls.run(program("plain"))
        right = torch.zeros(shape)
        right[:, 5], right[:, 3] = 1, -1
        assert torch.equal(loss.gradients_found()[0], right)
