"""The CUDA engines over the emulator, against fp64: every case, dtype, reduction and pass.

What hardware alone can show is not asked here: speed, and its own exp and log.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import formulas
from build import VARIANTS, build
from cases import DTYPES, FAMILIES, REDUCTIONS, Case, Sample, at_shape
from engines import RUNNER, SOURCES, Calls, Loss
from helpers import assert_close_to_truth, assert_same_bits, draw_upstream, drawn, result_shape


@cache
def program(variant: str) -> Path:
    return build([*SOURCES, RUNNER], variant)


class Ways:
    """One loss by every way that leads to it; all must give the same bits."""

    def __init__(
        self, calls: Calls, loss: str, sample: Sample, reduction: str, shift: int = 0
    ) -> None:
        self.loss, self.sample, self.reduction = loss, sample, reduction
        self.upstream = draw_upstream(result_shape(loss, sample, reduction), sample.input.dtype)
        u = 1.0 if reduction == "none" else self.upstream.item()

        def way(*prediction: float) -> Loss:
            return Loss(calls, loss, sample, reduction, prediction, shift)  # type: ignore[arg-type]

        # (upstream, confidence) before, and as backward shall leave them.
        self.ways = {
            "predicted": (way(u, 2), [u, 3]),
            "mispredicted": (way(u + 1, 3), [u, 2]),
            "not trusted": (way(u, 1), [u, 2]),
            "fresh": (way(u, 3), [u, 3]),
        }
        self.value = way(u, 3)
        self.value.value()
        for name, (loss_, _) in self.ways.items():
            loss_.forward()
            loss_.backward(self.upstream, fresh=name == "fresh")

    def check(self, elements: formulas.Elements, what: str) -> None:
        truth = formulas.reduce(elements, self.reduction, self.upstream)
        value = self.value.value_found()
        gradient = self.ways["predicted"][0].gradient_found()
        assert_close_to_truth(value, truth.value, truth.value_scale, f"{what} value")
        assert_close_to_truth(gradient, truth.grad, truth.grad_scale, f"{what} gradient")
        for name, (way, prediction) in self.ways.items():
            assert_same_bits(way.value_found(), value, f"{what} value, {name}")
            assert_same_bits(way.gradient_found(), gradient, f"{what} gradient, {name}")
            if self.reduction != "none":
                assert way.prediction_found() == prediction, f"{what} {name}"
            assert way.calls.fault(way.fault)[0] == 0, f"{what} {name}"


def check_all(
    variant: str,
    questions: Sequence[tuple[str, Sample, formulas.Elements, str]],
    reductions: Sequence[str] = REDUCTIONS,
    shift: int = 0,
) -> None:
    """One run of the program for all of them."""
    calls = Calls()
    asked = [
        (Ways(calls, loss, sample, reduction, shift), elements, f"{what} {reduction}")
        for (loss, sample, elements, what) in questions
        for reduction in reductions
    ]
    calls.run(program(variant))
    for ways, elements, what in asked:
        ways.check(elements, what)


def question(case: Case, dtype: str) -> tuple[str, Sample, formulas.Elements, str]:
    sample, elements = drawn(case, DTYPES[dtype])
    return case.loss, sample, elements, f"{case.name} {dtype}"


def cases_of(family: str, most: int) -> list[Case]:
    """Those not empty, which no engine is asked for, nor larger."""
    return [case for case in FAMILIES[family] if 0 < math.prod(case.shape) <= most]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values(family: str, dtype: str) -> None:
    check_all("plain", [question(c, dtype) for c in cases_of(family, 1 << 20)])


@pytest.mark.parametrize("variant", ["address", "thread"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sanitized(family: str, variant: str) -> None:
    """Nothing out of bounds, misaligned or unordered."""
    questions = [question(case, "fp32") for case in cases_of(family, 1 << 20)]
    questions += [question(case, "bf16") for case in cases_of(family, 1 << 13)]
    check_all(variant, questions, ["mean"])
    check_all(variant, questions[1::3], ["none"])
