"""Random scores: every block is equally likely to be kept, independently in each step."""

import torch
from torch import Tensor

from lemo.packing.to_device import to_device
from lemo.selection.scorers.base import BlockedBatch, Scorer

__all__ = ["RandomScorer"]

# The golden ratio's bits: no two steps of near seeds begin alike.
_STEP_STRIDE = 0x9E3779B97F4A7C15


class RandomScorer(Scorer):
    """Uniform random scores. Every call draws new ones, and so does each process of a training.

    Args:
        seed: of the draws.
    """

    reads_residual = False

    def __init__(self, seed: int) -> None:
        self._replica: int | None = None
        self._seed = seed
        self._step: int | None = None
        # On the CPU whatever the model's device, so that a seed means the same everywhere.
        self._generator = torch.Generator("cpu")
        self._is_seeded = False

    def begin_step(self, step: int) -> None:
        """From here on the draws depend on the seed, the process and this step alone."""
        self._step = step
        self._begin(self._which())

    def begin_pass(self, index: int) -> None:
        """From here on the draws depend on the seed, the step and this pass of it alone.

        So two processes keep what one of twice as many passes keeps.
        """
        self._begin(index)

    def _begin(self, which: int) -> None:
        seed = self._seed + which + (self._step or 0) * _STEP_STRIDE
        self._generator.manual_seed(seed % 2**63)
        self._is_seeded = True

    def begin_replica(self, replica: int) -> None:
        """The processes of one group draw the same from here on."""
        self._replica = replica

    def _which(self) -> int:
        return _process() if self._replica is None else self._replica

    def __call__(self, layer: int, kind: str, residual: Tensor, batch: BlockedBatch) -> Tensor:
        # Not before: a process may learn which one it is after lemo is enabled.
        if not self._is_seeded:
            self._begin(self._which())
        scores = torch.rand(batch.layout.num_blocks, generator=self._generator, device="cpu")
        return to_device(scores, residual.device)


def _process() -> int:
    """Which of several processes this one is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0
