"""Losses of rows: their definitions, and their formulas in plain PyTorch."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
from fusedloss import math as fm
from fusedloss.custom.row_tracing import MAX_AUXILIARY
from row_losses import (
    ROW_LOSSES,
    RowCase,
    _at,
    balanced,
    cispo,
    cosine,
    distillation,
    focal,
    grpo,
    jsd,
    lk_hybrid,
    reverse_kl,
    scaled,
)


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    with fusedloss.backend("reference"):
        yield


# Beside those of the table.


@fusedloss.row_loss
def logged(  # type: ignore[no-untyped-def]
    logits, label: fm.Label, old: fm.PerRow, advantage: fm.PerRow, *, low=0.2, high=0.2, entropy=0.0
):
    value = grpo.function(logits, label, old, advantage, low=low, high=high, entropy=entropy)
    logp = fm.log_softmax(logits)
    ratio = fm.exp(fm.at(logp, label) - old)
    return value, {"entropy": -fm.sum(fm.exp(logp) * logp), "ratio": ratio}


@fusedloss.row_loss
def chosen(x, y):  # type: ignore[no-untyped-def]
    """Classes choose between words of the whole row, and rows between words."""
    each = fm.where(x > y, fm.softmax(x) * fm.max(y), fm.sqrt(fm.relu(x)) + fm.mean(y))
    total = fm.sum(each)
    return fm.where(fm.min(x) < -1, total, fm.log1p(fm.relu(total)) + fm.norm(y))


def _chosen(x: Tensor, y: Tensor) -> Tensor:
    root = torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)
    other = root + y.mean(-1, keepdim=True)
    each = torch.where(x > y, x.softmax(-1) * y.amax(-1, keepdim=True), other)
    total = each.sum(-1)
    return torch.where(x.amin(-1) < -1, total, total.relu().log1p() + y.norm(dim=-1))


(GRPO,) = (case for case in ROW_LOSSES if case.loss is grpo)
LOGGED = RowCase(logged, GRPO.torch, GRPO.walks, GRPO.parameters)
CASES = [*ROW_LOSSES, LOGGED, RowCase(chosen, _chosen, 0)]


def named(case: RowCase) -> str:
    return case.id


def leaves(case: RowCase, rows: tuple[int, ...] = (6,), classes: int = 5) -> list[Tensor]:
    inputs = case.inputs(rows, classes, torch.float64, seed=1)
    return [t.requires_grad_(t.is_floating_point()) for t in inputs]


def first(result: Any) -> Tensor:
    value: Tensor = result[0] if isinstance(result, tuple) else result
    return value


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=named)
def test_value_and_gradients(case: RowCase) -> None:
    inputs = leaves(case)
    wanting = [t for t in inputs if t.requires_grad]
    ours = first(case.loss(*inputs, reduction="none", **case.parameters))
    eager = case.torch(*inputs, **case.parameters)
    torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(eager)
    for found, expected in zip(
        torch.autograd.grad(ours, wanting, upstream),
        torch.autograd.grad(eager, wanting, upstream, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_derivatives(case: RowCase) -> None:
    """Of first and second order. What detaches has other ones than finite differences say."""
    if case.loss in (cispo, lk_hybrid):
        pytest.skip("detaches")
    inputs = leaves(case, (2,), 3)

    def value(*inputs: Tensor) -> Tensor:
        return first(case.loss(*inputs, **case.parameters))

    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension(case: RowCase, dim: int) -> None:
    inputs = case.inputs((2, 3), 4, torch.float64)
    expected = case.torch(*inputs, **case.parameters)
    moved = [
        t.movedim(-1, dim).contiguous() if kind.value == "element" else t
        for t, kind in zip(inputs, case.loss._kinds, strict=True)
    ]
    found = first(case.loss(*moved, reduction="none", dim=dim, **case.parameters))
    torch.testing.assert_close(found, expected)


def test_one_row() -> None:
    x = torch.randn(5)
    torch.testing.assert_close(
        focal(x, torch.tensor(2), gamma=0.0), F.cross_entropy(x, torch.tensor(2))
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [0, 2, 6])
def test_rows_that_do_not_count(reduction: str, weighted: bool, ignored: int) -> None:
    """Whatever is in them; focal with gamma 0 is cross-entropy."""
    x, y, old, advantage = leaves(LOGGED)
    rows = LOGGED.torch(x, y, old, advantage, **LOGGED.parameters)
    y[:ignored] = -7
    with torch.no_grad():
        x[:ignored] = torch.nan
    weight = torch.rand(6, dtype=torch.float64) if weighted else None
    counts = y != -7
    w = torch.ones(6, dtype=torch.float64) if weight is None else weight
    expected = torch.zeros(6, dtype=torch.float64).masked_scatter(counts, (rows * w)[counts])
    if reduction != "none":
        expected = expected.sum()
    if reduction == "mean":
        expected = expected / w[counts].sum()
    value, extras = logged(
        x,
        y,
        old,
        advantage,
        reduction=reduction,
        weight=weight,
        ignore_index=-7,
        **LOGGED.parameters,
    )
    torch.testing.assert_close(value, expected, equal_nan=True)
    assert not extras["entropy"][:ignored].any()
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert not slope[:ignored].any()
    assert ignored == 6 or slope[ignored:].any()


def test_auxiliary_results() -> None:
    x, y, old, advantage = leaves(LOGGED)
    _, extras = logged(x, y, old, advantage)
    assert list(extras) == ["entropy", "ratio"]
    assert not any(t.requires_grad for t in extras.values())
    p = x.log_softmax(-1)
    torch.testing.assert_close(extras["entropy"], -(p.exp() * p).sum(-1).detach())
    torch.testing.assert_close(extras["ratio"], (_at(p, y) - old).exp().detach())


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [
        ((torch.float32, torch.float32), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype], result: torch.dtype) -> None:
    student, teacher = (torch.randn(4, 9, dtype=dtype) for dtype in dtypes)
    found = distillation(student, teacher)
    assert found.dtype is result
    wide = torch.float64 if result is torch.float64 else torch.float32
    exact = distillation(student.to(wide), teacher.to(wide))
    assert torch.equal(found, exact.to(result))
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.float64 if result is torch.float64 else torch.float32
        assert distillation(student, teacher).dtype is expected


def test_masked_vocabulary() -> None:
    """A class that nobody gives a share has no influence."""
    x, t = (torch.randn(4, 6, dtype=torch.float64) for _ in range(2))
    hole = torch.tensor([True, False, False, True, False, False])
    some = [u[:, ~hole].clone().requires_grad_() for u in (x, t)]
    full = [u.masked_fill(hole, -torch.inf).requires_grad_() for u in (x, t)]
    for loss in (distillation, jsd, reverse_kl):
        values = [loss(*some), loss(*full)]
        torch.testing.assert_close(*values)
        for few, all_ in zip(
            torch.autograd.grad(values[0], some), torch.autograd.grad(values[1], full), strict=True
        ):
            torch.testing.assert_close(few, all_[:, ~hole])
            assert not all_[:, hole].any()


def test_transforms() -> None:
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 4, 2, -100])
    value = torch.func.vmap(lambda x, y: focal(x, y, reduction="sum"))(x, y)
    torch.testing.assert_close(value, focal(x, y, reduction="none"))
    slope = torch.func.grad(lambda x: focal(x, y))(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(focal(leaf, y), leaf)[0])


def test_words_on_tensors() -> None:
    x = torch.randn(3, 4)
    label = torch.tensor([1, 0, 3])
    for ours, theirs in (
        (fm.sum(x), x.sum(-1, True)),
        (fm.mean(x), x.mean(-1, True)),
        (fm.max(x), x.amax(-1, True)),
        (fm.min(x), x.amin(-1, True)),
        (fm.norm(x), x.norm(dim=-1, keepdim=True)),
        (fm.logsumexp(x), x.logsumexp(-1, True)),
        (fm.softmax(x), x.softmax(-1)),
        (fm.log_softmax(x), x.log_softmax(-1)),
        (fm.one_minus_softmax(x), 1 - x.softmax(-1)),
        (fm.at(x, label), x.gather(-1, label[:, None])),
        (fm.at(x, label[:, None]), x.gather(-1, label[:, None])),
        (fm.logaddexp(x, 2 * x), torch.logaddexp(x, 2 * x)),
    ):
        torch.testing.assert_close(ours, theirs)


# ---- the object ----------------------------------------------------------------------------------


def test_loss_object() -> None:
    assert pickle.loads(pickle.dumps(focal)) is focal
    assert copy.deepcopy(focal) is focal
    unnamed = pickle.loads(pickle.dumps(fusedloss.row_loss(_spread)))
    x = torch.randn(3, 4)
    torch.testing.assert_close(unnamed(x), (x.amax(-1) - x.amin(-1)).mean())
    assert repr(unnamed) == "<fusedloss.row_loss _spread(x) = max(-x) + max(x)>"
    assert distillation.levels.splitlines()[-1] == "walk 3: the gradients for student, teacher"
    assert distillation.passes.startswith("reads student, teacher once")


def _spread(x):  # type: ignore[no-untyped-def]
    return fm.max(x) - fm.min(x)


def test_module() -> None:
    x, y = torch.randn(2, 5, 3), torch.randint(5, (2, 3))
    y[0, 0] = 1
    criterion = focal.module(gamma=1.5, dim=1, ignore_index=1, reduction="sum")
    expected = focal(x, y, gamma=1.5, dim=1, ignore_index=1, reduction="sum")
    assert torch.equal(criterion(x, y), expected)
    assert torch.equal(pickle.loads(pickle.dumps(criterion))(x, y), expected)
    assert "gamma=1.5, reduction='sum', dim=1, ignore_index=1" in repr(criterion)
    assert torch.equal(focal(label=y, logits=x, dim=1), focal(x, y, dim=1))


def test_annotations() -> None:
    """They may be texts, also of names that are known inside of a function alone."""
    from fusedloss import math as inside

    def ce(logits: Tensor, label: inside.Label, scale: inside.PerRow):  # type: ignore[no-untyped-def]
        return -inside.at(inside.log_softmax(logits), label) * scale

    assert ce.__annotations__["label"] == "inside.Label"
    assert [kind.value for kind in fusedloss.row_loss(ce)._kinds] == ["element", "label", "per row"]


# ---- rewritten formulas --------------------------------------------------------------------------

REWRITES: dict[str, tuple[Callable[..., Any], str]] = {
    "log of sum of exp": (lambda x: fm.log(fm.sum(fm.exp(x))), "logsumexp(x)"),
    "exp by its sum": (lambda x: fm.max(fm.exp(x) / fm.sum(fm.exp(x))), "max(softmax(x))"),
    "its square": (lambda x: fm.sum((fm.exp(x) / fm.sum(fm.exp(x))) ** 2), "sum(softmax(x)**2)"),
    "exp of difference": (lambda x: fm.max(fm.exp(x - fm.logsumexp(x))), "max(softmax(x))"),
    "difference": (lambda x: fm.max(x - fm.logsumexp(x)), "max(log_softmax(x))"),
    "of a sum": (
        lambda x, y: fm.max(x + y - fm.logsumexp(x + y)),
        "max(log_softmax(x + y))",
    ),
    "negated": (lambda x: fm.max(fm.logsumexp(x) - x), "max(-log_softmax(x))"),
    "at the label": (
        lambda x, label: fm.logsumexp(x) - fm.at(x, label),
        "-at(log_softmax(x), label)",
    ),
    "log of softmax": (lambda x: fm.max(fm.log(fm.softmax(x))), "max(log_softmax(x))"),
    "and at the label": (
        lambda x, label: fm.log(fm.at(fm.softmax(x), label)),
        "at(log_softmax(x), label)",
    ),
    "exp of log": (lambda x: fm.max(fm.exp(fm.log_softmax(x))), "max(softmax(x))"),
    "and a number": (
        lambda x, y: fm.max(fm.exp(fm.log_softmax(x) + fm.sum(y))),
        "max(exp(sum(y))*softmax(x))",
    ),
    "1 - softmax": (lambda x: fm.max(1 - fm.softmax(x)), "max(one_minus_softmax(x))"),
    "softmax - 1": (lambda x: fm.max(fm.softmax(x) - 1), "max(-one_minus_softmax(x))"),
    "1.0 - softmax at the label": (
        lambda x, label: 1.0 - fm.at(fm.softmax(x), label),
        "at(one_minus_softmax(x), label)",
    ),
    "1 - exp of log": (
        lambda x, label: 1 - fm.exp(fm.at(fm.log_softmax(x), label)),
        "at(one_minus_softmax(x), label)",
    ),
    "expm1": (lambda x: fm.max(-fm.expm1(fm.log_softmax(x))), "max(one_minus_softmax(x))"),
    "root of squares": (lambda x: fm.sqrt(fm.sum((2 * x) ** 2)), "norm(2*x)"),
    "power 1/2": (lambda x, y: fm.sum((x - y) ** 2) ** 0.5, "norm(x - y)"),
    "variance": (
        lambda x: fm.mean(x**2) - fm.mean(x) ** 2,
        "sum((x - sum(x)/fm.classes)**2)/fm.classes",
    ),
}


@pytest.mark.parametrize("name", REWRITES)
def test_rewrites(name: str) -> None:
    function, formula = REWRITES[name]
    if "label" in function.__code__.co_varnames:
        function.__annotations__["label"] = fm.Label
    loss = fusedloss.row_loss(function)
    assert loss.formula == formula
    assert any(" is computed as " in note for note in loss._traced.notes)
    tensors = [torch.randn(3, 4, dtype=torch.float64) for _ in loss._kinds]
    if loss._kinds[-1].value == "label":
        tensors[-1] = torch.tensor([[0], [3], [2]])
    expected = function(*tensors).squeeze(-1)
    tensors = [t.squeeze(-1) for t in tensors]
    torch.testing.assert_close(loss(*tensors, reduction="none"), expected)


def test_what_is_no_softmax_stays() -> None:
    loss = fusedloss.row_loss(
        lambda x, y: fm.max(fm.exp(y) / fm.sum(fm.exp(x)) - 2 * fm.softmax(x))
    )
    assert not loss._traced.notes


# ---- mistakes ------------------------------------------------------------------------------------

A_TENSOR = torch.ones(5)


def _if(x):  # type: ignore[no-untyped-def]
    return fm.sum(x) if fm.sum(x) > 0 else fm.max(x)


def _two_labels(x, a: fm.Label, b: fm.Label):  # type: ignore[no-untyped-def]
    return fm.at(x, a) - fm.at(x, b)


def _label_first(label: fm.Label, x):  # type: ignore[no-untyped-def]
    return fm.at(x, label)


def _unmarked(x, label: fm.Label, advantage):  # type: ignore[no-untyped-def]
    return fm.at(x, label) * fm.sum(advantage)


def _number_label(x, label: fm.Label):  # type: ignore[no-untyped-def]
    return fm.sum(x) - label


def _reduced_label(x, label: fm.Label):  # type: ignore[no-untyped-def]
    return fm.sum(x * label)


def _row_at(x, label: fm.Label):  # type: ignore[no-untyped-def]
    return fm.at(fm.sum(x), label)


def _marked_number(x, *, r: fm.PerRow = 1.0):  # type: ignore[no-untyped-def, assignment]
    return fm.sum(x) * r


def _rows_alone(x, r: fm.PerRow):  # type: ignore[no-untyped-def]
    return r**2


def _option(x, *, dim=1.0):  # type: ignore[no-untyped-def]
    return fm.sum(x) * dim


def _named_weight(x, weight: fm.PerRow):  # type: ignore[no-untyped-def]
    return fm.sum(x) * weight


def _extra_element(x):  # type: ignore[no-untyped-def]
    return fm.sum(x), {"each": x}


MISTAKES: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "an element": (
        lambda x: fm.softmax(x),
        TypeError,
        "returns one value a class: wrap it in fm.sum or fm.mean",
    ),
    "pointwise": (lambda x, y: (x - y) ** 2, TypeError, "it is a fusedloss.pointwise_loss"),
    "rows alone": (_rows_alone, TypeError, "it is a fusedloss.pointwise_loss"),
    "sum of a row": (
        lambda x: fm.sum(fm.logsumexp(x)),
        TypeError,
        "fm.sum or mean of a row number: multiply it by fm.classes instead",
    ),
    "max of a row": (lambda x: fm.max(fm.sum(x)), TypeError, "fm.max or min of a row number"),
    "softmax of a row": (lambda x: fm.softmax(fm.sum(x)), TypeError, "fm.softmax of a row number"),
    "at of a row": (_row_at, TypeError, "fm.at of a row number"),
    "at an index": (lambda x: fm.at(x, 3), TypeError, r"fm.at\(x, 3\) takes a class from a tensor"),
    "label as a number": (_number_label, TypeError, "label is the index of a class, and no number"),
    "label in a sum": (_reduced_label, TypeError, "label is the index of a class, and no number"),
    "method": (lambda x: x.sum(-1), TypeError, "in a row_loss write fusedloss.math.sum"),
    "torch's function": (
        lambda x: torch.softmax(x, -1),
        TypeError,
        "in a row_loss write fusedloss.math.softmax",
    ),
    "if": (_if, TypeError, "an if, and, or, not, min, max"),
    "max of Python": (lambda x, y: fm.sum(max(x, y)), TypeError, "maximum or minimum"),
    "sum of Python": (lambda x: sum(x), TypeError, "takes a slice of a symbol"),
    "slice": (lambda x: fm.sum(x[..., 1:]), TypeError, "takes a slice of a symbol"),
    "captured tensor": (
        lambda x: fm.sum(x * A_TENSOR),
        TypeError,
        "no tensor is part of a formula",
    ),
    "two labels": (_two_labels, TypeError, "at most one fm.Label, not 2"),
    "label first": (_label_first, TypeError, "'label' stands too early"),
    "no mark": (
        _unmarked,
        TypeError,
        "'label' stands too early: the tensors with a value for each",
    ),
    "marked number": (_marked_number, TypeError, r"'r' is a tensor per row by its mark"),
    "name of an option": (_option, ValueError, "every loss has a keyword 'dim' already"),
    "tensor named weight": (
        _named_weight,
        ValueError,
        "'weight' cannot be the name of tensor 1: reduction, weight, dim, ignore_index and clip_grad",
    ),
    "element beside it": (_extra_element, TypeError, "gives 'each' as one value a class"),
    "two values": (lambda x: (fm.sum(x), fm.max(x)), TypeError, "returns 2 values: return one row"),
    "many results": (
        lambda x: (fm.sum(x), {str(i): fm.max(x) for i in range(5)}),
        TypeError,
        "returns 5 auxiliary results: a loss has at most 4",
    ),
    "nothing": (lambda x: None, TypeError, "returns None"),
    "no tensor": (lambda: 1.0, TypeError, "a loss takes 1 to 8 tensors"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    function, error, says = MISTAKES[name]
    with pytest.raises(error, match=says):
        fusedloss.row_loss(function)


def test_the_kernels_have_that_limit() -> None:
    header = (Path(__file__).parent.parent / "csrc" / "call.h").read_text()
    assert f"kMaxAuxiliary = {MAX_AUXILIARY};" in header


@pytest.mark.parametrize("word", ["sum", "mean", "logsumexp", "softmax", "classes"])
def test_refused_in_a_pointwise_loss(word: str) -> None:
    of = (lambda x: x * fm.classes) if word == "classes" else getattr(fm, word)
    says = rf"{word}.* takes a row of classes, .*: write it as a fusedloss.row_loss"
    with pytest.raises(TypeError, match=says.replace("mean", "sum or mean")):
        fusedloss.pointwise_loss(lambda input: of(input))


def test_bad_calls() -> None:
    x, y = torch.randn(4, 21, 8, 8), torch.randint(21, (4, 8, 8))
    out = y.clone()
    out[1, 2, 3] = 21
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (
            lambda: focal(x, y),
            ValueError,
            "label has shape (4, 8, 8), not (4, 21, 8): the classes of logits (4, 21, 8, 8)",
        ),
        (
            lambda: focal(x, out, dim=1),
            IndexError,
            "Target 21 is out of bounds. It stands at label[1, 2, 3]",
        ),
        (
            lambda: focal(x, y.int(), dim=1),
            TypeError,
            "an int64, and not torch.int32: pass label.long()",
        ),
        (lambda: focal(x, y, dim=4), IndexError, "has no dimension 4"),
        (lambda: focal(torch.tensor(1.0), y), IndexError, "has no dimension -1"),
        (lambda: focal(x[:, :0], y, dim=1), ValueError, "has no classes along dim=1"),
        (
            lambda: focal(x, y, dim=1, ignore_index=1.0),
            TypeError,
            "ignore_index must be an int, not 1.0",
        ),  # type: ignore[arg-type]
        (
            lambda: focal(x, y, dim=1, weight=torch.ones(21)),
            ValueError,
            "weight has shape (21,), not (4, 8, 8)",
        ),
        (lambda: focal(x, y, dim=1, weight=2.0), TypeError, "weight must be a tensor"),  # type: ignore[arg-type]
        (
            lambda: focal(x, y, dim=1, gama=2.0),
            TypeError,
            "has no parameter 'gama'; it has gamma, reduction",
        ),
        (lambda: focal(x, dim=1), TypeError, "'label' is missing"),
        (lambda: focal(x, 3, dim=1), TypeError, "label must be a tensor"),  # type: ignore[arg-type]
        (lambda: focal(x.long(), y, dim=1), TypeError, "needs floating-point tensors"),
        (lambda: focal(x, y, dim=1, reduction="avg"), ValueError, "avg is not a valid value"),
        (lambda: cosine(x, x[0]), ValueError, "b has shape (21, 8, 8), not (4, 21, 8, 8)"),
    ]
    for call, error, says in calls:
        with pytest.raises(error, match=re.escape(says)):
            call()


# ---- check and plot ------------------------------------------------------------------------------


def test_check() -> None:
    report = distillation.check(T=2.0)
    assert report.ok
    assert "agrees with finite differences at 64 random rows" in str(report)
    assert "rewritten: exp(log_softmax(teacher/T)) is computed as softmax(teacher/T)" in str(report)
    assert cispo.check().ok
    assert "gradient for balance" not in str(balanced.check()), "it is of all rows, and no kernel's"
    (error,) = scaled.check().errors
    assert "is nan in rows with entries of -inf, where a slope is 0 * inf or inf - inf" in error
    naive = fusedloss.row_loss(lambda x, y: fm.sum(fm.exp(x) * y) / fm.sum(fm.exp(x)))
    assert "domain: the value is not finite at 100% of rows with 1e4 added" in str(naive.check())


def test_check_finds_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedloss.custom import row_primitives

    wrong = staticmethod(
        lambda x: x.detach().exp().sum(-1, keepdim=True).log() + 0 * x.sum(-1, True)
    )
    monkeypatch.setattr(row_primitives.LogSumExp, "torch", wrong)
    report = fusedloss.row_loss(lambda x: fm.logsumexp(x)).check()
    assert "the gradient for x of class 0 is 0, and finite differences say" in str(report)


def test_plot(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    for loss in (focal, jsd):
        path = tmp_path / f"{loss.__name__}.png"
        loss.plot(path)
        assert path.stat().st_size > 10_000
