"""The emulator runs right kernels right, and reports each kind of wrong one (selftest.cu)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from build import ROOT, VARIANTS, build, run
from translate import TranslationError, translate

SELFTEST = Path("tests/cuda_emulator/selftest.cu")

RIGHT = [
    "barrier",
    "rotate",
    "votes",
    "shuffles",
    "warp_exchange",
    "last_block",
    "all_fence",
    "launches_ordered",
    "atomics",
    "tell_host",
    "meanwhile",
    "cluster",
    "cluster_large",
    "static_bounds_inside",
    "dynamic_bounds_inside",
    "aligned",
    "garbage",
    "shared_allowed",
    "dimensions",
    "numbers",
]

RACE = "ThreadSanitizer: data race"
POISON = "AddressSanitizer: use-after-poison"
STUCK = r"divergent barrier or collective(.|\n)*"

# What must come out of a case, in which variant.
WRONG = [
    ("barrier_missing", "plain", "wrong: reversed"),
    ("barrier_missing", "thread", RACE),
    ("rotate_missing", "plain", "wrong: rotated"),
    ("rotate_missing", "thread", RACE),
    ("warp_exchange_missing", "thread", RACE),
    ("last_block_release_fence", "thread", RACE),
    ("last_block_acquire_fence", "thread", RACE),
    ("last_block_barrier", "thread", RACE),
    ("last_block_scope", "thread", RACE),
    ("tell_host_scope", "thread", RACE),
    ("meanwhile_plain", "thread", RACE),
    ("blocks_unordered", "thread", RACE),
    ("blocks_unordered_many", "thread", RACE),
    ("divergent_exit", "plain", STUCK + r"thread \(7, 0, 0\): has exited"),
    ("divergent_exit", "thread", STUCK + r"thread \(7, 0, 0\): has exited"),
    ("divergent_place", "plain", STUCK + r"thread \(32, 0, 0\): as the next 31, waits at __sync"),
    ("divergent_count", "plain", STUCK + r"thread \(0, 0, 0\): as the next 31, has exited"),
    ("divergent_warp", "plain", STUCK + r"thread \(3, 0, 0\): has exited"),
    ("divergent_mask", "plain", STUCK + r"lanes 0xffffffff"),
    ("divergent_shuffle", "plain", STUCK + r"waits at a shuffle(.|\n)*has exited"),
    ("divergent_cluster", "plain", STUCK + r"waits at cluster\.sync(.|\n)*has exited"),
    ("shuffle_outside_mask", "plain", r"reads lane \d+, lanes are 0xffff"),
    ("shuffle_unnamed", "plain", r"by lane \d+, lanes are 0xffff"),
    ("shuffle_lane_missing", "plain", r"there is no lane 8"),
    ("cluster_exited", "plain", r"shared memory of a block that has exited"),
    ("cluster_exited", "address", POISON),
    ("cluster_exited", "thread", RACE),
    ("cluster_unstarted", "plain", r"wrong: of the next block"),
    ("cluster_unstarted", "thread", RACE),
    ("cluster_divides", "plain", r"clusters of \(4, 1, 1\) blocks over a grid of \(6, 1, 1\)"),
    ("cluster_too_large", "plain", r"clusters of \(16, 1, 1\)"),
    ("global_bounds", "address", r"AddressSanitizer: heap-buffer-overflow"),
    ("static_bounds", "address", r"index 10 out of bounds"),
    ("static_bounds_pointer", "address", POISON),
    ("static_bounds_below", "address", POISON),
    ("dynamic_bounds", "address", POISON),
    ("dynamic_bounds_below", "address", POISON),
    ("misaligned", "address", r"misaligned address"),
    ("block_too_large", "plain", r"blocks of \(1025, 1, 1\) threads"),
    ("grid_empty", "plain", r"grid of \(0, 1, 1\) blocks"),
    ("shared_not_allowed", "plain", r"49168 bytes of dynamic shared memory, allowed are 49152"),
    ("static_and_dynamic", "plain", r"48 bytes of static and 49152 of dynamic shared memory"),
]


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return {variant: build([SELFTEST], variant) for variant in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", RIGHT)
def test_right(programs: dict[str, Path], case: str, variant: str) -> None:
    result = run(programs[variant], case)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n" and not result.stderr


@pytest.mark.parametrize("case, variant, message", WRONG)
def test_wrong(programs: dict[str, Path], case: str, variant: str, message: str) -> None:
    result = run(programs[variant], case)
    assert result.returncode not in (0, 2)
    assert re.search(message, result.stdout + result.stderr), result.stdout + result.stderr


def test_every_case_is_tested() -> None:
    cases = set(re.findall(r'^    \{"(\w+)", ', (ROOT / SELFTEST).read_text(), re.MULTILINE))
    assert cases == {*RIGHT, *(case for case, _, _ in WRONG), "time"}


@pytest.mark.parametrize("seed", range(1, 4))
def test_other_schedules(programs: dict[str, Path], seed: int) -> None:
    settings = {"EMULATOR_SEED": str(seed)}
    for case in ("rotate", "last_block", "cluster"):
        assert run(programs["thread"], case, settings=settings).returncode == 0
    for case in ("rotate_missing", "last_block_release_fence", "cluster_exited"):
        assert RACE in run(programs["thread"], case, settings=settings).stderr


def test_failures_name_the_kernel(programs: dict[str, Path]) -> None:
    assert "kernel (anonymous namespace)::divergent_exit()" in (
        run(programs["plain"], "divergent_exit").stderr
    )


@pytest.mark.parametrize(
    "cuda, cpp",
    [
        ("f<<<1, n>>>();", "::emulator::configure(f, 1, n)();"),
        ("f<<<g(1, 2), n>>>(x);", "::emulator::configure(f, g(1, 2), n)(x);"),
        (
            "a::f<A<B>, 3><<<(1 >> 2),\n n>>>(x);",
            "::emulator::configure(a::f<A<B>, 3>, (1 >> 2),\n n)(x);",
        ),
        ("return k\n    <<<1, 2>>>(x);", "return ::emulator::configure(k\n    , 1, 2)(x);"),
        ("// f<<<1, 2>>>();", "// f<<<1, 2>>>();"),
        ('"__shared__ int x;"', '"__shared__ int x;"'),
        (
            "extern __shared__ uint4 shared[];",
            "uint4* const shared = static_cast<uint4*>(::emulator::dynamic_shared());",
        ),
    ],
)
def test_translation(cuda: str, cpp: str) -> None:
    assert translate(cuda) == cpp


@pytest.mark.parametrize(
    "cuda",
    ["__shared__ int a, b;", "__shared__ int a = 1;", "extern __shared__ int a;", "<<<1>>>()"],
)
def test_what_is_not_translated(cuda: str) -> None:
    with pytest.raises(TranslationError):
        translate(cuda)
