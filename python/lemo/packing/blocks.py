"""How packed tokens are cut into sequences and blocks, and which rows a sub-block keeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lemo import _C
from lemo.packing.to_device import index_tensors


@dataclass(frozen=True)
class BlockLayout:
    """T packed tokens, cut into N sequences and B blocks; a sequence's last block may be ragged.

    Attributes:
        seqlens: tokens of each sequence.
        block_size: tokens of a full block.
        block_starts: [B+1] int32, first row of every block; the last entry is T.
        cu_blocks: [N+1] int32, first block of every sequence.
        cu_seqlens: [N+1] int32, first row of every sequence.
    """

    seqlens: tuple[int, ...]
    block_size: int
    block_starts: Tensor
    cu_blocks: Tensor
    cu_seqlens: Tensor

    @classmethod
    def from_seqlens(
        cls, seqlens: Sequence[int], block_size: int, device: torch.device | str | None = None
    ) -> "BlockLayout":
        """Cuts sequences into blocks.

        Args:
            seqlens: tokens of each sequence.
            block_size: tokens of a block.
            device: where the tensors go; None: torch's default device.

        Raises:
            ValueError: a negative length, or a `block_size` below 1.
        """
        starts, cuts = _C.plan_blocks(list(seqlens), block_size)
        rows = [starts[block] for block in cuts]
        return cls(tuple(seqlens), block_size, *index_tensors(device, starts, cuts, rows))

    @property
    def num_tokens(self) -> int:
        """T, the tokens of all sequences."""
        return sum(self.seqlens)

    @property
    def num_blocks(self) -> int:
        """B, the blocks of all sequences."""
        return self.block_starts.numel() - 1

    @property
    def block_counts(self) -> list[int]:
        """Blocks of each sequence."""
        return [-(-seqlen // self.block_size) for seqlen in self.seqlens]

    def blocks_with(self, rows: Tensor) -> Tensor:
        """[B] bool, the blocks of which one row or more is set in `rows`, [T] bool."""
        before = pad(rows.cumsum(0, dtype=torch.int32), (1, 0))
        return before.index_select(0, self.block_starts).diff() > 0


@dataclass(frozen=True)
class Selection:
    """The rows that one sub-block keeps.

    `rows`, `positions` and `kept_blocks` are None when it keeps everything. `rows` alone is None
    where the residual has only the kept rows.

    Attributes:
        layout: the layout that was selected from.
        rows: [R] int32, ascending packed rows.
        positions: [R] int32, position of each row in its own sequence.
        cu_rows: [N+1] int32, packed cu_seqlens of the kept rows.
        kept_blocks: [K] int32, ascending.
    """

    layout: BlockLayout
    rows: Tensor | None
    positions: Tensor | None
    cu_rows: Tensor
    kept_blocks: Tensor | None

    @classmethod
    def everything(cls, layout: BlockLayout) -> "Selection":
        """All rows of a layout."""
        return cls(layout, None, None, layout.cu_seqlens, None)

    def of_kept_rows(self) -> "Selection":
        """Everything of a residual that has the kept rows alone, which stay where they were."""
        return replace(self, rows=None)

    @property
    def num_rows(self) -> int:
        """R, the rows that are kept."""
        return self.layout.num_tokens if self.positions is None else self.positions.numel()


def block_tokens(block_size: int | float, longest: int) -> int:
    """Tokens of a block, or a share of `longest`, as in `LemoConfig.block_size`; at least 1."""
    if isinstance(block_size, float):
        return max(math.ceil(block_size * longest - 1e-9), 1)
    return block_size


def kept_blocks(share: float, blocks: int) -> int:
    """Blocks that a share of `blocks` keeps: rounded up, but for a rounding error."""
    return math.ceil(share * blocks - 1e-9)
