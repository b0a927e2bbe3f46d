"""Which backends run here, and settings that hold for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before anything imports Triton: without a GPU its kernels run in Triton's interpreter.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

import fusedloss

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# CI sets it, so that a broken build cannot pass by skipping.
REQUIRE_COMPILED = os.environ.get("FUSEDLOSS_REQUIRE_COMPILED") == "1"

# The CUDA operators stand for the CPU's, over the emulator: see tests/cuda_emulator/extension.py.
EMULATED = os.environ.get("FUSEDLOSS_EMULATED") == "1"

# One thread, but where a test says otherwise: threads that wait for a busy machine's other cores
# take ten times as long over small tensors. test_memory.py holds the bits on more threads equal.
torch.set_num_threads(1)

settings.register_profile(
    "default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds rather than milliseconds")
    config.addinivalue_line("markers", "interpret_all: every instance runs in the interpreter too")


# In Triton's interpreter a call takes 50 ms: of each test function that many of its instances run.
# FUSEDLOSS_INTERPRET_ALL=1 runs them all, in hours.
INTERPRETED = 6


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not INTERPRETING or os.environ.get("FUSEDLOSS_INTERPRET_ALL") == "1":
        return
    of_function: dict[object, list[pytest.Item]] = {}
    for item in items:
        params = getattr(item, "callspec", None)
        if params is not None and "triton" in params.params.values():
            if item.get_closest_marker("interpret_all") is None:
                of_function.setdefault(getattr(item, "function", None), []).append(item)
    dropped = set()
    for found in of_function.values():
        # Evenly over them, by a step that meets every value of the other parameters.
        kept = {i * len(found) // INTERPRETED for i in range(INTERPRETED)}
        dropped |= {item for i, item in enumerate(found) if i not in kept}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def why_not(backend: str) -> str | None:
    """Why a backend cannot run here; None if it can."""
    return fusedloss.info().backends[backend]


def need(backend: str) -> None:
    reason = why_not(backend)
    if reason is None:
        return
    if backend == "compiled" and REQUIRE_COMPILED:
        pytest.fail(f"FUSEDLOSS_REQUIRE_COMPILED=1, but compiled cannot run: {reason}")
    pytest.skip(f"{backend} cannot run: {reason}")


@pytest.fixture(params=["compiled", "triton", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can run here, made the one in use."""
    need(request.param)
    with fusedloss.backend(request.param):
        yield request.param


@pytest.fixture(params=["compiled", "triton"])
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend of fused kernels that can run here, made the one in use."""
    need(request.param)
    with fusedloss.backend(request.param):
        yield request.param


@pytest.fixture
def compiled() -> Iterator[str]:
    """The compiled backend alone, for what is its own (threads, one pass, fresh memory)."""
    need("compiled")
    with fusedloss.backend("compiled"):
        yield "compiled"


@pytest.fixture(autouse=True)
def unchanged_settings() -> Iterator[None]:
    """A test that leaves a global setting changed would make the next one lie."""
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    yield
    after = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    assert after == before
