"""The table of losses in fusedloss/_losses.py, and every other place that lists them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import fusedloss.functional as FL
from cases import LOSSES as TESTED
from fusedloss import backends, second_order
from fusedloss._losses import LOSSES, OPERATORS, Loss


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_arguments(loss: Loss) -> None:
    """Those of the public function and of the reference, in order. (Options that torch's function lacks
    take keywords alone.)"""
    public = inspect.signature(getattr(FL, loss.name)).parameters.values()
    by_place = tuple(p.name for p in public if p.kind is not p.KEYWORD_ONLY)
    assert by_place == loss.arguments
    assert set(inspect.signature(loss.reference).parameters) >= set(loss.arguments)


def test_every_loss_is_tested() -> None:
    assert set(TESTED) == set(LOSSES)


def test_the_compiled_table(compiled: str) -> None:
    theirs: dict[str, dict[str, Any]] = backends.extension.losses()
    assert set(theirs) - set(OPERATORS) == {theirs["log_loss"]["of_classes"]}
    assert set(OPERATORS) <= set(theirs)
    for name, (loss, is_variant) in OPERATORS.items():
        found = theirs[name]
        # The dtype's eps is a number of log_loss, and no argument.
        assert found["parameters"] == len(loss.parameters) + (name == "log_loss"), name
        assert bool(found["of_classes"]) == loss.over_classes, name
        more = is_variant and loss.variant == "pos_weight"
        assert found["inputs"] == loss.inputs + more, name
        assert found["gradients"] + found["symmetric"] == loss.gradients, name


def test_the_table_of_triton(compiled: str) -> None:
    pytest.importorskip("triton")
    from fusedloss.backends.triton.losses import POINTWISE

    theirs: dict[str, dict[str, Any]] = backends.extension.losses()
    for name, loss in POINTWISE.items():
        assert theirs[name]["mean"] == loss.mean, name
        assert theirs[name]["parameters"] == loss.parameters, name
    elementwise = {name for name in OPERATORS if theirs[name]["family"] == "pointwise"}
    assert set(POINTWISE) == elementwise


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_has_it(name: str) -> None:
    x = torch.rand(3, 4)
    loss, is_variant = OPERATORS[name]
    more = [torch.ones(4)] if is_variant and loss.variant == "pos_weight" else []
    more += [torch.ones(3, 4)] * (loss.inputs - 2)
    parameters = {"cross_entropy": [0.1], "log_loss": [1e-7]}.get(
        name, [1.0] * len(loss.parameters)
    )
    value = second_order.reference_value(
        name, x, x.softmax(1), None, more, parameters, -100, "mean"
    )
    assert value.dim() == 0


def test_the_reference_has_no_other() -> None:
    with pytest.raises(ValueError, match="no loss is named 'mse'"):
        second_order.reference_value("mse", torch.ones(1), torch.ones(1), None, [], [], 0, "mean")
