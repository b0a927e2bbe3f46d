"""The operators torch.ops.fusedloss.*: schemas, shape-only kernels, autograd registration."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
import fusedloss.functional as FL
from cases import FAMILIES, REDUCTIONS, at_shape
from fusedloss import backends
from helpers import EMULATED, NAMESPACE, leaf, operators

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
        metas = [a.detach().to("meta") if isinstance(a, Tensor) else a for a in args]
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
    assert {f"{NAMESPACE}::pointwise", f"{NAMESPACE}::cross_entropy"} <= names
    for name in names:
        schema = getattr(operators(), name.split("::")[1]).default._schema
        writes = any(a.alias_info and a.alias_info.is_write for a in schema.arguments)
        assert writes == name.endswith("_"), str(schema)


X, Y, PAIR = torch.zeros(8), torch.zeros(8), torch.tensor([float("nan"), 1.0], dtype=torch.float64)
ROWS, CLASSES = torch.zeros(50, 4), torch.zeros(50, dtype=torch.int64)
LOGITS, ONE = "binary_cross_entropy_with_logits", torch.tensor(1.0)
INT, META = torch.tensor(1), ONE.to("meta")
MSE = (0.0, 0, 1, torch.float32)  # what follows its name: parameter, ignore_index, "mean", dtype
SUM_OF_ROWS, EACH_ROW = (-100, 0.0, 2, torch.float32), (-100, 0.0, 0, torch.float32)


@pytest.mark.parametrize(
    ("operator", "arguments", "problem"),
    [
        ("pointwise", (X, Y[:3], None, None, "mse_loss", *MSE, None), "does not fit input"),
        ("pointwise", (X, Y, None, None, "mse", *MSE, None), "no pointwise loss is named 'mse'"),
        ("pointwise", (X, Y, None, None, f"{LOGITS}_pos_weight", *MSE, None), "needs a pos_weight"),
        ("pointwise", (X, Y, None, X, "mse_loss", *MSE, None), "takes no pos_weight"),
        ("pointwise_forward", (X, Y, None, None, "mse_loss", *MSE, PAIR[:0]), "two contiguous"),
        ("pointwise_forward", (X, Y, None, None, "mse_loss", *MSE, X[:2]), "two contiguous"),
        ("pointwise_backward", (ONE, PAIR[:1], X, Y, None, None, "mse_loss", *MSE), "two contig"),
        ("pointwise_backward", (X, PAIR, X, Y, None, None, "mse_loss", *MSE), "not one real"),
        ("pointwise_backward", (INT, PAIR, X, Y, None, None, "mse_loss", *MSE), "not one real"),
        ("pointwise_backward", (META, PAIR, X, Y, None, None, "mse_loss", *MSE), "beside a meta"),
        ("pointwise", (X, Y.to("meta"), None, None, "mse_loss", *MSE, None), "beside a meta"),
        ("pointwise", (ROWS, CLASSES, X[:1], None, "log_loss", *MSE, None), "weight of shape"),
        ("pointwise", (ROWS, CLASSES, None, None, "mse_loss", *MSE, None), "no class indices"),
        ("cross_entropy", (ROWS, CLASSES.to("meta"), None, *SUM_OF_ROWS, None), "beside a meta"),
        ("cross_entropy", (ROWS[:, :0], ROWS[:, :0], None, *SUM_OF_ROWS, None), "no classes"),
        ("cross_entropy", (ROWS[:, :0], CLASSES, None, *SUM_OF_ROWS, None), "no classes"),
        ("cross_entropy", (ROWS, CLASSES, X, *SUM_OF_ROWS, None), "weight of shape"),
        ("cross_entropy_backward", (X, PAIR, ROWS, CLASSES, None, *EACH_ROW), "grad_output of"),
        ("cross_entropy_backward", (X, PAIR, ROWS, CLASSES, None, *SUM_OF_ROWS), "grad_output of"),
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


def test_scales_of_another_forward() -> None:
    """Their gradient has another size: an error, and no write beyond it."""
    recorded("mse_loss")  # the first use of a backend defines its operators
    call = (None, None, "mse_loss", 0.0, 0, 1, torch.float32)
    small, large = torch.ones(8), torch.ones(8000)
    _, scales = operators().pointwise_forward(small, small, *call, None)
    with pytest.raises(RuntimeError, match=r"input is a .* shape \[8000\], .* shape \[8\]"):
        operators().pointwise_backward(ONE, scales, large, large, *call)


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
