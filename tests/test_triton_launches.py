"""The short way to launch a Triton kernel: what it keeps is what Triton would find. No GPU is needed,
for a driver that does nothing stands for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fusedloss import backends

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(backends.INTERPRETED, reason="TRITON_INTERPRET=1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

import custom_losses
import fusedloss.functional as FL
import row_losses
from fusedloss.backends.triton import runtime
from fusedloss.backends.triton.runtime import Divisor
from helpers import leaf

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}


class Driver:
    """A device of the target that takes every launch."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: device  # Triton keeps compiled kernels by it
        self.get_current_stream = lambda device: 7
        self.get_active_torch_device = lambda: torch.device("cpu")


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sends the calls of CPU tensors to Triton, which believes to have such a GPU."""
    device = 1000 + list(TARGETS).index(request.param)
    driver = Driver(TARGETS[request.param], device)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.version, "hip", "7.0" if request.param == "hip" else None)
    monkeypatch.setattr(backends, "fused_on", {"cpu": "triton"})
    monkeypatch.setattr(backends, "compiled_runs", False)
    monkeypatch.setattr(runtime, "_launchers", {})
    monkeypatch.setattr(runtime, "_tickets", {})
    return str(request.param)


def specialization(kernel: Any, arguments: dict[str, Any]) -> str:
    """What Triton's own launch makes of the arguments."""
    device = triton.runtime.driver.active.get_current_device()
    *_, bind = kernel.device_caches[device]
    _, found, _ = bind(**arguments, num_warps=4, **runtime.NO_FUSION)
    return repr(found)


class Keys:
    """Instead of a launch: the same key must always mean the same specialization."""

    def __init__(self) -> None:
        self.known: dict[Any, str] = {}

    def __call__(
        self, kernel: Any, programs: int, device: Any, arguments: Any, tensors: Any, numbers: Any,
        num_warps: int = 4,
    ) -> None:  # fmt: skip
        key = runtime.key_of(kernel, device, tensors, numbers, num_warps)
        found = specialization(kernel, arguments)
        assert self.known.setdefault(key, found) == found
        assert list(arguments) != [] and set(arguments) == set(kernel.arg_names)


def unaligned(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same numbers, where memory begins some elements behind a multiple of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 64)
    first = -memory.data_ptr() % 64 // memory.element_size()
    return memory[first + elements :][: tensor.numel()].view(tensor.shape).copy_(tensor)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "unaligned": lambda t: unaligned(t, 1),
    "by 8 bytes": lambda t: unaligned(t, 8 // t.element_size()),
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.stack((t, t), -1)[..., 0],
    "of wider rows": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


def values() -> Iterator[torch.Tensor]:
    """Losses over tensors that differ in all that Triton looks at."""
    shapes = [(1, 1), (2, 1), (3, 5), (16, 32), (17, 16), (64, 48), (2, 2100), (2500, 3)]
    dtypes = torch.float32, torch.bfloat16, torch.float64
    for shape, dtype, layout in itertools.product(shapes, dtypes, LAYOUTS):
        x = LAYOUTS[layout](torch.rand(shape).to(dtype))
        y = LAYOUTS[layout](torch.rand(shape).to(dtype))
        w = torch.rand(shape[1:]).to(dtype)
        indices = torch.randint(shape[1], shape[:1])
        for options in ({}, {"reduction": "sum"}, {"reduction": "none"}):
            yield FL.mse_loss(leaf(x), y, **options)
            yield FL.l1_loss(leaf(x), y, **options)
            yield FL.mse_loss(leaf(x), y, weight=LAYOUTS[layout](torch.rand_like(x)), **options)
            yield FL.huber_loss(leaf(x), y, delta=0.3, **options)
            yield FL.binary_cross_entropy_with_logits(leaf(x), y, pos_weight=w, **options)
            yield FL.cross_entropy(leaf(x), indices, **options)
            yield FL.cross_entropy(leaf(x), indices, label_smoothing=0.1, **options)
            yield FL.cross_entropy(leaf(x), y, label_smoothing=0.1, **options)
            for ignored in (3, 1 << 40):
                yield FL.cross_entropy(leaf(x), indices, w, ignore_index=ignored, **options)
            yield custom_losses.focal(leaf(x), leaf(y), **options)
            yield custom_losses.focal(leaf(x), y, **options)
            yield row_losses.distillation(leaf(x), y, **options)
            yield row_losses.balanced(
                leaf(x), indices, w, weight=LAYOUTS[layout](y)[:, 0], **options
            )
            for ignored in (3, 1 << 40):
                old = LAYOUTS[layout](y)[:, -1]
                yield row_losses.scaled(
                    leaf(x), indices, leaf(old), ignore_index=ignored, **options
                )
    for numel in (1 << 16, 1 << 31):  # no page of the larger one is touched
        large = torch.empty(numel, dtype=torch.bfloat16)
        yield FL.mse_loss(leaf(large), large, reduction="sum")


def leaves_of(node: Any) -> Iterator[torch.Tensor]:
    for following, _ in node.next_functions if node else ():
        if hasattr(following, "variable"):
            yield following.variable
        yield from leaves_of(following)


def test_a_key_means_one_kernel(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys()
    monkeypatch.setattr(runtime, "start", keys)
    for value in values():
        for upstream in (torch.ones_like(value), unaligned(torch.ones_like(value), 1)):
            leaves = [*leaves_of(value.grad_fn)]
            torch.autograd.grad(value, leaves, upstream, retain_graph=True)
    # Sharing a key is what it is for.
    assert len(set(keys.known.values())) > 100
    assert len(keys.known) > len(set(keys.known.values()))


def test_large_storage(target: str) -> None:
    """Triton for AMD's GPUs asks whether a pointer stays within two gigabytes."""
    small = torch.empty(4, dtype=torch.uint8)
    large = torch.empty((1 << 31) + 64, dtype=torch.uint8)[:4]  # no page of it is touched
    largest = torch.empty((1 << 31) - 1, dtype=torch.uint8)[:4]
    kernel = runtime.count_classes
    rest = {"counts": None, "ticket": None, "n": 1, "each": 1, "classes": 1, "ignore_index": 1}

    def of(tensor: torch.Tensor) -> tuple[Any, str]:
        key = runtime.key_of(kernel, tensor.device, (tensor,), (), 4)
        return key, specialization(kernel, {"indices": tensor, "weight": None, **rest})

    assert of(small) == of(largest)
    differs = [a != b for a, b in zip(of(small), of(large), strict=True)]
    assert differs == [target == "hip"] * 2


class Recorded:
    """Stands for a compiled kernel and for its launcher, and keeps what it is called with."""

    function, packed_metadata = 3, (4, 1, 0)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.run = lambda *args: self.calls.append(args)

    def launch_metadata(self, *args: Any) -> None:
        return None


def test_launches(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second launch passes to Triton's launcher what the first one did, without Triton's binder."""
    compiled: list[Recorded] = []

    def compile(*args: Any) -> Recorded:
        compiled.append(Recorded())
        return compiled[-1]

    kernel = runtime.count_classes
    bound = []
    run = type(kernel).run

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        bound.append(self)
        return run(self, *args, **options)

    monkeypatch.setattr(type(kernel), "_do_compile", compile)
    monkeypatch.setattr(type(kernel), "run", counted)
    indices, weight = torch.zeros(9, dtype=torch.int64), torch.ones(5)
    for _ in range(3):
        Divisor.of_classes(indices, weight, 5, -100)
    assert len(bound) == 1
    assert len(compiled) == 1
    (first, *others), names = compiled[0].calls, kernel.arg_names
    assert len(others) == 2
    for call in others:
        assert call[:6] == first[:6]  # programs, stream, function and metadata
        assert call[6:9] == (None, None, None)
        for name, ours, theirs in zip(names, call[9:], first[9:], strict=True):
            assert ours is theirs or name == "counts" or ours == theirs

    # Somebody listens; or it is another Triton, whose launchers we do not know.
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        Divisor.of_classes(indices, weight, 5, -100)
    finally:
        hook.remove(print)
    assert len(bound) == 2
    monkeypatch.setattr(runtime, "binds_once", False)
    Divisor.of_classes(indices, weight, 5, -100)
    assert len(bound) == 3


def test_known_kernels_are_bounded(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MAX_KNOWN", 5)
    monkeypatch.setattr(type(runtime.count_classes), "_do_compile", lambda *args: Recorded())
    for n in range(1, 20):
        Divisor.of_classes(torch.zeros(n, dtype=torch.int64), None, 5, -100)
        assert 1 <= len(runtime._launchers) <= 5


def test_a_ticket_for_each_stream(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of a stream share one; a captured graph has one for each of its kernels."""
    driver = triton.runtime.driver.active
    x = torch.zeros(3)
    first = runtime.ticket_of(x)
    assert runtime.ticket_of(x) is first
    assert first.tolist() == [0]
    monkeypatch.setattr(driver, "get_current_stream", lambda device: 8)
    second = runtime.ticket_of(x)
    assert second.data_ptr() != first.data_ptr()
    monkeypatch.setattr(backends, "is_captured", lambda input: True)
    captured = [runtime.ticket_of(x) for _ in range(2)]
    assert len({ticket.data_ptr() for ticket in (first, second, *captured)}) == 4


def test_the_version_is_known() -> None:
    """Of the Triton that is installed; read its JITFunction.run and launchers before you add one."""
    assert runtime.binds_once
    assert hasattr(CompiledKernel, "run")
