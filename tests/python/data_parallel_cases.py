"""Trainings by trainers in one process and in several, on the same data."""

import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lemo
from lemo.training.sharding import whole
from tiny_models import config_of, lora, make_ids, make_model
from trainer_cases import tokenizer, words

EVALUATED = 4
PASSES = 4  # of an optimizer step, of all processes together
STEPS = 3
LENGTHS = (60, 9, 33, 47, 12, 58, 25, 41, 17, 52, 30, 8)

KINDS = {
    "Trainer": {"path": "native"},
    "Trainer, generic": {"path": "generic"},
    "SFTTrainer": {"path": "native"},
    "SFTTrainer, completions": {"path": "native"},
}


# What `accelerate launch --use_fsdp --fsdp_version 2 ...` tells the processes that it starts.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def train(folder: str) -> dict[str, dict[str, Any]]:
    """By kind: losses of the steps, trained weights, and in which passes gradients are reduced."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if distributed.is_initialized():
        as_torchrun()
    return {kind: _train(kind, settings, folder) for kind, settings in KINDS.items()}


def train_in_groups(folder: str, size: int, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The same where `size` processes share out the kept rows of a batch; 1: as `train`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if distributed.is_initialized():
        as_torchrun()
    if size > 1:
        as_on_gpus()
    return {kind: _train(kind, KINDS[kind], folder, size, evaluates=True) for kind in kinds}


def as_on_gpus() -> None:
    """Has accelerate take this process for one of several with a GPU each, which are CPUs here.

    It has ParallelismConfig, and FSDP, for GPUs alone; nothing else of it is replaced.
    """
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def as_torchrun() -> None:
    """Says in the environment which process this is, as torchrun does."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in named.items()}


def _train(
    kind: str, settings: dict[str, Any], folder: str, size: int = 1, evaluates: bool = False
) -> dict[str, Any]:
    torch.manual_seed(0)
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    model = lora(make_model("llama"))
    fixed = {
        "keep": 0.5,
        "block_size": 8,
        "scorer": "random",
        "dense_layers": (),
    }
    common = {
        "output_dir": str(Path(folder) / kind),
        "use_cpu": size == 1,
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": PASSES // (processes // size),
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
    mesh = None
    if size > 1:
        sizes = ParallelismConfig(cp_size=size, dp_shard_size=processes // size)
        mesh = sizes.get_device_mesh("cpu")
        common |= {"parallelism_config": sizes} | _by_fsdp(launched="completions" not in kind)
    handle = lemo.enable(model, config_of(**fixed | settings), mesh)
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
            eval_dataset=datasets.Dataset.from_list(rows[:EVALUATED]),
            processing_class=tokenizer(),
        )
    else:
        samples = [make_ids(1, count, seed)[0].tolist() for seed, count in enumerate(LENGTHS)]
        trainer = Trainer(
            model,
            TrainingArguments(**common),
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in samples],
            eval_dataset=[{"input_ids": ids, "labels": ids} for ids in samples[:EVALUATED]],
            data_collator=DataCollatorForSeq2Seq(tokenizer()),
        )
    handle.attach(trainer)
    reduced: list[bool] = []

    def look(module: nn.Module, *_: Any) -> None:
        wrapped = trainer.model_wrapped
        if processes > 1 and size == 1 and module is model:
            reduced.append(wrapped.require_backward_grad_sync)

    model.register_forward_pre_hook(look)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = [whole(p.detach()).flatten() for p in model.parameters() if p.requires_grad]
    # No tensors: those are handed over by processes that have ended.
    found = {"losses": losses, "trained": torch.cat(trained).tolist(), "reduced": reduced}
    found["parameters"] = len([*model.parameters()])
    found["sharded"] = sum(isinstance(p, DTensor) for p in model.parameters())
    if evaluates:
        found["evaluated"] = trainer.evaluate()["eval_loss"]
        found["saved"] = _saved(trainer, Path(folder) / f"{kind}, saved by {processes}")
    return found


def _by_fsdp(launched: bool) -> dict[str, Any]:
    """Arguments of a trainer whose weights FSDP2 shards, as accelerate launch said or they say."""
    if launched:
        os.environ |= LAUNCHED
        return {}
    for name in LAUNCHED:
        os.environ.pop(name, None)
    return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def _saved(trainer: Trainer, folder: Path) -> list[float]:
    """The adapter that a trainer saves, of which every process reads the main process's file."""
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    weights = load_file(folder / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)]).tolist()


def refusals(folder: str) -> dict[str, str]:
    """What trainers say that do not fit the group of processes that lemo was told of."""
    warnings.simplefilter("ignore")
    as_torchrun()
    as_on_gpus()
    os.environ |= LAUNCHED
    ids = make_ids(1, 32, 0)[0].tolist()

    def message(
        size: int | None, context: Any, attaches: bool = True, calls: bool = True, **more: Any
    ) -> str:
        AcceleratorState._reset_state()
        model = lora(make_model("llama"))
        model.set_attn_implementation("sdpa")  # accelerate cuts the batches of no other
        config = config_of(keep=0.5, block_size=8, scorer="random", dense_layers=())
        handle = lemo.enable(model, config, context)
        if size is not None:
            more["parallelism_config"] = ParallelismConfig(cp_size=size)
        arguments = {"output_dir": folder, "max_steps": 1, "report_to": []}
        trainer = Trainer(
            model,
            TrainingArguments(**arguments, disable_tqdm=True, save_strategy="no", **more),
            train_dataset=[{"input_ids": ids, "labels": ids}] * 2,
            data_collator=DataCollatorForSeq2Seq(tokenizer()),
            callbacks=[lemo.TrainerCallback(handle)] if calls and not attaches else [],
        )
        try:
            if attaches:
                handle.attach(trainer)
            trainer.train()
        except ValueError as error:
            return str(error)
        return ""

    def without_plugin() -> str:
        del os.environ["ACCELERATE_USE_FSDP"]
        try:
            message(2, world)
        except ValueError as error:
            return str(error)
        finally:
            os.environ |= LAUNCHED
        return ""

    world = distributed.group.WORLD
    alone = distributed.new_group([0]), distributed.new_group([1])
    return {
        "lemo knows of no group": message(2, None),
        "the trainer knows of no group": message(None, world),
        "nothing told": message(2, None, attaches=False, calls=False),
        "the callback alone": message(2, world, attaches=False),
        "labels of a process": message(2, world, average_tokens_across_devices=False),
        "a group of one": message(2, alone[distributed.get_rank()]),
        "not sharded": without_plugin(),
        "fits": message(2, world),
    }
