"""Layers that store their gathered rows only, and are computed a second time in backward.

A unit is attention, the MLP, or both on one kept set. Forward leaves the rows that it read (and,
"selective", the attention's output); backward computes attention again with a graph, then the MLP
a chunk of rows at a time, each chunk forward and at once backward. So a layer is computed twice,
never three times, and the MLP's activations exist for one chunk of rows only, in both passes.

The unit works on the residual stream in place, and backward adds into the stream's gradient in
place (docs/DESIGN.md, section 3, "The gradient stream").
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from lemo import ops
from lemo.models.left_out import Context
from lemo.models.rows import add_in_chunks, add_rows, chunks_of, gather_rows
from lemo.ops._autograd import first_order_only, hand_on, overwritable
from lemo.ops.segment_attention import StoredAttention

__all__ = ["Unit", "is_plain_checkpoint", "recomputed"]


@dataclass(frozen=True)
class Unit:
    """What is computed again as one piece.

    Attributes:
        attend: attend(x_rows, attention=..., values=..., into=...): what attention adds to `rows`,
            from the rows `key_rows` of the stream; None: no attention. `attention` takes the place
            of `ops.segment_attention`; without `values` only gradients of the result count; with
            `into` = (dx, key_rows) backward may add the gradient of x_rows to these rows of dx
            itself and give none to x_rows; `others` are keys and values of rows that are not kept.
        mlp: mlp(x_rows, values=..., into=...): what the MLP adds to `rows`, row by row; None: no
            MLP.
        rows: [R] int32 rows that the unit changes; None: all.
        key_rows: rows that attention reads; with an MLP in the unit these are `rows`.
        context: computes the rows that are not kept, in forward, if they are computed.
        width: features of the MLP's widest activation.
        selective: keep attention's output and logarithms, so that it runs forward once only.
    """

    attend: Callable[..., Tensor] | None
    mlp: Callable[..., Tensor] | None
    rows: Tensor | None
    key_rows: Tensor | None
    context: Context
    width: int
    selective: bool = False


def recomputed(x: Tensor, unit: Unit, parameters: Sequence[Tensor]) -> Tensor:
    """Adds a unit to the residual stream [T, H] in place and returns it.

    Bit-equal to running the unit with a graph where the MLP fits one chunk, otherwise equal up to
    the rounding of products of fewer rows; bit-equal from run to run. Random numbers and autocast
    are in backward what they were in forward.

    Args:
        x: the stream; not a leaf that requires grad.
        unit: what to compute.
        parameters: trainable parameters that the unit may use. They are arguments of the autograd
            node, so hooks on the accumulation of gradients (of DDP and the like) see them.
    """
    return _Recomputed.apply(unit, x, *parameters)


def is_plain_checkpoint(function: Any) -> bool:
    """Whether Transformers' checkpoint function is torch's own, with nothing of the user's in it.

    Offloading and selective checkpointing bring functions or contexts of their own.
    """
    return (
        isinstance(function, partial)
        and function.func is checkpoint
        and not function.args
        and function.keywords.keys() <= {"use_reentrant", "preserve_rng_state"}
    )


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit, x, *parameters):
        ctx.unit, ctx.parameters = unit, parameters
        ctx.mark_dirty(x)
        kept: tuple[Tensor, ...] = ()
        # Before the random numbers that backward draws again.
        others = unit.context.begin(x)
        ctx.surroundings = _Surroundings(x)
        with ctx.surroundings.autocast():
            x_rows = gather_rows(x, unit.rows if unit.attend is None else unit.key_rows)
            if unit.attend is not None:
                attention = StoredAttention() if unit.selective else ops.segment_attention
                y = unit.attend(x_rows, attention=attention, others=others)
                add_rows(x, y, unit.rows)
                kept = attention.result if unit.selective else ()
                del y
            if unit.mlp is not None:
                add_in_chunks(x, unit.mlp, unit.rows, unit.width)
        unit.context.finish(x)
        ctx.num_others = len(others)
        ctx.save_for_backward(x_rows, *others, *kept)
        return x

    @staticmethod
    @first_order_only("recompute")
    def backward(ctx, dx):
        unit, needs_x = ctx.unit, ctx.needs_input_grad[1]
        x_rows, *saved = ctx.saved_tensors
        others, kept = saved[: ctx.num_others], saved[ctx.num_others :]
        dx = overwritable(ctx, dx)
        gradients = _Gradients(ctx.parameters)
        with ctx.surroundings.restored(), ctx.surroundings.autocast(), torch.enable_grad():
            leaf, attended, edge = x_rows.detach().requires_grad_(needs_x), None, None
            if unit.attend is not None:
                attention = StoredAttention(*kept) if unit.selective else ops.segment_attention
                y = unit.attend(
                    leaf,
                    attention=attention,
                    values=unit.mlp is not None,
                    into=(dx, unit.key_rows),
                    others=others,
                )
                edge = get_gradient_edge(y) if y.requires_grad else None
                attended, dtype = y.detach(), y.dtype
                del y, attention
            if unit.mlp is not None:
                wanted = needs_x or edge is not None
                _mlp_backward(unit, x_rows, attended, dx, wanted, gradients)
            del attended
        if edge is not None:
            dy = gather_rows(dx, unit.rows, view=True).to(dtype)
            d_rows = gradients.add(edge, leaf if needs_x else None, dy)
            del dy, edge
            if d_rows is not None:
                add_rows(dx, d_rows, unit.key_rows)
        return None, hand_on(ctx, dx) if needs_x else None, *gradients.totals()


def _mlp_backward(
    unit: Unit,
    x_rows: Tensor,
    attended: Tensor | None,
    dx: Tensor,
    wanted: bool,
    gradients: "_Gradients",
) -> None:
    """Adds the MLP's gradient to `unit.rows` of `dx`, if `wanted`, and those of its parameters.

    Args:
        x_rows: [R, H], rows of the stream at the unit's entry.
        attended: [R, H], what attention added to them; None: nothing.
    """
    first = 0
    for chunk in chunks_of(dx, unit.rows, unit.width):
        part = slice(first, first + _length(chunk))
        first = part.stop
        rows = x_rows[part]
        if attended is not None:
            # Rounded as the stream was.
            rows = (rows + attended[part]).to(x_rows.dtype)
        leaf = rows.detach().requires_grad_(wanted)
        into = (dx[chunk], None) if isinstance(chunk, slice) else (dx, chunk)
        y = unit.mlp(leaf, values=False, into=into)
        if not y.requires_grad:
            continue
        dy = gather_rows(dx, chunk, view=True).to(y.dtype)
        d_rows = gradients.add(get_gradient_edge(y), leaf if wanted else None, dy)
        del y, dy, leaf
        if d_rows is not None:
            add_rows(dx, d_rows, chunk)


class _Gradients:
    """Gradients of the trainable parameters, summed over chunks in fp32."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, edge: Any, leaf: Tensor | None, dy: Tensor) -> Tensor | None:
        """Backward from one result; returns the gradient of `leaf`, if one is given."""
        inputs = [*([] if leaf is None else [leaf]), *self._parameters]
        if not inputs:
            return None
        gradients = list(torch.autograd.grad(edge, inputs, dy, allow_unused=True))
        d_leaf = None if leaf is None else gradients.pop(0)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self._sums[index]
            self._sums[index] = gradient if total is None else total.float() + gradient
        return d_leaf

    def totals(self) -> list[Tensor | None]:
        return [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(self._sums, self._parameters)
        ]


class _Surroundings:
    """Random numbers and autocast at the time of forward."""

    def __init__(self, x: Tensor) -> None:
        self._device_type = x.device.type
        self._enabled = torch.is_autocast_enabled(self._device_type)
        self._dtype = torch.get_autocast_dtype(self._device_type)
        self._cpu_state = torch.get_rng_state()
        self._devices, self._states = get_device_states(x)

    def autocast(self) -> torch.autocast:
        # Without its cache: what forward cast without a graph must not be found by backward.
        return torch.autocast(
            self._device_type, dtype=self._dtype, enabled=self._enabled, cache_enabled=False
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The random numbers of forward once more; those of backward go on afterwards."""
        device_type = self._device_type if self._devices else "cuda"
        with torch.random.fork_rng(devices=self._devices, device_type=device_type):
            torch.set_rng_state(self._cpu_state)
            set_device_states(self._devices, self._states, device_type=device_type)
            yield


def _length(chunk: Tensor | slice) -> int:
    return chunk.stop - chunk.start if isinstance(chunk, slice) else chunk.shape[0]
