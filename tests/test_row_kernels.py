"""The engines of custom row losses: values and gradients against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss
from cases import DTYPES
from fusedloss import math as fm
from helpers import (
    COMPUTE,
    FUSED,
    assert_same_bits,
    draw_upstream,
    operators,
    poisoned_memory,
    threads,
)
from row_losses import ROW_LOSSES, RowCase

of_triton = pytest.mark.skipif(FUSED != "triton", reason="FUSEDLOSS_TEST_BACKEND is not triton")
of_cpu = pytest.mark.skipif(FUSED != "compiled", reason="FUSEDLOSS_TEST_BACKEND is not compiled")

CASES = {case.id: case for case in ROW_LOSSES}
# Together these have each kind of input, up to three levels, maxima with a slope, and powers.
LOSSES = [
    "distillation",
    "jsd",
    "grpo",
    "balanced",
    "triplet",
    "variance",
    "structured_hinge",
    "renyi",
]
Layout = Callable[[Tensor], Tensor]


def truth_of(
    case: RowCase, inputs: list[Tensor], reduction: str, weight: Tensor | None = None
) -> Tensor:
    value = case.torch(*inputs, **case.parameters)
    if weight is not None:
        value = value * weight
    if reduction == "mean":
        return value.sum() / (value.numel() if weight is None else weight.sum())
    return value if reduction == "none" else value.sum()


def compare(
    case: RowCase,
    inputs: list[Tensor],
    reduction: str = "mean",
    dim: int = -1,
    weight: Tensor | None = None,
) -> None:
    """The value and all gradients with torch's; classes are along the last dimension."""

    def wants(t: Tensor) -> bool:
        return t.is_floating_point() and t.dim() >= inputs[0].dim() - 1

    wide = [t.double().requires_grad_() if wants(t) else t for t in inputs]
    ours = [t.detach().requires_grad_() if wants(t) else t for t in inputs]
    classes = inputs[0].dim()
    laid = [t.movedim(-1, dim) if t.dim() == classes else t for t in ours]
    value = case.loss(*laid, reduction=reduction, dim=dim, weight=weight, **case.parameters)
    wide_weight = None if weight is None else weight.double()
    truth = truth_of(
        case, [t.double() if t.is_floating_point() else t for t in wide], reduction, wide_weight
    )
    terms = 1.0 if inputs[0].shape[-1] == 1 else 0.0  # all cancels
    if case.id == "triplet":  # a difference of norms
        terms = float(inputs[0].detach().double().norm(dim=-1).max())
    assert_near(value, truth, "value", terms)
    terms = min(terms, 1.0)
    upstream = draw_upstream(truth.shape, torch.float64).to(value.dtype)
    ours, wide = ([t for t in ts if t.requires_grad] for ts in (ours, wide))
    expected = torch.autograd.grad(truth, wide, upstream.double(), allow_unused=True)
    for i, (got, of, right) in enumerate(
        zip(torch.autograd.grad(value, ours, upstream), ours, expected, strict=True)
    ):
        assert got.dtype == of.dtype
        right = torch.zeros_like(of).double() if right is None else right
        assert_near(got, right, f"gradient {i}", terms)


def assert_near(got: Tensor, truth: Tensor, what: str, terms: float = 0.0) -> None:
    """Off by some roundings of the largest number, or of its terms, and one of each."""
    assert got.shape == truth.shape, what
    compute = torch.finfo(COMPUTE[got.dtype]).eps
    largest = truth.abs().max().clamp_min(terms)
    allowed = 100 * compute * largest + torch.finfo(got.dtype).eps * truth.abs()
    error = (got.double() - truth).abs()
    assert (error <= allowed + torch.finfo(got.dtype).smallest_normal).all(), (
        f"{what}: off by {error.max():.3g} of {truth.abs().max():.3g}"
    )


@pytest.mark.interpret_all
@pytest.mark.parametrize("classes", [1, 7, 300])
@pytest.mark.parametrize("loss", LOSSES)
def test_values(loss: str, classes: int, fused: str) -> None:
    case = CASES[loss]
    with poisoned_memory():
        compare(case, case.inputs((3, 5), classes, torch.float64))
        compare(case, case.inputs((40,), classes, torch.float32), "none")


@pytest.mark.parametrize("loss", LOSSES)
def test_long_rows(loss: str, fused: str) -> None:
    """On a GPU they go by in tiles."""
    case = CASES[loss]
    with poisoned_memory():
        compare(case, case.inputs((2,), 9000, torch.float64), reduction="none")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [33, 5000])
@pytest.mark.parametrize("loss", LOSSES)
def test_dtypes(loss: str, classes: int, dtype: torch.dtype, fused: str) -> None:
    case = CASES[loss]
    compare(case, case.inputs((3,), classes, dtype), reduction="sum")


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("loss", LOSSES)
def test_classes_lie_apart(loss: str, classes: int, dim: int, fused: str) -> None:
    case = CASES[loss]
    inputs = case.inputs((2, 3, 4), classes, torch.float64)
    inputs = [
        t.movedim(-1, dim).contiguous().movedim(dim, -1) if t.dim() == 4 else t for t in inputs
    ]
    compare(case, inputs, dim=dim)


@pytest.mark.interpret_all
@pytest.mark.parametrize("loss", ["grpo", "distillation"])
def test_strides(loss: str, fused: str) -> None:
    """Of each input others, which no two dimensions share; and numbers that are the same for many rows."""
    case = CASES[loss]
    inputs = case.inputs((2, 3, 4), 6, torch.float64)
    inputs[0] = inputs[0].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    inputs[-1] = (
        inputs[-1].transpose(0, 2).contiguous().transpose(0, 2)[:, :1].expand_as(inputs[-1])
    )
    inputs[1] = inputs[1][:, :, :1].clone().expand_as(inputs[1])
    for reduction in ("none", "mean"):
        compare(case, inputs, reduction)
        compare(case, inputs, reduction, dim=2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", ["distillation", "variance", "structured_hinge"])
def test_reductions(loss: str, reduction: str, weighted: bool, fused: str) -> None:
    case = CASES[loss]
    weight = torch.rand(70, 3) if weighted else None
    compare(case, case.inputs((70, 3), 9, torch.float32), reduction, weight=weight)


@pytest.mark.interpret_all
@pytest.mark.parametrize("rows", [50, 2100])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_rows(reduction: str, weighted: bool, rows: int, fused: str) -> None:
    """Whatever is in them: their loss and gradients are 0, and they do not count."""
    case, counts = CASES["grpo"], torch.rand(rows) < 0.8
    x, label, old, advantage = case.inputs((rows,), 5, torch.float64)
    weight = torch.rand(rows, dtype=torch.float64) if weighted else None
    for t in (x, old, advantage, *([] if weight is None else [weight])):
        t[~counts] = torch.nan
    label[~counts] = 3
    ignored = torch.where(counts, label, 11)
    ours = [t.clone().requires_grad_() for t in (x, old, advantage)]
    options: dict[str, Any] = {"reduction": reduction, **case.parameters}
    value = case.loss(ours[0], ignored, *ours[1:], weight=weight, ignore_index=11, **options)
    theirs = [t[counts].requires_grad_() for t in (x, old, advantage)]
    of_rows = None if weight is None else weight[counts]
    truth = truth_of(case, [theirs[0], label[counts], *theirs[1:]], reduction, of_rows)
    if reduction == "none":
        assert not value[~counts].count_nonzero()
    assert_near(value[counts] if reduction == "none" else value, truth, "value")
    upstream = draw_upstream(value.shape, torch.float64)
    expected = torch.autograd.grad(
        truth, theirs, upstream[counts] if reduction == "none" else upstream
    )
    for got, right in zip(torch.autograd.grad(value, ours, upstream), expected, strict=True):
        assert_near(got[counts], right, "gradient")
        assert not got[~counts].count_nonzero()


@pytest.mark.interpret_all
def test_nothing_counts(fused: str) -> None:
    x, label = CASES["focal"].inputs((4,), 5, torch.float64)
    x.requires_grad_()
    value = CASES["focal"].loss(x, torch.full_like(label, -100))
    assert value.isnan()
    (gradient,) = torch.autograd.grad(value, x)
    assert not gradient.count_nonzero()
    assert (
        CASES["variance"].loss(x[:0]).isnan()
        and CASES["variance"].loss(x[:0], reduction="sum") == 0
    )


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("classes", [2, 7, 100])
def test_every_label(classes: int, dim: int, fused: str) -> None:
    """The last class, and one that is sure: 1 - p keeps its digits."""
    case = CASES["grpo"]
    for label in {0, 1, classes // 2, classes - 2, classes - 1}:
        x, _, old, advantage = case.inputs((6,), classes, torch.float64)
        y = torch.full((6,), label)
        compare(case, [x.clone(), y, old, advantage], "none", dim=dim)
        x[:, label] += 20
        # In float64 torch itself has few digits of 1 - p.
        narrow = [t.float() for t in (x, old, advantage)]
        compare(case, [narrow[0], y, *narrow[1:]], "none", dim=dim)


@of_cpu
def test_labels_that_are_no_class() -> None:
    x, label, old, advantage = CASES["grpo"].inputs((4, 6), 5, torch.float32)
    label[2, 1] = 5
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds. It stands at target\[2, 1\]"):
        CASES["grpo"].loss(x, label, old, advantage)


@of_triton
@pytest.mark.interpret_all
@pytest.mark.parametrize("bad", [-1, 5, 10**15, -(1 << 63)])
def test_label_out_of_range(bad: int, fused: str) -> None:
    """nan for its row, in its loss and all its gradients, and the host hears of it."""
    case = CASES["grpo"]
    x, label, old, advantage = case.inputs((30,), 5, torch.float64)
    x, old, advantage = (t.requires_grad_() for t in (x, old, advantage))
    label[7] = bad
    value = case.loss(x, label, old, advantage, reduction="none", **case.parameters)
    assert value.isnan().nonzero().tolist() == [[7]]
    gradients = torch.autograd.grad(value.sum(), (x, old, advantage))
    assert gradients[0].isnan().all(1).nonzero().tolist() == [[7]]
    for gradient in gradients:
        assert gradient.isnan().nonzero()[:, 0].unique().tolist() == [7]
    with pytest.raises(IndexError, match=rf"Target {bad} is out of .*\[7\]; there are 5 classes"):
        fusedloss.check()
    fusedloss.check()


@pytest.mark.interpret_all
@pytest.mark.parametrize("classes", [12, 5000])
def test_nan_and_infinity(classes: int, fused: str) -> None:
    """nan reaches a maximum. Classes whose logit is -inf have no share, and no gradient."""
    (x,) = CASES["spread"].inputs((3,), classes, torch.float64)
    x[1, 2] = torch.nan
    value = CASES["spread"].loss(x, reduction="none")
    assert value.isnan().tolist() == [False, True, False]
    for loss in ("distillation", "jsd"):
        inputs = CASES[loss].inputs((3,), classes, torch.float64)
        for t in inputs:
            t[:, 3:7] = -torch.inf
        some = [torch.cat([t[:, :3], t[:, 7:]], 1) for t in inputs]
        wide, ours = ([t.requires_grad_() for t in ts] for ts in (some, inputs))
        truth = truth_of(CASES[loss], wide, "none")
        value = CASES[loss].loss(*ours, reduction="none", **CASES[loss].parameters)
        assert_near(value, truth, loss)
        right, got = (torch.autograd.grad(v.sum(), t) for v, t in ((truth, wide), (value, ours)))
        for gradient, expected in zip(got, right, strict=True):
            assert not gradient[:, 3:7].count_nonzero()
            assert_near(torch.cat([gradient[:, :3], gradient[:, 7:]], 1), expected, loss)


@pytest.mark.interpret_all
def test_scale_of_a_class_without_a_share(fused: str) -> None:
    """PyTorch's gradient for the scale is 0 * inf. The kernel has that of the other classes, and check()
    says so."""
    x, label, scale = CASES["scaled"].inputs((3,), 12, torch.float64)
    x[:, 3:7], label = -torch.inf, label % 3
    some, scale = torch.cat([x[:, :3], x[:, 7:]], 1), -scale.requires_grad_()
    values = CASES["scaled"].loss(x, label, scale), CASES["scaled"].torch(some, label, scale).mean()
    assert_near(*(torch.autograd.grad(value, scale)[0] for value in values), "scale")
    report = CASES["scaled"].loss.check()
    assert report.ok
    assert "plain PyTorch's gradient for scale is nan in rows with entries of -inf" in str(report)


@pytest.mark.interpret_all
@pytest.mark.parametrize("classes", [6, 40])
def test_ties(classes: int, fused: str) -> None:
    """A maximum's gradient goes to its first position."""
    x = torch.zeros(3, classes, dtype=torch.float64)
    x[0, 2:] = 1
    x[1, [4, classes - 1]] = -torch.inf
    for layout in (x, x.t().contiguous().t()):
        ours = layout.requires_grad_()
        (gradient,) = torch.autograd.grad(CASES["spread"].loss(ours, reduction="sum"), ours)
        expected = torch.zeros_like(x)
        expected[0, 2], expected[0, 0] = 1, -1
        expected[1, 0], expected[1, 4] = 1, -1
        assert torch.equal(gradient, expected)


def test_no_class_but_the_label(fused: str) -> None:
    """A loss whose walks read no class."""

    @fusedloss.row_loss
    def at_label(x, label: fm.Label):
        return fm.at(x, label) ** 2

    x, label = torch.randn(5, 8, requires_grad=True), torch.arange(5)
    (gradient,) = torch.autograd.grad(at_label(x, label, reduction="sum"), x)
    assert gradient.equal(torch.zeros(5, 8).scatter(1, label[:, None], 2 * x.diag()[:5, None]))


@pytest.mark.interpret_all
def test_auxiliary_results(fused: str) -> None:
    """Numbers of each row, from the same walks; none where a row does not count."""

    @fusedloss.row_loss
    def logged(logits, label: fm.Label):  # type: ignore[no-untyped-def]
        logp = fm.log_softmax(logits)
        return -fm.at(logp, label), {
            "entropy": -fm.sum(fm.exp(logp) * logp), "logprob": fm.at(logp, label),
        }  # fmt: skip

    x = torch.randn(4, 9, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 9, (4, 3))
    y[0, 0] = -100
    for reduction in ("mean", "sum", "none"):
        found = [f(x, y, dim=1, reduction=reduction) for f in (logged, logged.reference)]
        (value, extras), (right, right_extras) = found
        assert_near(value, right, "value")
        upstream = draw_upstream(right.shape, torch.float64)
        got, expected = (torch.autograd.grad(v, x, upstream) for v in (value, right))
        assert_near(got[0], expected[0], "gradient")
        for name, extra in extras.items():
            assert not extra.requires_grad
            assert not extra[0, 0].count_nonzero()
            assert_near(extra, right_extras[name], name)


@of_cpu
@pytest.mark.parametrize("loss", LOSSES)
def test_threads(loss: str) -> None:
    """Two threads give the bits of one, and so do two calls."""
    case = CASES[loss]
    for rows, classes, dim in (((300,), 1000, -1), ((9, 99), 21, 1)):
        inputs = case.inputs(rows, classes, torch.float32)
        inputs = [t.movedim(-1, dim) if t.dim() > len(rows) else t for t in inputs]
        x = inputs[0].contiguous().requires_grad_()
        results = []
        for count in (1, 2, 2):
            with threads(count):
                value = case.loss(x, *inputs[1:], dim=dim, **case.parameters)
                results.append([value, *torch.autograd.grad(value, x)])
        for other in results[1:]:
            for ours, same in zip(results[0], other, strict=True):
                assert_same_bits(ours, same, loss)


@pytest.mark.interpret_all
def test_any_of_the_gradients(fused: str) -> None:
    case = CASES["triplet"]
    for wanted in range(1, 8):
        inputs = case.inputs((9,), 70, torch.float64)
        some = [t.requires_grad_() for i, t in enumerate(inputs) if wanted >> i & 1]
        found = torch.autograd.grad(case.loss(*inputs), some)
        expected = torch.autograd.grad(truth_of(case, inputs, "mean"), some)
        for got, right in zip(found, expected, strict=True):
            assert_near(got, right, str(wanted))


@pytest.mark.interpret_all
@of_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["jsd", "grpo", "structured_hinge", "variance"])
def test_one_pass(loss: str, dtype: torch.dtype, fused: str) -> None:
    """The forward pass writes the gradients where its prediction is trusted, with the same bits as the
    backward pass; only those that are wanted."""
    from fusedloss.backends.triton import custom, custom_rows, runtime

    case = CASES[loss]
    inputs = case.inputs((5,), 70, dtype)
    wanted = [t.is_floating_point() and (i != 1 or loss != "jsd") for i, t in enumerate(inputs)]
    _, key, _ = fusedloss.custom.prepare.prepared(case.loss._number, "cpu")
    numbers = tuple({**case.loss._traced.defaults, **case.parameters}.values())
    known, constants = custom.loaded(key, numbers)
    assert isinstance(known, custom_rows.RowLoss)

    def run(do: runtime.Pass) -> Tensor | None:
        assert isinstance(known, custom_rows.RowLoss)
        return custom_rows.run(do, known, inputs, None, constants, -100, 1, torch.float32)

    def empty() -> tuple[Tensor | None, ...]:
        return tuple(
            torch.empty_like(t) if w else None for t, w in zip(inputs, wanted, strict=True)
        )

    state, right = torch.tensor([[0.0, 0.0], [0.7, 3.0]], dtype=torch.float64).unbind()
    ahead, later = empty(), empty()
    value = run(runtime.Pass(runtime.FORWARD, state, ahead, right))
    assert value is not None
    plain = runtime.Pass(runtime.VALUE, torch.empty_like(state), (None,) * len(inputs))
    assert_same_bits(value, run(plain), "the value alone")  # type: ignore[arg-type]
    upstream = torch.tensor(0.7, dtype=torch.float64)
    run(runtime.Pass(runtime.FRESH, state, later, torch.ones_like(right), upstream))
    for before, after in zip(ahead, later, strict=True):
        if before is not None and after is not None:
            assert_same_bits(before, after, "written by the forward pass, and by the backward pass")


@of_cpu
def test_the_operators_refuse_what_does_not_fit() -> None:
    def call(loss: str, *inputs: Tensor, weight: Tensor | None = None) -> Tensor:
        case = CASES[loss]
        _, key, _ = fusedloss.custom.prepare.prepared(case.loss._number, "cpu")
        numbers = [*{**case.loss._traced.defaults, **case.parameters}.values()]
        x, y, *more = inputs
        value: Tensor = operators().loss(
            x, y, weight, more, key, numbers, -100, 1, torch.float32, None
        )
        return value

    x, label, old, advantage = CASES["grpo"].inputs((4, 6), 5, torch.float32)
    x = x.movedim(-1, 1)
    call("grpo", x, label, old, advantage)
    with pytest.raises(ValueError, match="input 1 of .* has shape .*, and with input 0 of shape"):
        call("grpo", x, label[0], old, advantage)
    with pytest.raises(ValueError, match="input 2 of"):
        call("grpo", x, label, old[:1], advantage)
    with pytest.raises(TypeError, match="a label needs int64"):
        call("grpo", x, label.int(), old, advantage)
    with pytest.raises(ValueError, match="weight of shape"):
        call("grpo", x, label, old, advantage, weight=torch.rand(4))
    with pytest.raises(ValueError, match="no classes"):
        call("grpo", x[:, :0], label, old, advantage)
    x, label, balance = CASES["balanced"].inputs((4,), 5, torch.float32)
    with pytest.raises(ValueError, match="has no gradients for the mask"):
        call("balanced", x, label, balance.requires_grad_())


@pytest.mark.interpret_all
@of_triton
def test_shapes(fused: str) -> None:
    """The operators refuse what does not fit."""
    case = CASES["grpo"]
    _, key, _ = fusedloss.custom.prepare.prepared(case.loss._number, "cpu")
    inputs = case.inputs((4,), 5, torch.float32)
    for place in range(1, 4):
        given = list(inputs)
        given[place] = given[place][:3]
        x, label, *more = given
        with pytest.raises(ValueError, match="does not fit the first input's shape"):
            operators().loss(
                x, label, None, more, key, [0.2, 0.2, 0.1], -100, 1, torch.float32, None
            )
    with pytest.raises(ValueError, match="4 inputs, not 2"):
        operators().loss(*inputs[:2], None, [], key, [0.2, 0.2, 0.1], -100, 1, torch.float32, None)
