"""The kernels of every CPU capability, each in a process of its own.

torch chooses its capability when it is loaded, by ATEN_CPU_CAPABILITY and the CPU. Ours follows
torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import need

TESTS = Path(__file__).parent
RANKED = ("DEFAULT", "AVX2", "AVX512")
CAPABILITIES = {name.lower(): name for name in RANKED}
# The whole table in fp32 and bf16 with reduction "mean", and tests that depend on vector widths.
SUBSET = (
    "(test_value_and_gradient and mean and (fp32 or bf16)) or test_memory_on_no_boundary"
    " or test_padded_lanes or test_leading_block or test_masked_logits or test_same_bits_again"
)


def run(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def capabilities(capability: str) -> list[str]:
    """What torch runs with if it is asked for this one, and what we run with."""
    ask = "import torch, fusedloss; print(torch.backends.cpu.get_cpu_capability())"
    told = run(capability, "-c", ask + "; print(fusedloss.info().cpu_capability)")
    assert told.returncode == 0, told.stderr
    return told.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels(capability: str) -> None:
    need("compiled")
    import fusedloss._C as extension

    wanted, built = CAPABILITIES[capability], extension.build_info()["cpu_capabilities"]
    if wanted not in built:
        pytest.skip(f"no kernels were built for {wanted}")
    torch_has, ours = capabilities(capability)
    # torch believes ATEN_CPU_CAPABILITY, whatever the CPU has.
    best = torch.backends.cpu.get_cpu_capability()
    if torch_has != wanted or RANKED.index(wanted) > RANKED.index(best):
        pytest.skip(f"this CPU runs {best}, not {wanted}")
    if wanted == best and len(built) == len(RANKED):  # as in a usual build
        pytest.skip("all other tests run those")
    assert ours == wanted
    files = [TESTS / name for name in ("test_values.py", "test_layouts.py", "test_memory.py")]
    done = run(
        capability,
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SUBSET),
        *map(str, [*files, TESTS / "test_field_mistakes.py"]),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_capabilities_agree() -> None:
    """A missing capability is not used: we follow torch's choice, as far as kernels were built."""
    need("compiled")
    import fusedloss._C as extension

    built = extension.build_info()["cpu_capabilities"]
    for capability in CAPABILITIES:
        torch_has, ours = capabilities(capability)
        upto = RANKED[: RANKED.index(torch_has) + 1]
        assert ours == [name for name in upto if name in built][-1], (capability, torch_has)
