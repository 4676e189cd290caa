"""Block scores: how informative every block is for a sub-block (LeMo, section 4).

A scorer is called with (layer, kind, x, batch): the index of the layer, "attention" or "mlp", the
output [T, H] of that sub-block's norm for all rows, and the `PackedBatch` the rows belong to. It
returns scores [B], fp32. The caller has switched gradients off.
"""

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lemo import ops
from lemo.packing.blocks import BlockLayout
from lemo.settings.elimination import LemoConfig

if TYPE_CHECKING:
    from lemo.models.architectures import Architecture
    from lemo.packing.batch import PackedBatch
    from lemo.predictors import PredictorSet

__all__ = [
    "ExactScorer",
    "PooledScorer",
    "PredictorScorer",
    "RandomScorer",
    "Scorer",
    "block_means",
    "make_scorer",
    "visible_means",
]

# Elements of the largest fp32 temporary of a scorer: 64 MiB.
_TILE_ELEMENTS = 1 << 24


class Scorer(Protocol):
    """What `make_scorer` returns."""

    def __call__(self, layer: int, kind: str, x: Tensor, batch: "PackedBatch") -> Tensor:
        """Scores [B] fp32 of the blocks of `batch.layout`; higher is more informative.

        Args:
            layer: index of the layer.
            kind: "attention" or "mlp".
            x: [T, H], output of that sub-block's norm for all rows.
            batch: the packed batch of the T rows.
        """


class PooledScorer:
    """Queries and keys of block means: no training, one product for each pair of blocks.

    Attention scores a block by the mean, over the query blocks that see it, of the mean over heads
    of max(q . k, 0), not rotated; the MLP by the magnitude of the block mean's activation.
    """

    def __init__(self, architecture: "Architecture") -> None:
        self._architecture = architecture

    def __call__(self, layer: int, kind: str, x: Tensor, batch: "PackedBatch") -> Tensor:
        means = block_means(x, batch.layout).to(x.dtype)
        with self._architecture.without_dropout(layer):
            if kind == "mlp":
                return (
                    self._architecture.activation(layer, means).abs().mean(-1, dtype=torch.float32)
                )
            queries = self._architecture.queries(layer, means)
            keys = self._architecture.keys(layer, means)
        return visible_means(queries, keys, batch.layout, self._architecture.scale(layer))


class ExactScorer:
    """The exact scores that predictors learn from; costs about an attention forward pass a layer.

    Attention: `lemo.ops.block_scores` of the model's rotated queries and keys. The MLP: the mean
    over the block's tokens of the mean magnitude of the activation.
    """

    def __init__(self, architecture: "Architecture") -> None:
        self._architecture = architecture

    def __call__(self, layer: int, kind: str, x: Tensor, batch: "PackedBatch") -> Tensor:
        with self._architecture.without_dropout(layer):
            if kind == "mlp":
                activation = self._architecture.activation(layer, x)
                magnitudes = activation.abs().mean(-1, keepdim=True, dtype=torch.float32)
                return block_means(magnitudes, batch.layout)[:, 0]
            queries, keys = self._architecture.rotated(layer, x, batch)
        return ops.block_scores(queries, keys, batch.layout, scale=self._architecture.scale(layer))


class RandomScorer:
    """Uniform scores, a fresh draw at every call, other ones in every process of a training."""

    def __init__(self, seed: int) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            seed += torch.distributed.get_rank()
        self._seed = seed
        # On the CPU whatever the model's device, so that a seed means the same everywhere.
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def begin_step(self, step: int) -> None:
        """Draws from now on what depends on the seed, the process and this step alone."""
        # The golden ratio's bits: no two steps of near seeds begin alike.
        self.generator.manual_seed((self._seed + step * 0x9E3779B97F4A7C15) % 2**63)

    def __call__(self, layer: int, kind: str, x: Tensor, batch: "PackedBatch") -> Tensor:
        scores = torch.rand(batch.layout.num_blocks, generator=self.generator, device="cpu")
        if x.device.type == "cuda":
            # A copy that the host does not wait for.
            scores = scores.pin_memory()
        return scores.to(x.device, non_blocking=True)


class PredictorScorer:
    """The trained predictors of a folder that `lemo prepare` wrote."""

    def __init__(self, predictors: "PredictorSet", block_size: int | float) -> None:
        if isinstance(block_size, int) and predictors.block_size != block_size:
            raise ValueError(
                f"block_size: the predictors were trained for {predictors.block_size}, "
                f"got {block_size}"
            )
        self.predictors = predictors

    def __call__(self, layer: int, kind: str, x: Tensor, batch: "PackedBatch") -> Tensor:
        return self.predictors.scores(layer, kind, x, batch.layout)


def make_scorer(config: LemoConfig, architecture: "Architecture") -> Scorer:
    """The scorer that `config` names, for the model behind `architecture`."""
    match config.scorer:
        case "pooled":
            return PooledScorer(architecture)
        case "exact":
            return ExactScorer(architecture)
        case "random":
            return RandomScorer(config.seed)
        case _:
            from lemo import predictors

            loaded = predictors.load(config.predictor, model_config=architecture.config)
            return PredictorScorer(loaded, config.block_size)


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
    counts = [-(-seqlen // layout.block_size) for seqlen in layout.seqlens]
    for first, end in pairwise(accumulate(counts, initial=0)):
        if first == end:
            continue
        count = end - first
        sums = torch.zeros(count, dtype=torch.float32, device=queries.device)
        step = max(1, _TILE_ELEMENTS // (heads * count))
        for query_first in range(first, end, step):
            query_end = min(query_first + step, end)
            # Autocast would round the scores so far that blocks tie.
            with torch.autocast(queries.device.type, enabled=False):
                products = torch.einsum(
                    "mkgd,nkd->kgmn", queries[query_first:query_end], keys[first:query_end]
                )
            means = products.clamp_(min=0).mean((0, 1))
            sums[: query_end - first] += means.tril_(query_first - first).sum(0)
        seen_by = torch.arange(count, 0, -1, device=queries.device)
        scores[first:end] = scale * sums / seen_by
    return scores
