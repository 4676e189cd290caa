"""What a trainer tells lemo, and what is left of that afterwards."""

from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lemo
from lemo.models.callback import TrainerCallback, rows_of_batch
from tiny_models import make_ids, make_model, padded_batch
from tolerances import assert_close_fp32
from trainer_cases import tokenizer, words

pytestmark = pytest.mark.cpu_only

COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
CONFIG = lemo.LemoConfig(keep=0.5, block_size=8)


def trainer_of(model, folder, **more):
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(8, 40)]
    arguments = TrainingArguments(str(folder), **COMMON | more)
    return Trainer(model, arguments, train_dataset=rows)


class Told:
    """In the place of a handle: what it was told, and which modules are watched."""

    def __init__(self, size=None):
        self.causal_lm = nn.Linear(1, 1)
        self.context_parallel = None if size is None else SimpleNamespace(size=size)
        self.said, self.watched = [], []

    def begin_step(self, step, steps):
        self.said.append((step, steps))

    def begin_pass(self, index):
        self.said.append(index)

    def watch(self, module):
        self.watched.append(module)
        return lambda: self.watched.remove(module)

    def naming(self, rows):
        return nullcontext()

    def overtake(self):
        return lambda: None

    def counting(self, scales):
        return nullcontext([])


def test_steps_and_passes_are_those_of_the_trainer(tmp_path, monkeypatch):
    """Random blocks depend on them, also where a training is resumed."""
    trainer = trainer_of(make_model("llama"), tmp_path)
    handle = lemo.enable(trainer, CONFIG)
    said = []
    for name in ("begin_step", "begin_pass"):
        own = getattr(type(handle), name)
        monkeypatch.setattr(
            type(handle), name, lambda self, *a, own=own: said.append(a) or own(self, *a)
        )
    trainer.train()
    # The trainer tells of the end of the last pass in another way.
    assert said == [(0, 2), (0,), (1,), (1, 2), (0,), (1,)]


@pytest.mark.parametrize(
    ("size", "processes", "process", "passes"),
    [(None, 3, 2, [2, 5]), (1, 3, 1, [1, 4]), (2, 4, 3, [1, 3]), (2, 4, 1, [0, 2])],
)
def test_passes_of_several_processes_are_counted_as_those_of_one(size, processes, process, passes):
    told = Told(size)
    callback = TrainerCallback(told)
    args = SimpleNamespace(world_size=processes, process_index=process)
    for step in (4, 5):
        state = SimpleNamespace(global_step=step, max_steps=9)
        callback.on_step_begin(args, state, None)
        callback.on_substep_end(args, state, None)
    assert told.said == [(4, 9), *passes, (5, 9), *passes]


def test_one_module_is_watched_at_a_time_and_none_after_training():
    told = Told()
    callback = TrainerCallback(told)
    for _ in range(2):  # as where the first training ended by an error
        model = nn.Sequential(told.causal_lm)
        callback.on_train_begin(SimpleNamespace(), model=model)
        assert told.watched == [model]
    callback.on_train_end()
    assert told.watched == []


def test_a_trainer_that_is_left_is_as_it_was(tmp_path):
    trainer = trainer_of(make_model("llama"), tmp_path)
    before = list(trainer.callback_handler.callbacks)
    handle = lemo.enable(trainer, CONFIG)
    assert len(trainer.callback_handler.callbacks) == len(before) + 1
    handle.remove()
    assert trainer.callback_handler.callbacks == before
    assert "compute_loss" not in vars(trainer)


def test_what_somebody_puts_around_the_loss_later_stays(tmp_path):
    trainer = trainer_of(make_model("llama"), tmp_path)
    handle = lemo.enable(trainer, CONFIG)
    inner = trainer.compute_loss

    def doubled(*args, **kwargs):
        return 2 * inner(*args, **kwargs)

    trainer.compute_loss = doubled
    handle.remove()
    assert trainer.compute_loss is doubled


@pytest.fixture
def sft(tmp_path):
    """(trainer, handle), as within a step."""
    rows = [{"prompt": words(30, seed) + " ", "completion": words(8, seed + 50)} for seed in (1, 2)]
    trainer = SFTTrainer(
        make_model("llama", attn_implementation="sdpa"),
        args=SFTConfig(str(tmp_path), bf16=False, max_length=256, **COMMON),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    handle = lemo.enable(trainer, CONFIG.replace(scorer="random"))
    trainer.current_gradient_accumulation_steps = 1  # set by train()
    return trainer, handle


def test_outputs_are_returned_beside_the_loss(sft):
    """As subclasses of SFTTrainer ask for; the loss is that without them."""
    trainer, handle = sft
    batch = next(iter(trainer.get_train_dataloader()))
    losses = []
    for given in ({}, {"return_outputs": True}):
        handle.begin_step(0, 1)
        found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=20, **given)
        losses.append(found[0] if given else found)
    assert found[1] is not None
    assert losses[0] > 0
    assert_close_fp32(losses[1], losses[0])


@pytest.mark.parametrize("divisor", [None, 60])
def test_labels_that_padding_predicts_count_in_the_divisor_alone(sft, divisor):
    trainer, handle = sft
    batch = padded_batch([40, 25], "left")
    present = batch["attention_mask"].bool()
    batch["labels"] = batch["input_ids"].where(present, torch.tensor(-100))
    handle.begin_step(0, 1)
    found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=divisor)
    handle.begin_step(0, 1)
    expected = handle.loss(**batch, num_items_in_batch=divisor)
    assert_close_fp32(found, expected)


def test_ligers_settings_are_read_where_liger_is_used_only(tmp_path):
    arguments = {"use_liger_kernel": False, "liger_kernel_config": {"rope": True}}
    trainer = trainer_of(make_model("llama"), tmp_path, **arguments)
    lemo.enable(trainer, CONFIG)
    assert trainer.train().training_loss > 0


def test_labels_say_more_than_masks_of_collators():
    ids = make_ids(1, 6)
    labels = torch.where(torch.arange(6) == 4, ids, -100)
    found = rows_of_batch({"input_ids": ids, "labels": labels, "completion_mask": ids * 0 + 1})
    assert found.tolist() == [[False, False, False, True, False, False]]
    found = rows_of_batch({"input_ids": ids, "completion_mask": None, "assistant_masks": ids})
    assert found.tolist() == [[True] * 5 + [False]]
    assert rows_of_batch({"labels": labels}) is None
    assert rows_of_batch({"input_ids": ids, "labels": labels[:, 1:]}) is None
