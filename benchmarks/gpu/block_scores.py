"""block_scores beside the causal attention forward pass of the same shape in PyTorch."""

from functools import partial

from gpu.bench import BLOCK, HEAD_SIZE, HEADS, KV_HEADS, Bench
from gpu.segment_attention import dense_attention, dense_backends
from lemo import ops
from lemo.packing.blocks import BlockLayout

LENGTHS = (16384, 65536)


def rows(b: Bench):
    for tokens in map(b.size, LENGTHS):
        q, k, v = (b.randn(tokens, heads, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
        layout = BlockLayout.from_seqlens([tokens], BLOCK, device=b.device)
        ours = partial(ops.block_scores, q, k, layout)
        peers = {
            f"{name}, causal forward": partial(dense_attention, backend, q, k, v)
            for name, backend in dense_backends(b).items()
        }
        if b.device == "cuda":
            portable = partial(ours, kernel="portable")
            b.agree("block_scores", ours(), portable(), bound=2e-5)
            peers["block_scores portable"] = portable
        shape = {"tokens": tokens, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
        yield from b.compare(
            "block_scores",
            shape | {"block": BLOCK, "dtype": "bfloat16"},
            ours,
            peers,
            # The visible half of one product.
            tera=tokens * tokens * HEAD_SIZE * HEADS / 1e12,
            repeats=5,
            calls=max(1, 32768 // tokens),
        )
