"""Whole training steps, with torch's losses and with ours: `python -m bench models`.

The worth of a faster loss depends on the model around it, so the loss's share of the step comes
first: where it is small, there is nothing to gain.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fusedloss

from . import report
from .arguments import add_out, command
from .measure import BLOCK_SECONDS, interleave, quantiles
from .memory import resident

ROUNDS, QUICK_ROUNDS = 11, 3
# Freed memory goes back to the system at once: what glibc keeps differs from run to run by more
# than the losses do.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
# Training magnifies roundings; this is far above their effect in a few steps.
SAME = 1e-3


@dataclass(frozen=True)
class Sizes:
    """Sizes of the models: a step takes a CPU a second, or a GPU a tenth of one."""

    vocabulary: int
    width: int
    context: int
    texts: int
    image: int
    images: int
    users: int
    items: int
    samples: int


SIZES = {
    "cpu": Sizes(8192, 128, 128, 8, 128, 4, 256, 8192, 256),
    "cuda": Sizes(32768, 512, 512, 16, 512, 16, 4096, 32768, 4096),
    "quick": Sizes(512, 32, 16, 2, 32, 1, 16, 512, 32),
}


@dataclass(frozen=True)
class Training:
    """A model, a batch and a loss."""

    model: nn.Module
    input: Tensor
    target: Tensor


# ---- the models ---------------------------------------------------------------------------------


def words(vocabulary: int, length: int) -> Tensor:
    """The docstrings of Python's own library, as numbers of their most frequent words."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                found += re.findall(r"\w+|[^\w\s]", ast.get_docstring(node) or "")
        if len(found) >= 100 * length:
            break
    common = [word for word, _ in Counter(found).most_common(vocabulary - 1)]
    number = {word: i for i, word in enumerate(common, start=1)}  # 0: a rare word
    return torch.tensor([number.get(word, 0) for word in found[:length]])


class GPT(nn.Module):
    """Two blocks of a decoder, random weights."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Parameter(0.02 * torch.randn(sizes.context, sizes.width))
        block = nn.TransformerEncoderLayer(
            sizes.width, 4, 4 * sizes.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(sizes.context)
        self.register_buffer("mask", mask)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.words(tokens) + self.places, mask=self.mask, is_causal=True)
        logits: Tensor = self.head(hidden).flatten(0, 1)
        return logits


def gpt(sizes: Sizes) -> Training:
    length = sizes.texts * sizes.context
    text = words(sizes.vocabulary, length + 1)
    text = text.repeat(-(-(length + 1) // len(text)))[: length + 1]
    return Training(GPT(sizes), text[:-1].view(sizes.texts, sizes.context), text[1:])


def segmentation(sizes: Sizes) -> Training:
    """Discs of 20 kinds on a background, distinguished by colour."""
    classes, edge = 21, sizes.image
    axis = torch.arange(edge)
    image = torch.zeros(sizes.images, 3, edge, edge)
    target = torch.zeros(sizes.images, edge, edge, dtype=torch.int64)
    colours = torch.rand(classes, 3)
    for i in range(sizes.images):
        for kind in torch.randint(1, classes, (8,)).tolist():
            y, x = torch.randint(edge, (2,)).tolist()
            disc = (axis[:, None] - y) ** 2 + (axis - x) ** 2 < (edge // 6) ** 2
            target[i][disc] = kind
            image[i][:, disc] = colours[kind][:, None]
    image += 0.1 * torch.randn_like(image)

    def block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(inside, outside, 3, stride, padding=1)
        return nn.Sequential(convolution, nn.GroupNorm(4, outside), nn.ReLU())

    model = nn.Sequential(
        block(3, 16),
        block(16, 32, 2),
        block(32, 32),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        block(32, 16),
        nn.Conv2d(16, classes, 1),
    )
    return Training(model, image, target)


class Factors(nn.Module):
    """Scores of all items for some users."""

    def __init__(self, sizes: Sizes, rank: int = 32) -> None:
        super().__init__()
        self.users = nn.Embedding(sizes.users, rank)
        self.items = nn.Parameter(torch.randn(sizes.items, rank))

    def forward(self, users: Tensor) -> Tensor:
        scores: Tensor = self.users(users) @ self.items.t()
        return scores


def recommender(sizes: Sizes) -> Training:
    """Who bought what, from a matrix of low rank."""
    taste = torch.randn(sizes.users, 8) @ torch.randn(8, sizes.items)
    bought = (taste > 4).float()
    return Training(Factors(sizes), torch.arange(sizes.users), bought)


def autoencoder(sizes: Sizes) -> Training:
    """scikit-learn's digits."""
    digits = torch.tensor(load_digits().data / 16).float()
    digits = digits.repeat(-(-sizes.samples // len(digits)), 1)[: sizes.samples]
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 16)]
    layers += [nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 64)]
    return Training(nn.Sequential(*layers), digits, digits)


@dataclass(frozen=True)
class Model:
    title: str
    loss: str
    build: Callable[[Sizes], Training]


MODELS = {
    "gpt": Model("small GPT on docstrings", "CrossEntropyLoss", gpt),
    "segmentation": Model("segmentation net", "CrossEntropyLoss", segmentation),
    "recommender": Model("matrix-factorisation recommender", "BCEWithLogitsLoss", recommender),
    "autoencoder": Model("autoencoder on digits", "MSELoss", autoencoder),
}
CONTESTANTS = ("torch", "ours")


# ---- measuring ----------------------------------------------------------------------------------


class Steps:
    """Steps of one model with one loss: the whole step, and the loss alone."""

    def __init__(self, model: Model, contestant: str, device: str, sizes: Sizes) -> None:
        torch.manual_seed(0)
        training = model.build(sizes)
        self.model = training.model.to(device)
        self.input, self.target = training.input.to(device), training.target.to(device)
        package = torch.nn if contestant == "torch" else fusedloss
        self.loss = getattr(package, model.loss)()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.device = device
        with self.precision(), torch.no_grad():
            self.output = self.model(self.input)
        self.output.requires_grad_()

    def precision(self) -> AbstractContextManager[Any]:
        """Mixed precision on a GPU, as is usual there."""
        if self.device == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def step(self) -> Tensor:
        self.optimiser.zero_grad()
        with self.precision():
            value: Tensor = self.loss(self.model(self.input), self.target)
        value.backward()
        self.optimiser.step()
        return value.detach()

    def loss_alone(self) -> Tensor:
        self.output.grad = None
        with self.precision():
            value: Tensor = self.loss(self.output, self.target)
        value.backward()
        return value.detach()


def sizes_for(device: str, quick: bool) -> Sizes:
    return SIZES["quick" if quick else device]


def peak(name: str, contestant: str, device: str, quick: bool) -> int:
    """Peak bytes of training, beyond model and data, in a new process."""
    steps = Steps(MODELS[name], contestant, device, sizes_for(device, quick))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
    for _ in range(3):
        steps.step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return resident("VmHWM") - before


def peak_elsewhere(name: str, contestant: str, device: str, quick: bool) -> int:
    command = [sys.executable, "-m", "bench.models", "--peak", name, contestant]
    command += ["--device", device, *(["--quick"] if quick else [])]
    done = subprocess.run(
        command,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **GIVE_BACK},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()[-300:]}")
    return int(done.stdout)


def _spread(of: list[float], over: list[float]) -> dict[str, float]:
    low, median, high = quantiles(of, over)
    return {"low": low, "median": median, "high": high}


def measure(name: str, device: str, quick: bool, rounds: int, block: float) -> dict[str, Any]:
    model = MODELS[name]
    sizes = sizes_for(device, quick)
    steps = {c: Steps(model, c, device, sizes) for c in CONTESTANTS}
    values = [[float(s.step()) for _ in range(3)] for s in steps.values()]
    apart = max(abs(a - b) / abs(a) for a, b in zip(*values, strict=True))
    if not apart <= SAME:
        raise RuntimeError(f"{name}: the losses of torch and ours are {apart:.1e} apart")
    seconds = interleave(
        {
            **{f"{c} step": s.step for c, s in steps.items()},
            **{f"{c} loss": s.loss_alone for c, s in steps.items()},
        },
        rounds,
        block,
    )
    return {
        "name": name,
        "title": model.title,
        "loss_class": model.loss,
        "output": list(steps["ours"].output.shape),
        "parameters": sum(p.numel() for p in steps["ours"].model.parameters()),
        "losses_apart": apart,
        "share": _spread(seconds["torch loss"], seconds["torch step"]),
        "step": _spread(seconds["torch step"], seconds["ours step"]),
        "loss": _spread(seconds["torch loss"], seconds["ours loss"]),
        "samples": seconds,
        "memory": {c: peak_elsewhere(name, c, device, quick) for c in CONTESTANTS},
    }


# ---- reporting ----------------------------------------------------------------------------------


def _cell(ratio: Mapping[str, float], form: str = ".2f") -> str:
    return f"{ratio['median']:{form}} ({ratio['low']:{form}} to {ratio['high']:{form}})"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    body = [
        [
            result["title"],
            "x".join(map(str, result["output"])),
            _cell(result["share"], ".1%"),
            _cell(result["loss"]),
            _cell(result["step"]),
            *(f"{result['memory'][c] / 2**20:.0f}" for c in CONTESTANTS),
        ]
        for result in results
    ]
    headers = ["model", "output", "loss, share of torch's step", "loss, torch / ours"]
    headers += ["whole step, torch / ours", "peak MiB, torch", "peak MiB, ours"]
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence about what ours gains in that model."""
    step = result["step"]
    if step["low"] > 1:
        return f"{result['title']}: the step is {step['median']:.2f} times as fast."
    if step["high"] < 1:
        return f"{result['title']}: the step is SLOWER, {step['median']:.2f} times as fast."
    return (
        f"{result['title']}: no difference that this run can tell; the loss is "
        f"{result['share']['median']:.1%} of the step."
    )


def plot(results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(12, 1.8 + 0.7 * len(results)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    figure.suptitle(
        f"A training step with torch's loss and with fusedloss's\n{report.where(about)}"
    )
    places = range(len(results))
    shares = [100 * result["share"]["median"] for result in results]
    bars = axes[0].barh(places, shares, color="0.6")
    axes[0].bar_label(bars, fmt="{:.1f} %".format, padding=3)
    axes[0].set_xlabel("share of torch's loss in torch's step")
    axes[0].xaxis.set_major_formatter(PercentFormatter(100))
    for key, label, colour, offset in (
        ("loss", "the loss alone", "tab:cyan", -0.2),
        ("step", "the whole step", "tab:blue", 0.2),
    ):
        medians = [result[key]["median"] for result in results]
        error = [
            [result[key]["median"] - result[key]["low"] for result in results],
            [result[key]["high"] - result[key]["median"] for result in results],
        ]
        at = [place + offset for place in places]
        bars = axes[1].barh(at, medians, 0.38, xerr=error, color=colour, label=label)
        axes[1].bar_label(bars, fmt="{:.2f}".format, padding=6, fontsize=8)
    axes[1].axvline(1, color="black", lw=1)
    axes[1].set_xlabel("times as fast with fusedloss")
    axes[1].legend(fontsize=8)
    for contestant, colour, offset in (("torch", "0.6", -0.2), ("ours", "tab:blue", 0.2)):
        sizes = [result["memory"][contestant] / 2**20 for result in results]
        at = [place + offset for place in places]
        bars = axes[2].barh(at, sizes, 0.38, color=colour, label=contestant)
        axes[2].bar_label(bars, fmt="{:.0f}".format, padding=3, fontsize=8)
    axes[2].set_xlabel("peak memory of training, MiB")
    axes[2].legend(fontsize=8)
    axes[0].set_yticks(places, [result["title"] for result in results])
    axes[0].invert_yaxis()
    for axis in axes:
        axis.margins(x=0.18)
    return figure


def write(results: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path) -> list[Path]:
    paths = [folder / f"models.{kind}" for kind in ("md", "json", "png")]
    verdicts = "\n".join(f"- {verdict(result)}" for result in results)
    warning = f"**{about['caveat']}**\n\n" if about["caveat"] else ""
    paths[0].write_text(
        "# Whole training steps\n\n"
        f"{warning}![Training steps](models.png)\n\n{table(results)}\n\n{verdicts}\n\n"
        "A step is forward, loss, backward and AdamW, of models with random weights; ratios are "
        "medians over interleaved rounds, with the 20 % and 80 % quantiles. The loss alone is its "
        "forward and backward over the model's output. Memory is beyond model and data, each "
        "contestant in a process of its own.\n\n"
        f"{report.facts(about)}\n"
    )
    paths[1].write_text(json.dumps({**about, "models": results}, indent=1) + "\n")
    plot(results, about).savefig(paths[2], dpi=110)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench models",
        description="Train small models with torch's losses and with ours, and measure the whole "
        "step: time, the share of it that is the loss, and peak memory.",
        epilog="The exit status is 1 if the two trainings differ by more than rounding.",
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: a check, no measurement")
    parser.add_argument("--only", choices=MODELS, nargs="+", metavar="MODEL", default=list(MODELS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default: {ROUNDS}")
    add_out(parser)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "CONTESTANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device, quick = arguments.device, arguments.quick
    if arguments.peak:
        print(peak(*arguments.peak, device, quick))
        return 0

    rounds = arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    block = BLOCK_SECONDS / 10 if quick else BLOCK_SECONDS
    results = []
    progress = tqdm(arguments.only, unit="model", disable=None)
    for name in progress:
        progress.set_description(name)
        try:
            results.append(measure(name, device, quick, rounds, block))
        except RuntimeError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    about = report.environment(command("models", *argv), rounds, device)
    if quick:
        about["caveat"] = "A check of tiny models with --quick: no measurement of anything."
    print(f"\n{table(results)}\n")
    print(about["caveat"] if quick else "\n".join(map(verdict, results)))
    for path in write(results, about, report.folder(arguments, device)):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
