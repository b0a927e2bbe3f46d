"""Custom row losses in the CUDA engine over the emulator, against formulas in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from build import build
from cases import REDUCTIONS
from engines import RUNNER, SOURCES, Calls, RowLoss, RowsCall
from fusedloss.custom.building import CUDA_ROWS
from helpers import draw_upstream
from own_losses import library
from test_custom_rows_engine import LABEL, LOSSES, TOLERANCES, Loss, draw, expected, rows_of
from ways import Ways

BY_NAME = {loss.name: loss for loss in LOSSES}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES["fp16"] = torch.float16


@cache
def program(variant: str) -> Path:
    return build([*SOURCES, RUNNER], variant)


@dataclass(frozen=True)
class Question:
    loss: Loss
    inputs: Sequence[Tensor]
    reduction: str = "mean"
    weight: Tensor | None = None
    ignore_index: int = -100

    def __str__(self) -> str:
        shapes = [(*t.shape,) for t in self.inputs]
        dtype, weighted = self.inputs[0].dtype, self.weight is not None
        return f"{self.loss.name} {shapes} {dtype} {self.reduction} weight {weighted}"

    def call(self, variant: str) -> RowsCall:
        loss = self.loss
        own = library(loss.name, loss.struct, variant, engine=CUDA_ROWS)
        numbers = (loss.kinds, len(loss.kept), loss.parameters)
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
        for i, (found, right) in enumerate(zip((value, *gradients), (truth, *truths), strict=True)):
            largest = right.nan_to_num(0).abs().max().item() if i else size
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
        ignored = int(inputs[1].flatten()[0]) if LABEL in loss.kinds and len(shape) > 1 else -100
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


@pytest.mark.parametrize("name", ["cross_entropy", "distillation", "hinge"])
def test_long_rows(name: str) -> None:
    check_all("plain", questions(name, torch.float32, [LONG]))
    one_block = {"EMULATOR_CLUSTER": "1"}
    check_all("plain", questions(name, torch.float32, LONGER), settings=one_block)


FEW = ((7,), (70, 7), (5, 1000), (2, 7, 33), LONG)


@pytest.mark.parametrize("name", ["cross_entropy", "triplet", "hinge"])
@pytest.mark.parametrize("variant", ["address", "thread"])
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
        check_all("plain", questions("distillation", dtype, ((2,), (9, 21), (5, 1000))), shifts)


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
            inputs = draw(BY_NAME[name], (9, 100), torch.float32)
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


def test_ties() -> None:
    """The gradient of a maximum goes to its first position alone, whoever computes it."""

    def asked() -> Iterator[Question]:
        for shape in ((3, 1000), (40, 40), (2, 9001)):
            inputs = draw(BY_NAME["hinge"], shape, torch.float32)
            inputs[0].detach()[:, 5::7] = 6.0
            yield Question(BY_NAME["hinge"], inputs, "none")

    check_all("plain", asked())
