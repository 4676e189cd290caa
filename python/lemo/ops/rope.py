"""rope: rotary embedding of heads with the original positions of their rows."""

import torch
from torch import Tensor

from lemo.ops.call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::rope")
def _(x, cos, sin, rows, transposed):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, cos, sin, rows, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin, rows)


def _backward(ctx, dy):
    # The transposed map is this op again, and so differentiable, too.
    return call(_ops.rope, dy, *ctx.saved_tensors, not ctx.transposed), None, None, None, None


torch.library.register_autograd("lemo::rope", _backward, setup_context=_setup_context)


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """Rotates the two halves of every head (RoFormer, arXiv 2104.09864; the half-split layout).

    `(x1, x2) -> (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2)`, in fp32 and rounded once. The tables are
    those of the whole batch; `rows` picks the ones of kept rows, so no table is gathered. Backward
    keeps the tables and the index, nothing of the size of `x`.

    Args:
        x: [R, heads, D] float, D even.
        cos, sin: [P, D] float tables, both of one dtype, which may differ from x's; no gradient
            flows into them.
        rows: [R] int32, the row of the tables for each row of `x`; None: P == R, row by row.
        transposed: the transposed map, which is what backward computes.

    Returns:
        [R, heads, D] of x's dtype. Differentiable in `x`.

    Raises:
        ValueError, TypeError: a shape, dtype, device or row index does not fit.
    """
    return call(_ops.rope, x, cos, sin, rows, transposed)
