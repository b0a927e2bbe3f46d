"""Train on real data with torch.nn's losses and with ours: `python -m bench.demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from tabulate import tabulate
from torch import Tensor, nn

import fusedloss

from .arguments import add_out
from .cases import Loss
from .measure import interleave, quantiles
from .report import caveat, folder

ROUNDS = 15


@dataclass(frozen=True)
class Data:
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    score: str


@dataclass(frozen=True)
class Task:
    title: str
    loss: str
    data: Callable[[], Data]
    outputs: int
    batch: int
    epochs: int
    rate: float


@dataclass(frozen=True)
class Training:
    curve: list[float]  # mean training loss of each epoch
    score: float  # accuracy or R2 on the test set


def digits() -> Data:
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=0.25, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = map(torch.tensor, parts)
    return Data((x_train.float(), y_train), (x_test.float(), y_test), "accuracy")


def diabetes() -> Data:
    x, y = load_diabetes(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y[:, None], test_size=0.25, random_state=0
    )
    # Scaled by the training part only, so that the test part stays unseen.
    of_x, of_y = StandardScaler().fit(x_train), StandardScaler().fit(y_train)

    def scaled(x: Any, y: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor(of_x.transform(x)).float(), torch.tensor(of_y.transform(y)).float()

    return Data(scaled(x_train, y_train), scaled(x_test, y_test), "R2")


TASKS = (
    Task("digits, cross-entropy", "CrossEntropyLoss", digits, 10, 128, 30, 0.1),
    Task("diabetes, MSE", "MSELoss", diabetes, 1, 64, 30, 0.01),
    Task("diabetes, MAE", "L1Loss", diabetes, 1, 64, 30, 0.01),
)


def in_double(loss: Loss) -> Loss:
    """The same loss, with other roundings."""
    return lambda x, t: loss(x.double(), t.double() if t.is_floating_point() else t)


def make_model(task: Task, data: Data) -> nn.Module:
    torch.manual_seed(0)
    features = data.train[0].shape[1]
    # A smooth activation: at the kink of a ReLU, training magnifies a rounding a thousandfold.
    return nn.Sequential(nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, task.outputs))


def train(task: Task, data: Data, loss: Loss) -> Training:
    model = make_model(task, data)
    optimiser = torch.optim.SGD(model.parameters(), lr=task.rate, momentum=0.9)
    x, y = data.train
    order = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(task.epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=order).split(task.batch):
            optimiser.zero_grad()
            value = loss(model(x[rows]), y[rows])
            value.backward()
            optimiser.step()
            total += value.item() * len(rows)
        curve.append(total / len(x))
    with torch.no_grad():
        output = model(data.test[0])
    if data.score == "accuracy":
        score = accuracy_score(data.test[1], output.argmax(1))
    else:
        score = r2_score(data.test[1], output)
    return Training(curve, float(score))


def difference(a: Training, b: Training) -> list[float]:
    return [abs(u - v) for u, v in zip(a.curve, b.curve, strict=True)]


def rounding(plain: Training, control: Training) -> float:
    """How far rounding alone can move two curves apart.

    It is measured, since training magnifies roundings: ten times the distance to a control, in
    which torch.nn's own loss runs in float64, and at least a few float32 roundings of the curve.
    """
    return max(10 * max(difference(control, plain)), 1e-6 * max(plain.curve))


def time_steps(task: Task, data: Data, plain: Loss, ours: Loss) -> tuple[float, float, float]:
    """How many times as fast ours makes the loss step and the whole training step; and the
    share of torch.nn's loss step in the latter."""
    model = make_model(task, data)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = (part[: task.batch] for part in data.train)
    output = model(x).detach().requires_grad_()

    def loss_step(loss: Loss) -> Callable[[], None]:
        def step() -> None:
            output.grad = None
            loss(output, y).backward()

        return step

    def training_step(loss: Loss) -> Callable[[], None]:
        def step() -> None:
            optimiser.zero_grad()
            loss(model(x), y).backward()
            optimiser.step()

        return step

    seconds = interleave(
        {
            "plain loss": loss_step(plain),
            "our loss": loss_step(ours),
            "plain training": training_step(plain),
            "our training": training_step(ours),
        },
        ROUNDS,
    )

    def ratio(of: str, over: str) -> float:
        return quantiles(seconds[of], seconds[over])[1]

    return (
        ratio("plain loss", "our loss"),
        ratio("plain training", "our training"),
        ratio("plain loss", "plain training"),
    )


def plot(
    results: Sequence[tuple[Task, Training, Training, float]],
) -> Figure:
    figure = Figure(figsize=(4.6 * len(results), 6), layout="constrained")
    title = "The same training with torch.nn's loss and with fusedloss's"
    figure.suptitle(f"{title}\n{caveat()}" if caveat() else title)
    rows = figure.subplots(2, len(results), sharex="col", squeeze=False, height_ratios=(2, 1))
    for curve, gap, (task, plain, ours, allowed) in zip(*rows, results, strict=True):
        epochs = range(1, task.epochs + 1)
        curve.set_title(task.title)
        curve.plot(epochs, plain.curve, color="tab:orange", lw=6, alpha=0.5, label="torch.nn")
        curve.plot(epochs, ours.curve, color="tab:blue", lw=1.5, label="fusedloss")
        curve.set_ylabel("training loss")
        curve.legend()
        gap.plot(epochs, difference(ours, plain), ".-", color="tab:blue", label="difference")
        # logarithmic, with room for an exact zero
        gap.set_yscale("symlog", linthresh=1e-9)
        gap.set_ylim(0, 30 * allowed)
        gap.axhline(allowed, color="tab:red", ls="--", label="what rounding explains")
        gap.set_xlabel("epoch")
        gap.set_ylabel("difference of the two")
        gap.legend(fontsize=8)
    return figure


def run(task: Task) -> tuple[Training, Training, float]:
    """Run both trainings and print the results, with the difference that rounding explains."""
    data = task.data()
    plain, ours = getattr(nn, task.loss)(), getattr(fusedloss, task.loss)()
    torch_run, our_run = train(task, data, plain), train(task, data, ours)
    allowed = rounding(torch_run, train(task, data, in_double(plain)))
    gaps = difference(our_run, torch_run)
    shown = sorted({0, 1, 4, 9, 19, task.epochs - 1} & set(range(task.epochs)))
    table = tabulate(
        [
            (i + 1, f"{torch_run.curve[i]:.6f}", f"{our_run.curve[i]:.6f}", f"{gaps[i]:.1e}")
            for i in shown
        ],
        ["epoch", f"torch.nn.{task.loss}", f"fusedloss.{task.loss}", "difference"],
        tablefmt="github",
        disable_numparse=True,
    )
    loss_ratio, training_ratio, share = time_steps(task, data, plain, ours)
    rows = min(task.batch, len(data.train[0]))
    print(
        f"{task.title}\n{table}\n"
        f"largest difference of the curves: {max(gaps):.1e} (rounding explains {allowed:.1e})\n"
        f"{data.score} on the test set: torch.nn {torch_run.score:.4f}, "
        f"fusedloss {our_run.score:.4f}\n"
        f"loss step (forward + backward of the loss, {rows}x{task.outputs} outputs): "
        f"{loss_ratio:.2f} times as fast as torch.nn's\n"
        f"whole training step, of which torch.nn's loss step is {share:.0%}: "
        f"{training_ratio:.2f} times as fast\n"
    )
    return torch_run, our_run, allowed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description="Train on scikit-learn's digits and diabetes with torch.nn's losses and with "
        "fusedloss's, from the same seed; print and plot both loss curves.",
        epilog="The exit status is 1 if the curves differ by more than rounding explains.",
    )
    add_out(parser)
    arguments = parser.parse_args(argv)
    if caveat():
        print(caveat())

    runs = [(task, *run(task)) for task in TASKS]
    path = folder(arguments, "cpu") / "demo.png"
    plot(runs).savefig(path, dpi=110)
    print(
        "These models are tiny, and so are their losses; `python -m bench` measures large ones.\n"
        f"wrote {path}"
    )
    status = 0
    for task, plain, ours, allowed in runs:
        gap = max(difference(ours, plain))
        if not gap <= allowed:
            print(
                f"FAILED: {task.title}: the curves are {gap:.1e} apart, "
                f"and rounding explains only {allowed:.1e}",
                file=sys.stderr,
            )
            status = 1
    return status


if __name__ == "__main__":
    # So small a model gains nothing from threads, and would wait for them on a busy machine.
    torch.set_num_threads(1)
    sys.exit(main())
