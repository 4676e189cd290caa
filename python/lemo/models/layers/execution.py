"""Three ways to run a unit, by what becomes of its activations: an object for each.

`Stored` keeps them for backward, `Recomputed` computes them a second time there (lemo's own
recomputation), `Checkpointed` leaves that to a checkpoint function.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lemo import ops
from lemo.models.calls.interception import runs_foreign_code
from lemo.models.layers.recompute import recomputed
from lemo.models.layers.unit import Unit
from lemo.models.projections.as_in_forward import AsInForward
from lemo.models.projections.weights import is_computed, parameters_of

__all__ = ["Execution", "execution_of", "is_plain_checkpoint"]


class Execution(Protocol):
    """How units of one layer run.

    Attributes:
        joins: whether attention and MLP are to be one unit where they keep the same rows.
    """

    joins: bool

    def run(self, residual: Tensor, unit: Unit) -> Tensor:
        """Adds a unit to the residual [T, H] in place and returns it."""


class Stored:
    """Activations are stored until backward."""

    joins = False

    def run(self, residual: Tensor, unit: Unit) -> Tensor:
        left_out = unit.left_out.begin(residual)
        if unit.attention is not None:
            residual, x = unit.attention.normalize_residual(residual)
            y = unit.attend(x, left_out)
            residual = ops.residual_scatter_(residual, y, unit.kept_rows)
        if unit.mlp is not None:
            residual, x = unit.mlp.normalize_residual(residual)
            y = unit.mlp.output(x)
            residual = ops.residual_scatter_(residual, y, unit.kept_rows)
        unit.left_out.finish(residual)
        return residual


class Recomputed:
    """Backward computes the unit again, from the rows that it read.

    Args:
        layer: of the unit.
        parameters: those of the layer.
        selective: store attention's output, so that attention runs forward once only.
    """

    joins = True

    def __init__(self, layer: nn.Module, parameters: list[nn.Parameter], selective: bool) -> None:
        self._layer, self._parameters, self._selective = layer, parameters, selective

    def run(self, residual: Tensor, unit: Unit) -> Tensor:
        return recomputed(residual, unit, self._layer, self._parameters, self._selective)


class Checkpointed:
    """The unit runs inside a checkpoint function, on rows that are gathered once.

    Args:
        layer: of the unit; backward expects it to be the same as behind forward.
        function: called as function(unit, rows), as `torch.utils.checkpoint.checkpoint` is.
    """

    joins = True

    def __init__(self, layer: nn.Module, function: Callable[..., Tensor]) -> None:
        self._layer, self._function = layer, function

    def run(self, residual: Tensor, unit: Unit) -> Tensor:
        left_out = unit.left_out.begin(residual)
        residual, rows = ops.residual_gather(residual, unit.read_rows)
        behind_forward: AsInForward | None = None

        def of_rows(rows: Tensor) -> Tensor:
            if behind_forward is not None:
                behind_forward.check()
            return _of_rows(unit, left_out, rows)

        y = self._function(of_rows, rows)
        behind_forward = AsInForward(self._layer)
        residual = ops.residual_scatter_(residual, y, unit.kept_rows)
        unit.left_out.finish(residual)
        return residual


def _of_rows(unit: Unit, left_out: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """What a unit adds to the kept rows, from gathered rows of the residual."""
    if unit.attention is None:
        assert unit.mlp is not None
        return unit.mlp(rows)
    attended = unit.attend(unit.attention.normalize(rows), left_out)
    return attended if unit.mlp is None else attended + unit.mlp(rows + attended)


def execution_of(layer: nn.Module, recompute: str) -> Execution:
    """How a layer of the model runs in this forward pass.

    Args:
        layer: the model's module.
        recompute: of this layer, as in `LemoConfig`; "auto": as gradient checkpointing says.
    """
    if not (layer.training and torch.is_grad_enabled()):
        return Stored()
    if recompute == "auto":
        if not layer.gradient_checkpointing:
            return Stored()
        function = layer._gradient_checkpointing_func
        if not is_plain_checkpoint(function):
            return Checkpointed(layer, function)
        recompute = "layer"
    if recompute == "none":
        return Stored()
    if _may_read_others(layer):
        return Checkpointed(layer, partial(checkpoint, use_reentrant=False))
    return Recomputed(layer, parameters_of(layer), recompute == "selective")


def _may_read_others(layer: nn.Module) -> bool:
    """Whether a layer may compute with trained tensors that are no parameters of it.

    `Recomputed` gives them no gradient. They are read by code of the user's, such as a hook that
    adds a vector, and by modules into which somebody has put a weight that was computed.
    """
    # Walked by hand, as in `parameters_of`.
    waiting = [layer]
    while waiting:
        each = waiting.pop()
        if is_computed(each) or runs_foreign_code(each):
            return True
        waiting += [child for child in each._modules.values() if child is not None]
    return False


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
