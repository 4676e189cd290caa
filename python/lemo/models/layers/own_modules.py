"""Modules of the native path with code that no library wrote, on a few made-up rows.

lemo calls what it does not compute itself (norms, MLPs, projections, the head) with kept rows,
[R, H], where the model has [B, S, H]. That is the same where such a module treats each token by
itself and counts dimensions from the last. A user's may not: it may mix tokens, or take the second
dimension for that of tokens, and compute another number without an error.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lemo.models.calls.eval_mode import evaluating
from lemo.models.calls.interception import is_foreign
from lemo.models.layers.architectures import Architecture
from lemo.models.memory.sharded import is_sharded
from lemo.models.projections.linear import apply_linear

__all__ = ["check_own_modules", "difference_of_rows", "may_differ"]

_ROWS = 16
# By how much a row may differ that the same products make among fewer others, as a share of it:
# where all is fp32, and where something is in fewer bits.
_TOLERANCES = 1e-3, 0.1
# What code raises that expects another shape.
_OF_SHAPES = (IndexError, RuntimeError, TypeError, ValueError)


class _Place(NamedTuple):
    """A module that lemo may call.

    Attributes:
        module: it.
        compute: what lemo makes of rows in its place, [R, *shape] -> [R, ...].
        shape: of a row.
    """

    module: nn.Module
    compute: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]


@torch.no_grad()
def check_own_modules(architecture: Architecture) -> None:
    """Compares rows by themselves with sequences of them.

    Weights that FSDP2 shards cannot be looked at.

    Args:
        architecture: access to the model.

    Raises:
        ValueError: a module differs or fails; the message names it.
    """
    causal_lm = architecture.causal_lm
    names = {module: name for name, module in causal_lm.named_modules()}
    weight = causal_lm.get_input_embeddings().weight
    generator = torch.Generator("cpu").manual_seed(0)
    for place in _places(architecture):
        parts = list(place.module.modules())
        own = [type(part) for part in parts if is_foreign(part)]
        if not own or any(map(is_sharded, parts)):
            continue
        rows = torch.randn(_ROWS, *place.shape, generator=generator, device="cpu").to(weight)
        with evaluating(place.module):
            found = _found(place, rows)
        if found is None:
            continue
        code = ", ".join(dict.fromkeys(f"{cls.__module__}.{cls.__name__}" for cls in own))
        raise ValueError(
            f"model: expected {names[place.module]} ({code}) to treat each token by itself, in "
            f"rows [tokens, features] as in sequences [batch, tokens, features]; {found}. Use "
            "LemoConfig(path='generic'), which gives it sequences, or train without lemo"
        )


def _places(architecture: Architecture) -> Iterator[_Place]:
    hidden = (architecture.config.hidden_size,)
    for index in range(architecture.num_layers):
        for norm in (architecture.attention_norm(index), architecture.mlp_norm(index)):
            yield _Place(norm, norm, hidden)
        layer: Any = architecture.layer(index)
        attention, heads = layer.self_attn, architecture.config.num_attention_heads
        *inner, output = architecture.attention_projections(index)
        for projection in inner:
            yield _Place(projection, partial(apply_linear, projection), hidden)
        yield _Place(output, partial(apply_linear, output), (heads * attention.head_dim,))
        for name in ("q_norm", "k_norm"):
            if name in attention._modules:
                norm = attention._modules[name]
                yield _Place(norm, norm, (heads, attention.head_dim))
        if "mlp" in layer._modules:
            yield _Place(layer.mlp, partial(architecture.mlp, index), hidden)
            continue
        for projection, width in zip(
            architecture.mlp_projections(index) or (), (*hidden, architecture.mlp_width)
        ):
            yield _Place(projection, partial(apply_linear, projection), (width,))
    if architecture.last_norm is not None:
        yield _Place(architecture.last_norm, architecture.last_norm, hidden)
    head = architecture.lm_head
    yield _Place(head, head, (architecture.causal_lm.get_input_embeddings().weight.shape[1],))


def _found(place: _Place, rows: Tensor) -> str | None:
    """What is wrong with a module on rows [R, ...]; None: nothing."""
    expected = place.module(rows[None])[0]
    try:
        got = place.compute(rows[::2])
    except _OF_SHAPES as error:
        return f"rows give {type(error).__name__}: {error}"
    if got.shape != expected[::2].shape:
        return f"rows give {list(got.shape)}, expected {list(expected[::2].shape)}"
    difference = difference_of_rows(got, expected[::2])
    if difference <= may_differ(place.module, rows.device):
        return None
    return f"rows among others differ by {difference:.2g} of themselves"


def difference_of_rows(rows: Tensor, expected: Tensor) -> float:
    """By which share of itself a row differs, on average.

    Args:
        rows: [R, H].
        expected: the same, as they should be.
    """
    rows, expected = rows.float(), expected.float()
    norm = expected.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((rows - expected).norm(dim=-1) / norm).mean())


def may_differ(module: nn.Module, device: torch.device) -> float:
    """By how much rounding may let `difference_of_rows` be.

    Args:
        module: computes the rows.
        device: on which it does.
    """
    autocast = torch.is_autocast_enabled(device.type)
    return _TOLERANCES[autocast or any(p.dtype.itemsize < 4 for p in module.parameters())]
