"""Random numbers of training steps: the same for the same seed, process and step."""

import torch

__all__ = ["StepGenerator"]

# The golden ratio's bits: no two steps of near seeds begin alike.
_STEP_STRIDE = 0x9E3779B97F4A7C15


class StepGenerator:
    """A generator that every step sets anew, with a seed of its own in each process of a training.

    Attributes:
        generator: on the CPU whatever the model's device, so that a seed means the same everywhere.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            seed += torch.distributed.get_rank()
        self._seed = seed
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def begin_step(self, step: int) -> None:
        """From here on the draws depend on the seed, the process and this step alone."""
        self.generator.manual_seed((self._seed + step * _STEP_STRIDE) % 2**63)
