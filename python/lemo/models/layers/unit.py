"""What runs as one piece: attention, the MLP, or both on one kept set."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lemo import ops
from lemo.models.layers.left_out import LeftOutRows
from lemo.models.layers.sub_blocks import MLP, Attention
from lemo.packing.blocks import Selection

__all__ = ["Unit"]


@dataclass(frozen=True)
class Unit:
    """One or both sub-blocks of a layer; both only where they keep the same rows.

    Attributes:
        attention, mlp: the sub-blocks; at most one of them is None.
        left_out: the rows that they leave out, where these are computed.
        head_groups: groups of heads, at most, by which attention's backward runs where it is
            recomputed; 1: all heads at once.
    """

    attention: Attention | None
    mlp: MLP | None
    left_out: LeftOutRows
    head_groups: int = 1

    @property
    def kept_rows(self) -> Tensor | None:
        """[R] int32, the rows of the residual that the unit changes; None: all."""
        sub_block = self.mlp or self.attention
        assert sub_block is not None
        return sub_block.kept.rows

    @property
    def read_rows(self) -> Tensor | None:
        """The rows of the residual that the unit reads; with both sub-blocks the kept ones."""
        return self.kept_rows if self.attention is None else self.attention.keys.rows

    def attend(
        self,
        x: Tensor,
        left_out: tuple[Tensor, ...],
        attention: Callable[..., Tensor] = ops.segment_attention,
        values: bool = True,
    ) -> Tensor:
        """What attention adds to the kept rows, [R, H].

        Args:
            x: the normalized key rows, [Rk, H].
            left_out: what `LeftOutRows.begin` returned.
            attention: takes the place of `ops.segment_attention`.
            values: False where only gradients of the result count.
        """
        sub_block, keys = self.attention, None
        assert sub_block is not None
        heads = sub_block.project(x)
        if left_out:
            heads = self.left_out.merge(heads, sub_block.kept, left_out)
            keys = Selection.everything(sub_block.kept.layout)
        return sub_block.output(sub_block.attend(heads, keys, attention), values)
