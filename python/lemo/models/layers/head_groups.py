"""Backward of attention by groups of heads, for layers with so many rows that it is the peak.

Backward of a whole layer's attention holds queries, keys and values, the result, the gradients of
all of these and fp32 sums for the queries, at once. Heads attend each by itself. So here the result
alone is kept while the MLP's backward runs; queries, keys and values are projected once more; and
the kernel runs on some key heads with their queries at a time, whose gradients take the place of
the queries, keys and values that they are of. The projections' backward follows, of those that are
one node together and of others one after the other, as autograd orders it: the bits are those of
all heads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lemo.models.layers.architectures import GradientTarget
from lemo.models.layers.sub_blocks import Attention, Heads
from lemo.ops.segment_attention import SavedAttention, attention_gradients
from lemo.packing.blocks import Selection
from lemo.packing.chunks import split_heads

__all__ = ["GroupedBackward", "attended"]


class Gradients(Protocol):
    """What sums gradients of parameters."""

    def add(
        self, edges: Sequence[Any], leaf: Tensor | None, dys: Sequence[Tensor]
    ) -> Tensor | None:
        """Backward from results; returns the gradient of `leaf`, if one is given."""


class Surroundings(Protocol):
    """Random numbers and autocast at a time of the forward pass."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast is inside what it was."""

    def restored(self) -> AbstractContextManager[Any]:
        """Random numbers are inside what they were."""


def attended(attention: Attention, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the heads of gathered rows [Rk, H] give, without a graph: what `SavedAttention` has."""
    saved = SavedAttention()
    with torch.no_grad():
        # In one expression: nothing is held longer than it is read.
        attention.attend(attention.project(attention.normalize(rows)), attention=saved)
    out, lse = saved.result
    return out, lse


class GroupedBackward:
    """The backward pass of one unit's attention.

    Args:
        attention: the sub-block.
        groups: the most groups of heads.
        rows: [Rk, H], what it read of the residual.
        saved: its result and logarithms; empty: they are computed again.
        entry: random numbers and autocast at the unit's entry.
    """

    def __init__(
        self,
        attention: Attention,
        groups: int,
        rows: Tensor,
        saved: Sequence[Tensor],
        entry: Surroundings,
    ) -> None:
        self._attention, self._groups, self._rows = attention, groups, rows
        self._entry = entry
        if not saved:
            with entry.restored(), entry.autocast():
                saved = attended(attention, rows)
        self._leaf, self._lse = saved[0].detach().requires_grad_(), saved[1]
        self._edge: Any = None

    def output(self, values: bool) -> Tensor:
        """What attention adds to the kept rows [Rq, H].

        To be called with the random numbers and the autocast that were behind the heads.
        """
        with torch.enable_grad():
            y = self._attention.output(self._leaf, values)
        self._edge = get_gradient_edge(y)
        return y.detach()

    def backward(
        self, dy: Tensor, gradients: Gradients, needs_rows: bool, target: GradientTarget
    ) -> Tensor | None:
        """The gradient of the rows, where it is wanted and `target` has not got it.

        Args:
            dy: [Rq, H], of what `output` gave; may be a view of the target.
            gradients: gets those of the parameters.
            needs_rows: whether that of the rows is wanted.
            target: as of `Architecture.normalize`.
        """
        attention, entry = self._attention, self._entry
        with entry.restored(), entry.autocast(), torch.no_grad():
            heads = attention.project(attention.normalize(self._rows))
        dout = gradients.add([self._edge], self._leaf, [dy])
        del dy
        assert dout is not None
        _differentiate(attention, heads, self._leaf.detach(), self._lse, dout, self._groups)
        del dout, self._leaf, self._lse, self._edge
        with entry.restored(), entry.autocast(), torch.enable_grad():
            leaf = self._rows.detach().requires_grad_(needs_rows)
            x = attention.normalize(leaf, target)
            edge = get_gradient_edge(x) if x.requires_grad else None
            x = x.detach().requires_grad_(edge is not None)
            linears = attention.linears(x, values=False)
        remaining = _by_node(list(zip(linears, heads, (attention.kept, attention.keys, None))))
        del linears, heads
        dx = None
        while remaining:
            together, edges, dys = remaining.pop(), [], []
            while together:
                linear, gradient, rotation = together.pop()
                if rotation is not None:
                    gradient = attention.unrotated(gradient.to(linear.dtype), rotation)
                edges.append(get_gradient_edge(linear))
                dys.append(gradient.view_as(linear))
                del linear, gradient
            part = gradients.add(edges, None if edge is None else x, dys)
            del edges, dys
            if part is not None:
                dx = part if dx is None else dx.add_(part)
            del part
        del x
        if edge is None or dx is None:
            return None
        return gradients.add([edge], leaf if needs_rows else None, [dx])


_Part = tuple[Tensor, Tensor, Selection | None]


def _by_node(parts: list[_Part]) -> list[list[_Part]]:
    """Those with a graph, and together those whose graphs share a node.

    Args:
        parts: a result, its gradient and how it is rotated, each.
    """
    found: list[tuple[set[Any], list[_Part]]] = []
    for part in parts:
        if not part[0].requires_grad:
            continue
        nodes, waiting = set(), [part[0].grad_fn]
        while waiting:
            node = waiting.pop()
            # Leaves are shared by all.
            if node is not None and not hasattr(node, "variable"):
                nodes.add(node)
                waiting += [each for each, _ in node.next_functions]
        together = next((both for both in found if both[0] & nodes), None)
        if together is None:
            found.append((nodes, [part]))
        else:
            together[1].append(part)
            together[0].update(nodes)
    return [together for _, together in found]


def _differentiate(
    attention: Attention, heads: Heads, out: Tensor, lse: Tensor, dout: Tensor, groups: int
) -> None:
    """Puts gradients in the place of queries, keys and values.

    Args:
        attention: the sub-block.
        heads: overwritten.
        out, lse: its result [Rq, Hq, D], and logarithms [Hq, Rq].
        dout: the gradient of `out`.
        groups: the most groups.
    """
    key_heads = heads.k.shape[1]
    share = heads.q.shape[1] // key_heads
    for of_keys in split_heads(key_heads, groups, attention.has_shifted_groups):
        of_queries = [(share * a, share * b) for a, b in of_keys]
        places = of_queries, of_keys, of_keys
        part = Heads(*(_taken(whole, ranges) for whole, ranges in zip(heads, places)))
        results = _taken(dout, of_queries), _taken(out, of_queries), _taken(lse, of_queries, 0)
        for whole, ranges, gradient in zip(heads, places, _of_group(attention, part, *results)):
            first = 0
            for a, b in ranges:
                whole[:, a:b] = gradient[:, first : first + b - a]
                first += b - a


def _of_group(
    attention: Attention, heads: Heads, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def differentiated(q: Tensor, k: Tensor, v: Tensor, *places: Any, **settings: Any) -> Tensor:
        found.append(attention_gradients(dout, q, k, v, out, lse, *places, **settings))
        return out

    attention.attend(heads, attention=differentiated)
    return found[0]


def _taken(whole: Tensor, ranges: Sequence[tuple[int, int]], dim: int = 1) -> Tensor:
    """Some heads, contiguous."""
    parts = [whole.narrow(dim, a, b - a) for a, b in ranges]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)
