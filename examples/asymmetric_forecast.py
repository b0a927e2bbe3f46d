"""Forecasting where too little costs more than too much: `python examples/asymmetric_forecast.py`.

Running out of stock costs UNDER times as much as a left-over. The target of scikit-learn's diabetes
data stands in for a demand: a linear model forecasts it from ten features, on 20 random splits. The
custom loss is the bill itself. It is compared with the mean squared error, and with the mean
squared error plus a constant safety margin, the best one on the training data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from fusedloss import math as fm

UNDER = 5.0


@fusedloss.pointwise_loss
def bill(input, target, *, under=UNDER):
    return fm.maximum(under * (target - input), input - target)


LOSSES = {"mse": FL.mse_loss, "bill": bill}


def fit(loss: str, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 1), nn.Flatten(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSSES[loss](model(x), y).backward()
        optimizer.step()
    return model.requires_grad_(False)


def train(splits: int = 20, steps: int = 300) -> dict[str, tuple[Tensor, Tensor]]:
    """Forecast and truth of all held-out rows, by method."""
    features, target = load_diabetes(return_X_y=True)
    x = torch.tensor(features / features.std(0)).float()
    y = torch.tensor(target / 100).float()
    held_out: dict[str, list[tuple[Tensor, Tensor]]] = {"mse": [], "mse + margin": [], "bill": []}
    for split in range(splits):
        rows, others = train_test_split(np.arange(len(y)), test_size=0.3, random_state=split)
        plain, priced = (fit(loss, x[rows], y[rows], steps) for loss in LOSSES)
        margin = torch.quantile(y[rows] - plain(x[rows]), UNDER / (UNDER + 1))
        held_out["mse"].append((plain(x[others]), y[others]))
        held_out["mse + margin"].append((plain(x[others]) + margin, y[others]))
        held_out["bill"].append((priced(x[others]), y[others]))
    return {
        name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in held_out.items()
    }


def scores(forecast: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """The mean bill, the share of forecasts that are too low, and the root mean squared error."""
    return (
        bill(forecast, truth).item(),
        (forecast < truth).float().mean().item(),
        (forecast - truth).square().mean().sqrt().item(),
    )


def draw(held_out: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    points, errors = figure.subplots(1, 2)
    colours = {"mse": "tab:orange", "bill": "tab:blue"}
    for name, colour in colours.items():
        forecast, truth = held_out[name]
        points.scatter(truth[:400], forecast[:400], s=6, alpha=0.6, color=colour, label=name)
        errors.hist(forecast - truth, 60, histtype="step", lw=1.8, color=colour, label=name)
    points.axline((0.25, 0.25), slope=1, color="black", lw=1)
    points.set(xlabel="truth", ylabel="forecast", title="held-out rows: below the line is too low")
    errors.axvline(0, color="black", lw=1)
    errors.set(xlabel="forecast - truth", ylabel="rows", title=f"too low costs {UNDER:g} times")
    for axes in (points, errors):
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
    print(f"{'held out':14}{'bill':>8}{'too low':>10}{'RMSE':>8}")
    for name, pair in results.items():
        cost, low, rmse = scores(*pair)
        print(f"{name:14}{cost:8.3f}{low:10.1%}{rmse:8.3f}")
    draw(results, out / "asymmetric_forecast.png")
