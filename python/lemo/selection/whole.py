"""Which sequences of a batch keep everything, drawn at random."""

import math

import torch

from lemo.selection.draws import StepGenerator

__all__ = ["WholeSequences"]

# The numbers that scores are drawn from are others.
_SEED_OFFSET = 1 << 32


class WholeSequences:
    """Draws the sequences that keep everything, a given share of all in the long run.

    A batch has as many as its share of the sequences, rounded up or down at random, so that memory
    varies little.

    Args:
        share: of the sequences, in [0, 1].
        seed: of the draws; each process of a training has draws of its own.
    """

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._draws = StepGenerator(seed + _SEED_OFFSET)

    def begin_step(self, step: int) -> None:
        """From here on the draws depend on the seed, the process and this step alone."""
        self._draws.begin_step(step)

    def draw(self, sequences: int) -> list[bool]:
        """Whether each of so many sequences keeps everything."""
        if self._share == 0.0:
            return [False] * sequences
        generator = self._draws.generator
        rounding = torch.rand((), generator=generator, device="cpu").item()
        order = torch.randperm(sequences, generator=generator, device="cpu").tolist()
        count = math.floor(self._share * sequences + rounding)
        return [place < count for place in order]
