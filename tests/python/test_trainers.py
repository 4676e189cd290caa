"""Trainers that compute the loss outside the model: Transformers' and TRL's, with and without lemo.

Losses are the dense model's at any share that is kept, gradients at keep = 1. The exception is
SFTTrainer where lemo is attached to it, whose loss is as one inside the model
(test_trainers_answers.py).
"""

import pickle

import datasets
import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import lemo
from generic_cases import make as generic_model
from lemo.models.training_forward import TrainingForward
from tiny_models import make_ids, make_model
from trainer_cases import LORA, tokenizer, words

pytestmark = pytest.mark.cpu_only

BEFORE, ADDS_PEFT, AFTER, ATTACHED = ORDERS = (
    "enabled before",
    "enabled before, trainer adds PEFT",
    "enabled after",
    "enabled before, attached after",
)


def rows(kind):
    counts = enumerate(range(30, 62, 4))
    match kind:
        case "text":
            found = [{"text": words(count, seed)} for seed, count in counts]
        case "completion":
            found = [
                {"prompt": words(count, seed) + " ", "completion": words(8, seed + 50)}
                for seed, count in counts
            ]
        case "conversation":
            found = [
                {
                    "messages": [
                        {"role": "user", "content": words(count, seed)},
                        {"role": "assistant", "content": words(8, seed + 50)},
                        {"role": "user", "content": words(9, seed + 20)},
                        {"role": "assistant", "content": words(3, seed + 70)},
                    ]
                }
                for seed, count in counts
            ]
        case _:
            found = [
                {
                    "prompt": words(count, seed) + " ",
                    "chosen": words(8, seed + 50),
                    "rejected": words(5, seed + 70),
                }
                for seed, count in counts
            ]
    return datasets.Dataset.from_list(found)


def sft(data, **settings):
    def make(model, peft, common):
        config = SFTConfig(**{"max_length": 256} | settings, **common)
        return SFTTrainer(
            model,
            args=config,
            train_dataset=rows(data),
            processing_class=tokenizer(),
            peft_config=peft,
        )

    return make


def dpo(model, peft, common):
    return DPOTrainer(
        model,
        args=DPOConfig(max_length=256, **common),
        train_dataset=rows("preference"),
        processing_class=tokenizer(),
        peft_config=peft,
    )


def plain(**settings):
    def make(model, peft, common):
        loss = settings.pop("compute_loss_func", None)
        if peft is not None:
            model = get_peft_model(model, peft)
        return Trainer(
            model,
            TrainingArguments(**settings, **common),
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in make_ids(8, 40)],
            compute_loss_func=loss,
        )

    return make


def own_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"
    )
    return losses / num_items_in_batch


TRAINERS = {
    "SFT": sft("text"),
    "SFT, completions": sft("completion"),
    "SFT, assistant only": sft("conversation", assistant_only_loss=True),
    "SFT, packed": sft("text", packing=True, max_length=128),
    "SFT, padding-free": sft("text", padding_free=True, max_length=None),
    "SFT, label smoothing": sft("text", label_smoothing_factor=0.1),
    "DPO": dpo,
    "Trainer, label smoothing": lambda *a: plain(label_smoothing_factor=0.1)(*a),
    "Trainer, own loss": lambda *a: plain(compute_loss_func=own_loss)(*a),
}


def train(name, folder, keep=None, order=BEFORE, steps=3):
    """(losses, norms of gradients) of each step; None: without lemo."""
    torch.manual_seed(0)
    model = make_model("llama", attn_implementation="sdpa", max_position_embeddings=512)
    config = None if keep is None else lemo.LemoConfig(keep=keep, block_size=8)
    peft = LORA if order == ADDS_PEFT else None
    handle = None
    if peft is None:
        torch.manual_seed(1)
        model = get_peft_model(model, LORA)
    if config is not None and order != AFTER:
        handle = lemo.enable(model, config)
    common = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    common |= {} if name.startswith("Trainer") else {"bf16": False, "gradient_checkpointing": False}
    torch.manual_seed(1)
    trainer = TRAINERS[name](model, peft, common)
    if config is not None and order == AFTER:
        handle = lemo.enable(trainer, config)
    elif order == ATTACHED and handle is not None:
        handle.attach(trainer)
    elif handle is not None:
        trainer.add_callback(lemo.TrainerCallback(handle))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    if handle is not None:
        shares = {layer.attention_rows / layer.tokens for layer in handle.statistics()}
        assert all(share == 1 if keep == 1 else share < 0.7 for share in shares)
        handle.remove()
        trainer.args.max_steps = 1
        assert trainer.train().training_loss > 0, "the trainer works without lemo again"
    return (torch.tensor([log[key] for log in logs]) for key in ("loss", "grad_norm"))


CASES = [(name, order) for name in TRAINERS for order in (BEFORE, ADDS_PEFT, AFTER)]


@pytest.mark.parametrize(("name", "order"), [*CASES, ("SFT", ATTACHED), ("SFT, packed", ATTACHED)])
def test_losses_and_gradients(name, order, tmp_path):
    losses, norms = train(name, tmp_path, order=order)
    everything = train(name, tmp_path, keep=1, order=order)
    # Trainers log five digits.
    for mine, theirs in zip(everything, (losses, norms)):
        assert torch.allclose(mine, theirs, rtol=1e-3)
    half, half_norms = train(name, tmp_path, keep=0.5, order=order)
    inside = order in (AFTER, ATTACHED) and name.startswith("SFT") and "smoothing" not in name
    # A loss inside is that of kept rows alone.
    equal = abs(half[0] - losses[0]) <= 1e-4 * losses[0]
    assert equal != inside, "whether the first loss is the dense model's"
    if name == "DPO":
        assert abs(half[0] - torch.log(torch.tensor(2.0))) < 1e-4
    # Gradients come from the kept rows, and they train. A sum over all labels has smaller ones; a
    # mean over the kept ones is compared with an oracle in test_trainers_answers.py.
    assert half_norms[0] > 0
    assert inside or half_norms[0] < 1.05 * norms[0]
    assert (half - losses).abs().max() < 0.2 * losses[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["SFT, completions", "SFT, assistant only", "DPO"])
def test_blocks_that_have_labels_are_kept(name, order, tmp_path, monkeypatch):
    """A quarter of the rows, of which the labels need one or two blocks of each sequence."""
    seen = []

    def watched(original):
        def method(forward, arguments):
            output = original(forward, arguments)
            layer = forward.selector.statistics()[0]
            rows = forward.row_labels
            assert rows is not None, "nobody named the labels"
            mask = arguments.attention_mask
            packed = rows[mask.bool()] if mask is not None else rows.flatten()
            needed = set(layer.layout.blocks_with(packed).nonzero()[:, 0].tolist())
            kept = set(layer.attention_blocks.tolist())
            seen.append(needed <= kept)
            return output

        return method

    for method in ("states", "labelled_states"):
        monkeypatch.setattr(TrainingForward, method, watched(getattr(TrainingForward, method)))
    train(name, tmp_path, keep=0.6, order=order, steps=2)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("name", ["Trainer, label smoothing", "SFT"])
def test_training_with_half_of_the_rows_learns(name, tmp_path):
    losses, _ = train(name, tmp_path, keep=0.5, steps=12)
    assert losses[-3:].mean() < 0.97 * losses[:3].mean()


def test_attach_names_labels_that_the_trainer_takes_away(tmp_path, monkeypatch):
    known = []
    states = TrainingForward.states

    def watched(forward, arguments):
        known.append(forward.row_labels is not None)
        return states(forward, arguments)

    monkeypatch.setattr(TrainingForward, "states", watched)
    train("Trainer, label smoothing", tmp_path, keep=0.5, order=AFTER, steps=1)
    assert known == [True, True]


def test_a_model_with_a_trainer_can_be_pickled(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(make_model("llama"), arguments)
    lemo.enable(trainer, lemo.LemoConfig(keep=0.5))
    loaded = pickle.loads(pickle.dumps(trainer.model))
    ids = make_ids(1, 40)
    assert loaded(input_ids=ids, labels=ids).loss > 0
    assert loaded._lemo_handle.statistics()[0].attention_rows == 20


def test_a_trainer_of_another_model_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(make_model("llama"), arguments)
    handle = lemo.enable(make_model("llama"))
    with pytest.raises(
        ValueError, match="trainer: expected one of the model that lemo was enabled"
    ):
        handle.attach(trainer)
    with pytest.raises(TypeError, match="trainer: expected a transformers.Trainer, got str"):
        handle.attach("trainer")


def token_trainer(model, folder, **more):
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(8, 40)]
    settings = {"max_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    settings |= {name: more.pop(name) for name in list(more) if "liger" in name}
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=rows, **more)


@pytest.mark.parametrize("order", [AFTER, BEFORE])
def test_a_model_that_is_made_when_training_begins_is_refused(order, tmp_path):
    """It would train without lemo."""
    trainer = token_trainer(None, tmp_path, model_init=lambda: make_model("llama"))
    if order == AFTER:
        lemo.enable(trainer)
    else:
        trainer.add_callback(lemo.TrainerCallback(lemo.enable(trainer.model)))
    with pytest.raises(ValueError, match="model: expected the LlamaForCausalLM .* model_init"):
        trainer.train()


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_ligers_loss_is_refused(name, tmp_path, monkeypatch):
    """A trainer puts its forward in place of lemo's when training begins."""
    applied = []

    def apply(model, kernels):
        applied.append(kernels)

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    model = make_model("llama") if name == "llama" else generic_model("phi3")
    trainer = token_trainer(model, tmp_path / "fused", use_liger_kernel=True)
    handle = lemo.enable(trainer, lemo.LemoConfig(keep=0.5))
    with pytest.raises(ValueError, match="use_liger_kernel: expected False"):
        trainer.train()
    handle.remove()
    others = {"fused_linear_cross_entropy": False}
    trainer = token_trainer(
        model, tmp_path / "others", use_liger_kernel=True, liger_kernel_config=others
    )
    handle = lemo.enable(trainer, lemo.LemoConfig(keep=0.5))
    trainer.train()
    assert applied[-1] == others
    layer = handle.statistics()[0]
    assert layer.attention_rows == layer.tokens / 2


def test_labels_are_named_by_masks_of_collators():
    from lemo.models.callback import rows_of_batch

    ids = make_ids(1, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 0]])
    expected = torch.tensor([[False, False, True, True, False, False]])
    for batch in (
        {"completion_mask": mask},
        {"assistant_masks": mask},
        {"labels": ids.where(mask.bool(), torch.tensor(-100))},
    ):
        assert torch.equal(rows_of_batch({"input_ids": ids, **batch}), expected)
    assert rows_of_batch({"input_ids": ids}) is None
    assert rows_of_batch({"input_ids": ids, "completion_mask": mask[:, 1:]}) is None
