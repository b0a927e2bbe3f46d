"""The errors of our own SIMD functions, from compiling vocabulary.cpp and elementary.cpp."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from conftest import REQUIRE_COMPILED, need

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# From the oldest to the newest.
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]

# The largest error in ULP, rounded up, without fused multiply-add (DEFAULT) and with it, and with
# AVX-512 if that has another form. Measured over all floats of the domain; for ratio, a quotient by
# some betas, over 2**28; and for erfc, exp_minus_square and those of gamma over 2 * 10**7.
BOUNDS: dict[str, dict[str, tuple[float, ...]]] = {
    "vocabulary": {
        "exp_nonpositive": (1.0, 1.1),
        "log_finite": (0.9, 0.8),
        "log1p_finite": (0.9, 0.8),
        "log1p_unit": (2.0, 2.0, 1.4),
        "ratio": (1.3, 0.6),
        "ratio_tiny": (1.3, 1.3),
    },
    "elementary": {
        "exp": (1.0, 1.1),
        "expm1": (1.7, 1.6),
        "tanh": (2.5, 2.5),
        "erf": (1.5, 1.3),
        "erfc": (69.0, 4.5),
        "lgamma": (7.0, 7.0),  # of negative numbers, by glibc
        "lgamma_positive": (2.7, 2.6),
        "sin": (1.7, 1.7),
        "cos": (1.6, 1.6),
        "sqrt": (0.5, 0.5),
        "log": (0.9, 0.8),
        "log1p": (0.9, 0.8),
        "pow": (66.0, 8.0),  # x^101
        "exp_minus_square": (65.0, 1.3),
        "digamma": (2.7, 2.6),
        "trigamma": (4.6, 4.3),
        "exp_double": (0.8, 0.8),
        "expm1_double": (0.9, 0.8),
        "tanh_double": (2.3, 0.9),  # without fused multiply-add libm's
        "log_double": (0.8, 0.8),
        "log1p_double": (0.8, 0.8),
        "exp_minus_square_double": (520.0, 1.5),
        "digamma_double": (8.0, 8.0),
        "trigamma_double": (4.3, 4.3),
    },
}
# How many floats of each domain the test tries; 2**32 are all of them and take minutes.
POINTS = 10_000_000


def cannot(reason: str) -> NoReturn:
    if REQUIRE_COMPILED:
        pytest.fail(f"FUSEDLOSS_REQUIRE_COMPILED=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """setup.py's definitions: the compiler and flags for kernels."""
    need("compiled")
    for path in (ROOT / "setup.py", ROOT / "csrc"):
        if not path.exists():
            cannot(f"there is no {path.name} beside the tests")
    # It adds to both.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "path", sys.path.copy())
    try:
        monkeypatch.setattr("setuptools.setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))
    except (ImportError, SystemExit) as error:
        cannot(f"setup.py does not run: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", BOUNDS)
def test_errors(source: str, capability: str, build: dict[str, Any], tmp_path: Path) -> None:
    if capability not in build["CPU_CAPABILITIES"]:
        pytest.skip(f"no kernels are built for {capability} on this machine")
    has = torch.backends.cpu.get_cpu_capability()
    beyond = CAPABILITIES.index(has) if has in CAPABILITIES else 0
    if CAPABILITIES.index(capability) > beyond:
        pytest.skip(f"this CPU runs {has}, not {capability}")
    compiler = build["find_compiler"]()
    if compiler is None:
        cannot("there is no C++ compiler")

    program = tmp_path / source
    flags = [*build["cxx_flags"](compiler), *build["CPU_CAPABILITIES"][capability]]
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    flags += ["-I", str(ROOT / "csrc")]
    run([compiler, *flags, str(TESTS / f"{source}.cpp"), "-o", str(program)])

    errors = {}
    for line in run([str(program), str(POINTS)]).splitlines():
        function, error, argument, result = line.split()
        errors[function] = float(error)
        bounds = BOUNDS[source][function]
        bound = bounds[min(CAPABILITIES.index(capability), len(bounds) - 1)]
        assert errors[function] <= bound, f"{function}({argument}) = {result}: {error} ULP off"
    assert errors.keys() == BOUNDS[source].keys()


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
