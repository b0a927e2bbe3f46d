"""One loss by every way that leads to it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engines import Loss
from helpers import assert_same_bits


class Ways:
    """All must give the same bits. ``make`` queues nothing; it is given a prediction."""

    def __init__(self, make: Callable[[tuple[float, float]], Loss], upstream: Tensor) -> None:
        self.upstream = upstream
        self.value = make((1.0, 3.0))
        self.value.value()
        u = 1.0 if self.value.each else upstream.item()
        # (upstream, confidence) before, and as backward shall leave them.
        self.ways = {
            "predicted": (make((u, 2)), [u, 3]),
            "mispredicted": (make((u + 1, 3)), [u, 2]),
            "not trusted": (make((u, 1)), [u, 2]),
            "fresh": (make((u, 3)), [u, 3]),
        }
        for name, (loss, _) in self.ways.items():
            loss.forward()
            loss.backward(upstream, fresh=name == "fresh")

    def results(self, what: str) -> tuple[Tensor, list[Tensor]]:
        """The value and the gradients."""
        value = self.value.value_found()
        gradients = self.ways["predicted"][0].gradients_found()
        for name, (way, prediction) in self.ways.items():
            assert_same_bits(way.value_found(), value, f"{what} value, {name}")
            for mine, expected in zip(way.gradients_found(), gradients, strict=True):
                assert_same_bits(mine, expected, f"{what} gradient, {name}")
            if not way.each:
                assert way.prediction_found() == prediction, f"{what} {name}"
            assert way.calls.fault(way.fault)[0] == 0, f"{what} {name}"
        return value, gradients
