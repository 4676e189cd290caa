"""token_select beside torch's topk and nonzero, for which the host waits."""

from functools import partial

import torch
from torch import Tensor

from gpu.bench import BLOCK, TOKENS, Bench
from lemo import ops
from lemo.packing.blocks import BlockLayout

LENGTHS = (TOKENS, 1 << 20)
KEEP = 0.5
ENDS = {"keep_first": 1, "keep_last": 1}


def by_topk(scores: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Kept blocks and their rows."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores[1:-1].topk(num_kept - 2).indices + 1] = True
    kept[0] = kept[-1] = True
    blocks = kept.nonzero()
    return blocks, (blocks * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten().int()


def rows(b: Bench):
    for tokens in map(b.size, LENGTHS):
        layout = BlockLayout.from_seqlens([tokens], BLOCK, b.device)
        scores = torch.rand(layout.num_blocks, device=b.device)
        peers = {"torch topk + nonzero": partial(by_topk, scores, layout.num_blocks // 2)}
        for policy in ("ratio", "threshold"):
            ours = partial(ops.token_select, scores, layout, policy, KEEP, **ENDS)
            if policy == "ratio":
                b.agree("token_select", ours().rows, by_topk(scores, layout.num_blocks // 2)[1], 0)
            shape = {"tokens": tokens, "block": BLOCK, "kept": KEEP}
            yield from b.compare(f"token_select {policy}", shape, ours, peers)
