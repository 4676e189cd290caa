"""Random scores: every block is equally likely to be kept, independently in each step."""

import torch
from torch import Tensor

from lemo.selection.draws import StepGenerator
from lemo.selection.scorers.base import BlockedBatch, Scorer

__all__ = ["RandomScorer"]


class RandomScorer(Scorer):
    """Uniform random scores. Every call draws new ones, and so does each process of a training.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._draws = StepGenerator(seed)

    def begin_step(self, step: int) -> None:
        self._draws.begin_step(step)

    def __call__(self, layer: int, kind: str, residual: Tensor, batch: BlockedBatch) -> Tensor:
        blocks = batch.layout.num_blocks
        scores = torch.rand(blocks, generator=self._draws.generator, device="cpu")
        if residual.device.type == "cuda":
            # A copy that the host does not wait for.
            scores = scores.pin_memory()
        return scores.to(residual.device, non_blocking=True)
