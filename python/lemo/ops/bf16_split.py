"""bf16_split, bf16_split_all: fp32 numbers as sums of two in bf16, for products on tensor cores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lemo.ops.call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::bf16_split")
def _(x, scale, left):
    return x.new_empty((x.shape[0], 3, x.shape[-1]), dtype=torch.bfloat16)


@torch.library.register_fake("lemo::bf16_split_all")
def _(xs, rows):
    return xs[0].new_empty(3 * sum(x.numel() for x in xs), dtype=torch.bfloat16)


def bf16_split(x: Tensor, scale: float = 1.0, left: bool = False) -> Tensor:
    """scale * x as the sum of two bf16 numbers, high and low, in three blocks.

    A product of a left and a right operand along blocks and columns is high * high + high * low +
    low * high in the sums of tensor cores: it keeps 16 bits of both (arXiv 1904.06376, with two
    parts).

    Args:
        x: [R, C] float32, or [R, 3, C], of which the first two blocks are added up: a product of
            other rows with a right operand, block by block.
        scale: finite, also in fp32.
        left: whether y is a product's left operand.

    Returns:
        [R, 3, C] bfloat16: (high, high, low) on the left, (high, low, high) on the right. Not
        differentiable.

    Raises:
        ValueError, TypeError: a shape, dtype or value does not fit.
    """
    return call(_ops.bf16_split, x, scale, left)


def bf16_split_all(xs: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """`bf16_split` of several matrices as right operands, in one pass and one tensor.

    Args:
        xs: float32 of any shape, at least one.
        rows: as how many rows each of them is read: x as [rows, elements / rows].

    Returns:
        [3 * elements of all] bfloat16: of each the elements of [rows, 3, elements / rows], one
        behind another. Not differentiable.

    Raises:
        ValueError, TypeError: a shape, dtype or value does not fit.
    """
    if not xs:
        raise ValueError("bf16_split_all: argument 'xs': expected at least one matrix, got none")
    return call(_ops.bf16_split_all, [*xs], [*rows])
