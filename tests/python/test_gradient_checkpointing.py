"""Gradient checkpointing as users switch it on: a layer stores its kept rows, nothing else."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import lemo
from generic_cases import make as make_generic
from lemo import LemoConfig
from lemo.settings.elimination import LayerwiseConfig
from model_checks import saved_bytes
from tiny_models import HIDDEN, gradients, lora, make_ids, make_model
from tolerances import assert_close_fp32

pytestmark = pytest.mark.cpu_only

TOKENS, LAYERS = 128, (2, 4)
# Of fp32; every model here is as wide.
ROW = 4 * HIDDEN
NATIVE = [("native", "llama"), ("native", "qwen3"), ("native", "opt")]
GENERIC = [("generic", name) for name in ("llama", "gemma2", "phi3", "gpt_neox", "mixtral")]


def model_of(path, name, layers):
    make = make_model if path == "native" else make_generic
    targets = "all-linear" if path == "generic" else {}
    model = make(name, num_hidden_layers=layers)
    return lora(model, target_modules=targets) if targets else lora(model)


def config(path, keep):
    return LemoConfig(path=path, keep=keep, block_size=8, scorer="random")


def batch():
    ids = make_ids(1, TOKENS)
    return {"input_ids": ids, "labels": ids}


class Measuring(Trainer):
    """Counts what autograd stores for backward in the first step."""

    def compute_loss(self, model, inputs, **settings):
        stored = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            stored[storage.data_ptr()] = (tensor, storage.nbytes())
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().compute_loss(model, inputs, **settings)
        self.stored = sum(size for key, (_, size) in stored.items() if key not in parameters)
        return loss


def stored_by_enable(path, name, layers, keep, reentrant):
    model = model_of(path, name, layers)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    lemo.enable(model, config(path, keep))
    return saved_bytes(model, batch())


def stored_by_trainer(path, name, layers, keep, reentrant, folder):
    model = model_of(path, name, layers)
    rows = [{key: value[0] for key, value in batch().items()}]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Measuring(model, arguments, train_dataset=rows)
    lemo.enable(trainer, config(path, keep))
    trainer.train()
    return trainer.stored


def per_layer(measure):
    """Bytes that one more layer stores."""
    few, many = (measure(layers) for layers in LAYERS)
    return (many - few) / (LAYERS[1] - LAYERS[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("keep", [1.0, 0.25])
@pytest.mark.parametrize(("path", "name"), NATIVE + GENERIC)
def test_a_layer_stores_its_kept_rows(path, name, keep, reentrant):
    found = per_layer(lambda layers: stored_by_enable(path, name, layers, keep, reentrant))
    row = ROW
    if name == "mixtral" and not reentrant:
        # What the loss of the router needs: its logits and their softmax for four experts.
        row += 2 * 4 * 4
    assert found == keep * TOKENS * row


def stored_with(path, layers, reentrant, settings, autocast, is_enabled_first):
    """Bytes of a step with more settings, and where lemo is enabled before it is switched on."""
    model = model_of(path, "llama", layers)
    if is_enabled_first:
        lemo.enable(model, config(path, 0.25).model_copy(update=settings))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not is_enabled_first:
        lemo.enable(model, config(path, 0.25).model_copy(update=settings))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return saved_bytes(model, batch())


OTHERS = [
    ("native", {}, False, True),
    ("native", {}, True, False),
    ("native", {"burn_in": 0.5}, False, False),
    ("native", {"scorer": "pooled"}, False, False),
    ("native", {"head_groups": 2}, False, False),
    ("native", {"products": "fp8"}, False, False),
    ("native", {"layerwise": LayerwiseConfig(group_size=32)}, False, False),
    ("generic", {}, False, True),
    ("generic", {}, True, False),
    ("generic", {"burn_in": 0.5}, False, False),
    ("generic", {"layerwise": LayerwiseConfig(group_size=32)}, False, False),
]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("path", "settings", "autocast", "is_enabled_first"), OTHERS)
def test_so_it_does_with_other_settings(path, settings, autocast, is_enabled_first, reentrant):
    more = settings, autocast, is_enabled_first
    found = per_layer(lambda layers: stored_with(path, layers, reentrant, *more))
    assert found == TOKENS // 4 * ROW


@pytest.mark.parametrize("reentrant", [True, False])
def test_sub_blocks_with_sets_of_their_own_store_each_its_rows(reentrant):
    """And the numbers of rows, as int32, once."""

    def measured(layers):
        own = LayerwiseConfig(keep=(0.25,) * layers, select_at="all")
        return stored_with("native", layers, reentrant, {"layerwise": own}, False, False)

    assert per_layer(measured) == TOKENS // 4 * (2 * ROW + 4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_of_rows_that_are_computed_as_context_keys_and_values_are_stored(reentrant):
    found = per_layer(
        lambda n: stored_with("native", n, reentrant, {"visible_keys": "computed"}, False, False)
    )
    keys_and_values = 2 * 2 * 8 * 4  # two heads of eight numbers in fp32
    assert found == TOKENS // 4 * ROW + 3 * TOKENS // 4 * keys_and_values


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("path", ["native", "generic"])
def test_a_layer_stores_its_kept_rows_in_a_trainer(path, reentrant, tmp_path):
    found = per_layer(
        lambda layers: stored_by_trainer(path, "llama", layers, 0.25, reentrant, tmp_path)
    )
    assert found == TOKENS // 4 * ROW


@pytest.mark.parametrize("path", ["native", "generic"])
def test_rows_that_no_layer_keeps_cost_nothing(path):
    """What all layers share grows with kept rows, not with the others."""
    shared = []
    for keep in (1.0, 0.25):
        by_layer = per_layer(
            lambda layers, k=keep: stored_by_enable(path, "llama", layers, k, False)
        )
        shared.append(stored_by_enable(path, "llama", 2, keep, False) - 2 * by_layer)
    assert shared[1] < 1.05 * shared[0] / 4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("path", "name"), [NATIVE[0], GENERIC[0], GENERIC[1]])
def test_gradients_are_those_without_it(path, name, reentrant):
    results = []
    for checkpointing in (False, True):
        model = model_of(path, name, 2)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        lemo.enable(model, config(path, 0.5))
        model(**batch()).loss.backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    for key, expected in results[0].items():
        if not key.endswith("k_proj.bias"):
            assert_close_fp32(results[1][key], expected, key)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("path", ["native", "generic"])
def test_a_checkpoint_around_the_whole_model_is_refused(path, use_reentrant):
    """Its recomputation would draw other blocks than the pass that gave the loss."""
    model = make_model("llama")
    lemo.enable(model, LemoConfig(keep=0.5, scorer="random", block_size=8, path=path))
    ids = make_ids(1, 64)

    def run(one):
        return model(input_ids=ids, labels=ids).loss * one

    loss = checkpoint(run, torch.ones((), requires_grad=True), use_reentrant=use_reentrant)
    with pytest.raises(NotImplementedError, match=r"torch\.utils\.checkpoint: expected it around"):
        loss.backward()
