"""The one place that knows how each architecture names and connects its parts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from lemo import ops
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.interception import (
    check_parts,
    has_own_forward,
    is_intercepted,
    own_module,
    works_row_by_row,
)
from lemo.models.layers.batch import Batch
from lemo.models.memory import sharded
from lemo.models.projections.fp8 import share, shared_rows
from lemo.models.projections.linear import apply_linear, apply_linears, reads_fp8
from lemo.ops.select_norm import select_norm_into
from lemo.packing.batch import PackedBatch, shape_of
from lemo.packing.to_device import to_device

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "GradientTarget",
    "active_module",
    "architecture_of",
    "is_known",
]


class GradientTarget(NamedTuple):
    """Where backward may add the gradient of gathered rows itself: `gradient[rows]`.

    Attributes:
        gradient: [T, H], of the residual or a slice of it.
        rows: [R] int32; None: R == T, all of them.
    """

    gradient: Tensor
    rows: Tensor | None


class Architecture:
    """Uniform access to the parts of a Llama-like causal LM (RMSNorm, rotary, gated MLP).

    Submodules are looked up at every call, so whatever wraps them later (LoRA, modules_to_save) is
    honoured. `x` of the methods below is packed, [rows, H].
    """

    decoder_path = "model"
    norm_kind = "rms"
    attention_norm_name = "input_layernorm"
    mlp_norm_name = "post_attention_layernorm"
    final_norm_name = "norm"
    output_name = "o_proj"
    dropout_name = "attention_dropout"

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        self.causal_lm = causal_lm

    @property
    def config(self) -> Any:
        """The model's Transformers configuration."""
        return self.causal_lm.config

    @property
    def embedding(self) -> Tensor | None:
        """The weight of the token embedding, [V, H]; None where a module of another kind embeds."""
        return getattr(self.decoder.embed_tokens, "weight", None)

    @property
    def decoder(self) -> nn.Module:
        """The stack of embedding, layers and final norm: token ids -> hidden states [rows, H]."""
        module: nn.Module = self.causal_lm
        # By hand, as below: a pass asks for each layer a dozen times.
        for name in self.decoder_path.split("."):
            module = module._modules[name]
        return module

    @property
    def lm_head(self) -> nn.Module:
        """Hidden states [rows, H] -> logits [rows, V]."""
        return self.causal_lm.lm_head

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return self.config.num_hidden_layers

    def layer(self, index: int) -> nn.Module:
        """One layer of the decoder, attention and MLP with their norms."""
        return own_module(self.decoder._modules["layers"]._modules[str(index)])

    def check_supported(self) -> None:
        """Raises ValueError where elimination in training would not compute what the model does."""
        self.check_parts()
        devices = sorted({str(parameter.device) for parameter in self.causal_lm.parameters()})
        if len(devices) > 1:
            raise ValueError(
                f"model: expected all parameters on one device, got {', '.join(devices)}"
            )

    def check_parts(self) -> None:
        """Raises ValueError where somebody changed what lemo runs itself; cheap."""
        decoder = self.decoder
        sharded.check_unflattened(self.causal_lm)
        sharded.check_layers(decoder.layers)
        check_parts(decoder, self.config, self.dropout_name)

    # Embedding

    def embed(self, arguments: ForwardArguments, block_size: int | float) -> tuple[Batch, Tensor]:
        """The packed batch and its residual [T, H], a fresh tensor that may be overwritten.

        Positions default to what the architecture itself uses for this mask.

        Args:
            arguments: those of a call.
            block_size: tokens of a block, or a share of the longest sequence.
        """
        return self.embed_rows(arguments, self.batch_of(arguments, block_size))

    def batch_of(self, arguments: ForwardArguments, block_size: int | float) -> Batch:
        """The packed batch without tables of rotations, before anything is embedded.

        Args:
            arguments: those of a call.
            block_size: tokens of a block, or a share of the longest sequence.
        """
        ids, embedded = arguments.input_ids, arguments.inputs_embeds
        shape = shape_of(ids, embedded)
        device = next(given.device for given in (embedded, ids) if given is not None)
        packed = PackedBatch(shape, arguments.attention_mask, arguments.position_ids, device)
        batch = Batch.of(packed, block_size, device)
        return batch if ids is None else replace(batch, ids=packed.pack(ids))

    def embed_rows(
        self, arguments: ForwardArguments, batch: Batch, rows: Tensor | None = None
    ) -> tuple[Batch, Tensor]:
        """The batch with the tables of some rows, and their residual, a fresh tensor.

        Other rows cost nothing, unless somebody's hook on the embedding may look at all of them,
        or the model has learned positions.

        Args:
            arguments: those of the call.
            batch: from `batch_of`.
            rows: [R] int32, ascending; None: all T.
        """
        for module in (*self.decoder.children(), self.lm_head):
            if module is not self.decoder.layers and not sharded.is_sharded(module):
                sharded.check_whole(module, type(module).__name__)
        packed, embedded = batch.packed, arguments.inputs_embeds
        mask, position_ids = arguments.attention_mask, arguments.position_ids
        if position_ids is not None:
            position_ids = to_device(position_ids, batch.layout.block_starts.device)
        if rows is not None and self._embeds_row_by_row:
            if embedded is None:
                assert batch.ids is not None
                residual = self.decoder.embed_tokens(batch.ids.index_select(0, rows)[None])[0]
                residual = residual.clone(memory_format=torch.contiguous_format)
            else:
                residual = packed.pack(embedded).index_select(0, rows)
            rotary = self._rotary(residual, batch, position_ids, rows)
            return replace(batch, rotary=rotary), residual
        if embedded is None:
            embedded = self.decoder.embed_tokens(arguments.input_ids)
        batch = replace(batch, rotary=self._rotary(embedded, batch, position_ids))
        residual = packed.pack(self._add_positions(embedded, mask, position_ids))
        if rows is not None:
            return batch.of_rows(rows), residual.index_select(0, rows)
        # A gather is already fresh; anything else may be the caller's or the embedding's tensor.
        if not packed.is_padded:
            residual = residual.clone(memory_format=torch.contiguous_format)
        return batch, residual

    @property
    def _embeds_row_by_row(self) -> bool:
        """Whether the embedding of a token depends on nothing but the token."""
        return all(map(works_row_by_row, self.decoder.embed_tokens.modules()))

    def _rotary(
        self,
        embedded: Tensor,
        batch: Batch,
        position_ids: Tensor | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """(cos, sin), [T, D] each, or of some rows.

        Args:
            embedded: of the dtype and on the device of the tables.
            batch: the packed batch.
            position_ids: [B or 1, S]; None: 0, 1, 2, ...
            rows: [R] int32; None: all T.
        """
        packed = batch.packed
        if position_ids is None:
            position_ids = torch.arange(packed.shape[1], device=embedded.device)[None]
        rotation = self.decoder.rotary_emb
        if rows is None:
            tables = (
                packed.pack(t.expand(*packed.shape, -1)) for t in rotation(embedded, position_ids)
            )
        else:
            # Some kinds of rotation depend on the largest position of the batch.
            positions = packed.pack(position_ids.expand(packed.shape)).index_select(0, rows)
            positions = torch.cat((positions, position_ids.max()[None]))[None]
            tables = (table[0, :-1].contiguous() for table in rotation(embedded, positions))
        cos, sin = tables
        return cos, sin

    def _add_positions(
        self, embedded: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """The embedded tokens [B, S, H], with learned positions where there are any."""
        return embedded

    # Norms

    def attention_norm(self, index: int) -> nn.Module:
        """The norm in front of a layer's attention, [rows, H] -> [rows, H]."""
        return getattr(self.layer(index), self.attention_norm_name)

    def mlp_norm(self, index: int) -> nn.Module:
        """The norm in front of a layer's MLP, [rows, H] -> [rows, H]."""
        return getattr(self.layer(index), self.mlp_norm_name)

    def residual_norm(
        self, residual: Tensor, norm: nn.Module, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(residual, norm(residual[rows])): fused where the norm is the architecture's plain one.

        Args:
            residual: [T, H].
            norm: [R, H] -> [R, H].
            rows: [R] int32; None: all.
        """
        plain = self._plain_norm(norm, residual.dtype)
        if plain is None:
            residual, x = ops.residual_gather(residual, rows)
            return residual, norm(x)
        weight, bias, eps = plain
        return ops.residual_select_norm(
            residual, weight, bias, rows=rows, eps=eps, kind=self.norm_kind
        )

    def normalize(self, x: Tensor, norm: nn.Module, target: GradientTarget | None = None) -> Tensor:
        """norm(x) of gathered rows.

        With a target, backward may add the gradient of `x` there instead of giving it to `x`; it
        does where the norm is the plain one.
        """
        plain = self._plain_norm(norm, x.dtype)
        if plain is None:
            return norm(x)
        weight, bias, eps = plain
        if target is not None and x.requires_grad:
            gradient, rows = target
            return select_norm_into(x, weight, bias, rows, gradient, eps, self.norm_kind)
        return ops.select_norm(x, weight, bias, eps=eps, kind=self.norm_kind)

    def normalized(self, index: int, kind: str, residual: Tensor) -> Tensor:
        """[T, H], what the norm of sub-block `kind` makes of the residual."""
        attention = kind == "attention"
        norm = self.attention_norm(index) if attention else self.mlp_norm(index)
        return self.normalize(residual, norm)

    def runs_norm(self, norm: nn.Module, dtype: torch.dtype) -> bool:
        """Whether lemo's kernel computes this norm, of rows of `dtype`."""
        return self._plain_norm(norm, dtype) is not None

    def _plain_norm(
        self, norm: nn.Module, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, float] | None:
        """(weight, bias, eps) if lemo's kernel computes exactly this module, else None."""
        norm = active_module(norm)
        if self.norm_kind == "layer":
            plain = type(norm) is nn.LayerNorm
        else:
            plain = _is_transformers(norm, "RMSNorm")
        if not plain or is_intercepted(norm) or norm.weight is None or norm.weight.dtype != dtype:
            return None
        eps = norm.eps if self.norm_kind == "layer" else norm.variance_epsilon
        return norm.weight, getattr(norm, "bias", None), eps

    # Attention

    def window(self, index: int) -> int:
        """Tokens a query sees back, itself included; 0: all."""
        return 0

    def scale(self, index: int) -> float:
        """What products of queries and keys are multiplied with."""
        return self.layer(index).self_attn.scaling

    def queries(self, index: int, x: Tensor, values: bool = True) -> Tensor:
        """[rows, Hq, D], before rotation.

        Without `values` only gradients of the result count.
        """
        return self._heads(index, x, ("q_proj",), values)[0]

    def keys(self, index: int, x: Tensor) -> Tensor:
        """[rows, Hk, D], before rotation."""
        return self._heads(index, x, ("k_proj",))[0]

    def keys_values(self, index: int, x: Tensor, values: bool = True) -> Sequence[Tensor]:
        """Keys, before rotation, and values, [rows, Hk, D] each; `values` as for `queries`."""
        return self._heads(index, x, ("k_proj", "v_proj"), values)

    def queries_keys_values(self, index: int, x: Tensor, values: bool = True) -> Sequence[Tensor]:
        """`queries` and `keys_values` of the same rows."""
        return self._heads(index, x, ("q_proj", "k_proj", "v_proj"), values)

    def attention_projections(self, index: int) -> tuple[nn.Module, ...]:
        """The linear layers of a layer's attention: queries, keys, values, and behind the heads."""
        attention = self.layer(index).self_attn
        return tuple(
            getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", self.output_name)
        )

    def _heads(
        self, index: int, x: Tensor, names: Sequence[str], values: bool = True
    ) -> list[Tensor]:
        attention = self.layer(index).self_attn
        projected = apply_linears([getattr(attention, name) for name in names], x, values)
        return [y.unflatten(-1, (-1, attention.head_dim)) for y in projected]

    def rotated(self, index: int, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Queries and keys of every row of the batch, as attention multiplies them."""
        return batch.rotate(self.queries(index, x)), batch.rotate(self.keys(index, x))

    def attention_output(self, index: int, heads: Tensor, values: bool = True) -> Tensor:
        """What attention adds to the residual, [rows, H], from its heads [rows, Hq, D].

        Without `values` only gradients of the result count.
        """
        projection = getattr(self.layer(index).self_attn, self.output_name)
        return apply_linear(projection, heads.flatten(1), values)

    # MLP

    @property
    def mlp_width(self) -> int:
        """Features of the MLP's activation."""
        return self.config.intermediate_size

    def mlp(
        self, index: int, x: Tensor, values: bool = True, activation: Tensor | None = None
    ) -> Tensor:
        """What the MLP adds to the residual, [rows, H].

        Args:
            index: the layer.
            x: [rows, H], normalized.
            values: as for `attention_output`.
            activation: [rows, F] where it is there already; not read where the MLP runs as the
                module that somebody has changed.
        """
        mlp = self.layer(index).mlp
        if self.mlp_projections(index) is None:
            return mlp(x)
        with shared_rows():
            if activation is None:
                rounds = values and reads_fp8(mlp.down_proj, x.dtype)
                activation = self.activation(index, x, rounds)
            return apply_linear(mlp.down_proj, activation, values)

    def mlp_projections(self, index: int) -> tuple[nn.Module, ...] | None:
        """The linear layers of a layer's MLP; None: it runs as the module that it is."""
        mlp = self.layer(index).mlp
        if not _is_transformers(mlp, "MLP") or is_intercepted(mlp):
            return None
        return mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def activation(self, index: int, x: Tensor, rounds: bool = False) -> Tensor:
        """What the MLP's last projection sees, [rows, F]: act(gate) * up, or act(fc1).

        With `rounds` it is also rounded to 8 bits where that costs no pass of its own.
        """
        mlp = self.layer(index).mlp
        with shared_rows():
            gate, up = apply_linears((mlp.gate_proj, mlp.up_proj), x)
        if _is_silu(mlp.act_fn) and gate.dtype == up.dtype:
            if not rounds:
                return ops.swiglu(gate, up)
            y, rows = ops.swiglu_fp8(gate, up)
            share(y, rows)
            return y
        return mlp.act_fn(gate) * up

    # Output

    def final_norm(self, residual: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(residual, what the head reads of residual[rows])."""
        return self.residual_norm(residual, getattr(self.decoder, self.final_norm_name), rows)

    @property
    def last_norm(self) -> nn.Module | None:
        """The norm behind the layers; None: there is none."""
        return getattr(self.decoder, self.final_norm_name)

    @contextmanager
    def without_dropout(self, index: int) -> Iterator[None]:
        """For scores of blocks, which should neither depend on a dropout draw nor make one."""
        active = [
            module
            for module in self.layer(index).modules()
            if isinstance(module, nn.Dropout) and module.training
        ]
        for module in active:
            module.training = False
        try:
            yield
        finally:
            for module in active:
                module.training = True


class MistralArchitecture(Architecture):
    """Every layer has the window of the config."""

    def window(self, index: int) -> int:
        return self.config.sliding_window or 0


class Qwen2Architecture(Architecture):
    """The window is a layer's own: `layer_types` of the config."""

    def window(self, index: int) -> int:
        return self.layer(index).self_attn.sliding_window or 0


class Qwen3Architecture(Qwen2Architecture):
    """Queries and keys are normalized head by head before they are rotated.

    The gradients of the norms need the values.
    """

    def _heads(
        self, index: int, x: Tensor, names: Sequence[str], values: bool = True
    ) -> list[Tensor]:
        attention = self.layer(index).self_attn
        norms = {"q_proj": attention.q_norm, "k_proj": attention.k_norm}
        heads = super()._heads(index, x, names)
        return [norms[name](y) if name in norms else y for name, y in zip(names, heads)]


class OPTArchitecture(Architecture):
    """LayerNorm, learned positions, biases, an MLP without a gate, dropout after each sub-block."""

    decoder_path = "model.decoder"
    norm_kind = "layer"
    attention_norm_name = "self_attn_layer_norm"
    mlp_norm_name = "final_layer_norm"
    final_norm_name = "final_layer_norm"
    output_name = "out_proj"
    dropout_name = "dropout"

    def check_parts(self) -> None:
        super().check_parts()
        if not self.config.do_layer_norm_before:
            raise ValueError(
                "model: expected do_layer_norm_before=True, got False (OPT-350m): a norm after "
                "the residual addition changes rows that are not kept"
            )
        if self.decoder.layerdrop:
            raise ValueError(
                f"model: expected layerdrop 0, got {self.decoder.layerdrop}; load the model with "
                "layerdrop=0.0"
            )

    def _rotary(
        self,
        embedded: Tensor,
        batch: Batch,
        position_ids: Tensor | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        return None

    @property
    def _embeds_row_by_row(self) -> bool:
        return False  # positions are counted over the mask

    def _add_positions(
        self, embedded: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        decoder = self.decoder
        if attention_mask is None:
            attention_mask = torch.ones(embedded.shape[:2], device=embedded.device)
        # With position_ids None the embedding counts the ones of the mask itself.
        positions = decoder.embed_positions(attention_mask, 0, position_ids=position_ids)
        if decoder.project_in is not None:
            embedded = decoder.project_in(embedded)
        return embedded + positions.to(embedded.device)

    def attention_output(self, index: int, heads: Tensor, values: bool = True) -> Tensor:
        return self._drop(index, super().attention_output(index, heads, values))

    @property
    def mlp_width(self) -> int:
        return self.config.ffn_dim

    def mlp(
        self, index: int, x: Tensor, values: bool = True, activation: Tensor | None = None
    ) -> Tensor:
        if activation is None:
            activation = self.activation(index, x)
        return self._drop(index, apply_linear(self.layer(index).fc2, activation, values))

    def mlp_projections(self, index: int) -> tuple[nn.Module, ...]:
        layer = self.layer(index)
        return layer.fc1, layer.fc2

    def activation(self, index: int, x: Tensor, rounds: bool = False) -> Tensor:
        layer = self.layer(index)
        return layer.activation_fn(apply_linear(layer.fc1, x))

    def final_norm(self, residual: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.decoder.final_layer_norm is None:
            residual, hidden = ops.residual_gather(residual, rows)
        else:
            residual, hidden = super().final_norm(residual, rows)
        project_out = self.decoder.project_out
        return residual, hidden if project_out is None else project_out(hidden)

    def _drop(self, index: int, y: Tensor) -> Tensor:
        layer = self.layer(index)
        return dropout(y, p=layer.dropout, training=layer.training)


ARCHITECTURES: dict[str, type[Architecture]] = {
    "LlamaForCausalLM": Architecture,
    "MistralForCausalLM": MistralArchitecture,
    "Qwen2ForCausalLM": Qwen2Architecture,
    "Qwen3ForCausalLM": Qwen3Architecture,
    "OPTForCausalLM": OPTArchitecture,
}


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of the causal LM inside `model`, which PEFT and others may have wrapped.

    Raises:
        TypeError: `model` is no torch module, or holds no supported causal LM.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    for module in model.modules():
        if _is_known_class(module):
            return ARCHITECTURES[sharded.own_class(module).__name__](module)
    raise TypeError(
        f"model: expected one of {', '.join(ARCHITECTURES)} (possibly wrapped by PEFT), "
        f"got {type(model).__name__}"
    )


def is_known(model: nn.Module) -> bool:
    """Whether there is a causal LM inside `model` whose architecture is known exactly."""
    return any(map(_is_known_class, model.modules()))


def _is_known_class(module: nn.Module) -> bool:
    cls = sharded.own_class(module)
    of_transformers = cls.__module__.startswith("transformers.models.")
    return of_transformers and cls.__name__ in ARCHITECTURES


def active_module(module: nn.Module) -> nn.Module:
    """The module that runs inside PEFT's `modules_to_save` wrapper; others are returned as is."""
    if not (hasattr(module, "original_module") and hasattr(module, "modules_to_save")):
        return module
    active = module.active_adapters
    if module.disable_adapters or not active or active[0] not in module.modules_to_save:
        return module.original_module
    return module.modules_to_save[active[0]]


def _is_transformers(module: nn.Module, ending: str) -> bool:
    """Whether the class is one of Transformers' own of such a name: LlamaMLP, Qwen3RMSNorm, ..."""
    cls = type(module)
    of_transformers = cls.__module__.startswith("transformers.models.")
    return of_transformers and cls.__name__.endswith(ending) and has_own_forward(cls)


def _is_silu(activation: nn.Module) -> bool:
    return type(activation) in (nn.SiLU, SiLUActivation) and not is_intercepted(activation)
