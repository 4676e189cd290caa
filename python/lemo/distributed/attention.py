"""Attention of a process's own query rows to the key rows of all processes of its group.

Keys and values are gathered a part of the heads at a time, the next part while the queries of one
are computed. Backward gathers them again, and the gradients go back to the processes that hold the
rows, summed (reduce-scatter). So a process stores nothing of the others' rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lemo.distributed.context import ContextParallel
from lemo.distributed.dealing import Deal
from lemo.ops.autograd import first_order_only
from lemo.ops.call import call
from lemo.ops.segment_attention import SavedAttention

__all__ = ["SharedKeys", "shared_attention"]

_ops = torch.ops.lemo
# Renamed in torch 2.13; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class _Heads:
    """A part of the heads: those of keys and values, and of the queries that go with them."""

    keys: slice
    queries: slice


class SharedKeys:
    """The R key rows that the processes of a group hold together.

    Attributes:
        cu_rows: [N+1] int32, where the rows of each sequence begin.
        positions: [R] int32, their positions.
    """

    def __init__(
        self, context: ContextParallel, deal: Deal, cu_rows: Tensor, positions: Tensor
    ) -> None:
        """Takes which process holds which rows.

        Args:
            context: the group.
            deal: of the R rows.
            cu_rows, positions: of all of them.
        """
        self.cu_rows, self.positions = cu_rows, positions
        self._context, self._deal = context, deal
        self._slot_of, self._row_of = deal.slots()

    def parts(self, q: Tensor, k: Tensor) -> list[_Heads]:
        """The parts of the heads of q [r, Hq, D] and k [r, Hk, D]."""
        heads, each = k.shape[1], q.shape[1] // max(k.shape[1], 1)
        count = max(min(self._context.head_groups, heads), 1)
        cuts = [heads * part // count for part in range(count + 1)]
        return [
            _Heads(slice(first, end), slice(first * each, end * each))
            for first, end in pairwise(cuts)
        ]

    def gathered(
        self, k: Tensor, v: Tensor, parts: list[_Heads]
    ) -> Iterator[tuple[_Heads, Tensor, Tensor]]:
        """(part, k [R, h, D], v [R, h, Dv]) of all rows, from those of this process.

        The next part is on its way while the caller works with one.
        """
        waiting = self._gather(k, v, parts[0])
        for index, part in enumerate(parts):
            following = self._gather(k, v, parts[index + 1]) if index + 1 < len(parts) else None
            yield part, *waiting()
            if following is not None:
                waiting = following

    def _gather(self, k: Tensor, v: Tensor, part: _Heads) -> Callable[[], tuple[Tensor, Tensor]]:
        context, rows = self._context, k.shape[0]
        k, v = k[:, part.keys], v[:, part.keys]
        of_keys = k.shape[1] * k.shape[2]
        width = of_keys + v.shape[1] * v.shape[2]
        # Behind the own rows is what nobody reads: all processes give the same number of rows.
        sent = k.new_empty(self._deal.largest, width)
        sent[:rows, :of_keys] = k.flatten(1)
        sent[:rows, of_keys:] = v.flatten(1)
        everything = k.new_empty(context.size * self._deal.largest, width)
        work = _all_gather(everything, sent, group=context.group, async_op=True)

        def wait() -> tuple[Tensor, Tensor]:
            work.wait()
            got = everything[:, :of_keys], everything[:, of_keys:]
            of_k, of_v = (part.index_select(0, self._slot_of) for part in got)
            return of_k.unflatten(1, k.shape[1:]), of_v.unflatten(1, v.shape[1:])

        return wait

    def reduce(self, dk: Tensor, dv: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begins to sum gradients [R, h, D] and [R, h, Dv] over the group, each row where it is.

        Returns:
            What waits and gives the sums of this process's rows, [r, h, D] and [r, h, Dv].
        """
        context = self._context
        of_keys = dk.shape[1] * dk.shape[2]
        sent = dk.new_empty(self._row_of.numel(), of_keys + dv.shape[1] * dv.shape[2])
        for columns, gradient in ((slice(0, of_keys), dk), (slice(of_keys, None), dv)):
            sent[:, columns] = gradient.flatten(1).index_select(0, self._row_of)
        mine = sent.new_empty(self._deal.largest, sent.shape[1])
        work = _reduce_scatter(mine, sent, group=context.group, async_op=True)

        def wait() -> tuple[Tensor, Tensor]:
            work.wait()
            own = mine[: self._deal.sizes[context.rank]]
            return (
                own[:, :of_keys].unflatten(1, dk.shape[1:]),
                own[:, of_keys:].unflatten(1, dv.shape[1:]),
            )

        return wait


@dataclass(frozen=True)
class _Call:
    """What `segment_attention` is told beside its tensors."""

    keys: SharedKeys
    cu_q: Tensor
    q_positions: Tensor
    scale: float
    window: int
    softcap: float

    def arguments(self) -> tuple[Any, ...]:
        keys = self.keys
        settings = self.scale, self.window, 0, self.softcap
        return self.cu_q, keys.cu_rows, self.q_positions, keys.positions, *settings


@torch.compiler.disable  # what others send is not for a graph of one process
def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: SharedKeys,
    cu_q: Tensor,
    q_positions: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    saved: SavedAttention | None = None,
) -> Tensor:
    """`lemo.ops.segment_attention` of a process's query rows with the keys of the whole group.

    Every process of the group calls it at the same time. Differentiable once in q, k, v and sinks;
    the gradients of k and v are summed over the group, and that of sinks is this process's part.

    Args:
        q: [r, Hq, D], the query rows of this process.
        k, v: [r', Hk, D] and [r', Hk, Dv], its key rows.
        keys: whose they are.
        cu_q: [N+1] int32, where the query rows of each sequence begin.
        q_positions: [r] int32.
        scale, window, softcap: as for `segment_attention`.
        sinks: [Hq] fp32, or None.
        saved: keeps the result, or has it, so that it is computed only once.

    Returns:
        [r, Hq, Dv].
    """
    told = _Call(keys, cu_q, q_positions, scale, window, softcap)
    if saved is None:
        return _Shared.apply(q, k, v, sinks, told, None)
    if not saved.result:
        saved.result = _attend(q, k, v, sinks, told)
        return saved.result[0]
    return _Shared.apply(q, k, v, sinks, told, saved.result)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, told: _Call
) -> tuple[Tensor, Tensor]:
    """(out [r, Hq, Dv], lse [Hq, r])."""
    keys = told.keys
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for part, of_k, of_v in keys.gathered(k, v, keys.parts(q, k)):
        heads = part.queries
        of_sinks = None if sinks is None else sinks[heads]
        arguments = (q[:, heads], of_k, of_v, *told.arguments(), of_sinks)
        out[:, heads], lse[heads] = call(_ops.segment_attention, *arguments)
    return out, lse


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, told, result):
        out, lse = _attend(q, k, v, sinks, told) if result is None else result
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.told = told
        return out if result is None else out.detach()

    @staticmethod
    @first_order_only("context_parallel")
    def backward(ctx, dout):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        told = ctx.told
        deterministic = torch.are_deterministic_algorithms_enabled()
        wants_keys = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dq, dk, dv = torch.empty_like(q), None, None
        dsinks = None if sinks is None else torch.empty_like(sinks)
        if wants_keys:
            dk, dv = torch.empty_like(k), torch.empty_like(v)
        store = _nothing
        for part, of_k, of_v in told.keys.gathered(k, v, told.keys.parts(q, k)):
            heads = part.queries
            dq[:, heads], *of_keys, of_sinks = call(
                _ops.segment_attention_backward,
                *(dout[:, heads], q[:, heads], of_k, of_v, out[:, heads], lse[heads]),
                *told.arguments(),
                None if sinks is None else sinks[heads],
                deterministic,
            )
            if dsinks is not None:
                dsinks[heads] = of_sinks
            if dk is not None and dv is not None:
                wait = told.keys.reduce(*of_keys)
                # The part before, whose sums had the time of this one.
                store()
                store = partial(_store, wait, dk[:, part.keys], dv[:, part.keys])
        store()
        return dq, dk, dv, dsinks, None, None


def _nothing() -> None:
    return


def _store(wait: Callable[[], tuple[Tensor, Tensor]], dk: Tensor, dv: Tensor) -> None:
    of_k, of_v = wait()
    dk.copy_(of_k)
    dv.copy_(of_v)
