"""block_attention of the last hundredth of the rows beside torch with the matrix of all logits."""

from functools import partial

import torch
from torch import Tensor

from gpu.bench import BLOCK, HEAD_SIZE, TOKENS, Bench
from lemo import ops
from lemo.packing.blocks import BlockLayout

# Chosen heads, each with a key head of its own.
CHOSEN_HEADS = 4


def in_torch(q: Tensor, k: Tensor, rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The maximum and the logsumexp of every block of one sequence, as one writes it in torch."""
    logits = torch.einsum("rhd,thd->rht", q, k).float() * HEAD_SIZE**-0.5
    hidden = torch.arange(len(k), device=k.device) > rows[:, None, None]
    blocks = logits.masked_fill_(hidden, float("-inf")).unflatten(-1, (-1, block))
    return blocks.amax(-1), blocks.logsumexp(-1)


def rows(b: Bench):
    tokens = b.size(TOKENS)
    chosen = torch.arange(tokens - tokens // 100, tokens, device=b.device)
    q = b.randn(len(chosen), CHOSEN_HEADS, HEAD_SIZE)
    k = b.randn(tokens, CHOSEN_HEADS, HEAD_SIZE)
    for block in (BLOCK, 4 * BLOCK):
        layout = BlockLayout.from_seqlens([tokens], block, device=b.device)
        ours = partial(ops.block_attention, q, k, chosen, layout)
        peer = partial(in_torch, q, k, chosen, block)
        # As exponentials: hidden blocks are 0 then, not infinite.
        b.agree("block_attention", *([x.exp() for x in results()] for results in (ours, peer)))
        shape = {"tokens": tokens, "rows": len(chosen), "heads": CHOSEN_HEADS}
        yield from b.compare(
            "block_attention",
            shape | {"head_size": HEAD_SIZE, "block": block, "dtype": "bfloat16"},
            ours,
            {"torch, all logits": peer},
            tera=2 * len(chosen) * tokens * CHOSEN_HEADS * HEAD_SIZE / 1e12,
        )
