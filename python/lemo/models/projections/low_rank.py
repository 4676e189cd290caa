"""The low-rank products of LoRA pairs, forward and backward, from an input that is stored once.

Pairs that read the same rows, multiply alike and train the same of A and B are one stack, whichever
layers they are of. Their As are written below each other. One product has the rows with all of
them, and backward has one for the gradient of the As and one for that of the rows.

Where the pair has another dtype than the input, or dropout, the products need a copy of the input.
It is made a chunk of rows at a time, again in backward, and never stored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lemo.models.projections import dropout
from lemo.models.projections.adapters import Pair
from lemo.models.projections.rows import is_one_slice, part_of, slices_of
from lemo.models.projections.side_stream import SideStream

__all__ = ["LowRank", "add_product", "below_each_other", "shares", "stacks", "summed"]


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

    def operands(
        self, weights: Sequence[Tensor], uppers: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        """What the products of a stack read: (a, what to save of it, bs).

        Args:
            weights: the As.
            uppers: the Bs.
        """
        a = below_each_other(weights)
        stored: list[Tensor | None] = [*weights]
        if a.dtype != self.dtype:
            # Cast once for both passes. What is not cast is put together again in backward.
            a = a.to(self.dtype)
            stored = [a, *[None] * (len(weights) - 1)]
        return a, stored, [b.to(self.dtype) for b in uppers]

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

    def upper(self, low: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor | None:
        """scaling * low B [R, out], which a sum in `dtype` may begin with; None: it has another
        dtype.

        Args:
            low: [R, r], from `lower`.
            b: [out, r], in `dtype`.
            dtype: of the sum.
        """
        if self.dtype != dtype:
            return None
        # The first operand gives the dtype alone.
        return torch.addmm(low[:1, :1], low, b.T, beta=0, alpha=self.scaling)

    def begins_gradient(self, dtype: torch.dtype) -> bool:
        """Whether the gradient of rows in `dtype` can begin with that of this pair."""
        return self.dtype == dtype and not self.dropout

    def add_upper(self, y: Tensor, low: Tensor, b: Tensor, bias: Tensor | None) -> None:
        """y += scaling * low B + bias_scaling * bias in place.

        Args:
            y: [R, out].
            low: [R, r], from `lower`.
            b: [out, r], in `dtype`.
            bias: [out].
        """
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
        dys: Sequence[Tensor],
        x: Tensor | None,
        low: Tensor | None,
        bits: Tensor | None,
        a: Tensor,
        bs: Sequence[Tensor],
        dx: Tensor | None,
        wants_x: bool,
        side: SideStream,
    ) -> tuple[Sequence[Tensor], list[Tensor], Tensor | None]:
        """Gradients of each of the As and of `bs` if wanted, and the input's, added to `dx`.

        Args:
            dys: [R, out] each, the gradients of the results of the pairs of a stack.
            x: [R, in]; None: the gradient of `a` is not wanted.
            low: [R, r], of all pairs side by side; None: those of `bs` are not wanted.
            bits: of the mask.
            a: [r, in], of all pairs below each other, in `dtype`.
            bs: [out, their share of r] each, in `dtype`.
            dx: [R, in], overwritten; None: it is not wanted, or begins here (`begins_gradient`).
            wants_x: whether the input's gradient is wanted.
            side: where gradients of weights may be computed.
        """
        columns, dtype = a.shape[1], self.dtype
        if bits is None and dys[0].dtype == dtype and (x is None or x.dtype == dtype):
            da, dbs, dx = _of_rows(dys, x, low, None, a, bs, dx, wants_x, self.scaling, side)
            return () if da is None else shares(da, bs, 0), dbs, dx
        da, dbs = None, []
        for part in slices_of(dys[0].shape[0], max(columns, *(b.shape[0] for b in bs))):
            mask = None if bits is None else dropout.unpack(part_of(bits, part), columns)
            da_rows, dbs_rows, _ = _of_rows(
                [part_of(dy, part) for dy in dys],
                None if x is None else part_of(x, part),
                None if low is None else part_of(low, part),
                mask,
                a,
                bs,
                None if dx is None else part_of(dx, part),
                wants_x,
                self.scaling,
                # What a chunk needs is freed behind it.
                SideStream(),
            )
            if da_rows is not None:
                da = summed(da, da_rows)
            dbs = list(map(summed, dbs, dbs_rows)) if dbs else dbs_rows
        return () if da is None else shares(da, bs, 0), dbs, dx

    def bias_gradient(self, dy: Tensor) -> Tensor:
        """[out], that of `bias`, in fp32."""
        return dy.sum(0, dtype=torch.float32).mul_(self.bias_scaling)


def stacks(products: Sequence[LowRank], wanted: Sequence[tuple[bool, bool]]) -> list[list[int]]:
    """The places of the pairs of each stack, in the order of their first ones.

    Args:
        products: of pairs that read the same rows.
        wanted: whether gradients of A, and of B, are.
    """
    found: dict[object, list[int]] = {}
    for place, (product, wants) in enumerate(zip(products, wanted, strict=True)):
        # A mask is of one pair alone.
        key = place if product.dropout else (product, wants)
        found.setdefault(key, []).append(place)
    return list(found.values())


def shares(whole: Tensor, bs: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """What belongs to each pair of a stack, along a dimension of all of their ranks.

    Args:
        whole: of the stack.
        bs: [out, their share of r] each.
        dim: the dimension.
    """
    # A view costs the host as much as many an operator.
    return (whole,) if len(bs) == 1 else whole.split([b.shape[1] for b in bs], dim)


def below_each_other(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices as one."""
    return matrices[0] if len(matrices) == 1 else torch.cat([*matrices])


def _of_rows(
    dys: Sequence[Tensor],
    x: Tensor | None,
    low: Tensor | None,
    mask: Tensor | None,
    a: Tensor,
    bs: Sequence[Tensor],
    dx: Tensor | None,
    wants_x: bool,
    scaling: float,
    side: SideStream,
) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
    lows = [None] * len(bs) if low is None else shares(low, bs, 1)
    d_lows: Sequence[Tensor | None] = [None] * len(bs)
    wants_low, d_low = x is not None or wants_x, None
    if wants_low and len(bs) > 1:
        d_low = dys[0].new_empty(dys[0].shape[0], a.shape[0], dtype=a.dtype)
        d_lows = shares(d_low, bs, 1)
    dbs: list[Tensor] = []
    for dy, b, of_low, of_d_low in zip(dys, bs, lows, d_lows, strict=True):
        dy = dy.to(b.dtype)
        if of_low is not None:
            with side.behind(dy, of_low):
                # The first operand gives the shape alone.
                dbs.append(torch.addmm(b, dy.T, of_low, beta=0, alpha=scaling))
        if of_d_low is not None:
            torch.mm(dy, b, out=of_d_low)
        elif wants_low:
            d_low = dy @ b
    if d_low is None:
        return None, dbs, dx
    da = None
    if x is not None:
        rows = (x if mask is None else dropout.masked(x, mask)).to(d_low.dtype)
        with side.behind(d_low, rows):
            da = torch.addmm(a, d_low.T, rows, beta=0, alpha=scaling)
    if wants_x:
        if dx is None:
            dx = torch.addmm(d_low[:1, :1], d_low, a, beta=0, alpha=scaling)
        elif mask is None:
            add_product(dx, d_low, a, scaling)
        else:
            dx.add_(dropout.masked(d_low @ a, mask), alpha=scaling)
    return da, dbs, dx


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
