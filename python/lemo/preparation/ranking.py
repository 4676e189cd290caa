"""How well scores rank blocks: the recall of the kept set, and a loss that serves it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lemo.packing.blocks import BlockLayout, kept_blocks
from lemo.settings.preparation import PredictorSettings

__all__ = ["Budget", "kept_set_recall", "ranking_loss"]

# Pairs of the ranking loss take this many blocks from each side of the boundary at most, so that a
# window of a million tokens (16384 blocks) costs no more than 2^18 pairs.
_MAX_BLOCKS_A_SIDE = 512


@dataclass(frozen=True)
class Budget:
    """How many blocks of a sequence are kept.

    Attributes:
        keep: share of a sequence's blocks that is kept, those that are kept in any case included.
        keep_first, keep_last: blocks at its two ends that are kept in any case.
    """

    keep: float
    keep_first: int
    keep_last: int

    @classmethod
    def of(cls, settings: PredictorSettings) -> "Budget":
        """The budget that predictors are trained for."""
        return cls(settings.keep, settings.keep_first, settings.keep_last)

    def candidates(self, blocks: int) -> tuple[slice, int]:
        """Of a sequence of so many blocks, those up for selection, and how many of them it keeps.

        The policy is "ratio".
        """
        chosen = slice(self.keep_first, max(blocks - self.keep_last, self.keep_first))
        free = max(blocks - self.keep_first - self.keep_last, 0)
        budget = kept_blocks(self.keep, blocks) - (blocks - free)
        return chosen, min(max(budget, 0), free)


def kept_set_recall(
    predicted: Tensor, exact: Tensor, layout: BlockLayout, budget: Budget
) -> list[float]:
    """Share of the blocks kept by their exact scores that the prediction keeps, too.

    Blocks that are kept in any case do not count. A sequence whose budget leaves nothing to choose
    gives no entry.

    Args:
        predicted, exact: [B] scores of the same blocks.
        layout: the layout of these blocks.
        budget: how many of them are kept.

    Returns:
        One recall in [0, 1] for each sequence that has a choice.
    """
    recalls = []
    for guess, truth, count in _choices(predicted, exact, layout, budget):
        kept = [torch.argsort(v, descending=True, stable=True)[:count] for v in (guess, truth)]
        recalls.append(torch.isin(kept[0], kept[1]).float().mean().item())
    return recalls


def ranking_loss(predicted: Tensor, exact: Tensor, layout: BlockLayout, budget: Budget) -> Tensor:
    """Logistic loss over pairs of a kept and a left-out block, weighted towards the boundary.

    Only blocks near the boundary decide the kept set, so pairs are weighted by their distance from
    it. A block's weight is exp(-distance), where the distance is in ranks, in units of a quarter of
    the sequence's candidates; a pair's weight is the product of both.

    Args:
        predicted: [B] scores in units of the exact scores' standard deviation.
        exact, layout, budget: as for `kept_set_recall`.

    Returns:
        Mean over sequences, a scalar; 0 where no sequence has a choice.
    """
    losses = []
    for guess, truth, count in _choices(predicted, exact, layout, budget):
        order = torch.argsort(truth, descending=True, stable=True)
        kept = guess[order[max(count - _MAX_BLOCKS_A_SIDE, 0) : count]].flip(0)
        left_out = guess[order[count : count + _MAX_BLOCKS_A_SIDE]]
        decay = 4.0 / guess.numel()
        near_kept = torch.exp(-decay * torch.arange(kept.numel(), device=guess.device))
        near_left_out = torch.exp(-decay * torch.arange(left_out.numel(), device=guess.device))
        weight = near_kept[:, None] * near_left_out[None, :]
        wrong = functional.softplus(-(kept[:, None] - left_out[None, :]))
        losses.append((weight * wrong).sum() / weight.sum())
    return torch.stack(losses).mean() if losses else predicted.sum() * 0.0


def _choices(
    predicted: Tensor, exact: Tensor, layout: BlockLayout, budget: Budget
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(predicted, exact, number to keep) of the candidates of each sequence that has a choice."""
    counts = layout.block_counts
    for guess, truth in zip(predicted.split(counts), exact.split(counts)):
        candidates, count = budget.candidates(guess.numel())
        guess, truth = guess[candidates], truth[candidates]
        if 0 < count < guess.numel():
            yield guess, truth, count
