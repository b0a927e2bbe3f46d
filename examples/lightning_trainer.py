"""Lightning: `pip install 'fusedloss[examples]'`, then `python examples/lightning_trainer.py`.

A LightningModule is a module like any other: fusedloss.replace() finds its losses.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusedloss


class Autoencoder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 12))
        self.criterion = nn.MSELoss()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        loss: Tensor = self.criterion(self.body(x), x)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(fused: bool, steps: int = 12) -> list[float]:
    """The loss of every step."""
    lightning.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(192, 12))
    model = Autoencoder()
    if fused:
        print("made fused:", *fusedloss.replace(model))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=32))
    return model.losses


if __name__ == "__main__":
    for theirs, ours in zip(train(fused=False), train(fused=True), strict=True):
        print(f"torch {theirs:.6f}   fused {ours:.6f}")
