"""How many blocks a sequence keeps where its answers decide: as many as hold their relevance."""

import torch
from torch import Tensor

from lemo.packing.blocks import BlockLayout, kept_blocks

__all__ = ["within_budget"]


def within_budget(
    ranks: Tensor,
    relevance: Tensor,
    labelled: Tensor | None,
    layout: BlockLayout,
    share: float,
    least: float,
    most: float,
) -> Tensor:
    """[B] of 0 or 1 fp32: the blocks that each sequence keeps.

    The first blocks by rank are kept: those with labels, and then as many as hold a share of the
    relevance of the blocks without labels, between two shares of all blocks.

    Args:
        ranks: [B], the order of the blocks, those that come first the highest.
        relevance: [B] fp32 of at least 0.
        labelled: [B] bool, blocks with labels; None: none is known.
        layout: the blocks.
        share: of the relevance, in (0, 1].
        least, most: shares of the blocks of a sequence.
    """
    kept = torch.zeros_like(relevance)
    free = relevance if labelled is None else relevance.masked_fill(labelled, 0.0)
    first = 0
    for count in layout.block_counts:
        blocks = slice(first, first + count)
        first += count
        if count == 0:
            continue
        order = ranks[blocks].argsort(descending=True, stable=True)
        held = free[blocks][order].cumsum(0)
        # Blocks in front of which less than the share is held.
        needed = (held - free[blocks][order] < share * held[-1]).sum()
        if labelled is not None:
            # A block with labels holds nothing and comes first, so it counts already where any
            # relevance is left behind it.
            needed = torch.maximum(needed, labelled[blocks].sum())
        upper = max(kept_blocks(most, count), 1)
        lower = min(max(kept_blocks(least, count), 1), upper)
        keep = torch.arange(count, device=ranks.device) < needed.clamp(lower, upper)
        kept[blocks] = torch.zeros_like(held).index_copy_(0, order, keep.to(held.dtype))
    return kept
