"""The modules are torch.nn's: type, options, state, copies, and what they compute."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as FL
from cases import at_shape, narrow
from helpers import MODULES, assert_same_bits, leaf

# By the module's name: ours, torch's, and the loss.
CLASSES: dict[str, tuple[type[nn.Module], type[nn.Module], str]] = {
    ours.__name__: (ours, getattr(nn, ours.__name__), loss)
    for loss, ours in MODULES.items()
    if loss != "log_loss"
}
FUNCTIONS = {name: loss for name, (_, _, loss) in CLASSES.items()} | {"LogLoss": "log_loss"}
WEIGHT = torch.linspace(0.5, 2, 7)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "MSELoss": [{}, {"reduction": "sum"}],
    "L1Loss": [{}, {"reduction": "none"}],
    "SmoothL1Loss": [{}, {"beta": 0.3}, {"beta": 0.0, "reduction": "sum"}],
    "HuberLoss": [{}, {"delta": 0.4, "reduction": "none"}],
    "BCELoss": [{}, {"weight": WEIGHT, "reduction": "sum"}],
    "BCEWithLogitsLoss": [{}, {"pos_weight": WEIGHT}, {"weight": WEIGHT, "pos_weight": WEIGHT}],
    "SoftMarginLoss": [{}, {"reduction": "sum"}],
    "MultiLabelSoftMarginLoss": [{}, {"weight": WEIGHT, "reduction": "none"}],
    "HingeEmbeddingLoss": [{}, {"margin": 0.3}],
    "MarginRankingLoss": [{}, {"margin": 0.3, "reduction": "sum"}],
    "CosineEmbeddingLoss": [{}, {"margin": 0.2, "reduction": "none"}],
    "TripletMarginLoss": [{}, {"margin": 0.3, "swap": True, "eps": 0.1, "reduction": "sum"}],
    "MultiMarginLoss": [{}, {"p": 2, "margin": 0.5, "weight": WEIGHT, "reduction": "none"}],
    "KLDivLoss": [{"reduction": "batchmean"}, {"reduction": "sum", "log_target": True}],
    "PoissonNLLLoss": [{}, {"full": True, "eps": 0.1, "reduction": "sum"}],
    "GaussianNLLLoss": [{}, {"full": True, "eps": 0.5, "reduction": "none"}],
    "CrossEntropyLoss": [
        {},
        {"weight": WEIGHT, "ignore_index": 3},
        {"label_smoothing": 0.1, "reduction": "none"},
    ],
}
EVERY = [(name, options) for name in CLASSES for options in OPTIONS[name]]


def ids(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(value) or "plain"


each = pytest.mark.parametrize(("name", "options"), EVERY, ids=ids)


def step(module: nn.Module, loss: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    sample = at_shape(loss, (5, 7)).sample(dtype)
    input = leaf(sample.input)
    others = [t for t in sample.options.values() if isinstance(t, Tensor)]
    value = module(input, sample.target, *others)
    (grad,) = torch.autograd.grad(value, input, torch.full_like(value, 0.7))
    return value.detach(), grad


@each
def test_same_as_torch(name: str, options: dict[str, Any], backend: str) -> None:
    ours, theirs, loss = CLASSES[name]
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    module, original = ours(**options), theirs(**options)
    torch.testing.assert_close(step(module, loss), step(original, loss), rtol=1e-12, atol=1e-14)
    assert isinstance(module, theirs)
    assert repr(module) == repr(original)
    assert str(nn.Sequential(module)) == str(nn.Sequential(original))
    assert list(module.state_dict()) == list(original.state_dict())
    assert [k for k, _ in module.named_buffers()] == [k for k, _ in original.named_buffers()]
    assert not list(module.parameters())


@each
def test_state_dict_goes_both_ways(name: str, options: dict[str, Any]) -> None:
    ours, theirs, loss = CLASSES[name]
    zeroed = {k: torch.zeros(7) if isinstance(v, Tensor) else v for k, v in options.items()}
    module, original = ours(**options), theirs(**zeroed)
    step(module, loss, torch.float32)
    original.load_state_dict(module.state_dict())
    other = ours(**zeroed)
    other.load_state_dict(original.state_dict())
    for a, b in zip(
        step(other, loss, torch.float32), step(module, loss, torch.float32), strict=True
    ):
        assert_same_bits(a, b, "loaded")


@each
def test_copies(name: str, options: dict[str, Any]) -> None:
    """deepcopy, pickle and torch.save of a module that has been used."""
    ours, _, loss = CLASSES[name]
    module = ours(**options)
    expected = step(module, loss, torch.float32)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is ours and repr(twin) == repr(module)
        for a, b in zip(step(twin, loss, torch.float32), expected, strict=True):
            assert_same_bits(a, b, "copy")
        twin.reduction = "sum"
        assert module.reduction == options.get("reduction", "mean")


@each
def test_to_dtype(name: str, options: dict[str, Any]) -> None:
    """Buffers follow .to(); the result does as well."""
    ours, theirs, loss = CLASSES[name]
    for dtype in (torch.float64, narrow(loss)):
        module, original = ours(**options).to(dtype), theirs(**options).to(dtype)
        for (key, buffer), (_, right) in zip(
            module.named_buffers(), original.named_buffers(), strict=True
        ):
            assert buffer.dtype == right.dtype == dtype, key
        value, grad = step(module, loss, dtype)
        assert value.dtype == grad.dtype == dtype
        assert module.half().double().to("meta").state_dict().keys() == (
            original.state_dict().keys()
        )


@pytest.mark.parametrize("name", CLASSES)
def test_options_changed_later(name: str) -> None:
    """Attributes are read at each call, as in torch."""
    ours, theirs, loss = CLASSES[name]
    module, original = ours(), theirs()
    for changes in ({"reduction": "sum"}, {"reduction": "none"}, {"beta": 0.25, "delta": 0.25}):
        for key, value in changes.items():
            if hasattr(original, key):
                setattr(module, key, value)
                setattr(original, key, value)
        torch.testing.assert_close(step(module, loss), step(original, loss), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CLASSES)
def test_legacy_arguments(name: str) -> None:
    """size_average and reduce choose the reduction, with torch's warning."""
    ours, theirs, _ = CLASSES[name]
    if name in ("HuberLoss", "GaussianNLLLoss"):
        pytest.skip(f"{name} never had them")
    modules = []
    for kind in (ours, theirs):
        with pytest.warns(UserWarning, match="size_average and reduce"):
            modules.append(kind(size_average=False))
    module, original = modules
    assert module.reduction == original.reduction == "sum"


def test_names() -> None:
    assert fusedloss.MAELoss is fusedloss.L1Loss
    assert set(CLASSES) | {"LogLoss", "MAELoss"} <= set(fusedloss.__all__)


def test_inside_a_model() -> None:
    """Hooks, children, train and eval, zero_grad: a module like any other."""
    model = nn.Sequential(nn.Linear(4, 3))
    model.add_module("loss", fusedloss.CrossEntropyLoss())
    seen = []
    model.loss.register_forward_hook(lambda module, args, result: seen.append(result))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    model.loss(model[0](x), y).backward()
    assert len(seen) == 1 and model[0].weight.grad is not None
    model.eval().train().zero_grad()
    assert len(list(model.parameters())) == 2


@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}, {"ignore_index": 2}], ids=ids)
def test_log_loss(options: dict[str, Any], backend: str) -> None:
    module = fusedloss.LogLoss(**options)
    sample = at_shape("log_loss", (5, 7)).sample(torch.float32)
    torch.testing.assert_close(
        module(sample.input, sample.target), FL.log_loss(sample.input, sample.target, **options)
    )
    assert list(module.state_dict()) == (["weight"] if "weight" in options else [])
    twin = pickle.loads(pickle.dumps(module))
    assert torch.equal(twin(sample.input, sample.target), module(sample.input, sample.target))
    assert "mean" in repr(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*CLASSES, "LogLoss"])
def test_torchscript_is_refused(name: str, backend: str) -> None:
    """One clear sentence for a module, a model that holds it, a function, and one that calls it."""
    module, function = getattr(fusedloss, name)(), getattr(FL, FUNCTIONS[name])
    sample = at_shape(FUNCTIONS[name], (5, 7)).sample(torch.float32)

    options = [t for t in sample.options.values() if isinstance(t, Tensor)]
    tensors = sample.input, sample.target, *options

    def step(input: Tensor, target: Tensor) -> Tensor:
        return function(input, target)

    for scripted in (module, nn.Sequential(nn.Linear(2, 2), module), function, step):
        with pytest.raises(RuntimeError, match="does not go into TorchScript"):
            torch.jit.script(scripted)
    for traced in (module, function):
        with pytest.raises(RuntimeError, match="does not go into TorchScript"):
            torch.jit.trace(traced, tensors)


def test_checkpoint_of_torch_loads() -> None:
    """A state_dict that was saved with torch's class loads into ours, through a file."""
    file = io.BytesIO()
    torch.save(nn.CrossEntropyLoss(weight=WEIGHT).state_dict(), file)
    file.seek(0)
    module = fusedloss.CrossEntropyLoss(weight=torch.zeros(7))
    module.load_state_dict(torch.load(file))
    assert torch.equal(module.weight, WEIGHT)
