"""A batch on its way through the layers: packed, cut into blocks, with its rotary tables."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lemo import ops
from lemo.packing.batch import PackedBatch
from lemo.packing.blocks import BlockLayout, Selection, block_tokens

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """What the layers know of the T rows of the residual.

    Attributes:
        packed: the sequences, and the way back to [B, S].
        layout: how they are cut into blocks.
        rotary: (cos, sin), [T, D] each, of the tokens' own positions, or of the rows of the
            residual where it has not all; None without rotation.
        ids: [T] int64, the tokens; None where the model got embeddings.
        labelled: [T] bool, rows that predict a label; None: nothing is known of labels.
        scores: [T] fp32, scores of the tokens that the caller gave; None: none.
        host: (ids, labelled) on the CPU, where they are known there; None: they are not.
    """

    packed: PackedBatch
    layout: BlockLayout
    rotary: tuple[Tensor, Tensor] | None = None
    ids: Tensor | None = None
    labelled: Tensor | None = None
    scores: Tensor | None = None
    host: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, packed: PackedBatch, block_size: int | float, device: torch.device) -> "Batch":
        """Cuts a packed batch into blocks; without rotation.

        Args:
            packed: the batch.
            block_size: tokens of a block, or a share of the longest sequence.
            device: where the tokens are.
        """
        size = block_tokens(block_size, max(packed.seqlens, default=1))
        return cls(packed, BlockLayout.from_seqlens(packed.seqlens, size, device))

    def on_host(self) -> tuple[Tensor, Tensor]:
        """(ids, labelled) on the CPU; waits for a GPU where they are known there alone."""
        if self.host is not None:
            return self.host
        assert self.ids is not None
        assert self.labelled is not None
        ids, labelled = torch.stack((self.ids, self.labelled.long())).cpu()
        return ids, labelled != 0

    def of_rows(self, rows: Tensor) -> "Batch":
        """The batch whose residual has some rows alone, [R] int32; rotation needs no index then."""
        if self.rotary is None:
            return self
        cos, sin = (table.index_select(0, rows) for table in self.rotary)
        return replace(self, rotary=(cos, sin))

    @property
    def positions(self) -> Tensor:
        """[T] int32, the position of every row in its own sequence."""
        return self.packed.positions

    def rotate(
        self, x: Tensor, selection: Selection | None = None, transposed: bool = False
    ) -> Tensor:
        """Rotates heads [R, heads, D] of the rows of a selection (None: of every row).

        With `transposed` back: what gradients of rotated heads become.
        """
        if self.rotary is None:
            return x
        rows = None if selection is None else selection.rows
        return ops.rope(x, *self.rotary, rows, transposed)
