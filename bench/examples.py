"""The results of the examples on docs/examples.md: `python -m bench examples`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import report
from .arguments import add_out, command

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(example: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asymmetric_forecast(module: ModuleType, **quick: int) -> dict[str, Any]:
    scores = {name: module.scores(*pair) for name, pair in module.train(**quick).items()}
    (plain, _, plain_rmse), (priced, _, rmse) = scores["mse"], scores["bill"]
    names = {
        "mse": "mean squared error",
        "mse + margin": "the same, and a constant margin",
        "bill": "the bill as the loss",
    }
    return {
        "rows": [
            {"held out": names[name], "bill": bill, "too low": low, "RMSE": rmse}
            for name, (bill, low, rmse) in scores.items()
        ],
        "bill lowered": 1 - priced / plain,
        "RMSE raised": rmse / plain_rmse - 1,
    }


def focal_imbalance(module: ModuleType, **quick: int) -> dict[str, Any]:
    names = {"bce": "binary cross-entropy", "focal": "focal"}
    results: dict[str, Any] = {}
    for activation in (nn.Tanh, nn.ReLU):
        held_out = module.train(**quick, activation=activation)
        results[activation.__name__] = [
            {
                "held out": names[name],
                **dict(zip(("recall", "precision", "AP", "error"), scores, strict=True)),
            }
            for name, scores in ((name, module.scores(pairs)) for name, pairs in held_out.items())
        ]
    return results


def vae(module: ModuleType, **quick: int) -> dict[str, Any]:
    _, history = module.train(**quick)
    names = ("reconstruction", "divergence")
    return {
        "epochs": len(history),
        "first": dict(zip(names, history[0], strict=True)),
        "last": dict(zip(names, history[-1], strict=True)),
    }


def gan(module: ModuleType, **quick: int) -> dict[str, Any]:
    _, history = module.train(**quick)
    names = ("discriminator", "generator")
    return {"steps": len(history), "last": dict(zip(names, history[-1], strict=True))}


def uncertain_regression(module: ModuleType, **quick: int) -> dict[str, Any]:
    columns = ("in 50%", "in 80%", "in 90%", "low in 80%", "high in 80%", "NLL", "RMSE")
    return {
        "rows": [
            {"held out": name, **dict(zip(columns, module.scores(rows), strict=True))}
            for name, rows in module.train(**quick).items()
        ]
    }


def distillation(module: ModuleType, **quick: int) -> dict[str, Any]:
    return {
        "rows": [
            {
                "learnt from": name,
                **dict(zip(("accuracy", "spread"), module.scores(each), strict=True)),
            }
            for name, each in module.train(**quick).items()
        ]
    }


def softmax_focal(module: ModuleType, **quick: int) -> dict[str, Any]:
    columns = ("frequent", "rare", "macro F1", "error")
    return {
        "rows": [
            {"recall": name, **dict(zip(columns, module.scores(pairs), strict=True))}
            for name, pairs in module.train(**quick).items()
        ]
    }


def dice_segmentation(module: ModuleType, **quick: int) -> dict[str, Any]:
    return {
        "rows": [
            {
                "loss": name,
                **dict(zip(("IoU", "spread", "found"), module.scores(held), strict=True)),
            }
            for name, held in module.train(**quick).items()
        ]
    }


def grpo(module: ModuleType, **quick: int) -> dict[str, Any]:
    histories = module.train(**quick)
    steps = len(histories[0])
    return {
        "rows": [
            {
                "steps": f"{first} to {last}",
                **dict(
                    zip(
                        ("right", "entropy", "probability"),
                        module.scores(histories, first, last),
                        strict=True,
                    )
                ),
            }
            for first, last in ((k * steps // 5, (k + 1) * steps // 5) for k in range(5))
        ]
    }


def language_model(module: ModuleType, **quick: int) -> dict[str, Any]:
    return {
        "rows": [
            {"loss": name, **dict(zip(("last", "ms", "MiB"), module.scores(run), strict=True))}
            for name, run in module.train(**quick).items()
        ]
    }


MEASURE: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        *(asymmetric_forecast, uncertain_regression, focal_imbalance, vae, gan),
        *(distillation, softmax_focal, dice_segmentation, grpo),
        language_model,
    )
}
# A check of the code, instead of a whole training.
QUICK = {
    "asymmetric_forecast": {"splits": 1, "steps": 5},
    "uncertain_regression": {"splits": 1, "steps": 5},
    "focal_imbalance": {"splits": 2, "steps": 5},
    "vae": {"epochs": 2},
    "gan": {"steps": 2},
    "distillation": {"splits": 2, "steps": 5},
    "softmax_focal": {"splits": 2, "steps": 5},
    "dice_segmentation": {"seeds": 2, "steps": 2},
    "grpo": {"seeds": 1, "steps": 5},
    "language_model": {"steps": 1},
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench examples",
        description="Run the examples with custom losses, and write their results as JSON.",
    )
    parser.add_argument("--quick", action="store_true", help="hardly trained: a check, no result")
    add_out(parser)
    arguments = parser.parse_args(argv)
    results: dict[str, Any] = {}
    threads = torch.get_num_threads()
    # So small models gain nothing from threads, and would wait for them on a busy machine.
    torch.set_num_threads(1)
    try:
        for name in tqdm(MEASURE, unit="example", disable=None):
            start = time.perf_counter()
            results[name] = MEASURE[name](load(name), **(QUICK[name] if arguments.quick else {}))
            results[name]["seconds"] = time.perf_counter() - start
        about = report.environment(command("examples", *argv), rounds=1)
    finally:
        torch.set_num_threads(threads)
    if arguments.quick:
        about["caveat"] = "A check with --quick: hardly trained."
    path = report.folder(arguments, "cpu") / "examples.json"
    path.write_text(json.dumps({**about, **results}, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    print(f"wrote {path}")
    return 0
