"""The operators torch.ops.fusedloss.*: schemas, shape-only kernels, autograd registration."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fusedloss
import fusedloss.functional as FL
from cases import FAMILIES, REDUCTIONS, Sample, at_shape
from fusedloss import backends
from helpers import EMULATED, NAMESPACE, assert_same_bits, leaf, operators, value_and_grad

pytestmark = pytest.mark.usefixtures("fused")


class Recorder(TorchDispatchMode):
    """Records the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(family: str, reduction: str = "mean") -> tuple[Any, list[Any]]:
    """The operator that a public call ends in, and arguments that require a gradient."""
    case = at_shape(family, (5, 7))
    sample = case.sample(torch.float32)
    with Recorder() as recorder, torch.no_grad():
        getattr(FL, case.loss)(sample.input, sample.target, reduction=reduction, **sample.options)
    ((operator, args),) = recorder.calls
    return operator, [leaf(args[0]), *args[1:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family: str) -> None:
    """torch's own checks of schema, autograd registration, shape-only kernel and tracing."""
    for reduction in ("none", "mean"):
        operator, args = recorded(family, reduction)
        torch.library.opcheck(
            operator,
            tuple(args),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.skipif(NAMESPACE != "fusedloss", reason="Python's autograd refuses it there")
def test_forward_mode_is_refused() -> None:
    """A tangent is never dropped without a word."""
    x, t = torch.rand(2, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        for arguments in ((dual, t), (x, dual), (leaf(x), dual)):
            with pytest.raises(RuntimeError, match="forward-mode"):
                operators().loss(*arguments, None, [], "mse_loss", [], 0, 1, torch.float32, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["mse_loss", "binary_cross_entropy_with_logits-weight-pos_weight", "cross_entropy"]
)
def test_opcheck_of_dynamic_shapes(family: str) -> None:
    operator, args = recorded(family)
    torch.library.opcheck(operator, tuple(args), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_tensors(family: str) -> None:
    """The shape-only kernels give the shapes, dtypes and strides of the real ones."""
    for reduction in REDUCTIONS:
        operator, args = recorded(family, reduction)
        real = operator(*args)
        metas = tree_map_only(Tensor, lambda t: t.detach().to("meta"), args)
        for wanted in (False, True):
            metas[0] = metas[0].detach().requires_grad_(wanted)
            meta = operator(*metas)
            assert meta.device.type == "meta"
            assert (meta.shape, meta.dtype, meta.stride()) == (
                real.shape,
                real.dtype,
                real.stride(),
            )
            if wanted:
                meta.sum().backward()
                assert metas[0].grad.shape == args[0].shape
                assert metas[0].grad.dtype == args[0].dtype


def test_the_operators_are_listed() -> None:
    """Every operator has a schema that says what it writes."""
    recorded("mse_loss")  # the first use of a backend defines its operators
    every = torch._C._dispatch_get_all_op_names()
    names = {name for name in every if name.startswith(f"{NAMESPACE}::")}
    assert {f"{NAMESPACE}::loss", f"{NAMESPACE}::loss_backward"} <= names
    for name in names:
        schema = getattr(operators(), name.split("::")[1]).default._schema
        writes = any(a.alias_info and a.alias_info.is_write for a in schema.arguments)
        assert writes == name.endswith("_"), str(schema)


X, Y, PAIR = torch.zeros(8), torch.zeros(8), torch.tensor([float("nan"), 1.0], dtype=torch.float64)
ROWS, CLASSES = torch.zeros(50, 4), torch.zeros(50, dtype=torch.int64)
LOGITS, ONE = "binary_cross_entropy_with_logits", torch.tensor(1.0)
ONES, TWO = torch.ones(50), [torch.zeros(50, 4), torch.zeros(50, 4)]
INT, META = torch.tensor(1), ONE.to("meta")
# What follows input and target: weight, more, loss, parameters, ignore_index, reduction, dtype.
MSE = (None, [], "mse_loss", [], 0, 1, torch.float32)
POS_WEIGHT = (None, [], f"{LOGITS}_pos_weight", [], 0, 1, torch.float32)
TWO_WEIGHTS = (None, [X], "mse_loss", [], 0, 1, torch.float32)
LOG = ([], "log_loss", [1e-7], 0, 1, torch.float32)
SUM_OF_ROWS = ([], "cross_entropy", [0.0], -100, 2, torch.float32)
EACH_ROW = ([], "cross_entropy", [0.0], -100, 0, torch.float32)


@pytest.mark.parametrize(
    ("operator", "arguments", "problem"),
    [
        ("loss", (X, Y[:3], *MSE, None), "does not fit input"),
        ("loss", (X, Y, None, [], "mse_loss", [1.0], 0, 1, torch.float32, None), "0 parameters"),
        (
            "loss",
            (X, Y, *POS_WEIGHT, None),
            "has 3 inputs, and the call 2",
        ),
        ("loss", (X, Y, *TWO_WEIGHTS, None), "has 2 inputs, and the call 3"),
        ("loss", (X, Y.to("meta"), *MSE, None), "beside a meta"),
        ("loss", (ROWS, CLASSES, X[:1], *LOG, None), "weight of shape"),
        ("loss", (ROWS, CLASSES, *MSE, None), "target of shape"),
        ("loss", (ROWS, CLASSES.to("meta"), None, *SUM_OF_ROWS, None), "beside a meta"),
        ("loss", (ROWS[:, :0], ROWS[:, :0], None, *SUM_OF_ROWS, None), "no classes"),
        ("loss", (ROWS[:, :0], CLASSES, None, *SUM_OF_ROWS, None), "no classes"),
        ("loss", (ROWS, CLASSES, X, *SUM_OF_ROWS, None), "weight of shape"),
        ("loss_forward", (X, Y, *MSE, 1, PAIR[:0]), "two contiguous"),
        ("loss_forward", (X, Y, *MSE, 1, X[:2]), "two contiguous"),
        ("loss_forward", (X, Y, *MSE, 2, None), "no gradients for the mask 2"),
        ("loss_backward", (ONE, PAIR, X, Y, *MSE, 3), "no gradients for the mask 3"),
        ("loss_backward", (ONE, PAIR[:1], X, Y, *MSE, 1), "two contig"),
        ("loss_backward", (X, PAIR, X, Y, *MSE, 1), "not one real"),
        ("loss_backward", (INT, PAIR, X, Y, *MSE, 1), "not one real"),
        ("loss_backward", (META, PAIR, X, Y, *MSE, 1), "beside a meta"),
        ("loss_backward", (X, PAIR, ROWS, CLASSES, None, *EACH_ROW, 1), "grad_output of"),
        ("loss_backward", (X, PAIR, ROWS, CLASSES, None, *SUM_OF_ROWS, 1), "grad_output of"),
        ("loss_with_gradients_", (ONES, ROWS, CLASSES, None, *EACH_ROW, 1, []), "0 outputs for"),
        ("loss_with_gradients_", (ONES, ROWS, CLASSES, None, *EACH_ROW, 1, TWO), "2 outputs for"),
    ],
)
def test_direct_calls_are_checked(
    operator: str, arguments: tuple[Any, ...], problem: str, compiled: str
) -> None:
    """Anything that would lead an engine to invalid memory is an error before that."""
    if NAMESPACE != "fusedloss":
        pytest.skip("the operators of csrc alone take pointers")
    with pytest.raises(ValueError, match=problem):
        getattr(operators(), operator)(*arguments)


def test_a_loss_that_is_not_known() -> None:
    recorded("mse_loss")  # the first use of a backend defines its operators
    with pytest.raises(RuntimeError, match="no loss 'mse' is known"):
        operators().loss(X, Y, None, [], "mse", [], 0, 1, torch.float32, None)


def test_state_of_another_forward() -> None:
    """Its gradient has another size: an error, and not a byte beyond it."""
    recorded("mse_loss")  # the first use of a backend defines its operators
    small, large = torch.ones(8), torch.ones(8000)
    _, state = operators().loss_forward(small, small, *MSE, 1, None)
    with pytest.raises(RuntimeError, match=r"input is a .* shape \[8000\], .* shape \[8\]"):
        operators().loss_backward(ONE, state, large, large, *MSE, 1)


def test_gradients_for_target() -> None:
    """A symmetric loss gives input's, negated, and computes with both swapped where only target's is
    wanted; another built-in loss gives none."""
    recorded("mse_loss")  # the first use of a backend defines its operators
    x, y = leaf(torch.ones(8)), leaf(torch.zeros(8))
    for wanted, expected in (((x, y), (0.25, -0.25)), ((x,), (0.25,)), ((y,), (-0.25,))):
        inputs = [t if any(t is w for w in wanted) else t.detach() for t in (x, y)]
        found = torch.autograd.grad(operators().loss(*inputs, *MSE, None), wanted)
        for gradient, number in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, torch.full((8,), number))
    options = (None, [], "binary_cross_entropy_with_logits", [], 0, 1, torch.float32, None)
    value = operators().loss(x, y, *options)
    of_input, of_target = torch.autograd.grad(value, (x, y), allow_unused=True)
    assert of_target is None and of_input is not None


@pytest.mark.skipif(not EMULATED, reason="asks the emulator what was queued")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_two_launches(family: str) -> None:
    """Forward counts its class indices itself, and backward finds that the gradient is right."""
    queued = ctypes.CDLL(backends.extension.__file__).emulator_queued
    case = at_shape(family, (300, 7))
    sample = case.sample(torch.float32)
    value = getattr(FL, case.loss)(leaf(sample.input), sample.target, **sample.options)
    before = queued()
    value = getattr(FL, case.loss)(leaf(sample.input), sample.target, **sample.options)
    assert queued() - before == 1
    value.backward()
    assert queued() - before == 2


@pytest.mark.skipif(not EMULATED, reason="asks the emulator to capture")
def test_predictions_of_a_capture_live_for_ever() -> None:
    """A CUDA graph writes to them at every replay, even if their modules are gone."""
    emulator = ctypes.CDLL(backends.extension.__file__)
    x, y = leaf(torch.ones(8)), torch.zeros(8)

    def prediction_of_a_step() -> weakref.ref[Tensor]:
        module = fusedloss.MSELoss()
        module(x, y).backward()
        return weakref.ref(module._prediction(x))

    assert prediction_of_a_step()() is None
    before = emulator.emulator_waits()
    emulator.emulator_capture(1)
    try:
        kept = prediction_of_a_step()
    finally:
        emulator.emulator_capture(0)
    assert kept() is not None
    # Made on another stream that the graph does not see; the host has waited for it.
    assert emulator.emulator_waits() == before + 1


@pytest.mark.skipif(not EMULATED, reason="asks the emulator to capture")
@pytest.mark.parametrize(
    "family, shape, transposed",
    [
        ("cross_entropy", (5, 70_001), False),  # a cluster
        ("cross_entropy", (20_000, 3), False),  # several blocks count the class indices
        ("cross_entropy-probabilities", (3, 4096), False),
        ("cross_entropy", (640, 21), True),
        ("cross_entropy", (640, 100), True),
    ],
)
def test_rows_amid_a_capture(family: str, shape: tuple[int, int], transposed: bool) -> None:
    """With the bits of a call outside it, and nothing that a capture forbids."""
    emulator = ctypes.CDLL(backends.extension.__file__)
    sample = at_shape(family, shape).sample(torch.float32)
    if transposed:
        columns = sample.input.t().contiguous().t()
        sample = Sample(columns, sample.target, sample.options)
    expected = value_and_grad(FL.cross_entropy, sample, "mean", 0.5)
    emulator.emulator_capture(1)
    try:
        got = value_and_grad(FL.cross_entropy, sample, "mean", 0.5)
    finally:
        emulator.emulator_capture(0)
    assert_same_bits(got[0], expected[0], "value")
    assert_same_bits(got[1], expected[1], "gradient")
