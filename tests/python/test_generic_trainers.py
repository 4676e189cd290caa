"""Trainers of Transformers and TRL on models that lemo has no architecture for."""

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lemo
from generic_cases import BLOCK, make
from lemo import LemoConfig
from lemo.models.generic.path import GenericPath
from tiny_models import make_ids
from tolerances import assert_close_fp32
from trainer_cases import LORA, tokenizer, words

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::FutureWarning")]

_COMMON = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def plain_trainer(model, folder, **more):
    ids = [make_ids(1, 48, seed)[0] for seed in range(8)]
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(output_dir=str(folder), **_COMMON, **more)
    return Trainer(model, arguments, train_dataset=data)


def sft_trainer(model, folder, peft=None, **more):
    rows = [
        {"prompt": words(30 + 4 * seed, seed) + " ", "completion": words(8, seed + 50)}
        for seed in range(8)
    ]
    arguments = SFTConfig(output_dir=str(folder), bf16=False, max_length=256, **_COMMON, **more)
    return SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=peft,
    )


def losses_and_weights(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return torch.tensor(losses), weights


CASES = [
    ("gemma3_text", plain_trainer, {}),
    ("gemma3_text", plain_trainer, {"gradient_checkpointing": True}),
    ("phi3", plain_trainer, {"gradient_accumulation_steps": 2}),
    ("phi3", sft_trainer, {}),
    ("qwen3_moe", sft_trainer, {"gradient_accumulation_steps": 2}),
    ("granite", sft_trainer, {"gradient_checkpointing": True, "peft": LORA}),
]


@pytest.mark.parametrize(("name", "build", "more"), CASES)
def test_everything_kept_trains_the_model_as_the_trainer_does(name, build, more, tmp_path):
    expected = losses_and_weights(build(make(name), tmp_path, **more))
    trainer = build(make(name), tmp_path, **more)
    handle = lemo.enable(trainer, LemoConfig(keep=1.0, block_size=BLOCK))
    got = losses_and_weights(trainer)
    assert type(handle.path) is GenericPath
    assert handle.statistics()
    for mine, theirs in zip(got, expected):
        assert_close_fp32(mine, theirs)


@pytest.mark.parametrize("build", [plain_trainer, sft_trainer])
def test_half_of_the_rows_train(build, tmp_path):
    model = make("gemma3_text")
    trainer = build(model, tmp_path)
    handle = lemo.enable(trainer, LemoConfig(keep=0.5, block_size=BLOCK))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    losses, after = losses_and_weights(trainer)
    kept = handle.statistics()[0]
    assert 0.4 < kept.attention_rows / kept.tokens < 0.65
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    assert (losses < 6).all()
    handle.remove()
    assert model.config._attn_implementation == "eager"


def test_what_routers_add_is_not_scaled_with_the_labels_that_count(tmp_path):
    """SFTTrainer's loss is that of the kept labels, as a mean, and the routers' own."""
    trainer = sft_trainer(make("qwen3_moe"), tmp_path)
    handle = lemo.enable(trainer, LemoConfig(keep=0.5, block_size=BLOCK, scorer="random"))
    trainer.current_gradient_accumulation_steps = 1  # set by train()
    batch = next(iter(trainer.get_train_dataloader()))
    items = (batch["labels"] != -100).sum()
    handle.begin_step(0, 1)
    got = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    handle.begin_step(0, 1)
    names = ("input_ids", "attention_mask", "labels")
    call = {name: batch[name] for name in names if name in batch}
    expected = handle.loss(**call, num_items_in_batch=items)
    assert_close_fp32(got, expected)
    assert handle.causal_lm.config.router_aux_loss_coef > 0
