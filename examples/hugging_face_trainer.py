"""Hugging Face's Trainer: `pip install 'fusedloss[examples]'`, then this script.

The loss is deep inside transformers, which calls torch.nn.functional.cross_entropy.
fusedloss.patch() makes that call fused while the trainer runs. The model is tiny and random, and
nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import fusedloss


class Sentences(Dataset[dict[str, Tensor]]):
    """Sequences that count upwards, so that there is something to learn; the first tokens are
    padding."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(24) + index) % 60
        labels = tokens.clone()
        labels[: index % 8] = -100
        return {"input_ids": tokens, "labels": labels}


def train(fused: bool, steps: int = 6) -> list[float]:
    """The loss of every step."""
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Sentences())
        with fusedloss.patch() if fused else nullcontext():
            trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    for theirs, ours in zip(train(fused=False), train(fused=True), strict=True):
        print(f"torch {theirs:.6f}   fused {ours:.6f}")
