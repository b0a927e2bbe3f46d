"""Custom losses: values, gradients, options, and every path that a call can take."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import sympy
import torch
from sympy.core.parameters import distribute
from torch import Tensor

import fusedloss
from cases import DEVICE
from conftest import need
from custom_losses import (
    BRANCHES,
    CASES,
    OBSERVED,
    OF_NAN,
    CustomCase,
    any_branch,
    any_of_nan,
    charbonnier,
    focal,
    gaussian_kl,
    one_of,
    quantile,
    tukey,
)
from fusedloss import math as fm
from fusedloss.custom import prepare, primitives, tracing
from fusedloss.custom.building import CannotCompile
from helpers import (
    EMULATED,
    INTERPRETED,
    assert_near,
    assert_same_bits,
    draw_upstream,
    leaf,
    operators,
    poisoned_memory,
    threads,
)

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def compiled_ahead() -> None:
    """Compiles them side by side, since each takes seconds."""
    if DEVICE == "cuda":
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda case: case.loss.compile(DEVICE), CASES))


def gradients(
    loss: Any, x: Tensor, y: Tensor, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    value, of_x, of_y = all_gradients(loss, (x, y), upstream, **options)
    return value, of_x, of_y


def all_gradients(
    loss: Any, inputs: Any, upstream: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """The value, and the gradient for each input."""
    leaves = list(map(leaf, inputs))
    value = loss(*leaves, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream
    found = torch.autograd.grad(value, leaves, upstream, allow_unused=True, materialize_grads=True)
    return [value.detach(), *found]


def names(case: CustomCase) -> tuple[str, ...]:
    return ("value", *case.loss._traced.arguments)


def truth(case: CustomCase, inputs: Any, upstream: Tensor, reduction: str, w: Tensor):  # type: ignore[no-untyped-def]
    """Value and gradients in float64, by PyTorch's derivatives."""

    def eager(*inputs: Tensor) -> Tensor:
        elements = case.eager(*inputs, **case.options) * w
        if reduction == "none":
            return elements
        return elements.sum() / (w.sum() if reduction == "mean" else 1)

    return all_gradients(eager, [t.double() for t in inputs], upstream.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_case
def test_value_and_gradients(fused: str, case: CustomCase, dtype: torch.dtype) -> None:
    """All gradients for a random upstream gradient, weighted or not, against float64."""
    inputs = case.sample(dtype)
    x = inputs[0]
    w = draw_upstream(x.shape, dtype, seed=1).abs()
    for reduction, weight in itertools.product(("none", "mean", "sum"), (None, w)):
        upstream = draw_upstream(x.shape if reduction == "none" else (), dtype)
        options = {**case.options, "reduction": reduction, "weight": weight}
        assert fusedloss.explain(case.loss, *inputs, **options).fused
        with poisoned_memory():
            ours = all_gradients(case.loss, inputs, upstream, **options)
        ones = torch.ones_like(x) if weight is None else w
        expected = truth(case, inputs, upstream, reduction, ones.double())
        for name, mine, right in zip(names(case), ours, expected, strict=True):
            assert mine.dtype is dtype
            assert_near(mine, right, f"{name}, {reduction}")


@by_case
def test_against_reference(fused: str, case: CustomCase) -> None:
    """First and second derivatives, in all arguments, of the kernels and the printed PyTorch."""
    inputs = tuple(map(leaf, case.sample(torch.float64, (7,))))

    def call(*inputs: Tensor) -> Tensor:
        return case.loss(*inputs, reduction="none", **case.options)

    if not case.detaches:
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)
    clipped = [{"clip_grad": 0.4}, {}]
    for options in clipped:
        ours = all_gradients(case.loss, inputs, **case.options, **options)
        reference = all_gradients(case.loss.reference, inputs, **case.options, **options)
        for mine, theirs in zip(ours, reference, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_layouts(fused: str) -> None:
    """Strided, transposed, expanded and unaligned operands; gradients in input's own layout."""
    base = torch.randn(64, 130)
    pool = torch.randn(64 * 130)
    for x in (
        base,
        base.t()[:, :7],
        base[::2, 1::3],
        base.flatten()[1:],
        base[:, :1].expand(64, 5),
    ):
        y = pool[: x.numel()].view(x.shape)
        for target in (y, y.flip(-1), y[..., :1].expand_as(y)):
            ours = gradients(charbonnier, x, target)
            for mine, right in zip(ours, gradients(charbonnier.reference, x, target), strict=True):
                torch.testing.assert_close(mine, right)
    strided = leaf(base.t())
    charbonnier(strided, pool.view(130, 64)).backward()
    assert strided.grad is not None and strided.grad.stride() == strided.stride()


# ---- the primitives ------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan
EXTREMES = (0.0, 1e-30, 1e-8, 0.3, 1.0, 2.5, 88.0, 100.0, 1e4, 1e30, INF)


def sech2(x: float) -> float:
    return 0.0 if abs(x) > 350 else 1 / math.cosh(x) ** 2


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else math.exp(x)


def or_inf(f: Any) -> Any:
    """Python's math functions raise where a float is infinite or nan."""

    def safe(x: float) -> float:
        try:
            return float(f(x))
        except OverflowError:
            return INF
        except ValueError:
            return NAN
        except ZeroDivisionError:
            return INF

    return safe


def at_pole(x: float) -> bool:
    """Of the gamma function."""
    return x <= 0 and (math.isinf(x) or x == math.floor(x))


def lgamma(x: float) -> float:
    return torch.lgamma(torch.tensor(x, dtype=torch.float64)).item()  # Python's is less exact


def digamma(x: float) -> float:
    if x <= 0:
        if at_pole(x):
            return NAN if x else math.copysign(INF, -x)
        return digamma(1 - x) - math.pi / math.tan(math.pi * (x - round(x)))
    below = sum(1 / (x + i) for i in range(20))
    z = x + 20
    tail = 1 / 12 - (1 / 120 - (1 / 252 - 1 / 240 / z**2) / z**2) / z**2
    return math.log(z) - 1 / (2 * z) - tail / z**2 - below


def trigamma(x: float) -> float:
    if x <= 0:
        if at_pole(x):
            return INF if x > -INF else NAN
        return (math.pi / math.sin(math.pi * (x - round(x)))) ** 2 - trigamma(1 - x)
    below = sum(1 / (x + i) / (x + i) for i in range(20))
    z = x + 20
    tail = 1 / 6 - (1 / 30 - (1 / 42 - 1 / 30 / z**2) / z**2) / z**2
    return below + 1 / z + 1 / (2 * z**2) + tail / z**3


# Each function of fusedloss.math, its value and its slope, for one number, in plain Python.
PRIMITIVES: dict[str, tuple[Any, Any, Any]] = {
    "exp": (fm.exp, math.exp, math.exp),
    "expm1": (fm.expm1, math.expm1, math.exp),
    "log": (fm.log, lambda x: -INF if x == 0 else math.log(x), lambda x: 1 / x),
    "log1p": (fm.log1p, lambda x: -INF if x == -1 else math.log1p(x), lambda x: 1 / (1 + x)),
    "sqrt": (fm.sqrt, math.sqrt, lambda x: 0.5 / math.sqrt(x)),
    "abs": (fm.abs, abs, lambda x: (x > 0) - (x < 0)),
    "sign": (fm.sign, lambda x: (x > 0) - (x < 0), lambda x: 0.0),
    "sin": (fm.sin, math.sin, math.cos),
    "cos": (fm.cos, math.cos, lambda x: -math.sin(x)),
    "tanh": (fm.tanh, math.tanh, sech2),
    "sigmoid": (fm.sigmoid, sigmoid, lambda x: sigmoid(-abs(x)) * (1 - sigmoid(-abs(x)))),
    "log_sigmoid": (
        fm.log_sigmoid,
        lambda x: min(x, 0) - math.log1p(math.exp(-abs(x))),
        lambda x: sigmoid(-x),
    ),
    "softplus": (fm.softplus, lambda x: max(x, 0) + math.log1p(math.exp(-abs(x))), sigmoid),
    "logaddexp": (
        lambda x: fm.logaddexp(x, 0.5),
        lambda x: max(x, 0.5) + math.log1p(math.exp(-abs(x - 0.5))),
        lambda x: sigmoid(x - 0.5),
    ),
    "erf": (fm.erf, math.erf, lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x)),
    "erfc": (fm.erfc, math.erfc, lambda x: -2 / math.sqrt(math.pi) * math.exp(-x * x)),
    "lgamma": (fm.lgamma, lgamma, digamma),
    "digamma": (fm.digamma, digamma, trigamma),
    "detach": (fm.detach, lambda x: x, lambda x: 0.0),
    "relu": (fm.relu, lambda x: max(x, 0), lambda x: float(x > 0)),
    "clamp": (lambda x: fm.clamp(x, -1, 2.5), lambda x: min(max(x, -1), 2.5), None),
    "pow": (lambda x: x**2.7, lambda x: x**2.7 if x >= 0 else NAN, None),
    "root": (lambda x: x**1.5, lambda x: x * math.sqrt(x), lambda x: 1.5 * math.sqrt(x)),
    "inverse": (lambda x: x**-2, lambda x: 1 / x**2, lambda x: -2 / x**3),
}


@fusedloss.pointwise_loss
def any_word(input, target, *, which=0.0):  # type: ignore[no-untyped-def]
    """The chosen function of a number. All are computed, and the others must not show."""
    result = 0 * target
    for number, (primitive, _, _) in enumerate(PRIMITIVES.values()):
        result = fm.where(fm.equal(which, float(number)), primitive(input), result)
    return result


@pytest.mark.interpret_all
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_primitives_at_extremes(fused: str, primitive: str, dtype: torch.dtype) -> None:
    points = [*EXTREMES, *(-x for x in EXTREMES), NAN]
    x = torch.tensor(points, dtype=dtype)
    _, value, slope = PRIMITIVES[primitive]
    which = float(list(PRIMITIVES).index(primitive))
    ours, of_input, of_target = gradients(
        any_word, x, torch.ones_like(x), torch.ones_like(x), which=which, reduction="none"
    )
    assert not of_target.any()  # 0 * target is cut off with the branch
    info = torch.finfo(dtype)
    for results, function in ((ours, value), (of_input, slope)):
        if function is None:
            continue
        for at, mine in zip(x.tolist(), results.tolist(), strict=True):
            if at == 0 and results is of_input and primitive in ("sqrt", "inverse", "log"):
                right = {"sqrt": INF, "inverse": -INF, "log": INF}[primitive] * math.copysign(
                    1.0, at if primitive != "sqrt" else 1.0
                )
            elif math.isnan(at):
                right = 0.0 if primitive == "sign" else NAN
                if results is of_input and primitive in ("sign", "abs", "relu", "detach"):
                    right = 0.0
            elif at == -INF and primitive == "pow":
                right = INF  # as in C
            else:
                right = or_inf(function)(at)
            right = torch.tensor(right, dtype=torch.float64).to(dtype).item()
            same = mine == right or (math.isnan(mine) and math.isnan(right))
            # Near their roots these two have the error of the numbers they are the difference of.
            least = 1.0 if primitive in ("lgamma", "digamma") else 0.0
            scale = max(abs(right), least)
            near = abs(mine - right) <= 16 * info.eps * scale + info.smallest_normal
            assert same or near, f"{primitive}({at}): {mine}, not {right}"


def test_words_on_tensors() -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for primitive, (function, value, _) in PRIMITIVES.items():
        expected = torch.tensor([or_inf(value)(at) for at in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(function(x), expected, equal_nan=True, msg=primitive)
    assert fm.where(x > 0, x, 0.0).min() == 0 and fm.equal(x, 3.0).sum() == 1
    assert fm.xlogy(torch.zeros(1), 0.0) == 0


def test_branch_not_taken(fused: str) -> None:
    """An infinite value or slope in the other branch never shows, in any order of
    differentiation."""

    @fusedloss.pointwise_loss
    def guarded(input, target):  # type: ignore[no-untyped-def]
        safe = fm.where(input > 0, fm.log(input) / input + fm.sqrt(input), input * target)
        return safe + fm.xlogy(target, fm.relu(target)) + fm.where(target > 0, target**-3, 0.0)

    x = torch.tensor([-1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    y = torch.tensor([0.0, 0.0, 3.0, 2.0], dtype=torch.float64)
    for call in (guarded, guarded.reference):
        value, of_input, of_target = gradients(call, x, y, torch.ones_like(x), reduction="none")
        assert value.isfinite().all() and of_input.isfinite().all()
        assert of_target[2:].isfinite().all()
    a = leaf(x)
    (first,) = torch.autograd.grad(guarded(a, y, reduction="sum"), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    assert second.isfinite().all()


@fusedloss.pointwise_loss
def partly_detached(input, target, *, gamma=0.7):  # type: ignore[no-untyped-def]
    held = fm.detach(fm.where(target > 0, fm.sigmoid(input) + 1, target**2))
    return held**gamma * (input - fm.detach(input) * target) + fm.exp(input) * fm.detach(input)


def _partly_detached(x: Tensor, y: Tensor, gamma: float = 0.7) -> Tensor:
    held = torch.where(y > 0, x.sigmoid() + 1, y**2).detach()
    return held**gamma * (x - x.detach() * y) + x.exp() * x.detach()


@pytest.mark.interpret_all
def test_detach(fused: str) -> None:
    """Value and derivatives of first and second order are PyTorch's, with and without a bound."""
    x, y = torch.randn(2, 65, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = all_gradients(_partly_detached, (x, y), torch.ones_like(x))
    for options in ({}, {"clip_grad": 1e300}):
        for loss in (partly_detached, partly_detached.reference):
            ours = all_gradients(loss, (x, y), torch.ones_like(x), reduction="none", **options)
            torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-14)
        seconds = []
        for loss in (
            functools.partial(partly_detached, reduction="sum", **options),
            _partly_detached,
        ):
            a, b = leaf(x), leaf(y)
            first = torch.autograd.grad(loss(a, b).sum(), (a, b), create_graph=True)
            total = sum(g.square().sum() for g in first)
            kwargs = {"allow_unused": True, "materialize_grads": True}
            seconds.append(torch.autograd.grad(total, (a, b), **kwargs))
        torch.testing.assert_close(*seconds, rtol=1e-12, atol=1e-13)
    assert partly_detached.check().ok
    kernel = partly_detached._struct.split("{", 1)[1]
    assert "etach" not in kernel and len(re.findall(r"\bexp", kernel)) == 2, (
        "nothing is there twice"
    )


def grid(*points: float) -> tuple[Tensor, Tensor]:
    """Every pair of the points."""
    x, y = torch.meshgrid(*[torch.tensor(points, dtype=torch.float64)] * 2, indexing="ij")
    return x.flatten(), y.flatten()


def assert_equal_to_eager(
    loss: Any, eager: Any, x: Tensor, y: Tensor, options: dict[str, float]
) -> None:
    """Value and both gradients, nan and infinities included: of the kernel, the plain PyTorch, its
    slopes and the gradient with a graph."""
    assert fusedloss.explain(loss, x, y, **options).fused
    upstream, options = torch.ones_like(x), {**options, "reduction": "none"}
    a, b = leaf(x), leaf(y)
    value = eager(a, b)
    right = (
        value.detach(),
        *torch.autograd.grad(value, (a, b), upstream, allow_unused=True, materialize_grads=True),
    )
    value = loss(a, b, **options)
    graph = torch.autograd.grad(value, (a, b), upstream, create_graph=True)
    for path, ours in {
        "kernel": gradients(loss, x, y, upstream, **options),
        "plain PyTorch": gradients(loss.reference, x, y, upstream, **options),
        "with a graph": (value.detach(), *(g.detach() for g in graph)),
        "slopes": gradients(loss.reference, x, y, upstream, clip_grad=1e300, **options),
        "kernel's slopes": gradients(loss, x, y, upstream, clip_grad=1e300, **options),
    }.items():
        for what, mine, expected in zip(("value", "input", "target"), ours, right, strict=True):
            if "slopes" in path and what != "value":
                expected = expected.clamp(-1e300, 1e300)
            near = torch.isclose(mine, expected, rtol=1e-10, atol=1e-13, equal_nan=True)
            at = [
                f"input {x[i]:g}, target {y[i]:g}: {mine[i]:g}, not {expected[i]:g}"
                for i in (~near).nonzero().flatten().tolist()
            ]
            assert not at, f"{path}, {what}: {at}"


@pytest.mark.interpret_all
@pytest.mark.parametrize("name", BRANCHES)
def test_outer_slope_stays_in_the_branch(fused: str, name: str) -> None:
    """At kinks and in branches that are not taken, as in PyTorch."""
    options = {"which": float(list(BRANCHES).index(name))}
    points = grid(-2, -1, -0.5, 0, 0.5, 1, 1.5, 2)
    assert_equal_to_eager(any_branch, BRANCHES[name][1], *points, options)


@pytest.mark.interpret_all
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("name", OF_NAN)
def test_conditions_and_pieces_of_nan(fused: str, name: str, dtype: torch.dtype) -> None:
    x, y = (t.to(dtype) for t in grid(-INF, -1, 0, 0.5, 1, INF, NAN))
    options: Any = {"which": float(list(OF_NAN).index(name)), "reduction": "none"}
    right = OF_NAN[name](x, y).to(dtype)
    for call in (any_of_nan, any_of_nan.reference):
        torch.testing.assert_close(call(x, y, **options), right, equal_nan=True)
    torch_word = {"maximum": torch.maximum, "clamp below an element": _torch_clamp}.get(name)
    if torch_word is not None:
        torch.testing.assert_close(right, torch_word(x, y), equal_nan=True)


def _torch_clamp(x: Tensor, y: Tensor) -> Tensor:
    return torch.clamp(x, torch.zeros_like(x), y)


def test_missing_targets(fused: str) -> None:
    """A nan that the formula tests for makes no other: a mean over the observed elements."""
    x, y = OBSERVED.sample(torch.float64, (257,))
    y[::3] = NAN
    seen = ~y.isnan()
    ours = gradients(OBSERVED.loss, x, y, weight=seen.double())
    right = gradients(lambda a, b: OBSERVED.eager(a, b).mean(), x[seen], y[seen])
    torch.testing.assert_close(ours[0], right[0])
    for mine, expected in zip(ours[1:], right[1:], strict=True):
        torch.testing.assert_close(mine[seen], expected)
        assert not mine[~seen].any()


def test_bounds_keep_nan(fused: str) -> None:
    """clip_grad does not turn a slope of nan into a number."""
    loss = one_of([lambda x, y: fm.log(x) * y])
    x, y = torch.tensor([1.0, -1.0, NAN, 0.0]), torch.ones(4)
    for call in (loss, loss.reference):
        _, of_input, of_target = gradients(call, x, y, reduction="sum", clip_grad=0.5)
        torch.testing.assert_close(of_input, torch.tensor([0.5, -0.5, NAN, 0.5]), equal_nan=True)
        torch.testing.assert_close(of_target, torch.tensor([0, NAN, NAN, -0.5]), equal_nan=True)


def test_constant_pieces(backend: str) -> None:
    """A formula that a parameter or an element makes constant has gradient 0, with a graph as
    well."""

    @fusedloss.pointwise_loss
    def switched(input, target, *, on=1.0):  # type: ignore[no-untyped-def]
        return fm.where(on > 0, (input - target) ** 2, 0.0)

    @fusedloss.pointwise_loss
    def stepped(input, target):  # type: ignore[no-untyped-def]
        return fm.where(input > target, 3.0, 1.0)

    x, y = torch.tensor([1.0, -2.0, INF]), torch.tensor([0.5, 0.0, 0.0])
    for loss, options, right in (
        (switched, {"on": 0.0}, [0.0, 0, 0]),
        (stepped, {}, [3.0, 1, 3]),
    ):
        for call, graph in itertools.product((loss, loss.reference), (False, True)):
            for clip in ({}, {"clip_grad": 2.0}):
                a, b = leaf(x), leaf(y)
                value = call(a, b, reduction="none", **options, **clip)
                assert value.tolist() == right
                found = torch.autograd.grad(value.sum(), (a, b), create_graph=graph)
                assert all(not g.any() for g in found)
        assert torch.func.grad(lambda a, o=options, f=loss: f(a, y, **o))(x).tolist() == [0, 0, 0]


# Names that printed formulas use, or that mean something in Python or C++.
NAMES = [
    "number",
    "call",
    "select",
    "where",
    "logical_and",
    "logical_or",
    "logical_not",
    "exp",
    "log",
    "sqrt",
    "Abs",
    "Where",
    "constants",
    "results",
    "self",
    "loss",
    "fn",
    "path",
    "device",
    "function",
    "name",
    "c0",
    "c1",
    "t0",
    "t1",
    "p0",
    "p1",
    "x",
    "y",
    "z",
    "T",
    "clip",
    "tl",
    "primitives",
    "torch",
    "lambda_",
    "register",
    "double",
    "int64_t",
    "main",
    "E",
    "I",
    "S",
    "pi",
    "nan",
    "inf",
    "value",
    "slope",
]


def test_any_name_of_a_parameter(backend: str) -> None:
    """Parameters may have any name, whatever it means to a backend."""
    for some in (NAMES[::2], NAMES[1::2]):
        source = f"def named(input, target, *, {', '.join(f'{name}=1.0' for name in some)}):\n"
        terms = [f"{k + 1} * {name} ** 2" for k, name in enumerate(some)]
        source += (
            f"    d = input - target\n    return d**2 * ({' + '.join(terms)}) + fm_log1p(d * d)\n"
        )
        namespace: dict[str, Any] = {"fm_log1p": fm.log1p}
        exec(source, namespace)  # noqa: S102
        named = fusedloss.pointwise_loss(namespace["named"])
        numbers = {name: 1.0 + k / 7 for k, name in enumerate(some)}
        factor = sum((k + 1) * number**2 for k, number in enumerate(numbers.values()))
        x, y = torch.tensor([1.0, -3.0]).double(), torch.tensor([0.5, 2.0]).double()
        d = x - y
        right = (d**2 * factor + torch.log1p(d * d)).mean()
        for call in (named, named.reference, named.module(**numbers)):
            options = {} if isinstance(call, torch.nn.Module) else numbers
            for clip in ({}, {"clip_grad": 1e9})[: 1 + bool(options)]:
                bound = functools.partial(call, **options, **clip)
                value, of_input, _ = gradients(bound, x, y)
                torch.testing.assert_close(value, right)
                torch.testing.assert_close(of_input, d * factor + d / (1 + d * d))
        assert "finite differences at 2000" in str(named.check(**numbers))


def test_names_of_the_definition(backend: str) -> None:
    """A call may name input and target as the signature does."""

    @fusedloss.pointwise_loss
    def squared(y_pred, y_true, *, scale=1.0):  # type: ignore[no-untyped-def]
        return scale * (y_pred - y_true) ** 2

    x, y = torch.randn(2, 3)
    for call in (squared, squared.reference):
        right = call(x, y, scale=2.0)
        assert call(y_pred=x, y_true=y, scale=2.0) == right == call(x, y_true=y, scale=2.0)
        assert call(target=y, input=x, scale=2.0) == right == call(y_pred=x, target=y, scale=2.0)
        with pytest.raises(TypeError, match="squared.. needs 2 tensors; 'y_true' is missing"):
            call(y_pred=x)
        with pytest.raises(TypeError, match="no parameter 'y_pred'"):
            call(x, y, y_pred=x)
        with pytest.raises(TypeError, match="takes 2 tensors, y_pred, y_true, and was given 3"):
            call(x, y, x)


def test_kinks(fused: str) -> None:
    """The same as in PyTorch."""

    @fusedloss.pointwise_loss
    def kinked(input, target):  # type: ignore[no-untyped-def]
        return (
            2 * fm.abs(input)
            + 4 * fm.relu(input)
            + 8 * fm.maximum(input, target)
            + 16 * fm.minimum(input, target)
            + 32 * fm.clamp(input, 0, 1)
            + 64 * fm.sign(input)
        )

    zero = torch.zeros(3)
    for call in (kinked, kinked.reference):
        _, of_input, of_target = gradients(call, zero, zero, reduction="sum")
        assert of_input.tolist() == [4 + 8 + 32] * 3 and of_target.tolist() == [4 + 8] * 3


@fusedloss.pointwise_loss
def lopsided(input, target, *, a=0.5):  # type: ignore[no-untyped-def]
    d = input - target
    return fm.where(d > 0, d, a * d) ** 2


@fusedloss.pointwise_loss
def nested(input, target):  # type: ignore[no-untyped-def]
    return fm.softplus(fm.sqrt(fm.sigmoid(input) + target**2))


@pytest.mark.parametrize("loss", (lopsided, nested), ids=lambda loss: loss.__name__)
def test_conditions_inside_of_powers(fused: str, loss: Any) -> None:
    """SymPy must see numbers, so that it can cancel one power with another."""
    x, y = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64), torch.zeros(3).double()
    ours = gradients(loss, x, y)
    for result, expected in zip(ours, gradients(loss.reference, x, y), strict=True):
        assert_near(result, expected, loss.__name__)


def test_default_that_is_no_number(fused: str) -> None:
    """An exponent without a default."""

    @fusedloss.pointwise_loss
    def required(input, target, *, power=math.nan):  # type: ignore[no-untyped-def]
        return fm.abs(input - target) ** power

    x, y = torch.tensor([2.0, -3.0]), torch.tensor([0.5, 1.0])
    assert fusedloss.explain(required, x, y, power=1.5).fused
    value = required(x, y, power=1.5)
    torch.testing.assert_close(value, ((x - y).abs() ** 1.5).mean())


def test_simplification_keeps_digits(fused: str) -> None:
    """A difference of neighbours is formed first, and no factor is multiplied into it."""

    @fusedloss.pointwise_loss
    def shifted(input, target, *, margin=1e-6):  # type: ignore[no-untyped-def]
        return fm.abs((input - target) / 3 + margin) + 7 * (input - target) * (input - target) / 3

    x = torch.tensor([10000.001, 8191.5])
    y = torch.tensor([10000.0, 8191.499])
    value, of_input, _ = gradients(shifted, x, y, reduction="sum")
    d = x.double() - y.double()
    right = (d / 3 + 1e-6).abs() + 7 * d * d / 3
    torch.testing.assert_close(value.double(), right.sum(), rtol=4e-7, atol=0)
    torch.testing.assert_close(of_input.double(), 1 / 3 + 14 * d / 3, rtol=4e-7, atol=0)


def test_common_factors() -> None:
    """Common factors of terms are multiplied or divided by once; function arguments stay as they
    were."""
    a, b, x, y, z = sympy.symbols("a b x y z")
    with distribute(False):
        for terms, factored in (
            (a * x * y + b * x * y, x * y * (a + b)),
            (z * (a * x * y - 2 * b * x * y + a * b), z * (x * y * (a - 2 * b) + a * b)),
            (a * x * y + b * x * y + a * z, x * y * (a + b) + a * z),
            (a * y / x - b * y / x, y * (a - b) / x),
            (a * x + b * x, a * x + b * x),
            (a * x * y + 2 * x * y, a * x * y + 2 * x * y),
            (a * x * y + b * x * y - 2 * x * y, x * y * (a + b) - 2 * x * y),
            (2 * a + 2 * b, 2 * a + 2 * b),
            (primitives.Exp(a * x * y + b * x * y), primitives.Exp(a * x * y + b * x * y)),
            (
                primitives.Where(a > 0, a * x * y + b * x * y, z),
                primitives.Where(a > 0, a * x * y + b * x * y, z),
            ),
        ):
            assert tracing._factored(terms) == factored


def used(shared: list[tuple[Any, Any]], results: list[Any]) -> list[Any]:
    """The formulas that the results need."""
    formulas, waiting = [], list(results)
    while waiting:
        formulas.append(waiting.pop())
        waiting += [formula for symbol, formula in shared if formulas[-1].has(symbol)]
        shared = [(s, formula) for s, formula in shared if not formulas[-1].has(s)]
    return formulas


@by_case
def test_target_slope_leaves_the_others_alone(case: CustomCase) -> None:
    """Calls that do not need it pay nothing for it."""
    traced = case.loss._traced
    with distribute(False):
        value, *slopes = map(primitives.attached, (traced.value, *traced.slopes))
        value, slopes = primitives.lowered(value), traced._lowered(slopes)
        alone, results = tracing._repeated([value, slopes[0]], sympy.numbered_symbols("t"))
        shared, all_results = tracing._shared(value, *slopes)

    def products(shared: list[Any], results: list[Any]) -> int:
        counts = sympy.count_ops(used(shared, results), visual=True)
        return sum(int(counts.coeff(sympy.Symbol(kind))) for kind in ("MUL", "DIV", "POW"))

    assert products(shared, all_results[:2]) <= products(alone, results)


@fusedloss.pointwise_loss
def generalized(input, target, *, q=0.7):  # type: ignore[no-untyped-def]
    p = fm.sigmoid(input * target)
    return (1 - p**q) / q


@fusedloss.pointwise_loss
def mixture(input, target):  # type: ignore[no-untyped-def]
    d = input - target
    return -fm.log(fm.exp(-(d**2)) + fm.exp(-((d + 0.2) ** 2)) + fm.exp(-((d - 0.3) ** 2)))


@fusedloss.pointwise_loss
def scaled(input, target, *, s=3.0):  # type: ignore[no-untyped-def]
    return fm.softplus(s * input - s * target)


@pytest.mark.parametrize(
    ("loss", "primitive", "count"),
    (
        (generalized, primitives.Power, 1),
        (mixture, primitives.Exp, 3),
        (scaled, primitives.ExpNonpositive, 1),
    ),
    ids=lambda x: getattr(x, "__name__", None),
)
def test_each_primitive_once(loss: Any, primitive: Any, count: int) -> None:
    """Value and both slopes share slow subexpressions."""
    kernel = loss._traced.kernel
    formulas = used(list(kernel.shared), list(kernel.results))
    functions = [node.func for f in formulas for node in sympy.preorder_traversal(f)]
    assert functions.count(primitive) == count


@fusedloss.pointwise_loss
def percentage(input, target):  # type: ignore[no-untyped-def]
    return fm.abs((input - target) / target)


@fusedloss.pointwise_loss
def two_differences(input, target, *, q=0.9):  # type: ignore[no-untyped-def]
    d = input - target
    return fm.maximum(q * d, (q - 1) * d) + fm.clamp(input * target, -1, 1) * fm.relu(input - 1)


@fusedloss.pointwise_loss
def neyman(input, target):  # type: ignore[no-untyped-def]
    return (input - target) ** 2 / input


@fusedloss.pointwise_loss
def product_of_powers(input, target):  # type: ignore[no-untyped-def]
    return input**2 * (1 + target**2) ** 3


@pytest.mark.parametrize(
    "loss",
    (percentage, two_differences, neyman, product_of_powers),
    ids=lambda loss: loss.__name__,
)
def test_exact_where_equal(fused: str, loss: Any) -> None:
    """Formulas are shared as written: an expression that is 0 at input == target stays 0 there."""
    x = torch.linspace(-2, 2, 1001, dtype=torch.float64)[torch.arange(1001) != 500]
    for y in (x.clone(), torch.nextafter(x, x - 1)):
        ours = gradients(loss, x, y, reduction="none")
        plain = gradients(loss.reference, x, y, reduction="none")
        for mine, right in zip(ours, plain, strict=True):
            assert_near(mine, right, loss.__name__)


@fusedloss.pointwise_loss
def guarded(input, target, *, a=3.0):  # type: ignore[no-untyped-def]
    gap = a * input - a * target
    return fm.where(gap > 0, fm.sqrt(gap) + input, -input)


def test_slope_is_of_the_branch_taken(fused: str) -> None:
    """A condition is rounded in the slope as it is in the value."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    y = torch.nextafter(x, x - 1)
    value, of_input, _ = gradients(guarded, x, y, reduction="none")
    other = value == -x
    assert 1000 < other.sum() < 99_000
    assert (of_input[other] == -1).all() and (of_input[~other] > 1).all()


# ---- one pass, threads, options ------------------------------------------------------------------


def test_one_pass(fused: str) -> None:
    """Whatever upstream gradients came before, the gradients are those of a fresh computation."""
    x, y = CASES[0].sample(torch.float32, (20_001 if INTERPRETED else 70_001,))
    for upstream in (1.0, 1.0, 3.0, 3.0, 0.1, 7.0, 0.2, 0.2, 0.2):
        ours = gradients(charbonnier, x, y, torch.tensor(upstream))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            fresh = gradients(charbonnier, x, y, torch.tensor(upstream))  # computed in backward
        for mine, right in zip(ours, fresh, strict=True):
            assert_same_bits(mine, right, f"upstream {upstream}")
    a, b = leaf(x), leaf(y)
    value = charbonnier(a, b)
    first = torch.autograd.grad(value, (a, b), retain_graph=True)
    second = torch.autograd.grad(value, (a, b))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other, "second backward")
        assert one.data_ptr() != other.data_ptr()


def test_written_in_forward(fused: str) -> None:
    """Forward writes both gradients, and backward hands them over."""
    x, y = CASES[0].sample(torch.float32, (3, 5))
    gradients(charbonnier, x, y)
    gradients(charbonnier, x, y)
    a, b = leaf(x.clone()), leaf(y)
    value = charbonnier(a, b)
    # Computed in backward, they would be those of the changed input.
    with torch.no_grad():
        a.data.zero_()
    for mine, right in zip(
        torch.autograd.grad(value, (a, b)), gradients(charbonnier, x, y)[1:], strict=True
    ):
        assert_same_bits(mine, right, "gradient")


def test_one_gradient_or_the_other(fused: str) -> None:
    """A gradient for one of the two arguments is the same as with both; the same bits on a second
    call, and the inputs are unchanged."""
    x, y = CASES[8].sample(torch.float32, (9001,))
    before = x.clone(), y.clone()
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "gamma": 1.5}
        value, *both = gradients(focal, x, y, **options)
        for _ in range(2):
            again = gradients(focal, x, y, **options)
            for one, other in zip((value, *both), again, strict=True):
                assert_same_bits(one, other, "repeated")
        for wanted, right in enumerate(both):
            pair = [x, y]
            pair[wanted] = leaf(pair[wanted])
            loss = focal(*pair, **options)
            assert_same_bits(loss.detach(), value, "value")
            (mine,) = torch.autograd.grad(loss, pair[wanted], torch.ones_like(loss))
            assert_same_bits(mine, right, f"gradient {wanted}")
    for tensor, as_it_was in zip((x, y), before, strict=True):
        assert_same_bits(tensor, as_it_was, "an input")


def test_same_bits_on_any_threads(compiled: str) -> None:
    x, y = CASES[3].sample(torch.float32, (2**17 + 3,))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(gradients(focal, x, y, torch.tensor(0.7)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(one, two, "threads")


@by_case
def test_same_bits_on_the_usual_way(fused: str, case: CustomCase) -> None:
    """Calls without weight and clip_grad and with default parameters may take a special path."""
    inputs = [torch.cat([t.flatten()] * 9) for t in case.sample(torch.float32)]
    usual = all_gradients(case.loss, inputs, reduction="sum")
    for options in ({"weight": torch.ones_like(inputs[0])}, {"clip_grad": 3e38}):
        other = all_gradients(case.loss, inputs, reduction="sum", **options)
        torch.testing.assert_close(usual[0], other[0], rtol=1e-6, atol=0)
        for one, two, what in zip(usual[1:], other[1:], names(case)[1:], strict=True):
            assert_same_bits(one, two, f"gradient of {what}, {options}")


def test_usual_numbers_are_no_others(fused: str) -> None:
    """With a default exponent, which kernels may know."""
    x, y = torch.linspace(-3, 3, 301), torch.rand(301)
    near = {g: gradients(focal, x, y, gamma=g)[1] for g in (1.9999, 2.0, 2.0001)}
    for g, got in near.items():
        expected = gradients(focal, x.double(), y.double(), gamma=g)[1]
        assert_near(got, expected, f"gamma = {g}")
    assert not torch.equal(near[2.0], near[2.0001])


def test_parameters_compile_nothing(fused: str, capfd: pytest.CaptureFixture[str]) -> None:
    charbonnier.compile(DEVICE)
    capfd.readouterr()
    x = torch.tensor([3.0])
    values = [charbonnier(x, 0 * x, eps=eps).item() for eps in (4, 0.0, 1e-20)]
    assert values == [5, 3, 3]
    assert not capfd.readouterr().err


def test_weight(fused: str) -> None:
    """A mean is over the weights; they broadcast; their own gradient is the reference's."""
    x, y = torch.zeros(2, 3), torch.ones(2, 3)
    w = torch.tensor([1.0, 2.0, 5.0])
    for call in (gaussian_kl, gaussian_kl.reference):
        assert call(y, x, weight=w).item() == 0.5
        assert call(y, x, weight=w, reduction="sum").item() == 8
        assert call(y, x, weight=w, reduction="none").tolist() == [[0.5, 1, 2.5]] * 2
        assert call(y, x, weight=0 * w).isnan()
    wanted = leaf(w)
    assert "weight" in str(fusedloss.explain(gaussian_kl, y, x, weight=wanted))
    gaussian_kl(y, x, weight=wanted, reduction="sum").backward()
    assert wanted.grad is not None and wanted.grad.tolist() == [1, 1, 1]


def test_clip_grad(fused: str) -> None:
    """It bounds the slope only, before weight and upstream gradient; the value stays."""
    x, y = torch.tensor([0.1, 5.0, -5.0]), torch.zeros(3)
    free = gradients(gaussian_kl, x, y, reduction="sum")
    value, of_input, _ = gradients(
        gaussian_kl,
        x,
        y,
        torch.tensor(3.0),
        reduction="sum",
        clip_grad=2.0,
        weight=2 * torch.ones(3),
    )
    assert value == 2 * free[0]
    torch.testing.assert_close(of_input, torch.tensor([0.6, 12.0, -12.0]))


def test_autocast(fused: str) -> None:
    x, y = torch.randn(9).bfloat16(), torch.randn(9)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert fusedloss.explain(charbonnier, x, y).fused
        value, of_input, of_target = gradients(charbonnier, x, y)
    assert (value.dtype, of_input.dtype, of_target.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    torch.testing.assert_close(value, charbonnier(x.float(), y))


# ---- the reference's calls -----------------------------------------------------------------------


def test_explained(fused: str) -> None:
    x = torch.randn(3)
    fused = fusedloss.explain
    assert fused(charbonnier, x, x).fused and fused(charbonnier.module(), leaf(x), leaf(x)).fused
    for reason, call in {
        "shapes differ": (x, x[:1]),
        "dtype torch.int64": (x.long(), x),
        "empty": (x[:0], x[:0]),
        "not all strided": (x.to_sparse(), x),
    }.items():
        assert reason in str(fused(charbonnier, *call))
    with fusedloss.backend("reference"):
        assert "was chosen" in str(fused(charbonnier, x, x))
        torch.testing.assert_close(
            charbonnier(x, 2 * x), (x**2 + 1e-6).sqrt().mean(), rtol=1e-6, atol=0
        )
    with pytest.warns(UserWarning, match=r"target of shape \(1,\) differs from input's \(3,\)"):
        value = charbonnier(x, x[:1], reduction="sum")
    torch.testing.assert_close(value, charbonnier(x, x[:1].expand(3), reduction="sum"))
    assert charbonnier(x[:0], x[:0]).isnan() and charbonnier(x[:0], x[:0], reduction="sum") == 0


def test_told_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch runs, with one warning."""
    monkeypatch.setattr(fusedloss.backends, "fused_on", {DEVICE: "compiled"})
    monkeypatch.setattr(fusedloss.backends, "candidates", lambda device: ("compiled",))
    monkeypatch.setitem(prepare._LOADERS, "pointwise_loss", {})

    @fusedloss.pointwise_loss
    def squared(input: Any, target: Any) -> Any:
        return (input - target) ** 2

    x, y = torch.randn(2, 3)
    reason = f"compiled: has no kernels of custom losses for {DEVICE} tensors"
    with pytest.warns(RuntimeWarning, match=f"squared runs on plain PyTorch.*: {reason}"):
        value = squared(x, y)
    torch.testing.assert_close(value, (x - y).square().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert squared(x, y) == value
    assert reason in str(fusedloss.explain(squared, x, y))


def test_next_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the first backend cannot compile a loss the next one takes it, and explain() says so; but
    not if the first was chosen by name."""

    def refuses(loss: Any) -> str:
        raise CannotCompile("no nvcc")

    monkeypatch.setattr(fusedloss.backends, "fused_on", {"cuda": "compiled"})
    loaders = {("compiled", "cuda"): refuses, ("triton", "cuda"): lambda loss: "its key"}
    monkeypatch.setitem(prepare._LOADERS, "pointwise_loss", loaders)
    loss = fusedloss.pointwise_loss(lambda input, target: input - target)
    order = ("compiled", "triton")
    monkeypatch.setattr(fusedloss.backends, "candidates", lambda device: order)
    assert prepare.prepared(loss._number, "cuda") == ("triton", "its key", "compiled: no nvcc")
    loss.compile("cuda")
    order = ("compiled",)
    with pytest.warns(RuntimeWarning, match="without fused kernels: compiled: no nvcc"):
        assert prepare.prepared(loss._number, "cuda") == ("", "", "compiled: no nvcc")
    with pytest.raises(RuntimeError, match="cannot be compiled: compiled: no nvcc"):
        loss.compile("cuda")


@pytest.mark.skipif(not EMULATED, reason="asks the emulator for other GPUs")
def test_kinds_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs the kernels that were compiled for it, or for an earlier model of its generation."""
    from own_losses import library

    extension = fusedloss.backends.extension
    assert extension is not None and extension.__file__ is not None
    against = Path(extension.__file__).resolve()

    def times(factor: int) -> Any:
        return fusedloss.pointwise_loss(lambda input, target: factor * input + target)

    for capability, factor in ((80, 1), (86, 2), (90, 3)):
        file = library(f"times{factor}", times(factor)._struct, against=against)
        extension.load_custom_kernels("by kind", 2, 1, capability, str(file))
    one, nothing = torch.ones(1), torch.zeros(1)

    def run(capability: int) -> float:
        monkeypatch.setenv("EMULATOR_CAPABILITY", str(capability))
        arguments = (one, nothing, None, [], "by kind", [math.inf], 0, 1, one.dtype, None)
        return float(torch.ops.fusedloss.loss(*arguments))

    assert [run(of) for of in (80, 86, 89, 90, 80)] == [1, 2, 2, 3, 1]
    for capability in (75, 100):
        with pytest.raises(RuntimeError, match="CUDA: no kernel image is available"):
            run(capability)


@pytest.mark.skipif(not EMULATED, reason="loads a library for the emulator")
def test_kernels_of_another_version(tmp_path: Path) -> None:
    from own_losses import library

    extension = fusedloss.backends.extension
    assert extension is not None and extension.__file__ is not None
    square = fusedloss.pointwise_loss(lambda input, target: (input - target) ** 2)
    whole = library("square", square._struct, against=Path(extension.__file__).resolve())
    other = tmp_path / "other.so"
    other.write_bytes(whole.read_bytes().replace(b"fusedloss_custom4", b"fusedloss_custom3"))
    with pytest.raises(RuntimeError, match="other.so does not load: named symbol not found"):
        extension.load_custom_kernels("other", 2, 1, 90, str(other))
    other.write_bytes(b"no library")
    with pytest.raises(RuntimeError, match="other.so does not load: device kernel image"):
        extension.load_custom_kernels("other", 2, 1, 90, str(other))


def test_transforms(backend: str) -> None:
    x, y = CASES[0].sample(torch.float64, (4, 3))
    expected = gradients(tukey, x, y, reduction="sum", clip_grad=0.5)[1]
    for options in ({}, {"clip_grad": 0.5}):
        expected = gradients(tukey, x, y, reduction="sum", **options)[1]

        def total(a: Tensor, b: Tensor, options: Any = options) -> Tensor:
            return tukey(a, b, reduction="sum", **options)

        torch.testing.assert_close(torch.func.grad(total)(x, y), expected)
        rows = torch.func.vmap(torch.func.grad(total))(x, y)
        torch.testing.assert_close(rows, expected)
        _, tangent = torch.func.jvp(lambda a: total(a, y), (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, expected.sum())
        a = leaf(x)
        (first,) = torch.autograd.grad(total(a, y), a, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), a)
        direct = torch.func.hessian(total)(x, y).sum((0, 1))
        torch.testing.assert_close(second, direct)


@pytest.mark.slow
@pytest.mark.interpret_all
def test_torch_compile(fused: str) -> None:
    """The graph is whole, the kernel is compiled while tracing, and the result is the same."""

    @fusedloss.pointwise_loss
    def fresh(input, target, *, scale=2.0):  # type: ignore[no-untyped-def]
        return fm.log1p(scale * (input - target) ** 2)

    criterion = fresh.module(scale=3.0, clip_grad=0.4)
    x, y = CASES[0].sample(torch.float32, (65,))

    def step(a: Tensor, b: Tensor) -> Tensor:
        return criterion(2 * a, b) + fresh(a, b * 2, reduction="sum")

    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mine, right in zip(gradients(compiled_step, x, y), gradients(step, x, y), strict=True):
        torch.testing.assert_close(mine, right)


def test_operator(fused: str) -> None:
    """Schema, shape-only kernels and autograd registration hold."""
    x, y = (leaf(t) for t in CASES[3].sample(torch.float32, (5, 3)))
    focal(x, y)
    _, loss, _ = prepare.prepared(focal._number, DEVICE)
    weight, parameters = torch.rand(5, 3), [2.0, 0.25, math.inf]
    for reduction in (0, 1):
        torch.library.opcheck(
            operators().loss.default,
            (x, y, weight, [], loss, parameters, 0, reduction, torch.float32, None),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
    with pytest.raises(ValueError, match="has 3 parameters, and the call 1"):
        operators().loss(x, y, None, [], loss, [2.0], 0, 1, torch.float32, None)
    with pytest.raises(RuntimeError, match="no loss 'none' is known"):
        operators().loss(x, y, None, [], "none", [], 0, 1, torch.float32, None)


# ---- the object ----------------------------------------------------------------------------------


def test_module(backend: str) -> None:
    weight = torch.rand(5)
    criterion = quantile.module(q=0.9, reduction="sum", weight=weight, clip_grad=3)
    assert repr(criterion) == (f"quantile({quantile.formula}, q=0.9, reduction='sum', clip_grad=3)")
    x, y = torch.randn(5), torch.randn(5)
    expected = quantile(x, y, q=0.9, reduction="sum", weight=weight, clip_grad=3)
    for other in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.testing.assert_close(other(x, y), expected)
        assert other.loss is quantile
    assert list(criterion.state_dict()) == ["weight"]
    with pytest.raises(TypeError, match="no parameter 'p'; it has q"):
        quantile.module(p=0.1)


def scaled(input: Any, target: Any, *, scale: Any = 1.0, shift: Any = 0.0) -> Any:
    """A definition that is not decorated."""
    return fm.abs(scale * (input - target) + shift)


class Scaled:
    """A definition by an object."""

    def __call__(self, input: Any, target: Any, *, scale: Any = 1.0, shift: Any = 0.0) -> Any:
        return scaled(input, target, scale=scale, shift=shift)


@pytest.mark.parametrize("name", ["", "///", 3, 'a\\\n#error \'"""/../*?\0\u03bb' + "x" * 300])
def test_any_name(name: Any, fused: str) -> None:
    """The name reaches neither a source nor a path."""

    class Definition:
        __name__ = name

        def __call__(self, input: Any, target: Any) -> Any:
            return (input - target) ** 4

    loss = fusedloss.pointwise_loss(Definition())
    x, y = torch.tensor([3.0]), torch.tensor([1.0])
    assert loss(x, y) == 16 and fusedloss.explain(loss, x, y).fused
    key = prepare.prepared(loss._number, DEVICE)[1]
    assert re.fullmatch(r"\w{1,40}-[\w.-]+", key, re.ASCII), key
    assert loss._struct.splitlines()[1].startswith("struct Loss")
    assert loss.__name__ == (name if isinstance(name, str) else "Definition")


def power(exponent: Any, input: Any, target: Any) -> Any:
    return fm.abs(input - target) ** exponent


def test_definitions_that_are_no_functions(fused: str) -> None:
    """They are identified by what they compute, in every process, and work like functions."""
    x, y = torch.randn(2, 5)

    def key(definition: Any) -> str:
        loss = fusedloss.pointwise_loss(definition)
        torch.testing.assert_close(loss(x, y, scale=3), (3 * (x - y)).abs().mean())
        assert fusedloss.explain(loss, x, y).fused
        return prepare.prepared(loss._number, DEVICE)[1]

    partial = functools.partial(scaled, scale=2)
    assert key(scaled) == key(partial) == key(functools.partial(partial, shift=0.0))
    assert key(scaled).startswith("scaled-")
    assert key(Scaled()).startswith("Scaled-") and key(Scaled()) == key(Scaled())
    of_lambda = [
        lambda input, target, *, scale=1: fm.abs(scale * (input - target)) for _ in range(2)
    ]
    assert key(of_lambda[0]) == key(of_lambda[1])
    assert key(of_lambda[0]).startswith("lambda-")
    powers = [fusedloss.pointwise_loss(functools.partial(power, n)) for n in (2, 3, 2)]
    assert {loss._traced.identifier for loss in powers} == {"power"}
    two, three, again = (loss._struct for loss in powers)
    assert two == again != three

    loss = fusedloss.pointwise_loss(partial)
    assert (loss.__name__, loss.__module__, loss.__doc__) == (
        *("scaled", __name__),
        "A definition that is not decorated.",
    )
    for made in (loss, fusedloss.pointwise_loss(scaled), fusedloss.pointwise_loss(Scaled())):
        assert copy.copy(made) is copy.deepcopy(made) is made
        copied = pickle.loads(pickle.dumps(made))
        torch.testing.assert_close(copied(x, y), made(x, y))
        assert repr(copied) == repr(made)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(fusedloss.pointwise_loss(of_lambda[0]))


def test_loss_object() -> None:
    assert pickle.loads(pickle.dumps(charbonnier)) is charbonnier
    assert repr(charbonnier) == (
        "<fusedloss.pointwise_loss charbonnier(input, target, *, eps=0.001) = "
        "sqrt(eps**2 + (input - target)**2)>"
    )
    assert charbonnier.slopes[0] == "(input - target)/sqrt(eps**2 + (input - target)**2)"
    assert gaussian_kl.__doc__ is not None and gaussian_kl.__doc__.startswith("The Kullback")


def test_check(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def report(loss: Any, **parameters: float) -> str:
        found = loss.check(**parameters)
        assert found.ok, found
        return str(found)

    assert "agrees with finite differences at 2000 random points" in report(charbonnier)
    assert "kink: at" in report(quantile, q=0.9)
    assert "from -0.9 to 0.1" in report(quantile, q=0.9)
    assert "vanishes as input goes to +inf" in report(tukey)
    assert "grows without bound as input goes to -inf" in report(gaussian_kl)

    @fusedloss.pointwise_loss
    def stepped(input, target):  # type: ignore[no-untyped-def]
        return fm.where(input > target, fm.log(input), 2.0)

    text = report(stepped)
    assert "jump: at input - target = 0" in text and "domain: the value is not finite" in text
    root = one_of([lambda x, y: fm.sqrt(fm.abs(x - y)), lambda x, y: fm.sqrt(fm.relu(x))])
    assert not root.check().ok
    assert "is nan, and the value 0" in root.check().errors[0]
    assert root.check(which=1).ok
    monkeypatch.setattr(charbonnier, "_slopes", lambda inputs, values: inputs)
    report_of_wrong = charbonnier.check()
    assert not report_of_wrong.ok and "finite differences say" in str(report_of_wrong)


def test_plot(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "focal.png"
    focal.plot(path, gamma=1.0)
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- what is refused -----------------------------------------------------------------------------


def definitions() -> dict[str, tuple[Any, type[Exception], str]]:
    """A wrong definition, its error, and the message."""

    def with_if(input, target):  # type: ignore[no-untyped-def]
        if input > target:
            return input
        return 2 * target

    def keyword(input, target, *, weight=1.0):  # type: ignore[no-untyped-def]
        return input * weight

    def text_default(input, target, *, eps="small"):  # type: ignore[no-untyped-def]
        return input

    def huge_default(input, target, *, eps=10**400):  # type: ignore[no-untyped-def]
        return input

    def nested(depth: int) -> Any:
        def loss(input, target):  # type: ignore[no-untyped-def]
            for _ in range(depth):
                input = fm.sigmoid(input)
            return input

        return loss

    return {
        "no argument": (lambda: 1.0, TypeError, "takes 1 to 8 tensors, not 0 of them"),
        "a default": (lambda input, target, eps=1: input, TypeError, "behind a [*]"),
        "args": (lambda input, target, *args: input, TypeError, "name every parameter"),
        "not a function": (3, TypeError, "takes a function"),
        "keyword": (keyword, ValueError, "'weight' already"),
        "default": (text_default, TypeError, "default of 'eps' must be a number, not 'small'"),
        "None": (lambda input, target: None, TypeError, "write return"),
        "tuple": (lambda input, target: (input, target), TypeError, "returns 2 values"),
        "condition": (lambda input, target: input > target, TypeError, "where"),
        "constant": (lambda input, target: fm.exp(2), ValueError, "nothing to learn"),
        "torch": (lambda input, target: torch.exp(input), TypeError, "write fusedloss.math.exp"),
        "tensor": (lambda input, target: input * torch.ones(2), TypeError, "parameters"),
        "method": (lambda input, target: input.abs(), TypeError, "write fusedloss.math.abs"),
        "reduction": (lambda input, target: (input - target).mean(), TypeError, "one element's"),
        "math": (lambda input, target: math.exp(input), TypeError, "math or numpy"),
        "if": (with_if, TypeError, "fusedloss.math.where"),
        "max": (lambda input, target: max(input, target), TypeError, "maximum"),
        "chain": (lambda input, target: fm.where(0 < input < 1, 1, 2), TypeError, "&"),
        "bool": (lambda input, target: fm.where(True, input, 2), TypeError, "condition of symbols"),
        "exchanged": (lambda target, input: input, ValueError, "input comes first, then target"),
        "huge default": (
            huge_default,
            ValueError,
            "huge_default: eps is beyond the largest float64",
        ),
        "huge number": (lambda input, target: input * 10**400, ValueError, "1.00E.400 is beyond"),
        "deep": (
            nested(400),
            ValueError,
            "loss nests too many functions and operators: at most 64",
        ),
        "long": (nested(12), ValueError, "loss nests too many functions"),
        "unknown primitive": (
            lambda input, target: fm.atan(input),
            TypeError,
            "fusedloss.math has no atan; it has abs, at, clamp",
        ),
        "unknown torch primitive": (
            lambda input, target: torch.atan(input),
            TypeError,
            r"torch's atan\(\) does not take symbols: fusedloss.math has no atan; it has abs",
        ),
        "row": (lambda input, target: fm.sum(input), TypeError, "takes a row of classes"),
        "torch's row": (
            lambda input, target: -target * torch.nn.functional.log_softmax(input, -1),
            TypeError,
            r"torch's log_softmax\(\) does not take symbols: in a row_loss write fusedloss.math",
        ),
        "subscript": (
            lambda input, target: input[..., 0] - target,
            TypeError,
            "takes a slice of a symbol",
        ),
        "tensor first": (lambda input, target: torch.ones(2) * input, TypeError, "parameters"),
        "numpy": (lambda input, target: numpy.exp(input), TypeError, "math or numpy"),
        "complex": (lambda input, target: input * (-1) ** 0.5, ValueError, "no real number"),
    }


@pytest.mark.parametrize("name", definitions())
def test_bad_definition(name: str) -> None:
    function, error, says = definitions()[name]
    with pytest.raises(error, match=says):
        fusedloss.pointwise_loss(function)


def test_bad_call(backend: str) -> None:
    x = torch.randn(3)
    with pytest.raises(TypeError, match="no parameter 'epsilon'; it has eps, reduction"):
        charbonnier(x, x, epsilon=1.0)
    for eps, says in (
        (torch.tensor(1.0), r"a tensor of one number: pass tensor.item\(\)"),
        (torch.ones(3), r"a tensor of shape \(3,\): a parameter is one number for the whole call"),
        (torch.nn.Parameter(torch.ones(1)), "a tensor that requires a gradient.*input or target"),
    ):
        with pytest.raises(TypeError, match=rf"eps must be a number, not {says}") as raised:
            charbonnier(x, x, eps=eps)
        assert "1." not in str(raised.value)  # none of its numbers
    with pytest.raises(ValueError, match="charbonnier: eps is beyond the largest float64"):
        charbonnier(x, x, eps=10**400)
    for call in (charbonnier, charbonnier.reference, charbonnier.module()):
        with pytest.raises(TypeError, match=r"target must be a tensor, not 1.0: torch.full_like"):
            call(x, 1.0)
        with pytest.raises(TypeError, match=r"input must be a tensor, not \[1.0, 2.0\]"):
            call([1.0, 2.0], x)
    with pytest.raises(ValueError, match="total is not a valid value for reduction"):
        charbonnier(x, x, reduction="total")
    with pytest.raises(ValueError, match="clip_grad must be positive, not 0"):
        charbonnier(x, x, clip_grad=0)
    with pytest.raises(ValueError, match=r"\(2,\) does not broadcast to input's \(3,\)"):
        charbonnier(x, x, weight=torch.ones(2))

    @fusedloss.pointwise_loss
    def demanding(input, target, *, scale):  # type: ignore[no-untyped-def]
        return scale * input

    with pytest.raises(TypeError, match="needs its parameter 'scale'"):
        demanding(x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError):
            charbonnier(x, torch.randn(2))


def test_need_compiled() -> None:
    need("compiled")
    charbonnier.compile(DEVICE)
    with pytest.raises(RuntimeError, match="cannot be compiled: .*meta"):
        charbonnier.compile("meta")
