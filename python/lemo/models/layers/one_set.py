"""A training pass in which all layers keep the same rows, as a function of a few tensors.

What a batch keeps and which of its rows have labels is known then before the first layer runs. From
there on no shape depends on the batch's contents and nothing is read back, so the layers and the
loss can be captured in a CUDA graph.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemo.models.calls.interception import has_own_forward, is_intercepted, kind_of
from lemo.models.layers.architectures import Architecture, active_module
from lemo.models.layers.decoder import Decoder, Pass
from lemo.models.layers.execution import is_plain_checkpoint
from lemo.models.layers.general import by_reason, general_modules
from lemo.models.layers.loss import head_loss
from lemo.models.layers.modes import rounded_up
from lemo.models.memory.out_of_memory import explained
from lemo.models.projections.adapters import adapted
from lemo.models.projections.fp8 import fp8_of
from lemo.models.projections.weights import is_computed, is_plain, place_of
from lemo.packing.blocks import Selection
from lemo.planner.memory import MOST_CAPTURED

__all__ = ["Labels", "OneSet", "State", "labels_of_rows", "state_of", "uses_plain_head"]

# Numbers of rows with labels that passes of one number of rows have, at most twice as many.
_LABEL_STEPS = 64
_CAPTURED_MODES = ("auto", "none", "layer", "selective")


class State(NamedTuple):
    """The modules of a model as they are in a pass.

    Attributes:
        said: what they say of themselves and may say differently in another pass.
        tensors: all parameters that the layers, the last norm and the head read, in a fixed order.
        merged: names of the adapters that are merged into the weight, by layer: PEFT's own lists.
    """

    said: Hashable
    tensors: list[Tensor]
    merged: list[list[str]]

    @property
    def frozen(self) -> list[Tensor]:
        """Those of them that are not trained."""
        return [x for x in self.tensors if not x.requires_grad]


class Labels(NamedTuple):
    """The rows of the residual that the head sees.

    Attributes:
        rows: [M] int32, ascending; None: all rows.
        targets: [M] int64, what each of them predicts, or the ignored label.
        divisor: fp32 scalar, what the sum of the losses is divided by; None: the labels' number.
    """

    rows: Tensor | None
    targets: Tensor
    divisor: Tensor | None


def labels_of_rows(targets: Tensor, ignored: int, most: int) -> tuple[Tensor | None, Tensor]:
    """(rows, targets) of `Labels`: all rows with a label and some without one.

    Their number depends on `most` and the number of rows only, and nothing is read back.

    Args:
        targets: [R] int64.
        ignored: the label that does not count.
        most: labels that there are at most.
    """
    rows = targets.numel()
    # Steps of a 64th of all rows, whose loss costs little: few shapes, and few graphs.
    step = 1 << max(0, (rows // _LABEL_STEPS).bit_length() - 1)
    count = min(-(-rounded_up(max(most, 1)) // step) * step, rows)
    if count == rows:
        return None, targets
    has = targets != ignored
    others = ~has
    taken = has | (others & (others.cumsum(0) <= count - has.sum()))
    numbers = torch.arange(1, count + 1, device=targets.device)
    index = torch.searchsorted(taken.cumsum(0), numbers)
    return index.int(), targets[index]


def uses_plain_head(architecture: Architecture) -> bool:
    """Whether the head is a plain product, which leaves out rows without a label itself."""
    return is_plain(active_module(architecture.lm_head))


class _Inputs(NamedTuple):
    """What the layers and the loss read; the residual is overwritten."""

    residual: Tensor
    cos: Tensor | None
    sin: Tensor | None
    rows: Tensor | None
    positions: Tensor | None
    cu_rows: Tensor
    left_out_rows: Tensor | None
    left_out_positions: Tensor | None
    left_out_cu_rows: Tensor | None
    cu_seqlens: Tensor | None
    all_positions: Tensor | None
    label_rows: Tensor | None
    targets: Tensor
    divisor: Tensor | None


@dataclass(frozen=True)
class OneSet:
    """The layers and the loss of one pass.

    Attributes:
        architecture: access to the model.
        decoder: its layers.
        now: the pass, the first layer of which is entered.
        labels: what the head sees.
        ignored: the label that does not count.
        loss_chunk: rows of a loss chunk; None: as `linear_cross_entropy` has it.
    """

    architecture: Architecture
    decoder: Decoder
    now: Pass
    labels: Labels
    ignored: int
    loss_chunk: int | None

    def inputs(self, residual: Tensor) -> _Inputs:
        """The tensors of this pass."""
        batch, kept, left_out = self.now.batch, self.now.kept, self.now.left_out
        assert kept is not None
        # Others than the kept rows are read where there are some.
        everything = kept.rows is not None and self.decoder.visible_keys != "kept"
        cos, sin = (None, None) if batch.rotary is None else batch.rotary
        return _Inputs(
            residual,
            cos,
            sin,
            kept.rows,
            kept.positions,
            kept.cu_rows,
            None if left_out is None else left_out.rows,
            None if left_out is None else left_out.positions,
            None if left_out is None else left_out.cu_rows,
            batch.layout.cu_seqlens if everything else None,
            batch.positions if everything else None,
            *self.labels,
        )

    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The loss, fp32 scalar, from tensors in the place of those of this pass."""
        inputs = _Inputs(*tensors)  # type: ignore[arg-type]
        now = self._with(inputs)
        with explained(self.decoder.describe):
            residual = self.decoder.layers(now, inputs.residual)
            hidden = self.architecture.final_norm(residual, inputs.label_rows)[1]
            return head_loss(
                self.architecture.lm_head,
                hidden,
                inputs.targets,
                self.architecture.config.vocab_size,
                self.loss_chunk,
                inputs.divisor,
                self.ignored,
            )

    def _with(self, inputs: _Inputs) -> Pass:
        """The pass with other tensors."""
        now, batch = self.now, self.now.batch
        assert now.kept is not None
        cu_seqlens = inputs.cu_seqlens
        layout = batch.layout
        if cu_seqlens is not None:
            layout = replace(layout, cu_seqlens=cu_seqlens)
        rotary = None
        if inputs.cos is not None and inputs.sin is not None:
            rotary = inputs.cos, inputs.sin
        packed = batch.packed.with_positions(inputs.all_positions)
        left_out = None
        if inputs.left_out_cu_rows is not None:
            rows, positions = inputs.left_out_rows, inputs.left_out_positions
            left_out = Selection(layout, rows, positions, inputs.left_out_cu_rows, None)
        return replace(
            now,
            batch=replace(batch, packed=packed, layout=layout, rotary=rotary),
            kept=Selection(layout, inputs.rows, inputs.positions, inputs.cu_rows, None),
            left_out=left_out,
        )

    # What a graph depends on

    def captured(self, state: State) -> tuple[Hashable, list[Tensor], list[Tensor]]:
        """(what is equal where the same function is computed, the parameters that it trains, all
        that the model computes from)."""
        device = self.now.batch.layout.cu_seqlens.device.type
        parameters = _trained(state.tensors)
        key = (
            id(self.decoder),
            self.decoder.is_overruled,
            (*self.now.modes, self.now.head_groups),
            self.ignored,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            _switches(),
            len(parameters),
            state.said,
        )
        embedding = self.architecture.causal_lm.get_input_embeddings()
        return key, parameters, [*state.tensors, *embedding._parameters.values()]

    def is_long(self) -> bool:
        """Whether kernels take longer than the host takes to issue them."""
        return self._work() > MOST_CAPTURED

    def obstacle(self, parameters: Sequence[Tensor]) -> str | None:
        """Why this pass is not captured; None: nothing stands against it.

        Args:
            parameters: those that it trains.
        """
        if not parameters:
            return "nothing is trained"
        others = sorted(set(self.now.modes) - set(_CAPTURED_MODES))
        if others:
            return f"recompute '{others[0]}'"
        if any(map(fp8_of, self.architecture.causal_lm.modules())):
            return "products in 8 bits"
        known = set(map(id, parameters))
        for index in range(self.architecture.num_layers):
            for name, parameter in self.architecture.layer(index).named_parameters():
                if parameter.requires_grad and id(parameter) not in known:
                    return f"a trained weight that is read elsewhere: layers.{index}.{name}"
        for name, module in self.architecture.causal_lm.named_modules():
            if is_computed(module):
                return f"a weight that is no parameter: {name}"
        general = general_modules(self.architecture)
        if general:
            return f"modules that run as they are: {by_reason(general)[0]}"
        for index in range(self.architecture.num_layers):
            reason = _unknown_part(self.architecture, index)
            if reason is not None:
                return f"{reason} in layer {index}"
        recomputes = set(self.now.modes) != {"none"}
        if recomputes and self._draws():
            return "recomputed layers with dropout, which draw the same random numbers twice"
        return None

    def _work(self) -> int:
        """Multiplications of the forward products of a layer."""
        weights = [adapted(module) for module in _linears(self.architecture, 0)]
        bases: list[Any] = [layer.base for layer in weights if not isinstance(layer, str)]
        # Not the weights' elements: two numbers of 4 bits are one.
        known = [base for base in bases if hasattr(base, "in_features")]
        size = sum(base.in_features * base.out_features for base in known)
        assert self.now.kept is not None
        return size * self.now.kept.num_rows

    def _draws(self) -> bool:
        layer: Any = self.architecture.layer(0)
        return bool(getattr(layer, "dropout", 0.0)) or any(
            isinstance(module, torch.nn.modules.dropout._DropoutNd)
            and module.training
            and module.p > 0
            for module in self.architecture.causal_lm.modules()
        )


def _switches() -> Hashable:
    """torch's global settings by which kernels are chosen."""
    matmul = torch.backends.cuda.matmul
    return (
        torch.are_deterministic_algorithms_enabled(),
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch.backends.cuda.preferred_blas_library(),
    )


def _linears(architecture: Architecture, index: int) -> Sequence[torch.nn.Module]:
    mlp = architecture.mlp_projections(index)
    return (*architecture.attention_projections(index), *(mlp or ()))


def _norms(architecture: Architecture) -> list[torch.nn.Module]:
    norms: list[torch.nn.Module | None] = [architecture.last_norm]
    for index in range(architecture.num_layers):
        norms += [architecture.attention_norm(index), architecture.mlp_norm(index)]
        norms += _head_norms(architecture, index)
    return [norm for norm in norms if norm is not None]


def _head_norms(architecture: Architecture, index: int) -> list[torch.nn.Module]:
    """Norms of the heads of queries and keys, where there are some."""
    attention: Any = architecture.layer(index).self_attn
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return [norm for norm in norms if norm is not None]


def _activation(layer: Any) -> Any:
    """What stands between the projections of a layer's MLP."""
    owner = layer if hasattr(layer, "activation_fn") else getattr(layer, "mlp", None)
    return getattr(owner, "activation_fn", getattr(owner, "act_fn", None))


def _unknown_part(architecture: Architecture, index: int) -> str | None:
    """A part of a layer that may do more than a graph repeats, which runs Python; None: none."""
    layer: Any = architecture.layer(index)
    for module in (_activation(layer), *_head_norms(architecture, index)):
        cls: Any = type(module)
        own = cls.__module__.startswith(("torch.nn.", "transformers."))
        if not own or not has_own_forward(cls) or is_intercepted(module):
            return f"{kind_of(module)} that may have hooks"
    if layer.gradient_checkpointing and not is_plain_checkpoint(_checkpoint(layer)):
        return "a checkpoint function of its own"
    return None


def _checkpoint(layer: Any) -> Any:
    return getattr(layer, "_gradient_checkpointing_func", None)


def _trained(tensors: Sequence[Tensor]) -> list[Tensor]:
    found = {id(x): x for x in tensors if x.requires_grad}
    return list(found.values())


def state_of(architecture: Architecture) -> State:
    """Reads the modules, which takes milliseconds.

    Modules whose type or attributes count are in it themselves, so that no other one takes over
    their number (`id`) while this is kept.
    """
    said: list[Hashable] = [architecture.config.vocab_size]
    read: list[Tensor | None] = []
    merged: list[list[str]] = []
    for index in range(architecture.num_layers):
        layer: Any = architecture.layer(index)
        activation = _activation(layer)
        said += (layer.training, getattr(layer, "dropout", None))
        said += (architecture.scale(index), architecture.window(index))
        said += (activation, is_intercepted(activation))
        said.append(layer.gradient_checkpointing and _checkpoint(layer))
        for module in _linears(architecture, index):
            if "merged_adapters" in vars(module):
                merged.append(vars(module)["merged_adapters"])
            linear = adapted(module)
            if isinstance(linear, str):
                said.append(linear)
                continue
            said += (id(linear.base), linear.casts, is_intercepted(linear.base))
            read += linear.base._parameters.values()
            for pair in linear.pairs:
                said += (pair.scaling, pair.dropout)
                read += pair[:4]
    for module in (*_norms(architecture), architecture.lm_head):
        active = active_module(module)
        eps = getattr(active, "variance_epsilon", getattr(active, "eps", None))
        said += (active, is_intercepted(active), eps)
        read += active._parameters.values()
    tensors = [x for x in read if x is not None]
    said += [None if x is None else _described(x) for x in read]
    return State(tuple(said), tensors, merged)


def _described(x: Tensor) -> Hashable:
    """Where a weight is, and how it is read."""
    return place_of(x), x.stride(), x.shape, x.dtype, x.requires_grad
