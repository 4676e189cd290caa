"""segment_attention with the heads and scores of models beside PyTorch's attention.

Head sizes other than 64 and 128 beside cuDNN and FlashAttention-2, where they have kernels for
them; soft caps, sinks and windows beside FlexAttention, compiled. The backward pass of heads above
128 also beside lemo's portable kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpu.bench import Bench
from gpu.segment_attention import FLASH, dense_attention, dense_backends, differentiate
from lemo import ops

TOKENS = 16384
FLEX = "PyTorch FlexAttention"
PORTABLE = "segment_attention_backward, portable"


@dataclass(frozen=True)
class Model:
    """The attention of a layer; `value_size` 0: as `size`."""

    name: str
    heads: int
    kv_heads: int
    size: int
    value_size: int = 0
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @property
    def values(self) -> int:
        return self.value_size or self.size

    @property
    def plain(self) -> bool:
        return not (self.window or self.softcap or self.sinks)

    def pairs(self, tokens: int) -> int:
        """Query-key pairs that are seen."""
        window = min(self.window or tokens, tokens)
        return window * (window + 1) // 2 + (tokens - window) * window


MODELS = (
    Model("Phi-3-mini", 32, 32, 96),
    Model("Gemma-3-12B", 16, 8, 256),
    Model("DeepSeek-V2-Lite", 16, 16, 192, 128),
    Model("Gemma-2-27B", 32, 16, 128, softcap=50.0),
    Model("Gemma-2-9B", 16, 8, 256, softcap=50.0),
    Model("gpt-oss-20b", 64, 8, 64, sinks=True),
    Model("gpt-oss-20b", 64, 8, 64, window=128, sinks=True),
)


def flex(b: Bench, model: Model, tokens: int, sinks: Tensor | None) -> Callable[..., Tensor]:
    """The attention of a model through FlexAttention; [tokens, heads, head size]."""

    def visible(batch, head, query, key):
        seen = query >= key
        return seen & (query - key < model.window) if model.window else seen

    def capped(score, batch, head, query, key):
        return model.softcap * torch.tanh(score / model.softcap)

    mask = create_block_mask(visible, None, None, tokens, tokens, device=b.device)
    # Its backward pass is repeated: it may not overwrite what forward has stored.
    torch._functorch.config.donated_buffer = False
    # Each model has masks of its own, and PyTorch compiles one function only so many times.
    torch._dynamo.reset()
    run = torch.compile(flex_attention)
    score_mod = capped if model.softcap else None

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        settings = {"score_mod": score_mod, "block_mask": mask, "enable_gqa": True}
        if sinks is None:
            return run(q, k, v, **settings)[0].transpose(0, 1)
        out, lse = run(q, k, v, **settings, return_lse=True)
        # A further term of the sum of exponentials.
        share = torch.sigmoid(lse - sinks[:, None]).to(out.dtype)
        return (out * share[..., None])[0].transpose(0, 1)

    return forward


def through_sdpa(backend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense_attention(backend, q, k, v)[0].transpose(0, 1)


def peers_of(b: Bench, model: Model, tokens: int, sinks: Tensor | None):
    """Attention functions of (q, k, v) by name. FlexAttention has no backward pass on the CPU."""
    if not model.plain:
        return {FLEX: flex(b, model, tokens, sinks)} if b.device == "cuda" else {}
    found = {name: partial(through_sdpa, each) for name, each in dense_backends(b).items()}
    if model.values != model.size:
        found.pop(FLASH)  # takes one size only
        if b.device == "cuda":
            found[FLEX] = flex(b, model, tokens, sinks)
    return found


def rows(b: Bench):
    for model in MODELS:
        yield from rows_of(b, model)


def rows_of(b: Bench, model: Model):
    tokens = b.size(TOKENS)
    q = b.randn(tokens, model.heads, model.size, grad=True)
    k = b.randn(tokens, model.kv_heads, model.size, grad=True)
    v = b.randn(tokens, model.kv_heads, model.values, grad=True)
    sinks = b.randn(model.heads).float().requires_grad_() if model.sinks else None
    dout = b.randn(tokens, model.heads, model.values)
    cu = torch.tensor([0, tokens], dtype=torch.int32, device=b.device)
    shape = {"model": model.name, "tokens": tokens, "heads": model.heads}
    shape |= {"kv_heads": model.kv_heads, "head_size": model.size, "value_size": model.values}
    shape |= {"window": model.window, "softcap": model.softcap, "sinks": model.sinks}
    shape |= {"dtype": "bfloat16", "causal": True}

    settings = {"window": model.window, "softcap": model.softcap, "sinks": sinks}
    forward = partial(ops.segment_attention, q, k, v, cu, **settings)
    leaves = [q, k, v] if sinks is None else [q, k, v, sinks]
    out = forward()
    backward = partial(differentiate, out, leaves, dout)
    forwards, backwards = {}, {}
    for name, peer in peers_of(b, model, tokens, sinks).items():
        try:
            theirs = peer(q, k, v)
        except RuntimeError as refusal:
            if "No available kernel" not in str(refusal):
                raise
            print(f"{model.name}: {name} has no kernel")
            continue
        b.agree(f"{model.name}, {name}", out, theirs)
        b.agree(f"{model.name} backward, {name}", backward(), differentiate(theirs, leaves, dout))
        forwards[name] = partial(peer, q, k, v)
        backwards[name] = partial(differentiate, theirs, leaves, dout)
    # Multiply-adds, twice forward and five times backward.
    tera = 2 * model.pairs(tokens) * model.heads / 1e12
    often = {"repeats": 5, "calls": max(1, min(10, math.ceil(2**30 / model.pairs(tokens))))}
    with torch.no_grad():
        both = model.size + model.values
        name = "segment_attention of models"
        yield from b.compare(name, shape, forward, forwards, tera=both * tera, **often)
    if b.device == "cuda" and max(model.size, model.values) > 128:
        backwards[PORTABLE] = partial(differentiate, forward(kernel="portable"), leaves, dout)
        b.agree(f"{model.name} backward, {PORTABLE}", backward(), backwards[PORTABLE]())
    five = 3 * model.size + 2 * model.values
    name = "segment_attention_backward of models"
    yield from b.compare(name, shape, backward, backwards, tera=five * tera, **often)
