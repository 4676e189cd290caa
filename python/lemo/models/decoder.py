"""The layers of a decoder on a packed batch: every sub-block reads and writes its kept rows only.

The residual stream `x` [T, H] is one buffer that is updated in place (docs/DESIGN.md, section 3,
"The gradient stream"), so the functions below take the stream and hand it on.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lemo import ops
from lemo.layout import Selection
from lemo.models.adapters import Adapter
from lemo.models.batch import PackedBatch, apply_rotary
from lemo.scorers import Scorer
from lemo.selection import Selector

__all__ = ["Decoder"]


class Decoder:
    """Runs the layers of an adapted model with token elimination.

    Args:
        adapter: access to the model.
        selector: decides what each sub-block keeps.
        scorer: where block scores come from.
        keys_from_all_rows: rows that are not kept still serve as keys and values.
        group_size: tokens of a shifted attention group; 0: no groups.
    """

    def __init__(
        self,
        adapter: Adapter,
        selector: Selector,
        scorer: Scorer,
        keys_from_all_rows: bool = False,
        group_size: int = 0,
    ) -> None:
        self.adapter = adapter
        self.selector = selector
        self._scorer = scorer
        self._keys_from_all_rows = keys_from_all_rows
        self._group_size = group_size

    def run(
        self, batch: PackedBatch, x: Tensor, visit_stream: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Adds all layers to the residual stream [T, H] in place and returns it.

        Args:
            batch: what the rows are.
            x: the embedded tokens; overwritten.
            visit_stream: gets a differentiable copy of the stream at the entry of every layer.
        """
        self.selector.begin(batch.layout)
        for index in range(self.adapter.num_layers):
            if visit_stream is not None:
                x, entry = ops.stream_gather(x)
                visit_stream(entry)
            x = self._layer(index, batch, x)
        return x

    def _layer(self, index: int, batch: PackedBatch, x: Tensor) -> Tensor:
        attention = self._select(index, "attention", batch, x)
        checkpoint = self._checkpoint_function(index)
        one_set = self.selector.mlp_shares and self._keys(attention) is attention
        if checkpoint is not None and one_set:
            # One kept set: the layer runs on rows gathered once, and stores nothing but these.
            self._select(index, "mlp", batch, x)
            layer = partial(self._layer_of_rows, index, batch, attention)
            return self._checkpointed(checkpoint, layer, x, attention.rows)
        x = self._attention(index, batch, x, attention, checkpoint)
        mlp = self._select(index, "mlp", batch, x)
        return self._mlp(index, x, mlp, checkpoint)

    def _select(self, index: int, kind: str, batch: PackedBatch, x: Tensor) -> Selection:
        adapter = self.adapter
        norm = adapter.attention_norm(index) if kind == "attention" else adapter.mlp_norm(index)

        def score() -> Tensor:
            return self._scorer(index, kind, adapter.normalize(x.detach(), norm), batch)

        return self.selector.select(index, kind, score)

    def _keys(self, selection: Selection) -> Selection:
        """The rows that give keys and values to the queries of `selection`."""
        if selection.rows is None or not self._keys_from_all_rows:
            return selection
        return Selection.everything(selection.layout)

    def _checkpoint_function(self, index: int) -> Callable | None:
        layer = self.adapter.layer(index)
        enabled = layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
        return layer._gradient_checkpointing_func if enabled else None

    @staticmethod
    def _checkpointed(
        checkpoint: Callable, function: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor | None
    ) -> Tensor:
        """x[rows] += function(x[rows]); backward recomputes `function` from the gathered rows."""
        x, x_rows = ops.stream_gather(x, rows)
        return ops.residual_scatter_(x, checkpoint(function, x_rows), rows)

    def _attention(
        self,
        index: int,
        batch: PackedBatch,
        x: Tensor,
        selection: Selection,
        checkpoint: Callable | None,
    ) -> Tensor:
        norm = self.adapter.attention_norm(index)
        keys = self._keys(selection)
        if checkpoint is None:
            x, xs = self.adapter.stream_norm(x, norm, keys.rows)
            y = self._attend(index, batch, selection, keys, xs)
        else:
            x, x_rows = ops.stream_gather(x, keys.rows)
            attend = partial(self._attend, index, batch, selection, keys, norm=norm)
            y = checkpoint(attend, x_rows)
        return ops.residual_scatter_(x, y, selection.rows)

    def _mlp(
        self, index: int, x: Tensor, selection: Selection, checkpoint: Callable | None
    ) -> Tensor:
        if checkpoint is not None:
            mlp = partial(self._mlp_of_rows, index)
            return self._checkpointed(checkpoint, mlp, x, selection.rows)
        x, xs = self.adapter.stream_norm(x, self.adapter.mlp_norm(index), selection.rows)
        return ops.residual_scatter_(x, self.adapter.mlp(index, xs), selection.rows)

    def _layer_of_rows(
        self, index: int, batch: PackedBatch, selection: Selection, x_rows: Tensor
    ) -> Tensor:
        """What both sub-blocks together add to gathered rows of the stream."""
        norm = self.adapter.attention_norm(index)
        attended = self._attend(index, batch, selection, selection, x_rows, norm=norm)
        return attended + self._mlp_of_rows(index, x_rows + attended)

    def _mlp_of_rows(self, index: int, x_rows: Tensor) -> Tensor:
        normalized = self.adapter.normalize(x_rows, self.adapter.mlp_norm(index))
        return self.adapter.mlp(index, normalized)

    def _attend(
        self,
        index: int,
        batch: PackedBatch,
        selection: Selection,
        keys: Selection,
        xs: Tensor,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """What attention adds to the kept rows, [R, H].

        Args:
            selection: the rows that ask.
            keys: the rows that answer: `selection` itself, or everything.
            xs: [Rk, H], the rows of `keys`.
            norm: normalizes `xs` first; None: `xs` is normalized already.
        """
        adapter, shared = self.adapter, keys is selection
        if norm is not None:
            xs = adapter.normalize(xs, norm)
        xq = xs if shared else xs.index_select(0, selection.rows)
        q = apply_rotary(adapter.queries(index, xq), batch.rotary_of(selection))
        k = apply_rotary(adapter.keys(index, xs), batch.rotary_of(keys))
        v = adapter.values(index, xs)
        # Under autocast the projections give its dtype, and the fp32 rotation promotes.
        heads = ops.segment_attention(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            selection.cu_rows,
            keys.cu_rows,
            selection.positions,
            selection.positions if shared else batch.positions,
            scale=adapter.scale(index),
            window=adapter.window(index),
            group_size=self._group_size,
        )
        return adapter.attention_output(index, heads)
