"""keep < 1 computes what an eager reference of the method computes, given the same kept sets.

The reference is `elimination_oracle.py`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lemo
from elimination_oracle import reference_loss
from internals import run_decoder
from lemo.models.layers.decoder import Decoder
from lemo.selection.selector import Selector
from model_cases import BATCHES, BLOCK, SETTINGS, preset
from model_checks import assert_same_gradients, kept_blocks, saved_bytes
from tiny_models import (
    ARCHITECTURES,
    all_of,
    config_of,
    gradients,
    lora,
    make_model,
    packed_batch,
    padded_batch,
)
from tolerances import assert_close_fp32

# The GPU's attention knows no fp32; test_models_low_precision.py compares models there.
fp32 = pytest.mark.cpu_only


def check(model, twin, batch, config):
    handle = lemo.enable(model, config)
    loss = model(**batch).loss
    loss.backward()
    assert any(layer.attention_rows < layer.tokens for layer in handle.statistics())
    expected = reference_loss(twin, batch, kept_blocks(handle), config)
    expected.backward()
    assert_close_fp32(loss, expected, "loss")
    assert_same_gradients(model, twin, frozen_keys=config.visible_keys == "computed")


@fp32
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients(architecture, name):
    batches = list(BATCHES)
    batch = BATCHES[batches[list(SETTINGS).index(name) % len(batches)]]()
    config = preset(name)
    if name == "threshold" and architecture == "qwen3":
        config = config.replace(
            layerwise=config.layerwise.replace(thresholds=[0.4] * 3)
        )  # normalized q, k: larger scores
    check(make_model(architecture), make_model(architecture), batch, config)


@fp32
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "name", ["shared set", "own sets", "all keys", "computed keys", "computed keys, own sets"]
)
def test_every_kind_of_batch(name, batch):
    check(make_model("qwen2"), make_model("qwen2"), BATCHES[batch](), preset(name))


@fp32
@pytest.mark.parametrize(
    "name", ["shared set", "own sets", "all keys", "computed keys", "computed keys, own sets"]
)
@pytest.mark.parametrize("architecture", ["mistral", "opt"])
def test_gradient_checkpointing(architecture, name):
    model, twin = make_model(architecture), make_model(architecture)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, twin, BATCHES["right"](), preset(name))


@fp32
@pytest.mark.parametrize("scorer", ["lexical", "pooled", "random"])
def test_mlps_keep_a_part_where_attention_keeps_everything(scorer):
    config = config_of(
        keep=1.0, keep_mlp=0.3, scorer=scorer, dense_layers=[], block_size=BLOCK, keep_first=0
    )
    model, twin, batch = make_model("llama"), make_model("llama"), BATCHES["left"]()
    handle = lemo.enable(model, config)
    loss = model(**batch).loss
    loss.backward()
    for layer in handle.statistics():
        assert layer.attention_rows == layer.tokens
        assert layer.mlp_rows < 0.5 * layer.tokens
    expected = reference_loss(twin, batch, kept_blocks(handle), config)
    expected.backward()
    assert_close_fp32(loss, expected, "loss")
    assert_same_gradients(model, twin)


@fp32
@pytest.mark.parametrize("name", ["shared set", "all keys", "computed keys"])
@pytest.mark.parametrize("architecture", ["qwen3", "opt"])
def test_lora(architecture, name):
    model, twin = lora(make_model(architecture)), lora(make_model(architecture))
    check(model, twin, BATCHES["packed"](), preset(name))


@fp32
@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    kind=st.sampled_from(["right", "left", "packed"]),
    block_size=st.integers(1, 12),
    keep=st.floats(1e-6, 1),
    forced=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    visible_keys=st.sampled_from(["kept", "all", "computed"]),
)
def test_any_shape(lengths, kind, block_size, keep, forced, visible_keys):
    batch = packed_batch(lengths) if kind == "packed" else padded_batch(lengths, kind)
    config = config_of(
        block_size=block_size,
        keep=keep,
        keep_first=forced[0],
        keep_last=forced[1],
        visible_keys=visible_keys,
        dense_layers=[],
        select_at="all",
    )
    model, twin = make_model("qwen2"), make_model("qwen2")
    handle = lemo.enable(model, config)
    loss = model(**batch).loss
    loss.backward()
    expected = reference_loss(twin, batch, kept_blocks(handle), config)
    expected.backward()
    # Losses and gradients of a few labels, or none, can be close to 0.
    assert abs(loss - expected) <= 2e-5 * max(1.0, expected.item())
    mine, theirs = gradients(model), gradients(twin)
    scale = all_of(theirs).norm().clamp(min=1e-3)
    for name, oracle in theirs.items():
        # Without any label lemo's head does not run at all.
        value = mine.get(name, torch.zeros_like(oracle))
        assert (value - oracle).norm() <= 2e-5 * scale, name


@fp32
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forward_passes_before_one_backward(checkpointing):
    batches = [BATCHES["right"](), BATCHES["packed"]()]
    model, twin = make_model("llama"), make_model("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    handle, config = lemo.enable(model, preset("own sets")), preset("own sets")
    losses, expected = [], []
    for batch in batches:
        losses.append(model(**batch).loss)
        expected.append(reference_loss(twin, batch, kept_blocks(handle), config))
    sum(losses).backward()
    sum(expected).backward()
    assert_same_gradients(model, twin)


def test_rows_that_are_not_kept_pass_through_unchanged():
    model = make_model("llama")
    handle = lemo.enable(model, preset("own sets"))
    # Hidden states that a user asks for are the dense model's, so inside:
    _, _, states = run_decoder(handle, padded_batch([64]))
    layout = handle.statistics()[0].layout
    for layer in handle.statistics()[:-1]:
        kept = torch.zeros(layout.num_blocks, dtype=torch.bool)
        kept[layer.attention_blocks] = True
        kept[layer.mlp_blocks] = True
        moved = (states[layer.layer + 1] != states[layer.layer])[0].any(-1).view(-1, BLOCK)
        assert torch.equal(moved.all(1), kept)
        assert torch.equal(moved.any(1), kept)


@fp32
@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
@pytest.mark.parametrize("architecture", ["mistral", "opt"])
def test_with_computed_keys_every_row_is_what_the_dense_model_computes(architecture, recompute):
    model, batch = make_model(architecture), padded_batch([61, 45])
    dense = model(**batch, output_hidden_states=True).hidden_states
    lemo.enable(model, preset("computed keys").replace(recompute=recompute))
    states = model(**batch, output_hidden_states=True).hidden_states
    tokens = batch["attention_mask"].bool()
    for layer, (mine, oracle) in enumerate(zip(states, dense, strict=True)):
        assert_close_fp32(mine[tokens], oracle[tokens], f"layer {layer}")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_stored_for_rows_that_are_not_kept(checkpointing):
    batch, sizes = padded_batch([256]), {}
    for keep in (1.0, 0.25):
        model = lora(make_model("llama", vocab_size=61, max_position_embeddings=256))
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        config = config_of(keep=keep, dense_layers=[], block_size=BLOCK, mask_loss=True)
        lemo.enable(model, config)
        sizes[keep] = saved_bytes(model, batch)
    assert sizes[0.25] <= 0.3 * sizes[1.0]


def rows_of_layers(monkeypatch) -> list[int]:
    """Gets the residual's rows behind every layer that runs from now on."""
    seen, run = [], Decoder._layer

    def spy(self, *arguments):
        residual = run(self, *arguments)
        seen.append(residual.shape[0])
        return residual

    monkeypatch.setattr(Decoder, "_layer", spy)
    return seen


@fp32
@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
@pytest.mark.parametrize("architecture", ["mistral", "opt"])
def test_rows_that_nothing_keeps_are_dropped_before_the_layers(
    architecture, recompute, monkeypatch
):
    """With and without dropping them loss and gradients are the same."""
    seen, results = rows_of_layers(monkeypatch), []
    batch = padded_batch([61, 45])
    for drops in (True, False):
        if not drops:
            monkeypatch.setattr(Selector, "masks_loss", False)
        model = make_model(architecture)
        settings = {"block_size": BLOCK, "keep": 0.5, "recompute": recompute}
        handle = lemo.enable(model, lemo.LemoConfig(**settings))
        loss = model(**batch).loss
        loss.backward()
        rows = handle.statistics()[0].attention_rows if drops else 106
        assert set(seen) == {rows}
        seen.clear()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss, gradients))
    (loss, mine), (other, theirs) = results
    assert_close_fp32(loss, other)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        assert_close_fp32(gradient, theirs[name], name)


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_loss": False},
        {"visible_keys": "computed"},
        {"visible_keys": "all"},
        {"layerwise": {"dense_layers": [0]}},
        {"layerwise": {"select_at": "all"}},
        {"layerwise": {"keep_mlp": 0.25}},
        {"layerwise": {"keep": [0.5, 0.25, 0.25]}},
    ],
    ids=str,
)
def test_rows_that_something_reads_are_not_dropped(settings, monkeypatch):
    seen = rows_of_layers(monkeypatch)
    model = make_model("llama")
    lemo.enable(model, lemo.LemoConfig(**{"block_size": BLOCK, "keep": 0.5, **settings}))
    model(**padded_batch([61, 45])).loss.backward()
    assert set(seen) == {106}


@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
def test_of_computed_rows_keys_and_values_are_stored(recompute):
    batch, sizes = padded_batch([256]), {}
    for visible_keys in ("kept", "computed"):
        model = lora(make_model("llama", vocab_size=61, max_position_embeddings=256))
        settings = {"visible_keys": visible_keys, "recompute": recompute, "block_size": BLOCK}
        handle = lemo.enable(model, config_of(keep=0.25, dense_layers=[], **settings))
        sizes[visible_keys] = saved_bytes(model, batch)
    layer = handle.statistics()[0]
    attention = model.get_base_model().model.layers[0].self_attn
    width = attention.k_proj.out_features + attention.v_proj.out_features
    element = next(model.parameters()).element_size()
    rows = layer.tokens - layer.attention_rows
    others = rows * width * element
    # Positions and row indices, too: a few integers for each token; and its rotary tables, once.
    tables = 2 * rows * attention.head_dim * element
    assert sizes["computed"] - sizes["kept"] <= 3 * others + tables + 16 * layer.tokens
