"""What each layer stores of a pass: as the settings say, or as the planner does by free memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lemo.models.layers.adapter_sizes import (
    adapters_of_layer,
    adapters_of_layers,
    weights_stored_as,
)
from lemo.models.layers.architectures import Architecture
from lemo.models.layers.batch import Batch
from lemo.models.layers.cuda_graphs import CudaGraphs
from lemo.models.memory.free_memory import free_bytes
from lemo.models.memory.sharded import is_sharded
from lemo.models.projections.fp8 import bytes_to_come
from lemo.packing.blocks import Selection
from lemo.planner.memory import StepMemory
from lemo.planner.plan import NOMINAL, GraphRules, HostRules, Planner
from lemo.planner.rows import embeds_all, rows_of, selections
from lemo.planner.shape import (
    Adapters,
    LayerRows,
    ModelShape,
    shape_of,
    step_of,
    united,
    window_of,
)
from lemo.planner.timing import StepTime
from lemo.settings.elimination import LemoConfig

__all__ = ["Actions", "Modes", "rounded_up"]

# Passes of up to an eighth more rows share a plan.
_PARTS = 8


class Actions(NamedTuple):
    """What becomes of the activations of each layer.

    Attributes:
        modes: the setting `recompute`.
        shares: of what it saves, what goes to the host.
        head_groups: of attention's backward where it is recomputed, of all layers.
    """

    modes: Sequence[str]
    shares: Sequence[float]
    head_groups: int = 1


class Modes:
    """Chooses a mode for each layer in each pass.

    Args:
        architecture: access to the model.
        config: the settings, none left open.
        visible_keys: what kept rows attend to in these passes.
        alone: whether this process has all rows. Where others have some, all have to store the
            same, whatever memory each has left, so "auto" is not planned.
        graphs: CUDA graphs of the model's passes; None: there are none.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: LemoConfig,
        visible_keys: str = "kept",
        alone: bool = True,
        graphs: CudaGraphs | None = None,
    ) -> None:
        self._architecture, self._config, self._graphs = architecture, config, graphs
        self._visible_keys, self._alone = visible_keys, alone
        self._plans: dict[Any, Actions] = {}
        self._shares = config.offload_shares(architecture.num_layers)
        self._has_said = False
        # Heads of rows that are computed or shared out meet those of others.
        groups = config.head_groups or 1
        self._head_groups = groups if alone and visible_keys != "computed" else 1
        self._modes = list(config.recompute_modes(architecture.num_layers))

    def of(
        self,
        batch: Batch,
        residual: Tensor,
        kept: Selection,
        drops: bool,
        captures: bool = False,
    ) -> Actions:
        """What becomes of the activations of each layer in a pass.

        Args:
            batch: what the rows are.
            residual: [T, H], before rows are dropped.
            kept: what the first layer keeps.
            drops: whether other rows are dropped; then all layers keep it.
            captures: whether the pass may be replayed as CUDA graphs.
        """
        modes = self._modes
        # Whoever switches it on asks for the least memory.
        chooses = "auto" in modes and not self._architecture.layer(0).gradient_checkpointing
        if (chooses or self._shares is None) and self._alone and self._is_planned():
            fixed = (
                None if chooses else tuple("layer" if mode == "auto" else mode for mode in modes)
            )
            planned = self._planned(batch, residual, kept, drops, fixed, captures)
            if planned is not None:
                return planned if chooses else planned._replace(modes=modes)
        if self._shares is None and torch.is_grad_enabled() and not self._has_said:
            self._has_said = True
            warnings.warn(
                "lemo: nothing goes to the host, since memory is not predicted here "
                "(docs/design/planner.md says where); offload can say a share of each layer",
                stacklevel=2,
            )
        return Actions(modes, self._shares or [0.0] * len(modes), self._head_groups)

    def _is_planned(self) -> bool:
        """Whether the planner decides in this pass."""
        layer = self._architecture.layer(0)
        return (
            torch.is_grad_enabled()
            and layer.training
            # What gathered weights of other layers take is not predicted.
            and not is_sharded(layer)
            and self._visible_keys == "kept"
        )

    def _planned(
        self,
        batch: Batch,
        residual: Tensor,
        kept: Selection,
        drops: bool,
        modes: tuple[str, ...] | None,
        captures: bool,
    ) -> Actions | None:
        """The fastest actions within the free memory; None where memory is not planned."""
        if _is_trained(self._architecture.lm_head):
            return None
        try:
            shape = shape_of(self._architecture.config)
        except ValueError:
            return None
        lengths = batch.layout.seqlens
        rows = [LayerRows(kept.num_rows, kept.num_rows)] * shape.layers
        if not drops:
            rows = rows_of(self._config, shape.layers, lengths)
        rows = [LayerRows(*map(rounded_up, layer)) for layer in rows]
        autocast = torch.is_autocast_enabled(residual.device.type)
        # Layers between these two are taken to change with them: to read all takes milliseconds.
        ends = (0, shape.layers - 1)
        layers = [self._architecture.layer(index) for index in ends]
        of_ends = [adapters_of_layer(layer, residual.dtype, autocast) for layer in layers]
        key = (
            *(len(lengths), rounded_up(sum(lengths)), tuple(rows)),
            *(drops, autocast, modes, captures, residual.requires_grad, *of_ends),
        )
        if key not in self._plans:
            held = 0 if self._graphs is None else self._graphs.bytes
            free = free_bytes(residual.device, held)
            if free is None:
                return None
            adapters = adapters_of_layers(self._architecture, residual.dtype, autocast)
            if adapters is None or united(adapters) is None:
                return None
            # The bucket's most rows may be more than there are.
            most = max(sum(lengths), max(max(layer) for layer in rows))
            lengths = (*lengths[:-1], lengths[-1] + most - sum(lengths))
            planner = self._planner(shape, adapters, lengths, rows, drops, residual, captures)
            if self._config.in_8_bits:
                free -= bytes_to_come(self._architecture.decoder)
            if held and self._graphs is not None and not planner.fits(free):
                self._graphs.clear()
                torch.cuda.empty_cache()
                free += held
            self._plans[key] = _actions(planner, free, modes)
        return self._plans[key]

    def _planner(
        self,
        shape: ModelShape,
        own: Sequence[Adapters],
        lengths: Sequence[int],
        rows: Sequence[LayerRows],
        drops: bool,
        residual: Tensor,
        captures: bool,
    ) -> Planner:
        """Plans passes of a model whose weights are there already.

        Args:
            shape: the model.
            own: LoRA on each layer.
            lengths: tokens of each sequence.
            rows: that each layer keeps.
            drops: whether other rows are dropped; then all layers keep these.
            residual: of the dtype and on the device of such a pass.
            captures: whether it may be replayed as CUDA graphs.
        """
        config, device = self._config, residual.device.type
        step = step_of(
            shape,
            lengths,
            rows,
            drops=drops,
            all_count=not drops,
            size=residual.dtype.itemsize,
            autocast=torch.is_autocast_enabled(device),
            cuda=device == "cuda",
            loss_chunk=config.loss_chunk,
            head_groups=config.head_groups,
            shifted=config.layerwise.group_size is not None,
            embeds_all=embeds_all(config),
            selections=selections(config, shape.layers),
        )
        adapters, is_trained = united(own), [each.targets or each.norms for each in own]
        assert adapters is not None
        first = 0
        if not residual.requires_grad:
            first = next((index for index, trains in enumerate(is_trained) if trains), 0)
        own = [] if set(own) == {adapters} else own
        quantize, fp8 = weights_stored_as(self._architecture), config.in_8_bits
        memory = StepMemory(shape, adapters, step, quantize, fp8, own, first)
        window = window_of(self._architecture.config)
        group = config.layerwise.group_size or 0
        time = StepTime(shape, adapters, step, NOMINAL, window, group, fp8, quantize)
        host = HostRules(config.host_bytes, self._shares)
        rules = GraphRules(config.cuda_graphs == "on") if captures else None
        # Gradients and the optimizer's state may still have to come, those of the embedding, too.
        fixed = memory.fixed - memory.weights + 2 * memory.trainable
        of_embedding = _trained_bytes(self._architecture)
        fixed += 3 * of_embedding
        if residual.requires_grad and not of_embedding:
            # Rows that somebody wants a gradient of (`enable_input_require_grads`) stay beside it.
            fixed += step.residual_rows * shape.hidden * step.size
        return Planner(memory, time, fixed, host, rules)


def _actions(planner: Planner, free: int, modes: tuple[str, ...] | None) -> Actions:
    plan = planner.plan(free, modes) or planner.smallest(free, modes)
    return Actions(plan.modes, plan.shares, plan.head_groups)


def rounded_up(rows: int) -> int:
    """Rows, at most an eighth more: a multiple of a power of two."""
    unit = 1 << max(0, rows.bit_length() - _PARTS.bit_length())
    return -(-rows // unit) * unit


def _trained_bytes(architecture: Architecture) -> int:
    """Of trained parameters that are neither a layer's nor the last norm's."""
    planned = [architecture.layer(index) for index in range(architecture.num_layers)]
    if architecture.last_norm is not None:
        planned.append(architecture.last_norm)
    known = {id(parameter) for module in planned for parameter in module.parameters()}
    trained = (each for each in architecture.causal_lm.parameters() if each.requires_grad)
    return sum(each.nbytes for each in trained if id(each) not in known)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
