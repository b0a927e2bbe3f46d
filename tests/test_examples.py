"""Each example trains as with torch's losses, and on the fused operators."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler import profile

EXAMPLES = Path(__file__).parent.parent / "examples"
# What each needs beyond the package itself, and the operator that its loss becomes.
NEEDS = {
    "plain_loop": ([], "cross_entropy_forward"),
    "scikit_learn_estimator": (["sklearn"], "pointwise_forward"),
    "lightning_trainer": (["lightning"], "pointwise_forward"),
    "hugging_face_trainer": (["transformers", "accelerate"], "cross_entropy_forward"),
}

pytestmark = pytest.mark.usefixtures("compiled")


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the trainers', about their own settings
@pytest.mark.parametrize("example", NEEDS)
def test_example(example: str) -> None:
    packages, operator = NEEDS[example]
    for package in packages:
        pytest.importorskip(package, reason=f"examples/{example}.py needs {package}")
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls, losses = {}, {}
    for fused in (False, True):
        with profile() as profiled:
            losses[fused] = torch.tensor(module.train(fused=fused))
        calls[fused] = sum(
            event.name == f"fusedloss::{operator}" for event in profiled.function_events
        )
    assert calls[False] == 0 and calls[True] >= len(losses[True])
    assert losses[True][-1] < losses[True][0], "it learns"
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-5)
