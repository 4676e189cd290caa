"""What the place of a block explains of its exact score.

Attention's exact score of a block (LeMo, section 4.1) is a mean over the blocks of queries that see
it. Rotary positions make near pairs score higher than far ones, and a late block is seen by near
queries only, so its score depends on how many blocks follow it, whatever it holds. Each sub-block
therefore gets a profile, mean and deviation of its scores by that number; the predictors learn what
the content adds, in units of the deviation. The scores of an MLP have no such dependence: their
profile is one mean and one deviation.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lemo.packing.blocks import BlockLayout

__all__ = ["PositionProfile", "contested_blocks", "query_blocks"]


def query_blocks(layout: BlockLayout) -> Tensor:
    """Query blocks that see each block, itself included, [B] int64: 1 for a sequence's last."""
    counts = layout.cu_blocks.diff().long()
    # The size is known, so that the host does not have to ask a GPU for it.
    ends = layout.cu_blocks[1:].long().repeat_interleave(counts, output_size=layout.num_blocks)
    return ends - torch.arange(layout.num_blocks, device=ends.device)


def contested_blocks(layout: BlockLayout, keep_first: int, keep_last: int) -> Tensor:
    """[B] bool: blocks that are not kept in any case for their place at an end of the sequence."""
    from_end = query_blocks(layout) - 1
    counts = layout.cu_blocks.diff().long()
    lengths = counts.repeat_interleave(counts, output_size=layout.num_blocks)
    from_start = lengths - 1 - from_end
    return (from_start >= keep_first) & (from_end >= keep_last)


@dataclass(frozen=True)
class PositionProfile:
    """Mean and deviation of exact scores, piecewise linear in the log of the query blocks.

    Attributes:
        knots: [P] fp32, numbers of query blocks, ascending from 1. Beyond the last one the profile
            goes on as between the last two, so that longer sequences than those of the training
            are ranked by place, too.
        mean, deviation: [P] fp32, deviation > 0; beyond the last knot at least the smallest.
    """

    knots: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def fit(cls, scores: Tensor, seen_by: Tensor, flat: bool = False) -> "PositionProfile":
        """Least squares.

        Args:
            scores: [n] exact scores of blocks that are up for selection.
            seen_by: [n] their `query_blocks`.
            flat: one mean and one deviation for all places.
        """
        # Knots at 2^(k/2): the profile of a mean over K query blocks changes with the logarithm of
        # K.
        last = max(int(2 * math.log2(max(int(seen_by.max()), 1))), 0)
        exponents = torch.arange(1 if flat else last + 1, device=scores.device) / 2
        knots = torch.unique(torch.exp2(exponents).round())
        basis = _hats(seen_by, knots).double()
        # The ridge ties knots without blocks near them to zero deviation from their neighbours'
        # scale.
        gram = basis.T @ basis + 1e-6 * torch.eye(len(knots), device=scores.device)
        centre = scores.double().mean()
        mean = centre + torch.linalg.solve(gram, basis.T @ (scores.double() - centre))
        absolute = (scores.double() - basis @ mean).abs()
        # Mean absolute deviation times sqrt(pi / 2) is the standard deviation of a Gaussian, and
        # bears outliers.
        spread = absolute.mean() + torch.linalg.solve(gram, basis.T @ (absolute - absolute.mean()))
        floor = max(0.1 * absolute.mean().item(), 1e-6 * abs(centre.item()), 1e-12)
        deviation = (math.sqrt(math.pi / 2) * spread).clamp(min=floor)
        return cls(knots, mean.float(), deviation.float())

    def to(self, device: torch.device) -> "PositionProfile":
        """The same profile on another device."""
        return PositionProfile(
            self.knots.to(device), self.mean.to(device), self.deviation.to(device)
        )

    def standardise(self, scores: Tensor, layout: BlockLayout) -> Tensor:
        """What the content adds to the exact scores [B], in deviations."""
        mean, deviation = self.at(layout, scores.device)
        return (scores - mean) / deviation

    def restore(self, content: Tensor, layout: BlockLayout) -> Tensor:
        """The inverse of `standardise`: scores [B] in the units of the exact ones."""
        mean, deviation = self.at(layout, content.device)
        return mean + deviation * content

    def at(self, layout: BlockLayout, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every block's score for its place, [B] fp32 each."""
        basis = _hats(query_blocks(layout).to(device), self.knots.to(device))
        # Neighbouring places differ by less than autocast would leave of them.
        with torch.autocast(device.type, enabled=False):
            deviation = self.deviation.to(device)
            return basis @ self.mean.to(device), (basis @ deviation).clamp(min=deviation.min())


def _hats(seen_by: Tensor, knots: Tensor) -> Tensor:
    """Weights of the knots, [n, P]: linear interpolation in log2, and extrapolation beyond."""
    x, places = seen_by.float().clamp(min=1).log2(), knots.log2()
    right = torch.searchsorted(places, x).clamp(1, max(len(places) - 1, 1))
    weights = torch.zeros(x.numel(), len(places), device=x.device)
    if len(places) == 1:
        return weights.fill_(1.0)
    left = right - 1
    share = (x - places[left]) / (places[right] - places[left])
    rows = torch.arange(x.numel(), device=x.device)
    weights[rows, left] = 1 - share
    weights[rows, right] = share
    return weights
