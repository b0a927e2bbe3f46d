"""A plain training loop: `python examples/plain_loop.py`.

The model holds its loss, and fusedloss.replace() makes it fused, in place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fusedloss


class Classifier(nn.Module):
    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, classes))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.body(x), y)
        return loss


def train(fused: bool, steps: int = 20) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x @ torch.randn(16, 10)).argmax(1)
    model = Classifier(16, 10)
    if fused:
        print("made fused:", *fusedloss.replace(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for theirs, ours in zip(train(fused=False), train(fused=True), strict=True):
        print(f"torch {theirs:.6f}   fused {ours:.6f}")
