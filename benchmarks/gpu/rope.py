"""rope on CUDA, beside the formula in PyTorch, and Liger's kernel where it is installed."""

import torch

from gpu.harness import TOKENS, half_of_the_blocks, median_ms, record, share
from lemo import ops, reference

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128


def liger() -> type[torch.autograd.Function] | None:
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return None
    return LigerRopeFunction


def make_tables(tokens: int, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    exponents = torch.arange(0, head_size, 2, device="cuda") / head_size
    angles = torch.arange(tokens, device="cuda")[:, None] * 500000.0**-exponents
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check() -> None:
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        for head_size in (HEAD_SIZE, 64, 80, 6):
            cos, sin = make_tables(4096, head_size, dtype)
            rows = half_of_the_blocks(4096)[:-3]
            shape = (len(rows), KV_HEADS, head_size)
            x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
            dy = torch.randn_like(x)
            wide = x.detach().float().requires_grad_()
            oracle = reference.rope(wide, cos.float(), sin.float(), rows, False)
            result = ops.rope(x, cos, sin, rows)
            (grad,) = torch.autograd.grad(result, x, dy)
            (expected,) = torch.autograd.grad(oracle, wide, dy.float())
            for value, truth in ((result, oracle), (grad, expected)):
                error = ((value.float() - truth).norm() / truth.norm()).item()
                assert error <= bound, f"rope {dtype} {head_size}: {error:.1e}"


def by_formula(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def bench(bandwidth: float) -> list[dict]:
    """Queries and keys of a layer, half of the blocks kept."""
    rows = half_of_the_blocks(TOKENS)
    cos, sin = make_tables(TOKENS, HEAD_SIZE, torch.bfloat16)
    q, k = (
        torch.randn(len(rows), heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS)
    )
    # The peers take tables of the kept rows; gathering them is not timed.
    kept = tuple(table.index_select(0, rows)[:, None] for table in (cos, sin))
    peers = {"torch formula": lambda: (by_formula(q, *kept), by_formula(k, *kept))}
    if liger() is not None:
        # [batch, heads, tokens, size], over the storage [batch, tokens, heads, size]; in place.
        views = tuple(x[None].transpose(1, 2) for x in (q.clone(), k.clone()))
        tables = tuple(table[:, 0][None] for table in kept)
        peers["Liger LigerRopeFunction"] = lambda: liger().apply(*views, *tables)
    shape = {"rows": len(rows), "heads": HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
    shape["dtype"] = "bfloat16"
    results = []
    for name, peer in peers.items():
        ours, theirs = median_ms(
            lambda: (
                torch.ops.lemo.rope(q, cos, sin, rows, False),
                torch.ops.lemo.rope(k, cos, sin, rows, False),
            ),
            peer,
        )
        results.append(record("rope of q and k", shape, ours, name, theirs))
    moved = 2 * (q.numel() + k.numel()) * 2
    return [*results, share("rope bandwidth", shape, moved, ours, bandwidth)]
