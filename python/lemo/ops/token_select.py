"""token_select: the blocks of every sequence that a policy keeps, and their packed rows."""

import torch
from torch import Tensor

from lemo import _C
from lemo.ops.call import call
from lemo.packing.blocks import BlockLayout, Selection

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::token_select")
def _(
    scores,
    block_starts,
    cu_blocks,
    policy,
    value,
    keep_first,
    keep_last,
    num_kept_blocks,
    num_kept_rows,
):
    num_kept, num_rows = num_kept_blocks, num_kept_rows
    if num_kept < 0 or num_rows < 0:
        sizes = torch.library.get_ctx()
        num_rows, num_kept = sizes.new_dynamic_size(), sizes.new_dynamic_size()
    return (
        block_starts.new_empty(num_rows),
        block_starts.new_empty(num_rows),
        block_starts.new_empty(cu_blocks.shape[0]),
        block_starts.new_empty(num_kept),
    )


def token_select(
    scores: Tensor,
    layout: BlockLayout,
    policy: str,
    value: float,
    keep_first: int,
    keep_last: int,
) -> Selection:
    """Keeps blocks by their scores, sequence by sequence (LeMo, section 4.1).

    With "ratio" the host never waits for a GPU: the sizes of the results follow from the lengths of
    the sequences, unless a ragged last block has to compete (`keep_last` 0). Otherwise the
    counts are read back once.

    Args:
        scores: [B] fp32, one for each block of `layout`; not NaN (on a GPU, where that cannot be
            checked, NaN is the lowest score of all). No gradient flows into it.
        layout: how the packed tokens are cut.
        policy: "ratio" keeps the `ceil(value * blocks)` best blocks of every sequence, the earlier
            block where scores tie; "threshold" keeps the blocks with `score >= value`.
        value: the share, in [0, 1], or the threshold.
        keep_first, keep_last: blocks at the two ends of a sequence that are always kept. They count
            towards the share, and may exceed it.

    Returns:
        The kept rows; an empty sequence keeps none.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    sizes = (-1, -1)
    if policy == "ratio":
        sizes = _C.plan_selection(layout.seqlens, layout.block_size, value, keep_first, keep_last)
    rows, positions, cu_rows, kept_blocks = call(
        _ops.token_select,
        scores.detach(),
        layout.block_starts,
        layout.cu_blocks,
        policy,
        value,
        keep_first,
        keep_last,
        *sizes,
    )
    return Selection(layout, rows, positions, cu_rows, kept_blocks)


def marked_blocks(marks: Tensor, layout: BlockLayout, num_blocks: int, num_rows: int) -> Selection:
    """The blocks whose mark is 1, as a selection. The host does not wait for a GPU.

    Args:
        marks: [B] fp32 of 0 or 1.
        layout: how the packed tokens are cut.
        num_blocks, num_rows: how many blocks are marked, and how many rows these have.
    """
    cuts, sizes = (layout.block_starts, layout.cu_blocks), (num_blocks, num_rows)
    rows, positions, cu_rows, blocks = call(
        _ops.token_select, marks, *cuts, "threshold", 0.5, 0, 0, *sizes
    )
    return Selection(layout, rows, positions, cu_rows, blocks)


def left_out(selection: Selection) -> Selection:
    """The rows that a selection does not keep, as a selection. The host does not wait for a GPU.

    Args:
        selection: some blocks of its layout, not None for everything.
    """
    layout, kept_blocks = selection.layout, selection.kept_blocks
    assert kept_blocks is not None
    marks = torch.ones(layout.num_blocks, device=kept_blocks.device)
    marks.index_fill_(0, kept_blocks.long(), 0.0)
    sizes = layout.num_blocks - kept_blocks.numel(), layout.num_tokens - selection.num_rows
    return marked_blocks(marks, layout, *sizes)
