"""A small run of every kernel, for compute-sanitizer: `compute-sanitizer python cuda_small.py`.

Other tests check values; this is about memory and races, so nothing else is computed.
"""

from __future__ import annotations

import itertools

import torch

import fusedloss
import fusedloss.functional as FL
from cases import DEVICE, FAMILIES, at_shape
from custom_losses import CASES
from helpers import leaf

# Tails of vectors; rows for a warp, a block and a cluster; classes not innermost.
FLAT = ((1,), (4099,), (33, 130))
CLASSES = ((5, 3), (9, 257), (3, 4099), (2, 70_001), (2, 5, 7))


# One with roots; and one with exponentials and both gradients.
OWN = ("charbonnier", "gaussian_kl")


def own_losses() -> None:
    for case in CASES:
        if case.name not in OWN:
            continue
        for dtype, shape in itertools.product((torch.float32, torch.bfloat16), FLAT):
            x, y = case.sample(dtype, shape)
            thin = x[..., ::2], y[..., ::2]
            for reduction, upstream in itertools.product(("mean", "none"), (1.0, 0.5)):
                for a, b in ((leaf(x), y), (x, leaf(y)), (leaf(x), leaf(y)), map(leaf, thin)):
                    for weight in (None, torch.rand_like(a)):
                        value = case.loss(a, b, reduction=reduction, weight=weight)
                        value.backward(torch.full_like(value, upstream))


def main() -> None:
    with torch.device(DEVICE):
        for family, cases in FAMILIES.items():
            loss = cases[0].loss
            for shape in CLASSES if loss in ("cross_entropy", "log_loss") else FLAT:
                if loss == "log_loss" and len(shape) > 2:
                    continue
                for dtype in (torch.float32, torch.bfloat16):
                    sample = at_shape(family, shape).sample(dtype)
                    for reduction in ("mean", "none"):
                        # An upstream gradient as predicted, and another one.
                        for upstream in (1.0, 0.5):
                            input = leaf(sample.input)
                            value = getattr(FL, loss)(
                                input, sample.target, reduction=reduction, **sample.options
                            )
                            value.backward(torch.full_like(value, upstream))
                    with torch.no_grad():
                        getattr(FL, loss)(sample.input, sample.target, **sample.options)
        own_losses()
    fusedloss.check()
    print(
        f"ran {len(FAMILIES)} families and {len(OWN)} custom losses on {DEVICE}, {fusedloss.info().backends}"
    )


if __name__ == "__main__":
    main()
