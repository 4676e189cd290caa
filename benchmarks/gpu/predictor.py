"""The three predictors of a layer beside plain torch, and beside one read of their inputs."""

import torch
from torch import Tensor, relu

from gpu.bench import BLOCK, HIDDEN, TOKENS, Bench
from lemo import ops
from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import default_rank


def draw(b: Bench, hidden: int, rank: int, outputs: int) -> list[Tensor]:
    """Three maps whose mean is above 0, so that scores do not cancel to nothing."""
    sizes = ((rank, hidden, 0), (rank, rank, 1), (outputs, rank, 2))
    return [b.randn(r, columns) / columns**0.5 + gain / columns for r, columns, gain in sizes]


def plain(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Means over blocks of one predictor's outputs, as one writes it in torch."""
    down, mid, up = weights
    return (relu(relu(x @ down.T) @ mid.T) @ up.T).unflatten(0, (-1, BLOCK)).mean(1)


def plain_layer(x: Tensor, keys: list, queries: list, mlp: list) -> tuple[Tensor, Tensor]:
    query = plain(x, queries).float()
    visible_by = torch.arange(len(query), 0, -1, device=x.device)[:, None]
    visible = query.flip(0).cumsum(0).flip(0) / visible_by
    return (plain(x, keys) * visible).sum(1), plain(x, mlp)[:, 0]


def rows(b: Bench):
    tokens, hidden = b.size(TOKENS), b.size(HIDDEN)
    rank = default_rank(hidden)
    layout = BlockLayout.from_seqlens([tokens], BLOCK, device=b.device)
    x = b.randn(tokens, hidden)
    keys, queries, mlp = (draw(b, hidden, rank, outputs) for outputs in (rank, rank, 1))

    def layer() -> tuple[Tensor, Tensor]:
        return ops.predictor(x, keys, queries, layout), ops.predictor(x, mlp, None, layout)

    def in_torch() -> tuple[Tensor, Tensor]:
        return plain_layer(x, keys, queries, mlp)

    b.agree("predictor", layer(), in_torch(), bound=5e-2)
    shape = {"tokens": tokens, "hidden": hidden, "rank": rank, "block": BLOCK, "dtype": "bfloat16"}
    yield from b.compare(
        "predictors of a layer",
        shape,
        layer,
        {"plain torch": in_torch},
        # The first two maps; what is left is less than a thousandth of them.
        tera=3 * 2 * tokens * rank * (hidden + rank) / 1e12,
        # Attention and MLP each have an input of their own.
        moved=2 * tokens * hidden * 2,
        bandwidth="predictors of a layer, input read",
    )
