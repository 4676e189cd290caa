"""Trainings by trainers in one process and in several, on the same data."""

import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import distributed, nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lemo
from tiny_models import config_of, lora, make_ids, make_model
from trainer_cases import tokenizer, words

PASSES = 4  # of an optimizer step, of all processes together
STEPS = 3
LENGTHS = (60, 9, 33, 47, 12, 58, 25, 41, 17, 52, 30, 8)

KINDS = {
    "Trainer": {"path": "native"},
    "Trainer, generic": {"path": "generic"},
    "SFTTrainer": {"path": "native"},
    "SFTTrainer, completions": {"path": "native"},
}


def train(folder: str) -> dict[str, dict[str, Any]]:
    """By kind: losses of the steps, trained weights, and in which passes gradients are reduced."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if distributed.is_initialized():
        as_torchrun()
    return {kind: _train(kind, settings, folder) for kind, settings in KINDS.items()}


def as_torchrun() -> None:
    """Says in the environment which process this is, as torchrun does."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in named.items()}


def _train(kind: str, settings: dict[str, Any], folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    model = lora(make_model("llama"))
    fixed = {
        "keep": 0.5,
        "block_size": 8,
        "scorer": "random",
        "dense_layers": (),
    }
    handle = lemo.enable(model, config_of(**fixed | settings))
    common = {
        "output_dir": str(Path(folder) / kind),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": PASSES // processes,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "average_tokens_across_devices": True,
    }
    if kind.startswith("SFT"):
        rows = [{"text": words(count, seed)} for seed, count in enumerate(LENGTHS)]
        if "completions" in kind:
            rows = [
                {"prompt": words(count, seed) + " ", "completion": words(4 + seed, seed + 50)}
                for seed, count in enumerate(LENGTHS)
            ]
        trainer: Trainer = SFTTrainer(
            model,
            args=SFTConfig(max_length=256, **common),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
    else:
        samples = [make_ids(1, count, seed)[0].tolist() for seed, count in enumerate(LENGTHS)]
        trainer = Trainer(
            model,
            TrainingArguments(**common),
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in samples],
            data_collator=DataCollatorForSeq2Seq(tokenizer()),
        )
    handle.attach(trainer)
    reduced: list[bool] = []

    def look(module: nn.Module, *_: Any) -> None:
        wrapped = trainer.model_wrapped
        if processes > 1 and module is model:
            reduced.append(wrapped.require_backward_grad_sync)

    model.register_forward_pre_hook(look)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    # No tensors: those are handed over by processes that have ended.
    return {"losses": losses, "trained": torch.cat(trained).tolist(), "reduced": reduced}
