"""Random scores: every block is equally likely to be kept, independently in each step."""

import torch
from torch import Tensor

from lemo.selection.scorers.base import BlockedBatch, Scorer

__all__ = ["RandomScorer"]

# The golden ratio's bits: no two steps of near seeds begin alike.
_STEP_STRIDE = 0x9E3779B97F4A7C15


class RandomScorer(Scorer):
    """Uniform random scores. Every call draws new ones, and so does each process of a training.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._own_seed = seed
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            seed += torch.distributed.get_rank()
        self._seed = seed
        # On the CPU whatever the model's device, so that a seed means the same everywhere.
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def begin_step(self, step: int) -> None:
        """From here on the draws depend on the seed, the process and this step alone."""
        self._generator.manual_seed((self._seed + step * _STEP_STRIDE) % 2**63)

    def begin_replica(self, replica: int) -> None:
        self._seed = self._own_seed + replica
        self._generator.manual_seed(self._seed)

    def __call__(self, layer: int, kind: str, residual: Tensor, batch: BlockedBatch) -> Tensor:
        scores = torch.rand(batch.layout.num_blocks, generator=self._generator, device="cpu")
        if residual.device.type == "cuda":
            # A copy that the host does not wait for.
            scores = scores.pin_memory()
        return scores.to(residual.device, non_blocking=True)
