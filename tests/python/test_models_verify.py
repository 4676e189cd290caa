"""handle.verify: keep = 1 against the model's own forward."""

import functools

import pytest
import torch
from torch import nn

import lemo
from lemo.models.layers.architectures import Architecture
from tiny_models import (
    ARCHITECTURES,
    config_of,
    gradients,
    lora,
    make_ids,
    make_model,
    packed_batch,
    padded_batch,
)

# The GPU's attention knows no fp32; test_models_low_precision.py compares models there.
pytestmark = pytest.mark.cpu_only

HALF = config_of(keep=0.5, dense_layers=[], block_size=8)
BATCHES = {
    "plain": {"input_ids": make_ids(2, 60)},
    "left": padded_batch([61, 40], side="left"),
    "packed": packed_batch([30, 31]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_is_as_it_should_be(architecture, batch):
    model = lora(make_model(architecture, attn_implementation="sdpa"))
    handle = lemo.enable(model, HALF)
    if (architecture, batch) == ("opt", "packed"):
        # Transformers' OPT lets packed sequences see each other, lemo does not.
        with pytest.raises(ValueError, match="Hidden states differ first behind layer 0"):
            handle.verify(BATCHES[batch], tokens=50)
    else:
        handle.verify(BATCHES[batch], tokens=50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
@pytest.mark.parametrize("recompute", ["auto", "layer"])
def test_low_precision_and_recomputation(dtype, recompute):
    weights = torch.float32 if dtype == "autocast" else dtype
    model = lora(make_model("llama", dtype=weights), lora_dropout=0.5)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    handle = lemo.enable(model, config_of(keep=0.5, block_size=8, recompute=recompute))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        handle.verify(BATCHES["plain"])


def test_dropout_that_is_no_module():
    """The layers of OPT call the function; in its checkpoints the share is not 0."""
    model = lora(make_model("opt", attn_implementation="sdpa", dropout=0.5))
    handle = lemo.enable(model, HALF)
    handle.verify(BATCHES["plain"])
    assert all(module.training for module in model.modules()), "dropout is left off"


def test_a_model_that_computes_no_numbers():
    model = lora(make_model("llama"))
    handle = lemo.enable(model, HALF)
    norm = model.base_model.model.model.layers[1].input_layernorm.weight.data
    weight, norm[3] = norm[3].item(), float("nan")
    with pytest.raises(ValueError, match="model: its own loss, with every token kept, is nan"):
        handle.verify(BATCHES["plain"])
    norm[3] = weight
    norm.requires_grad_(False)
    lora_a = model.base_model.model.model.layers[1].self_attn.q_proj.lora_A.default.weight
    lora_a.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match="its own gradients, with every token kept, are not fini"):
        handle.verify(BATCHES["plain"])


def test_states_that_are_no_numbers_are_named(monkeypatch):
    model = lora(make_model("llama"))
    handle = lemo.enable(model, HALF)
    own = Architecture.attention_output

    def spoilt(adapter, index, *arguments):
        return own(adapter, index, *arguments) * (float("nan") if index == 1 else 1.0)

    monkeypatch.setattr(Architecture, "attention_output", spoilt)
    with pytest.raises(ValueError, match=r"loss nan, .* differ first behind layer 1\."):
        handle.verify(BATCHES["plain"])


def test_it_leaves_no_trace():
    model, twin = (lora(make_model("llama"), lora_dropout=0.5) for _ in range(2))
    config = lemo.LemoConfig(keep=0.5, block_size=8)
    handles = [lemo.enable(each, config) for each in (model, twin)]
    handles[0].verify(BATCHES["plain"])
    assert not gradients(model)
    losses = []
    for each in (model, twin):
        torch.manual_seed(5)
        if each is model:
            handles[0].verify(BATCHES["plain"])
        losses.append(each(**padded_batch([61, 40])).loss)
    assert torch.equal(*losses), "it drew random numbers, or left dropout off"
    assert handles[0].statistics()[0].attention_rows < 101


def test_a_layer_that_differs_is_named(monkeypatch):
    model = lora(make_model("llama"))
    handle = lemo.enable(model, HALF)

    def scale(adapter, index):
        return adapter.layer(index).self_attn.scaling * (0.9 if index == 1 else 1.0)

    monkeypatch.setattr(Architecture, "scale", scale)
    with pytest.raises(ValueError, match=r"loss .* most in .*layers\..* first behind layer 1\."):
        handle.verify(BATCHES["plain"])
    # The first loss is the same: gradients tell.
    assert not gradients(model)


def test_another_loss_is_seen(monkeypatch):
    """A function that somebody put in place of torch's, which lemo's loss does not call."""
    smoothed = functools.partial(nn.functional.cross_entropy, label_smoothing=0.1)
    monkeypatch.setattr(nn.functional, "cross_entropy", smoothed)
    model = lora(make_model("llama"))
    handle = lemo.enable(model, HALF)
    with pytest.raises(ValueError, match="Hidden states agree; the loss or the gradients differ"):
        handle.verify(BATCHES["plain"])


def test_a_model_whose_trainable_part_is_elsewhere():
    """Prompt tuning trains embeddings outside of the causal LM."""
    model = make_model("llama").requires_grad_(False)
    lemo.enable(model, HALF).verify(BATCHES["plain"])


def test_bad_batches_are_named():
    handle = lemo.enable(lora(make_model("llama")), HALF)
    for ids, got in (
        (None, "NoneType"),
        (make_ids(1, 9)[0], r"\[9\]"),
        (make_ids(2, 1), r"\[2, 1\]"),
        (make_ids(2, 9)[:0], r"\[0, 9\]"),
    ):
        with pytest.raises(ValueError, match=f"batch: expected input_ids .*, got {got}"):
            handle.verify({"input_ids": ids})
    with pytest.raises(ValueError, match="tokens: expected at least 2, got 1"):
        handle.verify(BATCHES["plain"], tokens=1)


@pytest.mark.parametrize("path", ["native", "generic"])
def test_calls_that_compare_nothing_are_named(path):
    config = lemo.LemoConfig(keep=0.5, block_size=8, path=path)
    handle = lemo.enable(lora(make_model("llama")), config)
    with pytest.raises(TypeError, match="batch: expected a mapping .*, got Tensor"):
        handle.verify(BATCHES["plain"]["input_ids"])
    with torch.inference_mode(), pytest.raises(ValueError, match="torch.inference_mode"):
        handle.verify(BATCHES["plain"])
    with pytest.raises(ValueError, match="labels: expected those of the tokens, got none"):
        handle.loss(input_ids=BATCHES["plain"]["input_ids"])
