"""A GRPO step on a tiny policy: `python examples/grpo.py`.

A question is a number up to 27, and an answer three digits with that sum: the reward is 1 or 0, and nothing
else is ever said about the answer. The policy, a small network, chooses digit by digit. Each question is
answered 16 times, and an answer's advantage is its reward measured against the others'. The loss of a row
(a digit) is GRPO's; entropy and log-probability, to be watched, come from the same kernel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import one_hot

import fusedloss
from fusedloss import math as fm

DIGITS, ANSWERS, QUESTIONS = 3, 16, 32  # of an answer, of a question, of a step
SUMS = 9 * DIGITS + 1


@fusedloss.row_loss
def grpo(
    logits, label: fm.Label, old: fm.PerRow, advantage: fm.PerRow, *, low=0.2, high=0.2, entropy=0.0
):
    logp = fm.log_softmax(logits)
    ratio = fm.exp(fm.at(logp, label) - old)
    h = -fm.sum(fm.exp(logp) * logp)
    clipped = fm.clamp(ratio, 1 - low, 1 + high)
    loss = -fm.minimum(ratio * advantage, clipped * advantage) - entropy * h
    return loss, {"entropy": h, "logprob": fm.at(logp, label)}


def state(question: Tensor, answer: Tensor) -> Tensor:
    """What the policy sees before each digit: the question, and the digits so far."""
    seen = torch.ones(DIGITS, DIGITS).tril(-1)[..., None]  # (digit to choose, digit seen, 1)
    so_far = seen * one_hot(answer, 10)[:, None]
    asked = one_hot(question, SUMS)[:, None].expand(-1, DIGITS, -1)
    place = torch.eye(DIGITS).expand(len(answer), -1, -1)
    return torch.cat([so_far.flatten(2), asked, place], -1)


@torch.no_grad()
def sample(policy: nn.Module, question: Tensor) -> tuple[Tensor, Tensor]:
    """An answer to each question, and the log-probability of each digit."""
    answer = torch.zeros(len(question), DIGITS, dtype=torch.int64)
    old = torch.zeros(answer.shape)
    for place in range(DIGITS):
        choice = Categorical(logits=policy(state(question, answer))[:, place])
        answer[:, place] = choice.sample()
        old[:, place] = choice.log_prob(answer[:, place])
    return answer, old


History = list[tuple[float, ...]]


def train(steps: int = 150, seeds: int = 3, entropy: float = 0.003) -> list[History]:
    """Reward, entropy and probability of each step, for each seed."""
    histories: list[History] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        policy = nn.Sequential(
            nn.Linear(10 * DIGITS + SUMS + DIGITS, 128), nn.Tanh(), nn.Linear(128, 10)
        )
        optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
        history: History = []
        for _ in range(steps):
            question = torch.randint(SUMS, (QUESTIONS,)).repeat_interleave(ANSWERS)
            answer, old = sample(policy, question)
            reward = (answer.sum(1) == question).float().view(QUESTIONS, ANSWERS)
            advantage = reward - reward.mean(1, keepdim=True)
            advantage /= reward.std(1, keepdim=True) + 1e-4
            advantage = advantage.view(-1, 1).expand_as(answer)
            for _ in range(4):
                loss, more = grpo(
                    policy(state(question, answer)), answer, old, advantage, entropy=entropy
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            watched = (reward, more["entropy"], more["logprob"].exp())
            history.append(tuple(t.mean().item() for t in watched))
        histories.append(history)
    return histories


def scores(histories: list[History], first: int, last: int | None) -> tuple[float, float, float]:
    """Reward, entropy and probability over these steps and all seeds."""
    return tuple(np.mean([history[first:last] for history in histories], (0, 1)).tolist())


def draw(histories: list[History], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    names = ("answers that are right", "entropy of a digit", "probability of a digit")
    for k, (axes, name) in enumerate(zip(figure.subplots(1, 3), names, strict=True)):
        for history in histories:
            axes.plot([numbers[k] for numbers in history], lw=1)
        axes.set(xlabel="step", title=name, ylim=(0, None))
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    out = parser.parse_args().out
    one = torch.zeros(1)
    row = torch.zeros(1, 10, requires_grad=True), one.long(), one, one
    print("grpo:", fusedloss.explain(grpo, *row))
    histories = train()
    for step in range(0, len(histories[0]), 30):
        print(f"steps {step:3} to {step + 30:3}:", end=" ")
        numbers = scores(histories, step, step + 30)
        print("right {:.1%}, entropy {:.2f}, probability {:.2f}".format(*numbers))
    draw(histories, out / "grpo.png")
