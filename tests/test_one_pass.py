"""The gradient that forward computes is, bit for bit, the one of a backward pass.

That holds whatever upstream gradients the call site has seen before, and whatever autograd has to
do: a second backward, two forwards in flight, hooks, checkpoints, accumulation.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedloss
import fusedloss.functional as FL
from cases import BASIC, DEVICE, DTYPES, Sample, at_shape
from fusedloss import math as fm
from helpers import (
    INTERPRETED,
    MODULES,
    affordable,
    assert_close_to_truth,
    assert_same_bits,
    leaf,
    operators,
    sample_truth,
    torch_loss,
)

NAN, INF = float("nan"), float("inf")
SITES = {
    "module": lambda loss, reduction: MODULES[loss](reduction=reduction),
    "function": lambda loss, reduction: lambda x, y: getattr(FL, loss)(x, y, reduction=reduction),
}
UPSTREAMS = (1.0, 1024.0, 1 / 3, -2.5, 0.0, -0.0, NAN, INF, -INF, 1e-7)
HISTORIES: dict[str, Callable[[float], Sequence[float]]] = {
    "fresh": lambda u: (),
    "once": lambda u: (u,),
    "steady": lambda u: (u,) * 8,
    "ones": lambda u: (1.0,) * 3,
    "another": lambda u: (0.7,) * 8,
    "mirrored": lambda u: (-u,) * 3,
    "alternating": lambda u: (u, 0.7) * 4,
    "restless": lambda u: tuple(0.5 + i / 32 for i in range(24)),
    "restless, then steady": lambda u: (*(0.5 + i / 32 for i in range(24)), *(u,) * 24),
    "zero": lambda u: (0.0,) * 2,
    "nan": lambda u: (NAN,) * 2,
    "infinite": lambda u: (INF,) * 2,
}

SHAPE = (5, 67)

pytestmark = pytest.mark.usefixtures("fused")


def draw(loss: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Sample:
    return at_shape(loss, SHAPE).sample(dtype, seed)


def step(site: Callable[..., Tensor], sample: Sample, upstream: float | Tensor) -> Tensor:
    input = leaf(sample.input)
    value = site(input, sample.target)
    upstream = torch.as_tensor(upstream, dtype=value.dtype).expand_as(value)
    return torch.autograd.grad(value, input, upstream)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", BASIC)
def test_a_fresh_site_is_right(loss: str, dtype: str) -> None:
    """The gradients that the histories below are compared with."""
    sample = draw(loss, DTYPES[dtype])
    for reduction, upstream in itertools.product(("mean", "sum"), UPSTREAMS):
        rounded = torch.tensor(upstream, dtype=DTYPES[dtype])
        expected = sample_truth(loss, sample, reduction, rounded)
        grad = step(MODULES[loss](reduction=reduction), sample, upstream)
        what = f"{reduction}, upstream {upstream}"
        if torch.isfinite(rounded):
            assert_close_to_truth(grad, expected.grad, expected.grad_scale, what)
        elif loss != "log_loss":  # torch has no function of that name
            # Whether an infinite upstream gradient gives nan or infinity depends on the order of the
            # operations; that the result is not finite does not.
            eager = functools.partial(torch_loss(loss), reduction=reduction)
            theirs = step(eager, sample, upstream)
            assert torch.equal(grad.isfinite(), theirs.isfinite()), what
            if torch.isnan(rounded):
                assert torch.equal(grad.isnan(), theirs.isnan()), what


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("loss", BASIC)
def test_bits_do_not_depend_on_history(loss: str, site: str, dtype: str) -> None:
    sample = draw(loss, DTYPES[dtype])
    for upstream in affordable(UPSTREAMS if dtype == "fp32" else UPSTREAMS[2:6], 2):
        expected = step(MODULES[loss](), sample, upstream)
        for name, history in affordable(tuple(HISTORIES.items()), 4):
            call = SITES[site](loss, "mean")
            for previous in history(upstream):
                step(call, sample, previous)
            assert_same_bits(step(call, sample, upstream), expected, f"{name}, then {upstream}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "family",
    [
        "mse_loss-weight",
        "binary_cross_entropy_with_logits-pos_weight",
        "cross_entropy-probabilities",
        "cross_entropy-weight-smoothing",
        *BASIC,
    ],
)
def test_forward_and_backward_kernels_agree_on_special_numbers(family: str, dtype: str) -> None:
    """nan, infinities and zeros in the input: a second backward shows that the gradient of forward
    is still that of the backward pass."""
    case = at_shape(family, (7, 67))
    sample = case.sample(DTYPES[dtype])
    if "entropy" in case.loss and "logits" not in case.loss and case.loss != "cross_entropy":
        special = [0.0, 1.0, -0.0]  # probabilities
    else:
        special = [NAN, INF, -INF, 0.0, -0.0, 60_000.0]
    for number in special:
        for place in ((2, 5), (3,), (4, slice(1, None))):
            input = sample.input.clone()
            input[place] = number
            input.requires_grad_()
            for reduction in ("mean", "sum"):
                value = getattr(FL, case.loss)(
                    input, sample.target, reduction=reduction, **sample.options
                )
                first, second = (
                    torch.autograd.grad(value, input, torch.ones_like(value), retain_graph=True)[0]
                    for _ in range(2)
                )
                assert_same_bits(first, second, f"{number} at {place}, {reduction}")


@pytest.mark.parametrize("loss", BASIC)
def test_history_of_other_data(loss: str) -> None:
    """A site remembers the upstream gradient, not a gradient."""
    module = MODULES[loss]()
    for seed, upstream in enumerate((3.0, 3.0, 3.0, 0.1, 0.1, 3.0)):
        sample = draw(loss, seed=seed)
        assert_same_bits(
            step(module, sample, upstream), step(MODULES[loss](), sample, upstream), f"step {seed}"
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", BASIC)
def test_second_backward(loss: str, reduction: str) -> None:
    """With retain_graph, for the same upstream gradient and for others."""
    sample = draw(loss)
    for warm_up in (1.0, 0.6):
        module = MODULES[loss](reduction=reduction)
        step(module, sample, warm_up)
        input = leaf(sample.input)
        value = module(input, sample.target)
        for upstream in (0.6, 0.6, 1.0, -3.0, 0.6):
            factor = torch.full_like(value, upstream)
            (grad,) = torch.autograd.grad(value, input, factor, retain_graph=True)
            fresh = step(MODULES[loss](reduction=reduction), sample, upstream)
            assert_same_bits(grad, fresh, f"upstream {upstream} after a first {warm_up}")
            grad.fill_(NAN)  # the owner of a gradient may change it


@pytest.mark.parametrize("loss", BASIC)
def test_second_backward_without_retain_graph_raises(loss: str) -> None:
    sample = draw(loss)
    input = leaf(sample.input)
    value = getattr(FL, loss)(input, sample.target)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("order", ["in order", "in reverse"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("loss", BASIC)
def test_two_forwards_before_two_backwards(loss: str, site: str, order: str) -> None:
    samples = [draw(loss, seed=seed) for seed in (0, 1)]
    upstreams = (0.3, 5.0)
    for warm_up in (1.0, *upstreams):
        call = SITES[site](loss, "mean")
        step(call, samples[0], warm_up)
        inputs = [leaf(sample.input) for sample in samples]
        values = [call(x, sample.target) for x, sample in zip(inputs, samples, strict=True)]
        for i in (0, 1) if order == "in order" else (1, 0):
            values[i].backward(torch.tensor(upstreams[i]))
        for i in (0, 1):
            fresh = step(MODULES[loss](), samples[i], upstreams[i])
            assert inputs[i].grad is not None
            assert_same_bits(inputs[i].grad, fresh, f"forward {i}, warmed up by {warm_up}")


@pytest.mark.parametrize("loss", BASIC)
def test_accumulation(loss: str) -> None:
    """Two backward passes add up in .grad, and gradients of other steps stay as they are."""
    first, second = draw(loss, seed=0), draw(loss, seed=1)
    for upstream in (1.0, 0.25):
        module = MODULES[loss]()
        one, two = step(MODULES[loss](), first, upstream), step(MODULES[loss](), second, upstream)
        input = leaf(first.input)
        (module(input, first.target) * upstream).backward()
        assert input.grad is not None
        held = input.grad
        assert_same_bits(held, one, "first")
        input.data = second.input.clone()
        (module(input, second.target) * upstream).backward()
        assert input.grad is held
        assert_same_bits(held, one + two, "sum")
        # One leaf used by two losses in one graph.
        shared = leaf(first.input)
        both = module(shared, first.target) + module(shared, second.target)
        (both * upstream).backward()
        expected = one + step(MODULES[loss](), Sample(first.input, second.target, {}), upstream)
        torch.testing.assert_close(shared.grad, expected)


@pytest.mark.parametrize("loss", BASIC)
def test_gradients_of_past_steps_are_kept(loss: str) -> None:
    """No buffer is used twice."""
    module = MODULES[loss]()
    samples = [draw(loss, seed=seed) for seed in range(6)]
    grads = [step(module, sample, 0.5) for sample in samples]
    for sample, grad in zip(samples, grads, strict=True):
        assert_same_bits(grad, step(MODULES[loss](), sample, 0.5), "kept")
    assert len({grad.data_ptr() for grad in grads}) == len(grads)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("loss", BASIC)
def test_gradient_aliases_nothing(loss: str, reduction: str) -> None:
    """The gradient shares no memory with what the user holds, and is not held by the graph."""
    sample = draw(loss)
    module = MODULES[loss](reduction=reduction)
    for _ in range(3):
        input = leaf(sample.input)
        value = module(input, sample.target)
        upstream = torch.full_like(value, 0.5)
        (grad,) = torch.autograd.grad(value, input, upstream, retain_graph=True)
        held = {t.untyped_storage().data_ptr() for t in (input, sample.target, value, upstream)}
        assert grad.untyped_storage().data_ptr() not in held
        right = grad.clone()
        grad.mul_(0)
        assert_same_bits(torch.autograd.grad(value, input, upstream)[0], right, "again")
        assert torch.equal(input, sample.input)


@pytest.mark.parametrize("loss", BASIC)
def test_input_in_the_middle_of_a_graph(loss: str) -> None:
    """retain_grad(), and a hook that changes the gradient in place."""
    sample = draw(loss)
    module = MODULES[loss]()
    for _ in range(3):
        source = leaf(sample.input)
        middle = source * 1.0
        middle.retain_grad()
        seen: list[Tensor] = []
        middle.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        module(middle, sample.target).backward(torch.tensor(0.5))
        expected = step(MODULES[loss](), sample, 0.5)
        for grad in (source.grad, middle.grad, seen[0]):
            assert grad is not None
            assert_same_bits(grad, expected, "middle")


@pytest.mark.parametrize("loss", BASIC)
def test_create_graph(loss: str) -> None:
    """The gradient has a graph wherever torch's has one, also after steps without a graph."""
    sample = draw(loss, torch.float64)
    module = MODULES[loss]()
    step(module, sample, 0.5)
    results = []
    for function in (module, torch_loss(loss)):
        input = leaf(sample.input)
        value = function(input, sample.target)
        upstream = torch.tensor(0.5, dtype=value.dtype)
        (grad,) = torch.autograd.grad(value, input, upstream, create_graph=True)
        penalty = grad.square().sum() + value
        penalty.backward()
        results.append((grad.requires_grad, grad.detach(), input.grad))
    assert results[0][0] or not results[1][0]
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", BASIC)
def test_upstream_of_any_layout(loss: str, dtype: str) -> None:
    """reduction "none": upstream gradients that vary, are transposed, expanded, or have gaps."""
    sample = at_shape(loss, (6, 7) if loss != "cross_entropy" else (6, 9, 7)).sample(DTYPES[dtype])
    input = leaf(sample.input)
    value = getattr(FL, loss)(input, sample.target, reduction="none")
    shape = value.shape
    base = torch.linspace(-1, 2, 4 * value.numel()).to(value.dtype)
    turned = (
        base[: value.numel()].view(tuple(reversed(shape))).permute(*reversed(range(value.dim())))
    )
    upstreams = {
        "uneven": base[: value.numel()].view(shape),
        "gaps": base[::4][: value.numel()].view(shape),
        "transposed": turned,
        "one number": base[3].expand(shape),
        "one column": base[: shape[0]].view(-1, *[1] * (value.dim() - 1)).expand(shape),
    }
    for name, upstream in upstreams.items():
        (grad,) = torch.autograd.grad(value, input, upstream, retain_graph=True)
        expected = sample_truth(loss, sample, "none", upstream)
        assert_close_to_truth(grad, expected.grad, expected.grad_scale, name)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "binary_cross_entropy_with_logits"])
def test_fp16_gradient_under_a_loss_scale(loss: str) -> None:
    """2 / N is 0 in fp16, so the scale comes before the rounding."""
    case = at_shape(loss, (2**22,))
    sample = case.sample(torch.float16)
    # fp16 cannot represent 65536; under autocast the loss and its upstream gradient are fp32.
    for autocast, scale in ((False, 2.0**15), (True, 2.0**16)):
        expected = sample_truth(loss, sample, "mean", scale)
        module = MODULES[loss]()
        for _ in range(2):
            with torch.autocast(DEVICE, dtype=torch.float16, enabled=autocast):
                grad = step(module, sample, scale)
            assert_close_to_truth(grad, expected.grad, expected.grad_scale, f"scale {scale}")


@pytest.mark.parametrize("changed", ["input", "target"])
@pytest.mark.parametrize("loss", BASIC)
def test_changed_in_place_between_forward_and_backward(loss: str, changed: str) -> None:
    """Raises where torch does; where torch need not, it raises or is right."""
    sample = draw(loss)

    def run(function: Callable[..., Tensor]) -> Tensor:
        source = leaf(sample.input)
        input, target = source * 1.0, sample.target.clone()
        value = function(input, target)
        (input if changed == "input" else target).mul_(0)
        (grad,) = torch.autograd.grad(value, source)
        return grad

    module = MODULES[loss]()
    step(module, sample, 1.0)
    try:
        expected = run(torch_loss(loss))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        for function in (module, getattr(FL, loss)):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run(function)
        return
    for function in (module, getattr(FL, loss)):
        try:
            torch.testing.assert_close(run(function), expected)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)


@pytest.mark.parametrize("loss", BASIC)
def test_saved_tensors_hooks(loss: str) -> None:
    sample = draw(loss)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Any:
        packed.append(tensor)
        return tensor.numpy(force=True).copy()

    def unpack(array: Any) -> Tensor:  # maybe in autograd's thread, which has no default device
        return torch.asarray(array, device=DEVICE)

    for upstream in (1.0, 0.4):
        expected = step(MODULES[loss](), sample, upstream)
        module = MODULES[loss]()
        for _ in range(3):
            input = leaf(sample.input)
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                value = module(input, sample.target)
            (grad,) = torch.autograd.grad(value, input, torch.tensor(upstream))
            assert_same_bits(grad, expected, "hooks")
            with torch.autograd.graph.save_on_cpu():
                assert_same_bits(step(module, sample, upstream), expected, "save_on_cpu")
    assert packed, "a saved tensor passes through the hooks"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("loss", BASIC)
def test_checkpoint(loss: str, reentrant: bool) -> None:
    sample = draw(loss)
    module = MODULES[loss]()
    for upstream in (1.0, 1.0, 0.4, 0.4, 3.0):
        source = leaf(sample.input)
        value = checkpoint(
            lambda x: module(x * 1.0, sample.target), source, use_reentrant=reentrant
        )
        value.backward(torch.tensor(upstream))
        assert source.grad is not None
        assert_same_bits(source.grad, step(MODULES[loss](), sample, upstream), f"{upstream}")


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is not for several threads")
@pytest.mark.parametrize("loss", BASIC)
def test_module_in_several_threads(loss: str) -> None:
    """One module, different upstream gradients at once."""
    module = MODULES[loss]()
    samples = [draw(loss, seed=seed) for seed in range(4)]
    expected = [step(MODULES[loss](), sample, 0.5 + i) for i, sample in enumerate(samples)]

    def work(i: int) -> None:
        for _ in range(30):
            assert_same_bits(step(module, samples[i], 0.5 + i), expected[i], f"thread {i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_sites_without_end() -> None:
    """With more sites than are remembered, the latest take over the predictions of the oldest: CUDA
    graphs hold predictions by address, so none may be freed."""
    for n in range(1, 700):
        input = torch.zeros(n, requires_grad=True)
        for _ in range(5):  # other tests may have used these sites
            FL.mse_loss(input, torch.zeros(n)).backward(torch.tensor(7.0))
    fresh = torch.zeros(701)
    _, state = operators().loss_forward(
        fresh, fresh, None, [], "mse_loss", [], -100, 1, torch.float32, 1, None
    )
    assert state[0].item() == 7


@pytest.mark.parametrize("loss", BASIC)
def test_copies_of_a_module_do_not_share_history(loss: str) -> None:
    module = MODULES[loss]()
    sample = draw(loss)
    step(module, sample, 0.4)
    twin = copy.deepcopy(module)
    for upstream in (0.4, 2.0, 0.4):
        expected = step(MODULES[loss](), sample, upstream)
        assert_same_bits(step(twin, sample, upstream), expected, "twin")
        assert_same_bits(step(module, sample, 0.4), step(MODULES[loss](), sample, 0.4), "original")


@pytest.mark.parametrize("loss", BASIC)
def test_parameter_shared_by_two_sites_of_one_size(loss: str) -> None:
    """Calls of one loss and size share a prediction; alternating between two is still right."""
    samples = [draw(loss, seed=seed) for seed in (0, 1)]
    for _ in range(6):
        for sample, upstream in zip(samples, (0.5, 20.0), strict=True):
            expected = step(MODULES[loss](), sample, upstream)
            assert_same_bits(step(getattr(FL, loss), sample, upstream), expected, "site")


# ---- memory that changes hands between forward and backward ---------------------------------------


@fusedloss.pointwise_loss
def charbonnier(input: Any, target: Any) -> Any:
    return fm.sqrt((input - target) ** 2 + 1e-6)


SWAPPED = [*BASIC, "charbonnier"]


def loss_of(name: str) -> Callable[..., Tensor]:
    return charbonnier if name == "charbonnier" else getattr(FL, name)  # type: ignore[no-any-return]


def before_swap(name: str, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its input and its target."""
    sample = draw("mse_loss" if name == "charbonnier" else name)
    input = leaf(sample.input)
    return loss_of(name)(input, sample.target, reduction=reduction), input, sample.target


@pytest.mark.parametrize("upstream", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(50, 670), (2, 67)])
@pytest.mark.parametrize("name", SWAPPED)
def test_data_of_another_size(name: str, shape: tuple[int, int], upstream: float) -> None:
    """A RuntimeError as in torch, and no write beyond forward's gradient."""
    value, input, target = before_swap(name, "sum")
    other = at_shape("mse_loss" if name == "charbonnier" else name, shape).sample(torch.float32)
    input.data, target.data = other.input, other.target
    with pytest.raises(RuntimeError, match=r"input is a .* tensor of shape .* forward's was a"):
        value.backward(torch.tensor(upstream))
    assert input.grad is None


@pytest.mark.parametrize("upstream", [1.0, 2.0])
@pytest.mark.parametrize("order", ["same strides", "transposed"])
@pytest.mark.parametrize("name", SWAPPED)
def test_other_data_of_the_same_size(name: str, order: str, upstream: float) -> None:
    """Backward sees the current data, whatever upstream gradient forward predicted."""
    value, input, target = before_swap(name, "sum")
    other = draw("mse_loss" if name == "charbonnier" else name, seed=1)
    new = other.input if order == "same strides" else other.input.t().contiguous().t()
    input.data, target.data = new, other.target
    value.backward(torch.tensor(upstream))
    expected = leaf(new)
    again = loss_of(name)(expected, other.target, reduction="sum")
    again.backward(torch.tensor(upstream))
    assert input.grad is not None and expected.grad is not None
    assert_same_bits(input.grad, expected.grad, "gradient")
    assert input.grad.stride() == new.stride()


@pytest.mark.parametrize("name", SWAPPED)
def test_data_of_another_dtype(name: str) -> None:
    value, input, _ = before_swap(name, "sum")
    input.data = input.data.double()
    with pytest.raises(RuntimeError, match="forward's was a"):
        value.backward()
