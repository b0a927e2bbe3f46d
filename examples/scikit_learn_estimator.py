"""An estimator in a scikit-learn pipeline: `python examples/scikit_learn_estimator.py`.

The estimator calls torch.nn.functional.huber_loss and is not changed: fusedloss.patch() makes that
call fused while the pipeline is fitted.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.datasets import load_diabetes
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import fusedloss


class NetworkRegressor(RegressorMixin, BaseEstimator):
    """A small network behind fit() and predict()."""

    def __init__(self, hidden: int = 32, rate: float = 0.1, epochs: int = 20) -> None:
        self.hidden = hidden
        self.rate = rate
        self.epochs = epochs

    def fit(self, X: Any, y: Any) -> NetworkRegressor:
        torch.manual_seed(0)
        x, target = torch.tensor(X).float(), torch.tensor(y).float()
        self.scale_ = target.mean()
        self.network_ = nn.Sequential(
            nn.Linear(x.shape[1], self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1), nn.Flatten(0)
        )
        optimizer = torch.optim.SGD(self.network_.parameters(), lr=self.rate)
        self.losses_ = []
        for _ in range(self.epochs):
            optimizer.zero_grad()
            loss = F.huber_loss(self.network_(x), target / self.scale_, delta=0.5)
            loss.backward()
            optimizer.step()
            self.losses_.append(loss.item())
        return self

    def predict(self, X: Any) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(self.network_(torch.tensor(X).float()) * self.scale_)


def train(fused: bool) -> list[float]:
    """The loss of every epoch."""
    X, y = load_diabetes(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), NetworkRegressor())
    with fusedloss.patch() if fused else nullcontext():
        pipeline.fit(X, y)
    print(f"R2 {pipeline.score(X, y):.6f}")
    return pipeline[-1].losses_


if __name__ == "__main__":
    for theirs, ours in zip(train(fused=False), train(fused=True), strict=True):
        print(f"torch {theirs:.6f}   fused {ours:.6f}")
