"""Relevance by attention: what retrieval heads look at from the rows that predict an answer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lemo import ops
from lemo.packing.blocks import BlockLayout
from lemo.packing.to_device import index_tensors
from lemo.relevance.answers import Answers, shares

__all__ = ["head_relevance", "with_keys"]


def head_relevance(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    answers: Sequence[Answers | None],
    scale: float,
) -> list[Tensor | None]:
    """How much some heads look at each block from each answer, for every sequence [A, H, B] fp32.

    The largest attention weight that a row of the answer gives to a token of the block; every
    answer's weights of a head are divided by their sum over the blocks without labels.

    Args:
        q: [T, H, D], rotated.
        k: [T, H, D], rotated: for each of the heads its keys.
        layout: how the T rows are cut.
        answers: of each sequence; None: it has none, and so has the result.
        scale: the model's attention scale.
    """
    firsts = [0]
    for seqlen in layout.seqlens:
        firsts.append(firsts[-1] + seqlen)
    rows = [first + row for first, found in zip(firsts, answers) if found for row in found.rows()]
    if not rows:
        return [None for _ in answers]
    [index] = index_tensors(q.device, rows)
    largest, total = ops.block_attention(q.index_select(0, index), k, index, layout, scale)
    weights = (largest - total.logsumexp(-1, keepdim=True)).exp()
    relevance: list[Tensor | None] = []
    row = block = 0
    for found, count in zip(answers, layout.block_counts):
        if found is None:
            relevance.append(None)
        else:
            end = row + len(found.rows())
            mine = weights[row:end, :, block : block + count]
            row = end
            relevance.append(
                shares(found.largest(mine) * found.free_blocks(layout.block_size, mine))
            )
        block += count
    return relevance


def with_keys(q: Tensor, k: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(q, k) of some heads, [T, H, D] each, from all queries [T, Hq, D] and keys [T, Hk, D]."""
    share = q.shape[1] // k.shape[1]
    # Not by a list as the index, whose copy to the device would be waited for.
    mine = [q[:, head] for head in heads], [k[:, head // share] for head in heads]
    return torch.stack(mine[0], 1), torch.stack(mine[1], 1)
