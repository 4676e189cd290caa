"""Predicted relevance: what a trained predictor says that an answer needs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lemo import ops
from lemo.packing.blocks import BlockLayout
from lemo.packing.to_device import index_tensors, to_device
from lemo.predictors.relevance import SHARPNESS, RelevancePredictor, query_rows
from lemo.predictors.storage import load_relevance
from lemo.relevance.answers import Answers
from lemo.selection.scorers.answers import AnswerScorer
from lemo.selection.scorers.base import BlockedBatch, ScoredModel

__all__ = ["RelevanceScorer", "predicted_relevance"]


def predicted_relevance(
    predictor: RelevancePredictor,
    x: Tensor,
    layout: BlockLayout,
    answers: Sequence[Answers | None],
) -> list[Tensor | None]:
    """How much each answer of each sequence needs each of its blocks, [A, B] fp32.

    Shares that add up to 1 over the blocks before the answer that have no labels; 0 elsewhere. NaN
    where what enters is not finite.

    Args:
        predictor: on the device of `x`.
        x: [T, H], what enters the first layer.
        layout: how the T rows are cut.
        answers: of each sequence; None: it has none, and so has the result.
    """
    # Packed rows that look, the sequence and the answer of each, and a row up to which it sees.
    rows: list[int] = []
    spans: list[tuple[int, int]] = []
    of_rows: list[int] = []
    ends: list[int] = []
    first = number = 0
    for found, tokens in zip(answers, layout.seqlens):
        if found is not None:
            mine, of_mine = query_rows(found, tokens)
            rows += [first + row for row in mine]
            spans += len(mine) * [(first, first + tokens)]
            of_rows += [number + answer for answer in of_mine]
            # All tokens of an answer see the blocks before it, also those that ask first.
            ends += [first + found.firsts[answer] for answer in of_mine]
            number += len(found)
        first += tokens
    if not rows:
        return [None for _ in answers]
    queries, keys = predictor.queries(x, rows, spans)[:, None], predictor.keys(x, layout)[:, None]
    [seen, index] = index_tensors(x.device, ends, of_rows)
    largest, _ = ops.block_attention(queries, keys, seen, layout, SHARPNESS)
    # A maximum passes over nan.
    largest = largest + 0.0 * sum(each.sum(dtype=torch.float32) for each in (queries, keys))
    scores = largest.new_zeros(number, layout.num_blocks)
    scores.index_add_(0, index, largest[:, 0])
    results: list[Tensor | None] = []
    block = answer = 0
    for found, count in zip(answers, layout.block_counts):
        if found is None:
            results.append(None)
        else:
            mine_of = scores[answer : answer + len(found), block : block + count]
            free = found.open_blocks(layout.block_size, mine_of)
            predicted = mine_of.masked_fill(~free, -torch.inf).softmax(-1)
            # Of an answer with nothing before it the softmax is NaN.
            results.append(predicted.where(free.any(-1, keepdim=True), 0.0))
            answer += len(found)
        block += count
    return results


def merged(predicted: Tensor, words: Tensor) -> Tensor:
    """[A, B] fp32: one over the better rank of a block among those of its answer.

    So the best blocks of either score come in turn, whatever their scales: a share of the blocks
    holds what either finds with half of it.

    Args:
        predicted, words: [A, B], scores of at least 0.
    """
    parts = []
    for scores in (predicted, words):
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        parts.append(torch.where(scores.isnan(), scores, (scores > 0) / (1.0 + ranks)))
    return torch.maximum(parts[0], parts[1])


class RelevanceScorer(AnswerScorer):
    """Scores a block by a predictor that `lemo prepare --target relevance` trained for the model,
    and by shared words.

    It reads the tokens' embeddings, so it costs no layer: two small nets, and a product of each
    answer's tokens with all keys. The predictor finds what it has learned to find, words (see
    `LexicalScorer`) what is repeated; the best of both are kept in turn, see `merged`.

    Args:
        predictor: what runs.
        seed: of the random scores of sequences without answers.
    """

    def __init__(self, predictor: RelevancePredictor, seed: int) -> None:
        super().__init__("predictor", seed)
        self._predictor = predictor

    @classmethod
    def from_folder(cls, folder: str, model: ScoredModel, seed: int) -> "RelevanceScorer":
        """The predictor in a folder of `lemo prepare`, for a model.

        Raises:
            FileNotFoundError, ValueError: see `lemo.predictors.storage.load_relevance`.
        """
        return cls(load_relevance(folder, model.config, model.embedding), seed)

    def relevance(
        self,
        layer: int,
        residual: Tensor,
        batch: BlockedBatch,
        texts: Sequence[Tensor],
        answers: Sequence[Answers | None],
    ) -> list[Tensor | None]:
        if layer > 0:
            raise ValueError(
                "predictor: one of relevance reads what enters layer 0, so blocks have to be "
                f"scored there, but they are scored in layer {layer}; keep no layers dense "
                "(layerwise)"
            )
        self._predictor.to(residual.device)
        predicted = predicted_relevance(self._predictor, residual, batch.layout, answers)
        size = batch.layout.block_size
        relevance: list[Tensor | None] = []
        for ids, found, shares in zip(texts, answers, predicted):
            if found is None or shares is None:
                relevance.append(None)
                continue
            words = ops.word_relevance(ids, found.firsts, found.ends, size)
            relevance.append(merged(shares, to_device(words, shares.device)))
        return relevance
