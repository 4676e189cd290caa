"""DoRA (arXiv 2402.09353) over a frozen linear layer, as one autograd node.

The layer's result, without its bias, is scaled column by column: magnitude / ||W + scaling B A||,
the norm taken as a constant (section 4.3). The gradient of the magnitudes needs the result before
it is scaled. It is computed again in backward, so the node stores what that of LoRA does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lemo.models.projections import dropout
from lemo.models.projections.adapters import Pair
from lemo.models.projections.low_rank import LowRank, add_product, summed
from lemo.models.projections.rows import slices_of
from lemo.ops.autograd import first_order_only

__all__ = ["apply_dora"]


def apply_dora(
    x: Tensor,
    matrix: Callable[[], Tensor],
    bias: Tensor | None,
    pair: Pair,
    dtype: torch.dtype,
    product_dtype: torch.dtype,
    norm_dtype: torch.dtype,
    values: bool = True,
) -> Tensor:
    """What PEFT's LoRA layer with `use_dora` gives, [R, out].

    With dropout it is, as in PEFT, W x + (s - 1) W d(x) + s scaling B A d(x), where s is the scale
    of the columns and d dropout; without, that is s (W x + scaling B A x).

    Args:
        x: [R, in].
        matrix: gives W [out, in] in `dtype`.
        bias: [out], of the layer.
        pair: with a magnitude, without a bias.
        dtype: of the products with W, and of the result.
        product_dtype: of those of the pair.
        norm_dtype: in which norms are computed.
        values: False where only the gradients of the result count.
    """
    assert pair.magnitude is not None
    columns = pair.magnitude / _norms(matrix(), pair, norm_dtype)
    product = LowRank.of(pair, product_dtype)
    return _Dora.apply(x, matrix, bias, values, product, dtype, pair.a, pair.b, columns)


@torch.no_grad()
def _norms(weight: Tensor, pair: Pair, dtype: torch.dtype) -> Tensor:
    """[out], ||W + scaling B A|| of each output, rounded where PEFT rounds."""
    norms = [
        torch.linalg.norm(
            weight[part].to(dtype) + pair.scaling * (pair.b[part] @ pair.a).to(dtype), dim=1
        )
        for part in slices_of(*weight.shape)
    ]
    return torch.cat(norms).to(dtype)


class _Dora(torch.autograd.Function):
    """All operands are in the dtype of autocast before they are multiplied, so it casts nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Callable[[], Tensor],
        bias: Tensor | None,
        values: bool,
        product: LowRank,
        dtype: torch.dtype,
        a: Tensor,
        b: Tensor,
        columns: Tensor,
    ) -> Tensor:
        cast = x.to(dtype)
        low, bits = product.lower(cast, a)
        if values:
            y = _forward(cast, matrix(), bias, product, low, bits, b, columns)
        else:
            y = cast.new_empty(1, 1).expand(x.shape[0], b.shape[0])
        ctx.matrix, ctx.product, ctx.dtype = matrix, product, dtype
        ctx.save_for_backward(x, low, bits, a, b, columns)
        return y

    @staticmethod
    @first_order_only("linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, bits, a, b, columns = ctx.saved_tensors
        product, weight = ctx.product, ctx.matrix()
        wants_x, _, wants_bias, _, _, _, wants_a, wants_b, wants_columns = ctx.needs_input_grad
        a_cast, b_cast = a.to(product.dtype), b.to(product.dtype)
        da = db = dcolumns = None
        dx = x.new_empty(x.shape) if wants_x else None
        for part in slices_of(x.shape[0], max(weight.shape)):
            dy_rows = dy[part]
            rows = x[part].to(ctx.dtype)
            mask = None if bits is None else dropout.unpack(bits[part], x.shape[1])
            if mask is not None:
                rows = dropout.masked(rows, mask)
            if wants_columns:
                inner = _inner(rows, weight, low[part], b_cast, product)
                dcolumns = summed(dcolumns, (inner * dy_rows).sum(0, dtype=torch.float32))
            d_upper = (dy_rows * columns).to(product.dtype)
            if wants_b:
                db = summed(db, d_upper.T @ low[part])
            d_low = d_upper @ b_cast
            if wants_a:
                da = summed(da, d_low.T @ rows.to(product.dtype))
            if dx is None:
                continue
            if mask is None:
                drows = (dy_rows * columns).to(ctx.dtype) @ weight
                add_product(drows, d_low, a_cast, product.scaling)
            else:
                drows = (dy_rows * (columns - 1)).to(ctx.dtype) @ weight
                drows.mul_(dropout.rescaled(1.0, product.dropout))
                add_product(drows, d_low, a_cast, product.scaling)
                drows = dropout.masked(drows, mask).add_(dy_rows @ weight)
            dx[part] = drows
        # Autograd casts gradients to the dtypes of what they are of.
        return (
            dx,
            None,
            dy.sum(0) if wants_bias else None,
            *(None, None, None),
            None if da is None else da.mul_(product.scaling),
            None if db is None else db.mul_(product.scaling),
            dcolumns,
        )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: LowRank,
    low: Tensor,
    bits: Tensor | None,
    b: Tensor,
    columns: Tensor,
) -> Tensor:
    b, y = b.to(product.dtype), linear(x, weight)
    for part in slices_of(x.shape[0], max(weight.shape)):
        if bits is None:
            # The result is rounded to y's dtype once, after its last step.
            wide = y[part].to(torch.promote_types(y.dtype, product.dtype))
            add_product(wide, low[part], b.T, product.scaling)
            wide = wide * columns
        else:
            rows = dropout.masked(x[part], dropout.unpack(bits[part], x.shape[1]))
            base = linear(rows, weight).mul_(dropout.rescaled(1.0, product.dropout))
            wide = base.to(torch.promote_types(y.dtype, product.dtype), copy=True)
            add_product(wide, low[part], b.T, product.scaling)
            wide = wide * columns - base + y[part]
        y[part] = wide if bias is None else wide + bias
    return y


def _inner(rows: Tensor, weight: Tensor, low: Tensor, b: Tensor, product: LowRank) -> Tensor:
    """What the columns scale, of rows that are masked: fp32 or wider."""
    base = linear(rows, weight)
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    if product.dropout:
        wide = wide.mul_(dropout.rescaled(1.0, product.dropout))
    add_product(wide, low, b.T, product.scaling)
    return wide
