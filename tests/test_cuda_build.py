"""The CUDA kernels as machine code, where they were built, and those of custom losses, where NVRTC or
nvcc is: what a GPU would be given to run.

cuobjdump comes with the CUDA toolkit, and with Triton's package.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch

import fusedloss
from custom_losses import CASES, CustomCase, charbonnier, focal, gaussian_kl
from fusedloss._toolkit import find_nvrtc, find_toolkit, run
from fusedloss.custom import PointwiseLoss, building
from row_losses import ROW_LOSSES as ALL_ROWS

REQUIRED = os.environ.get("FUSEDLOSS_REQUIRE_CUDA") == "1"

# The kernels whose bandwidth counts: 16 bytes per access, and no spilled registers. By parts of
# their demangled names; kernels for double do not count.
HOT = {
    "pointwise": r"::pointwise_vectorized<fusedloss::\w+, (?!double)[\w:]+, true>",
    "contiguous rows": r"::rows_contiguous<.*CrossEntropyRow<(?!double)[\w:]+, true>, .*Scope\)\d>",
    "strided rows": r"::rows_strided<.*CrossEntropyRow<(?!double)[\w:]+, true>, true>",
    "class probabilities": r"::rows_contiguous<.*ProbabilitiesRow<(?!double)[\w:]+>, .*Scope\)\d>",
    "strided rows in shared memory": r"::rows_strided_smem<",
    "held rows": r"::rows_held<",
}


def _cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def need(wanted: object, reason: str) -> None:
    """Skips the test if something is missing, or fails it if FUSEDLOSS_REQUIRE_CUDA=1."""
    if wanted:
        return
    if REQUIRED:
        pytest.fail(f"FUSEDLOSS_REQUIRE_CUDA=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def built() -> str:
    """The extension's file, if it has CUDA kernels."""
    cuda = fusedloss.info().build.get("cuda")
    need(cuda not in (None, "emulated"), "the extension was built without CUDA kernels")
    extension = fusedloss.backends.extension
    assert extension is not None and extension.__file__ is not None
    return extension.__file__


def _dump(file: str, *options: str) -> str:
    tool = _cuobjdump()
    need(tool, "there is no cuobjdump")
    assert tool is not None
    command = [tool, *options, file]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def machine_code(file: str, architecture: str) -> dict[str, list[str]]:
    """The instructions of each kernel, by its demangled name."""
    kernels: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in _dump(file, "-sass", "-arch", architecture).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found[1]
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            kernels[name].append(found[1])
    names = subprocess.run(
        ["c++filt"], input="\n".join(kernels), check=True, capture_output=True, text=True
    ).stdout.split("\n")
    return dict(zip(names, kernels.values(), strict=False))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", HOT)
def test_hot_kernels(kind: str, architecture: str, built: str) -> None:
    # Three dtypes of each; 17 losses, and three groups of threads that share a row, where rows_held has
    # seven for parts of a warp.
    counts = {"pointwise": 51, "contiguous rows": 9, "class probabilities": 9, "held rows": 27}
    count = counts.get(kind, 3)
    check_kernels(built, architecture, HOT[kind], count)


def check_kernels(file: str, architecture: str, kind: str, count: int, spills: int = 0) -> None:
    """Each hot kernel reads and writes 16 bytes at a time and spills no register, or few."""
    kernels = machine_code(file, architecture).items()
    found = {name: code for name, code in kernels if re.search(kind, name)}
    assert len(found) == count, list(found)
    for name, code in found.items():
        text = "\n".join(code)
        for access in (r"LDG\.E\.128|LDGSTS\S*\.128", r"STG\.E\.128"):
            assert re.search(access, text), f"{name}: no {access}"
        found_spills = re.findall(r"\b(?:LDL|STL)\S*", text)
        assert len(found_spills) <= spills, f"{name}: {found_spills}"


# Instructions an element, of two bytes. Memory takes as long for its six bytes as the schedulers
# for 59 instructions on an H100, and for 41 on an H200.
INSTRUCTIONS = {
    "MSE": 9.5,
    "BCE": 35,
    "BCEWithLogits": 28,
    "SoftMargin": 28,
    "HingeEmbedding": 19,
    "KLDiv": 40,
    "PoissonNLLLogInput": 21,
}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["__nv_bfloat16", "__half"])
@pytest.mark.parametrize("loss", INSTRUCTIONS)
def test_instructions_of_an_element(loss: str, dtype: str, architecture: str, built: str) -> None:
    name = f"::pointwise_vectorized<fusedloss::{loss}, {dtype}, true>"
    (code,) = [code for kernel, code in machine_code(built, architecture).items() if name in kernel]
    vectors, elements = 2, 8
    assert shortest_round(code, vectors) <= INSTRUCTIONS[loss] * vectors * elements


def shortest_round(code: list[str], stores: int) -> int:
    """How many instructions the main loop, which stores so many vectors, executes where no branch
    leads to anything unusual: of all ways around it by way of these stores, the shortest."""
    jumps = {
        at: int(found[1], 16) // 16  # of 16 bytes each
        for at, text in enumerate(code)
        if (found := re.search(r"\bBRA\b.* (0x[0-9a-f]+)\s*$", text))
    }

    def count(what: str, first: int, last: int) -> list[int]:
        return [at for at in range(first, last) if what in code[at]]

    # Each vector has two operands.
    loops = [
        (last - first, first, last)
        for last, first in jumps.items()
        if len(count("STG.E.128", first, last)) == stores
        and len(count("LDG.E.128", first, last)) == 2 * stores
    ]
    _, first, last = min(loops)

    def shortest(start: int, end: int) -> int:
        length = {start: 0}
        for at in range(start, end):
            after = [jumps[at]] if at in jumps else []
            if not code[at].startswith("BRA 0x"):
                after.append(at + 1)
            for to in after:
                if at in length and to <= end:
                    length[to] = min(length[at] + 1, length.get(to, len(code)))
        return length[end]

    way = [first, *count("STG.E.128", first, last), last]
    return sum(map(shortest, way, way[1:])) + 1


def all_loops(code: list[str]) -> list[tuple[int, int]]:
    """The first and the last instruction of each loop; an instruction has 16 bytes."""
    jumps = [re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction) for instruction in code]
    ends = [(int(jump[1], 16) // 16, i) for i, jump in enumerate(jumps) if jump]
    return [(first, last) for first, last in ends if first <= last]


def inner_loops(code: list[str]) -> list[list[str]]:
    """The instructions of each loop without another one inside."""
    loops = all_loops(code)
    return [
        code[first : last + 1]
        for first, last in loops
        if not any(first <= a and b <= last for a, b in loops if (a, b) != (first, last))
    ]


def instructions_per_class(code: list[str], dtype: str) -> tuple[float, float]:
    """... and exponentials, in the three walks over a row's vectors in shared memory: for the
    maximum, the sum and the gradient. Each is unrolled, and has a shorter loop for the rest."""
    walks: dict[str, tuple[int, int, int]] = {}
    for loop in inner_loops(code):
        loads = sum(
            int(found[1]) // 64
            for instruction in loop
            if (found := re.search(r"LDS\.(64|128)", instruction))
        )
        stores = sum("STG.E.128" in instruction for instruction in loop)
        exponentials = sum("MUFU.EX2" in instruction for instruction in loop)
        kind = "gradient" if stores else "sum" if exponentials else "maximum"
        if loads and not any(re.search(r"SHFL|LDG\.|ATOM", instruction) for instruction in loop):
            size = 4 if dtype == "float" else 8
            classes = {"gradient": stores * size, "sum": exponentials, "maximum": loads * size // 2}
            found_walk = classes[kind], len(loop), exponentials
            walks[kind] = max(walks.get(kind, found_walk), found_walk)
    assert set(walks) == {"maximum", "sum", "gradient"}, walks
    return (
        sum(count / classes for classes, count, _ in walks.values()),
        sum(exponentials / classes for classes, _, exponentials in walks.values()),
    )


# Kernels whose loops over a row's classes are counted: instructions and exponentials per class, of
# float and of the two-byte types. What is done once per row is not among them.
COUNTED = {
    "class probabilities": {"float": (40, 2), "two bytes": (23, 2)},
    "strided rows in shared memory": {"float": (20.5, 1), "two bytes": (17, 2)},
}


@pytest.mark.parametrize("kind", COUNTED)
def test_instructions_per_class(kind: str, built: str) -> None:
    for name, code in machine_code(built, "sm_90").items():
        if re.search(HOT[kind], name):
            dtype = "float" if "Row<float" in name else "two bytes"
            instructions, exponentials = instructions_per_class(code, dtype)
            assert instructions <= COUNTED[kind][dtype][0], f"{name}: {instructions} per class"
            assert exponentials == COUNTED[kind][dtype][1], f"{name}: {exponentials} per class"


def longest_pass(code: list[str], without: str = "ATOM|CALL") -> list[str]:
    """The instructions of the longest way through the largest loop, once through each loop inside, but for
    those of that kind: reports of errors and divisions of subnormal numbers, which no usual row comes by.
    An instruction has 16 bytes."""
    after: list[list[int]] = []
    for i, instruction in enumerate(code):
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
        ends = re.match(r"(?:BRA(?:\.U)? |EXIT|RET|BRX)", instruction) or i + 1 == len(code)
        after.append(([int(jump[1], 16) // 16] if jump else []) + ([] if ends else [i + 1]))
    before: list[list[int]] = [[] for _ in code]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)

    def reached(start: int, edges: list[list[int]]) -> set[int]:
        found, left = {start}, [start]
        while left:
            new = set(edges[left.pop()]) - found
            found |= new
            left += new
        return found

    heads = {j for i, following in enumerate(after) for j in following if j <= i}
    loops = {head: reached(head, after) & reached(head, before) for head in heads}
    head = max(loops, key=lambda head: (len(loops[head]), -head))
    loop = {i for i in loops[head] if not re.search(rf"\b(?:{without})", code[i])}
    # The next instruction of the longest way to the head. Those on the way to one that is being looked
    # at would lead around a loop.
    ways: dict[int, tuple[int, int | None]] = {}
    on_the_way = {head: iter(after[head])}
    while on_the_way:
        i, following = next(reversed(on_the_way.items()))
        unknown = (j for j in following if j in loop and j not in ways and j not in on_the_way)
        if (j := next(unknown, None)) is not None:
            on_the_way[j] = iter(after[j])
            continue
        del on_the_way[i]
        lengths = [(ways[j][0] + 1, j) for j in after[i] if j in ways]
        if lengths or head in after[i]:
            ways[i] = max(lengths, default=(1, None))
    way: list[str] = []
    at: int | None = head
    while at is not None:
        way.append(code[at])
        at = ways[at][1]
    return way


# Instructions per class in the loop over rows, by the type and how many classes a thread holds.
HELD = {
    ("__nv_bfloat16", 32): 17,
    ("__nv_bfloat16", 64): 14,
    ("__half", 32): 17,
    ("__half", 64): 14,
    ("float", 32): 24,
    ("float", 64): 21,
}


def test_held_rows(built: str) -> None:
    """Little work per class, and one exponential, besides at most four per row."""
    kernels = machine_code(built, "sm_90").items()
    held = {name: code for name, code in kernels if re.search(HOT["held rows"], name)}
    assert held
    for name, code in held.items():
        found = re.search(r"<(\w+), .*Scope\)\d, (\d+), \d+>", name)
        assert found is not None, name
        classes, loop = int(found[2]), longest_pass(code)
        assert len(loop) <= HELD[found[1], classes] * classes, f"{name}: {len(loop)} instructions"
        exponentials = sum("MUFU.EX2" in instruction for instruction in loop)
        assert classes <= exponentials <= classes + 4, f"{name}: {exponentials} exponentials"


def test_ptx_for_later_devices(built: str) -> None:
    """A driver compiles the PTX for devices without machine code in the library."""
    listed = _dump(built, "-lptx") + _dump(built, "-ptx", "-arch", "sm_90")
    assert re.search(r"arch = sm_90\b", listed)


# ---- custom losses -------------------------------------------------------------------------------


COMPILERS = {
    "NVRTC": (find_nvrtc, building.nvrtc_command),
    "nvcc": (find_toolkit, building.nvcc_command),
}


def compiled(loss: PointwiseLoss, architecture: str, compiler: str = "NVRTC") -> str:
    """The file of a custom loss's machine code."""
    find, command_for = COMPILERS[compiler]
    need(not isinstance(find(), str), str(find()))
    files: list[str] = []
    traced = (loss.__name__, loss._struct)
    building.cuda_library(*traced, architecture, command_for).load(files.append)
    return files[0]


def resources(file: str) -> dict[str, int]:
    """How many registers each kernel takes."""
    used = _dump(file, "-res-usage")
    return {name: int(count) for name, count in re.findall(r"Function (\w+):\n.*?REG:(\d+)", used)}


# With value and input's gradient alone, and with every other combination.
PLAIN, OTHER = r"^fusedloss_custom\d+_(?!float64)\w+_plain$", r"^fusedloss_custom\d+_[b]?float\d+$"


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler, architecture", [("NVRTC", "80"), ("NVRTC", "90"), ("nvcc", "90")]
)
@pytest.mark.parametrize("loss", [charbonnier, gaussian_kl, focal], ids=lambda x: x.__name__)
def test_own_loss(loss: PointwiseLoss, compiler: str, architecture: str) -> None:
    file = compiled(loss, architecture, compiler)
    assert len(machine_code(file, f"sm_{architecture}")) == 9
    check_kernels(file, f"sm_{architecture}", PLAIN, 3)
    check_kernels(file, f"sm_{architecture}", OTHER, 4)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [charbonnier, gaussian_kl, focal], ids=lambda x: x.__name__)
def test_nvrtc_is_as_good_as_nvcc(loss: PointwiseLoss) -> None:
    """The same kernels: they differ in the order of instructions alone, and by what that takes."""
    by_nvrtc, by_nvcc = (compiled(loss, "90", compiler) for compiler in COMPILERS)
    theirs = machine_code(by_nvcc, "sm_90")
    for name, code in machine_code(by_nvrtc, "sm_90").items():
        assert len(code) <= 1.05 * len(theirs[name]), name
        assert resources(by_nvrtc)[name] <= resources(by_nvcc)[name] + 2, name


def with_all_words() -> list[CustomCase]:
    """Enough of the losses for every function that any of them calls, and every number of inputs."""
    kept, seen = [], set[str | int]()
    for case in sorted(CASES, key=lambda case: len(case.loss._struct), reverse=True):
        words = {case.loss.inputs, *re.findall(r"\b[a-z]\w+(?=\()", case.loss._struct)}
        words -= {f"c{i}" for i in range(10)}  # members
        if not words <= seen:
            kept.append(case)
        seen |= words
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("case", with_all_words(), ids=lambda case: case.name)
def test_nvrtc_compiles(case: CustomCase) -> None:
    assert len(resources(compiled(case.loss, "90"))) == 9


ROW_LOSSES = {
    case.id: case.loss for case in ALL_ROWS if case.id in ("cross_entropy", "distillation")
}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_own_row_loss(name: str, compiler: str) -> None:
    find, command_for = COMPILERS[compiler]
    need(not isinstance(find(), str), str(find()))
    files: list[str] = []
    own = (name, ROW_LOSSES[name]._struct, "90", command_for, building.CUDA_ROWS)
    building.cuda_library(*own).load(files.append)
    check_kernels(files[0], "sm_90", r"^fusedloss_custom_rows\d+_b?float(16|32)$", 3)
    held = r"^fusedloss_custom_rows\d+_b?float(16|32)_held$"
    check_kernels(files[0], "sm_90", held, 3, spills=0 if name == "cross_entropy" else 20)
    if name == "cross_entropy":
        for kernel, code in machine_code(files[0], "sm_90").items():
            if not kernel.endswith(("float64", "held")):
                check_walks(code, "float" if kernel.endswith("float32") else "two bytes")


# What a kernel for any group of threads does beside the work of a block, and where it finds out the
# type of a weight or a loss of each row, which a mean without weights has not.
OF_OTHERS = r"ATOM|CALL|WARPSYNC\.COLLECTIVE|LDC\.U8|UCGABAR|S2U?R \S+, SR_SWINHI"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "name"), [("float", "float32"), ("__nv_bfloat16", "bfloat16")])
def test_cross_entropy_as_a_row_loss(dtype: str, name: str, built: str) -> None:
    """It takes at most 1.15 times the instructions of the kernel that was written by hand."""
    need(not isinstance(find_nvrtc(), str), str(find_nvrtc()))
    files: list[str] = []
    struct = ROW_LOSSES["cross_entropy"]._struct
    own = ("cross_entropy", struct, "90", building.nvrtc_command, building.CUDA_ROWS)
    building.cuda_library(*own).load(files.append)
    (ours,) = (
        code
        for kernel, code in machine_code(files[0], "sm_90").items()
        if kernel.endswith(f"{name}_held")
    )
    by_hand = rf"::rows_held<{dtype}, .*Scope\)1, 64, 32>"
    (theirs,) = (
        code for kernel, code in machine_code(built, "sm_90").items() if re.search(by_hand, kernel)
    )
    lengths = [len(longest_pass(code, OF_OTHERS)) for code in (ours, theirs)]
    assert lengths[0] <= 1.15 * lengths[1], lengths


# Instructions per class of cross-entropy as a custom loss, in the walks for the maximum and the sum.
WALKS = {"float": {"maximum": 4.5, "sum": 15.5}, "two bytes": {"maximum": 4, "sum": 7.5}}


def check_walks(code: list[str], dtype: str) -> None:
    """Little work per class, and gradients stored in vectors."""
    size = 4 if dtype == "float" else 8
    found: dict[str, int] = defaultdict(int)
    for loop in inner_loops(code):
        text = "\n".join(loop)
        if "LDS.128" in text and not re.search(r"SHFL|LDG\.", text):
            kind = "sum" if "MUFU.EX2" in text else "maximum"
            found[kind] = max(found[kind], len(loop))
    assert found.keys() == WALKS[dtype].keys()
    for kind, count in found.items():
        assert count <= WALKS[dtype][kind] * size, (
            f"{kind}: {count} instructions for {size} classes"
        )
    texts = ["\n".join(code[first : last + 1]) for first, last in all_loops(code)]
    gradient = min((text for text in texts if "LDS.128" in text and "STG" in text), key=len)
    assert "STG.E.128" in gradient
    # An exponential for the sum, one for the gradient, and one for the label. A loop that keeps the
    # first for the second may stand beside one that does not.
    exponentials = "\n".join(code).count("MUFU.EX2")
    assert exponentials - 1 in ((2 * size, 3 * size) if dtype == "float" else (2 * size,)), (
        exponentials
    )


# What csrc/cuda/nvrtc.h has in place of the headers of CUDA and of the C++ library.
STAND_INS = """
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cmath>
#include <limits>

extern "C" __global__ void stand_ins(const float2* x, __half* half, __nv_bfloat16* bfloat,
                                     __half2* halves, __nv_bfloat162* bfloats, float* wide,
                                     double* limits) {
  *half = __float2half_rn(x->x);
  *bfloat = __float2bfloat16_rn(x->y);
  *halves = __float22half2_rn(*x);
  *bfloats = __float22bfloat162_rn(*x);
  wide[0] = __half2float(half[1]);
  wide[1] = __bfloat162float(bfloat[1]);
  wide[2] = std::numeric_limits<float>::infinity();
  wide[3] = std::numeric_limits<float>::quiet_NaN();
  wide[4] = INFINITY;
  limits[0] = std::numeric_limits<double>::infinity();
  limits[1] = std::numeric_limits<double>::quiet_NaN();
  limits[2] = std::numeric_limits<int>::max();

  __shared__ uint4 copies[3];
  __pipeline_memcpy_async(&copies[0], x, 16);
  __pipeline_memcpy_async(&copies[1], x, 8);
  __pipeline_memcpy_async(&copies[2], x, 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  const unsigned block = (cluster.block_rank() + 1) % cluster.num_blocks();
  wide[5] = cluster.map_shared_rank(copies, block)->x;
  cluster.sync();
}
"""


def test_stand_ins(tmp_path: Path) -> None:
    """With them NVRTC makes the machine code that nvcc makes with the headers themselves."""
    source = tmp_path / "stand_ins.cu"
    source.write_text(STAND_INS)
    codes = []
    for name, (find, command_for) in COMPILERS.items():
        need(not isinstance(find(), str), str(find()))
        target = str(tmp_path / f"{name}.cubin")
        done = run(*command_for("90"), str(source), "-o", target)
        assert done.returncode == 0, done.stderr
        codes.append(machine_code(target, "sm_90")["stand_ins"])
    assert codes[0] == codes[1]


@pytest.mark.slow
def test_own_loss_for_the_cache(monkeypatch: pytest.MonkeyPatch, built: str) -> None:
    """Without a GPU machine code is made, and not loaded; beside the library for the CPU, which has
    another name."""
    need(not isinstance(find_nvrtc(), str), str(find_nvrtc()))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    charbonnier.compile("cuda")
    charbonnier.compile("cpu")
    assert charbonnier._keys["cuda"] != charbonnier._keys["cpu"]


@pytest.mark.slow
def test_own_loss_without_a_driver(built: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    extension = fusedloss.backends.extension
    assert extension is not None
    with pytest.raises(RuntimeError, match="cubin does not load: CUDA driver version is insuff"):
        extension.load_custom_kernels("none", 2, 2, 90, compiled(charbonnier, "90"))
    with pytest.raises(RuntimeError, match="missing does not load: file not found"):
        extension.load_custom_kernels("none", 2, 2, 90, "missing")
