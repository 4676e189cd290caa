"""Which rows of a batch the residual has while the layers run, and where the others are.

All of them (`Everywhere`), the kept ones alone (`KeptAlone`), or those of this process, where a
group of processes shares them out (`SharedOut`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lemo import ops
from lemo.distributed.attention import SharedKeys, shared_attention
from lemo.distributed.context import ContextParallel
from lemo.distributed.dealing import Deal, deal
from lemo.models.layers.architectures import Architecture
from lemo.models.layers.batch import Batch
from lemo.models.layers.sub_blocks import Attention, Heads
from lemo.ops.segment_attention import SavedAttention
from lemo.packing.blocks import Selection

__all__ = ["Everywhere", "KeptAlone", "Placement", "SharedOut"]


class Placement(Protocol):
    """Where rows are.

    Attributes:
        rows: [R] int32, ascending, the batch's rows that the residual has; None: all T.
    """

    rows: Tensor | None

    def enter(self, batch: Batch, residual: Tensor) -> tuple[Batch, Tensor]:
        """The batch and the residual of these rows, from those of all rows."""

    def of(self, kept: Selection) -> Selection:
        """The kept rows among these; the same object for the same selection."""

    def left_out(self, kept: Selection, left_out: Callable[[Selection], Selection]) -> Selection:
        """The rows among these that are not in `kept`, which `of` returned."""

    def attention(
        self,
        architecture: Architecture,
        index: int,
        batch: Batch,
        kept: Selection,
        keys: Selection,
        group_size: int,
    ) -> Attention:
        """The attention of a layer on these rows; the arguments are those of `Attention`."""


class Everywhere(Placement):
    """The residual has all rows."""

    rows: Tensor | None = None

    def enter(self, batch: Batch, residual: Tensor) -> tuple[Batch, Tensor]:
        return batch, residual

    def of(self, kept: Selection) -> Selection:
        return kept

    def left_out(self, kept: Selection, left_out: Callable[[Selection], Selection]) -> Selection:
        return left_out(kept)

    def attention(
        self,
        architecture: Architecture,
        index: int,
        batch: Batch,
        kept: Selection,
        keys: Selection,
        group_size: int,
    ) -> Attention:
        return Attention(architecture, index, batch, kept, keys, group_size)


class KeptAlone(Everywhere):
    """The residual has the kept rows alone, which all sub-blocks keep.

    Args:
        rows: [R] int32, they.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def enter(self, batch: Batch, residual: Tensor) -> tuple[Batch, Tensor]:
        assert self.rows is not None
        return batch.of_rows(self.rows), ops.residual_gather(residual, self.rows)[1]

    def of(self, kept: Selection) -> Selection:
        return kept.of_kept_rows()


class SharedOut(Placement):
    """The residual has the rows of this process; the group has one kept set for all sub-blocks.

    Kept rows and rows that are left out are dealt out each by themselves, so that every process has
    the same work of either kind.

    Args:
        context: the group.
        batch: the whole batch.
        kept: what the group keeps of it.
        left_out: what it leaves out; None: nothing, or these rows are in no residual.

    Attributes:
        keys: the kept rows of the group.
    """

    def __init__(
        self,
        context: ContextParallel,
        batch: Batch,
        kept: Selection,
        left_out: Selection | None,
    ) -> None:
        self._context = context
        positions = batch.positions if kept.positions is None else kept.positions
        of_kept, cu_kept = self._deal(kept)
        mine = of_kept.of(context.rank)
        self.keys = SharedKeys(context, of_kept, kept.cu_rows, positions)
        self._everything = self.keys
        own = self._own(kept, positions, mine, cu_kept)
        if left_out is None:
            assert own.rows is not None
            self.rows: Tensor = own.rows
            self._kept = own.of_kept_rows()
            return
        assert left_out.positions is not None
        of_left_out, cu_left_out = self._deal(left_out)
        others = self._own(left_out, left_out.positions, of_left_out.of(context.rank), cu_left_out)
        owners = torch.empty(batch.layout.num_tokens, dtype=torch.int64, device=mine.device)
        for selection, dealt in ((kept, of_kept), (left_out, of_left_out)):
            assert selection.rows is not None
            owners.index_copy_(0, selection.rows.long(), dealt.owners())
        sizes = [sum(pair) for pair in zip(of_kept.sizes, of_left_out.sizes)]
        together = Deal.by_owner(owners, sizes)
        self._everything = SharedKeys(context, together, batch.layout.cu_seqlens, batch.positions)
        self.rows = together.of(context.rank).int()
        self._kept, self._left_out = self._among(own), self._among(others)

    def enter(self, batch: Batch, residual: Tensor) -> tuple[Batch, Tensor]:
        return batch.of_rows(self.rows), ops.residual_gather(residual, self.rows)[1]

    def of(self, kept: Selection) -> Selection:
        return self._kept

    def left_out(self, kept: Selection, left_out: Callable[[Selection], Selection]) -> Selection:
        return self._left_out

    def attention(
        self,
        architecture: Architecture,
        index: int,
        batch: Batch,
        kept: Selection,
        keys: Selection,
        group_size: int,
    ) -> Attention:
        return _SharedAttention(architecture, index, batch, kept, self.keys, self._everything)

    def _deal(self, selection: Selection) -> tuple[Deal, Tensor]:
        context, cu_rows = self._context, selection.cu_rows
        # Of everything it is known; else a read-back for which the host waits.
        counts = (
            list(selection.layout.seqlens)
            if selection.positions is None
            else cu_rows.diff().tolist()
        )
        return deal(counts, context.size, context.rank, cu_rows.device)

    def _own(
        self, selection: Selection, positions: Tensor, mine: Tensor, cu_rows: Tensor
    ) -> Selection:
        """A selection's rows that are this process's."""
        rows = mine if selection.rows is None else selection.rows.index_select(0, mine)
        return Selection(
            selection.layout, rows.int(), positions.index_select(0, mine), cu_rows, None
        )

    def _among(self, own: Selection) -> Selection:
        """Where they are in the residual of this process."""
        assert own.rows is not None
        return replace(own, rows=torch.searchsorted(self.rows, own.rows).int())


class _SharedAttention(Attention):
    """Attention from this process's rows to those of the whole group.

    Args:
        architecture, index, batch, kept: as of `Attention`.
        of_kept: the kept rows of the group.
        everything: all rows of the group's residuals.
    """

    def __init__(
        self,
        architecture: Architecture,
        index: int,
        batch: Batch,
        kept: Selection,
        of_kept: SharedKeys,
        everything: SharedKeys,
    ) -> None:
        super().__init__(architecture, index, batch, kept)
        self._of_kept, self._everything = of_kept, everything

    def attend(
        self,
        heads: Heads,
        keys: Selection | None = None,
        attention: Callable[..., Tensor] = ops.segment_attention,
    ) -> Tensor:
        assert self.kept.positions is not None
        return shared_attention(
            *heads,
            # Those of the process are its kept rows, or with others all that it has.
            self._of_kept if keys is None else self._everything,
            self.kept.cu_rows,
            self.kept.positions,
            self._architecture.scale(self._index),
            self._architecture.window(self._index),
            saved=attention if isinstance(attention, SavedAttention) else None,
        )
