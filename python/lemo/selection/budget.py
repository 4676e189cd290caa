"""How many blocks a sequence keeps where its answers decide: as many as hold their relevance."""

import torch
from torch import Tensor

from lemo.packing.blocks import BlockLayout, kept_blocks

__all__ = ["within_budget"]


def within_budget(
    ranks: Tensor,
    relevance: Tensor,
    labelled: Tensor,
    answers: Tensor,
    layout: BlockLayout,
    share: float,
    least: float,
    most: float,
    tokens: int,
) -> Tensor:
    """[B] of 0 or 1 fp32: the blocks that each sequence keeps.

    The first blocks by rank are kept: all with labels, and then as many as hold a share of the
    relevance of the blocks without labels, between two shares of all blocks, and so many tokens.
    Labels never take all of the upper share: at least half of it is for the prompt. Of text, where
    most rows have labels, the upper share is kept.

    Args:
        ranks: [B], the order of the blocks, those that come first the highest.
        relevance: [B] fp32 of at least 0.
        labelled: [B] bool, blocks with labels.
        answers: [N] bool, sequences that are no text.
        layout: the blocks.
        share: of the relevance, in (0, 1]; 1: the upper share of the blocks is kept.
        least, most: shares of the blocks of a sequence.
        tokens: of a prompt that are kept at least.
    """
    kept = torch.zeros_like(relevance)
    free = relevance.masked_fill(labelled, 0.0)
    first = 0
    for is_answers, count in zip(answers, layout.block_counts):
        blocks = slice(first, first + count)
        first += count
        if count == 0:
            continue
        order = ranks[blocks].argsort(descending=True, stable=True)
        with_labels = labelled[blocks].sum()
        budget = max(kept_blocks(most, count), 1)
        at_least = with_labels + -(-tokens // layout.block_size)
        needed = torch.maximum(with_labels + -(-budget // 2), at_least).clamp(min=budget)
        if share < 1.0:
            held = free[blocks][order].cumsum(0)
            # Blocks in front of which less than the share is held; those with labels hold nothing.
            holding = (held - free[blocks][order] < share * held[-1]).sum()
            lower = max(kept_blocks(least, count), 1)
            needed = torch.minimum(torch.maximum(holding, at_least).clamp(min=lower), needed)
        needed = torch.where(is_answers, needed, budget)
        keep = torch.arange(count, device=ranks.device) < needed
        kept[blocks] = torch.zeros_like(free[blocks]).index_copy_(0, order, keep.to(kept.dtype))
    return kept
