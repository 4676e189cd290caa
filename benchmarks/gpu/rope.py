"""rope of a layer's queries and keys, half of the blocks kept, beside torch's formula and Liger."""

import torch
from torch import Tensor

import lemo.ops  # noqa: F401  registers torch.ops.lemo
from gpu.bench import HEAD_SIZE, HEADS, KV_HEADS, TOKENS, Bench

try:
    from liger_kernel.ops.rope import LigerRopeFunction as Liger
except ImportError:
    Liger = None


def make_tables(b: Bench, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [tokens, HEAD_SIZE] bf16."""
    exponents = torch.arange(0, HEAD_SIZE, 2, device=b.device) / HEAD_SIZE
    angles = torch.arange(tokens, device=b.device)[:, None] * 500000.0**-exponents
    angles = torch.cat((angles, angles), -1)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def by_formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def rows(b: Bench):
    tokens = b.size(TOKENS)
    kept = b.half_of_the_blocks(tokens)
    cos, sin = make_tables(b, tokens)
    q, k = (b.randn(len(kept), heads, HEAD_SIZE) for heads in (HEADS, KV_HEADS))
    rotate = torch.ops.lemo.rope
    # The peers take tables of the kept rows; gathering them is not timed.
    tables = [table.index_select(0, kept)[:, None] for table in (cos, sin)]

    def ours() -> tuple[Tensor, Tensor]:
        return rotate(q, cos, sin, kept, False), rotate(k, cos, sin, kept, False)

    def formula() -> tuple[Tensor, Tensor]:
        return by_formula(q, *tables), by_formula(k, *tables)

    b.agree("rope", ours(), formula())
    peers = {"torch formula": formula}
    if Liger is not None and b.device == "cuda":
        # [batch, heads, tokens, size], over the storage [batch, tokens, heads, size]; in place.
        views = [x[None].transpose(1, 2) for x in (q.clone(), k.clone())]
        shared = [table[:, 0][None] for table in tables]
        peers["Liger LigerRopeFunction"] = lambda: Liger.apply(*views, *shared)
    shape = {"rows": len(kept), "heads": HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
    yield from b.compare(
        "rope of q and k",
        shape | {"dtype": "bfloat16"},
        ours,
        peers,
        moved=2 * (q.numel() + k.numel()) * 2,
        bandwidth="rope bandwidth",
    )
