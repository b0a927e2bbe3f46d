"""Tests that need a GPU: CUDA graphs, streams, other devices, and memory for 2^31 elements."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fusedloss
import fusedloss.functional as FL
from cases import BASIC, DEVICE, FAMILIES, REDUCTIONS, Sample, at_shape
from custom_losses import charbonnier
from helpers import (
    MODULES,
    assert_close_to_truth,
    assert_same_bits,
    draw_upstream,
    leaf,
    result_shape,
    sample_truth,
    value_and_grad,
)

pytestmark = [
    pytest.mark.skipif(DEVICE != "cuda", reason="FUSEDLOSS_TEST_DEVICE is not cuda"),
    pytest.mark.usefixtures("compiled"),
]

GIB = 2**30


def need_memory(gib: float) -> None:
    """Skip if the GPU does not have this much free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib:g} GiB of GPU memory, {free / GIB:.1f} are free")


def to(sample: Sample, device: torch.device | str) -> Sample:
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in sample.options.items()}
    return Sample(sample.input.to(device), sample.target.to(device), options)


# ---- CUDA graphs --------------------------------------------------------------------------------


def rowwise(matrix: Tensor) -> Tensor:
    return matrix


def columnwise(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


# Besides each family: rows of a cluster, class indices for several blocks to count, class
# probabilities in shared memory, and rows that lie side by side, in shared memory or not.
CAPTURED = [
    *((family, (33, 257), rowwise) for family in FAMILIES),
    ("cross_entropy", (5, 70_001), rowwise),
    ("cross_entropy", (20_000, 3), rowwise),
    ("cross_entropy-probabilities", (33, 4096), rowwise),
    ("cross_entropy", (4096, 21), columnwise),
    ("cross_entropy", (4096, 100), columnwise),
]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "family, shape, lay_out", CAPTURED, ids=lambda x: getattr(x, "__name__", x)
)
def test_cuda_graph(
    family: str, shape: tuple[int, int], lay_out: Callable[[Tensor], Tensor], reduction: str
) -> None:
    """Captured once and replayed with other numbers and upstream gradients, it gives the bits of a
    call outside the graph. A call that waits for the host could not be captured at all."""
    case = at_shape(family, shape)
    samples = [case.sample(torch.float32, seed) for seed in range(3)]
    samples = [Sample(lay_out(s.input), s.target, s.options) for s in samples]
    function = getattr(FL, case.loss)
    still = Sample(samples[0].input.clone(), samples[0].target.clone(), {**samples[0].options})
    for key, option in still.options.items():
        still.options[key] = option.clone() if isinstance(option, Tensor) else option
    result = result_shape(case.loss, still, reduction)
    upstream = draw_upstream(result, torch.float32)

    def step() -> tuple[Tensor, Tensor]:
        input = leaf(still.input)
        value = function(input, still.target, reduction=reduction, **still.options)
        return value.detach(), torch.autograd.grad(value, input, upstream)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = step()
    for seed, sample in enumerate(samples):
        still.input.copy_(sample.input)
        still.target.copy_(sample.target)
        for key, option in sample.options.items():
            if isinstance(option, Tensor):
                still.options[key].copy_(option)
        # The predicted upstream gradient and others: the first replay mispredicts.
        for again in range(2):
            upstream.copy_(draw_upstream(result, torch.float32, seed=seed))
            graph.replay()
            expected = value_and_grad(function, sample, reduction, upstream.clone())
            assert_same_bits(value, expected[0], f"value, sample {seed}, replay {again}")
            assert_same_bits(grad, expected[1], f"gradient, sample {seed}, replay {again}")


def test_captured_from_the_first_call_on() -> None:
    """One-time initialisation may happen during a capture."""
    program = """
import torch
import fusedloss.functional as FL

x, y = torch.randn(2, 300, device="cuda")
x.requires_grad_()
expected = 2 / 300 * (x.detach() - y)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    (gradient,) = torch.autograd.grad(FL.mse_loss(x, y), x)
graph.replay()
torch.testing.assert_close(gradient, expected)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_prediction_made_amid_a_capture() -> None:
    """A replay does not initialise the prediction again, and it outlives its module."""
    x, y = torch.randn(2, 300, device="cuda")
    x.requires_grad_()
    module, upstream = fusedloss.MSELoss(), torch.tensor(5.0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (gradient,) = torch.autograd.grad(module(x, y), x, upstream)
    prediction = module._prediction(x)
    assert prediction is not None
    for _ in range(3):
        graph.replay()
    assert prediction.tolist() == [5.0, 3.0]
    address = prediction.data_ptr()
    del module, prediction
    others = [torch.zeros(2, dtype=torch.float64, device="cuda") for _ in range(1000)]
    assert address not in {other.data_ptr() for other in others}
    graph.replay()
    torch.testing.assert_close(gradient, 5 * 2 / 300 * (x.detach() - y))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cuda_graph_of_an_own_loss(reduction: str) -> None:
    """Both gradients; parameters keep their values from the capture."""
    charbonnier.compile("cuda")
    x, y = torch.randn(2, 33, 257)
    other = torch.randn(2, 33, 257)
    upstream = draw_upstream(x.shape if reduction == "none" else torch.Size(), x.dtype)

    def step(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        leaves = leaf(a), leaf(b)
        value = charbonnier(*leaves, eps=0.1, reduction=reduction)
        return value.detach(), *torch.autograd.grad(value, leaves, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(x, y)
    for again in range(3):
        graph.replay()
        for mine, expected in zip(results, step(x.clone(), y.clone()), strict=True):
            assert_same_bits(mine, expected, f"replay {again}")
        x.copy_(other[0])
        y.copy_(other[1])


def test_nothing_waits_for_the_device() -> None:
    """torch raises at each of its own synchronisations, and a capture at any other."""
    samples = {loss: at_shape(loss, (33, 65)).sample(torch.float32) for loss in BASIC}
    for loss, sample in samples.items():
        value_and_grad(getattr(FL, loss), sample, "mean", 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss, sample in samples.items():
            input = leaf(sample.input)
            getattr(FL, loss)(input, sample.target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- streams and devices ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", BASIC)
def test_side_stream(loss: str) -> None:
    """The kernels run on the current stream, after the copy that makes their input."""
    large = at_shape(loss, (2**12, 1024))
    sample, other = large.sample(torch.float32), large.sample(torch.float32, seed=1)
    expected = value_and_grad(getattr(FL, loss), sample, "mean", 0.5)
    late = Sample(other.input.clone(), other.target.clone(), {})
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # long enough that another stream would have finished
        late.input.copy_(sample.input)
        late.target.copy_(sample.target)
        got = value_and_grad(getattr(FL, loss), late, "mean", 0.5)
    side.synchronize()
    assert_same_bits(got[0], expected[0], "value")
    assert_same_bits(got[1], expected[1], "gradient")


def test_side_stream_of_an_own_loss() -> None:
    """Kernels of a loaded library run in torch's context and on its current stream."""
    x, y = torch.randn(2, 2**22)
    expected = charbonnier(x, y)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got = charbonnier(late, y)
    side.synchronize()
    assert_same_bits(got, expected, "value")


def test_own_loss_on_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here, and this needs two")
    near = [leaf(t) for t in torch.randn(2, 33, 257)]
    far = [leaf(t.to("cuda:1")) for t in near]
    for tensors in (near, far):
        charbonnier(*tensors).backward()
    for one, other in zip(near, far, strict=True):
        assert one.grad is not None and other.grad is not None
        assert_same_bits(other.grad.to("cuda:0"), one.grad, "gradient")


@pytest.mark.parametrize("loss", BASIC)
def test_streams_at_once(loss: str) -> None:
    """Threads with one stream each share a call site: backward passes of others update the
    prediction while the blocks of a forward read it and until they have reported what they
    wrote."""
    samples = [at_shape(loss, (1031, 1021)).sample(torch.float32, seed) for seed in range(4)]
    function, upstreams = getattr(FL, loss), (0.5, 1.5)
    expected = [[value_and_grad(function, s, "mean", u) for u in upstreams] for s in samples]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            # Runs of equal values, or nothing would be predicted. All of it is queued before any
            # result is read, or the streams would hardly overlap.
            spells = [step // 8 % 2 for step in range(48)]
            got = [value_and_grad(function, samples[i], "mean", upstreams[u]) for u in spells]
            torch.cuda.current_stream().synchronize()
            for step, (u, (value, grad)) in enumerate(zip(spells, got, strict=True)):
                assert_same_bits(value, expected[i][u][0], f"value of thread {i}, step {step}")
                assert_same_bits(grad, expected[i][u][1], f"gradient of thread {i}, step {step}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_module_let_go_of_before_its_backward_has_run() -> None:
    """Nobody else gets the prediction's memory before the side stream has updated it."""
    input, target = torch.randn(2, 3000)
    input.requires_grad_()
    module = fusedloss.MSELoss()
    module(input, target)  # the prediction is allocated on this stream
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        value = module(input, target)
        torch.cuda._sleep(200_000_000)
        torch.autograd.grad(value, input, torch.full_like(value, 0.5))
    del value, module
    others = [torch.zeros(2, dtype=torch.float64) for _ in range(64)]
    torch.cuda.synchronize()
    assert not torch.stack(others).any()


def test_rows_of_several_lengths_in_several_threads() -> None:
    """One kernel, with more and with less shared memory."""
    shapes = [(3, 24_000), (3, 14_000), (3, 20_000), (3, 16_000)]
    samples = [at_shape("cross_entropy", shape).sample(torch.float32) for shape in shapes]
    expected = [value_and_grad(FL.cross_entropy, sample, "mean", 0.5) for sample in samples]

    def work(i: int) -> None:
        for _ in range(200):
            got = value_and_grad(FL.cross_entropy, samples[i], "mean", 0.5)
            assert_same_bits(got[1], expected[i][1], f"gradient of thread {i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.parametrize("loss", BASIC)
def test_another_device_than_the_current_one(loss: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here, and this needs two")
    sample = at_shape(loss, (33, 257)).sample(torch.float32)
    far = to(sample, "cuda:1")
    assert torch.cuda.current_device() == 0
    for module in (None, MODULES[loss]()):
        function = getattr(FL, loss) if module is None else module
        for on in (sample, far, sample):  # a module moves along with its inputs
            input = leaf(on.input)
            value = function(input, on.target)
            (grad,) = torch.autograd.grad(value, input, torch.full_like(value, 0.5))
            assert value.device == grad.device == on.input.device
            expected = sample_truth(loss, sample, "mean", 0.5)
            assert_close_to_truth(
                value.detach().to("cuda:0"), expected.value, expected.value_scale, "value"
            )
            assert_close_to_truth(grad.to("cuda:0"), expected.grad, expected.grad_scale, "gradient")


# ---- more than 2^31 elements --------------------------------------------------------------------

# Past 2^31 and 2^32 elements, with a tail shorter than a vector of 16 bytes.
PAST_2_31 = 2**31 + 4099
PAST_2_32 = 2**32 + 4099


@pytest.mark.slow
@pytest.mark.parametrize("elements", [PAST_2_31, PAST_2_32])
@pytest.mark.parametrize("loss", ["mse_loss", "binary_cross_entropy_with_logits"])
def test_pointwise_past_2_31_elements(loss: str, elements: int) -> None:
    """Each part has the same gradient as alone, and the sum is that of the parts."""
    need_memory(3 * 2 * elements / GIB + 2)
    unit = at_shape(loss, (4099,)).sample(torch.bfloat16)
    whole, rest = divmod(elements, 4099)

    def step(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        input = leaf(input)
        # bf16 cannot represent a sum of so many.
        with torch.autocast("cuda", dtype=torch.bfloat16):
            value = getattr(FL, loss)(input, target, reduction="sum")
        return value.detach().double(), torch.autograd.grad(value, input, torch.tensor(0.5))[0]

    one, alone = step(unit.input, unit.target)
    tail, _ = step(unit.input[:rest], unit.target[:rest])
    value, grad = step(_tiled(unit.input, elements), _tiled(unit.target, elements))
    assert abs(value / (one * whole + tail) - 1) < 1e-6
    for start in (0, whole // 2 * 4099, (whole - 1) * 4099):
        assert_same_bits(grad[start : start + 4099], alone, f"at {start}")
    assert_same_bits(grad[whole * 4099 :], alone[:rest], "tail")
    assert bool((grad[::4099] == alone[0]).all()), "the first element of every part"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "classes"), [(2**14 + 3, 2**17 + 5), (2**27 + 9, 17), (2**7 + 1, 2**24 - 1)], ids=str
)
def test_cross_entropy_past_2_31_elements(rows: int, classes: int) -> None:
    """Rows from first to last against float64."""
    need_memory(2 * 2 * rows * classes / GIB + 8 * rows / GIB + 6)
    assert rows * classes > 2**31
    input = torch.empty(rows, classes, dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.randint(classes, (rows,))
    value = FL.cross_entropy(input, target, reduction="sum")
    (grad,) = torch.autograd.grad(value, input, torch.full_like(value, 0.5))
    few = max(1, min(rows, 2**20 // classes))
    for start in (0, rows // 2, rows - few):
        part = slice(start, start + few)
        sample = Sample(input.detach()[part], target[part], {})
        expected = sample_truth("cross_entropy", sample, "sum", 0.5)
        assert_close_to_truth(grad[part], expected.grad, expected.grad_scale, f"from row {start}")


def _tiled(unit: Tensor, elements: int) -> Tensor:
    """Repeats the same numbers, without a second tensor of that size."""
    result = torch.empty(elements, dtype=unit.dtype)
    whole = elements // unit.numel()
    result[: whole * unit.numel()].view(whole, -1).copy_(unit)
    result[whole * unit.numel() :].copy_(unit[: elements % unit.numel()])
    return result
