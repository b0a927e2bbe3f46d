"""Corners that once gave a wrong number, a crash or a lost tensor."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedloss
import fusedloss.functional as FL
from cases import DEVICE
from helpers import host_sees_errors, operators

pytestmark = pytest.mark.usefixtures("fused")


@pytest.mark.parametrize("masked", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("classes", [8, 3000])
def test_masked_first_class(masked: float, classes: int) -> None:
    """A logit so low that it does not count costs the others no digit."""
    torch.manual_seed(0)
    input = torch.randn(4, classes)
    input[:, 0] = masked
    target = torch.rand(4, classes)
    target[:, 0] = 0
    target /= target.sum(1, keepdim=True)
    expected = F.cross_entropy(input.double(), target.double())
    torch.testing.assert_close(FL.cross_entropy(input, target), expected.float())

    weight = torch.ones(classes)
    weight[0] = 0
    labels = torch.tensor([0, 2, 5, 7])
    expected = F.cross_entropy(input.double(), labels, weight.double(), label_smoothing=0.1)
    value = FL.cross_entropy(input, labels, weight, label_smoothing=0.1)
    torch.testing.assert_close(value, expected.float())


@pytest.mark.parametrize("batched", [False, True])
def test_hooks_run_once(batched: bool) -> None:
    """A hook on input sees one gradient, whichever way it is computed."""
    seen: list[Tensor] = []
    results = []
    for loss in (F.mse_loss, FL.mse_loss):
        input = torch.arange(5.0, requires_grad=True)

        def hook(gradient: Tensor) -> Tensor:
            seen.append(gradient)
            return gradient * 10

        input.register_hook(hook)
        value = loss(input, torch.zeros(5), reduction="none" if batched else "mean")
        upstream = torch.eye(5) if batched else torch.ones(())
        (gradient,) = torch.autograd.grad(
            value, input, upstream, create_graph=not batched, is_grads_batched=batched
        )
        results.append(gradient)
    assert len(seen) == 2
    torch.testing.assert_close(results[1], results[0])


def test_retained_gradient_of_an_intermediate() -> None:
    """retain_grad() keeps one gradient under create_graph=True."""
    leaf = torch.arange(5.0, requires_grad=True)
    intermediate = leaf * 2
    intermediate.retain_grad()
    FL.mse_loss(intermediate, torch.zeros(5)).backward(create_graph=True)
    assert intermediate.grad is not None
    torch.testing.assert_close(intermediate.grad, intermediate * 2 / 5)


def test_more_dimensions_than_can_be_joined() -> None:
    """18 dimensions in a permuted order."""
    input = torch.randn([2] * 18).permute(*reversed(range(18)))
    target = torch.randn([2] * 18)
    torch.testing.assert_close(FL.mse_loss(input, target), F.mse_loss(input, target))
    probabilities = torch.rand([2] * 10).mul(0.8).add(0.1).permute(*reversed(range(10)))
    labels = torch.randint(2, [2] * 9)
    expected = F.nll_loss(probabilities.log(), labels)
    torch.testing.assert_close(FL.log_loss(probabilities, labels), expected)


def bytes_in_use() -> int:
    """Device memory that this process holds now."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hooks_take_all_of_the_memory() -> None:
    """If hooks take saved tensors away, as under checkpoint, forward keeps no gradient."""
    input = torch.randn(1024, 8192, requires_grad=True)
    target = torch.randint(8192, (1024,))
    FL.cross_entropy(input[:1], target[:1]).backward()  # initialises everything once
    before = bytes_in_use()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        value = FL.cross_entropy(input, target)
    assert bytes_in_use() - before < input.nbytes // 4
    value.backward()


def test_checkpoint() -> None:
    """Recomputed in backward: the same gradient."""
    input = torch.randn(64, 1000, requires_grad=True)
    target = torch.randint(1000, (64,))
    value = checkpoint(FL.cross_entropy, input, target, use_reentrant=False)
    (gradient,) = torch.autograd.grad(value, input)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(F.cross_entropy(input, target), input)[0]
    )


@pytest.mark.parametrize("module", [fusedloss.MSELoss, fusedloss.CrossEntropyLoss])
def test_module_traced_before_its_first_call(module: type[torch.nn.Module]) -> None:
    """A module needs no eager call before it is compiled."""
    torch._dynamo.reset()
    input = torch.randn(4, 3, requires_grad=True)
    target = torch.rand(4, 3).softmax(1)
    value = torch.compile(module(), backend="eager", fullgraph=True)(input, target)
    torch.testing.assert_close(value, module()(input, target))


def test_smoothing_without_a_row_is_nan() -> None:
    """A mean over targets that all have weight 0 is nan, as in torch."""
    input, weight = torch.randn(3, 4), torch.tensor([0.0, 1.0, 1.0, 1.0])
    target = torch.zeros(3, dtype=torch.long)
    assert F.cross_entropy(input, target, weight, label_smoothing=0.1).isnan()
    assert FL.cross_entropy(input, target, weight, label_smoothing=0.1).isnan()


def test_operator_checks_shapes() -> None:
    """The operators themselves read nothing out of bounds."""
    prediction = torch.tensor([1.0, 3.0], dtype=torch.float64)
    input, target = torch.randn(1000, 3), torch.zeros(1000, dtype=torch.long)
    FL.cross_entropy(input, target)  # the first use of a backend defines its operators
    op = operators().loss.default
    rest = ([], "cross_entropy", [0.0], -100, 2, torch.float32, prediction)
    with pytest.raises(ValueError, match=r"target of shape \[1\] does not fit"):
        op(input, target[:1], None, *rest)
    with pytest.raises(ValueError, match="3 classes need a weight of shape"):
        op(input, target, torch.ones(1), *rest)


@host_sees_errors
def test_target_changed_unseen() -> None:
    """Memory shared with NumPy changes without a version: backward checks the indices again."""
    input, target = torch.randn(3, 4, requires_grad=True), torch.zeros(3, dtype=torch.long)
    value = (
        FL.cross_entropy(input, target, torch.ones(4)) * 3
    )  # not the predicted upstream gradient
    target.numpy()[1] = 10**11
    with pytest.raises(IndexError, match=r"100000000000.*target\[1\]"):
        value.backward()


@pytest.mark.parametrize("shape", [(5, 200), (40, 6), (40, 20), (3, 7, 33)], ids=str)
def test_ignored_rows_have_no_gradient(shape: tuple[int, ...], compiled: str) -> None:
    """Their gradient is zero, whatever their logits, and the weights in label smoothing, are."""
    input = torch.randn(shape).movedim(1, -1)
    target = torch.randint(shape[1], input.shape[:-1])
    ignored = torch.rand(target.shape) < 0.4
    target[ignored] = -100
    unusual = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    input[ignored] = unusual[torch.arange(shape[1]) % 4]
    for element in unusual:
        weight = torch.ones(shape[1])
        weight[2] = element
        for smoothing, reduction in ((0.0, "sum"), (0.1, "sum"), (0.1, "none")):
            leaf = input.movedim(-1, 1).clone().requires_grad_()
            options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
            FL.cross_entropy(leaf, target, **options).sum().backward()
            assert (leaf.grad.movedim(1, -1)[ignored] == 0).all(), (element, smoothing, reduction)
