"""Given scores: what the caller says."""

import torch
from torch import Tensor

from lemo.selection.scorers.base import BlockedBatch, Scorer

__all__ = ["GivenScorer"]


class GivenScorer(Scorer):
    """The scores of tokens that the caller names by `Handle.scored`; a block has its largest."""

    reads_residual = False

    def __call__(self, layer: int, kind: str, residual: Tensor, batch: BlockedBatch) -> Tensor:
        if batch.scores is None:
            raise ValueError(
                "scorer: 'given' needs scores of the batch's tokens, got none; call the model "
                "inside `with handle.scored(scores)`, or use another scorer"
            )
        lengths = batch.layout.block_starts.diff().long()
        # Unsafe: the lengths are not compared with T, for which the host would wait for a GPU.
        largest: Tensor = torch.segment_reduce(batch.scores, "max", lengths=lengths, unsafe=True)
        return largest
