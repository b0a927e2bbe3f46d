"""Each example trains on fused operators: as with torch's losses, or to the aim of its custom
loss."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile

import fusedloss
from row_losses import RowCase

EXAMPLES = Path(__file__).parent.parent / "examples"
# What each needs beyond the package itself.
NEEDS = {
    "plain_loop": [],
    "scikit_learn_estimator": ["sklearn"],
    "lightning_trainer": ["lightning"],
    "hugging_face_trainer": ["transformers", "accelerate"],
}

# Examples with custom losses: the losses, and arguments for a quick training.
OWN: dict[str, tuple[list[str], dict[str, int]]] = {
    "asymmetric_forecast": (["bill"], {"splits": 3, "steps": 200}),
    "uncertain_regression": (["nll"], {"splits": 5, "steps": 200}),
    "focal_imbalance": (["focal"], {"splits": 4, "steps": 200}),
    "vae": (["kl_divergence"], {"epochs": 6}),
    "gan": (["non_saturating"], {"steps": 150}),
    "distillation": (["distillation"], {"splits": 3, "steps": 200}),
    "softmax_focal": (["focal"], {"splits": 4, "steps": 100}),
    "dice_segmentation": (["dice"], {"seeds": 2, "steps": 120}),
    "grpo": (["grpo"], {"steps": 60, "seeds": 1}),
}

pytestmark = pytest.mark.usefixtures("compiled")


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, *OWN, "language_model"}


def load(example: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the trainers', about their own settings
@pytest.mark.parametrize("example", NEEDS)
def test_example(example: str) -> None:
    for package in NEEDS[example]:
        pytest.importorskip(package, reason=f"examples/{example}.py needs {package}")
    module = load(example)
    calls, losses = {}, {}
    for fused in (False, True):
        with profile() as profiled:
            losses[fused] = torch.tensor(module.train(fused=fused))
        calls[fused] = sum(
            event.name == "fusedloss::loss_forward" for event in profiled.function_events
        )
    assert calls[False] == 0 and calls[True] >= len(losses[True])
    assert losses[True][-1] < losses[True][0], "it learns"
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-5)


def check_asymmetric_forecast(module: ModuleType, held_out: Any) -> Any:
    (plain, plain_low, plain_rmse), (priced, low, rmse) = (
        module.scores(*held_out[name]) for name in ("mse", "bill")
    )
    assert priced < 0.8 * plain, "what it is for: a smaller bill"
    assert low < 0.7 * plain_low
    assert rmse > plain_rmse, "and what that costs"
    return held_out


def check_uncertain_regression(module: ModuleType, held_out: Any) -> Any:
    plain, own = (module.scores(rows) for rows in held_out.values())
    assert abs(own[1] - 0.8) < 0.06, "the intervals cover what they promise"
    assert abs(own[3] - own[4]) < abs(plain[3] - plain[4]) - 0.05, "for low and high alike"
    assert own[5] < plain[5], "the likelihood, which it was trained for"
    return held_out


def check_focal_imbalance(module: ModuleType, held_out: Any) -> Any:
    plain, focal = (module.scores(held_out[name]) for name in ("bce", "focal"))
    assert focal[0] > plain[0], "recall at a probability of one half"
    assert min(plain[2], focal[2]) > 0.2, "average precision; by chance it is 0.02"
    return held_out


def check_vae(module: ModuleType, trained: Any) -> Any:
    decoder, history = trained
    start, *_, end = map(sum, history)
    assert end < 0.85 * start, "the bound on the likelihood rises"
    assert history[-1][1] < 8 and history[-1][1] > 1, "the code carries something, but not too much"
    return torch.sigmoid(decoder(torch.randn(40, module.CODE))), history


def check_gan(module: ModuleType, trained: Any) -> Any:
    generator, history = trained
    judged, fooled = torch.tensor(history)[-50:].mean(0)
    assert judged < 0.65, "the discriminator does better than by guessing"
    assert 0.5 < fooled < 4, "neither of the two has won"
    samples = generator(torch.randn(200, module.NOISE))
    assert samples.std(0).mean() > 0.1, "the samples differ"
    return samples[:40], history


def check_distillation(module: ModuleType, accuracy: Any) -> Any:
    large, labels, teacher, few_labels, few_teacher = (
        module.scores(a)[0] for a in accuracy.values()
    )
    assert large > max(labels, teacher), "a teacher that knows more"
    assert teacher > labels - 0.05, "its probabilities do for labels"
    assert min(labels, teacher) > max(few_labels, few_teacher) + 0.02
    assert min(few_labels, few_teacher) > 0.6
    return accuracy


def check_softmax_focal(module: ModuleType, held_out: Any) -> Any:
    plain, focal, balanced, both = (module.scores(pairs) for pairs in held_out.values())
    assert abs(focal[2] - plain[2]) < 0.05
    assert min(balanced[1], both[1]) > max(plain[1], focal[1]), "recall of the rare classes"
    assert min(scores[0] for scores in (plain, focal, balanced, both)) > 0.9
    return held_out


def check_dice_segmentation(module: ModuleType, held_out: Any) -> Any:
    plain, both = (module.scores(held) for held in held_out.values())
    assert both[0] > plain[0] + 0.1 and both[0] > 0.3, "intersection over union"
    assert both[2] > plain[2], "pixels that are found"
    return held_out


def check_grpo(module: ModuleType, histories: Any) -> Any:
    start, end = (module.scores(histories, *span) for span in ((0, 5), (-5, None)))
    assert start[0] < 0.1 and end[0] > 0.4, "answers that are right"
    assert end[1] < start[1] - 0.5, "entropy, from the kernel"
    assert start[1] == pytest.approx(math.log(10), abs=0.1)
    assert end[2] > start[2] + 0.1, "probability of what is sampled"
    return histories


@pytest.mark.slow
@pytest.mark.parametrize("example", OWN)
def test_own_loss(example: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason=f"examples/{example}.py needs scikit-learn")
    losses, quick = OWN[example]
    module = load(example)
    with profile() as profiled:
        module.train(**dict.fromkeys(quick, 1))
    names = [event.name for event in profiled.function_events]
    assert "fusedloss::loss_forward" in names
    trained = module.train(**quick)
    drawn = globals()[f"check_{example}"](module, trained)
    for loss in losses:
        custom = getattr(module, loss)
        sample = [torch.ones(2)] * custom.inputs
        if isinstance(custom, fusedloss.custom.RowLoss):
            sample = RowCase(custom, torch.sum, 0).inputs((2,), 3, torch.float32)
        sample[0] = sample[0].clone().requires_grad_()
        assert fusedloss.explain(custom, *sample).fused
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    picture = tmp_path / "picture.png"
    module.draw(*(drawn if isinstance(drawn, tuple) else (drawn,)), picture)
    assert picture.stat().st_size > 5000


@pytest.mark.slow
def test_language_model(tmp_path: Path) -> None:
    module = load("language_model")
    # Few enough tokens for a quick test, in more than one chunk.
    module.WORDS, module.SEQUENCES, module.FEATURES = 2**17, 1, 16
    runs = module.train(steps=8)
    theirs, ours = (torch.tensor(run.losses) for run in runs.values())
    assert theirs[-1] < theirs[0] - 0.05, "it learns"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    logits = 4 * module.CONTEXT * module.WORDS
    assert runs["torch"].bytes > 2 * logits
    assert runs["torch"].bytes - runs["fused"].bytes > 1.2 * logits, "one chunk of them is held"
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    picture = tmp_path / "picture.png"
    module.draw(runs, picture)
    assert picture.stat().st_size > 5000
