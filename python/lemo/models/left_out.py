"""Rows that are not kept, computed without gradients: the context of the rows that are kept.

With `visible_keys="computed"` a layer computes all rows of the residual stream. Of those that are
not kept nothing is stored but their keys and values, which the kept rows attend to; backward is for
kept rows only. (Backward for some tokens of a whole forward pass is TokenTune's idea, arXiv
2501.18824.)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lemo import ops
from lemo.models.architectures import Architecture
from lemo.models.rows import add_in_chunks, add_rows, gather_rows
from lemo.ops._autograd import first_order_only
from lemo.packing.batch import PackedBatch
from lemo.packing.blocks import Selection

__all__ = ["Context"]


class Context:
    """The rows of one layer, or of one of its sub-blocks, that a kept set leaves out.

    In this order: `begin`, the attention of the kept rows (which calls `merge`), `finish`. Nothing
    here has a graph but `merge`, which backward may call again with what `begin` returned.
    """

    def __init__(
        self,
        architecture: Architecture,
        index: int,
        batch: PackedBatch,
        attention: Selection | None,
        mlp: Selection | None,
        group_size: int = 0,
    ) -> None:
        """Names the rows.

        Args:
            architecture: access to the model.
            index: the layer.
            batch: what the rows are.
            attention, mlp: the rows that each sub-block leaves out and that are to be computed;
                None: no rows.
            group_size: tokens of a shifted attention group; 0: no groups.
        """
        self._architecture, self._index, self._batch = architecture, index, batch
        self._attention, self._mlp = attention, mlp
        self._group_size = group_size
        self._queries: Tensor | None = None
        self._merged: tuple[Tensor, ...] = ()

    def begin(self, x: Tensor) -> tuple[Tensor, ...]:
        """Keys and values, [T - R, Hk, D] each, of rows that attention does not keep, if any."""
        if self._attention is None:
            return ()
        architecture, index, rest = self._architecture, self._index, self._attention
        with _without_graph(x):
            xs = architecture.normalize(
                gather_rows(x, rest.rows), architecture.attention_norm(index)
            )
            v = architecture.values(index, xs)
            k = self._batch.rotate(architecture.keys(index, xs), rest).to(v.dtype)
            self._queries = self._batch.rotate(architecture.queries(index, xs), rest).to(v.dtype)
        return k, v

    def merge(
        self, k: Tensor, v: Tensor, kept: Selection, others: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, [T, Hk, D] each; differentiable in `k` and `v`.

        Args:
            k, v: [R, Hk, D], those of the kept rows.
            kept: the rows.
            others: what `begin` returned.
        """
        rows = kept.rows, self._attention.rows
        merged = tuple(_Merge.apply(*pair, *rows) for pair in zip((k, v), others))
        if self._queries is not None:
            self._merged = tuple(tensor.detach() for tensor in merged)
        return merged

    def finish(self, x: Tensor) -> None:
        """Adds to the stream what the sub-blocks add to rows that they do not keep."""
        if self._attention is None and self._mlp is None:
            return
        with _without_graph(x):
            if self._attention is not None:
                self._attend(x)
            if self._mlp is not None:
                add_in_chunks(x, self._transform, self._mlp.rows, self._architecture.mlp_width)

    def _attend(self, x: Tensor) -> None:
        architecture, index, rest = self._architecture, self._index, self._attention
        heads = ops.segment_attention(
            self._queries,
            *self._merged,
            rest.cu_rows,
            rest.layout.cu_seqlens,
            rest.positions,
            self._batch.positions,
            scale=architecture.scale(index),
            window=architecture.window(index),
            group_size=self._group_size,
        )
        self._queries, self._merged = None, ()
        add_rows(x, architecture.attention_output(index, heads), rest.rows)

    def _transform(self, x_rows: Tensor) -> Tensor:
        normalized = self._architecture.normalize(x_rows, self._architecture.mlp_norm(self._index))
        return self._architecture.mlp(self._index, normalized)


class _Merge(torch.autograd.Function):
    """Rows of two tensors in one; the second has no gradient. Keeps the row index only."""

    @staticmethod
    def forward(ctx, own, other, rows, other_rows):
        ctx.save_for_backward(rows)
        # Added to zeros: torch's index_copy_ sorts the rows where it has to be deterministic.
        merged = own.new_zeros(own.shape[0] + other.shape[0], *own.shape[1:])
        add_rows(merged.flatten(1), own.flatten(1), rows)
        add_rows(merged.flatten(1), other.flatten(1), other_rows)
        return merged

    @staticmethod
    @first_order_only('visible_keys="computed"')
    def backward(ctx, dmerged):
        (rows,) = ctx.saved_tensors
        own = gather_rows(dmerged.flatten(1), rows)
        return own.unflatten(1, dmerged.shape[1:]), None, None, None


@contextmanager
def _without_graph(x: Tensor) -> Iterator[None]:
    """No gradients, and nothing that autocast casts here is found by what has gradients."""
    device = x.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with (
        torch.no_grad(),
        torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False),
    ):
        yield
