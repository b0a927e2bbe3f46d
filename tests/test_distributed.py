"""DistributedDataParallel, FSDP2 and DTensor: two processes over gloo, step by step as torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fusedloss
import fusedloss.functional as FL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo"),
]
PROCESSES, STEPS, ROWS, CLASSES = 2, 6, 12, 7
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,))),
}
PLACEMENTS = {"rows": Shard(0), "classes": Shard(1), "replicated": Replicate()}


def train(
    wrap: Callable[[nn.Module], nn.Module], make_loss: Callable[[], nn.Module], rank: int
) -> list[float]:
    """The losses of a few steps; each process has its own rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    model, loss = wrap(model), make_loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for step in range(STEPS):
        x = torch.randn(ROWS, 5, generator=generator)
        y = torch.randint(CLASSES, (ROWS,), generator=generator)
        # Another size in every other step, and scaled as by accumulation.
        value = loss(model(x[: ROWS - step % 2]), y[: ROWS - step % 2]) / (1 + step // 3)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


class Head(nn.Module):
    """A body, and a loss whose layer shares the embedding's weight."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 5)
        head = nn.Linear(5, CLASSES, bias=False)
        head.weight = self.embedding.weight
        self.loss = fusedloss.LinearCrossEntropyLoss.of(head) if ours else None
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens).tanh()
        if self.loss is not None:
            return self.loss(hidden[:, :-1], tokens[:, 1:])  # type: ignore[no-any-return]
        logits = self.head(hidden[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def train_head(wrap: Callable[[nn.Module], nn.Module], ours: bool, rank: int) -> list[float]:
    """As train(), with the loss behind a tied layer inside of the model."""
    torch.manual_seed(0)
    model = wrap(Head(ours))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(STEPS):
        value = model(torch.randint(CLASSES, (3, 6), generator=generator))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def gathered_weight() -> Tensor:
    """A layer that is sharded by itself, whose weight is no plain tensor when the loss runs."""
    torch.manual_seed(0)
    head = nn.Linear(5, CLASSES)
    x, y = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,))
    plain = fusedloss.LinearCrossEntropyLoss.of(head)(x, y)
    fully_shard(head, mesh=init_device_mesh("cpu", (PROCESSES,)))
    value = fusedloss.LinearCrossEntropyLoss.of(head)(x, y)
    value.backward()
    assert isinstance(head.weight.grad, DTensor)
    return (value - plain).detach()


def of_dtensors(function: Callable[..., Tensor], placement: Any) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(ROWS, 8, generator=generator)
    target = torch.randint(8, (ROWS,), generator=generator)
    rows = Shard(0) if placement == Shard(0) else Replicate()
    input = distribute_tensor(logits, mesh, [placement]).requires_grad_()
    value = function(input, distribute_tensor(target, mesh, [rows]))
    assert isinstance(value, DTensor)
    value.backward()
    assert isinstance(input.grad, DTensor)
    return {"value": value.detach().full_tensor(), "grad": input.grad.full_tensor()}


def linear_of_dtensors(function: Callable[..., Tensor]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (ROWS, 8))
    target = torch.randint(8, (ROWS,), generator=generator)
    x = distribute_tensor(hidden, mesh, [Shard(0)]).requires_grad_()
    w = distribute_tensor(weight, mesh, [Replicate()]).requires_grad_()
    value = function(x, w, distribute_tensor(target, mesh, [Shard(0)]))
    assert isinstance(value, DTensor)
    value.backward()
    assert isinstance(x.grad, DTensor)
    return {"value": value.detach().full_tensor(), "grad": x.grad.full_tensor()}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    kinds = {"ours": fusedloss.CrossEntropyLoss, "torch's": nn.CrossEntropyLoss}
    results: dict[str, Any] = {}
    for name, wrap in WRAPPERS.items():
        results[name] = {kind: train(wrap, make, rank) for kind, make in kinds.items()}
        results[f"{name}, behind a layer"] = {
            kind: train_head(wrap, kind == "ours", rank) for kind in kinds
        }
    results["gathered"] = gathered_weight()
    for name, placement in PLACEMENTS.items():
        results[name] = {
            kind: of_dtensors(function, placement)
            for kind, function in (
                ("ours", FL.cross_entropy),
                ("torch's", nn.functional.cross_entropy),
            )
        }
    results["linear"] = {
        "ours": linear_of_dtensors(FL.linear_cross_entropy),
        "torch's": linear_of_dtensors(
            lambda x, w, t: nn.functional.cross_entropy(nn.functional.linear(x, w), t)
        ),
    }
    torch.save(copy.deepcopy(results), folder / f"results-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each process."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(work, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"results-{rank}") for rank in range(PROCESSES)]


@pytest.mark.parametrize("behind", ["", ", behind a layer"], ids=["logits", "layer"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_training_is_torchs(wrapper: str, behind: str, results: list[dict[str, Any]]) -> None:
    of_ranks = [result[wrapper + behind] for result in results]
    for losses in of_ranks:
        assert losses["ours"] == pytest.approx(losses["torch's"], rel=1e-5)
        assert len(set(losses["ours"])) == STEPS
    assert of_ranks[0]["ours"] != of_ranks[1]["ours"], "each process has rows of its own"


@pytest.mark.parametrize("placement", [*PLACEMENTS, "linear"])
def test_dtensors(placement: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        found = result[placement]
        torch.testing.assert_close(found["ours"], found["torch's"])
        assert found["ours"]["grad"].abs().sum() > 0


def test_a_sharded_layer(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert abs(result["gathered"].item()) < 1e-6
