"""Answers to long prompts in trainers, by their own collators: what the answers need is kept, the
loss is lemo's own, and with keep = 1 losses and gradients are those of the trainer without lemo."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import lemo
from devices import on_gpu
from lemo.models.calls.outputs import DeferredLogits
from lemo.models.training_forward import TrainingForward
from lemo.selection import finite
from lemo.selection import selector as selector_module
from tiny_models import VOCABULARY, make_model
from tolerances import assert_close_fp32
from trainer_cases import LORA, tokenizer

pytestmark = pytest.mark.cpu_only

BLOCK = 16
FACT = list(range(5, 17))
ANSWER = FACT[8:]
CONFIG = lemo.LemoConfig(keep=0.25, block_size=BLOCK, scorer="lexical")


def prompt(index):
    """Token ids: a fact between random words, and at the end the beginning of the fact."""
    draw = torch.Generator().manual_seed(index)
    ids = torch.randint(40, VOCABULARY, (109 - 2 * (index % 3),), generator=draw).tolist()
    first = BLOCK * (1 + index % 4) + 3
    return ids[:first] + FACT + ids[first + len(FACT) :] + FACT[:8]


def text(ids):
    return " ".join(f"w{i - 3}" for i in ids)


def completions():
    return datasets.Dataset.from_list(
        [{"prompt": text(prompt(i)) + " ", "completion": text(ANSWER)} for i in range(12)]
    )


def conversations():
    def turns(index):
        return [
            {"role": "user", "content": text(prompt(index))},
            {"role": "assistant", "content": text(ANSWER)},
        ]

    return datasets.Dataset.from_list([{"messages": turns(i)} for i in range(12)])


def token_rows():
    def row(index):
        ids = prompt(index)
        return {"input_ids": ids + ANSWER, "labels": [-100] * len(ids) + ANSWER}

    return [row(i) for i in range(12)]


def sft(data, **settings):
    def make(model, common):
        return SFTTrainer(
            model,
            args=SFTConfig(
                **{"max_length": 256, "bf16": False, "gradient_checkpointing": False}
                | settings
                | common
            ),
            train_dataset=data(),
            processing_class=tokenizer(),
        )

    return make


def plain(collator):
    def make(model, common):
        return Trainer(
            model,
            TrainingArguments(**common),
            train_dataset=token_rows(),
            data_collator=collator(),
        )

    return make


def padded(side):
    def collator():
        made = tokenizer()
        made.padding_side = side
        return DataCollatorForSeq2Seq(made)

    return collator


TRAINERS = {
    "SFT, completions": sft(completions),
    "SFT, assistant only": sft(conversations, assistant_only_loss=True),
    "SFT, packed": sft(completions, packing=True),
    "SFT, padding-free": sft(completions, padding_free=True, max_length=None),
    "SFT, checkpointing": sft(completions, gradient_checkpointing=True),
    "SFT, dft": sft(completions, loss_type="dft"),
    "Trainer, padded on the right": plain(padded("right")),
    "Trainer, padded on the left": plain(padded("left")),
    "Trainer, flattened": plain(DataCollatorWithFlattening),
    "Trainer, flattened with lengths": plain(
        lambda: DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    ),
}


class Gradients(TrainerCallback):
    """The gradients of each optimizer step, as one vector."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, *args, model, **kwargs):
        found = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        self.steps.append(torch.cat(found).clone())


def adapted(architecture="llama"):
    model = make_model(architecture, attn_implementation="sdpa", max_position_embeddings=512)
    torch.manual_seed(1)
    return get_peft_model(model, LORA)


class Run:
    """A training.

    Attributes:
        losses: of each micro-batch.
        gradients: of each step.
        batches: what each micro-batch was, with its divisor.
        metrics: what the trainer logged in each step.
        handle: lemo's; None: the trainer was alone.
    """

    def __init__(self, name, folder, config=None, steps=3, model=None, enable=lemo.enable):
        torch.manual_seed(0)
        model = adapted() if model is None else model
        gradients = Gradients()
        common = {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        self.trainer = TRAINERS[name](model, common)
        self.trainer.add_callback(gradients)
        self.handle = None if config is None else enable(self.trainer, config)
        self.losses, self.batches = [], []
        compute_loss = self.trainer.compute_loss

        def watched(model, inputs, return_outputs=False, num_items_in_batch=None):
            self.batches.append((dict(inputs), num_items_in_batch))
            loss = compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self.losses.append(loss.detach())
            return loss

        self.trainer.compute_loss = watched
        self.trainer.train()
        self.gradients = gradients.steps
        self.metrics = [log for log in self.trainer.state.log_history if "grad_norm" in log]


@pytest.mark.parametrize("name", TRAINERS)
def test_with_everything_kept_losses_and_gradients_are_the_trainers_own(name, tmp_path):
    alone = Run(name, tmp_path)
    mine = Run(name, tmp_path, lemo.LemoConfig(keep=1, block_size=BLOCK))
    assert_close_fp32(torch.stack(mine.losses), torch.stack(alone.losses))
    assert len(mine.gradients) == 3
    assert_close_fp32(torch.stack(mine.gradients), torch.stack(alone.gradients))
    for log, expected in zip(mine.metrics, alone.metrics):
        for key in {"entropy", "mean_token_accuracy", "num_tokens"} & expected.keys():
            assert log[key] == pytest.approx(expected[key], rel=1e-5)


def needed_blocks(arguments, layout):
    """Blocks of a batch: of each sequence that of the fact and that of the labels."""
    ids, mask = arguments.input_ids, arguments.attention_mask
    packed = ids.flatten() if mask is None else ids[mask.bool()]
    blocks, first = [], 0
    for sequence, count in zip(packed.split(layout.seqlens), layout.block_counts):
        start = sequence.tolist().index(FACT[0])
        assert sequence[start : start + len(FACT)].tolist() == FACT
        blocks += [first + start // BLOCK, first + count - 1]
        first += count
    return blocks


class WidestLogits(TorchDispatchMode):
    """The most rows that a tensor over the vocabulary has had."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.is_tensor(result) and result.ndim and result.shape[-1] == VOCABULARY:
            self.rows = max(self.rows, result.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("name", TRAINERS)
def test_what_answers_need_is_kept_and_nothing_else_computed(name, tmp_path, monkeypatch):
    calls = []

    def watched(original):
        def method(forward, arguments):
            output = original(forward, arguments)
            layers = forward.selector.statistics()
            needed = needed_blocks(arguments, layers[0].layout)
            calls.append(all(layer.attention_blocks.tolist() == needed for layer in layers))
            return output

        return method

    for name_of in ("loss", "labelled_states"):
        monkeypatch.setattr(TrainingForward, name_of, watched(getattr(TrainingForward, name_of)))

    def unwanted(*args):
        raise AssertionError("rows without labels were asked for")

    monkeypatch.setattr(TrainingForward, "states", unwanted)
    monkeypatch.setattr(DeferredLogits, "read", unwanted)
    with WidestLogits() as widest:
        run = Run(name, tmp_path, CONFIG)
    assert len(calls) == len(run.batches)
    assert all(calls), "a block was kept that the answer does not need"
    labels = [int((batch["labels"] != -100).sum()) for batch, _ in run.batches]
    # The head's weights are of this width, too. Kernels of lemo are not looked into.
    assert widest.rows <= max(*labels, VOCABULARY)


@pytest.mark.parametrize("keep", [0.25, 0.01])
@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "SFT, dft"])
def test_the_loss_is_that_inside_the_model(name, keep, tmp_path):
    """Beside `model(**batch).loss`; with 0.01, at random, a part of the labels is left out."""
    scorer = "random" if keep == 0.01 else "lexical"
    config = lemo.LemoConfig(keep=keep, block_size=2, scorer=scorer, keep_last=0)
    run = Run(name, tmp_path, config, steps=1)
    model = adapted()
    handle = lemo.enable(model, config)
    losses = []
    for index, (batch, divisor) in enumerate(run.batches):
        batch = {key: value for key, value in batch.items() if key != "use_cache"}
        handle.begin_pass(index)
        losses.append(model(**batch, num_items_in_batch=divisor).loss)
        losses[-1].backward()
    assert_close_fp32(torch.stack(run.losses), torch.stack(losses).detach())
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    assert_close_fp32(run.gradients[0], torch.cat(gradients))
    labels = int((run.batches[-1][0]["labels"] != -100).sum())
    assert (handle.statistics()[0].attention_rows < labels) == (keep == 0.01)


@pytest.mark.parametrize("architecture", ["opt", "qwen3"])
def test_other_models(architecture, tmp_path):
    alone = Run("SFT, completions", tmp_path, model=adapted(architecture), steps=1)
    config = lemo.LemoConfig(keep=1, block_size=BLOCK)
    mine = Run("SFT, completions", tmp_path, config, model=adapted(architecture), steps=1)
    assert_close_fp32(torch.stack(mine.losses), torch.stack(alone.losses))
    assert_close_fp32(mine.gradients[0], alone.gradients[0])


def test_a_batch_without_labels_trains_nothing(tmp_path):
    run = Run("SFT, completions", tmp_path, CONFIG, steps=1)
    batch, _ = run.batches[0]
    batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    run.trainer.model.train().zero_grad()
    loss = run.trainer.compute_loss(run.trainer.model, batch, num_items_in_batch=8)
    loss.backward()
    assert loss == 0
    assert not any(p.grad is not None and p.grad.any() for p in run.trainer.model.parameters())


@pytest.mark.parametrize("divisor", [8, None])
def test_scores_that_are_nan_make_the_loss_nan(divisor, tmp_path, monkeypatch):
    """Where a GPU is not waited for, also for a mean over the labels, which has no weight."""
    run = Run("SFT, completions", tmp_path, CONFIG.replace(scorer="pooled"), steps=1)
    batch, model = run.batches[0][0], run.trainer.model.train()
    select = selector_module.ops.token_select

    def selecting(scores, *others):
        return select(scores.nan_to_num(nan=-torch.inf), *others)

    monkeypatch.setattr(selector_module.ops, "token_select", selecting)
    monkeypatch.setattr(finite, "_is_waited_for", lambda tensor: False)
    loss = partial(run.trainer.compute_loss, model, batch, num_items_in_batch=divisor)
    assert loss().isfinite()
    with torch.no_grad():
        model.get_input_embeddings().weight[batch["input_ids"][0, 40]] = torch.nan
    assert loss().isnan()
    assert run.handle.reason_of_nan().startswith("layer 0:")


class OwnLoss(SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def test_what_a_subclass_makes_of_the_outputs_is_not_known(tmp_path, monkeypatch):
    """So each row is the dense model's, and the first loss with it."""
    alone = Run("SFT, completions", tmp_path, steps=1)
    monkeypatch.setitem(globals(), "SFTTrainer", OwnLoss)
    mine = Run("SFT, completions", tmp_path, CONFIG, steps=1)
    assert_close_fp32(torch.stack(mine.losses), torch.stack(alone.losses))


@pytest.mark.parametrize("is_attached_twice", [False, True])
def test_what_somebody_has_put_around_the_loss_is_not_known(is_attached_twice, tmp_path):
    """What it adds is no sum over labels, which would be scaled to those that count."""
    added = 5.0

    def enable(trainer, config):
        own = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: own(*args, **kwargs) + added
        handle = lemo.enable(trainer, config)
        if is_attached_twice:
            handle.attach(trainer)
        return handle

    alone = Run("SFT, completions", tmp_path, steps=1)
    config = lemo.LemoConfig(keep=0.5, block_size=2, scorer="random")
    mine = Run("SFT, completions", tmp_path, config, steps=1, enable=enable)
    assert mine.handle.statistics()[0].attention_rows < 0.6 * mine.handle.statistics()[0].tokens
    assert_close_fp32(torch.stack(mine.losses), torch.stack(alone.losses) + added)


def test_an_attached_trainer_may_be_attached_again(tmp_path):
    def enable(trainer, config):
        handle = lemo.enable(trainer, config)
        handle.attach(trainer)
        return handle

    config = lemo.LemoConfig(keep=0.5, block_size=2, scorer="random")
    once = Run("SFT, completions", tmp_path, config, steps=1)
    twice = Run("SFT, completions", tmp_path, config, steps=1, enable=enable)
    assert_close_fp32(torch.stack(twice.losses), torch.stack(once.losses))


def test_without_lemo_the_trainer_is_as_it_was(tmp_path):
    run = Run("SFT, completions", tmp_path, CONFIG, steps=1)
    model = run.trainer.model
    del run.trainer.compute_loss  # the test's own
    run.handle.attach(run.trainer)
    run.handle.remove()
    assert "compute_loss" not in vars(run.trainer)
    batch, divisor = run.batches[0]
    with torch.no_grad():
        expected = run.trainer.compute_loss(model.train(), batch, num_items_in_batch=divisor)
    assert_close_fp32(run.trainer.compute_loss(model, batch, num_items_in_batch=divisor), expected)


def examples_of(title):
    """The Python of a section of the page about answers."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "ANSWERS.md").read_text()
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_loop_of_the_documentation():
    [example] = examples_of("In a loop of your own")
    if not on_gpu():
        example = example.replace('.pin_memory().to("cuda", non_blocking=True)', "")
    model = adapted()
    rows = [(row["input_ids"], row["labels"]) for row in token_rows()]
    batches = [
        tuple(torch.tensor([part], device="cpu") for part in (ids, labels)) for ids, labels in rows
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    # The prompts here are short.
    config = partial(lemo.LemoConfig, block_size=BLOCK)
    of_lemo = SimpleNamespace(enable=lemo.enable, LemoConfig=config)
    names = {"lemo": of_lemo, "model": model, "batches": batches[:2]}
    names["optimizer"] = torch.optim.SGD(trained, lr=0.1)
    exec(example, names)
    assert any(not torch.equal(*pair) for pair in zip(before, trained, strict=True))
    for layer in names["handle"].statistics():
        assert 0 < layer.attention_rows < 0.6 * layer.tokens


def test_examples_of_the_documentation(tmp_path, monkeypatch):
    examples = examples_of("With your trainer")
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    common = {"use_cpu": True, "report_to": [], "max_steps": 2, "disable_tqdm": True}
    # The prompts here are short, and by default they would be kept.
    enable = partial(lemo.enable, config=lemo.LemoConfig(keep=0.25, block_size=BLOCK))
    for example in examples:
        names = {
            "lemo": SimpleNamespace(enable=enable),
            "model": adapted(),
            "SFTConfig": partial(SFTConfig, bf16=False, **common),
            "SFTTrainer": partial(SFTTrainer, processing_class=tokenizer()),
            "TrainingArguments": partial(TrainingArguments, **common),
            "Trainer": Trainer,
            "DataCollatorWithFlattening": DataCollatorWithFlattening,
            "answers": completions(),
            "rows": token_rows(),
        }
        exec(example, names)
        assert names["trainer"].state.global_step == 2
        for layer in names["model"].get_base_model()._lemo_handle.statistics():
            assert 0 < layer.attention_rows < 0.6 * layer.tokens
