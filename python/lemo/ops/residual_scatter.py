"""residual_scatter: x[rows] += y on the residual; gather_rows: x[rows]."""

import torch
from torch import Tensor

from lemo.ops.autograd import first_order_only, hand_on, is_owned, overwritable
from lemo.ops.call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::residual_scatter")
def _(x, y, rows):
    return None


@torch.library.register_fake("lemo::gather_rows")
def _(x, rows):
    return x.new_empty((x.shape[0] if rows is None else rows.shape[0], x.shape[1]))


class _ResidualScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, rows):
        call(_ops.residual_scatter, x, y, rows)
        ctx.mark_dirty(x)
        ctx.rows, ctx.dtype = rows, y.dtype
        return x

    @staticmethod
    @first_order_only("residual_scatter")
    def backward(ctx, dx):
        dy = None
        if ctx.needs_input_grad[1]:
            dy = call(_ops.gather_rows, dx, ctx.rows).to(ctx.dtype)
        return hand_on(ctx, dx) if is_owned(ctx, dx) else dx, dy, None


def residual_scatter_(x: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
    """Adds `y` to `rows` of the residual in place and returns the residual.

    The backward pass hands the residual's gradient on untouched and gathers the gradient of `y`
    from it, so the residual and its gradient stay one buffer each (LeMo: fused residual padding).
    Differentiable once.

    Args:
        x: [T, H] float, contiguous, updated in place. Not a leaf that requires grad.
        y: [R, H] float, in memory of its own; may differ from `x` in dtype.
        rows: [R] int32, strictly ascending; None adds to every row.

    Raises:
        ValueError, TypeError: a shape, dtype, device or row index does not fit.
    """
    return _ResidualScatter.apply(x, y, rows)


class _ResidualGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        ctx.mark_dirty(x)
        return x, call(_ops.gather_rows, x, rows)

    @staticmethod
    @first_order_only("residual_gather")
    def backward(ctx, dx, dx_rows):
        dx = overwritable(ctx, dx)
        call(_ops.residual_scatter, dx, dx_rows, ctx.rows)
        return hand_on(ctx, dx), None


def residual_gather(x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gathers rows of the residual; backward adds into the residual's gradient in place.

    A gradient that autograd shares with others is copied first. Differentiable once.

    Args:
        x: [T, H] float, contiguous; passed through (the same storage is returned).
        rows: [R] int32, strictly ascending; None copies every row.

    Returns:
        (x, x_rows [R, H]).
    """
    return _ResidualGather.apply(x, rows)
