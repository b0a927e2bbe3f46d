"""Arguments that are wrong, odd or out of date: torch's errors, and torch's warnings."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
import fusedloss.functional as FL
from cases import BASIC, LOSSES, at_shape
from fusedloss import _dispatch, reference
from fusedloss import math as fm
from fusedloss.custom import loss as custom
from helpers import (
    FOR_A_GPU,
    assert_same_bits,
    assert_same_error,
    compare_with_torch,
    host_sees_errors,
    outcome,
    torch_loss,
)

TORCH_LOSSES = [loss for loss in BASIC if loss != "log_loss"]
ALL_OF_TORCH = [loss for loss in LOSSES if loss != "log_loss"]
SHAPE = (5, 7)


@pytest.mark.parametrize(
    "loss",
    [*ALL_OF_TORCH, *(["linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") else [])],
)
def test_signature(loss: str) -> None:
    """Same parameters, order, kinds and defaults; the reference's too. Ours may have more keywords."""

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        values = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in values]

    theirs, ours = parameters(getattr(F, loss)), parameters(getattr(FL, loss))
    assert ours[: len(theirs)] == theirs
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in ours[len(theirs) :])
    assert parameters(getattr(reference, loss)) == theirs


def test_log_loss_signature() -> None:
    for module in (FL, reference):
        assert list(inspect.signature(module.log_loss).parameters) == [
            "input",
            "target",
            "weight",
            "reduction",
            "ignore_index",
        ]


def test_mae_is_l1() -> None:
    x, y = torch.randn(9), torch.randn(9)
    assert torch.equal(FL.mae_loss(x, y), FL.l1_loss(x, y))
    assert torch.equal(reference.mae_loss(x, y), reference.l1_loss(x, y))


@pytest.mark.parametrize("loss", LOSSES)
def test_public_functions_are_documented(loss: str) -> None:
    doc = getattr(FL, loss).__doc__
    assert doc and len(doc.split()) > 20


@pytest.mark.parametrize("reduction", ["average", "", "MEAN", "elementwise_mean", "batchmean"])
@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_reduction(loss: str, reduction: str, backend: str) -> None:
    """A ValueError that names it; torch warns of "elementwise_mean" and takes it."""
    sample = at_shape(loss, SHAPE).sample(torch.float32)
    if loss == "log_loss":
        with pytest.raises(ValueError, match=reduction):
            FL.log_loss(sample.input, sample.target, reduction=reduction)
        return
    compare_with_torch(loss, sample.input, sample.target, reduction=reduction, **sample.options)


LEGACY = [f for f in ALL_OF_TORCH if f not in ("huber_loss", "gaussian_nll_loss")]


@pytest.mark.parametrize("loss", LEGACY)
def test_legacy_reduction(loss: str, backend: str) -> None:
    """size_average and reduce give torch's result and torch's warning."""
    sample = at_shape(loss, SHAPE).sample(torch.float32)
    for average, reduce in itertools.product((None, True, False), repeat=2):
        legacy = {"size_average": average, "reduce": reduce, "reduction": "sum"}
        compare_with_torch(loss, sample.input, sample.target, **legacy, **sample.options)


@pytest.mark.parametrize("value", [-1.0, -1e-9, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("loss", "option"), [("smooth_l1_loss", "beta"), ("huber_loss", "delta")], ids=str
)
def test_parameter_out_of_range(loss: str, option: str, value: float, backend: str) -> None:
    sample = at_shape(loss, SHAPE).sample(torch.float32)
    compare_with_torch(loss, sample.input, sample.target, **{option: value})


@pytest.mark.parametrize("value", [-0.1, 1.1, -1e-6, float("nan"), 0.0, 1.0])
def test_label_smoothing_out_of_range(value: float, backend: str) -> None:
    for family in ("cross_entropy", "cross_entropy-probabilities"):
        sample = at_shape(family, SHAPE).sample(torch.float32)
        compare_with_torch("cross_entropy", sample.input, sample.target, label_smoothing=value)


@host_sees_errors
@pytest.mark.parametrize("value", [7, 8, -1, -2, -99, -101, 2**31, 2**40, -(2**40)])
@pytest.mark.parametrize("place", [0, 3, 4])
def test_class_out_of_range(value: int, place: int, backend: str) -> None:
    """An IndexError that names the class, wherever it is."""
    for family, dims in (("cross_entropy", (5, 7)), ("cross_entropy", (5, 7, 2, 3))):
        sample = at_shape(family, dims).sample(torch.float32)
        sample.target[place] = value
        for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.ones(7)}):
            with pytest.raises(IndexError, match=str(value)):
                FL.cross_entropy(sample.input, sample.target, **options)
            for reduction in ("none", "mean", "sum"):
                compare_with_torch(
                    "cross_entropy", sample.input, sample.target, reduction=reduction, **options
                )
        # An ignored one is accepted.
        compare_with_torch("cross_entropy", sample.input, sample.target, ignore_index=value)
    rows = at_shape("log_loss", (5, 7)).sample(torch.float32)
    rows.target[place] = value
    with pytest.raises(IndexError, match=str(value)):
        FL.log_loss(rows.input, rows.target)


@host_sees_errors
def test_class_out_of_range_unbatched(backend: str) -> None:
    compare_with_torch("cross_entropy", torch.randn(7), torch.tensor(7))
    compare_with_torch("cross_entropy", torch.randn(7), torch.tensor(-100))


@host_sees_errors
@pytest.mark.parametrize("bad", [-0.1, 1.1, -1e-7, 1.0000002, float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 3, 70_000])
def test_bce_input_outside_the_unit_interval(bad: float, place: int, backend: str) -> None:
    sample = at_shape("binary_cross_entropy", (70_001,)).sample(torch.float32)
    sample.input[place] = bad
    for reduction, wants in itertools.product(("none", "mean"), (True, False)):
        compare_with_torch(
            "binary_cross_entropy",
            sample.input,
            sample.target,
            reduction=reduction,
            input_wants=wants,
        )
    with pytest.raises(RuntimeError):
        FL.binary_cross_entropy(sample.input, sample.target)


@host_sees_errors
@pytest.mark.parametrize("bad", [-0.5, 1.5, 7.0])
def test_bce_target_outside_the_unit_interval(bad: float, backend: str) -> None:
    sample = at_shape("binary_cross_entropy", (33,)).sample(torch.float32)
    sample.target[17] = bad
    compare_with_torch("binary_cross_entropy", sample.input, sample.target)
    compare_with_torch("binary_cross_entropy_with_logits", sample.input, sample.target)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_nan_and_infinity(loss: str, dtype: str, reduction: str, backend: str) -> None:
    """nan and infinities in input and target give nan and infinities where torch has them."""
    shape = (6, 35)
    family = "cross_entropy-probabilities" if loss == "cross_entropy" else loss
    regression = "entropy" not in loss
    for in_input, in_target in itertools.product((0.5, NAN, INF, -INF), repeat=2):
        if not regression and in_target in (INF, -INF):
            continue  # not a probability
        if loss == "binary_cross_entropy_with_logits" and in_input == -INF:
            continue  # torch's formula gives nan there; the loss is infinite
        if loss == "binary_cross_entropy" and FOR_A_GPU and (in_input, in_target) != (0.5, 0.5):
            continue  # reported to the host later: test_faults.py
        sample = at_shape(family, shape).sample(getattr(torch, dtype))
        sample.input[2, 17] = in_input
        sample.input[3] = in_input
        sample.target[2, 17] = in_target
        sample.target[4, 3] = in_target
        compare_with_torch(loss, sample.input, sample.target, reduction=reduction)
        if loss == "cross_entropy":
            labels = torch.tensor([0, 1, 17, 3, 4, 34])
            compare_with_torch(loss, sample.input, labels, reduction=reduction)


WRONG_SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...] = (
    ((5, 7), (4,), torch.int64),
    ((5, 7), (5, 7), torch.int64),
    ((5, 7), (5, 1), torch.int64),
    ((5, 7), (), torch.int64),
    ((7,), (1,), torch.int64),
    ((7,), (2,), torch.int64),
    ((5, 7, 3), (5,), torch.int64),
    ((5, 7, 3), (5, 4), torch.int64),
    ((5, 7, 3, 2), (5, 3), torch.int64),
    ((), (), torch.int64),
    ((5, 7), (5, 6), torch.float32),
    ((5, 7), (5,), torch.float32),
    ((5, 7), (7,), torch.float32),
    ((7,), (), torch.float32),
    ((5, 0), (5,), torch.int64),
    ((0, 7), (0,), torch.int64),
    ((0, 0), (0,), torch.int64),
    ((5, 7, 0), (5, 0), torch.int64),
)


@pytest.mark.parametrize(("input_shape", "target_shape", "dtype"), WRONG_SHAPES, ids=str)
def test_cross_entropy_shapes(
    input_shape: tuple[int, ...],
    target_shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
) -> None:
    for reduction, smoothing in itertools.product(("none", "mean", "sum"), (0.0, 0.1)):
        compare_with_torch(
            "cross_entropy",
            torch.randn(input_shape),
            torch.zeros(target_shape, dtype=dtype),
            reduction=reduction,
            label_smoothing=smoothing,
        )


@pytest.mark.parametrize("shape", [(6,), (8,), (1,), (7, 1), (1, 7), (), (0,)], ids=str)
def test_class_weight_shape(shape: tuple[int, ...], backend: str) -> None:
    for family in ("cross_entropy", "cross_entropy-probabilities", "cross_entropy-smoothing"):
        sample = at_shape(family, SHAPE).sample(torch.float32)
        compare_with_torch(
            "cross_entropy", sample.input, sample.target, weight=torch.ones(shape), **sample.options
        )


@pytest.mark.parametrize("options", [{"ignore_index": i} for i in (3, -3, None, "a", 1.5)], ids=str)
def test_ignore_index_with_probabilities(options: dict[str, int], backend: str) -> None:
    sample = at_shape("cross_entropy-probabilities", SHAPE).sample(torch.float32)
    compare_with_torch("cross_entropy", sample.input, sample.target, **options)


LOG_LOSS_WRONG: tuple[tuple[Any, Any, dict[str, Any]], ...] = (
    (torch.full((5, 7), 1 / 7), torch.zeros(4, dtype=torch.int64), {}),
    (torch.full((5, 7), 1 / 7), torch.zeros(5, 6), {}),
    (torch.full((5, 7), 1 / 7), torch.zeros(5), {}),
    (torch.full((5, 7), 1 / 7), torch.zeros(5, dtype=torch.int64), {"weight": torch.ones(6)}),
    (torch.zeros(5, 7, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), {}),
    (torch.tensor(0.5), torch.tensor(0), {}),
    (torch.full((5, 7), 1 / 7), None, {}),
    ([0.5, 0.5], torch.zeros(2), {}),
    *(
        (torch.full((5, 7), 1 / 7), torch.full((5, 7), 1 / 7), options)
        for options in (
            {"ignore_index": 0},
            {"ignore_index": 1.5},
            *({"weight": torch.ones(shape)} for shape in ((), (1,), (6,), (1, 7), (5, 7))),
        )
    ),
)


@pytest.mark.parametrize("case", range(len(LOG_LOSS_WRONG)))
def test_log_loss_shapes(case: int, backend: str) -> None:
    input, target, options = LOG_LOSS_WRONG[case]
    with pytest.raises((ValueError, RuntimeError, TypeError)) as raised:
        FL.log_loss(input, target, **options)
    assert str(raised.value).strip()


@pytest.mark.parametrize("argument", ["input", "target", "weight", "reduction"])
@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_arguments_of_the_wrong_type(loss: str, argument: str, backend: str) -> None:
    """Something that is not a tensor (or not a string) gives torch's type of error."""
    sample = at_shape(loss, SHAPE).sample(torch.float32)
    for value in (None, 3, [1.0, 2.0], "mean"):
        keywords = {"input": sample.input, "target": sample.target, argument: value}
        if argument == "weight" and (loss == "smooth_l1_loss" or value is None):
            continue
        if argument == "reduction" and isinstance(value, str):
            continue  # a string is checked by type
        ours, our_error, _ = outcome(lambda keywords=keywords: getattr(FL, loss)(**keywords))
        theirs, their_error, _ = outcome(lambda keywords=keywords: torch_loss(loss)(**keywords))
        if their_error is None:
            torch.testing.assert_close(ours, theirs)
            continue
        assert our_error is not None, f"{argument}={value!r} accepted; torch: {their_error!r}"
        assert isinstance(our_error, type(their_error)), f"{our_error!r}, torch's {their_error!r}"


@pytest.mark.parametrize("loss", BASIC)
def test_unknown_argument(loss: str) -> None:
    with pytest.raises(TypeError, match="reductoin"):
        getattr(FL, loss)(torch.rand(5, 7), torch.rand(5, 7), reductoin="sum")


@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_other_devices_and_layouts(loss: str, backend: str) -> None:
    """A meta tensor gives a meta tensor; tensors of two devices give torch's error."""
    sample = at_shape(loss, SHAPE).sample(torch.float32)
    ours = getattr(FL, loss)(sample.input.to("meta"), sample.target.to("meta"))
    assert ours.device.type == "meta" and ours.shape == ()
    for input, target in (
        (sample.input.to("meta"), sample.target),
        (sample.input, sample.target.to("meta")),
    ):
        _, our_error, _ = outcome(lambda x=input, y=target: getattr(FL, loss)(x, y))
        _, their_error, _ = outcome(lambda x=input, y=target: torch_loss(loss)(x, y))
        assert (our_error is None) == (their_error is None), (our_error, their_error)
    sparse = sample.input.to_sparse()
    _, our_error, _ = outcome(lambda: getattr(FL, loss)(sparse, sample.target))
    _, their_error, _ = outcome(lambda: torch_loss(loss)(sparse, sample.target))
    assert_same_error(our_error, their_error)


# ---- the short way into the operators ------------------------------------------------------------


@fusedloss.pointwise_loss
def charbonnier(input: Any, target: Any, *, eps: float = 1e-3) -> Any:
    return fm.sqrt((input - target) ** 2 + eps**2)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "mode": lambda: torch.device("cpu"),
}


class RandomCall:
    """A random call of the kind that users may make; often fused, often not."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        usually = self.random.random() < 0.5  # otherwise anything
        self.odd = 0.04 if usually else 0.2
        self.loss = self.random.choice([*BASIC, "charbonnier"])
        self.context = self.maybe("plain", *CONTEXTS)
        dims = self.maybe(2, 0, 1, 3, 4, 9)
        self.shape = tuple(self.random.choice((1, 2, 3, 5)) for _ in range(dims))
        self.dtype = self.maybe(torch.float32, torch.float64, torch.bfloat16, torch.float16)
        if self.maybe(False, True):
            self.shape = (0, *self.shape[1:])
        self.input = self.tensor(self.shape)
        if not self.input.is_inference():
            wants = self.input.is_floating_point() and self.maybe(True, False)
            self.input = self.input.detach().requires_grad_(wants)
        self.options: dict[str, Any] = {"reduction": self.maybe("mean", "sum", "none", "max")}
        rows = self.loss in ("cross_entropy", "log_loss")
        if rows and self.maybe(True, False):
            shape = self.shape[:1] + self.shape[2:] if dims > 1 else ()
            classes = max(1, (*self.shape, 1, 1)[min(1, max(dims - 1, 0))])
            shape = self.maybe(shape, (), (3,), self.shape)
            self.target = torch.randint(0, classes, shape)
            if self.maybe(False, True):
                self.target = self.target.float()
        else:
            self.target = self.tensor(self.maybe(self.shape, self.shape[1:], (1,)))
        if self.loss == "charbonnier":
            self.may_have("clip_grad", 0.5, 1, -1.0)
            self.may_have("eps", 0.5, 1, "a")
        elif self.loss not in ("huber_loss", "log_loss"):
            self.options.update({"size_average": self.maybe(None, True, False)})
        if self.loss != "smooth_l1_loss" and self.random.random() < 0.6:
            classes = self.shape[min(1, dims - 1) :][:1] if dims else ()
            broad = self.shape[self.random.randint(0, dims) :]
            weight_shape = classes if rows else self.maybe(self.shape, broad, (1,), (4,))
            self.options["weight"] = self.maybe(self.tensor(weight_shape), 2.0)
        if self.loss == "binary_cross_entropy_with_logits" and self.random.random() < 0.6:
            broad = self.shape[self.random.randint(0, dims) :]
            self.options["pos_weight"] = self.maybe(self.tensor(broad), self.tensor(self.shape))
        if self.loss == "huber_loss":
            self.may_have("delta", 0.5, 2, -1.0)
        if self.loss == "smooth_l1_loss":
            self.may_have("beta", 0.5, 0, -1.0)
        if rows:
            self.may_have("ignore_index", 1, -1, -7, 1 << 70, 1.0)
        if self.loss == "cross_entropy":
            self.may_have("label_smoothing", 0.1, 1, -0.5, True, "a")

    def maybe(self, usual: Any, *others: Any) -> Any:
        return self.random.choice(others) if self.random.random() < 2 * self.odd else usual

    def may_have(self, option: str, *values: Any) -> None:
        if self.random.random() < 0.4:
            self.options[option] = self.random.choice(values)

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """In (0, 1), in any layout."""
        integers = torch.int64, torch.int32, torch.uint8, torch.bool
        dtype = self.maybe(self.dtype, torch.float32, torch.float64, torch.bfloat16, *integers)
        t = torch.rand(shape) * 0.9 + 0.05
        layout = self.maybe("row-major", "transposed", "stepped", "channels_last")
        if layout == "transposed" and t.dim() > 1:
            t = t.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "stepped" and t.dim() > 0:
            t = t.repeat_interleave(2, dim=-1)[..., ::2]
        elif layout == "channels_last" and t.dim() == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        kind = self.maybe("tensor", "leaf", "inference", "parameter", "subclass")
        if kind == "inference":
            with torch.inference_mode():
                wants = dtype.is_floating_point and self.maybe(False, True)
                return t.to(dtype).clone().requires_grad_(wants)
        t = t.to(dtype)
        if kind == "subclass":
            return t.as_subclass(Subclass)
        if dtype.is_floating_point and kind == "parameter":
            return torch.nn.Parameter(t)
        return t.requires_grad_(dtype.is_floating_point and kind == "leaf")

    def function(self) -> Callable[..., Any]:
        return charbonnier if self.loss == "charbonnier" else getattr(FL, self.loss)

    def run(self) -> list[Any]:
        """Value and gradients or the error, and the warnings."""
        tensors = (self.input, self.target, *self.options.values())

        def call() -> list[Tensor | None]:
            with CONTEXTS[self.context]():
                value = self.function()(self.input, self.target, **self.options)
            wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
            if not value.requires_grad:
                return [value]
            upstream = torch.full_like(value, 0.75)
            return [value, *torch.autograd.grad(value, wanted, upstream, allow_unused=True)]

        return list(outcome(call))


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("seed", range(10))
def test_the_short_way_decides_as_the_long_way(
    seed: int, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same results, errors and warnings, and every plain call that is fused takes it."""
    charbonnier.compile()
    taken: list[bool] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            def entry(*args: Any) -> Any:
                value = getattr(extension, name)(*args)
                taken.append(value is not None)
                return value

            return entry

    extension = _dispatch._C
    for module in (_dispatch, custom):
        monkeypatch.setattr(module, "_C", Watched())
    paths = []
    for number in range(100):
        call = RandomCall(seed * 1000 + number)
        what = f"{call.loss}, call {number} of seed {seed}"
        taken.clear()
        short = call.run()
        with CONTEXTS[call.context](), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                fused = fusedloss.explain(call.function(), call.input, call.target, **call.options)
            except Exception:  # noqa: BLE001 - which it is is compared
                fused = None
        plain = call.context != "autocast"
        is_fused = fused is not None and fused.fused
        assert not any(taken) or (is_fused and plain), f"{what}: {fused}"
        # Layouts, shapes and deprecated options that the long way looks into.
        rare = call.input.dim() > (3 if call.loss == "cross_entropy" else 8)
        rare = rare or bool({"size_average", "reduce"} & call.options.keys())
        rare = rare or (
            call.loss.endswith(("l1_loss", "mse_loss", "huber_loss"))
            and call.input.shape != call.target.shape
        )
        assert any(taken) or not (is_fused and plain) or rare, f"{what}: {fused}"
        with monkeypatch.context() as patch:
            patch.setattr(_dispatch, "_plain_calls", lambda: False)
            long = call.run()
        assert repr(short[1:]) == repr(long[1:]), what
        if short[0] is not None:
            assert len(short[0]) == len(long[0]), what
            for first, second in zip(short[0], long[0], strict=True):
                assert (first is None) == (second is None), what
                if first is not None:
                    assert first.requires_grad == second.requires_grad, what
                    assert_same_bits(first.detach(), second.detach(), what)
        paths.append((any(taken), is_fused))
    assert {path for path in paths} >= {(True, True), (False, False)}
