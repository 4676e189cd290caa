"""Masks of dropout, stored as one bit for each element.

Masks are drawn from torch's default generator of their device, by the one call that a CUDA graph
can capture, too; whoever restores its state gets the same mask again. On the CPU the masks are
those of `torch.nn.functional.dropout`.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["draw", "masked", "packed_width", "rescaled", "unpack"]

# Eight bytes of 0 or 1 are a number of 64 bits. Times the first constant, its highest byte has
# bit i set where byte i is 1, and no carry reaches it.
_GATHER = 0x0102040810204080
# A byte times the second constant is that byte eight times; the third keeps bit i of byte i.
_REPEAT = 0x0101010101010101
_BITS = 0x8040201008040201 - (1 << 64)


def packed_width(columns: int) -> int:
    """Bytes for a row of a mask."""
    return -(-columns // 8)


def draw(shape: torch.Size, dropout: float, out: Tensor) -> Tensor:
    """A new mask, [rows, columns] uint8: 0 with probability `dropout`, each by itself, else 1.

    Args:
        shape: rows, columns.
        dropout: a share.
        out: [rows, packed_width(columns)] uint8, gets the mask's bits.
    """
    mask = torch.empty(shape, dtype=torch.bool, device=out.device).bernoulli_(1 - dropout)
    words = pad(mask, (0, -shape[1] % 8)) if shape[1] % 8 else mask
    out.copy_((words.view(torch.int64) * _GATHER) >> 56)
    return mask.view(torch.uint8)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """[rows, columns] uint8, the mask that `draw` packed into `bits`."""
    words = (bits.to(torch.int64) * _REPEAT) & _BITS
    return (words.view(torch.uint8)[:, :columns] != 0).view(torch.uint8)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x [rows, columns] where the mask is 1, else 0."""
    # On the CPU twice as fast as with a mask of bool, or of another dtype than x.
    return x * mask.to(x.dtype)


def rescaled(scaling: float, dropout: float) -> float:
    """What products of masked rows are multiplied with: `scaling`, by the share that is left."""
    return 0.0 if dropout == 1 else scaling / (1 - dropout)
