"""The low-rank products of a LoRA pair, forward and backward, from an input that is stored once.

Where the pair has another dtype than the input, or dropout, the products need a copy of the input.
It is made a chunk of rows at a time, again in backward, and never stored.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lemo.models import dropout
from lemo.models.adapters import Pair
from lemo.models.rows import is_one_slice, part_of, slices_of

__all__ = ["LowRank", "add_product", "summed"]


class LowRank(NamedTuple):
    """How a pair multiplies: scaling * B (A (mask * x)) + bias_scaling * bias.

    Attributes:
        scaling: the pair's, by the share that dropout leaves.
        bias_scaling: the pair's.
        dropout: share of the input that becomes 0.
        dtype: of the products.
    """

    scaling: float
    bias_scaling: float
    dropout: float
    dtype: torch.dtype

    @staticmethod
    def of(pair: Pair, dtype: torch.dtype) -> "LowRank":
        """With products in `dtype`."""
        scaling = dropout.rescaled(pair.scaling, pair.dropout)
        return LowRank(scaling, pair.scaling, pair.dropout, dtype)

    def lower(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """(A (mask * x) [R, r], the mask's bits), with a new mask; without dropout no bits.

        Args:
            x: [R, in].
            a: [r, in].
        """
        a = a.to(self.dtype)
        if not self.dropout and (x.dtype == self.dtype or is_one_slice(*x.shape)):
            return x.to(self.dtype) @ a.T, None
        low, bits = x.new_empty(x.shape[0], a.shape[0], dtype=self.dtype), None
        if self.dropout:
            width = dropout.packed_width(x.shape[1])
            bits = x.new_empty(x.shape[0], width, dtype=torch.uint8)
        for part in slices_of(*x.shape):
            rows = part_of(x, part)
            if bits is not None:
                mask = dropout.draw(rows.shape, self.dropout, part_of(bits, part))
                rows = dropout.masked(rows, mask)
            torch.mm(rows.to(self.dtype), a.T, out=part_of(low, part))
        return low, bits

    def add_upper(self, y: Tensor, low: Tensor, b: Tensor, bias: Tensor | None) -> None:
        """y += scaling * low B + bias_scaling * bias in place.

        Args:
            y: [R, out].
            low: [R, r], from `lower`.
            b: [out, r].
            bias: [out].
        """
        b = b.to(self.dtype)
        if y.dtype == self.dtype:
            y.addmm_(low, b.T, alpha=self.scaling)
            if bias is not None:
                y.add_(bias, alpha=self.bias_scaling)
            return
        for part in slices_of(*y.shape):
            rows = part_of(y, part)
            if bias is None:
                add_product(rows, part_of(low, part), b.T, self.scaling)
                continue
            # Rounded to y's dtype once.
            wide = part_of(low, part) @ b.T
            wide = wide.to(torch.promote_types(y.dtype, self.dtype)).mul_(self.scaling)
            rows.add_(wide.add_(bias, alpha=self.bias_scaling))

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        low: Tensor | None,
        bits: Tensor | None,
        pair: tuple[Tensor, Tensor, Tensor | None],
        wanted: tuple[bool, bool, bool],
        dx: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of `a`, `b` and `bias`, if wanted, in their dtypes; adds the input's to `dx`.

        Args:
            dy: [R, out], the gradient of the result.
            x: [R, in]; read where the gradient of `a` is wanted.
            low: [R, r]; read where that of `b` is wanted.
            bits: of the mask.
            pair: a, b and bias.
            wanted: which of their gradients.
            dx: [R, in]; None: not wanted.
        """
        (a, b, bias), (wants_a, wants_b, wants_bias) = pair, wanted
        da, db = self._products(
            dy, x if wants_a else None, low if wants_b else None, bits, a, b, dx
        )
        dbias = None
        if wants_bias and bias is not None:
            dbias = dy.sum(0, dtype=torch.float32).mul_(self.bias_scaling).to(bias.dtype)
        return (
            None if da is None else da.to(a.dtype),
            None if db is None else db.to(b.dtype),
            dbias,
        )

    def _products(
        self,
        dy: Tensor,
        x: Tensor | None,
        low: Tensor | None,
        bits: Tensor | None,
        a: Tensor,
        b: Tensor,
        dx: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of `a` and `b`; without `x` or `low` None."""
        columns, dtype = a.shape[1], self.dtype
        a, b = a.to(dtype), b.to(dtype)
        if bits is None and dy.dtype == dtype and (x is None or x.dtype == dtype):
            return _of_rows(dy, x, low, None, a, b, dx, self.scaling)
        da = db = None
        for part in slices_of(dy.shape[0], max(columns, b.shape[0])):
            mask = None if bits is None else dropout.unpack(part_of(bits, part), columns)
            da_rows, db_rows = _of_rows(
                part_of(dy, part).to(dtype),
                None if x is None else part_of(x, part),
                None if low is None else part_of(low, part),
                mask,
                a,
                b,
                None if dx is None else part_of(dx, part),
                self.scaling,
            )
            da = da_rows if da_rows is None else summed(da, da_rows)
            db = db_rows if db_rows is None else summed(db, db_rows)
        return da, db


def _of_rows(
    dy: Tensor,
    x: Tensor | None,
    low: Tensor | None,
    mask: Tensor | None,
    a: Tensor,
    b: Tensor,
    dx: Tensor | None,
    scaling: float,
) -> tuple[Tensor | None, Tensor | None]:
    # The first operand gives the shape alone.
    db = None if low is None else torch.addmm(b, dy.T, low, beta=0, alpha=scaling)
    if x is None and dx is None:
        return None, db
    d_low = dy @ b
    da = None
    if x is not None:
        rows = (x if mask is None else dropout.masked(x, mask)).to(dy.dtype)
        da = torch.addmm(a, d_low.T, rows, beta=0, alpha=scaling)
    if dx is not None:
        if mask is None:
            add_product(dx, d_low, a, scaling)
        else:
            dx.add_(dropout.masked(d_low @ a, mask), alpha=scaling)
    return da, db


def add_product(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """y += scaling * left @ right in place, rounded once to y's dtype.

    Args:
        y: [R, C].
        left, right: [R, r] and [r, C], of one dtype.
        scaling: of the product.
    """
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=scaling)
    else:
        # In the wider of both dtypes.
        y.add_(left @ right, alpha=scaling)


def summed(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum of a chunk and those before it, in fp32 or wider if there is more than one."""
    if total is None:
        return part
    return total.to(torch.promote_types(total.dtype, torch.float32)) + part
