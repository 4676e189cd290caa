"""keep < 1 computes what an eager reference of the method computes, given the same kept sets.

The reference runs Transformers' own layers (eager attention with a prepared mask) on gathered rows
of a plain residual stream, one `index_add` a sub-block. It shares no code with lemo.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lemo
from internals import run_decoder
from test_models_dense import assert_same_gradients, lora
from tiny_models import (
    ARCHITECTURES,
    WINDOW,
    all_of,
    config_of,
    gradients,
    make_model,
    packed_batch,
    padded_batch,
)
from tolerances import assert_close_fp32

BLOCK = 8

# The GPU's attention knows no fp32; test_models_low_precision.py compares models there.
fp32 = pytest.mark.cpu_only


def sequences(batch):
    """(flat indices of the tokens, sequence of each, index of each in its sequence)."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    sequence, position, flat = [], [], []
    number = -1
    for b, row in enumerate(mask.tolist()):
        previous = False
        for t, present in enumerate(row):
            if not present:
                previous = False
                continue
            restarts = "position_ids" in batch and int(batch["position_ids"][b, t]) == 0
            if restarts or not previous:
                number, index = number + 1, 0
            flat.append(b * mask.shape[1] + t)
            sequence.append(number)
            position.append(index)
            previous, index = True, index + 1
    return tuple(torch.tensor(values) for values in (flat, sequence, position))


def rows_of_blocks(blocks, sequence, position, block_size):
    """Packed rows in kept blocks; blocks are counted through all sequences."""
    if blocks is None:
        return torch.arange(sequence.numel())
    identity = torch.stack((sequence, position // block_size), 1)
    _, number = torch.unique(identity, dim=0, return_inverse=True)
    return torch.isin(number, blocks).nonzero()[:, 0]


def visible(sequence, position, window, group_size, heads):
    """[heads, T, T] bool: what a query may see."""
    i, j = position[:, None], position[None, :]
    seen = (sequence[:, None] == sequence[None, :]) & (j <= i)
    if window:
        seen = seen & (i - j < window)
    seen = seen.expand(heads, -1, -1).clone()
    if group_size:
        half = group_size // 2
        seen[: heads // 2] &= i // group_size == j // group_size
        seen[heads // 2 :] &= (i + half) // group_size == (j + half) // group_size
    return seen


@contextmanager
def frozen_keys(attention, is_kept):
    """Keys and values of rows that are not kept pass no gradient on."""

    def freeze(module, inputs, output):
        shape = [1, -1] + [1] * (output.dim() - 2)
        return torch.where(is_kept.view(shape), output, output.detach())

    keys = getattr(attention, "k_norm", attention.k_proj)
    hooks = [part.register_forward_hook(freeze) for part in (keys, attention.v_proj)]
    yield
    for hook in hooks:
        hook.remove()


def reference_loss(model, batch, kept, config):
    """Loss of the method for given kept blocks: `kept[layer] = (attention blocks, mlp blocks)`."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    opt = causal_lm.config.model_type == "opt"
    decoder = causal_lm.model.decoder if opt else causal_lm.model
    flat, sequence, position = sequences(batch)
    ids = batch["input_ids"].flatten()[flat]
    embedded = decoder.embed_tokens(ids)[None]
    cos = sin = None
    if opt:
        embedded = decoder.project_in(embedded) + decoder.embed_positions(
            None, position_ids=position[None]
        )
    else:
        # Rotation is relative, so positions within the sequence serve for left padding too.
        cos, sin = decoder.rotary_emb(embedded, position[None])
    x = embedded[0]
    touched = torch.zeros(x.shape[0], dtype=torch.bool)
    heads = causal_lm.config.num_attention_heads
    for layer, (attention_blocks, mlp_blocks) in zip(decoder.layers, kept):
        rows = rows_of_blocks(attention_blocks, sequence, position, config.block_size)
        touched[rows] = True
        # All keys visible: the kept rows of attention among all rows.
        among = rows if config.visible_keys == "kept" else torch.arange(x.shape[0])
        computed = config.visible_keys == "computed"
        norm = layer.self_attn_layer_norm if opt else layer.input_layernorm
        window = getattr(layer.self_attn, "sliding_window", None)
        if causal_lm.config.model_type == "mistral":
            window = WINDOW
        seen = visible(sequence[among], position[among], window, config.group_size, heads)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None]
        rotary = {} if opt else {"position_embeddings": (cos[:, among], sin[:, among])}
        if rows.numel():  # Transformers' attention cannot take an empty sequence
            is_kept = torch.isin(among, rows)
            with frozen_keys(layer.self_attn, is_kept) if computed else nullcontext():
                y = layer.self_attn(norm(x[among])[None], attention_mask=mask, **rotary)[0][0]
            if computed:
                x = x.index_add(0, among[~is_kept], y[~is_kept].detach().to(x.dtype))
            x = x.index_add(0, rows, y[is_kept].to(x.dtype))

        rows = rows_of_blocks(mlp_blocks, sequence, position, config.block_size)
        touched[rows] = True
        among = torch.arange(x.shape[0]) if computed else rows
        if opt:
            y = layer.fc2(torch.relu(layer.fc1(layer.final_layer_norm(x[among]))))
        else:
            y = layer.mlp(layer.post_attention_layernorm(x[among]))
        y = torch.where(torch.isin(among, rows)[:, None], y, y.detach())
        x = x.index_add(0, among, y.to(x.dtype))
    hidden = decoder.project_out(decoder.final_layer_norm(x)) if opt else decoder.norm(x)
    labels = torch.full_like(batch["labels"], -100)
    labels[:, :-1] = batch["labels"][:, 1:]
    labels = labels.flatten()[flat]
    if config.mask_loss:
        labels = labels.masked_fill(~touched, -100)
    total = torch.nn.functional.cross_entropy(causal_lm.lm_head(hidden), labels, reduction="sum")
    return total / max(1, int((labels != -100).sum()))


BATCHES = {
    "right": lambda: padded_batch([61, 8, 45]),
    "left": lambda: padded_batch([50, 30], side="left"),
    "packed": lambda: packed_batch([40, 3, 37]),
}
SETTINGS = {
    "shared set": {"keep": 0.5},
    "own sets": {"keep": 0.4, "keep_mlp": 0.6, "select_at": "all"},
    "all keys": {"keep": [0.3, 0.5, 1.0], "select_at": "all", "visible_keys": "all"},
    "computed keys": {"keep": 0.5, "visible_keys": "computed"},
    "computed keys, own sets": {
        "keep": [0.3, 0.5, 1.0],
        "keep_mlp": 0.5,
        "select_at": "all",
        "group_size": 20,
        "visible_keys": "computed",
    },
    "groups": {"keep": 0.6, "group_size": 20, "dense_layers": [1]},
    "nothing forced": {"keep": 0.0, "keep_first": 0, "keep_last": 0, "dense_layers": [0]},
    "threshold": {"policy": "threshold", "thresholds": [0.07] * 3, "mlp_thresholds": [0.2] * 3},
    "random": {"keep": 0.3, "scorer": "random", "mask_loss": False},
}


def kept_blocks(handle):
    return [(layer.attention_blocks, layer.mlp_blocks) for layer in handle.statistics()]


def check(model, twin, batch, config):
    handle = lemo.enable(model, config)
    loss = model(**batch).loss
    loss.backward()
    assert any(layer.attention_rows < layer.tokens for layer in handle.statistics())
    expected = reference_loss(twin, batch, kept_blocks(handle), config)
    expected.backward()
    assert_close_fp32(loss, expected, "loss")
    assert_same_gradients(model, twin, frozen_keys=config.visible_keys == "computed")


def preset(name):
    return config_of(**{"dense_layers": [], "block_size": BLOCK} | SETTINGS[name])


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


def saved_bytes(model, batch):
    """Bytes of distinct storages that autograd keeps for backward, parameters left out."""
    storages = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(size for _, size in storages.values())


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
    others = (layer.tokens - layer.attention_rows) * width * element
    # Positions and row indices, too: a few integers for each token.
    assert sizes["computed"] - sizes["kept"] <= 3 * others + 16 * layer.tokens
