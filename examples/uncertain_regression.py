"""Regression that predicts its own uncertainty: `python examples/uncertain_regression.py`.

A small network predicts the mean and the logarithm of the variance of scikit-learn's diabetes data,
whose noise is larger where the target is. The custom loss is the likelihood of a normal
distribution, and has a gradient for both. Predicted intervals should cover what they promise, on
rows that were not trained on and for small and large predictions alike. It is compared with the mean
squared error and one variance for all rows.
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

NOMINAL = (0.5, 0.8, 0.9)
Rows = tuple[Tensor, Tensor, Tensor]  # mean and standard deviation, and what was measured


@fusedloss.pointwise_loss
def nll(mean, target, logvar):
    """The negative log-likelihood of N(mean, exp(logvar)), without its constant."""
    return 0.5 * (logvar + (target - mean) ** 2 * fm.exp(-logvar))


def fit(x: Tensor, y: Tensor, steps: int, own_variance: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        mean, logvar = model(x).unbind(1)
        loss = nll(mean, y, logvar) if own_variance else FL.mse_loss(mean, y)
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def train(splits: int = 20, steps: int = 150) -> dict[str, Rows]:
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
    """Which rows lie in the predicted interval."""
    mean, deviation, truth = rows
    width = torch.special.ndtri(torch.tensor((1 + nominal) / 2))
    return (truth - mean).abs() <= width * deviation


def scores(rows: Rows) -> dict[str, float]:
    """The share of rows in the interval of 80 % for the lower and the upper half of the predictions,
    each interval's share of all, the negative log-likelihood, and the root mean squared error."""
    mean, deviation, truth = rows
    low = mean < mean.median()
    inside = covered(rows, 0.8).float()
    return {
        **{f"{nominal:.0%}": covered(rows, nominal).float().mean().item() for nominal in NOMINAL},
        "low": inside[low].mean().item(),
        "high": inside[~low].mean().item(),
        "nll": -torch.distributions.Normal(mean, deviation).log_prob(truth).mean().item(),
        "RMSE": (mean - truth).square().mean().sqrt().item(),
    }


if __name__ == "__main__":
    import time
    for steps in (50,100,150,300):
        t=time.time(); r=train(20,steps); print(steps, time.time()-t)
        for n,v in r.items(): print(n,{k:round(q,3) for k,q in scores(v).items()})
