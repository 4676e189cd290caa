"""The layers of a decoder on a packed batch: every sub-block works on the rows that it keeps.

The residual [T, H] is one buffer that is updated in place (docs/design/models.md), so the functions
below take it and hand it on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from lemo import ops
from lemo.models.architectures import Architecture
from lemo.models.batch import Batch
from lemo.models.execution import execution_of
from lemo.models.left_out import LeftOutRows
from lemo.models.sharded import check_whole, run_inside
from lemo.models.sub_blocks import MLP, Attention
from lemo.models.unit import Unit
from lemo.packing.blocks import Selection
from lemo.selection.scorers import Scorer
from lemo.selection.selector import Selector

__all__ = ["Decoded", "Decoder"]


class Decoded(NamedTuple):
    """What the layers made of a batch.

    Attributes:
        residual: [R, H] behind the last layer.
        rows: [R] int32, ascending, which of the batch's rows these are; None: all T.
    """

    residual: Tensor
    rows: Tensor | None


@dataclass
class _Pass:
    """A pass through the layers.

    Attributes:
        batch: what the rows of the residual are.
        drop: whether rows that no sub-block keeps may be dropped.
        rows: [R] int32, those that were not; None: all are there.
    """

    batch: Batch
    drop: bool
    rows: Tensor | None = None


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
        drop: bool = False,
    ) -> Decoded:
        """Adds all layers to the residual [T, H] in place.

        Args:
            batch: what the rows are.
            residual: the embedded tokens; overwritten.
            labelled: [T] bool, rows that have a label; None: nothing is known of labels.
            visit_residual: gets a differentiable copy of the residual at the entry of every layer.
            drop: whether rows that no sub-block keeps may be dropped at once, if it can be known.
        """
        batch = replace(batch, labelled=labelled)
        self._selector.begin(batch.layout, labelled)
        drop = drop and self._visible_keys == "kept" and self._selector.has_one_set
        now = _Pass(batch, drop)
        for index in range(self._architecture.num_layers):
            if visit_residual is not None:
                residual, entry = ops.residual_gather(residual)
                visit_residual(entry)
            layer = self._architecture.layer(index)
            residual = run_inside(layer, partial(self._layer, index, now), residual)
        return Decoded(residual, now.rows)

    def _layer(self, index: int, now: _Pass, residual: Tensor) -> Tensor:
        layer = self._architecture.layer(index)
        check_whole(layer, f"layer {index}")
        kept = self._select(index, "attention", now.batch, residual)
        if now.drop and index == 0 and kept.rows is not None:
            now.rows = kept.rows
            residual = ops.residual_gather(residual, kept.rows)[1]
            now.batch = now.batch.of_rows(kept.rows)
        execution = execution_of(layer, self._recompute)
        batch, dropped = now.batch, now.rows is not None
        if dropped:
            kept = kept.of_kept_rows()
        attention = self._attention(index, batch, kept)
        if execution.joins and self._selector.mlp_shares and attention.keys is kept:
            mlp = self._mlp(index, self._of_mlp(index, batch, residual, dropped))
            return execution.run(residual, self._unit(index, batch, attention, mlp))
        residual = execution.run(residual, self._unit(index, batch, attention, None))
        mlp = self._mlp(index, self._of_mlp(index, batch, residual, dropped))
        return execution.run(residual, self._unit(index, batch, None, mlp))

    def _select(self, index: int, kind: str, batch: Batch, residual: Tensor) -> Selection:
        def score() -> Tensor:
            return self._scorer(index, kind, residual.detach(), batch)

        return self._selector.select(index, kind, score)

    def _of_mlp(self, index: int, batch: Batch, residual: Tensor, dropped: bool) -> Selection:
        kept = self._select(index, "mlp", batch, residual)
        return kept.of_kept_rows() if dropped else kept

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
