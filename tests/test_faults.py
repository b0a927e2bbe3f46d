"""Invalid input on a GPU: nan in its place, and an error later, without waiting.

Runs on a GPU, or on the emulator or Triton's interpreter in place of one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fusedloss
import fusedloss.functional as FL
from cases import DEVICE
from fusedloss import backends
from helpers import EMULATED, FOR_A_GPU, FUSED, INTERPRETED

pytestmark = [
    pytest.mark.skipif(
        not FOR_A_GPU and DEVICE != "cuda", reason="FUSEDLOSS_TEST_DEVICE is not cuda"
    ),
    pytest.mark.usefixtures("fused"),
]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    fusedloss.check()
    yield
    fusedloss.check()


def class_indices(bad: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    input = torch.randn(70, 5, generator=generator, device="cpu").to(DEVICE).requires_grad_()
    target = torch.randint(5, (70,), generator=generator, device="cpu")
    target[[3, 40]] = -100
    target[[7]] = bad
    return input, target.to(DEVICE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bad", [-1, 5, 10**15, (1 << 63) - 1, -(1 << 63)])
@pytest.mark.parametrize("loss", ["cross_entropy", "log_loss"])
def test_class_index_out_of_range(loss: str, bad: int, reduction: str) -> None:
    input, target = class_indices(bad)
    if loss == "log_loss":
        input = input.detach().softmax(1).requires_grad_()
    value = getattr(FL, loss)(input, target, reduction=reduction)
    (gradient,) = torch.autograd.grad(value, input, torch.full_like(value, 3.0))
    assert value.isnan().sum() == 1
    assert gradient[7].isnan().all()
    others = torch.arange(70) != 7
    good = target.where(target != bad, -100)
    expected = input.detach().requires_grad_()
    result = getattr(fusedloss.reference, loss)(expected, good, reduction=reduction)
    (wanted,) = torch.autograd.grad(result, expected, torch.full_like(result, 3.0))
    torch.testing.assert_close(gradient[others], wanted[others])
    if reduction == "none":
        torch.testing.assert_close(value[others], result[others])
    # In Triton's log_loss the smallest number means an ignored row.
    told = max(bad, 1 - (1 << 63)) if (loss, FUSED) == ("log_loss", "triton") else bad
    with pytest.raises(IndexError, match=rf"Target {told} is out of .*\[7\]; there are 5 classes"):
        fusedloss.check()
    fusedloss.check()


def test_the_next_call_raises() -> None:
    input, target = class_indices(9)
    FL.cross_entropy(input, target)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    x = torch.randn(3, device=DEVICE)
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        FL.mse_loss(x, x)
    assert FL.mse_loss(x, x) == 0


@pytest.mark.parametrize("which", ["input", "target"])
@pytest.mark.parametrize("bad", [-0.5, 1.5, float("nan")])
def test_probability_outside_unit(which: str, bad: float) -> None:
    tensors = {name: torch.rand(300, device=DEVICE) for name in ("input", "target")}
    tensors[which][123] = bad
    tensors["input"].requires_grad_()
    value = FL.binary_cross_entropy(**tensors, reduction="none")
    (gradient,) = torch.autograd.grad(value.sum(), tensors["input"])
    assert value.isnan().nonzero().tolist() == [[123]]
    assert gradient.isnan().nonzero().tolist() == [[123]]
    with pytest.raises(RuntimeError, match=rf"elements of {which} should be .* element 123 in"):
        fusedloss.check()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "one for all"])
def test_negative_variance(layout: str) -> None:
    input = torch.randn(15, 20, device=DEVICE).requires_grad_()
    var = torch.rand(15, 20, device=DEVICE)
    var[6, 3] = -0.5
    if layout == "transposed":
        var = var.t().contiguous().t()
    elif layout == "one for all":
        var = torch.full((1, 1), -0.5, device=DEVICE)
        input = torch.randn(1, 20, device=DEVICE).requires_grad_()
    value = FL.gaussian_nll_loss(input, input.detach(), var, reduction="none")
    (gradient,) = torch.autograd.grad(value.sum(), input)
    wrong = var.expand_as(input) < 0
    assert torch.equal(value.isnan(), wrong) and torch.equal(gradient.isnan(), wrong)
    with pytest.raises(ValueError, match="elements of var should be at least 0, .* is -0.5"):
        fusedloss.check()
    fusedloss.check()


@pytest.mark.skipif(not EMULATED, reason="asks the emulator for its atomics")
@pytest.mark.parametrize("strided", [False, True])
def test_a_block_tells_once(strided: bool) -> None:
    """If every element is wrong, atomics on host memory would take longer than everything else."""
    emulator = ctypes.CDLL(backends.extension.__file__)
    input = torch.full((40_000, 2 if strided else 1), 7.0)[:, 0].requires_grad_()
    before = emulator.emulator_compares_and_swaps()
    FL.binary_cross_entropy(input, torch.zeros(40_000)).backward()
    blocks = 3 * 3  # of an emulated device; no pass has more
    assert 1 <= emulator.emulator_compares_and_swaps() - before <= 2 * blocks
    with pytest.raises(RuntimeError, match="elements of input should be"):
        fusedloss.check()


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is not for several threads")
def test_one_of_many_threads_raises() -> None:
    x = torch.randn(3, device=DEVICE)

    def call(_: int) -> bool:
        try:
            FL.mse_loss(x, x)
        except IndexError:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            FL.cross_entropy(*class_indices(9))
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            assert sum(pool.map(call, range(8))) == 1


def test_target_changed_before_backward() -> None:
    """An index leads to memory, so a backward that computes checks it again."""
    input, target = class_indices(0)
    value = FL.cross_entropy(input, target) * 7.25  # not the predicted upstream gradient
    target.data[1] = 10**11
    value.backward()
    assert input.grad is not None and input.grad[1].isnan().all()
    with pytest.raises(IndexError, match="Target 100000000000 is out of bounds"):
        fusedloss.check()
