"""Few pixels to find: `python examples/dice_segmentation.py`.

Each image is one of scikit-learn's digits, dim, at a random place of a large noisy canvas; the mask is its
pixels, one in fifty-five. A small convolutional network is trained with binary cross-entropy of the pixels, and
with the Dice loss added, for which a row is all pixels of an image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from fusedloss import math as fm

SIZE = 32


@fusedloss.row_loss
def dice(logit, mask, *, smooth=1.0):
    p = fm.sigmoid(logit)
    return 1 - (2 * fm.sum(p * mask) + smooth) / (fm.sum(p) + fm.sum(mask) + smooth)


def both(logit: Tensor, mask: Tensor) -> Tensor:
    return FL.binary_cross_entropy_with_logits(logit, mask) + dice(
        logit.flatten(1), mask.flatten(1)
    )


LOSSES = {"BCE": FL.binary_cross_entropy_with_logits, "BCE + Dice": both}


def images(count: int, digits: Tensor) -> tuple[Tensor, Tensor]:
    """Canvases and masks."""
    mask, canvas = torch.zeros(count, SIZE, SIZE), torch.zeros(count, SIZE, SIZE)
    chosen = torch.randint(len(digits), (count,))
    for i, (row, column) in enumerate(torch.randint(SIZE - 8, (count, 2)).tolist()):
        place = (i, slice(row, row + 8), slice(column, column + 8))
        canvas[place] = digits[chosen[i]]
        mask[place] = (digits[chosen[i]] > 0.5).float()
    return canvas + 0.4 * torch.randn_like(canvas), mask


def fit(loss: str, digits: Tensor, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 8), (8, 1)):
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU()]
    network = nn.Sequential(*layers[:-1], nn.Flatten(1, 2))  # of the one channel
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(steps):
        x, mask = images(16, digits)
        optimizer.zero_grad()
        LOSSES[loss](network(x[:, None]), mask).backward()
        optimizer.step()
    return network.requires_grad_(False)


Held = list[tuple[Tensor, Tensor, Tensor]]


def train(seeds: int = 4, steps: int = 250) -> dict[str, Held]:
    """Canvases, probabilities and masks of digits that were held out, for each seed, by loss."""
    pixels = torch.tensor(load_digits().images / 16).float()
    held_out: dict[str, Held] = {name: [] for name in LOSSES}
    for seed in range(seeds):
        for name in LOSSES:
            network = fit(name, pixels[:1200], steps, seed)
            torch.manual_seed(1000 + seed)
            x, mask = images(200, pixels[1200:])
            held_out[name].append((x, torch.sigmoid(network(x[:, None])), mask))
    return held_out


def scores(held: Held) -> tuple[float, float, float]:
    """Intersection over union at a probability of one half, its standard deviation over the seeds, and the
    share of the masks' pixels that was found."""
    found = [(p > 0.5, mask == 1) for _, p, mask in held]
    iou = [((p & m).sum() / (p | m).sum()).item() for p, m in found]
    recall = [((p & m).sum() / m.sum()).item() for p, m in found]
    return float(np.mean(iou)), float(np.std(iou, ddof=1)), float(np.mean(recall))


def draw(held_out: dict[str, Held], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 5), layout="constrained")
    canvas, _, mask = next(iter(held_out.values()))[0]
    columns = {"image": canvas, "mask": mask} | {name: h[0][1] for name, h in held_out.items()}
    for axes, (row, (name, values)) in zip(
        figure.subplots(2, len(columns)).flat, ((r, c) for r in (0, 1) for c in columns.items()), strict=True
    ):  # fmt: skip
        axes.imshow(values[row].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(title="" if row else name, xticks=[], yticks=[])
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    out = parser.parse_args().out
    sample = torch.zeros(2, SIZE**2, requires_grad=True), torch.zeros(2, SIZE**2)
    print("dice:", fusedloss.explain(dice, *sample))
    results = train()
    for name, held in results.items():
        print("{:12} IoU {:.3f} +- {:.3f}, {:.1%} of the pixels found".format(name, *scores(held)))
    draw(results, out / "dice_segmentation.png")
