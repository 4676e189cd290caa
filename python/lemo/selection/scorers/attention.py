"""Scores by attention: what retrieval heads look at from the answers."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lemo import ops
from lemo.packing.to_device import to_device
from lemo.predictors.model import model_description
from lemo.relevance.answers import Answers
from lemo.relevance.attention import head_relevance, with_keys
from lemo.relevance.heads import RetrievalHeads
from lemo.selection.scorers.answers import AnswerScorer
from lemo.selection.scorers.base import BlockedBatch, ScoredModel

__all__ = ["AttentionScorer", "Scout"]

# (batch, residual, its layer, layers that are asked for) -> (layer, q, k), see
# lemo.models.layers.scout.
Scout = Callable[[Any, Tensor, int, Collection[int]], Iterator[tuple[int, Tensor, Tensor]]]


class AttentionScorer(AnswerScorer):
    """Scores a block by how much retrieval heads look at it, and by shared words.

    Heads: the largest attention weight that a row which predicts the answer gives to a token of
    the block, as a share of the answer's weights over the blocks without labels; the mean over the
    heads. Words: see `LexicalScorer`. A block has the larger of the two.

    It costs a forward pass of the dense model up to the last layer that has such a head. It fails
    where no head was found that retrieves.

    Args:
        heads: the retrieval heads of the model.
        model: the model that is scored.
        scout: runs its first layers densely.
        seed: of the random scores of sequences without answers.
    """

    def __init__(self, heads: RetrievalHeads, model: ScoredModel, scout: Scout, seed: int) -> None:
        super().__init__("attention", seed)
        self._heads = heads.by_layer()
        self._model, self._scout = model, scout

    @classmethod
    def from_file(cls, path: str, model: ScoredModel, scout: Scout, seed: int) -> "AttentionScorer":
        """The heads that `lemo relevance heads` wrote for a model.

        Raises:
            FileNotFoundError, ValueError: see `RetrievalHeads.load`.
        """
        heads = RetrievalHeads.load(path, model_description(model.config, model.embedding))
        return cls(heads, model, scout, seed)

    def relevance(
        self,
        layer: int,
        residual: Tensor,
        batch: BlockedBatch,
        texts: Sequence[Tensor],
        answers: Sequence[Answers | None],
    ) -> list[Tensor | None]:
        if all(found is None for found in answers):
            return [None for _ in answers]
        if layer > min(self._heads):
            raise ValueError(
                f"heads: expected them in layer {layer} or behind, where blocks are scored, got "
                f"one in layer {min(self._heads)}; keep fewer layers dense (layerwise)"
            )
        parts = []
        for index, q, k in self._scout(batch, residual, layer, self._heads):
            mine, scale = with_keys(q, k, self._heads[index]), self._model.scale(index)
            parts.append(head_relevance(*mine, batch.layout, answers, scale))
        size = batch.layout.block_size
        relevance: list[Tensor | None] = []
        for ids, found, *heads in zip(texts, answers, *parts):
            if found is None:
                relevance.append(None)
                continue
            looked_at = torch.cat([part for part in heads if part is not None], 1).mean(1)
            words = ops.word_relevance(ids, found.firsts, found.ends, size)
            relevance.append(torch.maximum(looked_at, to_device(words, looked_at.device)))
        return relevance
