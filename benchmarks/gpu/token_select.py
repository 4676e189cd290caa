"""token_select on CUDA, beside topk and nonzero."""

import torch

from gpu.harness import BLOCK, TOKENS, median_ms, record
from lemo import ops, reference
from lemo.packing.blocks import BlockLayout


def check() -> None:
    for seqlens in ([TOKENS], [5000, 0, 129, 64], [30, 700] * 200):
        layout = BlockLayout.from_seqlens(seqlens, BLOCK, "cuda")
        scores = torch.randint(-500, 500, (layout.num_blocks,), device="cuda") / 100
        for policy, value in (("ratio", 0.5, 1, 1), ("ratio", 0.31), ("threshold", 1.0)):
            for ends in ((1, 1), (0, 0)):
                arguments = (policy, value, *ends)
                selection = ops.token_select(scores, layout, *arguments)
                oracle = reference.token_select(
                    scores, layout.block_starts, layout.cu_blocks, *arguments
                )
                names = ("rows", "positions", "cu_rows", "kept_blocks")
                for name, expected in zip(names, oracle):
                    assert torch.equal(getattr(selection, name), expected), f"{name} {arguments}"


def by_topk(scores: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows by torch; the host waits for nonzero."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores[1:-1].topk(num_kept - 2).indices + 1] = True
    kept[0] = kept[-1] = True
    blocks = kept.nonzero()
    return blocks, (blocks * BLOCK + torch.arange(BLOCK, device="cuda")).flatten().int()


def bench(bandwidth: float) -> list[dict]:
    return [*bench_tokens(TOKENS), *bench_tokens(1 << 20)]


def bench_tokens(tokens: int) -> list[dict]:
    layout = BlockLayout.from_seqlens([tokens], BLOCK, "cuda")
    scores = torch.rand(layout.num_blocks, device="cuda")
    num_kept = layout.num_blocks // 2
    rows = by_topk(scores, num_kept)[1]
    assert torch.equal(ops.token_select(scores, layout, "ratio", 0.5, 1, 1).rows, rows)
    ours, threshold, peer = median_ms(
        lambda: ops.token_select(scores, layout, "ratio", 0.5, 1, 1),
        lambda: ops.token_select(scores, layout, "threshold", 0.5, 1, 1),
        lambda: by_topk(scores, num_kept),
    )
    shape = {"tokens": tokens, "block": BLOCK, "kept": 0.5}
    return [
        record("token_select ratio", shape, ours, "torch topk + nonzero", peer),
        record("token_select threshold", shape, threshold, "torch topk + nonzero", peer),
    ]
