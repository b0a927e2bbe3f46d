"""Compiling losses of one's own: the cache, processes side by side, and machines that cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedloss
from conftest import need
from fusedloss import backends
from fusedloss import math as fm
from fusedloss.custom import building

SCRIPT = """
import torch, fusedloss
from fusedloss import math as fm

@fusedloss.pointwise_loss
def smooth(input, target, *, scale=1.5):
    d = scale * (input - target)
    return fm.tanh(d) ** 2 + fm.pow(1 + d ** 2, 0.3) + fm.erf(d) * fm.sin(d)

torch.manual_seed(0)
x, y = torch.randn(2, 1003).requires_grad_()
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    a, b = (t.detach().to(dtype).requires_grad_() for t in (x, y))
    ours = torch.autograd.grad(smooth(a, b), (a, b), torch.tensor(3.0, dtype=dtype))
    right = torch.autograd.grad(smooth.reference(a, b), (a, b), torch.tensor(3.0, dtype=dtype))
    for mine, theirs in zip(ours, right):
        torch.testing.assert_close(mine, theirs)
print(fusedloss.explain(smooth, x, y).fused, fusedloss.info().cpu_capability)
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    script = cache.parent / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "FUSEDLOSS_CACHE_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def compiled_lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("fusedloss: compiled smooth")]


@pytest.mark.slow
def test_cache(tmp_path: Path) -> None:
    """Of two processes one compiles, and says so; a third finds it; nothing else is left over."""
    need("compiled")
    cache = tmp_path / "cache"
    both = [start(cache), start(cache)]
    said = [finished(process) for process in both]
    assert [out.split()[0] for out, _ in said] == ["True", "True"]
    lines = [line for _, err in said for line in compiled_lines(err)]
    assert len(lines) == 1 and " s; kept in " in lines[0] and " for the CPU in " in lines[0]
    assert not compiled_lines(finished(start(cache))[1])
    kinds = sorted(path.suffix for path in cache.iterdir())
    assert kinds == [".cpp", ".lock", ".so"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_capabilities(tmp_path: Path, capability: str) -> None:
    """The other instruction sets that torch may run with."""
    need("compiled")
    out, _ = finished(start(tmp_path / "cache", ATEN_CPU_CAPABILITY=capability))
    assert out.split()[0] == "True"


@pytest.mark.slow
def test_no_compiler(tmp_path: Path) -> None:
    """One warning, and plain PyTorch."""
    need("compiled")
    out, err = finished(start(tmp_path / "cache", CXX="no-such-compiler"))
    assert out.split()[0] == "False"
    assert err.count("smooth runs on plain PyTorch, without fused kernels") == 1
    assert "CXX='no-such-compiler' is no program" in err


def test_flags_of_another_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only GCC knows is asked of no other: clang would fail on it."""
    need("compiled")
    for compiler, said, has in (("g++", "g++ 12.2.0", True), ("c++", "clang version 19.1", False)):
        program = tmp_path / compiler
        program.write_text(f"#!/bin/sh\necho '{said}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("CXX", str(program))
        command = building.cpu_command()
        assert command[0] == str(program)
        assert ("-fsched-pressure" in command) is has
        wide = backends.info().build["cpu_capability"] == "AVX512"
        assert ("--param=sched-pressure-algorithm=2" in command) is (has and wide)


def test_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path))
    assert building.cache_directory() == tmp_path
    monkeypatch.delenv("FUSEDLOSS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert building.cache_directory() == tmp_path / "fusedloss"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert building.cache_directory() == Path.home() / ".cache" / "fusedloss"


def test_no_place_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be made: compiled for this process alone."""
    need("compiled")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "file" / "cache"))

    @fusedloss.pointwise_loss
    def squared(input, target):  # type: ignore[no-untyped-def]
        return (input - target) ** 2

    assert squared(torch.tensor([3.0]), torch.tensor([1.0])) == 4


def test_formulas_that_gcc_fails_on() -> None:
    """GCC 12 for AVX-512, while it vectorizes straight-line code."""
    need("compiled")

    @fusedloss.pointwise_loss
    def sine_or_product(input, target, *, p=2.0):  # type: ignore[no-untyped-def]
        return fm.where(fm.equal(p, 2), input * target, fm.sin(input))

    sine_or_product.compile()


def test_broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    need("compiled")

    @fusedloss.pointwise_loss
    def cubed(input, target):  # type: ignore[no-untyped-def]
        return (input - target) ** 3

    monkeypatch.setenv("CXX", "false")
    x, y = torch.tensor([3.0]), torch.tensor([1.0])
    with pytest.warns(RuntimeWarning, match="cubed runs on plain PyTorch.*false.* fails"):
        assert cubed(x, y) == 8
    assert "false" in str(fusedloss.explain(cubed, x, y))
    assert cubed(x, y) == 8  # without another warning


def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", "")
    for variable in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    no_toolkit(monkeypatch)
    with pytest.raises(building.CannotCompile, match="no nvcc: neither NVCC, nor CUDA_HOME"):
        building.cuda_library("none", "")


def test_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all GPUs that are here, unless they are chosen."""
    no_toolkit(monkeypatch)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("CXX", "/bin/sh")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def flags(*capabilities: tuple[int, int]) -> list[str]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        return [flag for flag in building.cuda_command() if flag.startswith("-gencode")]

    ampere, hopper = "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"
    assert flags((9, 0), (8, 0), (9, 0)) == [ampere, hopper]
    with pytest.raises(building.CannotCompile, match="there is no GPU, and TORCH_CUDA_ARCH_LIST"):
        flags()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert flags() == flags((8, 0)) == [hopper]


def test_headers_are_there() -> None:
    """With the package itself, or beside it in a source tree."""
    for header in ("cpu/custom.h", "cuda/custom.cuh", "cuda/kernels.h", "engine.h"):
        assert (building.headers() / header).is_file()
    package = Path(fusedloss.__file__).parent
    assert building.headers() in (package / "include", package.parent / "csrc")


def test_another_version(tmp_path: Path) -> None:
    """A library of another interface is refused, not run."""
    need("compiled")
    import fusedloss._C as extension

    source = tmp_path / "other.cpp"
    source.write_text(
        '#include "cpu/custom_kernel.h"\n'
        'extern "C" __attribute__((visibility("default")))\n'
        "const fusedloss::cpu::CustomKernel* FUSEDLOSS_CUSTOM_ENTRY() {\n"
        "  static const fusedloss::cpu::CustomKernel kernel{fusedloss::cpu::kCustomVersion + 1};\n"
        "  return &kernel;\n}\n"
    )
    library = tmp_path / "other.so"
    subprocess.run([*building.cpu_command(), str(source), "-o", str(library)], check=True)
    with pytest.raises(RuntimeError, match="interface version"):
        extension.load_custom("other", str(library))
    with pytest.raises(RuntimeError, match="does not load"):
        extension.load_custom("none", str(tmp_path / "none.so"))
