"""FlashAttention-4 as attention of Transformers, by operators that checkpointing can store."""

from __future__ import annotations

from typing import Any

import torch
from flash_attn.cute import interface
from torch import Tensor

__all__ = ["attend"]


@torch.library.custom_op("comparison::flash_attention_4", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of [B, S, H, D]: the result, and the logarithms of the sums."""
    found = interface._flash_attn_fwd(q, k, v, softmax_scale=scale, causal=True, return_lse=True)
    return found[0], found[1]


@torch.library.custom_op("comparison::flash_attention_4_backward", mutates_args=())
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = interface._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=scale, causal=True)
    return found[0], found[1], found[2]


def _store(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.scale = inputs[3]


def _gradient(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(dout.contiguous(), *ctx.saved_tensors, ctx.scale), None


attention.register_autograd(_gradient, setup_context=_store)


def attend(
    _module: object,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _mask: Tensor | None = None,
    scaling: float = 1.0,
    **_: object,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls, with [B, H, S, D]."""
    rows = [each.transpose(1, 2).contiguous() for each in (q, k, v)]
    return attention(*rows, scaling)[0], None
