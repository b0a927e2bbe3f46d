"""Custom losses in the CUDA engine over the emulator, against the reference in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from build import build
from cases import DTYPES, REDUCTIONS, Sample
from custom_losses import CASES, OBSERVED, CustomCase, charbonnier, focal, gaussian_kl
from engines import RUNNER, SOURCES, Calls, OwnLoss
from helpers import assert_near, draw_upstream, leaf
from own_losses import library
from ways import Ways

# One with roots and quotients, one with exponentials, logarithms and powers, and one with gradients
# of two kinds.
LOSSES = {loss.__name__: loss for loss in (charbonnier, focal, gaussian_kl)}
BY_LOSS = {case.name: case for case in CASES if case.name in LOSSES}
BOTH, OF_INPUT, OF_TARGET = WANTS = (True, True), (True, False), (False, True)
# Around the packets of each dtype; with a tail; and for many blocks.
SIZES = (*range(1, 10), 15, 16, 17, 33, 4099, 33_001)


@cache
def program(variant: str) -> Path:
    return build([*SOURCES, RUNNER], variant)


@dataclass(frozen=True)
class Question:
    case: CustomCase
    input: Tensor
    target: Tensor
    reduction: str = "mean"
    weight: Tensor | None = None
    wants: tuple[bool, bool] = BOTH
    clip: float = math.inf
    options: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        weighted = "weighted" if self.weight is not None else ""
        shape, dtype = tuple(self.input.shape), self.input.dtype
        return f"{self.case.name} {shape} {dtype} {self.reduction} {weighted} {self.wants}"

    @property
    def parameters(self) -> tuple[float, ...]:
        return self.case.loss._values({**self.case.options, **self.options})

    def ask(self, calls: Calls, variant: str, shifts: tuple[int, int]) -> Ways:
        loss = self.case.loss
        own = library(loss.__name__, loss._struct, variant)
        parameters = (*self.parameters, self.clip)
        sample = Sample(self.input, self.target, {"weight": self.weight})

        def make(prediction: tuple[float, float]) -> OwnLoss:
            return OwnLoss(
                calls, own, parameters, sample, self.reduction, prediction, shifts, self.wants
            )

        shape = self.input.shape if self.reduction == "none" else torch.Size()
        return Ways(make, draw_upstream(shape, self.input.dtype))

    def check(self, ways: Ways) -> None:
        found, gradients = ways.results(str(self))
        wide = [leaf(t.double()) for t in (self.input, self.target)]
        weight = None if self.weight is None else self.weight.double()
        numbers = (*self.parameters, self.clip)
        value = self.case.loss._reference(wide, weight, numbers, -100, self.reduction)
        wanted = [t for t, wants in zip(wide, self.wants, strict=True) if wants]
        truths = torch.autograd.grad(value, wanted, ways.upstream.double(), materialize_grads=True)
        assert_near(found, value.detach(), f"{self}: value")
        for gradient, truth in zip(gradients, truths, strict=True):
            assert_near(gradient, truth, f"{self}: gradient")


def check_all(
    variant: str, questions: Iterator[Question], shifts: tuple[int, int] = (0, 0)
) -> None:
    """One run of the program for all of them."""
    calls = Calls()
    asked = [(question, question.ask(calls, variant, shifts)) for question in questions]
    calls.run(program(variant))
    for question, ways in asked:
        question.check(ways)


def drawn_weight(input: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(input.shape, generator=generator).to(input.dtype) + 0.5


def questions(name: str, dtype: str, sizes: tuple[int, ...] = SIZES) -> Iterator[Question]:
    case = BY_LOSS[name]
    options = itertools.cycle(itertools.product(REDUCTIONS, (False, True), WANTS))
    for size in sizes:
        x, y = case.sample(DTYPES[dtype], (size,))
        for reduction, weighted, wants in itertools.islice(options, 5):
            weight = drawn_weight(x) if weighted else None
            yield Question(case, x, y, reduction, weight, wants)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_values(name: str, dtype: str) -> None:
    check_all("plain", questions(name, dtype))


FEW = (1, 7, 17, 4099, 33_001)


@pytest.mark.parametrize("name", ["charbonnier", "gaussian_kl"])
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_sanitized(variant: str, name: str) -> None:
    """Bounds and alignment, and the order of threads."""
    for dtype in ("fp32", "bf16"):
        check_all(variant, questions(name, dtype, FEW))


def test_options() -> None:
    """Parameters and the bound on slopes are numbers of the call."""
    case = BY_LOSS["focal"]
    x, y = case.sample(torch.float32, (300,))
    given = [{}, {"gamma": 2.0}, {"gamma": 0.5, "alpha": 0.9}, {"gamma": 3.0}, {"gamma": 0.0}]
    check_all(
        "plain",
        (
            Question(case, x, y, options=options, clip=clip)
            for options, clip in itertools.product(given, (math.inf, 0.1))
        ),
    )


def test_conditions() -> None:
    """What is not taken never counts; a target of nan is seen."""

    def asked() -> Iterator[Question]:
        for dtype in DTYPES.values():
            x, y = OBSERVED.sample(dtype, (300,))
            y[::3] = math.nan
            for reduction in REDUCTIONS:
                yield Question(OBSERVED, x, y, reduction)

    check_all("plain", asked())


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def gaps(tensor: Tensor) -> Tensor:
    """A slice of a larger tensor, whose other elements are nan."""
    larger = torch.full((tensor.shape[0], tensor.shape[1] + 3), math.nan, dtype=tensor.dtype)
    return larger[:, 2:-1].copy_(tensor)


def same(tensor: Tensor) -> Tensor:
    return tensor


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "both transposed": (transposed, transposed),
    "input transposed": (transposed, same),
    "target with gaps": (same, gaps),
    "both with gaps": (gaps, gaps),
    "target in another dtype": (same, lambda tensor: tensor.float()),
}


@pytest.mark.parametrize("variant", ["plain", "address"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, variant: str) -> None:
    of_input, of_target = LAYOUTS[layout]

    def asked() -> Iterator[Question]:
        case = BY_LOSS["gaussian_kl"]
        for dtype, reduction in itertools.product(("fp64", "fp32", "bf16"), ("none", "mean")):
            x, y = (t.to(DTYPES[dtype]) for t in case.sample(torch.float64, (37, 300)))
            for wants, weight in ((BOTH, None), (OF_TARGET, drawn_weight(x)[:1].expand_as(x))):
                target = of_target(y)
                if dtype != "fp64" or target.dtype is y.dtype:
                    yield Question(case, of_input(x), target, reduction, weight, wants)

    check_all(variant, asked())


@pytest.mark.parametrize("shifts", [(1, 1), (3, 3), (1, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("variant", ["plain", "address"])
def test_unaligned(shifts: tuple[int, int], variant: str) -> None:
    """Memory that begins between two packets: all alike, or input apart."""

    def asked() -> Iterator[Question]:
        for dtype in ("fp32", "bf16"):
            yield from questions("charbonnier", dtype, (1, 2, 3, 5, 300, 20_001))

    check_all(variant, asked(), shifts)


def test_one_weight_of_all_elements() -> None:
    def asked() -> Iterator[Question]:
        case = BY_LOSS["gaussian_kl"]
        for dtype, reduction, wants in itertools.product(DTYPES.values(), REDUCTIONS, WANTS):
            x, y = case.sample(dtype, (33,))
            yield Question(case, x, y, reduction, drawn_weight(x)[0].expand_as(x), wants)

    check_all("plain", asked())
