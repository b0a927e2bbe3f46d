"""The CPU engine of custom row losses, with structs written by hand, against formulas in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import need
from fusedloss.custom import building
from helpers import assert_same_bits, threads

ELEMENT, LABEL, PER_ROW, PER_CLASS = "kElement", "kLabel", "kPerRow", "kPerClass"


@dataclass(frozen=True)
class Loss:
    """A struct as math/custom_rows.h wants it, and the same loss in torch, of tensors whose last
    dimension is that of the classes."""

    name: str
    formula: Callable[..., Tensor]
    kinds: Sequence[str]
    levels: Sequence[tuple[int, int]]  # maxima and sums
    rows: Sequence[str]  # what follows from no level, and from each of them
    terms: Sequence[str]
    gradient: str
    other_gradients: str = ""
    numbers: int = 0
    value: int = 0
    kept: Sequence[tuple[int, int]] = ()
    at_label: Sequence[int] = ()
    of_row: Sequence[int] = ()
    peak: str = ""  # of level 0's first maximum
    parameters: Sequence[float] = ()
    size: Callable[..., Tensor] | None = None  # what errors are relative to, if not the value

    @property
    def struct(self) -> str:
        def array(what: str, items: Sequence[Any], none: str = "-1") -> str:
            return f"  static constexpr {what}[] = {{{', '.join(map(str, items)) or none}}};\n"

        def by_level(codes: Sequence[str], first: int) -> str:
            return "".join(
                f"    if constexpr (kLevel == {level}) {{ {code} }}\n"
                for level, code in enumerate(codes, first)
            )

        pair = "{{{}, {}}}".format
        parameters = len(self.parameters)
        types = "const T* x, const T* w, const Row& r"
        return (
            f"struct Loss : CustomRows<{max(1, parameters)}> {{\n"
            + array("Kind kKinds", [f"Kind::{kind}" for kind in self.kinds])
            + array("int kMaxima", [maxima for maxima, _ in self.levels])
            + array("int kSums", [sums for _, sums in self.levels])
            + array("Kept kKept", [pair(*kept) for kept in self.kept], "{}")
            + array("int kAtLabel", self.at_label)
            + array("int kOfRow", self.of_row)
            + array("Peak kPeaks", ["{0, 0}"] if self.peak else [], "{}")
            + array("int kAuxiliary", [])
            + f"  static constexpr int kParameters = {parameters}, kLevels = {len(self.levels)},\n"
            f"      kKeptCount = {len(self.kept)}, kNumbers = {self.numbers}, kValue = {self.value},\n"
            f"      kPeakCount = {int(bool(self.peak))}, kAuxiliaryCount = 0;\n"
            "  FUSEDLOSS_HD static void prepare(const double* parameters, double* constants) {\n"
            f"    for (int i = 0; i < {parameters}; ++i) constants[i] = parameters[i];\n  }}\n"
            f"  template <int kLevel, class N> FUSEDLOSS_HD void row(N* r) const {{\n"
            f"{by_level(self.rows, -1)}  }}\n"
            f"  template <int kLevel, class T, class Row>\n"
            f"  FUSEDLOSS_HD void terms({types}, T* kept, T* out) const {{\n"
            f"{by_level(self.terms, 0)}  }}\n"
            "  template <bool kAll, class T, class Row>\n"
            f"  FUSEDLOSS_HD void gradients({types}, const T* kept, T* out) const {{\n"
            f"    {self.gradient}\n    if constexpr (kAll) {{ {self.other_gradients} }}\n  }}\n"
            "  template <int kPeak, class T, class Row>\n"
            f"  FUSEDLOSS_HD void at_peak({types}, T* out) const {{ {self.peak} }}\n"
            "};\n"
        )


def logp_at(x: Tensor, label: Tensor) -> Tensor:
    return x.log_softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1)


def distillation(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    q = (teacher / t).softmax(-1)
    ratio = (teacher / t).log_softmax(-1) - (student / t).log_softmax(-1)
    return t * t * (q * ratio.masked_fill(q == 0, 0)).sum(-1)


def triplet(*inputs: Any, sign: int = -1) -> Tensor:
    anchor, positive, negative, margin = inputs
    near, far = (((anchor - other) ** 2).sum(-1) for other in (positive, negative))
    return (near + sign * far + margin).clamp_min(0)


def grpo(x: Tensor, label: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    return -(logp_at(x, label) - old).exp() * advantage


def weighted(x: Tensor, label: Tensor, weight: Tensor, eps: float) -> Tensor:
    return eps * (weight * x).sum(-1) - weight[label] * logp_at(x, label)


def hinge(x: Tensor, label: Tensor) -> Tensor:
    first = (x == x.amax(-1, True)).to(torch.uint8).argmax(-1, True)
    gap = (x.gather(-1, first) - x.gather(-1, label.unsqueeze(-1))).squeeze(-1)
    return (1.5 + gap).clamp_min(0) + (x**2).mean(-1)


LOSSES = [
    Loss(
        "logsumexp",
        lambda x: x.logsumexp(-1),
        [ELEMENT],
        [(1, 0), (0, 1)],
        rows=["", "r[4] = origin(r[2]);", "r[5] = log(r[3]) + r[4]; r[6] = r[0] / r[3];"],
        terms=["out[0] = x[0];", "out[0] = kept[0] = exp(x[0] - r(4));"],
        gradient="out[0] = kept[0] * r(6);",
        numbers=7,
        value=5,
        kept=[(1, 2)],
    ),
    Loss(
        "distillation",
        distillation,
        [ELEMENT, ELEMENT],
        [(2, 0), (0, 3)],
        rows=[
            "",
            "r[7] = origin(r[2]); r[8] = origin(r[3]);",
            (
                "const N t(constants[0]), q = N(1) / r[5];"
                "r[9] = t * t * (r[6] * q + (log(r[4]) - log(r[5])));"
                "r[10] = r[0] * t / r[4]; r[12] = r[0] * t * q; r[11] = N(0) - r[12];"
                "r[13] = N(0) - r[6] * q;"
            ),
        ],
        terms=[
            "const T c(1 / constants[0]); out[0] = x[0] * c; out[1] = x[1] * c;",
            (
                "const T c(1 / constants[0]), s = x[0] * c - r(7), t = x[1] * c - r(8);"
                "out[0] = kept[0] = exp(s); out[1] = kept[1] = exp(t);"
                "out[2] = weighted(kept[1], t - s);"
            ),
        ],
        gradient="out[0] = kept[0] * r(10) + kept[1] * r(11);",
        other_gradients="const T c(1 / constants[0]);"
        "const T gap = (x[1] * c - r(8)) - (x[0] * c - r(7));"
        "out[1] = r(12) * weighted(kept[1], gap + r(13));",
        numbers=14,
        value=9,
        kept=[(1, 2), (1, 2)],
        parameters=[2.0],
    ),
    Loss(
        "triplet",
        triplet,
        [ELEMENT, ELEMENT, ELEMENT],
        [(0, 2)],
        rows=[
            "",
            (
                "r[4] = maximum(r[2] - r[3] + N(constants[0]), N(0));"
                "r[5] = select(r[4] > N(0), r[0] + r[0], N(0));"
            ),
        ],
        terms=["const T a = x[0] - x[1], b = x[0] - x[2]; out[0] = a * a; out[1] = b * b;"],
        gradient="out[0] = r(5) * (x[2] - x[1]);",
        other_gradients="out[1] = r(5) * (x[1] - x[0]); out[2] = r(5) * (x[0] - x[2]);",
        numbers=6,
        value=4,
        parameters=[4.0],
        size=partial(triplet, sign=1),
    ),
    Loss(
        "cross_entropy",
        lambda x, label: -logp_at(x, label),
        [ELEMENT, LABEL],
        [(1, 0), (0, 1)],
        rows=[
            "",
            "r[5] = origin(r[3]);",
            (
                "const N gap = r[2] - r[5], e = exp(gap), t = r[4] + e;"
                "r[6] = log1p(r[4] + (e - N(1))) - gap; r[7] = r[0] / t; r[8] = N(0) - r[0] * (r[4] / t);"
            ),
        ],
        terms=["out[0] = x[0];", "out[0] = kept[0] = exp(x[0] - r(5));"],
        gradient="out[0] = kept[0] * r(7);",
        numbers=9,
        value=6,
        kept=[(1, 2)],
        at_label=[8],
    ),
    Loss(
        "grpo",
        grpo,
        [ELEMENT, LABEL, PER_ROW, PER_ROW],
        [(1, 0), (0, 1)],
        rows=[
            "",
            "r[7] = origin(r[5]);",
            (
                "const N gap = r[4] - r[7], e = exp(gap), z = r[6] + e, ratio = exp(gap - log(z) - r[2]);"
                "r[8] = N(0) - ratio * r[3]; const N slope = r[0] * r[8];"
                "r[9] = N(0) - slope / z; r[10] = slope * (r[6] / z);"
                "r[11] = N(0) - slope; r[12] = N(0) - r[0] * ratio;"
            ),
        ],
        terms=["out[0] = x[0];", "out[0] = kept[0] = exp(x[0] - r(7));"],
        gradient="out[0] = kept[0] * r(9);",
        numbers=13,
        value=8,
        kept=[(1, 2)],
        at_label=[10],
        of_row=[11, 12],
    ),
    Loss(
        "weighted",
        weighted,
        [ELEMENT, LABEL, PER_CLASS],
        [(1, 1), (0, 1)],
        rows=[
            "",
            "r[7] = origin(r[4]);",
            (
                "const N eps(constants[0]), gap = r[2] - r[7], e = exp(gap), z = r[6] + e;"
                "r[8] = eps * (r[5] + r[3] * r[2]) + r[3] * (log(z) - gap); r[9] = r[0] * r[3] / z;"
                "r[10] = r[0] * r[3] * (eps - r[6] / z); r[11] = r[0] * eps;"
            ),
        ],
        terms=["out[0] = x[0]; out[1] = w[0] * x[0];", "out[0] = kept[0] = exp(x[0] - r(7));"],
        gradient="out[0] = kept[0] * r(9) + w[0] * r(11);",
        numbers=12,
        value=8,
        kept=[(1, 2)],
        at_label=[10],
        parameters=[0.25],
    ),
    Loss(
        "hinge",
        hinge,
        [ELEMENT, LABEL],
        [(1, 1)],
        rows=[
            "",
            (
                "const N gap = N(1.5) + (r[3] - r[2]), n = N(1) / r[1], twice = (r[0] + r[0]) * n;"
                "r[5] = maximum(gap, N(0)) + (r[4] + r[2] * r[2]) * n;"
                "r[8] = select(gap > N(0), r[0], N(0)); r[6] = r[2] * twice - r[8]; r[7] = twice;"
            ),
        ],
        terms=["out[0] = x[0]; out[1] = x[0] * x[0];"],
        gradient="out[0] = x[0] * r(7);",
        numbers=9,
        value=5,
        at_label=[6],
        peak="out[0] = r(8);",
    ),
]
NAMES = [loss.name for loss in LOSSES]


@functools.cache
def loaded(name: str) -> str:
    """The name under which the loss is known to the operators."""
    need("compiled")
    import fusedloss._C as extension

    loss = LOSSES[NAMES.index(name)]
    library = building.cpu_library(loss.name, loss.struct, building.CPU_ROWS)
    library.load(partial(extension.load_custom, library.key))
    return library.key


def class_dim(shape: Sequence[int]) -> int:
    return 1 if len(shape) > 1 else 0


def rows_of(shape: Sequence[int]) -> list[int]:
    return [n for d, n in enumerate(shape) if d != class_dim(shape)]


# How an element input of a shape lies in memory.
def contiguous(shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape)


def moved(shape: Sequence[int]) -> Tensor:
    """Its classes were the last dimension."""
    return torch.randn(*rows_of(shape), shape[class_dim(shape)]).movedim(-1, class_dim(shape))


def strided(shape: Sequence[int]) -> Tensor:
    """Every other one of more."""
    return torch.randn(*(2 * n for n in shape))[tuple(slice(None, None, 2) for _ in shape)]


LAYOUTS = [contiguous, moved, strided]
SHAPES = [
    *((1,), (7,), (1000,), (5, 1), (3, 2), (40, 7), (9, 150), (300, 21), (67, 129), (9, 1000)),
    *((2, 5000), (40, 5000), (3, 5, 6), (2, 7, 3, 19), (3, 200, 20), (2, 1, 40), (1, 33, 300)),
]
TOLERANCES = {  # of the gradients' and the values' own rounding, in units of the largest
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def draw(
    loss: Loss, shape: Sequence[int], dtype: torch.dtype, layout: Any = contiguous
) -> list[Tensor]:
    rows, classes = rows_of(shape), shape[class_dim(shape)]
    drawn = {
        ELEMENT: lambda: layout(shape).to(dtype) if dtype.is_floating_point else None,
        LABEL: lambda: torch.randint(classes, rows),
        PER_ROW: lambda: torch.randn(rows).to(dtype),
        PER_CLASS: lambda: torch.rand(classes).to(dtype),
    }
    inputs = [drawn[kind]() for kind in loss.kinds]
    differentiable = [kind in (ELEMENT, PER_ROW) for kind in loss.kinds]
    return [t.requires_grad_(d) for t, d in zip(inputs, differentiable, strict=True)]


def call(
    loss: Loss,
    inputs: Sequence[Tensor],
    reduction: str = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    first, second, *more = [*inputs, inputs[0]] if len(inputs) == 1 else inputs
    return torch.ops.fusedloss.loss(
        *(first, second, weight, more, loaded(loss.name), list(loss.parameters), ignore_index),
        *(["none", "mean", "sum"].index(reduction), first.dtype, None),
    )


def expected(
    loss: Loss,
    inputs: Sequence[Tensor],
    reduction: str = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, float, list[Tensor]]:
    """The same in float64, what its error is relative to, and copies of the inputs that it was
    computed from."""
    copies = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    arguments = []
    counts = torch.ones(rows_of(inputs[0].shape), dtype=torch.bool)
    for kind, copy, t in zip(loss.kinds, copies, inputs, strict=True):
        copy.requires_grad_(t.requires_grad)
        if kind == LABEL:
            counts = copy != ignore_index
        moved = copy.movedim(class_dim(copy.shape), -1) if kind == ELEMENT else copy
        arguments.append(moved.where(counts, 0) if kind == LABEL else moved)
    weights = counts.double() if weight is None else counts * weight.double()

    def reduced(rows: Tensor) -> Tensor:
        rows = weights * rows.where(counts, 0)
        divisor = weights.sum() if reduction == "mean" else 1
        return rows if reduction == "none" else rows.sum() / divisor

    values = loss.formula(*arguments, *loss.parameters)
    size = (loss.size(*arguments, *loss.parameters) if loss.size else values).detach().abs()
    return reduced(values), reduced(size).nan_to_num(0).max().item(), copies


def assert_right(
    loss: Loss, inputs: Sequence[Tensor], what: str, *, upstream: float | None = 1.0, **options: Any
) -> None:
    ours, (truth, size, copies) = call(loss, inputs, **options), expected(loss, inputs, **options)
    torch.manual_seed(5)
    grad = torch.randn_like(truth) if upstream is None else torch.full_like(truth, upstream)
    grad = grad.to(ours.dtype)
    gradients = torch.autograd.grad(ours, [t for t in inputs if t.requires_grad], grad)
    true = torch.autograd.grad(truth, [t for t in copies if t.requires_grad], grad.double())
    for i, (result, right) in enumerate(zip((ours, *gradients), (truth, *true), strict=True)):
        largest = right.nan_to_num(0).abs().max().item() if i else size
        torch.testing.assert_close(
            result.double(),
            right,
            rtol=0,
            atol=TOLERANCES[result.dtype] * largest,
            equal_nan=True,
            msg=partial("{}, {}: {}".format, what, f"gradient {i - 1}" if i else "value"),
        )


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str) -> None:
    loss = LOSSES[NAMES.index(name)]
    for shape in SHAPES:
        for layout in LAYOUTS:
            torch.manual_seed(len(shape) + shape[0])
            inputs = draw(loss, shape, torch.float32, layout)
            for reduction, upstream in (("mean", 1.0), ("sum", -0.3), ("none", None)):
                what = f"{shape} {layout.__name__} {reduction}"
                assert_right(loss, inputs, what, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    loss = LOSSES[NAMES.index(name)]
    for shape in [(7,), (40, 7), (3, 150), (300, 21), (9, 1000), (2, 21, 33), (3, 200, 5)]:
        for layout in LAYOUTS:
            torch.manual_seed(shape[0])
            inputs = draw(loss, shape, dtype, layout)
            assert_right(
                loss, inputs, f"{shape} {layout.__name__}", reduction="none", upstream=None
            )


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_ignored_rows(name: str) -> None:
    """A row's weight, rows that do not count, and any upstream gradient, whatever was predicted."""
    loss = LOSSES[NAMES.index(name)]
    for shape in [(1,), (40, 7), (5, 300), (2, 7, 33), (2, 300, 20)]:
        torch.manual_seed(shape[0])
        inputs = draw(loss, shape, torch.float32)
        for ignored in (-100, 0, int(inputs[1].flatten()[-1]) if LABEL in loss.kinds else 1):
            for weight in (None, torch.rand(rows_of(shape)), torch.rand(rows_of(shape)).double()):
                for reduction, upstream in (
                    ("mean", 2.0),
                    ("mean", 2.0),
                    ("sum", 1.0),
                    ("none", None),
                ):
                    assert_right(
                        loss,
                        inputs,
                        f"{shape} {ignored} {weight is None} {reduction}",
                        upstream=upstream,
                        reduction=reduction,
                        weight=weight,
                        ignore_index=ignored,
                    )


@pytest.mark.parametrize("shape", [(3, 1000), (40, 7), (40, 2), (2, 19, 33)], ids=str)
def test_labels(shape: Sequence[int]) -> None:
    """Every class as the label: the last one, one in an incomplete register, and one that is sure."""
    for name in ("cross_entropy", "weighted", "hinge"):
        loss = LOSSES[NAMES.index(name)]
        classes = shape[class_dim(shape)]
        for at in {0, 1, 15, 16, 17, 63, 64, classes - 17, classes - 2, classes - 1} & {
            *range(classes)
        }:
            torch.manual_seed(at)
            inputs = draw(loss, shape, torch.float32)
            inputs[1].fill_(at)
            assert_right(loss, inputs, f"{name} {at}", reduction="none", upstream=None)
            if loss.peak:
                continue  # its gradient there is a difference of large numbers
            with torch.no_grad():
                inputs[0].select(class_dim(shape), at).add_(20)
            assert_right(loss, inputs, f"{name} {at}, sure", reduction="none", upstream=None)


@pytest.mark.parametrize("shape", [(4, 1000), (40, 9), (2, 9, 33)], ids=str)
def test_minus_infinity(shape: Sequence[int]) -> None:
    """Classes that are masked out have no part in a row, and no gradient."""
    for name in ("logsumexp", "distillation", "cross_entropy", "grpo"):
        loss = LOSSES[NAMES.index(name)]
        inputs = draw(loss, shape, torch.float32)
        dim = class_dim(shape)
        with torch.no_grad():
            for kind, t in zip(loss.kinds, inputs, strict=True):
                if kind == ELEMENT and (name != "distillation" or t is inputs[1]):
                    t.narrow(dim, 0, 5).fill_(-torch.inf)
                if kind == LABEL:
                    t.clamp_(5)
        assert_right(loss, inputs, name, reduction="sum")


def test_nan_is_seen() -> None:
    loss = LOSSES[NAMES.index("hinge")]
    for shape in ((3, 1000), (40, 7)):
        inputs = draw(loss, shape, torch.float32)
        with torch.no_grad():
            inputs[0][1, 3] = torch.nan
        values = call(loss, inputs, "none")
        assert values[1].isnan()
        assert values.isnan().sum() == 1


def test_ties() -> None:
    """The gradient of a maximum goes to its first position alone."""
    loss = LOSSES[NAMES.index("hinge")]
    for shape in ((3, 1000), (40, 40)):
        inputs = draw(loss, shape, torch.float32)
        with torch.no_grad():
            inputs[0][:, 5::7] = 6.0
        assert_right(loss, inputs, str(shape), reduction="none", upstream=None)


@pytest.mark.parametrize("name", NAMES)
def test_threads(name: str) -> None:
    """Two threads give the bits of one, and so do two calls."""
    loss = LOSSES[NAMES.index(name)]
    for shape in ((300, 1000), (9, 21, 999)):
        inputs = draw(loss, shape, torch.float32)
        results = []
        for count in (1, 2, 2):
            with threads(count):
                value = call(loss, inputs)
                wanted = [t for t in inputs if t.requires_grad]
                results.append([value, *torch.autograd.grad(value, wanted)])
        for other in results[1:]:
            for ours, same in zip(results[0], other, strict=True):
                assert_same_bits(ours, same, name)


def test_only_some_gradients() -> None:
    """Any of the inputs may want one."""
    loss = LOSSES[NAMES.index("triplet")]
    for shape in ((9, 1000), (40, 7)):
        inputs = draw(loss, shape, torch.float32)
        for wanted in range(1, 8):
            for i, t in enumerate(inputs):
                t.requires_grad_(bool(wanted >> i & 1))
            assert_right(loss, inputs, f"{shape} {wanted}")
    loss = LOSSES[NAMES.index("grpo")]
    inputs = draw(loss, (40, 7), torch.float32)
    inputs[0].requires_grad_(False)
    assert_right(loss, inputs, "of rows alone")


def test_no_rows() -> None:
    loss = LOSSES[NAMES.index("cross_entropy")]
    inputs = [torch.randn(0, 5), torch.empty(0, dtype=torch.int64)]
    assert call(loss, inputs).isnan()
    assert call(loss, inputs, "sum") == 0
    assert call(loss, inputs, "none").shape == (0,)
    inputs = draw(loss, (3, 5), torch.float32)
    inputs[1].fill_(2)
    assert call(loss, inputs, ignore_index=2).isnan()


def test_wrong_arguments() -> None:
    loss = LOSSES[NAMES.index("grpo")]
    x, label, old, advantage = draw(loss, (4, 5, 6), torch.float32)
    label[2, 1] = 5
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds. It stands at target\[2, 1\]"):
        call(loss, [x, label, old, advantage])
    label.fill_(0)
    with pytest.raises(ValueError, match="input 1 of .* has shape .*, and with input 0 of shape"):
        call(loss, [x, label[0], old, advantage])
    with pytest.raises(ValueError, match="input 2 of"):
        call(loss, [x, label, old[:1], advantage])
    with pytest.raises(TypeError, match="a label needs int64"):
        call(loss, [x, label.int(), old, advantage])
    with pytest.raises(ValueError, match="weight of shape"):
        call(loss, [x, label, old, advantage], weight=torch.rand(4))
    with pytest.raises(ValueError, match="no classes"):
        call(loss, [x[:, :0], label, old, advantage])
    other = LOSSES[NAMES.index("weighted")]
    x, label, weight = draw(other, (4, 5), torch.float32)
    with pytest.raises(ValueError, match="has no gradients for the mask"):
        call(other, [x, label, weight.requires_grad_()])
