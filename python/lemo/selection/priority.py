"""Blocks that are kept first whatever their scores: those with labels, and ends of sequences."""

import torch
from torch import Tensor

from lemo.packing.blocks import BlockLayout, kept_blocks
from lemo.packing.to_device import to_device

__all__ = ["always_kept", "ranks"]


def always_kept(
    layout: BlockLayout, keep: float, keep_first: int, keep_last: int, leave_room: bool
) -> tuple[list[int], bool]:
    """The blocks at the ends of the sequences that are kept first when a share is kept.

    Args:
        layout: the blocks.
        keep: share of the blocks of each sequence that is kept.
        keep_first, keep_last: blocks at the two ends.
        leave_room: only in sequences where the share has room for another block. Random scores are
            there to train every block in turn, which fixed blocks must not prevent.

    Returns:
        Their indices, and whether some sequence has none, because the share has no room.
    """
    blocks: list[int] = []
    crowded, first = False, 0
    for count in layout.block_counts:
        ends = {*range(min(keep_first, count)), *range(max(count - keep_last, 0), count)}
        if leave_room and count and len(ends) >= kept_blocks(keep, count):
            crowded = True
        else:
            blocks += [first + block for block in sorted(ends)]
        first += count
    return blocks, crowded


def ranks(scores: Tensor, labelled: Tensor | None, first: list[int]) -> Tensor:
    """Scores [B] that say the same order of blocks, but for those that come before the others.

    Blocks that have labels come before blocks that have none, and among either those of `first`
    come before the others. NaN stays NaN.

    Args:
        scores: [B] fp32.
        labelled: [B] bool, blocks that have labels; None: nothing is known of labels.
        first: indices of blocks.
    """
    if labelled is None:
        priority = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
    else:
        priority = 2 * labelled.int()
    if first:
        index = to_device(torch.tensor(first, device="cpu"), scores.device)
        priority = priority.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
    # Ranks, exact whatever the scores are; among equal ones the earlier block stays first.
    order = scores.argsort(descending=True, stable=True)
    order = order[priority[order].argsort(descending=True, stable=True)]
    return torch.where(scores.isnan(), scores, -order.argsort().to(scores.dtype))
