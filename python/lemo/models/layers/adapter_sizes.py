"""The sizes of a model's adapters, as the planner has to know them."""

from __future__ import annotations

import torch
from torch import nn

from lemo.models.layers.architectures import Architecture
from lemo.models.projections.adapters import adapted
from lemo.models.projections.weights import stored_as
from lemo.planner.shape import LINEAR, Adapters

__all__ = ["adapters_of_layer", "adapters_of_layers", "weights_stored_as"]


def adapters_of_layers(
    architecture: Architecture, dtype: torch.dtype, autocast: bool
) -> list[Adapters] | None:
    """LoRA on each layer of a decoder; None where one of them trains something else."""
    found = []
    for index in range(architecture.num_layers):
        each = adapters_of_layer(architecture.layer(index), dtype, autocast)
        if each is None:
            return None
        found.append(each)
    return found


def weights_stored_as(architecture: Architecture) -> str | None:
    """What the planner calls the way in which a decoder's weights are stored; None: plain.

    Some may be plain where others are not.
    """
    found = set()
    for layer in map(architecture.layer, range(architecture.num_layers)):
        for name in LINEAR:
            part = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            linear = adapted(getattr(part, name))
            found.add(None if isinstance(linear, str) else stored_as(linear.base))
    # The way of which most is made for a moment.
    return next((way for way in ("float8", "torchao_int", "nf4") if way in found), None)


def adapters_of_layer(layer: nn.Module, dtype: torch.dtype, autocast: bool) -> Adapters | None:
    """LoRA on a decoder layer; None where it trains something else.

    Args:
        layer: of Llama's kind.
        dtype: of its activations.
        autocast: whether autocast is on.
    """
    known: set[int] = set()
    ranks: dict[str, int] = {}
    sizes, dropout = set(), False
    for name in LINEAR:
        part = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        module = getattr(part, name, None)
        if module is None:
            return None
        linear = adapted(module)
        if isinstance(linear, str) or len(linear.pairs) > 1:
            return None
        for pair in linear.pairs:
            if pair.bias is not None or pair.magnitude is not None:
                return None
            known |= {id(pair.a), id(pair.b)}
            sizes.add(pair.a.dtype)
            ranks[name] = pair.a.shape[0]
            dropout |= pair.dropout > 0
    norms = False
    for name, module in layer.named_modules():
        if "norm" in name.rpartition(".")[2] or ".modules_to_save" in name:
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    known.add(id(parameter))
                    sizes.add(parameter.dtype)
                    norms = True
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    if any(id(parameter) not in known for parameter in trained) or len(sizes) > 1:
        return None
    adapter = next(iter(sizes), dtype)
    return Adapters.of_ranks(
        ranks,
        size=adapter.itemsize,
        apart=adapter != dtype and not autocast,
        dropout=dropout,
        norms=norms,
    )
