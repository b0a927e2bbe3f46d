"""info, explain, backend and the command line."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss
import fusedloss.functional as FL
from cases import BASIC, at_shape
from conftest import why_not
from fusedloss.custom import building
from helpers import NAMESPACE, leaf, torch_loss


def fused_operators(call: Any) -> set[str]:
    """The names of our operators that a call runs, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {e.key for e in profile.key_averages() if e.key.startswith(f"{NAMESPACE}::")}


def test_info() -> None:
    info = fusedloss.info()
    assert info.version == fusedloss.__version__
    assert info.torch == torch.__version__
    assert isinstance(info.backends, Mapping)
    assert list(info.backends) == ["compiled", "triton", "reference"]
    assert info.backends["reference"] is None
    assert info.compiled is (info.backends["compiled"] is None)
    text = str(info)
    for name, reason in info.backends.items():
        assert name in text
        assert reason is None or reason in text
    if info.compiled:
        assert info.cpu_capability in text and info.cpu_capability in ("DEFAULT", "AVX2", "AVX512")


def test_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fusedloss", "info"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("compiled", "triton", "reference", fusedloss.__version__, torch.__version__):
        assert name in done.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["info", "nonsense"]])
def test_command_line_errors(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedloss", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr and "Traceback" not in done.stderr


_FIRST_USE = """
loss = fusedloss.CrossEntropyLoss(weight=torch.rand(5), label_smoothing=0.1)
loss(torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 4])).backward()
fusedloss.functional.mse_loss(torch.randn(3, requires_grad=True), torch.randn(3)).backward()
fusedloss.functional.mse_loss(torch.randn(3), torch.randn(3, requires_grad=True)).backward()
fusedloss.explain(fusedloss.LogLoss(), torch.rand(3, 5), torch.tensor([0, 1, 4]))
fusedloss.replace(torch.nn.Sequential(torch.nn.MSELoss()))
with fusedloss.patch():
    torch.nn.functional.mse_loss(torch.randn(3), torch.randn(3))
"""


@pytest.mark.parametrize("use", ["", _FIRST_USE], ids=["import", "first use"])
def test_little_is_imported(use: str) -> None:
    """It imports no compiler and no SymPy, which take seconds: only torch and Python's own
    modules."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"import fusedloss\n{use}\n"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    names = done.stdout.split()
    assert "fusedloss.functional" in names
    ours = ("fusedloss", *sys.stdlib_module_names)
    assert sorted(name for name in names if name.split(".")[0] not in ours) == []


@pytest.mark.parametrize("loss", BASIC)
def test_explain_tells_what_happens(loss: str, backend: str) -> None:
    """explain() agrees with the profiler."""
    sample = at_shape(loss, (5, 7)).sample(torch.float32)
    function = getattr(FL, loss)
    told = fusedloss.explain(function, leaf(sample.input), sample.target)
    assert told.backend == backend
    assert told.fused is (backend != "reference")
    assert isinstance(told.reasons, tuple) and all(isinstance(r, str) for r in told.reasons)
    assert told.reasons or told.fused
    assert backend in str(told) and "\n" not in str(told)
    seen = fused_operators(lambda: function(leaf(sample.input), sample.target).backward())
    assert bool(seen) is told.fused


def _unusual() -> dict[str, Any]:
    x, y = torch.rand(5, 7), torch.rand(5, 7)
    return {
        "broadcast": (FL.mse_loss, (x[:1], y), {}),
        "mixed dtypes": (FL.huber_loss, (x, y.double()), {}),
        "target gradient": (FL.binary_cross_entropy_with_logits, (x, leaf(y)), {}),
        "integers": (FL.cross_entropy, (x, torch.zeros(5, dtype=torch.uint8)), {}),
        "subclass": (FL.l1_loss, (torch.nn.Buffer(x).as_subclass(Subclass), y), {}),
        "meta": (FL.huber_loss, (x.to("meta"), y.to("meta")), {}),
    }


class Subclass(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", sorted(_unusual()))
def test_explain_a_call_that_is_not_fused(name: str, compiled: str) -> None:
    function, args, options = _unusual()[name]
    told = fusedloss.explain(function, *args, **options)
    assert told.backend == "reference" and not told.fused
    assert told.reasons and all(reason.strip() for reason in told.reasons)
    if name in ("meta", "integers"):
        return
    with pytest.warns(UserWarning) if name == "broadcast" else contextlib.nullcontext():
        assert not fused_operators(lambda: function(*args, **options))


@pytest.mark.parametrize("name", ["MSELoss", "CrossEntropyLoss"])
def test_explain_a_module(name: str, backend: str) -> None:
    module = getattr(fusedloss, name)()
    loss = {"MSELoss": "mse_loss", "CrossEntropyLoss": "cross_entropy"}[name]
    sample = at_shape(loss, (5, 7)).sample(torch.float32)
    told = fusedloss.explain(module, sample.input, sample.target)
    assert told.backend == backend


def test_explain_computes_nothing_and_leaves_no_trace(compiled: str) -> None:
    x, y = leaf(torch.rand(5, 7)), torch.rand(5, 7)
    assert not fused_operators(lambda: fusedloss.explain(FL.mse_loss, x, y))
    assert x.grad is None
    assert isinstance(FL.mse_loss(x, y), Tensor)
    with pytest.raises(Exception, match=r"."):
        fusedloss.explain(len, [1])
    assert isinstance(FL.mse_loss(x, y), Tensor)


def test_backend_as_context_manager() -> None:
    x, y = leaf(torch.rand(5, 7)), torch.rand(5, 7)
    outside = fusedloss.explain(FL.mse_loss, x, y).backend
    with fusedloss.backend("reference"):
        assert fusedloss.explain(FL.mse_loss, x, y).backend == "reference"
        assert not fused_operators(lambda: FL.mse_loss(x, y))
        if why_not("compiled") is None:
            with fusedloss.backend("compiled"):
                assert fusedloss.explain(FL.mse_loss, x, y).backend == "compiled"
        assert fusedloss.explain(FL.mse_loss, x, y).backend == "reference"
    assert fusedloss.explain(FL.mse_loss, x, y).backend == outside
    with pytest.raises(KeyError), fusedloss.backend("reference"):
        raise KeyError
    assert fusedloss.explain(FL.mse_loss, x, y).backend == outside


def test_backend_as_context_manager_again() -> None:
    """In a variable it can be entered repeatedly, and each exit restores the choice before."""

    def chosen() -> str:
        return fusedloss.explain(FL.mse_loss, torch.rand(3), torch.rand(3)).backend

    outside = chosen()
    kept = fusedloss.backend("reference")
    with kept:
        with kept:
            assert chosen() == "reference"
        assert chosen() == "reference"
    assert chosen() == outside
    with kept:
        assert chosen() == "reference"
    assert chosen() == outside


def test_explain_what_explains(compiled: str) -> None:
    """Like a loss that logs its own path."""
    x, y = torch.rand(3), torch.rand(3)
    seen = []

    def loss(input: Tensor, target: Tensor) -> Tensor:
        seen.append(fusedloss.explain(FL.l1_loss, input, target))
        return FL.mse_loss(input, target[None])

    explained = fusedloss.explain(loss, x, y)
    assert "shapes differ" in str(explained)
    assert seen == [fusedloss.explain(FL.l1_loss, x, y)]


def test_backend_as_function() -> None:
    """Called as a function it stays in effect; tested in another process."""
    code = (
        "import fusedloss, torch, fusedloss.functional as FL;"
        "fusedloss.backend('reference');"
        "print(fusedloss.explain(FL.mse_loss, torch.rand(3), torch.rand(3)).backend)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "reference"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="cudnn") as raised:
        fusedloss.backend("cudnn")
    for name in ("compiled", "triton", "reference"):
        assert name in str(raised.value)


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_backend_that_cannot_run(name: str) -> None:
    """Choosing it raises with the reason; there is no silent fall-back."""
    reason = why_not(name)
    if reason is None:
        pytest.skip(f"{name} runs here")
    with pytest.raises(RuntimeError) as raised:
        fusedloss.backend(name)
    assert name in str(raised.value) and reason in str(raised.value)


@pytest.mark.parametrize("loss", BASIC)
def test_a_training_step_is_the_same_on_each_backend(loss: str, backend: str) -> None:
    sample = at_shape(loss, (33, 17)).sample(torch.float64)
    results = []
    for function in (getattr(FL, loss), torch_loss(loss)):
        input = leaf(sample.input)
        (function(input, sample.target) * 3).backward()
        results.append(input.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)


def test_build_info() -> None:
    if why_not("compiled") is not None:
        pytest.skip(f"compiled cannot run: {why_not('compiled')}")
    from fusedloss import _C

    info = _C.build_info()
    assert info["version"] == fusedloss.__version__
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]


# ---- where warnings point ------------------------------------------------------------------------


def warned_at(call: Callable[[], Any]) -> list[str]:
    """The messages, after checking that each points at a line of this file that ends with "#
    here"."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    lines = Path(__file__).read_text().splitlines()
    for warning in caught:
        assert warning.filename == __file__, warning
        assert lines[warning.lineno - 1].endswith("# here"), warning
    return [str(warning.message) for warning in caught]


ROW, MATRIX = torch.rand(1, 3), torch.rand(2, 3)


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_a_warning_of_shapes_points_at_the_call(loss: str, backend: str) -> None:
    """For the function, the module, modules inside modules, under a patch, in torch.func and
    plain."""
    kind = {"mse_loss": "MSELoss", "l1_loss": "L1Loss", "smooth_l1_loss": "SmoothL1Loss"}
    module = getattr(fusedloss, kind.get(loss, "HuberLoss"))()
    theirs = getattr(torch.nn, kind.get(loss, "HuberLoss"))()
    function, plain = getattr(FL, loss), getattr(fusedloss.reference, loss)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.nn.Sequential(Half(module))(x)  # not a line of torch

    class Half(torch.nn.Module):
        def __init__(self, loss: Any) -> None:
            super().__init__()
            self.loss = loss

        def forward(self, x: Tensor) -> Any:
            return self.loss(x, ROW)  # here

    def patched() -> None:
        with fusedloss.patch():
            theirs(MATRIX, ROW)  # here
            getattr(torch.nn.functional, loss)(MATRIX, ROW)  # here

    for call, count in (
        (lambda: function(MATRIX, ROW), 1),  # here
        (lambda: function(MATRIX, target=ROW, reduction="sum"), 1),  # here
        (lambda: module(MATRIX, ROW), 1),  # here
        (lambda: plain(MATRIX, ROW), 1),  # here
        (lambda: torch.func.grad(lambda x: function(x, ROW))(MATRIX), 1),  # here
        (lambda: Model()(MATRIX), 1),
        (patched, 2),
    ):
        messages = warned_at(call)
        assert len(messages) == count
        assert all("Using a target size (torch.Size([1, 3]))" in text for text in messages)


def test_weighted_l1_loss_warns_at_the_call(backend: str) -> None:
    (message,) = warned_at(
        lambda: FL.l1_loss(MATRIX, ROW, weight=MATRIX),  # here
    )
    assert "Using a target size" in message


@pytest.mark.parametrize("loss", [loss for loss in BASIC if loss not in ("log_loss", "huber_loss")])
def test_a_warning_of_deprecated_options_points_at_the_call(loss: str, backend: str) -> None:
    """They are fused like the reduction that they mean."""
    sample = at_shape(loss, (5, 7)).sample(torch.float32)
    function, given = getattr(FL, loss), (sample.input, sample.target)
    messages = warned_at(lambda: function(*given, size_average=False))  # here
    messages += warned_at(lambda: function(*given, reduce=False, reduction="sum"))  # here
    assert [text.partition("please use ")[2] for text in messages] == [
        "reduction='sum' instead.",
        "reduction='none' instead.",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fusedloss.explain(function, *given, size_average=False).backend == backend
        torch.testing.assert_close(
            function(*given, reduce=False), function(*given, reduction="none")
        )


def difference(input: Any, target: Any) -> Any:
    return abs(input - target)


def test_warnings_of_a_custom_loss_point_at_the_call(
    compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "/dev/null/no-folder")
    loss = fusedloss.pointwise_loss(difference)
    module = torch.nn.Sequential(loss.module())
    module[0].forward = lambda x: loss.module()(x, ROW)  # here
    for call, begins in (
        (lambda: loss(MATRIX, MATRIX), "difference runs on plain PyTorch"),  # here
        (lambda: loss(MATRIX, ROW), "difference: target of shape (1, 3) differs"),  # here
        (lambda: loss.reference(MATRIX, ROW), "difference: target of shape (1, 3) differs"),  # here
        (lambda: module(MATRIX), "difference: target of shape (1, 3) differs"),
    ):
        (message,) = warned_at(call)
        assert message.startswith(begins)


def test_a_warning_of_the_cache_points_at_the_call(
    compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "/dev/null/no-folder")
    monkeypatch.setattr(building, "_warned_of", set())
    loss = fusedloss.pointwise_loss(difference)
    (message,) = warned_at(lambda: loss.module()(MATRIX, MATRIX))  # here
    assert message.startswith("fusedloss keeps no compiled losses")


def test_a_warning_is_shown_once_for_each_line(backend: str) -> None:
    """Shown by Python's default filters, as if the line itself had warned."""
    module: dict[str, Any] = {"__name__": "somewhere", "FL": FL, "x": MATRIX, "y": ROW}
    code = compile("for _ in range(3): FL.mse_loss(x, y)\nFL.mse_loss(x, y)\n", "a.py", "exec")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        exec(code, module)  # noqa: S102
    assert [(warning.filename, warning.lineno) for warning in caught] == [("a.py", 1), ("a.py", 2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="somewhere")
        exec(code, module)  # noqa: S102
        FL.mse_loss(MATRIX, ROW)
    assert len(caught) == 4


def test_the_traceback_of_an_error_stays_readable(backend: str) -> None:
    """The last lines of the traceback are the call's and torch's."""
    with pytest.raises(RuntimeError) as raised:
        FL.mse_loss(torch.rand(2, 3), torch.rand(2, 4))  # here
    files = [str(entry.path) for entry in raised.traceback]
    assert files[0] == __file__ and "torch" in files[-1]


# ---- what explain takes --------------------------------------------------------------------------


def test_explain_a_model(backend: str) -> None:
    """It explains the model's first fused loss; torch's own losses do not count."""

    class Model(torch.nn.Module):
        def __init__(self, criterion: torch.nn.Module) -> None:
            super().__init__()
            self.body, self.criterion = torch.nn.Linear(3, 3), criterion

        def forward(self, x: Tensor, target: Tensor) -> Any:
            return self.criterion(self.body(x), target)

    assert fusedloss.explain(Model(fusedloss.MSELoss()), MATRIX, MATRIX).backend == backend
    with pytest.raises(TypeError, match="calls no loss of fusedloss"):
        fusedloss.explain(Model(torch.nn.MSELoss()), MATRIX, MATRIX)
