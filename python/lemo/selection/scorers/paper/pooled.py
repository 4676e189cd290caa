"""Pooled scores: the model's own projections of block means."""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lemo.packing.blocks import BlockLayout
from lemo.selection.scorers.base import BlockedBatch, ScoredModel, Scorer

__all__ = ["PooledScorer", "block_means", "visible_means"]

# Elements of the largest fp32 temporary of a scorer: 64 MiB.
_TILE_ELEMENTS = 1 << 24


class PooledScorer(Scorer):
    """Queries and keys of block means: no training, one score for each pair of blocks.

    Attention scores a block by the mean, over the query blocks that see it, of the mean over heads
    of max(q . k, 0), not rotated; the MLP by the mean magnitude of the block mean's activation.

    Args:
        model: the model that is scored.
    """

    def __init__(self, model: ScoredModel) -> None:
        self._model = model

    def __call__(self, layer: int, kind: str, residual: Tensor, batch: BlockedBatch) -> Tensor:
        model = self._model
        x = model.normalized(layer, kind, residual)
        means = block_means(x, batch.layout).to(x.dtype)
        with model.without_dropout(layer):
            if kind == "mlp":
                return model.activation(layer, means).abs().mean(-1, dtype=torch.float32)
            queries, keys = model.queries(layer, means), model.keys(layer, means)
        return visible_means(queries, keys, batch.layout, model.scale(layer))


def block_means(x: Tensor, layout: BlockLayout) -> Tensor:
    """Means over the rows of every block, [T, C] -> [B, C] in fp32."""
    # In slices of whole blocks: an fp32 copy of all rows would be the largest tensor of a step.
    # Where they lie is known on the host, so that nothing is read back from a GPU.
    step = max(1, _TILE_ELEMENTS // (layout.block_size * max(1, x.shape[1]))) * layout.block_size
    means, first = [], 0
    for seqlen in layout.seqlens:
        whole = seqlen - seqlen % layout.block_size
        for start in range(0, whole, step):
            rows = x[first + start : first + min(start + step, whole)]
            means.append(rows.unflatten(0, (-1, layout.block_size)).float().mean(1))
        if whole < seqlen:
            means.append(x[first + whole : first + seqlen].float().mean(0, keepdim=True))
        first += seqlen
    if not means:
        return x.new_empty(0, x.shape[1], dtype=torch.float32)
    return torch.cat(means)


def visible_means(queries: Tensor, keys: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """Scores [B] of one query and one key a block.

    score[n] is the mean, over the blocks m >= n of its sequence, of
    scale * mean over heads of max(q_m . k_n, 0).

    Args:
        queries: [B, Hq, D].
        keys: [B, Hk, D], Hq a multiple of Hk.
    """
    heads, kv_heads = queries.shape[1], keys.shape[1]
    queries = queries.float().unflatten(1, (kv_heads, heads // kv_heads))
    keys = keys.float()
    scores = torch.empty(layout.num_blocks, dtype=torch.float32, device=queries.device)
    for first, end in pairwise(accumulate(layout.block_counts, initial=0)):
        if first < end:
            scores[first:end] = _visible_means(queries[first:end], keys[first:end], scale)
    return scores


def _visible_means(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The same for the n blocks of one sequence: queries [n, Hk, Hq / Hk, D], keys [n, Hk, D]."""
    count, heads = len(keys), queries.shape[1] * queries.shape[2]
    sums = torch.zeros(count, dtype=torch.float32, device=queries.device)
    step = max(1, _TILE_ELEMENTS // (heads * count))
    for first in range(0, count, step):
        end = min(first + step, count)
        # Autocast would round the scores so far that blocks tie.
        with torch.autocast(queries.device.type, enabled=False):
            products = torch.einsum("mkgd,nkd->kgmn", queries[first:end], keys[:end])
        means = products.clamp_(min=0).mean((0, 1))
        sums[:end] += means.tril_(first).sum(0)
    return scale * sums / torch.arange(count, 0, -1, device=queries.device)
