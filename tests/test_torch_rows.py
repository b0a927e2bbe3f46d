"""Cosine embedding, triplet margin and multi margin: what is theirs beside the tables of all losses."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from fusedloss import _row_losses
from fusedloss.custom import prepare
from helpers import ROWS, assert_same_error, host_sees_errors, leaf, outcome

FEW = 1 << 14
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y, Z = X.flip(0).exp(), X.flip(1).sin()
SIGNS, LABELS = torch.tensor([1, -1, 0, 1]), torch.tensor([0, 4, 2, 1])


def compare(loss: str, *args: Any, **options: Any) -> None:
    """torch's value, warnings, and gradients for all floating inputs of rows; or its error."""

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [leaf(t) if t.is_floating_point() and t.dim() else t for t in args]
        if loss == "cosine_embedding_loss":
            inputs[2] = args[2]
        value = function(*inputs, **options)
        upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
        wanted = [t for t in inputs if t.requires_grad]
        return [value.detach(), *torch.autograd.grad(value, wanted, upstream)]

    ours, my_error, my_warnings = outcome(lambda: run(getattr(FL, loss)))
    theirs, their_error, their_warnings = outcome(lambda: run(getattr(F, loss)))
    assert_same_error(my_error, their_error)
    assert my_warnings == their_warnings
    for mine, expected in zip(ours or (), theirs or (), strict=True):
        low = expected.dtype in (torch.bfloat16, torch.float16)
        tolerance = 0.02 if low else 1e-12 if expected.dtype is torch.float64 else 1e-5
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def fused_for(loss: str, *args: Any, **options: Any) -> fusedloss.functional._dispatch.Explanation:
    return fusedloss.explain(getattr(FL, loss), *args, **options)


# ---- which calls are fused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "args"),
    [
        ("cosine_embedding_loss", (Y, Z, SIGNS)),
        ("triplet_margin_loss", (X, Y, Z)),
        ("multi_margin_loss", (X, LABELS)),
    ],
    ids=ROWS,
)
def test_few_elements_stay_with_torch(loss: str, args: Any, compiled: str) -> None:
    """Unless a backend was chosen by name, since their kernel would be compiled for seconds."""
    assert fused_for(loss, *args).fused
    many = [t.repeat(FEW // 20 + 1, *[1] * (t.dim() - 1)) for t in args]
    with fusedloss.backend(None):
        few = fused_for(loss, *args)
        assert few.reasons == ("fewer than 16384 elements, for which no kernel is compiled",)
        assert fused_for(loss, *many).fused
        compare(loss, *args)
        compare(loss, *many)


def test_few_elements_need_no_sympy() -> None:
    script = (
        "import sys, torch, fusedloss; x = torch.ones(2, 3)\n"
        "fusedloss.TripletMarginLoss()(x, x, x); fusedloss.MultiMarginLoss()(x, torch.tensor([0, 1]))\n"
        "sys.exit('sympy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("loss", "args", "options", "why"),
    [
        ("triplet_margin_loss", (X, Y, Z), {"p": 1}, "there are no kernels for p 1"),
        ("triplet_margin_loss", (X, Y, Z), {"swap": 1}, "swap 1 is no bool"),
        ("triplet_margin_loss", (X, Y, Z), {"margin": 0}, "margin 0 is outside of the kernels' domain"),
        ("triplet_margin_loss", (X, Y, Z), {"reduction": "avg"}, "reduction 'avg'"),
        ("triplet_margin_loss", (X, Y[:1], Z), {}, "shapes (4, 5) and (1, 5)"),
        ("triplet_margin_loss", (X[0, 0], Y[0, 0], Z[0, 0]), {}, "input has no class dimension"),
        ("cosine_embedding_loss", (X, Y, SIGNS[:1]), {}, "shapes (4, 5) and (1,)"),
        ("cosine_embedding_loss", (X, Y, SIGNS[:3]), {}, "shapes (4, 5) and (3,)"),
        ("cosine_embedding_loss", (X, Y, SIGNS[0]), {}, "shapes (4, 5) and ()"),
        ("cosine_embedding_loss", (X[None], Y[None], SIGNS[None]), {}, "a target of shape (1, 4)"),
        ("cosine_embedding_loss", (X, Y, SIGNS.bool()), {}, "dtypes differ: torch.float64 and torch.bool"),
        ("multi_margin_loss", (X, LABELS), {"p": 3}, "there are no kernels for p 3"),
        ("multi_margin_loss", (X, LABELS.int()), {}, "a target of torch.int32"),
        ("multi_margin_loss", (X[0], LABELS[:1]), {}, "shapes (5,) and (1,)"),
        ("multi_margin_loss", (X[None], LABELS[None]), {}, "a target of shape (1, 4)"),
        ("multi_margin_loss", (X, LABELS), {"weight": torch.ones(1, 5).double()}, "a weight of shape (1, 5)"),
        ("multi_margin_loss", (X, LABELS), {"weight": torch.ones(5)},
         "dtypes differ: torch.float64 and torch.float32"),
        ("multi_margin_loss", (X.bfloat16(), LABELS), {}, "torch has no multi_margin_loss of torch.bfloat16 on the CPU"),
    ],
)  # fmt: skip
@host_sees_errors
def test_torch_computes_the_rest(
    loss: str, args: Any, options: dict[str, Any], why: str, fused: str
) -> None:
    """With its result or error."""
    assert fused_for(loss, *args, **options).reasons == (why,)
    compare(loss, *args, **options)


@pytest.mark.parametrize("loss", ROWS)
def test_without_a_compiler_nobody_is_warned(
    loss: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: str
) -> None:
    """torch's function runs, as it would without this package."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_row_losses, "_defined", _row_losses._defined.__wrapped__)
    held: dict[int, Any] = {}  # a weak table would lose a loss that nobody else holds
    monkeypatch.setattr(prepare, "_defined", held)
    args = {"multi_margin_loss": (X, LABELS), "triplet_margin_loss": (X, Y, Z)}.get(
        loss, (X, Y, SIGNS)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = fused_for(loss, *args)
        compare(loss, *args)
    assert not told.fused and "no-such-compiler" in told.reasons[0]


# ---- what they compute ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [5, -1, -100, 2**40, -(2**40)])
@host_sees_errors
def test_class_out_of_range(value: int, backend: str) -> None:
    """torch's error; a kernel adds the place."""
    labels = LABELS.clone()
    labels[2] = value
    for options in ({}, {"p": 2, "weight": torch.ones(5).double()}):
        compare("multi_margin_loss", X, labels, **options)
        if backend != "reference":
            with pytest.raises(RuntimeError, match=rf"Target {value} .* target\[2\]"):
                FL.multi_margin_loss(X, labels, **options)


def test_kinks(backend: str) -> None:
    """Vectors of zeros and equal ones, and equal distances: torch's gradients."""
    zero, one = torch.zeros(2, 3).double(), torch.ones(2, 3).double()
    for a, b in ((zero, zero), (zero, one), (one, one)):
        for margin in (0.5, -0.5):
            signs = torch.tensor([1, -1])
            compare("cosine_embedding_loss", a, b, signs, margin=margin, reduction="sum")
    for swap in (False, True):
        for a, b, n in ((one, one, one), (zero, one, one), (zero, one, -one)):
            compare("triplet_margin_loss", a, b, n, eps=0.0, swap=swap)
            compare("triplet_margin_loss", a, b, n, swap=swap)
    corner = torch.tensor([[1.0, 0.0, 2.0]]).double()
    for p in (1, 2):
        for margin in (1.0, 0.0, -0.5):
            compare("multi_margin_loss", corner, torch.tensor([0]), p=p, margin=margin)


def test_no_gradient_where_a_hinge_bends(fused: str) -> None:
    """0, as torch's of this release: that of others may be 1."""
    axes, zero = leaf(torch.eye(2).double()), torch.zeros(1, 2).double()
    apart = FL.cosine_embedding_loss(axes, axes.detach().flip(0), torch.tensor([-1, -1]))
    # A distance of 3 and of 4, and a margin of 1.
    triplet = FL.triplet_margin_loss(zero, 3 * axes[:1], 4 * axes[1:], eps=0.0)
    for value in (apart, triplet):
        assert value == 0
        assert not torch.autograd.grad(value, axes)[0].any()


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(strange: float, backend: str) -> None:
    """torch's values. (Its gradients are nan in rows that others would do without.)"""
    x = X.clone()
    x[1, 2] = strange
    for loss, args in (
        ("cosine_embedding_loss", (x, Y, SIGNS)),
        ("cosine_embedding_loss", (x, Y, -SIGNS)),
        ("triplet_margin_loss", (x, Y, Z)),
        ("multi_margin_loss", (x, LABELS)),
        ("multi_margin_loss", (x, torch.full_like(LABELS, 2))),
    ):
        mine, theirs = (getattr(where, loss)(*args, reduction="none") for where in (FL, F))
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, torch.uint8], ids=str)
def test_other_targets_of_cosine_embedding(dtype: torch.dtype, backend: str) -> None:
    """Their rows have a loss of 0, however near to 1 they are."""
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    target = torch.tensor([1, -1, 0, 2, 1 + 2**-30, 0.5], dtype=torch.float64).to(dtype)
    compare("cosine_embedding_loss", x, y, target, reduction="none")


def test_triplets_of_any_shape(fused: str) -> None:
    """And of any strides."""
    a, b, c = torch.randn(3, 2, 3, 4, 5, 6, dtype=torch.float64).unbind()
    for x, y, z in (
        (a, b, c),
        (a[0], b[0], c[0]),
        (a[0, 0], b[0, 0], c[0, 0]),
        (a[0, 0, 0, 0],) * 3,
    ):
        for turn in (False, True):
            inputs = [t.mT if turn and t.dim() > 1 else t for t in (x, y, z)]
            assert fused_for("triplet_margin_loss", *inputs).fused
            for reduction in ("none", "mean"):
                compare("triplet_margin_loss", *inputs, reduction=reduction, swap=turn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """float32 from low precision; multi_margin_loss too, which has no low precision otherwise."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare("cosine_embedding_loss", X.to(dtype), Y.to(dtype), SIGNS)
        compare("triplet_margin_loss", X.to(dtype), Y.to(dtype), Z.to(dtype))
        compare("multi_margin_loss", X.to(dtype), LABELS)
        compare("multi_margin_loss", X.to(dtype), LABELS, weight=X[0].to(dtype).exp().detach())
        if backend != "reference":
            assert fused_for("multi_margin_loss", X.to(dtype), LABELS).fused


# ---- compilers, patch, replace -------------------------------------------------------------------


class Step(nn.Module):
    def __init__(self, losses: Any) -> None:
        super().__init__()
        self.losses = losses

    def forward(self, a: Tensor, b: Tensor, signs: Tensor, labels: Tensor) -> Tensor:
        cosine, triplet, margin = self.losses
        value: Tensor = cosine(a, b, signs) + triplet(a, b, b.sin()) + margin(a, labels)
        return value


THEIRS = Step((F.cosine_embedding_loss, F.triplet_margin_loss, F.multi_margin_loss))
OURS = Step((FL.cosine_embedding_loss, FL.triplet_margin_loss, FL.multi_margin_loss))


@pytest.mark.slow
def test_compiled_graphs(compiled: str) -> None:
    step = torch.compile(OURS, fullgraph=True, backend="aot_eager")
    found = []
    for function in (step, THEIRS):
        a, b = leaf(X), leaf(Y)
        value = function(a, b, SIGNS, LABELS)
        found.append([value, *torch.autograd.grad(value, (a, b))])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_exported_graphs_have_no_kernel_of_this_machine(compiled: str) -> None:
    with fusedloss.backend(None):
        args = [t.repeat(1000, *[1] * (t.dim() - 1)) for t in (X, Y, SIGNS, LABELS)]
        graph = torch.export.export(OURS, tuple(args))
    assert "fusedloss" not in graph.graph_module.code
    torch.testing.assert_close(graph.module()(*args), THEIRS(*args))


def test_patch_and_replace(compiled: str) -> None:
    modules = nn.ModuleList(
        [nn.CosineEmbeddingLoss(), nn.TripletMarginLoss(), nn.MultiMarginLoss()]
    )
    with fusedloss.patch() as patched:
        expected = THEIRS(X, Y, SIGNS, LABELS)
        Step(modules)(X, Y, SIGNS, LABELS)
    assert {call.loss for call in patched.calls if call.path.fused} == set(ROWS)
    assert list(fusedloss.replace(modules)) == ["0", "1", "2"]
    torch.testing.assert_close(Step(modules)(X, Y, SIGNS, LABELS), expected)
    assert fusedloss.explain(modules[1], X, Y, Z).fused
    fusedloss.restore(modules)
    assert type(modules[2]) is nn.MultiMarginLoss
