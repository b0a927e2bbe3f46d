"""The memory limit of a case: the least traffic of its step, by the fastest means of this machine.

A step must read its inputs and write the gradient. The limit does only that. On the CPU the new
memory is prepared as the package prepares it (huge pages), and the copy is whichever is fastest:
ordinary stores, streaming stores, which go past the caches, or PyTorch's own operator. On a GPU it
is PyTorch's operator.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("copy.cpp")
# The same as in csrc: smaller memory has mostly been used before.
HUGE_PAGES_FROM = 32 << 20
_MADV_HUGEPAGE, _PAGE = 14, 4096

Copy = Callable[[], Tensor]


def traffic(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """The tensors that a step must read. Class indices, one for each row, are next to nothing."""
    return (x, t) if x.shape == t.shape else (x,)


def by_pytorch(x: Tensor, t: Tensor) -> Tensor:
    """The same traffic as eager PyTorch has it, into memory as PyTorch allocates it."""
    return torch.add(x, t) if len(traffic(x, t)) == 2 else x.clone()


@cache
def library() -> ctypes.CDLL | str:
    """The compiled copy, or why there is none."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++"))), None)
    if compiler is None:
        return "no C++ compiler"
    flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-march=native")
    with tempfile.TemporaryDirectory() as folder:
        made, linked = f"{folder}/copy.o", f"{folder}/copy.so"
        try:
            compiled = [compiler, *flags, "-c", str(SOURCE), "-o", made]
            subprocess.run(compiled, check=True, capture_output=True, text=True)
            # Without -fopenmp, to use torch's runtime. Idle threads of a second one would disturb
            # the next contestant.
            linking = [compiler, "-shared", made, "-o", linked]
            subprocess.run(linking, check=True, capture_output=True, text=True)
            loaded = ctypes.CDLL(linked)
        except subprocess.CalledProcessError as error:
            return f"{compiler} fails: {error.stderr.strip().splitlines()[:1]}"
        except OSError as error:
            return str(error)
    pointer = ctypes.c_void_p
    loaded.fusedloss_copy.argtypes = [
        pointer,
        pointer,
        pointer,
        ctypes.c_size_t,
        *[ctypes.c_int] * 2,
    ]
    loaded.fusedloss_copy.restype = None
    return loaded


def new_memory(like: Tensor) -> Tensor:
    """Memory for a gradient, prepared as the package prepares it."""
    new = torch.empty_like(like)
    if new.nbytes >= HUGE_PAGES_FROM and sys.platform == "linux":
        first = -(-new.data_ptr() // _PAGE) * _PAGE
        end = (new.data_ptr() + new.nbytes) // _PAGE * _PAGE
        # Only advice: Linux may refuse it.
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
    return new


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def means(x: Tensor, t: Tensor) -> dict[str, Copy]:
    """Every copy that may be the fastest, by name."""
    if x.device.type != "cpu":
        return {"PyTorch": lambda: by_pytorch(x, t)}
    x = x.detach()
    read = traffic(x, t)

    def pytorch() -> Tensor:
        if x.nbytes < HUGE_PAGES_FROM:
            return by_pytorch(x, t)
        new = new_memory(x)
        return torch.add(x, t, out=new) if len(read) == 2 else new.copy_(x)

    found: dict[str, Copy] = {"PyTorch": pytorch}
    compiled = library()
    plain = all(tensor.is_contiguous() and tensor.nbytes == x.nbytes for tensor in read)
    if isinstance(compiled, str) or not plain:
        return found
    threads = torch.get_num_threads()
    first, second = x.data_ptr(), read[1].data_ptr() if len(read) == 2 else None

    def copy(streaming: int) -> Tensor:
        new = new_memory(x)
        compiled.fusedloss_copy(first, second, new.data_ptr(), x.nbytes, streaming, threads)
        return new

    found["ordinary stores"] = lambda: copy(0)
    found["streaming stores"] = lambda: copy(1)
    return found
