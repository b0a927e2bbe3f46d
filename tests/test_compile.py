"""torch.compile, torch.export and compiled autograd: each loss is one opaque operator, in one
pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

import fusedloss
import fusedloss.functional as FL
from cases import BASIC, Sample, at_shape
from helpers import MODULES, NAMESPACE, assert_same_bits, leaf

pytestmark = [pytest.mark.usefixtures("fused")]
FAMILIES = [
    *BASIC,
    "huber_loss-delta2-weight",
    "binary_cross_entropy_with_logits-weight-pos_weight",
    "cross_entropy-weight-smoothing-ignored",
    "cross_entropy-probabilities-weight",
]
# Predicted, mispredicted, changing, then predicted again.
UPSTREAMS = (1.0, 3.0, 3.0, 0.5, -1.0, 2.0, 3.0, 3.0, 3.0, 3.0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def loss_of(family: str, sample: Sample) -> Callable[[Tensor, Tensor], Tensor]:
    function = getattr(FL, at_shape(family, (1, 1)).loss)
    return lambda input, target: function(input * 1.5, target, **sample.options) * 2


def gradient(
    function: Callable[..., Tensor], sample: Sample, upstream: float
) -> tuple[Tensor, Tensor]:
    input = leaf(sample.input)
    value = function(input, sample.target)
    factor = torch.tensor(upstream, dtype=value.dtype)
    return value.detach(), torch.autograd.grad(value, input, factor)[0]


def probabilities_halved(loss: str, sample: Sample) -> Sample:
    """Still in [0, 1] after loss_of() multiplies by 1.5."""
    if loss in ("binary_cross_entropy", "log_loss"):
        sample.input.div_(2)
    return sample


def draw(family: str, shape: tuple[int, ...] = (6, 35), seed: int = 0) -> Sample:
    case = at_shape(family, shape)
    return probabilities_halved(case.loss, case.sample(torch.float32, seed))


class Graphs:
    """A compiler backend that records the operators of its graphs and runs them unchanged."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.backend = aot_autograd(
            fw_compiler=self._note(self.forward), bw_compiler=self._note(self.backward)
        )

    @staticmethod
    def _note(names: list[str]) -> Callable[..., Any]:
        def compiler(graph: GraphModule, inputs: Any) -> Any:
            names.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
            return torch._dynamo.backends.debugging.boxed_nop(graph, inputs)

        return compiler


def test_the_mark_of_a_constant_result_is_torchs() -> None:
    """Avoids importing the compiler, as our function does."""

    def marked(mark: Callable[..., Any]) -> dict[str, Any]:
        return vars(mark(lambda: None))

    ours = marked(fusedloss._caller.constant_when_traced)
    assert ours == marked(torch.compiler.assume_constant_result)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_holds_one_operator(family: str) -> None:
    graphs = Graphs()
    sample = draw(family)
    function = loss_of(family, sample)
    compiled = torch.compile(function, backend=graphs.backend, fullgraph=True)
    for upstream in UPSTREAMS:
        got, expected = (gradient(f, sample, upstream) for f in (compiled, function))
        assert_same_bits(got[0], expected[0], "value")
        assert_same_bits(got[1], expected[1], f"gradient by {upstream}")
    assert [n for n in graphs.forward if "fusedloss" in n] == [f"{NAMESPACE}.loss_forward.default"]
    assert [n for n in graphs.backward if "fusedloss" in n] == [
        f"{NAMESPACE}.loss_backward.default"
    ]
    names = (*graphs.forward, *graphs.backward)
    assert not [n for n in names if n.startswith("aten") and ("loss" in n or "entropy" in n)]


def operators_of(function: Callable[..., Tensor], sample: Sample) -> list[str]:
    """The operators in the graphs of a compiled call, forward and backward."""
    torch._dynamo.reset()
    graphs = Graphs()
    gradient(torch.compile(function, backend=graphs.backend, fullgraph=True), sample, 1.0)
    return [*graphs.forward, *graphs.backward]


@pytest.mark.parametrize("loss", [loss for loss in BASIC if loss != "log_loss"])
def test_few_elements_are_left_to_inductor(loss: str, compiled: str) -> None:
    """Few elements have the graph of torch's own loss; many have an operator, or a chosen
    backend."""
    few, many = draw(loss), draw(loss, (1 << (9 if "entropy" in loss else 13), 35))
    for function in (getattr(FL, loss), MODULES[loss]()):
        assert any("fusedloss" in name for name in operators_of(function, few))
        with fusedloss.backend(None):
            assert operators_of(function, few) == operators_of(getattr(F, loss), few)
            assert any("fusedloss" in name for name in operators_of(function, many))


@pytest.mark.parametrize(
    "make", [lambda: FL.mse_loss, fusedloss.MSELoss], ids=["function", "module"]
)
def test_one_pass(make: Callable[[], Callable[..., Tensor]]) -> None:
    """Backward hands over the gradient of forward, so it does not see numbers that change later."""
    loss = make()
    step = torch.compile(lambda x, y: loss(x, y), backend="inductor", fullgraph=True)
    input, target = torch.randn(6, 35), torch.randn(6, 35)
    for upstream in (1.0, 0.5):
        for _ in range(8):
            gradient(step, Sample(input, target, {}), upstream)
        expected = gradient(step, Sample(input, target.clone(), {}), upstream)[1]
        x, y = leaf(input), target.clone()
        value = step(x, y)
        y.data.fill_(0)
        assert_same_bits(
            torch.autograd.grad(value, x, torch.tensor(upstream))[0], expected, "handed over"
        )


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("loss", ["binary_cross_entropy_with_logits", "cross_entropy"])
def test_code_generation(loss: str, dynamic: bool) -> None:
    """The default backend: no recompilation from the upstream gradient, nor from the shape."""
    module = {
        "binary_cross_entropy_with_logits": fusedloss.BCEWithLogitsLoss,
        "cross_entropy": fusedloss.CrossEntropyLoss,
    }[loss]()

    def function(input: Tensor, target: Tensor) -> Tensor:
        return module(input * 1.5, target) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for rows in (6, 11, 3) if dynamic else (6,):
        sample = draw(loss, (rows, 35), seed=rows)
        if loss == "cross_entropy":
            sample.target[rows // 2] = -100
        for upstream in UPSTREAMS:
            torch.testing.assert_close(
                gradient(compiled, sample, upstream), gradient(function, sample, upstream)
            )


def test_second_backward_of_a_compiled_step() -> None:
    sample = draw("mse_loss")
    input = leaf(sample.input)
    step = torch.compile(lambda x, y: FL.mse_loss(x, y), backend="aot_eager", fullgraph=True)
    with torch._functorch.config.patch(donated_buffer=False):  # otherwise retain_graph is refused
        value = step(input, sample.target)
        for upstream in (1.0, 1.0, 3.0, 1.0):
            (got,) = torch.autograd.grad(value, input, torch.tensor(upstream), retain_graph=True)
            expected = gradient(FL.mse_loss, sample, upstream)[1]
            assert_same_bits(got, expected, f"by {upstream}")
            got.fill_(0)  # the owner of a gradient may change it


@pytest.mark.parametrize("loss", ["mse_loss", "cross_entropy"])
def test_autocast_inside(loss: str) -> None:
    sample = draw(loss)
    weight = torch.randn(35, 35) / 6

    def function(input: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return getattr(FL, loss)(input @ weight, target)

    if loss == "mse_loss":
        sample = Sample(sample.input, sample.target.bfloat16(), {})
    graphs = Graphs()
    compiled = torch.compile(function, backend=graphs.backend, fullgraph=True)
    got, expected = (gradient(f, sample, 2.0) for f in (compiled, function))
    assert got[0].dtype == expected[0].dtype == torch.float32
    torch.testing.assert_close(got, expected)
    assert any("fusedloss" in n for n in graphs.forward)


@pytest.mark.parametrize("loss", ["mse_loss", "cross_entropy"])
def test_transforms_inside(loss: str) -> None:
    """torch.func within a compiled function takes the reference, as it does without."""
    sample = draw(loss)
    function = getattr(FL, loss)

    def per_row(input: Tensor, target: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(function))(input, target)

    compiled = torch.compile(per_row, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(sample.input, sample.target), per_row(sample.input, sample.target)
    )


@pytest.mark.parametrize("loss", ["mse_loss", "cross_entropy"])
def test_compiled_autograd(loss: str) -> None:
    sample = draw(loss)
    function = loss_of(loss, sample)
    compiler = torch.compile(backend="aot_eager")
    for upstream in UPSTREAMS[:4]:
        expected = gradient(function, sample, upstream)
        with torch._dynamo.compiled_autograd._enable(compiler):
            got = gradient(function, sample, upstream)
        assert_same_bits(got[1], expected[1], f"by {upstream}")


class Step(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        result: Tensor = self.loss(input * 1.5, target)
        return result


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("loss", "module"),
    [
        ("huber_loss", fusedloss.HuberLoss(delta=0.5)),
        ("cross_entropy", fusedloss.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 35))),
        ("log_loss", fusedloss.LogLoss()),
    ],
)
def test_export(loss: str, module: nn.Module, strict: bool) -> None:
    """For any number of rows, with and without decompositions, and through a file."""
    sample, other = draw(loss), draw(loss, (9, 35), seed=1)
    step = Step(module)
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    program = torch.export.export(
        step, (sample.input, sample.target), dynamic_shapes=(rows, rows), strict=strict
    )
    for exported in (program, program.run_decompositions()):
        assert f"torch.ops.{NAMESPACE}." in exported.graph_module.code
        got = gradient(exported.module(), other, 1.0)
        torch.testing.assert_close(got, gradient(step, other, 1.0))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("loss", BASIC)
def test_draft_export(loss: str, strict: bool) -> None:
    """Like export, but through plain PyTorch."""
    sample = draw(loss)
    step = Step(MODULES[loss]())
    arguments = (sample.input, sample.target)
    program = torch.export.draft_export(step, arguments, strict=strict)
    torch.testing.assert_close(program.module()(*arguments), step(*arguments))
    assert "fusedloss" in str(torch.export.export(step, arguments, strict=strict).graph)
