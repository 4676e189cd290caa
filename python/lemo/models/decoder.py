"""The layers of a decoder on a packed batch: every sub-block reads and writes its kept rows only.

The residual stream `x` [T, H] is one buffer that is updated in place (docs/DESIGN.md, section 3,
"The gradient stream"), so the functions below take the stream and hand it on.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lemo import ops
from lemo.models.architectures import Architecture
from lemo.models.left_out import Context
from lemo.models.recompute import Unit, is_plain_checkpoint, recomputed
from lemo.packing.batch import PackedBatch
from lemo.packing.blocks import Selection
from lemo.selection.scorers import Scorer
from lemo.selection.selector import Selector

__all__ = ["Decoder"]


class Decoder:
    """Runs the layers of an adapted model with token elimination.

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
        self.architecture = architecture
        self.selector = selector
        self._scorer = scorer
        self._visible_keys = visible_keys
        self._group_size = group_size
        self._recompute = recompute

    def run(
        self,
        batch: PackedBatch,
        x: Tensor,
        labelled: Tensor | None = None,
        visit_residual: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Adds all layers to the residual stream [T, H] in place and returns it.

        Args:
            batch: what the rows are.
            x: the embedded tokens; overwritten.
            labelled: [T] bool, rows that have a label; None: nothing is known of labels.
            visit_residual: gets a differentiable copy of the stream at the entry of every layer.
        """
        self.selector.begin(batch.layout, labelled)
        for index in range(self.architecture.num_layers):
            if visit_residual is not None:
                x, entry = ops.residual_gather(x)
                visit_residual(entry)
            x = self._layer(index, batch, x)
        return x

    def _layer(self, index: int, batch: PackedBatch, x: Tensor) -> Tensor:
        attention = self._select(index, "attention", batch, x)
        one_set = self.selector.mlp_shares and self._keys(attention) is attention
        how = self._how(index)
        if how != "none" and one_set:
            # One kept set: the layer runs on rows gathered once, and stores nothing but these.
            mlp = self._select(index, "mlp", batch, x)
            if isinstance(how, str):
                return self._recomputed(index, batch, x, how, attention, mlp)
            context = self._context(index, batch, attention, mlp)
            others = context.begin(x)
            layer = partial(self._layer_of_rows, index, batch, attention, context, others)
            x = self._checkpointed(how, layer, x, attention.rows)
            context.finish(x)
            return x
        x = self._attention(index, batch, x, attention, how)
        mlp = self._select(index, "mlp", batch, x)
        return self._mlp(index, batch, x, mlp, how)

    def _select(self, index: int, kind: str, batch: PackedBatch, x: Tensor) -> Selection:
        architecture = self.architecture
        norm = (
            architecture.attention_norm(index)
            if kind == "attention"
            else architecture.mlp_norm(index)
        )

        def score() -> Tensor:
            return self._scorer(index, kind, architecture.normalize(x.detach(), norm), batch)

        return self.selector.select(index, kind, score)

    def _keys(self, selection: Selection) -> Selection:
        """The rows that give keys and values to the queries of `selection`."""
        if selection.rows is None or self._visible_keys != "all":
            return selection
        return Selection.everything(selection.layout)

    def _context(
        self, index: int, batch: PackedBatch, attention: Selection | None, mlp: Selection | None
    ) -> Context:
        """What computes the rows that sub-blocks do not keep, if they are computed."""
        attention, mlp = (
            self.selector.left_out(kept)
            if self._visible_keys == "computed" and kept is not None and kept.rows is not None
            else None
            for kept in (attention, mlp)
        )
        return Context(self.architecture, index, batch, attention, mlp, self._group_size)

    def _how(self, index: int) -> str | Callable:
        """How a layer is computed again in backward: a mode of lemo, or a function of the user."""
        layer = self.architecture.layer(index)
        if not (layer.training and torch.is_grad_enabled()):
            return "none"
        mode: str | Callable = self._recompute
        if mode == "auto":
            mode = "none"
            if layer.gradient_checkpointing:
                function = layer._gradient_checkpointing_func
                mode = "layer" if is_plain_checkpoint(function) else function
        if mode in ("layer", "selective") and any(p._backward_hooks for p in layer.parameters()):
            # Their hooks would see the gradients of the unit's inside, too.
            return partial(checkpoint, use_reentrant=False)
        return mode

    def _recomputed(
        self,
        index: int,
        batch: PackedBatch,
        x: Tensor,
        mode: str,
        attention: Selection | None,
        mlp: Selection | None,
    ) -> Tensor:
        """One or both sub-blocks on the stream, computed again in backward."""
        architecture = self.architecture
        attend = of_rows = None
        context = self._context(index, batch, attention, mlp)
        written = attention if mlp is None else mlp
        read = written
        if attention is not None:
            read = self._keys(attention)
            norm = architecture.attention_norm(index)
            attend = partial(
                self._attend, index, batch, attention, read, norm=norm, context=context
            )
        if mlp is not None:
            of_rows = partial(self._mlp_of_rows, index)
        unit = Unit(
            attend,
            of_rows,
            written.rows,
            read.rows,
            context,
            architecture.mlp_width,
            mode == "selective",
        )
        parameters = [p for p in architecture.layer(index).parameters() if p.requires_grad]
        return recomputed(x, unit, parameters)

    @staticmethod
    def _checkpointed(
        checkpoint: Callable, function: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor | None
    ) -> Tensor:
        """x[rows] += function(x[rows]); backward recomputes `function` from the gathered rows."""
        x, x_rows = ops.residual_gather(x, rows)
        return ops.residual_scatter_(x, checkpoint(function, x_rows), rows)

    def _attention(
        self,
        index: int,
        batch: PackedBatch,
        x: Tensor,
        selection: Selection,
        how: str | Callable,
    ) -> Tensor:
        if how in ("layer", "selective"):
            return self._recomputed(index, batch, x, how, selection, None)
        norm = self.architecture.attention_norm(index)
        keys = self._keys(selection)
        context = self._context(index, batch, selection, None)
        others = context.begin(x)
        attend = partial(
            self._attend, index, batch, selection, keys, context=context, others=others
        )
        if how == "none":
            x, xs = self.architecture.residual_norm(x, norm, keys.rows)
            y = attend(xs)
        else:
            x, x_rows = ops.residual_gather(x, keys.rows)
            y = how(partial(attend, norm=norm), x_rows)
        x = ops.residual_scatter_(x, y, selection.rows)
        context.finish(x)
        return x

    def _mlp(
        self, index: int, batch: PackedBatch, x: Tensor, selection: Selection, how: str | Callable
    ) -> Tensor:
        if how in ("layer", "selective"):
            return self._recomputed(index, batch, x, how, None, selection)
        if how == "none":
            x, xs = self.architecture.residual_norm(
                x, self.architecture.mlp_norm(index), selection.rows
            )
            x = ops.residual_scatter_(x, self.architecture.mlp(index, xs), selection.rows)
        else:
            x = self._checkpointed(how, partial(self._mlp_of_rows, index), x, selection.rows)
        self._context(index, batch, None, selection).finish(x)
        return x

    def _layer_of_rows(
        self,
        index: int,
        batch: PackedBatch,
        selection: Selection,
        context: Context,
        others: tuple[Tensor, ...],
        x_rows: Tensor,
    ) -> Tensor:
        """What both sub-blocks together add to gathered rows of the stream."""
        attended = self._attend(
            index,
            batch,
            selection,
            selection,
            x_rows,
            norm=self.architecture.attention_norm(index),
            context=context,
            others=others,
        )
        return attended + self._mlp_of_rows(index, x_rows + attended)

    def _mlp_of_rows(
        self,
        index: int,
        x_rows: Tensor,
        values: bool = True,
        into: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """What the MLP adds to gathered rows; `values` and `into` as for `_attend`."""
        normalized = self.architecture.normalize(x_rows, self.architecture.mlp_norm(index), into)
        return self.architecture.mlp(index, normalized, values)

    def _attend(
        self,
        index: int,
        batch: PackedBatch,
        selection: Selection,
        keys: Selection,
        xs: Tensor,
        norm: nn.Module | None = None,
        attention: Callable[..., Tensor] = ops.segment_attention,
        values: bool = True,
        into: tuple[Tensor, Tensor | None] | None = None,
        context: Context | None = None,
        others: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """What attention adds to the kept rows, [R, H].

        Args:
            selection: the rows that ask.
            keys: the rows that answer: `selection` itself, or everything.
            xs: [Rk, H], the rows of `keys`.
            norm: normalizes `xs` first; None: `xs` is normalized already.
            attention: takes the place of `ops.segment_attention`.
            values: False where only gradients of the result count.
            into: where the norm may put the gradient of `xs`; see `Architecture.normalize`.
            context: merges keys and values of the rows that are not kept, `others`, with these.
        """
        architecture, shared = self.architecture, keys is selection
        if norm is not None:
            xs = architecture.normalize(xs, norm, into)
        xq = xs if shared else xs.index_select(0, selection.rows)
        q = batch.rotate(architecture.queries(index, xq), selection)
        k = batch.rotate(architecture.keys(index, xs), keys)
        v = architecture.values(index, xs)
        # Under autocast a norm of the heads (Qwen3) gives its weight's dtype.
        q, k = q.to(v.dtype), k.to(v.dtype)
        k_rows, k_positions = keys.cu_rows, selection.positions if shared else batch.positions
        if others:
            k, v = context.merge(k, v, selection, others)
            k_rows, k_positions = selection.layout.cu_seqlens, batch.positions
        heads = attention(
            q,
            k,
            v,
            selection.cu_rows,
            k_rows,
            selection.positions,
            k_positions,
            scale=architecture.scale(index),
            window=architecture.window(index),
            group_size=self._group_size,
        )
        return architecture.attention_output(index, heads, values)
