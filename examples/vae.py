"""A variational autoencoder of digits: `python examples/vae.py`.

The reconstruction is binary cross-entropy with logits. The divergence of the code from the standard
normal distribution is a custom loss of one line, with gradients for both arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from fusedloss import math as fm

CODE = 8


@fusedloss.pointwise_loss
def kl_divergence(input, target):
    """The divergence of N(input, exp(target)) from N(0, 1): mean and logarithm of the variance."""
    return 0.5 * (input**2 + fm.expm1(target) - target)


def train(epochs: int = 100) -> tuple[nn.Module, list[tuple[float, float]]]:
    """The decoder, and each epoch's reconstruction and divergence, in nats per digit."""
    torch.manual_seed(0)
    pixels = torch.tensor(load_digits().data / 16).float()
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * CODE))
    decoder = nn.Sequential(nn.Linear(CODE, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    history = []
    for _ in range(epochs):
        sums = torch.zeros(2)
        for x in pixels[torch.randperm(len(pixels))].split(128):
            mu, log_variance = encoder(x).chunk(2, dim=1)
            code = mu + (0.5 * log_variance).exp() * torch.randn_like(mu)
            parts = torch.stack(
                [
                    FL.binary_cross_entropy_with_logits(decoder(code), x, reduction="sum"),
                    kl_divergence(mu, log_variance, reduction="sum"),
                ]
            )
            optimizer.zero_grad()
            (parts.sum() / len(x)).backward()
            optimizer.step()
            sums += parts.detach()
        reconstruction, divergence = (sums / len(pixels)).tolist()
        history.append((reconstruction, divergence))
    return decoder.requires_grad_(False), history


def draw(samples: Tensor, history: list[tuple[float, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    image, curves = figure.subplots(1, 2)
    grid = nn.functional.pad(samples.view(5, 8, 8, 8), (0, 1, 0, 1), value=0.5)
    image.imshow(
        grid.permute(0, 2, 1, 3).reshape(5 * 9, 8 * 9).numpy(), cmap="gray_r", vmin=0, vmax=1
    )
    image.set_axis_off()
    image.set_title("samples")
    for name, values in zip(
        ("reconstruction", "divergence"), zip(*history, strict=True), strict=True
    ):
        curves.plot(values, label=name)
    curves.set(xlabel="epoch", ylabel="nats per digit", ylim=(0, None))
    curves.legend(frameon=False)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    out = parser.parse_args().out
    sample = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    print("divergence:", fusedloss.explain(kl_divergence, *sample))
    print(
        "reconstruction:",
        fusedloss.explain(FL.binary_cross_entropy_with_logits, sample[0], torch.ones(2)),
    )
    decoder, history = train()
    for epoch in (0, len(history) // 2, len(history) - 1):
        print("epoch {:4}: reconstruction {:.2f}, divergence {:.2f}".format(epoch, *history[epoch]))
    draw(torch.sigmoid(decoder(torch.randn(40, CODE))), history, out / "vae.png")
