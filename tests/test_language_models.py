"""patch_lm: tiny random models of transformers train as before, and never make their logits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss import functional

pytestmark = [pytest.mark.usefixtures("compiled"), pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers", reason="patch_lm is about transformers")
CLASSES, TOKENS = 101, 20


def config(kind: str, **more: Any) -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "GPT2":
        dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        sizes = {"vocab_size": CLASSES, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        return transformers.GPT2Config(**{**sizes, **dropout, **special, **more})
    sizes = {"vocab_size": CLASSES, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return getattr(transformers, f"{kind}Config")(
        **{**sizes, **heads, "head_dim": 8, **special, **more}
    )


def llama(kind: type[nn.Module] | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    return (kind or transformers.LlamaForCausalLM)(config("Llama", **more))


def with_bias() -> Any:
    model = llama()
    head = nn.Linear(16, CLASSES)
    model.set_output_embeddings(head)
    return model


def made(kind: str, name: str | None = None, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        model = getattr(transformers, name or f"{kind}ForCausalLM")(config(kind, **more))
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.mul_(3)  # so that the logits differ
        return model

    return make


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied": made("Llama", tie_word_embeddings=True),
    "gpt2": made("GPT2", "GPT2LMHeadModel"),
    "bias": with_bias,
    "gemma2": made("Gemma2", final_logit_softcapping=1.5),
    "cohere": made("Cohere", logit_scale=0.3),
    "granite": made("Granite", logits_scaling=4.0),
}


def batch(rows: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(CLASSES, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **inputs: Any) -> tuple[Any, list[Tensor]]:
    """The output, and all gradients."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, [weight.grad.clone() for weight in model.parameters()]


def assert_same_step(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert got[0].logits is None
    assert got[0].loss.dtype is expected[0].loss.dtype is torch.float32
    torch.testing.assert_close(got[0].loss, expected[0].loss, rtol=tolerance, atol=0)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        error = (ours.double() - theirs.double()).norm()
        assert error <= tolerance * theirs.double().norm() + 1e-12


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        sizes = [t.numel() for t in found if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


# ---- as before -----------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 31, torch.tensor(31)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("kind", MODELS)
def test_step(kind: str, items: Any) -> None:
    model, inputs = MODELS[kind](), batch()
    if items is not None:
        inputs["num_items_in_batch"] = items
    expected = step(model, **inputs)
    with fusedloss.patch_lm(model):
        assert_same_step(step(model, **inputs), expected)


def test_positional_labels_and_tuples() -> None:
    model, inputs = llama(), batch()
    expected = model(**inputs)
    fusedloss.patch_lm(model)
    loss, logits, *_ = model(
        inputs["input_ids"], None, None, None, None, inputs["labels"], return_dict=False
    )
    assert logits is None
    torch.testing.assert_close(loss, expected.loss)


def test_shifted_labels_and_another_ignore_index() -> None:
    model, inputs = llama(), batch()
    labels = inputs["labels"]
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    shifted[shifted == -100] = 5
    inputs.update(shift_labels=shifted.flatten(), ignore_index=5)
    expected = step(model, **inputs)
    fusedloss.patch_lm(model)
    assert_same_step(step(model, **inputs), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_low_precision(kind: str, autocast: bool) -> None:
    model = MODELS[kind]()
    if not autocast:
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = step(model, **batch())
        fusedloss.patch_lm(model)
        # Gemma rounds its logits to bfloat16 three times more than ours.
        assert_same_step(step(model, **batch()), expected, 3e-2 if kind == "gemma2" else 1e-2)


def test_without_labels_as_before() -> None:
    model, inputs = llama().eval(), batch()
    ids = inputs["input_ids"]
    before, written = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    fusedloss.patch_lm(model)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)


def test_eval_logits() -> None:
    model, inputs = llama(), batch()
    fusedloss.patch_lm(model, eval_logits=True)
    assert model.train()(**inputs).logits is None
    assert model.eval()(**inputs).logits is not None


def test_options() -> None:
    model, inputs = llama(), batch()
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    label = inputs["labels"][:, 1:].flatten()
    expected = nn.functional.cross_entropy(logits, label, label_smoothing=0.1)
    expected += 0.01 * logits.logsumexp(1)[label != -100].square().mean()
    with fusedloss.patch_lm(model, label_smoothing=0.1, z_loss=0.01, memory="low"):
        torch.testing.assert_close(model(**inputs).loss, expected)


# ---- ways to run it ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_logits(kind: str) -> None:
    rows, chunk = 8, 16
    model, inputs = MODELS[kind](), batch(rows)
    # Otherwise another tensor would be as large as the logits.
    model.resize_token_embeddings(4096)
    logits = rows * TOKENS * 4096
    with Largest() as largest:
        step(model, **inputs)
    assert largest.elements >= logits, "the test sees logits where there are some"
    with fusedloss.patch_lm(model, options=SimpleNamespace(batch_chunk_size=chunk)):
        for training in (True, False):
            model.train(training)
            with Largest() as largest:
                step(model, **inputs)
            assert largest.elements <= max(4096 * 16, chunk * 4096) < logits / 5


def test_checkpoint() -> None:
    model, inputs = llama(), batch()
    expected = step(model, **inputs)
    model.gradient_checkpointing_enable()
    fusedloss.patch_lm(model)
    assert_same_step(step(model, **inputs), expected)

    def whole(**inputs: Any) -> Any:
        return checkpoint(model, **inputs, use_reentrant=False)

    model.zero_grad()
    whole(**inputs).loss.backward()
    torch.testing.assert_close([weight.grad for weight in model.parameters()], expected[1])


@pytest.mark.slow
def test_compile() -> None:
    model, inputs = llama(), batch()
    expected = step(model, **inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with fusedloss.patch_lm(model):
        assert_same_step(step(compiled, **inputs), expected)
    assert compiled(**inputs).logits is not None


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_compile_without_a_break(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the patch itself does is in the graph."""

    def loss(
        hidden: Tensor, weight: Tensor, *, logit_scale: float, softcap: Any, **_: Any
    ) -> Tensor:
        logits = logit_scale * (hidden @ weight.t())
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).sum()

    monkeypatch.setattr(functional, "linear_cross_entropy", loss)
    model, inputs = MODELS[kind](), batch()
    logits = model(**inputs).logits
    fusedloss.patch_lm(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).loss, logits.sum())
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
@pytest.mark.parametrize("patch_first", [True, False])
def test_fully_sharded(patch_first: bool) -> None:
    """The weight of the head is gathered for it alone, and freed when it returns."""
    from torch.distributed.fsdp import fully_shard

    model, inputs = llama(), batch()
    expected = step(model, **inputs)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        if patch_first:
            fusedloss.patch_lm(model)
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
        if not patch_first:
            fusedloss.patch_lm(model)
        output, gradients = step(model, **inputs)
        assert_same_step((output, [g.full_tensor() for g in gradients]), expected)
    finally:
        dist.destroy_process_group()


# ---- Trainer -------------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences that count upwards; the first tokens of each are padding, of some many."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(TOKENS) + 3 * index) % CLASSES
        labels = tokens.clone()
        labels[: index * 7 % 18] = -100
        return {"input_ids": tokens, "labels": labels}


def trainer(model: Any, folder: Path, **more: Any) -> Any:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    metrics = more.pop("compute_metrics", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4,
        per_device_eval_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        **more,
    )  # fmt: skip
    arguments.adam_epsilon = 1e-4  # some gradients are rounding alone, which Adam would make large
    data = Sentences()
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, compute_metrics=metrics
    )


def trained(kind: str, folder: Path, patched: bool, **more: Any) -> tuple[list[float], Any]:
    """The losses of all steps and of the evaluation after them, and the model."""
    model = MODELS[kind]()
    with fusedloss.patch_lm(model) if patched else nullcontext():
        running = trainer(model, folder, **more)
        running.train()
        last = running.evaluate()["eval_loss"]
    return [entry["loss"] for entry in running.state.log_history if "loss" in entry] + [last], model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trainer(kind: str, tmp_path: Path) -> None:
    (theirs, reference), (ours, model) = (
        trained(kind, tmp_path, patched) for patched in (False, True)
    )
    assert len(ours) == 7 and theirs[5] < 0.95 * theirs[0], "it learns"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-5, atol=0)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_trainer_in_bfloat16(tmp_path: Path) -> None:
    """accelerate wraps the patched forward, and the patch still comes off."""
    (theirs, _), (ours, model) = (
        trained("llama", tmp_path, patched, bf16=True) for patched in (False, True)
    )
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-2, atol=0)
    assert model(**batch()).logits is not None


@pytest.mark.slow
def test_items_of_accumulated_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    fused = functional.linear_cross_entropy

    def spy(*args: Any, **options: Any) -> Tensor:
        counted = (options["target"][:, 1:] != -100).sum().item()
        seen.append((int(options["num_items"]), counted))
        return fused(*args, **options)

    monkeypatch.setattr(functional, "linear_cross_entropy", spy)
    model = llama()
    with fusedloss.patch_lm(model):
        trainer(model, tmp_path).train()
    assert len(seen) == 12
    for (items, first), (again, second) in zip(seen[::2], seen[1::2], strict=True):
        assert items == again == first + second
        assert first != second, "the steps differ in their number of tokens"


@pytest.mark.slow
def test_metrics(tmp_path: Path) -> None:
    def right(predicted: Any) -> dict[str, float]:
        logits, labels = predicted.predictions[:, :-1], predicted.label_ids[:, 1:]
        return {"right": (logits.argmax(-1) == labels)[labels != -100].mean()}

    model = llama()
    with fusedloss.patch_lm(model, eval_logits=True):
        running = trainer(model, tmp_path, compute_metrics=right)
        running.train()
        assert running.evaluate()["eval_right"] > 0


# ---- undone --------------------------------------------------------------------------------------


def test_undo() -> None:
    model, inputs = llama(), batch()
    before = dict(model.__dict__)
    patched = fusedloss.patch_lm(model)
    assert patched.active and model(**inputs).logits is None
    assert "forward" not in model.lm_head.__dict__ and "_loss_function" not in model.__dict__
    patched.remove()
    patched.remove()
    assert not patched.active and model.__dict__ == before
    assert model(**inputs).logits is not None
    with pytest.raises(KeyError), fusedloss.patch_lm(model):
        raise KeyError
    assert model.__dict__ == before


def test_after_an_error() -> None:
    model, inputs = llama(), batch()
    fusedloss.patch_lm(model)
    wrong = inputs["labels"].clone()
    wrong[1, 3] = CLASSES
    with pytest.raises(IndexError, match=rf"Target {CLASSES} is out of bounds"):
        model(input_ids=inputs["input_ids"], labels=wrong)
    assert "forward" not in model.lm_head.__dict__ and "_loss_function" not in model.__dict__
    assert model(input_ids=inputs["input_ids"]).logits is not None


def test_copies_are_patched() -> None:
    model, inputs = llama(), batch()
    patched = fusedloss.patch_lm(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    ours = step(twin, **inputs)
    patched.remove()
    assert_same_step(ours, step(twin, **inputs))


class Wrapper(nn.Module):
    """Calls forward as PEFT's models do, past the hooks of a module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> Any:
        return self.model

    def forward(self, **inputs: Any) -> Any:
        return self.model.forward(**inputs)


@pytest.mark.parametrize("whole", [True, False])
def test_wrapped_as_by_peft(whole: bool) -> None:
    model, inputs = llama(), batch()
    expected = step(model, **inputs)
    wrapper = Wrapper(model)
    with fusedloss.patch_lm(wrapper if whole else model):
        assert_same_step(step(wrapper, **inputs), expected)
    assert wrapper(**inputs).logits is not None


def test_another_head_after_the_patch() -> None:
    model, inputs = llama(), batch()
    fusedloss.patch_lm(model)
    model.resize_token_embeddings(CLASSES + 6)
    output = model(**inputs)
    assert output.logits is None
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    label = inputs["labels"][:, 1:].flatten()
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(logits, label))


# ---- errors --------------------------------------------------------------------------------------


class Head(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def changing(change: Callable[[Any], Any]) -> Any:
    """A model that does something to its logits before the loss."""

    class Changing(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **more: Any) -> Any:
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = change(self.lm_head(hidden))
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels, self.config.vocab_size, **more)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    return llama(Changing)


KNOWN: dict[str, Callable[[Any], Any]] = {
    "float": lambda z: z.float(),
    "scales": lambda z: 3 * (z / 2).contiguous() * 0.7,
    "capped": lambda z: torch.tanh(z * 4 / 2) * 3 / 2,
    "method": lambda z: z.tanh(),
    "shape": lambda z: z * (z.shape[-1] / CLASSES),
}
UNKNOWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "add": (lambda z: z + 1, "add"),
    "add a tensor": (lambda z: torch.ones(CLASSES) + z, "add"),
    "in place": (lambda z: z.mul_(2), "mul_"),
    "augmented": (lambda z: z.__imul__(2), "imul"),
    "of a tensor": (lambda z: z * torch.ones(CLASSES), "multiplication by a Tensor"),
    "by a tensor": (lambda z: torch.ones(CLASSES) * z, "mul"),
    "divided": (lambda z: z / torch.ones(CLASSES), "division by a Tensor"),
    "twice": (lambda z: z.tanh().tanh(), "tanh, twice"),
    "slice": (lambda z: z[..., :5], "getitem"),
    "function": (lambda z: torch.relu(z), "relu"),
    "keyword": (lambda z: torch.softmax(input=z, dim=-1), "softmax"),
    "list": (lambda z: torch.cat([z, z]), "cat"),
    "view": (lambda z: z.view(-1), "view"),
    "half": (lambda z: z.to(torch.float16), "to"),
}


@pytest.mark.parametrize("change", KNOWN.values(), ids=KNOWN)
def test_changed_logits(change: Callable[[Any], Any]) -> None:
    model, inputs = changing(change), batch()
    expected = step(model, **inputs)
    fusedloss.patch_lm(model)
    assert_same_step(step(model, **inputs), expected)


@pytest.mark.parametrize(("change", "name"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_changes(change: Callable[[Any], Any], name: str) -> None:
    model, inputs = changing(change), batch()
    fusedloss.patch_lm(model)
    with pytest.raises(RuntimeError, match=f"Changing applies {name} to its logits"):
        model(**inputs)


def test_other_logits() -> None:
    model, inputs = changing(lambda _: torch.zeros(3, TOKENS, CLASSES)), batch()
    fusedloss.patch_lm(model)
    with pytest.raises(TypeError, match="what Changing gives its loss_function is a Tensor"):
        model(**inputs)


def test_no_loss() -> None:
    class Silent(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            return super().forward(input_ids)

    model = llama(Silent)
    fusedloss.patch_lm(model)
    with pytest.raises(RuntimeError, match="Silent got labels and did not call its loss_function"):
        model(**batch())


def no_loss_function() -> Any:
    model = nn.Module()
    model.get_output_embeddings = lambda: nn.Linear(3, 5)
    return model


def another_head() -> Any:
    model = llama()
    model.set_output_embeddings(Head(16, CLASSES, bias=False))
    return model


def hooked_head() -> Any:
    model = llama()
    model.lm_head.forward = functools.partial(
        nn.Linear.forward, model.lm_head
    )  # as accelerate's hooks
    return model


def another_loss() -> Any:
    model = llama()
    model.loss_function = nn.functional.cross_entropy
    return model


def no_labels() -> Any:
    class Unlabelled(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Tensor) -> Any:
            raise NotImplementedError

    return llama(Unlabelled)


def masked() -> Any:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=CLASSES, hidden_size=16, num_hidden_layers=1,
                                num_attention_heads=2, intermediate_size=24)
    )  # fmt: skip


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "module": (lambda: nn.Linear(3, 5), TypeError, "and Linear has no output embedding"),
    "body": (lambda: llama().model, TypeError, "and LlamaModel has no output embedding"),
    "head": (another_head, TypeError, r"a torch.nn.Linear with its own forward, not \w+\.Head"),
    "hooked": (hooked_head, TypeError, "not torch.nn.modules.linear.Linear"),
    "older": (no_loss_function, ValueError, "Module has no loss_function that can be set"),
    "loss": (another_loss, ValueError, "must be transformers' ForCausalLMLoss, not cross_entropy"),
    "masked": (masked, ValueError, "BertForMaskedLM must be .* not ForMaskedLMLoss"),
    "labels": (no_labels, TypeError, "the forward of Unlabelled takes no labels"),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_models(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fusedloss.patch_lm(make())


def test_wrong_calls() -> None:
    model = llama()
    with pytest.raises(TypeError, match="unknown option 'softcap'; there are label_smoothing"):
        fusedloss.patch_lm(model, softcap=3.0)
    fusedloss.patch_lm(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched already"):
        fusedloss.patch_lm(model)
    model.config.vocab_size += 1
    with pytest.raises(ValueError, match="a vocabulary of 102, and an output embedding for 101"):
        model(**batch())
    model.set_output_embeddings(Head(16, CLASSES, bias=False))
    with pytest.raises(TypeError, match="not .*Head"):
        model(**batch())
