"""What the layers kept in a forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lemo.packing.blocks import BlockLayout, Selection

__all__ = ["LayerStatistics", "blocks_of", "kept_map"]


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer kept in a forward pass.

    Attributes:
        layer: index of the layer.
        tokens: T, packed tokens of the batch.
        attention_rows, mlp_rows: rows that each sub-block kept.
        attention_blocks, mlp_blocks: int32 indices of the kept blocks, or None for all.
        layout: how the tokens were cut into blocks.
    """

    layer: int
    tokens: int
    attention_rows: int
    mlp_rows: int
    attention_blocks: Tensor | None
    mlp_blocks: Tensor | None
    layout: BlockLayout = field(repr=False)

    @classmethod
    def of(cls, layer: int, attention: Selection, mlp: Selection) -> "LayerStatistics":
        """Of what the two sub-blocks of a layer kept."""
        return cls(
            layer=layer,
            tokens=attention.layout.num_tokens,
            attention_rows=attention.num_rows,
            mlp_rows=mlp.num_rows,
            attention_blocks=attention.kept_blocks,
            mlp_blocks=mlp.kept_blocks,
            layout=attention.layout,
        )

    @property
    def eliminated(self) -> bool:
        """Whether either sub-block left rows out."""
        return min(self.attention_rows, self.mlp_rows) < self.tokens


def blocks_of(statistics: Sequence[LayerStatistics]) -> dict[int, Tensor]:
    """The indices of kept blocks, each tensor once, by its id."""
    pairs = ((layer.attention_blocks, layer.mlp_blocks) for layer in statistics)
    return {id(kept): kept for pair in pairs for kept in pair if kept is not None}


def kept_map(statistics: Sequence[LayerStatistics], blocks: Mapping[int, Tensor]) -> dict[str, Any]:
    """The blocks of the first sequence that each sub-block kept.

    Args:
        statistics: of all layers in one forward pass.
        blocks: copies on the host of what `blocks_of` gives.

    Returns:
        {"block_size", "tokens", "layers": [{"attention": [...], "mlp": [...]}]}.
    """
    layout = statistics[0].layout
    count = layout.block_counts[0]
    read = {name: [n for n in kept.tolist() if n < count] for name, kept in blocks.items()}

    def first_sequence(kept: Tensor | None) -> list[int]:
        return list(range(count)) if kept is None else read[id(kept)]

    return {
        "block_size": layout.block_size,
        "tokens": layout.seqlens[0],
        "layers": [
            {
                "attention": first_sequence(layer.attention_blocks),
                "mlp": first_sequence(layer.mlp_blocks),
            }
            for layer in statistics
        ],
    }
