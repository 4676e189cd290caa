"""Units that store their gathered rows only, and are computed a second time in backward.

Forward leaves the rows that it read (and, "selective", the attention's output); backward computes
attention again with a graph, then the MLP a chunk of rows at a time, each chunk forward and at once
backward. So a layer is computed twice, never three times, and the MLP's activations exist for one
chunk of rows only, in both passes.

The unit works on the residual in place, and backward adds into the residual's gradient in place
(docs/design/models.md).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import get_device_states, set_device_states

from lemo import ops
from lemo.models.layers.architectures import GradientTarget
from lemo.models.layers.head_groups import GroupedBackward, attended
from lemo.models.layers.sub_blocks import MLP
from lemo.models.layers.unit import Unit
from lemo.models.memory.out_of_memory import explained
from lemo.models.projections.as_in_forward import AsInForward
from lemo.models.projections.rows import add_in_chunks, add_rows, chunks_of, gather_rows
from lemo.models.projections.weights import kept_matrices
from lemo.ops.autograd import first_order_only, hand_on, overwritable
from lemo.ops.segment_attention import SavedAttention

__all__ = ["recomputed"]


def recomputed(
    residual: Tensor,
    unit: Unit,
    layer: nn.Module,
    parameters: Sequence[Tensor],
    selective: bool = False,
) -> Tensor:
    """Adds a unit to the residual [T, H] in place and returns it.

    Bit-equal to running the unit with a graph where the MLP fits one chunk, otherwise equal up to
    the rounding of products of fewer rows; bit-equal from run to run. Random numbers and autocast
    are in backward what they were in forward.

    Args:
        residual: not a leaf that requires grad.
        unit: what to compute.
        layer: whose unit it is; backward expects it to be the same as behind forward.
        parameters: `parameters_of` the layer. Trainable ones are arguments of the autograd node, so
            hooks on the accumulation of gradients (of DDP and the like) see them.
        selective: store attention's output and logarithms, so that it runs forward once only.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    look = partial(AsInForward, layer, parameters)
    return _Recomputed.apply(unit, look, selective, residual, *trained)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unit: Unit,
        look: Callable[[], AsInForward],
        selective: bool,
        residual: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.unit, ctx.selective, ctx.parameters = unit, selective, parameters
        ctx.mark_dirty(residual)
        saved: tuple[Tensor, ...] = ()
        # Before the random numbers that backward draws again.
        left_out = unit.left_out.begin(residual)
        ctx.surroundings = _Surroundings(residual)
        with ctx.surroundings.autocast():
            rows = gather_rows(residual, unit.read_rows)
            if unit.attention is not None and unit.head_groups > 1:
                out, lse = attended(unit.attention, rows)
                ctx.behind_heads = _Surroundings(residual)
                add_rows(residual, unit.attention.output(out), unit.kept_rows)
                saved = (out, lse) if selective else ()
                del out, lse
            elif unit.attention is not None:
                attention = SavedAttention() if selective else ops.segment_attention
                y = unit.attend(unit.attention.normalize(rows), left_out, attention)
                add_rows(residual, y, unit.kept_rows)
                saved = attention.result if isinstance(attention, SavedAttention) else ()
                del y
            if unit.mlp is not None:
                with kept_matrices():
                    add_in_chunks(residual, unit.mlp, unit.kept_rows, unit.mlp.width)
        unit.left_out.finish(residual)
        # Behind forward: PEFT takes merged adapters that are disabled out of the weight there.
        ctx.layer = look()
        ctx.num_left_out = len(left_out)
        ctx.save_for_backward(rows, *left_out, *saved)
        return residual

    @staticmethod
    @first_order_only("recompute")
    def backward(ctx: Any, dresidual: Tensor) -> tuple[Tensor | None, ...]:
        ctx.layer.check()
        unit, needs_residual = ctx.unit, ctx.needs_input_grad[3]
        rows, *saved = ctx.saved_tensors
        left_out, saved = tuple(saved[: ctx.num_left_out]), saved[ctx.num_left_out :]
        dresidual = overwritable(ctx, dresidual)
        gradients = _Gradients(ctx.parameters)
        if unit.attention is not None and unit.head_groups > 1:
            with explained(lambda: f"in the backward pass of a layer with {len(rows)} kept rows"):
                _backward_in_groups(ctx, rows, saved, dresidual, gradients)
            passed_on = hand_on(ctx, dresidual) if needs_residual else None
            return None, None, None, passed_on, *gradients.sums
        with (
            explained(lambda: f"in the backward pass of a layer with {rows.shape[0]} kept rows"),
            ctx.surroundings.restored(),
            ctx.surroundings.autocast(),
            torch.enable_grad(),
        ):
            leaf, attended, edge = rows.detach().requires_grad_(needs_residual), None, None
            if unit.attention is not None:
                attention = SavedAttention(*saved) if ctx.selective else ops.segment_attention
                target = GradientTarget(dresidual, unit.read_rows)
                x = unit.attention.normalize(leaf, target)
                y = unit.attend(x, left_out, attention, values=unit.mlp is not None)
                edge = get_gradient_edge(y) if y.requires_grad else None
                attended, dtype = y.detach(), y.dtype
                del x, y, attention
            if unit.mlp is not None:
                wanted = needs_residual or edge is not None
                kept_rows = unit.kept_rows
                with kept_matrices():
                    _mlp_backward(unit.mlp, kept_rows, rows, attended, dresidual, wanted, gradients)
            del attended
        if edge is not None:
            dy = gather_rows(dresidual, unit.kept_rows, view=True).to(dtype)
            drows = gradients.add([edge], leaf if needs_residual else None, [dy])
            del dy, edge
            if drows is not None:
                add_rows(dresidual, drows, unit.read_rows)
        passed_on = hand_on(ctx, dresidual) if needs_residual else None
        return None, None, None, passed_on, *gradients.sums


def _backward_in_groups(
    ctx: Any,
    rows: Tensor,
    saved: Sequence[Tensor],
    dresidual: Tensor,
    gradients: "_Gradients",
) -> None:
    """The same for units whose attention works on groups of heads.

    Args:
        ctx: of the node.
        rows: [Rk, H], what the unit read.
        saved: attention's result and logarithms; empty: not stored.
        dresidual: [T, H], the residual's gradient, into which that of the rows is added.
        gradients: gets those of the parameters.
    """
    unit, needs_residual = ctx.unit, ctx.needs_input_grad[3]
    groups = GroupedBackward(unit.attention, unit.head_groups, rows, saved, ctx.surroundings)
    del saved
    with ctx.behind_heads.restored(), ctx.behind_heads.autocast(), torch.enable_grad():
        y = groups.output(values=unit.mlp is not None)
        dtype = y.dtype
        if unit.mlp is not None:
            with kept_matrices():
                _mlp_backward(unit.mlp, unit.kept_rows, rows, y, dresidual, True, gradients)
        del y
    target = GradientTarget(dresidual, unit.read_rows)
    drows = groups.backward(
        gather_rows(dresidual, unit.kept_rows, view=True).to(dtype),
        gradients,
        needs_residual,
        target,
    )
    if drows is not None:
        add_rows(dresidual, drows, unit.read_rows)


def _mlp_backward(
    mlp: MLP,
    kept_rows: Tensor | None,
    rows: Tensor,
    attended: Tensor | None,
    dresidual: Tensor,
    wanted: bool,
    gradients: "_Gradients",
) -> None:
    """Adds the MLP's gradient to the kept rows of `dresidual`, if `wanted`.

    Args:
        mlp: the sub-block.
        kept_rows: [R] int32; None: all.
        rows: [R, H], the kept rows of the residual at the unit's entry.
        attended: [R, H], what attention added to them; None: nothing.
        dresidual: [T, H], the residual's gradient.
        wanted: whether the gradient is wanted.
        gradients: gets those of the parameters.
    """
    first = 0
    for chunk in chunks_of(dresidual, kept_rows, mlp.width):
        part = slice(first, first + _length(chunk))
        first = part.stop
        chunk_rows = rows[part]
        if attended is not None:
            # Rounded as the residual was.
            chunk_rows = (chunk_rows + attended[part]).to(rows.dtype)
        leaf = chunk_rows.detach().requires_grad_(wanted)
        if isinstance(chunk, slice):
            target = GradientTarget(dresidual[chunk], None)
        else:
            target = GradientTarget(dresidual, chunk)
        y = mlp(leaf, values=False, target=target)
        if not y.requires_grad:
            continue
        dy = gather_rows(dresidual, chunk, view=True).to(y.dtype)
        drows = gradients.add([get_gradient_edge(y)], leaf if wanted else None, [dy])
        del y, dy, leaf
        if drows is not None:
            add_rows(dresidual, drows, chunk)


class _Gradients:
    """Gradients of the trainable parameters, summed over chunks in fp32.

    Attributes:
        sums: of each of them; autograd casts what the node returns to the parameter's dtype.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(
        self, edges: Sequence[Any], leaf: Tensor | None, dys: Sequence[Tensor]
    ) -> Tensor | None:
        """Backward from results; returns the gradient of `leaf`, if one is given."""
        inputs = [*([] if leaf is None else [leaf]), *self._parameters]
        if not inputs:
            return None
        with _without_hooks(self._parameters):
            gradients = list(torch.autograd.grad(edges, inputs, dys, allow_unused=True))
        dleaf = None if leaf is None else gradients.pop(0)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self.sums[index]
            self.sums[index] = gradient if total is None else total.float() + gradient
        return dleaf


@contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on gradients of parameters are not called inside: they are for those of the node."""
    found = [(hooks, dict(hooks)) for p in parameters if (hooks := p._backward_hooks)]
    for hooks, _ in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in found:
            hooks.update(kept)


class _Surroundings:
    """Random numbers and autocast at the time of forward."""

    def __init__(self, x: Tensor) -> None:
        self._device_type = x.device.type
        self._enabled = torch.is_autocast_enabled(self._device_type)
        self._dtype = torch.get_autocast_dtype(self._device_type)
        self._cpu_state = torch.get_rng_state()
        self._devices: list[int] = []
        self._states: list[Tensor] = []
        # A pass that draws random numbers here is not captured.
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._devices, self._states = get_device_states(x)

    def autocast(self) -> torch.autocast:
        # Without its cache: what forward cast without a graph must not be found by backward.
        return torch.autocast(
            self._device_type, dtype=self._dtype, enabled=self._enabled, cache_enabled=False
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the random state of forward inside, and that of backward afterwards."""
        device_type = self._device_type if self._devices else "cuda"
        with torch.random.fork_rng(devices=self._devices, device_type=device_type):
            torch.set_rng_state(self._cpu_state)
            set_device_states(self._devices, self._states, device_type=device_type)
            yield


def _length(chunk: Tensor | slice) -> int:
    return chunk.stop - chunk.start if isinstance(chunk, slice) else chunk.shape[0]
