"""The method of lemo, computed by Transformers' own layers.

Eager attention with a prepared mask, on gathered rows of a plain residual, with one `index_add` for
each sub-block. It shares no code with lemo.
"""

from contextlib import contextmanager, nullcontext

import torch

from tiny_models import WINDOW


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
        seen = visible(sequence[among], position[among], window, config.layerwise.group_size, heads)
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
