"""Regression that predicts its own uncertainty: `python examples/uncertain_regression.py`.

A linear model of scikit-learn's diabetes data predicts mean and log-variance of the target, whose
errors are larger where it is. The custom loss, the likelihood of a normal distribution, has a
gradient for both. Intervals should cover what they promise, on rows that were held out, and for low
and high predictions alike. They are compared with those of the mean squared error and one variance
for all rows.
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

Rows = tuple[Tensor, Tensor, Tensor]  # mean and standard deviation, and what was measured


@fusedloss.pointwise_loss
def nll(mean, target, logvar):
    """The negative log-likelihood of N(mean, exp(logvar)), without its constant."""
    return 0.5 * (logvar + (target - mean) ** 2 * fm.exp(-logvar))


def fit(x: Tensor, y: Tensor, steps: int, own_variance: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        mean, logvar = model(x).unbind(1)
        loss = nll(mean, y, logvar) if own_variance else FL.mse_loss(mean, y)
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def train(splits: int = 20, steps: int = 200) -> dict[str, Rows]:
    """The predictions for all held-out rows, by method."""
    features, target = load_diabetes(return_X_y=True)
    x = torch.tensor(features / features.std(0)).float()
    y = torch.tensor(target / 100).float()
    held_out: dict[str, list[Rows]] = {"one variance": [], "own variance": []}
    for split in range(splits):
        rows, others = train_test_split(np.arange(len(y)), test_size=0.3, random_state=split)
        plain, own = (fit(x[rows], y[rows], steps, wanted) for wanted in (False, True))
        mean = plain(x[others])[:, 0]
        spread = (plain(x[rows])[:, 0] - y[rows]).std().expand_as(mean)
        held_out["one variance"].append((mean, spread, y[others]))
        mean, logvar = own(x[others]).unbind(1)
        held_out["own variance"].append((mean, (logvar / 2).exp(), y[others]))
    return {name: tuple(map(torch.cat, zip(*all, strict=True))) for name, all in held_out.items()}


def covered(rows: Rows, nominal: float) -> Tensor:
    """Which rows lie in their interval."""
    mean, deviation, truth = rows
    width = torch.special.ndtri(torch.tensor((1 + nominal) / 2))
    return (truth - mean).abs() <= width * deviation


def scores(rows: Rows) -> tuple[float, ...]:
    """The shares of rows in their intervals of 50, 80 and 90 %; that of 80 % for the lower and for the
    upper half of the predictions; the negative log-likelihood, and the root mean squared error."""
    mean, deviation, truth = rows
    low, inside = mean < mean.median(), covered(rows, 0.8).float()
    return (
        *(covered(rows, nominal).float().mean().item() for nominal in (0.5, 0.8, 0.9)),
        inside[low].mean().item(),
        inside[~low].mean().item(),
        -torch.distributions.Normal(mean, deviation).log_prob(truth).mean().item(),
        (mean - truth).square().mean().sqrt().item(),
    )


def draw(held_out: dict[str, Rows], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    intervals, coverage = figure.subplots(1, 2)
    mean, deviation, truth = (t[:132] for t in held_out["own variance"])
    order = mean.argsort()
    at = torch.arange(len(order))
    for nominal, alpha in ((0.9, 0.15), (0.5, 0.3)):
        width = torch.special.ndtri(torch.tensor((1 + nominal) / 2)) * deviation[order]
        band = mean[order] - width, mean[order] + width
        intervals.fill_between(
            at, *band, color="tab:blue", alpha=alpha, lw=0, label=f"{nominal:.0%}"
        )
    intervals.plot(at, mean[order], color="tab:blue", lw=1)
    intervals.scatter(at, truth[order], s=6, color="black", zorder=3)
    intervals.set(xlabel="held-out row, by its mean", ylabel="target", title="predicted intervals")
    nominal = torch.linspace(0.05, 0.95, 19)
    for (name, rows), colour in zip(held_out.items(), ("tab:orange", "tab:blue"), strict=True):
        low = rows[0] < rows[0].median()
        for half, style, which in ((low, "--", "low"), (~low, "-", "high")):
            shares = [covered(rows, q)[half].float().mean() for q in nominal.tolist()]
            label = f"{name}, {which} predictions"
            coverage.plot(nominal, shares, style, color=colour, lw=1.5, label=label)
    coverage.axline((0, 0), slope=1, color="black", lw=1)
    coverage.set(xlabel="promised", ylabel="share of rows inside", title="coverage")
    for axes in (intervals, coverage):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    out = parser.parse_args().out
    sample = torch.zeros(2, requires_grad=True), torch.ones(2), torch.zeros(2)
    print(f"nll: {fusedloss.explain(nll, *sample)}")
    results = train()
    columns = ("in 50%", "80%", "90%", "low 80%", "high 80%")
    print("held out      " + "".join(f"{c:>10}" for c in (*columns, "NLL", "RMSE")))
    for name, rows in results.items():
        *shares, likelihood, rmse = scores(rows)
        cells = "".join(f"{share:10.1%}" for share in shares)
        print(f"{name:14}{cells}{likelihood:10.3f}{rmse:10.3f}")
    draw(results, out / "uncertain_regression.png")
