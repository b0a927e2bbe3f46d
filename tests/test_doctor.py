"""python -m fusedloss: each problem of an installation, made on purpose, and what is reported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedloss
from fusedloss import doctor
from fusedloss.__main__ import NO_BENCH, main
from fusedloss.doctor import PACKAGE, Finding

HERE = "_C" + EXTENSION_SUFFIXES[0]


def only(findings: Iterable[Finding], kind: str) -> Finding:
    """The only finding that is not ok: it is of this kind and has a cure."""
    (found,) = (finding for finding in findings if finding.kind != "ok")
    assert found.kind == kind and found.cure, found
    return found


def program(folder: Path, name: str, prints: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only folder on the PATH, with nothing but cat in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    cat = shutil.which("cat")
    assert cat is not None
    (folder / "cat").symlink_to(cat)
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of that name, without an extension."""
    folder = tmp_path / "site" / "fusedloss"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    return folder


# ---- Python and torch ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "kind"), [((3, 9), "trouble"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "note")]
)
def test_python(version: tuple[int, int], kind: str) -> None:
    (found,) = doctor.python(version)
    assert found.kind == kind


def test_tested_pythons_are_those_that_pyproject_names() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    for minor in range(8, 17):
        tested = doctor.OLDEST_PYTHON <= (3, minor) <= doctor.NEWEST_PYTHON
        assert (f'"Programming Language :: Python :: 3.{minor}"' in text) is tested


@pytest.mark.parametrize(
    ("release", "wanted", "fits"),
    [
        ("2.11.0", "torch<2.16,>=2.11", True),
        ("2.15.3+cu130", "torch<2.16,>=2.11", True),
        ("2.10.1", "torch<2.16,>=2.11", False),
        ("2.16.0", "torch<2.16,>=2.11", False),
        ("2.14.1+cu130", "torch==2.14.1", True),
        ("2.14.2", "torch==2.14.1", False),
    ],
)
def test_torch_out_of_range(release: str, wanted: str, fits: bool) -> None:
    findings = list(doctor.torch_release(release, ["numpy", wanted]))
    if fits:
        assert [finding.kind for finding in findings] == ["ok"]
    else:
        assert release in only(findings, "trouble").what


def test_torch_that_does_not_import(tmp_path: Path) -> None:
    """A torch whose library is missing, and no torch at all: one clear sentence with the cure."""
    # Away from a torch that may be installed beside the package.
    site = tmp_path / "site"
    shutil.copytree(PACKAGE, site / "fusedloss", ignore=shutil.ignore_patterns("*.so"))
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "raise OSError('libcudart.so.99: cannot open shared object file')"
    )
    # -S: without site-packages, and so without the torch there.
    for path, said in (
        (
            [str(broken.parent), str(site)],
            "libcudart.so.99: cannot open shared object file. Cure: ",
        ),
        ([str(site)], "has none. Cure: "),
    ):
        done = subprocess.run(
            [sys.executable, "-S", "-m", "fusedloss", "doctor"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 1
        assert said in done.stderr.splitlines()[-1]


# ---- the extension -------------------------------------------------------------------------------


def test_extension_that_was_not_built(package: Path, bare_path: Path) -> None:
    found = only(doctor.extension(package, "not built", None, "2.14.1"), "trouble")
    assert found.what == f"no compiled extension in {package}"
    assert "install a C++ compiler" in str(found.cure)
    program(bare_path, "c++", "")
    found = only(doctor.extension(package, "not built", None, "2.14.1"), "trouble")
    assert "compiler" not in str(found.cure)


def test_extension_of_another_python(package: Path) -> None:
    (package / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    found = only(doctor.extension(package, "not built", None, "2.14.1"), "trouble")
    assert "of another Python (_C.cpython-39-x86_64-linux-gnu.so)" in found.what


@pytest.mark.parametrize(
    ("why_not", "said"),
    [
        ("the extension was built against torch 2.13.0, and this is", "of another torch than 2.14.1"),
        ("undefined symbol: _ZN2at4_ops3add4callE", "of another torch than 2.14.1"),
        ("libcudart.so.12: cannot open shared object file", "needs libcudart.so.12"),
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "of a newer system"),
        ("file too short", "does not load: file too short"),
    ],
)  # fmt: skip
def test_extension_that_does_not_load(package: Path, why_not: str, said: str) -> None:
    (package / HERE).touch()
    found = only(doctor.extension(package, why_not, None, "2.14.1"), "trouble")
    assert said in found.what
    assert "pip install" in str(found.cure)


SYMBOL = (
    'extern "C" int of_another_torch(); extern "C" int PyInit__C() { return of_another_torch(); }'
)


@pytest.mark.parametrize("damage", ["renamed", "another torch"])
def test_damaged_installation(damage: str, tmp_path: Path) -> None:
    """The whole command, on a copy of the package whose extension is not right."""
    copy = tmp_path / "fusedloss"
    packages = [
        path for path in sys.path if Path(path, "torch").is_dir() or "site-packages" in path
    ]
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so"))
    if damage == "renamed":
        (copy / "_C.cpython-39-x86_64-linux-gnu.so").touch()
        said = "the compiled extension is of another Python"
    else:
        compiler = shutil.which("c++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        (tmp_path / "other.cpp").write_text(SYMBOL)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", copy / HERE, tmp_path / "other.cpp"], check=True
        )
        said = "the compiled extension is of another torch than"
    done = subprocess.run(
        # -S: an editable installation would lend its extension.
        [sys.executable, "-S", "-W", "ignore", "-m", "fusedloss", "doctor"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *packages])},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"trouble  {said}" in done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A source folder without an extension, beside an installed package that has one."""
    folder, site = tmp_path / "checkout", tmp_path / "site"
    shutil.copytree(PACKAGE, site / "fusedloss", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE, folder / "fusedloss", ignore=shutil.ignore_patterns("*.so"))
    (folder / "setup.py").touch()
    (folder / "program.py").write_text("import fusedloss\nprint(fusedloss.info().compiled)\n")
    return folder


def started(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    packages = [path for path in sys.path if Path(path, "torch").is_dir()]
    site = str(checkout.parent / "site")
    return subprocess.run(
        # -S: an editable installation would lend its extension.
        [sys.executable, "-S", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([site, *packages])},
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout,
    )


@pytest.mark.parametrize("command", [["-m", "fusedloss"], ["-W", "ignore", "-mfusedloss"]], ids=str)
def test_the_doctor_in_a_checkout_examines_the_installation(
    command: list[str], checkout: Path, compiled: str
) -> None:
    """The first commands of the README: all is well, and there is no warning."""
    done = started(checkout, *command, "doctor")
    assert done.returncode == 0 and done.stderr == ""
    assert "ok       the compiled extension loads" in done.stdout
    assert "ok       errors of the compiled extension arrive" in done.stdout
    assert f"note     programs that start in {checkout} import the fusedloss there" in done.stdout
    done = started(checkout, *command, "info")
    assert done.returncode == 0 and "compiled   runs" in done.stdout and done.stderr == ""
    done = started(checkout, *command, "run", "program.py")
    assert done.returncode == 0 and done.stdout == "True\n"
    assert done.stderr.startswith("fusedloss.patch reached no loss")


@pytest.mark.parametrize("hides", [True, False])
def test_the_warning_of_a_checkout(checkout: Path, hides: bool, compiled: str) -> None:
    """It names the folder, says what to do, and points at the line that imports."""
    site = checkout.parent / "site" / "fusedloss"
    if not hides:
        if (PACKAGE.parent / "torch").is_dir():
            pytest.skip("fusedloss is installed beside torch, and hidden as well")
        shutil.rmtree(site)
        # If the installation under test is editable, it does not belong to this environment.
        code = (checkout / "fusedloss" / "doctor.py").read_text()
        assert code.count('metadata.distribution("fusedloss")') == 1
        code = code.replace('metadata.distribution("fusedloss")', "None")
        (checkout / "fusedloss" / "doctor.py").write_text(code)
    done = started(checkout, "program.py")
    assert done.stdout == "False\n"
    where, line = done.stderr.splitlines()
    assert where.startswith(f"{checkout / 'program.py'}:1: RuntimeWarning: fusedloss runs on plain")
    assert line == "  import fusedloss"
    install = f"{sys.executable} -m pip install -e {checkout}"
    if hides:
        assert where.endswith(
            f"imported from the source folder {checkout}, which has no compiled extension and hides "
            f"the installed {site}, which has one: start Python in another folder, or {install}"
        )
    else:
        assert where.endswith(
            f"nothing has been compiled in the source folder {checkout}, where fusedloss was "
            f"imported from: {install}"
        )
        done = started(checkout, "-m", "fusedloss", "doctor")
        assert done.returncode == 1 and f"no compiled extension in {checkout}" in done.stdout


def test_why_there_is_no_extension(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed without a compiler, and by another Python."""
    monkeypatch.setattr(doctor, "_editable_source", lambda: None)
    assert doctor.no_extension(package, []) == (
        "the extension was not built: reinstall fusedloss where a C++ compiler is found"
    )
    (package / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "is of another Python" in doctor.no_extension(package, [])


def test_extension_of_another_copy(package: Path, tmp_path: Path) -> None:
    found = only(doctor.extension(package, None, str(tmp_path / HERE), "2.14.1"), "trouble")
    assert f"of another copy of the package: {tmp_path / HERE}" in found.what
    (own,) = doctor.extension(package, None, str(package / HERE), "2.14.1")
    assert own.kind == "ok"


def test_checkout_that_hides_the_installation(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_editable_source", lambda: None)
    checkout = tmp_path / "checkout" / "fusedloss"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").touch()
    path = [str(checkout.parent), str(package.parent)]
    note = only(doctor.copies(checkout, path), "note")
    assert str(package) in note.what
    # It is worse if the hidden copy is the one with kernels.
    (package / HERE).touch()
    found = only(doctor.copies(checkout, path), "trouble")
    assert "which has the compiled extension that the former lacks" in found.what
    (checkout / HERE).touch()
    only(doctor.copies(checkout, path), "note")


def test_the_same_folder_twice_is_one_copy(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_editable_source", lambda: package.parent)
    (tmp_path / "link").symlink_to(package.parent)
    path = [str(package.parent), str(tmp_path / "link"), str(tmp_path / "nothing")]
    assert [finding.kind for finding in doctor.copies(package, path)] == ["ok"]


# ---- compilers -----------------------------------------------------------------------------------


def test_missing_tools(bare_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    compiler, headers, ninja = doctor.tools(tmp_path)
    assert "no C++ compiler" in compiler.what and "g++" in str(compiler.cure)
    assert f"no Python.h in {tmp_path}" in headers.what and "-dev" in str(headers.cure)
    assert "no ninja" in ninja.what and "pip install ninja" in str(ninja.cure)
    assert {compiler.kind, headers.kind, ninja.kind} == {"note"}


def test_tools_that_are_there(bare_path: Path, tmp_path: Path) -> None:
    program(bare_path, "clang++", "")
    program(bare_path, "ninja", "")
    (tmp_path / "Python.h").touch()
    assert [finding.kind for finding in doctor.tools(tmp_path)] == ["ok"] * 3


def test_compiler_chosen_by_hand(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare_path, "c++", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert next(doctor.tools()).what == "CXX=no-such-compiler is no program"


# ---- CUDA ----------------------------------------------------------------------------------------


NO_NVRTC = "no NVRTC: libnvrtc.so.13: cannot open shared object file"


def cuda(*versions: Any, fused: bool, nvrtc: list[str] | str = NO_NVRTC) -> Iterator[Finding]:
    return doctor.cuda(*versions, fused=fused, nvrtc=nvrtc)


def test_missing_nvcc(bare_path: Path) -> None:
    found = only(cuda("13.0", None, None, fused=False), "note")
    assert "no nvcc was found" in found.what and "toolkit 13.0" in str(found.cure)
    # With a GPU that is a problem, unless another backend drives it.
    assert only(cuda("13.0", None, (13, 0), fused=False), "trouble") == Finding(
        "trouble", found.what, found.cure
    )
    assert "another backend" in only(cuda("13.0", None, (13, 0), fused=True), "note").what


@pytest.mark.parametrize("variable", ["PATH", "NVCC", "CUDA_HOME"])
def test_nvcc_of_another_cuda(
    variable: str, bare_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable == "PATH":
        nvcc = program(bare_path, "nvcc", "Cuda compilation tools, release 12.4, V12.4.131")
    else:
        (tmp_path / "cuda" / "bin").mkdir(parents=True)
        nvcc = program(tmp_path / "cuda" / "bin", "nvcc", "release 12.4, V12.4.131")
        monkeypatch.setenv(variable, str(nvcc if variable == "NVCC" else tmp_path / "cuda"))
    found = only(cuda("13.0", None, None, fused=False), "note")
    assert f"{nvcc} is of CUDA 12.4, and torch of CUDA 13.0" in found.what
    same = only(cuda("12.8", None, None, fused=False), "note")
    assert f"{nvcc} could build them" in same.what


def test_kernels_of_another_cuda(bare_path: Path) -> None:
    program(bare_path, "nvcc", "release 13.0, V13.0.88")
    found = only(cuda("13.0", "12.4", None, fused=True), "trouble")
    assert "the CUDA kernels are of CUDA 12.4, and torch of CUDA 13.0" in found.what
    assert all(finding.kind == "ok" for finding in cuda("13.0", "13.1", None, fused=True))


@pytest.mark.parametrize("version", [None, "12.4"])
def test_no_nvcc_for_own_losses(version: str | None, bare_path: Path) -> None:
    if version is not None:
        program(bare_path, "nvcc", f"release {version}, V{version}.1")
    found = list(cuda("13.0", "13.0", None, fused=True))
    assert [finding.kind for finding in found] == ["ok", "note"]
    assert found[1].what.startswith(f"{NO_NVRTC}; no nvcc of CUDA 13.x: a custom loss is not")


def test_who_compiles_own_losses(bare_path: Path) -> None:
    """NVRTC, or nvcc, and then why not NVRTC."""
    nvrtc = program(bare_path, "nvrtc", "NVRTC 13.0")
    _, found = cuda("13.0", "13.0", None, fused=True, nvrtc=[str(nvrtc)])
    assert str(found) == "ok       NVRTC 13.0 compiles custom losses for CUDA tensors"
    nvcc = program(bare_path, "nvcc", "release 13.0, V13.0.88")
    _, found = cuda("13.0", "13.0", None, fused=True)
    assert found == Finding("ok", f"{nvcc} compiles custom losses for CUDA tensors ({NO_NVRTC})")


def test_torch_for_the_cpu_beside_a_gpu() -> None:
    found = only(cuda(None, None, (12, 4), fused=False), "trouble")
    assert "torch is built for the CPU" in found.what
    assert [finding.kind for finding in cuda(None, None, None, fused=False)] == ["ok"]


@pytest.mark.parametrize(("number", "kind"), [(12040, "trouble"), (13000, "note"), (13010, "ok")])
def test_old_driver(number: int, kind: str, tmp_path: Path) -> None:
    """A stand-in for NVIDIA's library says what it runs; another process loads it."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "driver.cpp"
    source.write_text(
        f'extern "C" int cuDriverGetVersion(int* version) {{ *version = {number}; return 0; }}'
    )
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    code = (
        "from fusedloss import doctor\n"
        'print(*doctor.cuda("13.1", "13.1", doctor.driver_version(), True, "no NVRTC"), sep="\\n")'
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    first = done.stdout.splitlines()[0]
    assert first.startswith(kind) and f"CUDA {'' if kind == 'ok' else 'up to '}" in first
    assert ("update the driver" in done.stdout) is (kind != "ok")


# ---- OpenMP --------------------------------------------------------------------------------------

MAPS = "7f0000000000-7f0000001000 r-xp 00000000 08:01 42                   {}\n"


def test_two_openmp_runtimes() -> None:
    def findings(*names: str) -> list[Finding]:
        # Each library is mapped several times.
        return list(doctor.openmp("".join(MAPS.format(name) for name in names + names)))

    torchs, sklearns = (
        "/site/torch/lib/libgomp.so.1",
        "/site/sklearn.libs/libgomp-e985bcbb.so.1.0.0",
    )
    assert findings(torchs, "/lib/libc.so.6", "/lib/libcompletely.so")[0].kind == "ok"
    assert findings("/lib/libc.so.6")[0].kind == "ok"
    assert torchs in only(findings(torchs, sklearns), "note").what
    for other in ("/opt/conda/lib/libiomp5.so", "/usr/lib/llvm-19/lib/libomp.so.5"):
        assert other in only(findings(torchs, other), "trouble").what


# ---- the commands --------------------------------------------------------------------------------


def test_nothing_is_wrong_here(compiled: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The installation under test: at most notes, so status 0."""
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"ok       torch {torch.__version__}" in said
    assert "ok       the compiled extension loads" in said
    assert (
        said.splitlines()[-1] == "no trouble found"
        or said.splitlines()[-1].split()[1][:4] == "note"
    )


def test_status_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding("trouble", "ill", "rest"),
        Finding("note", "pale", "walk"),
        Finding("ok", "fit"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda modules: findings)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "trouble  ill",
        "         cure: rest",
        "note     pale",
        "         cure: walk",
        "ok       fit",
        "1 trouble, 1 note",
    ]
    del findings[0]
    assert main(["doctor"]) == 0


def test_other_modules_are_imported_first(capsys: pytest.CaptureFixture[str]) -> None:
    sys.modules.pop("this", None)
    main(["doctor", "--import", "this"])
    assert "this" in sys.modules
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--import", "no_such_module"])
    assert "No module named 'no_such_module'" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"{fusedloss.info()}\n"


def test_bench_without_the_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An installed package, and another program's bench in the folder."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text("raise AssertionError('not ours')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fusedloss.__main__.__file__", str(tmp_path / "site" / "fusedloss" / "x.py")
    )
    assert main(["bench", "--quick"]) == 2
    assert capsys.readouterr().err == f"{NO_BENCH}\n"


def test_bench_is_handed_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "call.h").touch()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "measure.py").touch()
    (tmp_path / "bench" / "__main__.py").write_text(
        "import sys\nif sys.argv[1:] == ['missing']: import no_such_package\nsys.exit(len(sys.argv))"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("fusedloss.__main__.__file__", str(tmp_path / "fusedloss" / "__main__.py"))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit, match="3"):
        main(["bench", "--help", "--only=mse"])
    assert main(["bench", "missing"]) == 2


def test_errors_that_do_not_arrive(fused: str) -> None:
    assert [finding.kind for finding in doctor.errors("gcc 13")] == ["ok"]
    found = only(doctor.errors("gcc 13", "import os; os.abort()"), "trouble")
    assert "(status -6); it was built by gcc 13" in found.what
    assert "CXX=/usr/bin/g++" in found.cure
