"""A language model that never holds its logits: `python examples/language_model.py`.

A small GPT learns the source of Python's standard library, word by word, with a vocabulary of 20,000. It is
trained twice from the same start on the same text: with torch's loss, which gets the logits of all tokens,
and with linear_cross_entropy, which gets the hidden states and the weight that would make them. The losses
are the same; memory and time are measured, step by step in turn.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import fusedloss
import fusedloss.functional as FL

WORDS, CONTEXT, SEQUENCES = 20_000, 128, 8
FEATURES, LAYERS, HEADS = 128, 2, 4


def on_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), target.flatten())


def without_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = FL.linear_cross_entropy(hidden, weight, target)
    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch": on_logits,
    "fused": without_logits,
}


def text() -> Tensor:
    """The words of the standard library's modules as numbers; 0 is a rare word."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    source = "\n".join(file.read_text(errors="ignore") for file in files)
    words = re.findall(r"\w+|[^\w\s]|\n", source)
    frequent = Counter(words).most_common(WORDS - 1)
    number = {word: place for place, (word, _) in enumerate(frequent, 1)}
    return torch.tensor([number.get(word, 0) for word in words])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.mix = nn.Linear(FEATURES, 3 * FEATURES)
        self.out = nn.Linear(FEATURES, FEATURES)
        self.mlp = nn.Sequential(
            nn.Linear(FEATURES, 4 * FEATURES), nn.GELU(), nn.Linear(4 * FEATURES, FEATURES)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mix(self.before(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        seen = F.scaled_dot_product_attention(*parts.unbind(2), is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    """Makes hidden states; the weight of its words is that of the logits too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, FEATURES)
        self.places = nn.Parameter(torch.zeros(CONTEXT, FEATURES))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(FEATURES))
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        hidden: Tensor = self.blocks(self.words(words) + self.places)
        return hidden


class Run:
    """A training with one loss: the loss and the seconds of each step, and the most bytes that torch
    allocates in a step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.bytes = 0


def peak(step: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    results = profiled.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    level = most = 0
    for _, change in sorted(changes):
        level += change
        most = max(most, level)
    return most


def train(steps: int = 50) -> dict[str, Run]:
    words = text()
    runs: dict[str, Run] = {}
    models, optimizers = {}, {}
    for name in LOSSES:
        torch.manual_seed(0)
        runs[name], models[name] = Run(), GPT()
        optimizers[name] = torch.optim.AdamW(models[name].parameters(), lr=2e-3)

    def step(name: str, batch: Tensor) -> float:
        model = models[name]
        loss = LOSSES[name](model(batch[:, :-1]), model.words.weight, batch[:, 1:])
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        return loss.item()

    generator = torch.Generator().manual_seed(0)
    for count in range(steps):
        starts = torch.randint(len(words) - CONTEXT, (SEQUENCES, 1), generator=generator)
        batch = words[starts + torch.arange(CONTEXT + 1)]
        for name in list(LOSSES)[:: 1 if count % 2 else -1]:  # each comes first half of the time
            begin = time.perf_counter()
            runs[name].losses.append(step(name, batch))
            runs[name].seconds.append(time.perf_counter() - begin)
    for name, run in runs.items():
        run.bytes = peak(lambda name=name: step(name, batch))
    return runs


def scores(run: Run) -> tuple[float, float, float]:
    """The loss of the last steps, milliseconds of a step and MiB of a step."""
    last = run.losses[-10:]
    return sum(last) / len(last), 1e3 * median(run.seconds), run.bytes / 2**20


def draw(runs: dict[str, Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    curve, steps, memory = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for (name, run), style in zip(runs.items(), ("-", ":"), strict=True):
        curve.plot(run.losses, style, lw=3, label=name)
    curve.set(xlabel="step", title="loss of a word")
    curve.legend()
    found = [scores(run) for run in runs.values()]
    steps.bar(list(runs), [milliseconds for _, milliseconds, _ in found], color=["C0", "C1"])
    steps.set(title="ms of a step, median", ylim=(0, None))
    memory.bar(list(runs), [mebibytes for _, _, mebibytes in found], color=["C0", "C1"])
    memory.set(title="MiB that a step allocates", ylim=(0, None))
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    out = parser.parse_args().out
    sample = torch.zeros(2, FEATURES, requires_grad=True), torch.zeros(WORDS, FEATURES)
    path = fusedloss.explain(FL.linear_cross_entropy, *sample, torch.zeros(2, dtype=torch.int64))
    print("linear_cross_entropy:", path)
    results = train()
    for name, run in results.items():
        print("{:8}loss {:.4f}   step {:.0f} ms, {:.0f} MiB".format(name, *scores(run)))
    draw(results, out / "language_model.png")
