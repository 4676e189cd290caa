"""residual_scatter and gather_rows beside torch's index_add_ and index_select."""

import torch

from gpu.bench import HIDDEN, TOKENS, Bench
from lemo import ops


def rows(b: Bench):
    tokens, hidden = b.size(TOKENS), b.size(HIDDEN)
    kept = b.half_of_the_blocks(tokens)
    index = kept.long()
    x, y = b.randn(tokens, hidden), b.randn(len(kept), hidden)
    out = torch.empty_like(y)
    gather = torch.ops.lemo.gather_rows
    added = ops.residual_scatter_(x.clone(), y, kept)
    b.agree("residual_scatter", added, x.clone().index_add_(0, index, y))
    b.agree("gather_rows", gather(x, kept), x[index], bound=0.0)
    shape = {"tokens": tokens, "rows": len(kept), "hidden": hidden, "dtype": "bfloat16"}
    row_bytes = len(kept) * hidden * 2
    yield from b.compare(
        "residual_scatter",
        shape,
        lambda: torch.ops.lemo.residual_scatter(x, y, kept),
        {"torch index_add_": lambda: x.index_add_(0, index, y)},
        moved=3 * row_bytes,
    )
    yield from b.compare(
        "gather_rows",
        shape,
        lambda: gather(x, kept),
        {"torch index_select": lambda: torch.index_select(x, 0, index, out=out)},
        moved=2 * row_bytes,
    )
