"""token_select: the blocks of every sequence that a policy keeps, and their packed rows."""

import torch
from torch import Tensor

from lemo.layout import BlockLayout, Selection
from lemo.ops._call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::token_select")
def _(scores, block_starts, cu_blocks, policy, value, keep_first, keep_last):
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
    keep_first: int = 1,
    keep_last: int = 1,
) -> Selection:
    """Keeps blocks by their scores, sequence by sequence (LeMo, section 4.1).

    Args:
        scores: [B] fp32, one for each block of `layout`; not NaN. No gradient flows into it.
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
    rows, positions, cu_rows, kept_blocks = call(
        _ops.token_select,
        scores.detach(),
        layout.block_starts,
        layout.cu_blocks,
        policy,
        value,
        keep_first,
        keep_last,
    )
    return Selection(layout, rows, positions, cu_rows, kept_blocks)
