"""Low-rank products of bf16 rows with pairs in fp32, on tensor cores.

PEFT keeps adapters in fp32 beside a bf16 model. In fp32 their products would need a copy of the
rows, and run without tensor cores. Here every fp32 operand is the sum of two bf16 numbers, high and
low (`lemo.ops.bf16_split`): products with rows, which are bf16 themselves, then have 16 bits of the
operand and fp32 sums, as products of two such operands have. What they are added to, or come from,
has 8.

Operands of a pair have three blocks of its rank: (high, low, high) in weights, which are right
operands, and (high, high, low) in what the rows became, which are left ones. Products of both are
over all blocks; of those with rows the two blocks that differ are added up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lemo import ops
from lemo.models.projections import dropout
from lemo.models.projections.adapters import Pair
from lemo.models.projections.low_rank import shares, summed
from lemo.models.projections.rows import part_of, slices_of
from lemo.models.projections.side_stream import SideStream

__all__ = ["SplitLowRank", "takes_split"]

# Ranks are multiples of it: products read their operands 16 bytes at a time.
_MULTIPLE = 8
_BLOCKS = 3


def takes_split(pair: Pair, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a pair, whose products would be in `dtype`, multiplies rows `x` so."""
    is_apart = dtype == torch.float32 and x.dtype == torch.bfloat16
    return is_apart and pair.a.shape[0] % _MULTIPLE == 0 and _has_fp32_sums(x.device)


def _has_fp32_sums(device: torch.device) -> bool:
    """Whether PyTorch gives products of bf16 operands in fp32 there."""
    return device.type == "cuda"


class SplitLowRank(NamedTuple):
    """How a pair multiplies: scaling * B (A (mask * x)) + bias_scaling * bias. As `LowRank`, which
    says what the arguments of the methods are, with operands in three blocks.

    Attributes:
        scaling: the pair's, by the share that dropout leaves.
        bias_scaling: the pair's.
        dropout: share of the input that becomes 0.
        rank: of the pair. Those of a stack have the same.
    """

    scaling: float
    bias_scaling: float
    dropout: float
    rank: int

    @staticmethod
    def of(pair: Pair) -> "SplitLowRank":
        scaling = dropout.rescaled(pair.scaling, pair.dropout)
        return SplitLowRank(scaling, pair.scaling, pair.dropout, pair.a.shape[0])

    def operands(
        self, weights: Sequence[Tensor], uppers: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        """(a [pairs * 3 * rank, in], what to save of it, bs [out, 3 * rank] each)."""
        outs = [b.shape[0] for b in uppers]
        parts = ops.bf16_split_all([*weights, *uppers], [1] * len(weights) + outs)
        ranks = self.rank * len(weights)
        widths = [_BLOCKS * ranks * weights[0].shape[1], *(_BLOCKS * self.rank * o for o in outs)]
        a, *bs = parts.split(widths)
        a = a.view(_BLOCKS * ranks, -1)
        stored = [a, *[None] * (len(weights) - 1)]
        return a, stored, [b.view(out, -1) for b, out in zip(bs, outs)]

    def lower(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scaling * A (mask * x) [R, pairs * 3 * rank], the mask's bits)."""
        if not self.dropout:
            return self._left(_wide(x, a.T)), None
        bits = x.new_empty(x.shape[0], dropout.packed_width(x.shape[1]), dtype=torch.uint8)
        low = x.new_empty(x.shape[0], a.shape[0], dtype=torch.float32)
        for part in slices_of(*x.shape):
            rows = part_of(x, part)
            mask = dropout.draw(rows.shape, self.dropout, part_of(bits, part))
            _wide(dropout.masked(rows, mask), a.T, part_of(low, part))
        return self._left(low), bits

    def upper(self, low: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor | None:
        """scaling * low B [R, out], which a sum in `dtype` may begin with; None: it has another
        dtype."""
        return low @ b.T if low.dtype == dtype else None

    def begins_gradient(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and not self.dropout

    def add_upper(self, y: Tensor, low: Tensor, b: Tensor, bias: Tensor | None) -> None:
        """y += low B + bias_scaling * bias in place. cuBLAS rounds low B before it adds it."""
        if bias is None:
            y.addmm_(low, b.T)
            return
        for part in slices_of(*y.shape):
            wide = _wide(part_of(low, part), b.T)
            part_of(y, part).add_(wide.add_(bias, alpha=self.bias_scaling))

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
        """Gradients of each of the As and of the Bs if wanted, and the input's, added to `dx`."""
        dbs = []
        if low is not None:
            for dy, of_pair in zip(dys, shares(low, bs, 1), strict=True):
                with side.behind(dy, of_pair):
                    high, rest = _wide(dy.T, of_pair).unflatten(1, (_BLOCKS, -1))[:, 1:].unbind(1)
                    dbs.append(high + rest)
        if x is None and not wants_x:
            return (), dbs, dx
        products = dys[0].new_empty(dys[0].shape[0], a.shape[0], dtype=torch.float32)
        for dy, b, product in zip(dys, bs, shares(products, bs, 1), strict=True):
            _wide(dy, b, product)
        d_low = self._left(products)
        das: list[Tensor] = []
        if bits is None:
            if x is not None:
                with side.behind(d_low, x):
                    das += self._of_weights(d_low, x)
            if wants_x:
                dx = d_low @ a if dx is None else dx.addmm_(d_low, a)
            return das, dbs, dx
        for part in slices_of(d_low.shape[0], a.shape[1]):
            mask = dropout.unpack(part_of(bits, part), a.shape[1])
            of_rows = part_of(d_low, part)
            if x is not None:
                rows = dropout.masked(part_of(x, part), mask)
                found = self._of_weights(of_rows, rows)
                das = list(map(summed, das, found)) if das else [*found]
            if dx is not None:
                part_of(dx, part).add_(dropout.masked(_wide(of_rows, a), mask))
        return das, dbs, dx

    def bias_gradient(self, dy: Tensor) -> Tensor:
        """[out], that of `bias`, in fp32."""
        return dy.sum(0, dtype=torch.float32).mul_(self.bias_scaling)

    def _left(self, products: Tensor) -> Tensor:
        """What products with weights are, [R, pairs * 3 * rank], as a left operand."""
        blocks = products.view(-1, _BLOCKS, self.rank)
        return ops.bf16_split(blocks, self.scaling, left=True).view(products.shape)

    def _of_weights(self, d_low: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """[rank, in] of each pair."""
        blocks = _wide(d_low.T, rows).view(-1, _BLOCKS, self.rank, rows.shape[1])
        return (blocks[:, 1] + blocks[:, 2]).unbind()


def _wide(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of bf16 matrices, in fp32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)
