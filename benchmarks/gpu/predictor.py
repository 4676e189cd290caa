"""The three predictors of a layer on CUDA, beside plain torch and one read of their input."""

import torch
from torch import Tensor

from gpu.harness import BLOCK, HIDDEN, TOKENS, median_ms, record, share
from lemo import ops, reference
from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import default_rank


def draw(hidden: int, rank: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    """Three maps whose mean is above 0, so that scores do not cancel to nothing."""
    return [
        (torch.randn(rows, columns, device="cuda") / columns**0.5 + gain / columns).to(dtype)
        for rows, columns, gain in ((rank, hidden, 0), (rank, rank, 1), (outputs, rank, 2))
    ]


def relative_error(value: Tensor, oracle: Tensor) -> float:
    return ((value.float() - oracle.float()).norm() / oracle.float().norm()).item()


def check() -> None:
    """Scores and gradients err at most twice as much as plain torch."""
    layout = BlockLayout.from_seqlens([3000, 0, 333], BLOCK, device="cuda")
    cuts = (layout.block_starts, layout.cu_blocks)
    for dtype in (torch.bfloat16, torch.float16):
        for rank in (256, 100):
            x = torch.randn(layout.num_tokens, 512, device="cuda", dtype=dtype)
            for outputs in (rank, 1):
                nets = [draw(512, rank, outputs, dtype) for _ in range(1 if outputs == 1 else 2)]

                def run(function, x, wanted, nets=nets):
                    weights = [w.to(wanted).requires_grad_() for net in nets for w in net]
                    scores = function(x.to(wanted), weights)
                    return scores, *torch.autograd.grad(scores.sum(), weights)

                def oracle(x, weights):
                    queries = weights[3:] or [None] * 3
                    return reference.predictor(x, *weights[:3], *queries, *cuts)

                ours = run(
                    lambda x, weights: ops.predictor(x, weights[:3], weights[3:] or None, layout),
                    x,
                    dtype,
                )
                rough, right = run(oracle, x, dtype), run(oracle, x, torch.float32)
                for value, low, exact in zip(ours, rough, right):
                    error, bound = relative_error(value, exact), 2 * relative_error(low, exact)
                    assert error <= bound, f"predictor {dtype} {rank} {outputs}: {error:.1e}"
    first = ops.predictor(x, *nets, None, layout)
    for _ in range(100):
        assert torch.equal(first, ops.predictor(x, *nets, None, layout)), "not the same bits"


def plain(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Means over blocks of one predictor's outputs, as one writes it in torch."""
    down, mid, up = weights
    hidden = torch.relu(torch.relu(x @ down.T) @ mid.T) @ up.T
    return hidden.unflatten(0, (-1, BLOCK)).mean(1)


def plain_layer(x: Tensor, keys: list, queries: list, mlp: list) -> tuple[Tensor, Tensor]:
    query = plain(x, queries).float()
    visible_by = torch.arange(len(query), 0, -1, device=x.device)[:, None]
    visible = query.flip(0).cumsum(0).flip(0) / visible_by
    return (plain(x, keys) * visible).sum(1), plain(x, mlp)[:, 0]


def bench(bandwidth: float) -> list[dict]:
    rank = default_rank(HIDDEN)
    layout = BlockLayout.from_seqlens([TOKENS], BLOCK, device="cuda")
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    keys, queries, mlp = (draw(HIDDEN, rank, e, torch.bfloat16) for e in (rank, rank, 1))

    def layer():
        return ops.predictor(x, keys, queries, layout), ops.predictor(x, mlp, None, layout)

    ours, theirs = median_ms(layer, lambda: plain_layer(x, keys, queries, mlp))
    shape = {"tokens": TOKENS, "hidden": HIDDEN, "rank": rank, "block": BLOCK, "dtype": "bfloat16"}
    # Products of the first two maps; what is left is less than a thousandth of them.
    tera = 3 * 2 * TOKENS * rank * (HIDDEN + rank) / 1e12
    rate = {"tflops": round(tera / ours["median"] * 1e3, 1)}
    # Attention and MLP each have an input of their own: two reads.
    moved = 2 * TOKENS * HIDDEN * 2
    return [
        record("predictors of a layer", shape, ours, "plain torch", theirs) | rate,
        share("predictors of a layer, input read", shape, moved, ours, bandwidth),
    ]
