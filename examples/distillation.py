"""A large model teaches a small one: `python examples/distillation.py`.

scikit-learn's digits, half of them held out. The teacher, with ninety times the student's weights, has
seen the labels of the other half. A student learns from labels or from the teacher's probabilities, of
all the digits or of only 100. Each split has a teacher, and students that start from the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from fusedloss import math as fm

FEW = 100


@fusedloss.row_loss
def distillation(student, teacher, *, T=1.0):
    q = fm.log_softmax(teacher / T)
    return T**2 * fm.sum(fm.exp(q) * (q - fm.log_softmax(student / T)))


def mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    network = nn.Sequential()
    for inputs, outputs in pairwise(sizes):
        network.extend([nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)])
    return network[:-2]


def fit(
    network: nn.Module, x: Tensor, steps: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> nn.Module:
    """The loss takes logits, and the rows that they are of."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (100,))
        optimizer.zero_grad()
        loss(network(x[rows]), rows).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def train(splits: int = 10, steps: int = 600) -> dict[str, list[float]]:
    """The accuracy on what was held out of each split, by model."""
    pixels, digits = load_digits(return_X_y=True)
    accuracy: dict[str, list[float]] = {}
    for split in range(splits):
        x, held_x, y, held_y = (
            torch.tensor(part)
            for part in train_test_split(
                np.float32(pixels / 16), digits, test_size=0.5, random_state=split, stratify=digits
            )
        )

        def labels(logits: Tensor, rows: Tensor, y: Tensor = y) -> Tensor:
            return FL.cross_entropy(logits, y[rows])

        torch.manual_seed(split)
        large = fit(mlp(64, 256, 256, 10, dropout=0.3), x, steps, labels)
        teacher = large(x)

        def taught(logits: Tensor, rows: Tensor, teacher: Tensor = teacher) -> Tensor:
            return distillation(logits, teacher[rows], T=2.0)

        models = {"the large model": large}
        for count, of in ((len(x), "all digits"), (FEW, f"{FEW} digits")):
            for name, loss in (("labels", labels), ("teacher", taught)):
                torch.manual_seed(split)
                models[f"{name} of {of}"] = fit(mlp(64, 12, 10), x[:count], steps, loss)
        for name, model in models.items():
            right = (model(held_x).argmax(1) == held_y).double().mean().item()
            accuracy.setdefault(name, []).append(right)
    return accuracy


def scores(accuracy: list[float]) -> tuple[float, float]:
    """Mean, and standard deviation over the splits."""
    return float(np.mean(accuracy)), float(np.std(accuracy, ddof=1))


def draw(accuracy: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    axes = figure.subplots()
    for place, each in enumerate(accuracy.values()):
        axes.plot(each, np.full(len(each), place), "o", alpha=0.5)
        axes.plot(np.mean(each), place, "|", color="black", ms=20)
    axes.set_yticks(range(len(accuracy)), accuracy)
    axes.set(xlabel="accuracy on held-out digits, by split; bar: mean")
    axes.invert_yaxis()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    out = parser.parse_args().out
    sample = torch.zeros(2, 10, requires_grad=True), torch.zeros(2, 10)
    print("distillation:", fusedloss.explain(distillation, *sample))
    results = train()
    for name, each in results.items():
        print("{:24}{:7.1%} +- {:.1%}".format(name, *scores(each)))
    draw(results, out / "distillation.png")
