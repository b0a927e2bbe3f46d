"""Focal loss over ten classes, half of them rare: `python examples/softmax_focal.py`.

scikit-learn's digits. In training the digits 5 to 9 have a twentieth of their rows, and held out all of
them. A small network is trained on 20 random splits, with cross-entropy and with the focal loss of a row,
each with and without a balance of the classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score, recall_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from fusedloss import math as fm

RARE = 5  # the digits from here on


@fusedloss.row_loss
def focal(logits, label: fm.Label, balance: fm.PerClass, *, gamma=2.0):
    other = fm.at(fm.one_minus_softmax(logits), label)
    return -fm.at(balance, label) * other**gamma * fm.at(fm.log_softmax(logits), label)


def balanced(y: Tensor) -> Tensor:
    """A number for each class: rare ones count more, and all together as much as without."""
    counts = torch.bincount(y, minlength=10)
    return len(y) / (10 * counts)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": FL.cross_entropy,
    "focal": lambda logits, y: focal(logits, y, torch.ones(10)),
    "cross-entropy, balanced": lambda logits, y: FL.cross_entropy(logits, y, balanced(y)),
    "focal, balanced": lambda logits, y: focal(logits, y, balanced(y)),
}
Predicted = list[tuple[Tensor, Tensor]]


def fit(loss: str, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSSES[loss](network(x), y).backward()
        optimizer.step()
    return network.requires_grad_(False)


def train(splits: int = 20, steps: int = 200) -> dict[str, Predicted]:
    """Predicted and true digits of the held-out rows of each split, by loss."""
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16).float(), torch.tensor(digits)
    held_out: dict[str, Predicted] = {name: [] for name in LOSSES}
    for split in range(splits):
        rows, rest = train_test_split(
            np.arange(len(y)), test_size=0.5, random_state=split, stratify=digits
        )
        rare = rows[digits[rows] >= RARE]
        rows = np.concatenate([rows[digits[rows] < RARE], rare[: len(rare) // 20]])
        for name in LOSSES:
            network = fit(name, x[rows], y[rows], steps)
            held_out[name].append((network(x[rest]).argmax(1), y[rest]))
    return held_out


def recalls(pairs: Predicted) -> np.ndarray:
    """By split and digit."""
    return np.array([recall_score(truth, found, average=None) for found, truth in pairs])


def scores(pairs: Predicted) -> tuple[float, float, float, float]:
    """Recall of the frequent and of the rare digits, macro F1, and its standard error over the splits."""
    each = recalls(pairs)
    f1 = np.array([f1_score(truth, found, average="macro") for found, truth in pairs])
    error = f1.std(ddof=1) / len(f1) ** 0.5
    return each[:, :RARE].mean(), each[:, RARE:].mean(), f1.mean(), error


def draw(held_out: dict[str, Predicted], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    axes = figure.subplots()
    for place, (name, pairs) in enumerate(held_out.items()):
        each = recalls(pairs)
        error = each.std(0, ddof=1) / len(each) ** 0.5
        axes.bar(np.arange(10) + 0.2 * place - 0.3, each.mean(0), 0.2, yerr=error, label=name)
    axes.axvline(RARE - 0.5, color="grey", ls=":")
    axes.set(xlabel="digit; from 5 on they are rare", ylabel="recall, held out", xticks=range(10))
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    out = parser.parse_args().out
    sample = torch.zeros(2, 10, requires_grad=True), torch.zeros(2).long(), torch.ones(10)
    print("focal:", fusedloss.explain(focal, *sample))
    results = train()
    print(f"{'held out':25}{'frequent':>10}{'rare':>8}{'macro F1':>10}")
    for name, pairs in results.items():
        frequent, rare, f1, error = scores(pairs)
        print(f"{name:25}{frequent:10.1%}{rare:8.1%}{f1:10.3f} +- {error:.3f}")
    draw(results, out / "softmax_focal.png")
