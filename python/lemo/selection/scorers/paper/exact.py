"""Exact scores: computed from the model's own queries, keys and activations.

The scorer "exact" selects by them, and `lemo prepare` trains predictors to foretell them.
"""

import torch
from torch import Tensor

from lemo import ops
from lemo.packing.blocks import BlockLayout
from lemo.selection.scorers.base import BlockedBatch, ScoredModel, Scorer

__all__ = ["ExactScorer", "attention_scores", "mlp_token_scores", "token_means"]


def attention_scores(queries: Tensor, keys: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """Exact scores of the blocks for attention, [B] fp32 (LeMo, section 4.1).

    Args:
        queries: [T, Hq, D], rotated.
        keys: [T, Hk, D], rotated; Hq is a multiple of Hk.
        layout: how the T rows are cut.
        scale: the model's attention scale.
    """
    return ops.block_scores(queries, keys, layout, scale)


def mlp_token_scores(activation: Tensor) -> Tensor:
    """Exact scores of tokens for the MLP, [T] fp32: the mean magnitude of the activation.

    A block's score is the mean over its tokens, see `token_means`.

    Args:
        activation: [T, F], `act(gate) * up` or `act(fc1)`.
    """
    # A norm needs no tensor of magnitudes.
    sums: Tensor = torch.linalg.vector_norm(activation, ord=1, dim=-1, dtype=torch.float32)
    return sums / activation.shape[-1]


def token_means(scores: Tensor, layout: BlockLayout) -> Tensor:
    """Means [B] over the tokens of every block of `layout`, of their scores [T] fp32."""
    lengths = layout.block_starts.diff().long()
    # Unsafe: the lengths are not compared with T, for which the host would wait for a GPU.
    means: Tensor = torch.segment_reduce(scores, "mean", lengths=lengths, unsafe=True)
    return means


class ExactScorer(Scorer):
    """The exact scores; attention's cost about a forward pass of attention in every layer.

    Args:
        model: the model that is scored.
    """

    def __init__(self, model: ScoredModel) -> None:
        self._model = model

    def __call__(self, layer: int, kind: str, residual: Tensor, batch: BlockedBatch) -> Tensor:
        with self._model.without_dropout(layer):
            x = self._model.normalized(layer, kind, residual)
            if kind == "mlp":
                scores = mlp_token_scores(self._model.activation(layer, x))
                return token_means(scores, batch.layout)
            queries, keys = self._model.rotated(layer, x, batch)
        return attention_scores(queries, keys, batch.layout, self._model.scale(layer))
