"""The losses of other packages that patch() replaces, each against its package, where that is installed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss
from fusedloss import _dispatch, _others
from helpers import leaf

Call = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Nothing stays replaced."""
    yield
    assert _others._imports not in sys.meta_path and not _others._replaced


def value_and_gradient(call: Call, input: Tensor) -> list[Tensor]:
    x = leaf(input)
    value = call(x)
    upstream = torch.linspace(0.5, 1.5, value.numel()).view(value.shape).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, x, upstream)]


def assert_same(call: Call, input: Tensor, *, fused: bool = True) -> None:
    """What the package computes, and whether a kernel computes it under a patch."""
    theirs = value_and_gradient(call, input)
    # The truth for two-byte inputs, which the package rounds more often.
    exact = value_and_gradient(call, input.float()) if input.element_size() == 2 else theirs
    with fusedloss.patch() as patched:
        ours = value_and_gradient(call, input)
    # What is left to the package may call torch's losses, which are fused.
    assert patched.calls and all(row.path.fused for row in patched.calls) is fused, patched
    for mine, expected, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype is expected.dtype and mine.shape == expected.shape
        eps = torch.finfo(mine.dtype).eps
        scale = float(truth.abs().max()) + 1e-30
        torch.testing.assert_close(
            mine.double(), truth.double(), rtol=8 * eps, atol=16 * eps * scale
        )


FLOATS = (torch.float32, torch.bfloat16, torch.float64)
LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(3)) * 3
CLASSES = torch.tensor([0, 4, 2, 2, 1, 3])
SOFT = torch.rand(6, 5, generator=torch.Generator().manual_seed(4)).softmax(1)
BITS = (SOFT > 0.2).float()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_timm(dtype: torch.dtype, compiled: str) -> None:
    timm = pytest.importorskip("timm.loss")
    x = LOGITS.to(dtype)
    for smoothing in (0.0, 0.1, 0.9):
        module = timm.LabelSmoothingCrossEntropy(smoothing)
        assert_same(lambda x, m=module: m(x, CLASSES), x)
    soft = timm.SoftTargetCrossEntropy()
    assert_same(lambda x: soft(x, SOFT.to(dtype)), x)
    # Through torch.nn.functional, which patch() replaces anyway.
    binary = timm.BinaryCrossEntropy(target_threshold=0.2)
    assert_same(lambda x: binary(x, SOFT.to(dtype)), x)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_timm_asymmetric(reduction: str, compiled: str) -> None:
    timm = pytest.importorskip("timm.loss")
    for dtype, target in itertools.product(
        (torch.float32, torch.bfloat16), (BITS, BITS.bool(), SOFT)
    ):
        for clip, gamma_neg, gamma_pos in ((0.05, 4, 1), (None, 2, 2)):
            options = {"clip": clip, "gamma_neg": gamma_neg, "gamma_pos": gamma_pos}
            module = timm.AsymmetricLossMultiLabel(**options, reduction=reduction)
            assert_same(lambda x, m=module, t=target: m(x, t), LOGITS.to(dtype))
    for left in (
        {"weight": torch.ones(5)},
        {"pos_weight": 2.0},
        {"gamma_pos": 0},
        {"disable_torch_grad_focal_loss": True},
        {"smoothing": 0.1},
    ):
        module = timm.AsymmetricLossMultiLabel(**left, reduction=reduction)
        assert_same(lambda x, m=module: m(x, BITS), LOGITS, fused=False)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_torchvision(dtype: torch.dtype, reduction: str, compiled: str) -> None:
    ops = pytest.importorskip("torchvision.ops")
    for alpha, gamma in ((0.25, 2), (-1, 1.5), (1, 1)):
        options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
        for target in (BITS.to(dtype), SOFT.to(dtype)):
            assert_same(
                lambda x, t=target, o=options: ops.sigmoid_focal_loss(x, t, **o), LOGITS.to(dtype)
            )
    left = {"gamma": 0.0, "reduction": reduction}
    target = BITS.to(dtype)
    assert_same(lambda x: ops.sigmoid_focal_loss(x, target, **left), LOGITS.to(dtype), fused=False)
    with fusedloss.patch(), pytest.raises(ValueError, match="Invalid alpha value"):
        ops.sigmoid_focal_loss(LOGITS, BITS, alpha=2)


def test_a_function_is_replaced_wherever_its_package_has_it() -> None:
    ops = pytest.importorskip("torchvision.ops")
    retinanet = pytest.importorskip("torchvision.models.detection.retinanet")
    original = ops.sigmoid_focal_loss
    with fusedloss.patch():
        assert ops.sigmoid_focal_loss is retinanet.sigmoid_focal_loss is not original
        assert ops.sigmoid_focal_loss.__name__ == "sigmoid_focal_loss"
    assert ops.sigmoid_focal_loss is retinanet.sigmoid_focal_loss is original


TOKENS = torch.tensor([[0, 4, -100, 2], [1, -1, 3, -100]])
WORDS = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(5)) * 3


# Beside float64 logits the package adds up in float32.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_label_smoother_of_transformers(dtype: torch.dtype, compiled: str) -> None:
    trainer = pytest.importorskip("transformers.trainer_pt_utils")
    smoother = trainer.LabelSmoother(epsilon=0.2)
    counts = (None, 5, torch.tensor(7))
    for shift, count, as_dict in itertools.product((False, True), counts, (False, True)):

        def call(x: Tensor) -> Tensor:
            output = {"logits": x} if as_dict else (x,)  # noqa: B023
            return smoother(output, TOKENS, shift, count)  # noqa: B023

        assert_same(call, WORDS.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ForCausalLM", "ForMaskedLM"])
def test_language_models_of_transformers(name: str, dtype: torch.dtype, compiled: str) -> None:
    utils = pytest.importorskip("transformers.loss.loss_utils")
    original = getattr(utils, f"{name}Loss")
    labels = TOKENS.clamp(min=-100).masked_fill(TOKENS == -1, 0)
    more: list[dict[str, Any]] = [
        {},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(3)},
    ]
    if name == "ForCausalLM":
        more.append({"shift_labels": labels})
    for options in more:
        assert_same(
            lambda x, o=options: utils.LOSS_MAPPING[name](x, labels, 5, **o), WORDS.to(dtype)
        )
    with fusedloss.patch():
        replaced = getattr(utils, f"{name}Loss")
        assert utils.LOSS_MAPPING[name] is replaced is not original
        memory = WORDS.to(dtype).requires_grad_()
        assert replaced(memory, labels, 5).dtype is torch.float32
    assert utils.LOSS_MAPPING[name] is getattr(utils, f"{name}Loss") is original


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_segmentation_models(dtype: torch.dtype, compiled: str) -> None:
    losses = pytest.importorskip("segmentation_models_pytorch.losses")
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(6)).to(dtype)
    target = torch.arange(24).view(2, 3, 4) % 5
    ignored = target.masked_fill(target == 3, -100)
    for reduction, smoothing in itertools.product(("mean", "sum"), (0.0, 0.3)):
        options = {"reduction": reduction, "smooth_factor": smoothing}
        module = losses.SoftCrossEntropyLoss(**options)
        assert_same(lambda x, m=module: m(x, ignored), x)
        module = losses.SoftCrossEntropyLoss(**options, ignore_index=None)
        assert_same(lambda x, m=module: m(x, target), x)
    binary = losses.SoftBCEWithLogitsLoss()  # through torch.nn.functional
    assert_same(lambda x: binary(x, (x.detach() > 0).to(dtype)), x)


def test_ultralytics(compiled: str) -> None:
    """Its losses call torch's, which patch() replaces."""
    loss = pytest.importorskip("ultralytics.utils.loss")
    assert_same(lambda x: loss.FocalLoss()(x, BITS), LOGITS)
    assert_same(lambda x: loss.VarifocalLoss()(x, SOFT, BITS), LOGITS)


# ---- without the packages ------------------------------------------------------------------------


def package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of a package, with a function that another of its modules has imported."""
    inner, outer = types.ModuleType("theirs.inner"), types.ModuleType("theirs.outer")

    def double(x: Any, *, exactly: bool = False) -> Any:
        """Doubles."""
        return "original"

    inner.double = outer.double = double  # type: ignore[attr-defined]
    inner.TABLE = {"double": double, "other": 1}  # type: ignore[attr-defined]
    for module in (inner, outer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    row = _others.Row("theirs.inner", "double", lambda x: "fused" if x else NotImplemented)
    monkeypatch.setattr(_others, "ROWS", (row, _others.Row("theirs.inner", "absent", len)))
    return inner


def test_a_row_is_there_while_a_patch_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = package(monkeypatch)
    outer, original = sys.modules["theirs.outer"], inner.double
    with fusedloss.patch():
        with fusedloss.patch():
            pass
        assert inner.double is outer.double is inner.TABLE["double"] is not original
        assert inner.double(1) == "fused" and inner.double.__doc__ == "Doubles."
    assert inner.double is outer.double is inner.TABLE["double"] is original


def test_what_a_row_leaves_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = package(monkeypatch)
    with fusedloss.patch() as patched:
        assert inner.double(0) == "original"
        told = fusedloss.explain(inner.double, 0)
    (call,) = patched.calls
    assert (call.loss, call.path) == ("double", told)
    assert told.reasons == ("fusedloss.patch leaves these arguments to the package",)
    assert _dispatch._explaining is None


def test_an_import_under_a_patch(tmp_path: Any) -> None:
    """A script that imports the package later, as under `python -m fusedloss run`."""
    (tmp_path / "theirs.py").write_text("def double(x):\n    return 'original'\n")
    script = """
import fusedloss
from fusedloss import _others
_others.ROWS = (_others.Row("theirs", "double", lambda x: "fused"),)
with fusedloss.patch():
    import theirs
    assert theirs.double(1) == "fused"
assert theirs.double(1) == "original"
with fusedloss.patch():
    pass
import sys
del sys.modules["theirs"]
import theirs
assert theirs.double(1) == "original"
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=_environment())


def _environment() -> dict[str, str]:
    folder = os.path.dirname(os.path.dirname(fusedloss.__file__))
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}
