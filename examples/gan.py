"""A generative adversarial network of digits: `python examples/gan.py`.

The discriminator trains on binary cross-entropy with logits, the generator on the non-saturating
loss, a custom loss of one line.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from fusedloss import math as fm

NOISE = 16


@fusedloss.pointwise_loss
def non_saturating(input, target):
    """-log D where the label is real (1), -log(1 - D) where it is fake (0)."""
    return fm.softplus((1 - 2 * target) * input)


def layers(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, outputs),
    )


def train(steps: int = 2000, batch: int = 128) -> tuple[nn.Module, list[tuple[float, float]]]:
    """The generator, its weights averaged over the last steps, and each step's losses: the
    discriminator's and the generator's."""
    torch.manual_seed(0)
    pixels = torch.tensor(load_digits().data / 8 - 1).float()
    generator = layers(NOISE, 64).append(nn.Tanh())
    discriminator = layers(64, 1).append(nn.Flatten(0))
    mean = deepcopy(generator).requires_grad_(False)
    rates = {"lr": 5e-4, "betas": (0.5, 0.99)}
    of_generator = torch.optim.Adam(generator.parameters(), **rates)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), **rates)
    real, labels = torch.ones(batch), torch.cat([torch.full((batch,), 0.9), torch.zeros(batch)])
    history = []
    for _ in range(steps):
        fakes = generator(torch.randn(batch, NOISE))
        both = torch.cat([pixels[torch.randint(len(pixels), (batch,))], fakes.detach()])
        both += 0.1 * torch.randn_like(both)
        judged = FL.binary_cross_entropy_with_logits(discriminator(both), labels)
        of_discriminator.zero_grad()
        judged.backward()
        of_discriminator.step()

        fooled = non_saturating(discriminator(fakes + 0.1 * torch.randn_like(fakes)), real)
        of_generator.zero_grad()
        fooled.backward()
        of_generator.step()
        for average, weight in zip(mean.parameters(), generator.parameters(), strict=True):
            average.lerp_(weight.detach(), 0.005)
        history.append((judged.item(), fooled.item()))
    return mean, history


def draw(samples: Tensor, history: list[tuple[float, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    image, curves = figure.subplots(1, 2)
    grid = nn.functional.pad(samples.view(5, 8, 8, 8), (0, 1, 0, 1))
    image.imshow(
        grid.permute(0, 2, 1, 3).reshape(5 * 9, 8 * 9).numpy(), cmap="gray_r", vmin=-1, vmax=1
    )
    image.set_axis_off()
    image.set_title("samples")
    smooth = torch.tensor(history).unfold(0, 50, 50).mean(2)
    for name, values in zip(("discriminator", "generator"), smooth.T.tolist(), strict=True):
        curves.plot(range(0, 50 * len(values), 50), values, label=name)
    curves.set(xlabel="step", ylabel="loss, mean of 50 steps", ylim=(0, None))
    curves.legend(frameon=False)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    out = parser.parse_args().out
    sample = torch.zeros(2, requires_grad=True), torch.ones(2)
    print("generator:", fusedloss.explain(non_saturating, *sample))
    print("discriminator:", fusedloss.explain(FL.binary_cross_entropy_with_logits, *sample))
    generator, history = train()
    for step in (0, len(history) // 2, len(history) - 1):
        print("step {:5}: discriminator {:.2f}, generator {:.2f}".format(step, *history[step]))
    draw(generator(torch.randn(40, NOISE)), history, out / "gan.png")
