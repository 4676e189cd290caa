"""Rows of the residual outside autograd: gathered, added to, and cut into chunks."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lemo.ops.call import call
from lemo.packing.chunks import COPY_ELEMENTS, chunk_rows

__all__ = [
    "add_in_chunks",
    "add_rows",
    "chunks_of",
    "gather_rows",
    "is_one_slice",
    "part_of",
    "slices_of",
]


def chunks_of(residual: Tensor, rows: Tensor | None, width: int) -> Iterator[Tensor | slice]:
    """Rows of the residual in chunks: parts of the row index, or slices where `rows` is None.

    Args:
        residual: [T, H].
        rows: [R] int32; None: all T.
        width: features of the widest activation that is made of a chunk.
    """
    count = residual.shape[0] if rows is None else rows.shape[0]
    step = chunk_rows(count, width)
    # No row at all is a chunk, too: its parameters get gradients of zero, as without recomputation.
    for first in range(0, max(count, 1), step):
        part = slice(first, min(first + step, count))
        yield part if rows is None else rows[part]


def slices_of(rows: int, width: int) -> Iterator[slice]:
    """All of `rows` rows in slices, of which copies of `width` columns may be made; one or more."""
    step = max(1, COPY_ELEMENTS // max(width, 1))
    for first in range(0, max(rows, 1), step):
        yield slice(first, min(first + step, rows))


def is_one_slice(rows: int, width: int) -> bool:
    """Whether `slices_of` gives one slice."""
    return rows <= max(1, COPY_ELEMENTS // max(width, 1))


def part_of(x: Tensor, part: slice) -> Tensor:
    """x[part] of a slice with a beginning and an end: `x` itself where that is all of it."""
    # A view costs the host as much as many an operator.
    return x if part.stop - part.start == x.shape[0] else x[part]


def gather_rows(x: Tensor, rows: Tensor | slice | None, view: bool = False) -> Tensor:
    """x[rows] [R, C] as a tensor of its own; with `view`, in the memory of `x` where it can be.

    Args:
        x: [T, C].
        rows: [R] int32, or a slice; None: all T.
        view: whether the result may share memory with `x`.
    """
    if isinstance(rows, slice):
        return x[rows]
    if rows is None and view:
        return x
    return call(torch.ops.lemo.gather_rows, x, rows)


def add_rows(x: Tensor, y: Tensor, rows: Tensor | slice | None) -> None:
    """x[rows] += y in place: `x` [T, C], `y` [R, C], `rows` [R] int32 and distinct, or a slice."""
    if isinstance(rows, slice):
        x, rows = x[rows], None
    call(torch.ops.lemo.residual_scatter, x, y, rows)


def add_in_chunks(
    x: Tensor, function: Callable[[Tensor], Tensor], rows: Tensor | None, width: int
) -> None:
    """x[rows] += function(x[rows]) in place, chunk by chunk.

    Args:
        x: [T, C].
        function: [r, C] -> [r, C]; works row by row.
        rows: [R] int32; None: all T.
        width: as for `chunks_of`.
    """
    for chunk in chunks_of(x, rows, width):
        add_rows(x, function(gather_rows(x, chunk, view=True)), chunk)
