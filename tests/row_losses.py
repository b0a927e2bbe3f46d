"""Losses over rows, each with words of fusedloss.math and as plain PyTorch, for the tests, the bench and
docs/gallery.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
from fusedloss import math as fm

# mypy: disable-error-code="no-untyped-def"


@fusedloss.row_loss
def distillation(student, teacher, *, T=1.0):
    q = fm.log_softmax(teacher / T)
    return T**2 * fm.sum(fm.exp(q) * (q - fm.log_softmax(student / T)))


@fusedloss.row_loss
def jsd(student, teacher, *, beta=0.5):
    p, q = fm.log_softmax(student), fm.log_softmax(teacher)
    m = fm.logaddexp(p + fm.log(1 - beta), q + fm.log(beta))
    return beta * fm.sum(fm.exp(q) * (q - m)) + (1 - beta) * fm.sum(fm.exp(p) * (p - m))


@fusedloss.row_loss
def focal(logits, label: fm.Label, *, gamma=2.0):
    return -(fm.at(fm.one_minus_softmax(logits), label) ** gamma) * fm.at(
        fm.log_softmax(logits), label
    )


@fusedloss.row_loss
def grpo(
    logits, label: fm.Label, old: fm.PerRow, advantage: fm.PerRow, *, low=0.2, high=0.2, entropy=0.0
):
    logp = fm.log_softmax(logits)
    ratio = fm.exp(fm.at(logp, label) - old)
    h = -fm.sum(fm.exp(logp) * logp)
    return (
        -fm.minimum(ratio * advantage, fm.clamp(ratio, 1 - low, 1 + high) * advantage) - entropy * h
    )


@fusedloss.row_loss
def balanced(logits, label: fm.Label, balance: fm.PerClass, *, z=1e-4):
    return -fm.at(balance * fm.log_softmax(logits), label) + z * fm.logsumexp(logits) ** 2


@fusedloss.row_loss
def cosine(a, b):
    return 1 - fm.sum(a * b) / (fm.norm(a) * fm.norm(b))


@fusedloss.row_loss
def dice(logit, mask, *, smooth=1.0):
    p = fm.sigmoid(logit)
    return 1 - (2 * fm.sum(p * mask) + smooth) / (fm.sum(p) + fm.sum(mask) + smooth)


@fusedloss.row_loss
def cispo(logits, label: fm.Label, old: fm.PerRow, advantage: fm.PerRow, *, high=0.2):
    logp = fm.at(fm.log_softmax(logits), label)
    return -fm.detach(fm.minimum(fm.exp(logp - old), 1 + high)) * advantage * logp


@fusedloss.row_loss
def z_loss(logits, label: fm.Label, *, eps=0.1, z=1e-4):
    logp = fm.log_softmax(logits)
    smoothed = -(1 - eps) * fm.at(logp, label) - eps * fm.mean(logp)
    return smoothed + z * fm.logsumexp(logits) ** 2


@fusedloss.row_loss
def cross_entropy(logits, label: fm.Label):
    return -fm.at(fm.log_softmax(logits), label)


@fusedloss.row_loss
def reverse_kl(student, teacher):
    p = fm.log_softmax(student)
    return fm.sum(fm.exp(p) * (p - fm.log_softmax(teacher)))


@fusedloss.row_loss
def list_net(scores, relevance):
    return -fm.sum(fm.softmax(relevance) * fm.log_softmax(scores))


@fusedloss.row_loss
def total_variation(student, teacher):
    return 1 - fm.sum(fm.minimum(fm.softmax(student), fm.softmax(teacher)))


@fusedloss.row_loss
def triplet(anchor, positive, negative, *, margin=1.0):
    return fm.relu(margin + fm.norm(anchor - positive) - fm.norm(anchor - negative))


@fusedloss.row_loss
def variance(x):
    return fm.sum((x - fm.mean(x)) ** 2) / fm.classes


@fusedloss.row_loss
def multi_margin(x, label: fm.Label, *, margin=1.0):
    return (fm.sum(fm.relu(margin - fm.at(x, label) + x)) - margin) / fm.classes


@fusedloss.row_loss
def sup_con(similarity, positives):
    return -fm.sum(positives * fm.log_softmax(similarity)) / fm.sum(positives)


@fusedloss.row_loss
def structured_hinge(x, y):
    return fm.relu(1 + fm.max(x - 100 * y) - fm.sum(x * y))


@fusedloss.row_loss
def lk_hybrid(student, teacher):
    q = fm.log_softmax(teacher)
    overlap = fm.sum(fm.minimum(fm.softmax(student), fm.exp(q)))
    w = fm.exp(-3 * fm.detach(overlap))
    return w * fm.sum(fm.exp(q) * (q - fm.log_softmax(student))) + (1 - w) * (1 - overlap)


@fusedloss.row_loss
def poly(logits, label: fm.Label, *, eps=1.0):
    logp = fm.at(fm.log_softmax(logits), label)
    return -logp + eps * fm.at(fm.one_minus_softmax(logits), label)


@fusedloss.row_loss
def scaled(logits, label: fm.Label, scale: fm.PerRow):
    return -fm.at(fm.log_softmax(logits * scale), label)


@fusedloss.row_loss
def renyi(student, teacher, *, alpha=1.5):
    q, p = fm.softmax(teacher), fm.softmax(student)
    return fm.log(fm.sum(q**alpha * p ** (1 - alpha))) / (alpha - 1)


@fusedloss.row_loss
def soft_cap(logits, label: fm.Label, *, cap=3.0):
    return -fm.at(fm.log_softmax(cap * fm.tanh(logits / cap)), label)


@fusedloss.row_loss
def spread(x):
    return fm.max(x) - fm.min(x)


# ---- in PyTorch, a row along the last dimension --------------------------------------------------


def _at(x: Tensor, label: Tensor) -> Tensor:
    return x.gather(-1, label[..., None])[..., 0]


def _logp(x: Tensor, label: Tensor) -> Tensor:
    return _at(x.log_softmax(-1), label)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Between log-probabilities, sum p (log p - log q)."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    b = torch.tensor(beta, dtype=p.dtype)
    m = torch.logsumexp(torch.stack([p + torch.log1p(-b), q + torch.log(b)]), 0)
    return beta * _kl(q, m) + (1 - beta) * _kl(p, m)


def _grpo(x: Tensor, label: Tensor, old: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.2,
          entropy: float = 0.0) -> Tensor:  # fmt: skip
    ratio = torch.exp(_logp(x, label) - old)
    h = torch.distributions.Categorical(logits=x).entropy()
    clipped = ratio.clamp(1 - low, 1 + high) * advantage
    return -torch.minimum(ratio * advantage, clipped) - entropy * h


def _focal(x: Tensor, label: Tensor, gamma: float = 2.0) -> Tensor:
    logp = _logp(x, label)
    return -((1 - logp.exp()) ** gamma) * logp


def _dice(x: Tensor, mask: Tensor, smooth: float = 1.0) -> Tensor:
    p = x.sigmoid()
    return 1 - (2 * (p * mask).sum(-1) + smooth) / (p.sum(-1) + mask.sum(-1) + smooth)


def _lk(student: Tensor, teacher: Tensor) -> Tensor:
    overlap = torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum(-1)
    w = torch.exp(-3 * overlap.detach())
    return w * _kl(teacher.log_softmax(-1), student.log_softmax(-1)) + (1 - w) * (1 - overlap)


def _cispo(x: Tensor, label: Tensor, old: Tensor, advantage: Tensor, high: float = 0.2) -> Tensor:
    logp = _logp(x, label)
    return -torch.exp(logp - old).clamp(max=1 + high).detach() * advantage * logp


def _z_loss(x: Tensor, label: Tensor, eps: float = 0.1, z: float = 1e-4) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    ce = F.cross_entropy(flat, label.reshape(-1), reduction="none", label_smoothing=eps)
    return ce.reshape(label.shape) + z * x.logsumexp(-1) ** 2


def _multi_margin(x: Tensor, label: Tensor, margin: float = 1.0) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    value = F.multi_margin_loss(flat, label.reshape(-1), margin=margin, reduction="none")
    return value.reshape(label.shape)


def _poly(x: Tensor, label: Tensor, eps: float = 1.0) -> Tensor:
    logp = _logp(x, label)
    return -logp + eps * (1 - logp.exp())


def _renyi(student: Tensor, teacher: Tensor, alpha: float = 1.5) -> Tensor:
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return torch.logsumexp(alpha * q + (1 - alpha) * p, -1) / (alpha - 1)


def _triplet(a: Tensor, p: Tensor, n: Tensor, margin: float = 1.0) -> Tensor:
    return torch.relu(margin + (a - p).norm(dim=-1) - (a - n).norm(dim=-1))


@dataclass(frozen=True)
class RowCase:
    """A loss, the same in PyTorch, and how many walks over a row its kernel makes."""

    loss: Any
    torch: Callable[..., Tensor]
    walks: int
    parameters: dict[str, float] = field(default_factory=dict)
    second: str = "normal"  # what the second element input holds: "normal", "mask" or "one-hot"

    @property
    def id(self) -> str:
        name: str = self.loss.__name__
        return name

    def inputs(
        self, rows: tuple[int, ...], classes: int, dtype: torch.dtype, seed: int = 0
    ) -> list[Tensor]:
        """Random ones, classes along the last dimension."""
        g = torch.Generator().manual_seed(seed)
        found: list[Tensor] = []
        for place, kind in enumerate(self.loss._traced.kinds):
            if kind.name == "LABEL":
                found.append(torch.randint(0, classes, rows, generator=g))
            elif kind.name == "PER_ROW":
                found.append((-2 * torch.rand(rows, generator=g, dtype=torch.float64)).to(dtype))
            elif kind.name == "PER_CLASS":
                found.append(torch.rand(classes, generator=g, dtype=torch.float64).to(dtype))
            elif place == 1 and self.second != "normal":
                hot = torch.randint(0, classes, rows, generator=g)
                there = F.one_hot(hot, classes).bool()
                if self.second == "mask":
                    there |= torch.rand(*rows, classes, generator=g) < 0.4
                found.append(there.to(dtype))
            else:
                x = 2 * torch.randn(*rows, classes, generator=g, dtype=torch.float64)
                found.append(x.to(dtype))
        return found


ROW_LOSSES = [
    RowCase(distillation, lambda s, t, T=1.0: T**2 * _kl((t / T).log_softmax(-1), (s / T).log_softmax(-1)),
            3, {"T": 2.0}),
    RowCase(jsd, _jsd, 4, {"beta": 0.3}),
    RowCase(focal, _focal, 3),
    RowCase(grpo, _grpo, 3, {"entropy": 0.1}),
    RowCase(balanced, lambda x, y, b, z=1e-4: -b[y] * _logp(x, y) + z * x.logsumexp(-1) ** 2, 3, {"z": 0.01}),
    RowCase(cosine, lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1), 2),
    RowCase(dice, _dice, 2, second="mask"),
    RowCase(cispo, _cispo, 3),
    RowCase(z_loss, _z_loss, 3, {"z": 0.01}),
    RowCase(cross_entropy, lambda x, y: -_logp(x, y), 3),
    RowCase(reverse_kl, lambda s, t: _kl(s.log_softmax(-1), t.log_softmax(-1)), 3),
    RowCase(list_net, lambda s, y: -(y.softmax(-1) * s.log_softmax(-1)).sum(-1), 3),
    RowCase(total_variation, lambda s, t: 1 - torch.minimum(s.softmax(-1), t.softmax(-1)).sum(-1), 4),
    RowCase(triplet, _triplet, 2),
    RowCase(variance, lambda x: x.var(-1, unbiased=False), 3),
    RowCase(multi_margin, _multi_margin, 2),
    RowCase(sup_con, lambda x, m: -(m * x.log_softmax(-1)).sum(-1) / m.sum(-1), 3, second="mask"),
    RowCase(structured_hinge,
            lambda x, y: torch.relu(1 + (x - 100 * y).amax(-1) - (x * y).sum(-1)), 2, second="one-hot"),
    RowCase(lk_hybrid, _lk, 4),
    RowCase(poly, _poly, 3),
    RowCase(scaled, lambda x, y, s: -_logp(x * s[..., None], y), 3),
    RowCase(renyi, _renyi, 4),
    RowCase(soft_cap, lambda x, y, cap=3.0: -_logp(cap * torch.tanh(x / cap), y), 3),
    RowCase(spread, lambda x: x.max(-1).values - x.min(-1).values, 2),
]  # fmt: skip
