"""Focal loss where one sample in fifty is positive: `python examples/focal_imbalance.py`.

Is the digit an eight? The data are scikit-learn's digits, with most eights left out so that they
are 2 %, in training and held out alike. A small network is trained on 20 random splits, with the
focal loss and with binary cross-entropy. Average precision does not depend on the threshold;
precision and recall do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    precision_score,
    recall_score,
)
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from fusedloss import math as fm


@fusedloss.pointwise_loss
def focal(input, target, *, alpha=0.75, gamma=2.0):
    logit = (2 * target - 1) * input  # of the true class
    balance = alpha * target + (1 - alpha) * (1 - target)
    return -balance * fm.sigmoid(-logit) ** gamma * fm.log_sigmoid(logit)


LOSSES = {"bce": FL.binary_cross_entropy_with_logits, "focal": focal}


def fit(loss: str, x: Tensor, y: Tensor, steps: int, activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 1), nn.Flatten(0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSSES[loss](network(x), y).backward()
        optimizer.step()
    return network.requires_grad_(False)


def train(
    splits: int = 20, steps: int = 400, activation: type[nn.Module] = nn.Tanh
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Logits and truth of the held-out rows of each split, by loss."""
    pixels, digit = load_digits(return_X_y=True)
    held_out: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in LOSSES}
    for split in range(splits):
        eights = np.random.default_rng(split).permutation(np.flatnonzero(digit == 8))
        others = np.flatnonzero(digit != 8)
        kept = np.concatenate([others, eights[: len(others) // 49]])
        x = torch.tensor(pixels[kept] / 16).float()
        y = torch.tensor(digit[kept] == 8).float()
        rows, rest = train_test_split(
            np.arange(len(y)), test_size=0.5, random_state=split, stratify=y
        )
        for name in LOSSES:
            network = fit(name, x[rows], y[rows], steps, activation)
            held_out[name].append((network(x[rest]), y[rest]))
    return held_out


def scores(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float, float, float]:
    """Recall and precision at probability 0.5, average precision, and its standard error over the
    splits."""
    each = np.array(
        [
            (
                recall_score(truth, logits > 0),
                precision_score(truth, logits > 0, zero_division=0),
                average_precision_score(truth, logits),
            )
            for logits, truth in pairs
        ]
    )
    return (*each.mean(0), each[:, 2].std(ddof=1) / len(each) ** 0.5)


def draw(held_out: dict[str, list[tuple[Tensor, Tensor]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    curve, histogram = figure.subplots(1, 2)
    for (name, pairs), colour in zip(held_out.items(), ("tab:orange", "tab:blue"), strict=True):
        logits, truth = map(torch.cat, zip(*pairs, strict=True))
        precision, recall, threshold = precision_recall_curve(truth, logits)
        curve.plot(recall, precision, color=colour, label=name)
        half = np.searchsorted(threshold, 0)
        curve.plot(recall[half], precision[half], "o", color=colour)
        eights = torch.sigmoid(logits[truth == 1])
        histogram.hist(
            eights, np.linspace(0, 1, 21), histtype="step", lw=1.8, color=colour, label=name
        )
    curve.set(xlabel="recall", ylabel="precision", title="all splits; dot: probability 0.5")
    histogram.set(xlabel="probability given to a held-out eight", ylabel="eights")
    for axes in (curve, histogram):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    out = parser.parse_args().out
    sample = torch.zeros(2, requires_grad=True), torch.ones(2)
    for name, loss in LOSSES.items():
        print(f"{name}: {fusedloss.explain(loss, *sample)}")
    results = train()
    print(f"{'held out':10}{'recall':>8}{'precision':>11}{'AP':>8}")
    for name, pairs in results.items():
        recall, precision, ap, error = scores(pairs)
        print(f"{name:10}{recall:8.1%}{precision:11.1%}{ap:8.3f} +- {error:.3f}")
    draw(results, out / "focal_imbalance.png")
