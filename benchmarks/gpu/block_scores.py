"""block_scores on CUDA, beside the causal attention forward pass of the same shape in PyTorch."""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.harness import BLOCK, median_ms, record
from lemo import ops, reference
from lemo.packing.blocks import BlockLayout

# (tokens, query heads, key heads, head size): Llama-3-8B at several lengths.
SHAPES = ((16384, 32, 8, 128), (65536, 32, 8, 128))
PEERS = {
    "PyTorch FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "PyTorch cuDNN attention": SDPBackend.CUDNN_ATTENTION,
}


def check() -> None:
    """Inputs are exact in fp32 and every sum is fp32: the fp32 oracle's own tolerance."""
    for dtype in (torch.bfloat16, torch.float16):
        for heads, key_heads, size in ((8, 2, 128), (4, 4, 64), (3, 1, 40)):
            for block in (64, 48, 300):
                layout = BlockLayout.from_seqlens([900, 0, 1, 333], block, device="cuda")
                q, k = (
                    torch.randn(layout.num_tokens, h, size, device="cuda", dtype=dtype)
                    for h in (heads, key_heads)
                )
                oracle = reference.block_scores(
                    q.float(), k.float(), layout.block_starts, layout.cu_blocks, size**-0.5
                )
                for kernel in ("auto", "portable"):
                    scores = ops.block_scores(q, k, layout, kernel=kernel)
                    error = ((scores - oracle).norm() / oracle.norm()).item()
                    what = f"block_scores {kernel} {dtype} {size} {block}"
                    assert error <= 2e-5, f"{what}: {error:.1e}"
    layout = BlockLayout.from_seqlens([8192, 1000], BLOCK, device="cuda")
    q = torch.randn(layout.num_tokens, 8, 128, device="cuda", dtype=torch.bfloat16)
    first = ops.block_scores(q, q[:, :2], layout)
    for _ in range(100):
        assert torch.equal(first, ops.block_scores(q, q[:, :2], layout)), "not the same bits"


def bench(bandwidth: float) -> list[dict]:
    return [line for shape in SHAPES for line in bench_shape(*shape)]


def bench_shape(tokens: int, heads: int, key_heads: int, size: int) -> list[dict]:
    q, k, v = (
        torch.randn(tokens, h, size, device="cuda", dtype=torch.bfloat16)
        for h in (heads, key_heads, key_heads)
    )
    layout = BlockLayout.from_seqlens([tokens], BLOCK, device="cuda")

    def attention(backend):
        heads_first = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                *heads_first, is_causal=True, enable_gqa=True
            )

    ours, portable, *peers = median_ms(
        partial(ops.block_scores, q, k, layout),
        partial(ops.block_scores, q, k, layout, kernel="portable"),
        *(partial(attention, backend) for backend in PEERS.values()),
        repeats=5,
        calls=max(1, 32768 // tokens),
    )
    shape = {"tokens": tokens, "heads": heads, "kv_heads": key_heads, "head_size": size}
    shape |= {"block": BLOCK, "dtype": "bfloat16"}
    # Multiply-adds of the visible half of one product.
    rate = {"tflops": round(tokens * tokens * size * heads / ours["median"] / 1e9, 1)}
    lines = [
        record("block_scores", shape, ours, f"{name}, causal forward", peer)
        for name, peer in zip(PEERS, peers)
    ]
    lines.append(record("block_scores", shape, ours, "block_scores portable", portable))
    return [line | rate for line in lines]
