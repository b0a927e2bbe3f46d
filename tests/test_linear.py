"""Losses behind a linear layer: against all logits at once, in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedloss
import fusedloss.functional as FL
from fusedloss import _linear, modules, reference
from fusedloss import math as fm
from helpers import DEVICE, EMULATED, draw_upstream, host_sees_errors, leaf
from row_losses import ROW_LOSSES, RowCase

N, D, C = 70, 8, 150
KINDS = ("ELEMENT", "LABEL", "PER_ROW", "PER_CLASS")


def chunked(rows: int) -> Any:
    """torch's options, as far as we read them, on every release."""
    return SimpleNamespace(batch_chunk_size=rows)


# The emulated extension has no kernels of custom row losses: tests/cuda_emulator/test_custom_rows.py.
needs_formula = pytest.mark.skipif(EMULATED, reason="its kernels are tested there")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def draw(
    n: int = N, d: int = D, c: int = C, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, and class indices of which some are ignored."""
    target = torch.randint(0, c, (n,))
    target[::4] = -100
    tensors = torch.randn(n, d), torch.randn(c, d), torch.randn(c)
    x, w, b = (leaf(t.to(dtype)) for t in tensors)
    return x, w, b, target


def gradients(value: Tensor, leaves: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, upstream, materialize_grads=True, retain_graph=True)


def assert_same(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12
) -> None:
    """Relative to the largest number of each tensor."""
    for a, b in zip(found, expected, strict=True):
        size = max(b.abs().max().item(), 1e-30) if b.numel() else 1
        torch.testing.assert_close(
            a.double() / size, b.double() / size, rtol=0, atol=tolerance, check_dtype=False
        )


# ---- cross-entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["hard", "smooth"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy(
    fused: str, reduction: str, options: dict[str, float], weighted: bool, probabilities: bool
) -> None:
    x, w, b, target = draw()
    if probabilities:
        target = torch.rand(N, C, dtype=x.dtype)
    weight = torch.rand(C, dtype=x.dtype) if weighted else None
    found = FL.linear_cross_entropy(
        x,
        w,
        target,
        linear_bias=b,
        weight=weight,
        reduction=reduction,
        options=chunked(16),
        **options,
    )
    expected = F.cross_entropy(F.linear(x, w, b), target, weight, reduction=reduction, **options)
    upstream = draw_upstream(expected.shape, x.dtype)
    assert_same([found], [expected])
    leaves = x, w, b
    assert_same(gradients(found, leaves, upstream), gradients(expected, leaves, upstream))


# Each option alone, and all of them.
OPTIONS: dict[str, dict[str, Any]] = {
    "num_items": {"num_items": 17},
    "token_weight": {"token_weight": "drawn"},
    "shift": {"shift": 2},
    "logit_scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 0.1},
    "all": {
        "token_weight": "drawn",
        "weight": "drawn",
        "shift": 1,
        "logit_scale": 2.0,
        "softcap": 3.0,
        "z_loss": 0.01,
        "label_smoothing": 0.2,
    },
}
OUTPUTS = ("lse", "logprob", "entropy", "correct", "argmax", "count")
DIFFERENTIABLE = OUTPUTS[:3]


def by_formula(
    x: Tensor, w: Tensor | None, target: Tensor, reduction: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """All results, with all logits at once; target (A, B)."""
    left = dict(options)
    shift, items = left.pop("shift", 0), left.pop("num_items", None)
    token_weight, weight = left.pop("token_weight", None), left.pop("weight", None)
    factor = torch.ones(target.shape, dtype=x.dtype) if token_weight is None else token_weight
    if shift:
        rest = torch.full((len(target), shift), -100)
        target = torch.cat([target[:, shift:], rest], 1)
        factor = torch.cat([factor[:, shift:], rest * 0.0], 1)
    flat, factor = target.flatten(), factor.flatten()
    logits = x.flatten(0, 1) if w is None else F.linear(x.flatten(0, 1), w)
    results = reference.token_cross_entropy(logits, flat, weight, -100, **left)
    counts = flat != -100
    loss = results.pop("loss") * factor
    if reduction == "mean":
        of_classes = 1 if weight is None else weight[flat.clamp(min=0)]
        loss = loss.sum() / (items or (counts * factor * of_classes).sum())
    else:
        loss = loss.sum() if reduction == "sum" else loss.reshape(target.shape)
    shaped = {name: t.reshape(target.shape) for name, t in results.items()}
    return {"loss": loss, **shaped, "count": counts.sum()}


@needs_formula
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("name", "outputs"),
    # Outputs take two more kernels for each formula.
    [
        *((name, ()) for name in OPTIONS),
        *((name, OUTPUTS) for name in ("shift", "num_items", "all")),
    ],
    ids=lambda value: value if isinstance(value, str) else "outputs" if value else "loss",
)
@pytest.mark.parametrize("of_logits", [False, True], ids=["linear", "logits"])
def test_options(
    fused: str, of_logits: bool, name: str, reduction: str, outputs: tuple[str, ...]
) -> None:
    if name == "num_items" and reduction == "none":
        pytest.skip("num_items is what a mean divides by")
    x, w, _, target = draw()
    target, x = target.reshape(7, 10), leaf(x.reshape(7, 10, D))
    drawn = {"token_weight": torch.rand(7, 10).to(x.dtype), "weight": torch.rand(C).to(x.dtype)}
    options = {key: drawn[key] if v == "drawn" else v for key, v in OPTIONS[name].items()}
    if of_logits:
        x = leaf(F.linear(x, w))
        found = FL.cross_entropy(
            x.movedim(-1, 1), target, reduction=reduction, outputs=outputs, **options
        )
    else:
        found = FL.linear_cross_entropy(
            x, w, target, reduction=reduction, outputs=outputs, options=chunked(16), **options
        )
    loss, extras = found if outputs else (found, {})
    expected = by_formula(x, None if of_logits else w, target, reduction, options)
    leaves = (x,) if of_logits else (x, w)
    assert_same([loss], [expected["loss"]])
    upstream = draw_upstream(loss.shape, x.dtype)
    true = gradients(expected["loss"], leaves, upstream)
    assert_same(gradients(loss, leaves, upstream), true)
    assert tuple(extras) == outputs
    for key, value in extras.items():
        assert value.shape == expected[key].shape
        assert_same([value], [expected[key]])
        assert value.requires_grad is (key in DIFFERENTIABLE)
    if outputs:

        def total(loss: Tensor, results: dict[str, Tensor]) -> Tensor:
            upstreams = [draw_upstream(target.shape, x.dtype, seed) for seed in range(3)]
            terms = zip(upstreams, DIFFERENTIABLE, strict=True)
            return 0.3 * loss.sum() + sum((u * results[key]).sum() for u, key in terms)

        one = torch.ones((), dtype=x.dtype)
        true = gradients(total(expected["loss"], expected), leaves, one)
        assert_same(gradients(total(loss, extras), leaves, one), true)


def test_no_option_is_torchs_function() -> None:
    """Whose short way a call without options still takes."""
    x, target = torch.randn(8, 5), torch.randint(0, 5, (8,))
    assert torch.equal(FL.cross_entropy(x, target), FL.cross_entropy(x, target, outputs=()))
    plain = FL.cross_entropy(x, target)
    assert torch.equal(FL.cross_entropy(x, target, outputs=["count"])[0], plain)


# ---- losses of rows ------------------------------------------------------------------------------


@needs_formula
@pytest.mark.parametrize("both", [False, True], ids=["first", "all"])
@pytest.mark.parametrize("classes", [40, C])
@pytest.mark.parametrize("case", ROW_LOSSES, ids=lambda case: case.id)
def test_row_losses(fused: str, case: RowCase, classes: int, both: bool) -> None:
    """The first input, or each that has a value for each class, comes from a layer. Classes: of tiles
    of rows on the CPU, and of rows one by one."""
    dtype = torch.float64
    given: list[Any] = []
    logits: list[Tensor] = []
    leaves: list[Tensor] = []
    for i, kind in enumerate(case.loss._kinds):
        if kind.name == "ELEMENT" and (i == 0 or both):
            pair = [leaf(torch.randn(n, 5, dtype=dtype)) for n in (N, classes)]
            given += [tuple(pair)] if i else pair
            leaves += pair
            logits.append(F.linear(*pair))
            continue
        t = {
            "ELEMENT": lambda: leaf(torch.randn(N, classes, dtype=dtype)),
            "LABEL": lambda: torch.randint(0, classes, (N,)),
            "PER_ROW": lambda: leaf(torch.randn(N, dtype=dtype)),
            "PER_CLASS": lambda: torch.rand(classes, dtype=dtype),
        }[kind.name]()
        if kind.name == "LABEL":
            t[::3] = 2  # is ignored
        leaves += [t] if t.requires_grad else []
        given.append(t)
        logits.append(t)
    loss = fusedloss.linear(case.loss)
    weight = torch.rand(N)
    for reduction, weights in (("mean", None), ("sum", weight), ("mean", weight), ("none", None)):
        options: dict[str, Any] = {"reduction": reduction, "weight": weights, "ignore_index": 2}
        found = loss(*given, **options, **case.parameters)
        expected = case.loss.reference(*logits, **options, **case.parameters)
        if isinstance(found, tuple):
            assert_same([*found[1].values()], [*expected[1].values()], 1e-10)
            found, expected = found[0], expected[0]
        upstream = draw_upstream(expected.shape, dtype)
        assert_same([found], [expected], 1e-10)
        assert_same(
            gradients(found, leaves, upstream), gradients(expected, leaves, upstream), 1e-10
        )


@needs_formula
@pytest.mark.parametrize("memory", [None, "low"])
def test_biases_and_leading_dimensions(fused: str, memory: str | None) -> None:
    """Texts of tokens, a bias of each layer, auxiliary results, and a teacher of another width."""

    @fusedloss.row_loss
    def distilled(student: Any, teacher: Any, label: fm.Label, *, T: float = 1.0) -> Any:
        p, q = fm.log_softmax(student / T), fm.log_softmax(teacher / T)
        loss = fm.sum(fm.exp(q) * (q - p)) - fm.at(p, label)
        return loss, {"lse": fm.logsumexp(student)}

    loss, dtype = distilled, torch.float64
    x, w, b = (leaf(torch.randn(s, dtype=dtype)) for s in ((4, 9, 6), (C, 6), (C,)))
    teacher = tuple(torch.randn(s, dtype=dtype) for s in ((4, 9, 3), (C, 3), (C,)))
    label = torch.randint(0, C, (4, 9))
    label[:, ::4] = -100
    weight = torch.rand(4, 9)
    found, more = fusedloss.linear(loss)(
        x, w, teacher, label, bias=b, weight=weight, memory=memory, T=2.0
    )
    logits = F.linear(x, w, b), F.linear(*teacher)
    expected, extras = loss.reference(*logits, label, weight=weight, T=2.0)
    assert more["lse"].shape == label.shape and not more["lse"].requires_grad
    assert_same([found, more["lse"]], [expected, extras["lse"]])
    upstream = torch.tensor(-0.3, dtype=dtype)
    assert_same(gradients(found, (x, w, b), upstream), gradients(expected, (x, w, b), upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 40), (70, 150), (7, 3000), (3, 300_001)])
@pytest.mark.parametrize("name", ["cross_entropy", "spread", "triplet", "built-in"])
def test_in_place(fused: str, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Gradients written over the inputs have the bits of those that are written elsewhere."""
    if fused == "triton" and shape[1] > 3000:
        pytest.skip("takes long in the interpreter")
    if EMULATED and name != "built-in":
        pytest.skip("its kernels are tested in tests/cuda_emulator")
    case = next(c for c in ROW_LOSSES if c.id == ("cross_entropy" if name == "built-in" else name))
    labelled = any(kind.name == "LABEL" for kind in case.loss._kinds)
    x = [torch.randn(shape).to(dtype) for kind in case.loss._kinds if kind.name == "ELEMENT"]
    rest = [torch.randint(0, shape[1], shape[:1])] if labelled else []
    if name == "built-in":
        key, parameters = "cross_entropy", (0.1,)
    else:
        _, key, _ = fusedloss.custom.prepare.prepared(case.loss._number, x[0].device.type)
        parameters = tuple(case.loss._values(case.parameters))
    kinds = tuple(_linear.Kind[kind.name] for kind in case.loss._kinds)
    spec = _linear.Rows(fused, key, parameters, -100, torch.float32, kinds, (), 0, None, 0, False)
    upstream = torch.rand(shape[0], dtype=torch.float64)
    apart = [torch.full_like(t, torch.nan) for t in x]
    over = [t.clone() for t in x]
    none = [None] * len(rest)
    values = _linear._run_rows(spec, [*x, *rest], None, upstream, [*apart, *none])
    again = _linear._run_rows(spec, [*over, *rest], None, upstream, [*over, *none])
    assert torch.equal(values, again)
    for a, b in zip(apart, over, strict=True):
        assert torch.equal(a, b)


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 4, 16, 64, 256])
def test_error_of_the_weights_gradient(compiled: str, chunks: int) -> None:
    """No larger than torch's, with all logits at once, whatever the number of chunks."""
    n, d, c = 4096, 64, 500
    x, w, _, target = draw(n, d, c, torch.bfloat16)
    x, w = (leaf(t.detach() * s) for t, s in ((x, 1.0), (w, 0.3)))
    wide = [leaf(t.detach().double()) for t in (x, w)]
    (true,) = gradients(
        F.cross_entropy(F.linear(*wide), target), wide[1:], torch.tensor(1.0).double()
    )
    one = torch.ones((), dtype=x.dtype)
    (theirs,) = gradients(F.cross_entropy(F.linear(x, w), target), [w], one)
    value = FL.linear_cross_entropy(x, w, target, options=chunked(n // chunks))
    (ours,) = gradients(value, [w], one)

    def error(found: Tensor) -> float:
        return ((found.double() - true).norm() / true.norm()).item()

    assert error(ours) <= 1.05 * error(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(fused: str, dtype: torch.dtype) -> None:
    """Value and gradients err no more than torch's, or than roundings of that size do."""
    n = 5000
    x, w, b, target = draw(n, 16, 60, torch.float32)
    low = [leaf(t.detach().to(dtype)) for t in (x, w, b)]
    wide = [leaf(t.detach().double()) for t in low]
    scale = 1024.0 if dtype is torch.float16 else 1.0

    def all_of(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [value, *gradients(value, leaves, torch.full_like(value, scale))]

    true = all_of(F.cross_entropy(F.linear(*wide), target), wide)
    theirs = all_of(F.cross_entropy(F.linear(*low), target), low)
    ours = all_of(FL.linear_cross_entropy(*low[:2], target, linear_bias=low[2]), low)
    for a, b, c in zip(ours, theirs, true, strict=True):
        assert a.dtype is b.dtype
        errors = [((t.double() - c).norm() / c.norm()).item() for t in (a, b)]
        # float32: a sum of thousands in another order has other roundings.
        roundings = torch.finfo(dtype).eps * (2 if dtype is torch.float32 else 0.5)
        assert errors[0] <= max(1.05 * errors[1], roundings), errors


def test_same_bits(compiled: str) -> None:
    """Twice, with any number of threads, and whatever happened before."""
    x, w, b, target = draw(500, 64, 3000, torch.float32)
    results = []
    threads = torch.get_num_threads()
    try:
        for count, upstream in ((1, 1.0), (2, 3.0), (2, 1.0)):
            torch.set_num_threads(count)
            value = FL.linear_cross_entropy(x, w, target, linear_bias=b, options=chunked(128))
            gradients(value, (x, w, b), torch.tensor(upstream))
            found = gradients(value, (x, w, b), torch.tensor(1.0))  # of forward, or made again
            results.append((value, *found))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# ---- what torch's chunked operator and other packages got wrong ----------------------------------


def test_create_graph(fused: str) -> None:
    x, w, _, target = draw()

    def penalty(value: Tensor) -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(value, (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in slopes) + value, (x, w))

    expected = penalty(F.cross_entropy(F.linear(x, w), target))
    assert_same(penalty(FL.linear_cross_entropy(x, w, target)), expected)


@pytest.mark.parametrize("memory", [None, "low"])
def test_several_backwards(fused: str, memory: str | None) -> None:
    """With different upstream gradients, each right, and the gradients handed out before stay."""
    x, w, _, target = draw()
    value = FL.linear_cross_entropy(x, w, target, memory=memory)
    expected = F.cross_entropy(F.linear(x, w), target)
    found = []
    for number in (1.0, 0.25, -3.0, 1.0):
        upstream = torch.tensor(number, dtype=x.dtype)
        found.append((gradients(value, (x, w), upstream), gradients(expected, (x, w), upstream)))
    for ours, theirs in found:
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")])
def test_autocast(fused: str, dtypes: tuple[str, str]) -> None:
    """Products in low precision, the loss in float32, gradients in the dtypes of the tensors."""
    x, w, _, target = draw(dtype=torch.float32)
    x, w = (leaf(t.detach().to(getattr(torch, d))) for t, d in zip((x, w), dtypes, strict=True))
    with torch.autocast(DEVICE, torch.bfloat16):
        found = FL.linear_cross_entropy(x, w, target)
        expected = F.cross_entropy(F.linear(x, w), target)
    assert found.dtype is expected.dtype is torch.float32
    assert_same([found], [expected], 1e-5)
    ours, theirs = (gradients(v, (x, w), torch.tensor(1.0)) for v in (found, expected))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert_same(ours, theirs, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"memory": "low"}], ids=str)
@pytest.mark.parametrize("formula", [False, pytest.param(True, marks=needs_formula)])
def test_fake_tensors(
    fused: str, formula: bool, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Shape, dtype, strides and device without numbers, forward and backward."""
    loss = FL.linear_cross_entropy
    if formula:
        loss = fusedloss.linear(next(c.loss for c in ROW_LOSSES if c.id == "cross_entropy"))

    def step(x: Tensor, w: Tensor, b: Tensor, target: Tensor) -> list[Tensor]:
        value = loss(x, w, target, **{"bias" if formula else "linear_bias": b}, **options)
        return [value, *torch.autograd.grad(value.sum(), (x, w, b))]

    given = draw(dtype=dtype)
    with FakeTensorMode(allow_fallback_kernels=False) as mode:
        fakes = step(*(mode.from_tensor(t) for t in given))
    for real, fake in zip(step(*given), fakes, strict=True):
        for what in ("shape", "dtype", "device"):
            assert getattr(fake, what) == getattr(real, what)
        assert fake.stride() == real.stride()


def test_product_of_meta_tensors(compiled: str) -> None:
    meta = [torch.empty(shape, device="meta") for shape in ((4, 5), (4, 3), (3, 5))]
    torch.ops.fusedloss.product_(*meta, False)


def test_dtypes_that_differ(fused: str) -> None:
    x, w, _, target = draw(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        FL.linear_cross_entropy(x.bfloat16(), w, target)


@host_sees_errors
def test_target_out_of_range(fused: str) -> None:
    x, w, _, target = draw()
    target[5] = C
    with pytest.raises(IndexError, match=rf"Target {C} is out of bounds. It stands at target\[5\]"):
        FL.linear_cross_entropy(x, w, target)


@pytest.mark.filterwarnings("ignore:.*vmap")
def test_transforms(fused: str) -> None:
    x, w, _, target = (t.detach() for t in draw())

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return FL.linear_cross_entropy(x, w, target)

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target)

    for transform in (torch.func.grad, torch.func.jacfwd):
        assert_same([transform(ours)(x, w)], [transform(theirs)(x, w)])
    tangents = torch.randn_like(x), torch.randn_like(w)
    pair = [torch.func.jvp(f, (x, w), tangents) for f in (ours, theirs)]
    assert_same(pair[0], pair[1])
    many = torch.randn(3, *x.shape, dtype=x.dtype)
    over = [torch.func.vmap(torch.func.grad(f), (0, None))(many, w) for f in (ours, theirs)]
    assert_same(over[:1], over[1:])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_row_is_ignored(fused: str, reduction: str) -> None:
    """A mean is nan and all gradients are 0, but there are some: DDP would wait for them."""
    x, w, _, target = draw()
    target.fill_(-100)
    for function in (
        FL.linear_cross_entropy,
        lambda *a, **k: F.cross_entropy(F.linear(*a[:2]), a[2], **k),
    ):
        value = function(x, w, target, reduction=reduction)
        assert value.isnan().all() if reduction == "mean" else not value.any()
        for gradient in gradients(value, (x, w), torch.ones_like(value)):
            assert not gradient.any()


def test_mean_of_many_float16_rows(fused: str) -> None:
    """Neither the sum overflows, nor do gradients of the size of a row's share vanish."""
    x = torch.full((70_000, 1), 1.0, dtype=torch.float16)
    w = torch.zeros(3, 1, dtype=torch.float16)
    value = FL.linear_cross_entropy(x, w, torch.zeros(70_000, dtype=torch.int64))
    torch.testing.assert_close(value.float(), torch.tensor(3.0).log(), rtol=1e-3, atol=0)
    x, w = (leaf(torch.randn(n, 4)) for n in (20_000, 300))
    wide = [leaf(t.detach().double()) for t in (x, w)]
    target = torch.randint(0, 300, (20_000,))
    scale = torch.tensor(65536.0)  # as a gradient scaler's
    with torch.autocast(DEVICE, torch.float16):
        ours = gradients(FL.linear_cross_entropy(x, w, target), (x, w), scale)
    true = gradients(F.cross_entropy(F.linear(*wide), target), wide, scale.double())
    for a, b in zip(ours, true, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 2e-3


@pytest.mark.parametrize("upstream", ["random", "strided", "expanded"])
def test_upstream_of_each_row(fused: str, upstream: str) -> None:
    x, w, _, target = draw()
    g = {
        "random": torch.randn(N, dtype=x.dtype),
        "strided": torch.randn(N, 3, dtype=x.dtype)[:, 1],
        "expanded": torch.tensor(0.7, dtype=x.dtype).expand(N),
    }[upstream]
    found = FL.linear_cross_entropy(x, w, target, reduction="none", options=chunked(16))
    expected = F.cross_entropy(F.linear(x, w), target, reduction="none")
    assert_same(gradients(found, (x, w), g), gradients(expected, (x, w), g))


def test_large_common_offset(fused: str) -> None:
    """Every logit is 2^24 more: the loss keeps its digits."""
    x = torch.cat([torch.randn(20, 4), torch.full((20, 1), 2.0**24)], 1)
    w = torch.cat([torch.randint(-8, 8, (30, 4)).float() * 4, torch.ones(30, 1)], 1)
    x[:, :4] = torch.randint(-2, 3, (20, 4)).float()  # so the logits have no rounding
    target = torch.randint(0, 30, (20,))
    expected = F.cross_entropy(F.linear(x.double(), w.double()), target)
    assert_same([FL.linear_cross_entropy(x, w, target)], [expected], 1e-6)


def test_infinite_logits_and_nan(fused: str) -> None:
    x, w, b, target = draw()
    with torch.no_grad():
        b[3] = -torch.inf
        x[5, 0] = torch.nan
        target[:] = 7
    found = FL.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
    expected = F.cross_entropy(F.linear(x, w, b), target, reduction="none")
    assert found.isnan().tolist() == expected.isnan().tolist()
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_part(fused: str, frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has neither product nor memory; the other part has its gradient."""
    x, w, _, target = draw()
    leaves = [x, w]
    leaves[frozen].requires_grad_(False)
    made = []
    real = _linear._empty_gradients
    monkeypatch.setattr(
        _linear, "_empty_gradients", lambda *args: made.append(real(*args)) or made[-1]
    )
    value = FL.linear_cross_entropy(x, w, target)
    expected = F.cross_entropy(F.linear(x, w), target)
    kept = leaves[1 - frozen :][:1]
    one = torch.ones((), dtype=x.dtype)
    assert_same(gradients(value, kept, one), gradients(expected, kept, one))
    assert [t is not None for t in made[0][:2]] == [bool(frozen), not frozen]


def test_no_gradient_is_wanted(fused: str) -> None:
    x, w, _, target = draw()
    with torch.no_grad():
        value = FL.linear_cross_entropy(x, w, target)
    assert not value.requires_grad
    assert_same([value], [F.cross_entropy(F.linear(x, w), target)])


def test_z_loss_off_adds_nothing(fused: str) -> None:
    x, w, _, target = draw()
    plain = FL.linear_cross_entropy(x, w, target)
    assert torch.equal(FL.linear_cross_entropy(x, w, target, z_loss=0.0), plain)


def test_checkpoint(fused: str) -> None:
    """What is saved away until backward leaves no gradient behind in between."""
    x, w, _, target = draw()
    value = torch.utils.checkpoint.checkpoint(
        FL.linear_cross_entropy, x, w, target, use_reentrant=False
    )
    expected = F.cross_entropy(F.linear(x, w), target)
    one = torch.ones((), dtype=x.dtype)
    assert_same(gradients(value, (x, w), one), gradients(expected, (x, w), one))
    with torch.autograd.graph.save_on_cpu():
        value = FL.linear_cross_entropy(x, w, target)
    low = FL.linear_cross_entropy(x, w, target, memory="low")
    for nothing_kept in (value, low):
        assert all(g is None for g in nothing_kept.grad_fn.unit)
    assert_same(gradients(value, (x, w), one), gradients(expected, (x, w), one))


def test_one_row_and_no_row(backend: str) -> None:
    x, w, _, _ = draw()
    target = torch.tensor(3)
    expected = F.cross_entropy(F.linear(x[0], w), target)
    assert_same([FL.linear_cross_entropy(x[0], w, target)], [expected])
    empty = FL.linear_cross_entropy(x[:0], w, torch.empty(0, dtype=torch.int64), reduction="sum")
    assert_same(gradients(empty, (x, w), torch.ones_like(empty)), [0 * x, 0 * w])


@pytest.mark.parametrize("layout", ["transposed", "gaps", "expanded"])
def test_layouts(fused: str, layout: str) -> None:
    x, w, _, target = draw()
    x, w = {
        "transposed": lambda: (leaf(x.t().contiguous()).t(), leaf(w.t().contiguous()).t()),
        "gaps": lambda: (
            torch.randn(N, 2 * D).double()[:, ::2],
            torch.randn(2 * C, D).double()[::2],
        ),
        "expanded": lambda: (x[:1].expand(N, D), w),
    }[layout]()
    x, w = (t.detach().requires_grad_() for t in (x, w))
    value, expected = FL.linear_cross_entropy(x, w, target), F.cross_entropy(F.linear(x, w), target)
    one = torch.ones((), dtype=x.dtype)
    assert_same(gradients(value, (x, w), one), gradients(expected, (x, w), one))


# ---- gradcheck, compile, memory ------------------------------------------------------------------


@needs_formula
@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "outputs": ("lse", "entropy")}], ids=str)
def test_gradcheck(fused: str, reduction: str, options: dict[str, Any]) -> None:
    x, w, b, _ = draw(7, 3, 5)
    target = torch.tensor([0, 1, 2, 3, 4, -100, 2])

    def results(x: Tensor, w: Tensor, b: Tensor) -> Any:
        found = FL.linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, options=chunked(2), **options
        )
        return (found[0], *found[1].values()) if options else found

    assert torch.autograd.gradcheck(results, (x, w, b), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(results, (x, w, b))


@needs_formula
@pytest.mark.slow
def test_compile(compiled: str) -> None:
    """In one graph."""
    x, w, b, target = draw(dtype=torch.float32)
    for options in ({}, {"reduction": "none"}, {"z_loss": 0.1}):

        def step(x: Tensor, w: Tensor, b: Tensor, options: Any = options) -> Tensor:
            return 2 * FL.linear_cross_entropy(x, w, target, linear_bias=b, **options)

        value = torch.compile(step, fullgraph=True)(x, w, b)
        expected = step(x, w, b)
        upstream = torch.rand(value.shape)
        assert_same([value], [expected], 1e-6)
        ours, theirs = (gradients(v, (x, w, b), upstream) for v in (value, expected))
        assert_same(ours, theirs, 1e-5)


PEAK = """
import torch, fusedloss, fusedloss.functional as FL

def megabytes(what):
    line = next(x for x in open("/proc/self/status") if x.startswith(what))
    return int(line.split()[1]) / 1024

n, d, c = 1024, 64, 32768
x, w = torch.randn(n, d, requires_grad=True), torch.randn(c, d, requires_grad=True)
target = torch.randint(0, c, (n,))
FL.linear_cross_entropy(x[:64], w, target[:64]).backward()
open("/proc/self/clear_refs", "w").write("5")
before = megabytes("VmRSS")
FL.linear_cross_entropy(x, w, target{}).backward()
print(megabytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("options", ["", ", memory='low'"])
def test_peak_memory(compiled: str, options: str) -> None:
    """Beside the gradients, less than half of the logits' 128 MiB, which eager has three times."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(options)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 64


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": -1.0}, ValueError, "softcap must be a positive number, not -1.0"),
        ({"z_loss": "a"}, TypeError, "z_loss must be a number, not 'a'"),
        ({"outputs": ("lse", "loss")}, ValueError, "outputs must be some of lse, logprob"),
        ({"shift": -1}, ValueError, "shift must be an int of at least 0, not -1"),
        ({"memory": "high"}, ValueError, "memory must be None or 'low', not 'high'"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items is what a mean divides by"),
        ({"num_items": "3"}, TypeError, "num_items must be one number, not '3'"),
        ({"token_weight": torch.ones(2)}, ValueError, r"token_weight has shape \(2,\)"),
        ({"reduction": "all"}, ValueError, "all is not a valid value for reduction"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x, w, _, target = draw()
    with pytest.raises(error, match=message):
        FL.linear_cross_entropy(x, w, target, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x, w, t: (x, w), TypeError, r"takes logits, label: 2 inputs, not 1"),
        (lambda x, w, t: (x, w.t(), t), ValueError, r"hidden \(..., D\), linear_weight"),
        (lambda x, w, t: (x, w, (x, w)), TypeError, "label must be a tensor, not"),
        (lambda x, w, t: (x, 3, t), TypeError, "linear_weight of logits must be a tensor"),
        (lambda x, w, t: (x, w, t[:5]), ValueError, r"label has shape \(5,\), not \(70,\)"),
        (lambda x, w, t: (x, w, t.float()), TypeError, "label is the index of a class"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    x, w, _, target = draw()
    case = next(c for c in ROW_LOSSES if c.id == "cross_entropy")
    with pytest.raises(error, match=message):
        fusedloss.linear(case.loss)(*arguments(x, w, target))


def test_partitioned_weight() -> None:
    x, _, _, target = draw()
    with pytest.raises(ValueError, match=r"linear_weight of shape \(0,\) has no elements"):
        FL.linear_cross_entropy(x, x.new_empty(0), target)


def test_what_linear_takes() -> None:
    with pytest.raises(TypeError, match=r"fusedloss.linear takes what fusedloss.row_loss makes"):
        fusedloss.linear(F.cross_entropy)  # type: ignore[arg-type]


def test_explain(fused: str) -> None:
    x, w, _, target = draw()
    assert FL.explain(FL.linear_cross_entropy, x, w, target).fused
    path = FL.explain(FL.linear_cross_entropy, x, w.reshape(C // 2, 2, D), target)
    assert not path.fused and "linear_weight has shape (75, 2, 8)" in str(path)


# ---- modules -------------------------------------------------------------------------------------


def test_module(fused: str) -> None:
    """One that owns its layer, and one that shares a layer that exists."""
    x, _, _, target = draw(dtype=torch.float32)
    own = fusedloss.LinearCrossEntropyLoss(D, C, bias=True, label_smoothing=0.1)
    shared = fusedloss.LinearCrossEntropyLoss.of(own.linear, label_smoothing=0.1)
    assert {*shared.state_dict()} == {*own.state_dict()} == {"linear.weight", "linear.bias"}
    expected = F.cross_entropy(own.linear(x), target, label_smoothing=0.1)
    for module in (own, shared):
        assert_same([module(x, target)], [expected], 1e-6)
        module(x, target).backward()
    assert shared.linear.weight.grad is own.linear.weight.grad is not None
    _, extras = shared(x, target, outputs=("count",), num_items=3)
    assert extras["count"] == (target != -100).sum()
    with pytest.raises(TypeError, match="takes a torch.nn.Linear, not Conv1d"):
        fusedloss.LinearCrossEntropyLoss.of(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no such loss")
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "out_features": (2, 3)}, {"weight": torch.ones(C)}], ids=str
)
def test_the_module_that_older_releases_lack(options: dict[str, Any]) -> None:
    theirs, own = (
        kind(D, C, **options)
        for kind in (nn.LinearCrossEntropyLoss, modules._LinearCrossEntropyLoss)
    )
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (own, theirs)]
    assert shapes[0] == shapes[1]
    for name in ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing"):
        assert getattr(own, name) == getattr(theirs, name)
    for wrong in ({"weight": torch.ones(3)}, {"label_smoothing": 2.0}):
        for kind in (nn.LinearCrossEntropyLoss, modules._LinearCrossEntropyLoss):
            with pytest.raises(RuntimeError, match="expected (weight shape|label_smoothing) to be"):
                kind(D, C, **wrong)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no such loss")
def test_patch_and_replace(fused: str) -> None:
    x, w, _, target = draw(dtype=torch.float32)
    model = nn.ModuleDict({"loss": nn.LinearCrossEntropyLoss(D, C)})
    expected = model["loss"](x, target)
    assert list(fusedloss.replace(model)) == ["loss"]
    assert_same([model["loss"](x, target)], [expected], 1e-6)
    assert FL.explain(model["loss"], x, target).fused
    fusedloss.restore(model)
    with fusedloss.patch() as patched:
        F.linear_cross_entropy(x, w, target)
        model["loss"](x, target)
    assert [call.path.fused for call in patched.calls] == [True, True]
