"""Compiling custom losses: the cache, parallel processes, and machines that cannot compile."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedloss
from conftest import need
from fusedloss import _toolkit, backends
from fusedloss import math as fm
from fusedloss.custom import building
from fusedloss.custom.building import CPU, CannotCompile, Library

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
    """One of two processes compiles and says so; a third finds the library; no other file is
    left."""
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
    """Flags that only GCC knows go to no other compiler: clang would fail on them."""
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
        return 17 * (input - target) ** 2  # no other test has loaded it

    with pytest.warns(RuntimeWarning, match="keeps no compiled losses.*Not a directory") as caught:
        assert squared(torch.tensor([3.0]), torch.tensor([1.0])) == 68
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        squared.compile()
    assert fusedloss.explain(squared, torch.ones(2), torch.ones(2)).fused


def test_formulas_that_gcc_fails_on() -> None:
    """GCC 12, which vectorizes straight-line code for AVX-512."""
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


# ---- whose folder, whose library ------------------------------------------------------------------


class Cached:
    """A library in a cache; the compiler is a program that copies a finished one, to save time."""

    def __init__(self, folder: Path, small: Path) -> None:
        self.calls = folder.parent / "calls"
        self.compiler = program(
            folder.parent / "c++", f'echo >> "{self.calls}"\ncp "{small}" "$out"'
        )
        self.library = Library("tiny", CPU, "// a source\n", [self.compiler], "1.0")
        self.folder = folder
        self.path = folder / f"{self.library.key}.so"

    def load(self) -> Path:
        """The path that is loaded, after checking the folder."""
        loaded: list[Path] = []

        def loader(path: str) -> None:
            assert building._is_whole(Path(path).read_bytes())
            loaded.append(Path(path))

        self.library.load(loader)
        (found,) = loaded
        return found

    def compilations(self) -> int:
        return len(self.calls.read_text().splitlines())


NVCC_SAYS = "Cuda compilation tools, release 13.0, V13.0.88"


def program(path: Path, does: str, says: str = "a compiler") -> str:
    """A compiler, whose output is "$out"."""
    version = f'[ "$1" = --version ] && {{ echo "{says}"; exit 0; }}\n'
    last = "for out; do :; done\n"
    path.write_text(f"#!/bin/sh\n{version}{last}{does}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of one number."""
    library = tmp_path_factory.mktemp("small") / "small.so"
    try:
        compiler = building.find_compiler()
    except CannotCompile as error:
        pytest.skip(str(error))
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input="int number = 1;", text=True, check=True)
    return library


@pytest.fixture
def cached(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(folder))
    return Cached(folder, small)


def test_folder_is_ours_alone(cached: Cached) -> None:
    """Private from the moment it is made, whatever the umask."""
    before = os.umask(0)
    try:
        assert cached.load() == cached.path
    finally:
        os.umask(before)
    assert cached.folder.stat().st_mode & 0o777 == 0o700
    for path in cached.folder.iterdir():
        assert path.stat().st_mode & 0o022 == 0, path
    cached.folder.chmod(0o500)  # nothing has to be written
    assert cached.load() == cached.path
    assert cached.compilations() == 1


@pytest.mark.skipif(os.name == "nt", reason="has no owners and modes")
@pytest.mark.parametrize("what", ["another user's", "group", "others", "another user's link"])
def test_folder_of_others(what: str, cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not used, whatever is in it: a private one is, with a warning that says why."""
    cached.load()
    cached.path.write_bytes(b"a trap")
    names = sorted(cached.folder.iterdir())
    why = "others can write to .*cache; chmod go-w .*cache ends that"
    if what == "another user's":
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        why = f"cache belongs to user {user}, and this process to user {user + 1}"
    elif what == "another user's link":
        link = cached.folder.with_name("link")
        link.symlink_to(cached.folder)
        monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(link))
        assert cached.load() == cached.path  # a link of ours
        cached.path.write_bytes(b"a trap")
        real = Path.lstat

        def lstat(path: Path) -> os.stat_result:
            mode, inode, device, links, user, *rest = real(path)
            return os.stat_result((mode, inode, device, links, user + (path == link), *rest))

        monkeypatch.setattr(Path, "lstat", lstat)
        why = "link belongs to user"
    else:
        cached.folder.chmod(0o770 if what == "group" else 0o702)
    with pytest.warns(
        RuntimeWarning, match=f"{why}.*Set FUSEDLOSS_CACHE_DIR to a folder"
    ) as caught:
        loaded = cached.load()
    assert len(caught) == 1 and loaded.parent != cached.folder
    assert not loaded.parent.exists()
    assert cached.path.read_bytes() == b"a trap" and sorted(cached.folder.iterdir()) == names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached.load()  # without another warning


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte": lambda path: path.write_bytes(b"".join((path.read_bytes()[:999], b"\xa5" * 9))),
    "writable": lambda path: path.chmod(0o666),
    "a link": lambda path: path.symlink_to(path.rename(path.with_name("elsewhere"))),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.skipif(os.name == "nt", reason="has no modes and pipes")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_library(damage: str, cached: Cached) -> None:
    """It is compiled again, once, instead of being loaded."""
    cached.load()
    whole = cached.path.read_bytes()
    DAMAGES[damage](cached.path)
    for _ in range(2):
        assert cached.load() == cached.path
        assert cached.compilations() == 2
    assert cached.path.read_bytes() == whole
    assert cached.path.is_file() and not cached.path.is_symlink()


def test_whole_on_disk_before_it_has_its_name(
    cached: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    sync, replace = os.fsync, os.replace

    def fsync(file: int) -> None:
        done.append(os.fstat(file).st_ino)
        sync(file)

    def rename(source: Path, target: Path) -> None:
        done.append(target.suffix)
        assert source.stat().st_ino in done
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    cached.load()
    assert done[-2:] == [".so", cached.folder.stat().st_ino]
    assert ".cpp" in done


@pytest.mark.parametrize("exists", [True, False])
def test_lock_that_is_a_link(exists: bool, cached: Cached) -> None:
    """It is not followed, so that no other file is created or emptied."""
    cached.folder.mkdir(mode=0o700)
    other = cached.folder.with_name("other")
    if exists:
        other.write_text("of the user")
    cached.path.with_suffix(".lock").symlink_to(other)
    assert cached.load() == cached.path
    assert other.exists() is exists
    assert not exists or other.read_text() == "of the user"


def test_lock_that_is_held(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock held by a process that does not end: nobody waits for ever."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(building, "SECONDS", 0.5)
    cached.folder.mkdir(mode=0o700)
    with cached.path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        assert cached.load() == cached.path
    assert 0.5 <= time.monotonic() - started < 10


def test_library_that_does_not_load(cached: Cached) -> None:
    """For example from a folder that must not hold programs: one that is compiled elsewhere
    loads."""
    tried = []

    def loader(path: str) -> None:
        tried.append(Path(path).parent == cached.folder)
        if len(tried) <= refusals:
            raise RuntimeError(f"{path} does not load: operation not permitted")

    refusals = 1
    with pytest.warns(RuntimeWarning, match="keeps no compiled losses.*does not load"):
        cached.library.load(loader)
    assert tried == [True, False]
    refusals = 4
    with pytest.raises(CannotCompile, match="does not load.*; .*does not load"):
        cached.library.load(loader)
    assert tried == [True, False] * 2


@pytest.mark.slow
def test_damaged_kernels(tmp_path: Path) -> None:
    """A file on which the dynamic loader would end the process."""
    need("compiled")
    cache = tmp_path / "cache"
    finished(start(cache))
    (library,) = cache.glob("*.so")
    DAMAGES["half"](library)
    out, err = finished(start(cache))
    assert out.split()[0] == "True"
    assert len(compiled_lines(err)) == 1


# ---- compilers and machines that fail -------------------------------------------------------------


def plain(match: str) -> None:
    """A new loss runs on plain PyTorch, with one warning, which says why."""
    need("compiled")

    @fusedloss.pointwise_loss
    def cubed(input, target):  # type: ignore[no-untyped-def]
        return (input - target) ** 3

    x, y = torch.tensor([3.0]), torch.tensor([1.0])
    with pytest.warns(RuntimeWarning, match=f"(?s)cubed runs on plain PyTorch.*{match}") as caught:
        assert cubed(x, y) == 8
    assert len(caught) == 1
    assert cubed(x, y) == 8


COMPILERS = {
    "exit 0": "leaves no whole library, and no error",
    'echo lib > "$out"': "leaves no whole library",
    'head -c 64 SMALL > "$out"': "leaves no whole library",
    'head -c 300 SMALL > "$out"': "leaves no whole library",
    'head -c 5000 SMALL > "$out"': "leaves no whole library",
    'mkdir "$out"': "leaves no whole library",
    r"printf 'odd \377 bytes' >&2; exit 1": "fails: odd \N{REPLACEMENT CHARACTER} bytes",
    "kill -SEGV $$": "fails",
    "sleep 300 & echo $! > PID; sleep 300": "was ended, since it took longer than 1 s",
}


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize("does", COMPILERS)
def test_compilers_that_fail(
    does: str, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "cache"))
    script = does.replace("SMALL", str(small)).replace("PID", str(tmp_path / "pid"))
    monkeypatch.setenv("CXX", program(tmp_path / "c++", script))
    monkeypatch.setattr(building, "SECONDS", 1.0)
    plain(COMPILERS[does])
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    if "PID" in does:  # and the processes that it had started
        pid, until = int((tmp_path / "pid").read_text()), time.monotonic() + 10
        while not has_ended(pid):
            assert time.monotonic() < until
            time.sleep(0.05)


def test_compilers_that_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_bytes(b"\x7fELF of another processor")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    plain("Exec format error")
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nsleep 300\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setitem(_toolkit.run.__kwdefaults__, "seconds", 0.5)
    plain("was ended, since it took longer than 0.5 s")


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no space in the cache nor for temporary files."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", full)
    plain("No space left on device")
    monkeypatch.setattr(os, "mkdir", full)
    plain("No space left on device|No usable temporary directory")


def test_no_home(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    pwd = pytest.importorskip("pwd")

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in ("FUSEDLOSS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(building, "_warned_of", set())
    with pytest.warns(RuntimeWarning, match="keeps no compiled losses.*home directory"):
        cached.load()


def test_folder_of_a_name_too_long(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "x" * 5000)
    with pytest.warns(RuntimeWarning, match="keeps no compiled losses.*File name too long"):
        cached.load()


def test_folder_beside_the_work(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a name without a folder, a dynamic loader would search the system's folders."""
    cached.folder.mkdir(mode=0o700)
    monkeypatch.chdir(cached.folder)
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", ".")
    assert cached.load() == cached.path.resolve()


def test_unknown_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "abc")
    with pytest.raises(CannotCompile, match="TORCH_CUDA_ARCH_LIST: .*abc"):
        building.architectures()


@pytest.fixture
def no_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither nvcc nor a C++ compiler, as where torch is all that was installed."""
    if torch.version.cuda is None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    for variable in ("NVCC", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "find_nvrtc", lambda: "no NVRTC: for a test")


@pytest.fixture
def nvrtc(no_toolkit: None) -> None:
    """NVRTC alone."""
    found = _toolkit.find_nvrtc()
    if isinstance(found, str):
        pytest.skip(found)


STRUCT = """
struct Loss : CustomLoss<2, 1> {
  static constexpr int kParameters = 1;
  FUSEDLOSS_HD static void prepare(const double* parameters, double* constants) {
    constants[0] = parameters[0];
  }
  template <class T>
  FUSEDLOSS_HD EvalEach<T, 2> eval(T x, T y) const { return {x - y, {T(1), T(-1)}}; }
};
"""


def loaded(struct: str = STRUCT) -> list[tuple[str, Path]]:
    """The architectures and files of a struct for CUDA."""
    found: list[tuple[str, Path]] = []
    building.load_cuda("small", struct, lambda *of: found.append((of[0], Path(of[1]))))
    return found


def compilations(capfd: pytest.CaptureFixture[str]) -> int:
    return capfd.readouterr().err.count("compiled small for the GPU in ")


@pytest.mark.slow
def test_nvrtc_alone(
    nvrtc: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Machine code without any tool but torch's, kept by architecture; a damaged file is made
    again."""
    ((architecture, file),) = loaded()
    assert (architecture, file.suffix, compilations(capfd)) == ("90", ".cubin", 1)
    assert loaded() == [("90", file)] and compilations(capfd) == 0
    DAMAGES["half"](file)
    assert loaded() == [("90", file)] and compilations(capfd) == 1
    assert building._is_sound(file) and building._is_whole(file.read_bytes())
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    older, newer = loaded()
    assert newer == ("90", file) and older[0] == "80" and older[1] != file
    assert compilations(capfd) == 1


def test_nvrtc_refuses(nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is the compiler's, with its line; then nvcc is asked."""
    with pytest.raises(CannotCompile) as caught:
        loaded(STRUCT.replace("x - y", "x - z"))
    message = str(caught.value)
    assert re.search(r'small-\w+.cu\(\d+\): error: identifier "z" is undefined', message)
    assert "; no nvcc: neither NVCC, nor CUDA_HOME" in message
    monkeypatch.setattr(building, "architectures", lambda: ["1"])
    with pytest.raises(CannotCompile, match="(?s)NVRTC_ERROR_INVALID_OPTION.*--gpu-architecture"):
        loaded()


def test_nvcc_where_there_is_no_nvrtc(
    no_toolkit: None, no_nvrtc: None, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = program(
        tmp_path / "nvcc", f'[ "$1" = --dryrun ] || /bin/cp "{small}" "$out"', says=NVCC_SAYS
    )
    monkeypatch.setenv("NVCC", nvcc)
    monkeypatch.setenv("CXX", "/bin/sh")
    ((architecture, file),) = loaded()
    assert architecture == "90" and file.read_bytes()[:-32] == small.read_bytes()


def test_neither_nvrtc_nor_nvcc(no_toolkit: None, no_nvrtc: None) -> None:
    with pytest.raises(CannotCompile, match="^no NVRTC: for a test; no nvcc: neither NVCC, nor"):
        loaded()


def test_nvrtc_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert re.match("no NVRTC: libnvrtc.so.99: cannot open", str(_toolkit.find_nvrtc()))


def test_nvrtc_of_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_HOME counts where torch has no wheel of it."""
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libnvrtc.so.99").touch()
    assert re.match(
        f"no NVRTC: {tmp_path}/lib64/libnvrtc.so.99: file too short", _toolkit.find_nvrtc()
    )


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all GPUs of the machine, unless some are chosen."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def of(*capabilities: tuple[int, int]) -> list[str]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        return building.architectures()

    assert of((9, 0), (8, 0), (9, 0)) == ["80", "90"]
    with pytest.raises(CannotCompile, match="there is no GPU, and TORCH_CUDA_ARCH_LIST"):
        of()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    assert of((8, 0)) == of() == ["86", "90a"]


def test_headers_are_there() -> None:
    """With the package itself, or beside it in a source tree."""
    for header in (
        "cpu/pointwise_kernel.h",
        "cpu/custom_rows_kernel.h",
        "cuda/custom.cuh",
        "cuda/kernels.h",
        "call.h",
    ):
        assert (building.headers() / header).is_file()
    package = Path(fusedloss.__file__).parent
    assert building.headers() in (package / "include", package.parent / "csrc")


def test_another_version(tmp_path: Path) -> None:
    """A library of another interface is refused, not run."""
    need("compiled")
    import fusedloss._C as extension

    source = tmp_path / "other.cpp"
    source.write_text(
        '#include "cpu/pointwise.h"\n'
        'extern "C" __attribute__((visibility("default")))\n'
        "const fusedloss::cpu::PointwiseKernel* FUSEDLOSS_CUSTOM_ENTRY() {\n"
        "  static const fusedloss::cpu::PointwiseKernel kernel{fusedloss::cpu::kPointwiseVersion + 1};\n"
        "  return &kernel;\n}\n"
    )
    library = tmp_path / "other.so"
    subprocess.run([*building.cpu_command(), str(source), "-o", str(library)], check=True)
    with pytest.raises(RuntimeError, match="interface version"):
        extension.load_custom("other", str(library))
    with pytest.raises(RuntimeError, match="does not load"):
        extension.load_custom("none", str(tmp_path / "none.so"))
