"""Which backends run here, and settings that hold for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import fusedloss
from cases import DEVICE, DTYPES, FAMILIES, dtypes
from fusedloss.custom import prepare
from helpers import EMULATED, FUSED, INTERPRETED, ROWS

# CI sets this, so that a broken build cannot pass by skipping.
REQUIRE_COMPILED = os.environ.get("FUSEDLOSS_REQUIRE_COMPILED") == "1"

# One thread unless a test says otherwise: on a busy machine, threads that wait for other cores take
# ten times as long over small tensors. test_memory.py checks that more threads give the same bits.
torch.set_num_threads(1)

settings.register_profile(
    "default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    if EMULATED and fusedloss.info().build.get("cuda") != "emulated":
        pytest.exit("FUSEDLOSS_EMULATED=1, but another package was imported", returncode=3)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.exit("FUSEDLOSS_TEST_DEVICE=cuda, but torch finds no GPU", returncode=3)
    config.addinivalue_line("markers", "slow: takes seconds rather than milliseconds")
    config.addinivalue_line("markers", "interpret_all: in Triton's interpreter too")


# These tests apply to other devices too; the rest is about the CPU, or about no device.
ON_ANY_DEVICE = frozenset(
    f"test_{name}"
    for name in (
        *("values", "second_order", "one_pass", "field_mistakes", "edge_cases", "layouts"),
        *("properties", "log_loss", "operators", "faults", "custom", "cuda", "triton"),
    )
)


# In Triton's interpreter only this many instances of each test function run, spread evenly.
INTERPRETED_EACH = 8


def keep_tests_of_triton(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only the tests of Triton's kernels; in its interpreter, only those that are quick there."""
    functions: dict[Any, list[pytest.Item]] = {}
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend == FUSED or "fused" in getattr(item, "fixturenames", ()):
            functions.setdefault(getattr(item, "function", item), []).append(item)
    kept: set[pytest.Item] = set()
    for found in functions.values():
        if INTERPRETED and not found[0].get_closest_marker("interpret_all"):
            quick = [item for item in found if not item.get_closest_marker("slow")]
            golden = 0.6180339887498949
            spread = (i * golden % 1 for i in range(INTERPRETED_EACH))
            found = [quick[int(at * len(quick))] for at in spread if quick]
        kept.update(found)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def torch_has_it(item: pytest.Item) -> bool:
    """Whether torch has the item's loss in its dtype; and over the emulator, whether that has kernels of
    it (those of custom row losses are asked in tests/cuda_emulator/test_custom_rows.py)."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    family, dtype = params.get("family"), params.get("dtype")
    if EMULATED and any(str(value).startswith(ROWS) for value in params.values()):
        return False
    return family not in FAMILIES or dtype not in DTYPES or dtype in dtypes(family)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = filter(torch_has_it, items)
    if FUSED == "triton":
        keep_tests_of_triton(config, items)
    if DEVICE != "cpu":
        skip = pytest.mark.skip(reason="is not about the device of FUSEDLOSS_TEST_DEVICE")
        for item in items:
            if item.path.stem not in ON_ANY_DEVICE:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    """Tensors that a test makes are on the device under test."""
    if DEVICE == "cpu":
        yield
    else:
        with torch.device(DEVICE):
            yield


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


@pytest.fixture(params=[FUSED, "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can run here, in use."""
    need(request.param)
    with fusedloss.backend(request.param):
        yield request.param


@pytest.fixture
def fused() -> Iterator[str]:
    """The fused backend under test, in use."""
    need(FUSED)
    with fusedloss.backend(FUSED):
        yield FUSED


@pytest.fixture
def compiled() -> Iterator[str]:
    """The compiled backend only, for its special features (threads, one pass, fresh memory)."""
    need("compiled")
    with fusedloss.backend("compiled"):
        yield "compiled"


@pytest.fixture(autouse=True)
def unchanged_settings() -> Iterator[None]:
    """Fails a test that leaves a global setting changed, since the next one could not be
    trusted."""
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


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every test run compiles its losses anew, but the runs of CI share a folder: those for another
    torch, or under sanitizers, compile the same text with the same command."""
    folder = os.environ.get("FUSEDLOSS_TEST_CACHE") or tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDLOSS_CACHE_DIR", str(folder))
        yield


@pytest.fixture(autouse=True, scope="session")
def emulated_losses() -> Iterator[None]:
    """Stands for NVRTC where the extension runs on the emulator."""
    with pytest.MonkeyPatch.context() as patch:
        if EMULATED:
            from own_losses import load  # the module beside that extension's script

            patch.setitem(prepare._LOADERS["pointwise_loss"], ("compiled", "cpu"), load)
        yield
