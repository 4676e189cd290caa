"""The layers of a decoder on a packed batch: every sub-block works on the rows that it keeps.

The residual [T, H] is one buffer that is updated in place (docs/design/models.md), so the functions
below take it and hand it on.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lemo import ops
from lemo.models.architectures import Architecture
from lemo.models.batch import Batch
from lemo.models.execution import execution_of
from lemo.models.left_out import LeftOutRows
from lemo.models.sub_blocks import MLP, Attention
from lemo.models.unit import Unit
from lemo.packing.blocks import Selection
from lemo.selection.scorers import Scorer
from lemo.selection.selector import Selector

__all__ = ["Decoder"]


class Decoder:
    """Runs the layers of a model with token elimination.

    Args:
        architecture: access to the model.
        selector: decides what each sub-block keeps.
        scorer: where block scores come from.
        visible_keys: as in `LemoConfig`.
        group_size: tokens of a shifted attention group; 0: no groups.
        recompute: as in `LemoConfig`.
    """

    def __init__(
        self,
        architecture: Architecture,
        selector: Selector,
        scorer: Scorer,
        visible_keys: str = "kept",
        group_size: int = 0,
        recompute: str = "auto",
    ) -> None:
        self._architecture = architecture
        self._selector = selector
        self._scorer = scorer
        self._visible_keys = visible_keys
        self._group_size = group_size
        self._recompute = recompute

    def run(
        self,
        batch: Batch,
        residual: Tensor,
        labelled: Tensor | None = None,
        visit_residual: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Adds all layers to the residual [T, H] in place and returns it.

        Args:
            batch: what the rows are.
            residual: the embedded tokens; overwritten.
            labelled: [T] bool, rows that have a label; None: nothing is known of labels.
            visit_residual: gets a differentiable copy of the residual at the entry of every layer.
        """
        batch = replace(batch, labelled=labelled)
        self._selector.begin(batch.layout, labelled)
        for index in range(self._architecture.num_layers):
            if visit_residual is not None:
                residual, entry = ops.residual_gather(residual)
                visit_residual(entry)
            residual = self._layer(index, batch, residual)
        return residual

    def _layer(self, index: int, batch: Batch, residual: Tensor) -> Tensor:
        execution = execution_of(self._architecture.layer(index), self._recompute)
        kept = self._select(index, "attention", batch, residual)
        attention = self._attention(index, batch, kept)
        if execution.joins and self._selector.mlp_shares and attention.keys is kept:
            mlp = self._mlp(index, self._select(index, "mlp", batch, residual))
            return execution.run(residual, self._unit(index, batch, attention, mlp))
        residual = execution.run(residual, self._unit(index, batch, attention, None))
        mlp = self._mlp(index, self._select(index, "mlp", batch, residual))
        return execution.run(residual, self._unit(index, batch, None, mlp))

    def _select(self, index: int, kind: str, batch: Batch, residual: Tensor) -> Selection:
        def score() -> Tensor:
            return self._scorer(index, kind, residual.detach(), batch)

        return self._selector.select(index, kind, score)

    def _attention(self, index: int, batch: Batch, kept: Selection) -> Attention:
        keys = kept
        if kept.rows is not None and self._visible_keys == "all":
            keys = Selection.everything(kept.layout)
        return Attention(self._architecture, index, batch, kept, keys, self._group_size)

    def _mlp(self, index: int, kept: Selection) -> MLP:
        return MLP(self._architecture, index, kept)

    def _unit(self, index: int, batch: Batch, attention: Attention | None, mlp: MLP | None) -> Unit:
        left_out = LeftOutRows(None, None)
        if self._visible_keys == "computed":
            rows = [
                None if sub_block is None else self._left_out(sub_block.kept)
                for sub_block in (attention, mlp)
            ]
            left_out = LeftOutRows(
                None if rows[0] is None else self._attention(index, batch, rows[0]),
                None if rows[1] is None else self._mlp(index, rows[1]),
            )
        return Unit(attention, mlp, left_out)

    def _left_out(self, kept: Selection) -> Selection | None:
        return None if kept.rows is None else self._selector.left_out(kept)
