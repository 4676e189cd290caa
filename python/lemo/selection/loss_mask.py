"""Which rows do not count in the loss after a forward pass that left blocks out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lemo.packing.blocks import BlockLayout, Selection, block_tokens

__all__ = ["masked_rows"]


def masked_rows(
    layout: BlockLayout,
    selections: Sequence[Selection],
    mask_loss: bool | float,
    burn_in: int | float,
) -> Tensor | None:
    """[T] bool: rows whose loss does not count; None: all count.

    Args:
        layout: of the T rows.
        selections: what every sub-block of the model kept.
        mask_loss, burn_in: as in `LemoConfig`.
    """
    if mask_loss is False:
        return None
    if all(selection is selections[0] for selection in selections):
        # One set for all, of which one counts as much as all of them.
        selections = selections[:1]
    # How many sub-blocks have to keep a row; more than a rounding error of the share.
    needed = 1 if mask_loss is True else max(math.ceil(mask_loss * len(selections) - 1e-9), 1)
    needed -= sum(selection.rows is None for selection in selections)
    if needed <= 0:
        return None
    # By blocks: every layer may have a set of its own, and one launch serves them all.
    lengths = layout.block_starts.diff().long()
    kept = torch.cat([s.kept_blocks for s in selections if s.kept_blocks is not None])
    times = torch.zeros(layout.num_blocks, dtype=torch.int32, device=lengths.device)
    times.index_add_(0, kept, torch.ones_like(kept))
    masked = times < needed
    rows = masked.repeat_interleave(lengths, output_size=layout.num_tokens)
    if burn_in == 0:
        return rows
    count = block_tokens(burn_in, layout.block_size)
    return rows | _burnt_in(layout, masked, lengths, count)


def _burnt_in(layout: BlockLayout, masked: Tensor, lengths: Tensor, count: int) -> Tensor:
    """[T] bool: the first rows of blocks that follow a masked one of their sequence.

    Args:
        layout: of the T rows.
        masked: [B] bool.
        lengths: [B] int64, tokens of the blocks.
        count: how many rows, at most those of the block.
    """
    # One entry more: where an empty last sequence would begin.
    behind = pad(masked, (1, 0))
    behind = behind.index_fill_(0, layout.cu_blocks.long(), False)[:-1]
    # Rows up to `ends` of their block; a block is no longer than its own rows.
    ends = torch.where(behind, layout.block_starts[:-1] + count, 0)
    rows = torch.arange(layout.num_tokens, dtype=ends.dtype, device=ends.device)
    return rows < ends.repeat_interleave(lengths, output_size=layout.num_tokens)
