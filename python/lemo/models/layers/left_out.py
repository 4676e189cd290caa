"""Rows that are left out of training, computed without gradients for the rows that are kept.

With `visible_keys="computed"` a layer computes all rows of the residual. Of those that it leaves
out nothing is stored but their keys and values, which the kept rows attend to; backward is for kept
rows only. (Backward for some tokens of a whole forward pass is TokenTune's idea, arXiv 2501.18824.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lemo.models.layers.sub_blocks import MLP, Attention, Heads
from lemo.models.projections.rows import add_in_chunks, add_rows, gather_rows
from lemo.ops.autograd import first_order_only
from lemo.packing.blocks import Selection

__all__ = ["LeftOutRows"]


class LeftOutRows:
    """The rows of one layer, or of one of its sub-blocks, that are left out and computed.

    In this order: `begin`, the attention of the kept rows (which calls `merge`), `finish`. Nothing
    here has a graph but `merge`, which backward may call again with what `begin` returned.
    """

    def __init__(self, attention: Attention | None, mlp: MLP | None) -> None:
        """Takes the sub-blocks, on the rows that they leave out.

        Args:
            attention, mlp: None: no rows of this sub-block are computed.
        """
        self._attention, self._mlp = attention, mlp
        self._heads: Heads | None = None

    def begin(self, residual: Tensor) -> tuple[Tensor, ...]:
        """Keys and values, [T - R, Hk, D] each, of rows that attention leaves out, if any."""
        if self._attention is None:
            return ()
        with _without_graph(residual):
            rows = gather_rows(residual, self._attention.kept.rows)
            self._heads = self._attention.project(self._attention.normalize(rows))
        return self._heads.k, self._heads.v

    def merge(self, heads: Heads, kept: Selection, left_out: tuple[Tensor, ...]) -> Heads:
        """Heads with keys and values of all rows, [T, Hk, D] each, in the place of kept rows'.

        Differentiable in the keys and values of the kept rows.

        Args:
            heads: of the kept rows.
            kept: the kept rows.
            left_out: what `begin` returned.
        """
        assert self._attention is not None
        rows = kept.rows, self._attention.kept.rows
        k, v = (_Merge.apply(*pair, *rows) for pair in zip((heads.k, heads.v), left_out))
        if self._heads is not None:
            self._heads = self._heads._replace(k=k.detach(), v=v.detach())
        return Heads(heads.q, k, v)

    def finish(self, residual: Tensor) -> None:
        """Adds to the residual what the sub-blocks add to the rows that they leave out."""
        if self._attention is None and self._mlp is None:
            return
        with _without_graph(residual):
            if self._attention is not None:
                assert self._heads is not None
                self._attend(residual, self._attention, self._heads)
            if self._mlp is not None:
                add_in_chunks(residual, self._mlp, self._mlp.kept.rows, self._mlp.width)

    def _attend(self, residual: Tensor, attention: Attention, heads: Heads) -> None:
        everything = Selection.everything(attention.kept.layout)
        y = attention.attend(heads, everything)
        self._heads = None
        add_rows(residual, attention.output(y), attention.kept.rows)


class _Merge(torch.autograd.Function):
    """Kept and left-out rows in one tensor; the latter have no gradient. Saves an index only."""

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, left_out: Tensor, kept_rows: Tensor, left_out_rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(kept_rows)
        # Added to zeros: torch's index_copy_ sorts the rows where it has to be deterministic.
        merged = kept.new_zeros(kept.shape[0] + left_out.shape[0], *kept.shape[1:])
        add_rows(merged.flatten(1), kept.flatten(1), kept_rows)
        add_rows(merged.flatten(1), left_out.flatten(1), left_out_rows)
        return merged

    @staticmethod
    @first_order_only('visible_keys="computed"')
    def backward(ctx: Any, dmerged: Tensor) -> tuple[Tensor, None, None, None]:
        (kept_rows,) = ctx.saved_tensors
        dkept = gather_rows(dmerged.flatten(1), kept_rows)
        return dkept.unflatten(1, dmerged.shape[1:]), None, None, None


@contextmanager
def _without_graph(x: Tensor) -> Iterator[None]:
    """No gradients, and no cache of autocast: what is cast here has no graph."""
    device = x.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with (
        torch.no_grad(),
        torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False),
    ):
        yield
