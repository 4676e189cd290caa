"""select_norm: RMSNorm or LayerNorm of selected rows, alone or on the residual."""

import torch
from torch import Tensor

from lemo.ops.autograd import first_order_only, hand_on, overwritable
from lemo.ops.call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::select_norm")
def _(x, rows, weight, bias, eps, kind, save_rows):
    hidden = x.shape[1]
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    return (
        x.new_empty((num_rows, hidden)),
        x.new_empty((num_rows if save_rows else 0, hidden)),
        x.new_empty(num_rows if kind == "layer" else 0, dtype=torch.float32),
        x.new_empty(num_rows, dtype=torch.float32),
    )


@torch.library.register_fake("lemo::select_norm_backward")
def _(dy, x_rows, rows, weight, mean, rstd, kind, dx, weight_grad):
    hidden = dx.shape[1]
    return (
        dx.new_empty(hidden if weight_grad else 0, dtype=torch.float32),
        dx.new_empty(hidden if weight_grad and kind == "layer" else 0, dtype=torch.float32),
    )


def _save(ctx, x, x_rows, rows, weight, bias, mean, rstd, kind):
    ctx.save_for_backward(x_rows, rows, weight, mean, rstd)
    ctx.kind = kind
    ctx.residual_shape = x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype


def _add_gradient(ctx, dy, dx):
    """Adds the gradient of the residual into `dx`; returns those of weight and bias, if wanted."""
    x_rows, rows, weight, mean, rstd = ctx.saved_tensors
    _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    dweight, dbias = call(
        _ops.select_norm_backward,
        dy,
        x_rows,
        rows,
        weight,
        mean,
        rstd,
        ctx.kind,
        dx,
        wants_weight or wants_bias,
    )
    return (
        dweight.to(weight.dtype) if wants_weight else None,
        dbias.to(ctx.bias_dtype) if wants_bias else None,
    )


class _SelectNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows, eps, kind, needs_grad):
        # Without an index the selected rows are x itself: no copy is needed to save them.
        copy_rows = needs_grad and rows is not None
        y, x_rows, mean, rstd = call(_ops.select_norm, x, rows, weight, bias, eps, kind, copy_rows)
        if needs_grad:
            _save(ctx, x, x_rows if copy_rows else x, rows, weight, bias, mean, rstd, kind)
        return y

    @staticmethod
    @first_order_only("select_norm")
    def backward(ctx, dy):
        dx = dy.new_zeros(ctx.residual_shape)
        dweight, dbias = _add_gradient(ctx, dy, dx)
        return dx if ctx.needs_input_grad[0] else None, dweight, dbias, None, None, None, None


class _ResidualSelectNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows, eps, kind, needs_grad):
        y, x_rows, mean, rstd = call(_ops.select_norm, x, rows, weight, bias, eps, kind, needs_grad)
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        if needs_grad:
            _save(ctx, x, x_rows, rows, weight, bias, mean, rstd, kind)
        return x, y

    @staticmethod
    @first_order_only("select_norm")
    def backward(ctx, dx, dy):
        dweight = dbias = None
        if dy is not None:
            dx = dy.new_zeros(ctx.residual_shape) if dx is None else overwritable(ctx, dx)
            dweight, dbias = _add_gradient(ctx, dy, dx)
            dx = hand_on(ctx, dx)
        return dx if ctx.needs_input_grad[0] else None, dweight, dbias, None, None, None, None


class _SelectNormInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_rows, weight, bias, rows, dx, eps, kind):
        y, _, mean, rstd = call(_ops.select_norm, x_rows, None, weight, bias, eps, kind, False)
        _save(ctx, dx, x_rows, rows, weight, bias, mean, rstd, kind)
        ctx.dx = dx
        return y

    @staticmethod
    @first_order_only("select_norm")
    def backward(ctx, dy):
        return None, *_add_gradient(ctx, dy, ctx.dx), None, None, None, None


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def select_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
) -> Tensor:
    """Normalises rows of `x`: `norm(x[rows]) * weight (+ bias)`, in fp32 and rounded once.

    Args:
        x: [T, H] fp32, bf16 or fp16.
        weight: [H] float, of any float dtype.
        bias: [H] float, for kind "layer" only.
        rows: [R] int32, strictly ascending; None takes every row.
        eps: added to the variance.
        kind: "rms" (RMSNorm) or "layer" (LayerNorm).

    Returns:
        y [R, H] of x's dtype. Differentiable once in `x`, `weight` and `bias`.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return _SelectNorm.apply(x, weight, bias, rows, eps, kind, _needs_grad(x, weight, bias))


def residual_select_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
) -> tuple[Tensor, Tensor]:
    """As `select_norm`, on the residual: passes `x` on and gives `(x, y)`.

    The backward pass adds the gradient of y's rows into the residual's gradient in place, so a
    layer stores its kept rows only, and the residual's gradient stays one buffer (LeMo, section
    5.2).
    A gradient that autograd shares with others is copied first.

    Args:
        x: [T, H] float, contiguous; passed through (the same storage is returned). Not a leaf that
            requires grad. It may be changed in place afterwards: the kept rows are saved as a copy.
        weight, bias, rows, eps, kind: as for `select_norm`.

    Returns:
        (x, y [R, H]).

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return _ResidualSelectNorm.apply(x, weight, bias, rows, eps, kind, _needs_grad(x, weight, bias))


def select_norm_into(
    x_rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    dx: Tensor,
    eps: float,
    kind: str,
) -> Tensor:
    """The norm of gathered rows of a residual, for a backward pass that computes it once more.

    Backward adds the gradient of `x_rows` into `dx[rows]` in place, once, and gives none to
    `x_rows` itself. The result requires a gradient only where `x_rows` or a parameter does.

    Args:
        x_rows: [R, H] float, all of its rows are normalised.
        weight, bias, eps, kind: as for `select_norm`.
        rows: [R] int32, where the rows lie in the residual; None: R == T, all of them.
        dx: [T, H] of x_rows' dtype, the gradient of the residual.

    Returns:
        y [R, H].

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return _SelectNormInto.apply(x_rows, weight, bias, rows, dx, eps, kind)
