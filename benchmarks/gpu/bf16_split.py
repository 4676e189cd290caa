"""bf16_split beside PyTorch's operators, and products of rows with it beside those in fp32."""

import torch

import lemo.ops  # noqa: F401  registers torch.ops.lemo
from gpu.bench import TOKENS, Bench

HIDDEN, RANK = 4096, 16  # a LoRA pair of an 8B model


def by_torch(x):
    """The same by PyTorch's operators."""
    total = x[:, 0] + x[:, 1]
    high = total.bfloat16()
    return torch.stack((high, high, (total - high).bfloat16()), 1)


def rows(b: Bench):
    count, hidden, rank = b.size(TOKENS // 4), b.size(HIDDEN), RANK
    split = torch.ops.lemo.bf16_split
    x = b.randn(count, 3, rank).float()
    shape = {"rows": count, "rank": rank, "dtype": "float32"}
    b.agree("bf16_split", split(x, 1.0, True), by_torch(x))
    yield from b.compare(
        "bf16_split",
        shape,
        lambda: split(x, 1.0, True),
        {"torch": lambda: by_torch(x)},
        moved=count * rank * (2 * 4 + 3 * 2),
    )
    if b.device != "cuda":
        return
    left, weight = b.randn(count, hidden), b.randn(rank, hidden).float()

    def by_parts():
        parts = split(weight.view(1, -1), 1.0, False).view(3 * rank, hidden)
        return torch.mm(left, parts.T, out_dtype=torch.float32)

    shape = {"rows": count, "hidden": hidden, "rank": rank, "dtype": "bfloat16 x float32"}
    yield from b.compare(
        "product of bf16 rows and an fp32 matrix",
        shape,
        by_parts,
        {"fp32": lambda: left.float() @ weight.T},
    )
