"""Predicted relevance: what a trained predictor says that an answer needs."""

import torch
from torch import Tensor

from lemo import ops
from lemo.packing.blocks import BlockLayout
from lemo.predictors.relevance import SHARPNESS, RelevancePredictor, query_rows
from lemo.predictors.storage import load_relevance
from lemo.relevance.answers import Answers
from lemo.selection.scorers.answers import AnswerScorer
from lemo.selection.scorers.base import BlockedBatch, ScoredModel

__all__ = ["RelevanceScorer", "predicted_relevance"]


def predicted_relevance(
    predictor: RelevancePredictor, x: Tensor, answers: Answers, block_size: int
) -> Tensor:
    """How much each answer of one sequence needs each block, [A, B] fp32.

    Shares that add up to 1 over the blocks before the answer that have no labels; 0 elsewhere.

    Args:
        predictor: on the device of `x`.
        x: [S, H], the sequence at the entry of the first layer.
        answers: of the sequence.
        block_size: tokens of a block.
    """
    tokens = x.shape[0]
    layout = BlockLayout.from_seqlens([tokens], block_size, x.device)
    rows, of_rows = query_rows(answers, tokens)
    queries, keys = predictor.queries(x, rows)[:, None], predictor.keys(x)[:, None]
    # All tokens of an answer see what stands before its end, also where its question stands first.
    ends = torch.tensor([min(answers.ends[answer], tokens - 1) for answer in of_rows])
    largest, _ = ops.block_attention(queries, keys, ends.int().to(x.device), layout, SHARPNESS)
    index = torch.tensor(of_rows).to(x.device)
    scores = largest.new_zeros(len(answers), layout.num_blocks)
    scores.index_add_(0, index, largest[:, 0])
    free = answers.free_blocks(block_size, scores) > 0
    blocks = torch.arange(layout.num_blocks, device=x.device)
    before = blocks < torch.tensor(answers.firsts).to(x.device)[:, None] // block_size
    shares = scores.masked_fill(~(free & before), -torch.inf).softmax(-1)
    # An answer with nothing before it.
    return shares.nan_to_num(0.0)


class RelevanceScorer(AnswerScorer):
    """Scores a block by a predictor that `lemo prepare --target relevance` trained for the model.

    It reads the tokens' embeddings, so it costs no layer: two small nets, and a product of each
    answer's tokens with all keys. It finds what it has learned to find; see docs/ANSWERS.md.

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
        return cls(load_relevance(folder, model_config=model.config), seed)

    def relevance(
        self, layer: int, residual: Tensor, batch: BlockedBatch, answers: list[Answers | None]
    ) -> list[Tensor | None]:
        if layer > 0:
            raise ValueError(
                "predictor: one of relevance reads what enters layer 0, so blocks have to be "
                f"scored there, but they are scored in layer {layer}; keep no layers dense "
                "(layerwise)"
            )
        self._predictor.to(residual.device)
        return [
            None
            if found is None
            else predicted_relevance(self._predictor, x, found, batch.layout.block_size)
            for x, found in zip(residual.split(batch.layout.seqlens), answers)
        ]
