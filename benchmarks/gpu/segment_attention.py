"""segment_attention beside PyTorch's FlashAttention-2 and cuDNN attention."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.bench import HEADS, KV_HEADS, Bench
from lemo import ops

# Tokens of one causal sequence, and packed mixtures of lengths; heads as in Llama-3-8B.
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
MIXTURES = ((16384, 8192, 4096, 2048, 1024, 512, 512), (4096,) * 16)
HEAD_SIZES = (128, 64)
FLASH, CUDNN = "PyTorch FlashAttention-2", "PyTorch cuDNN attention"
# Query-key pairs of one measurement, at least: so that the GPU never waits for the host.
PAIRS = 2**30


def dense_backends(b: Bench) -> dict[str, SDPBackend]:
    """PyTorch's attention that runs on the device."""
    found = {FLASH: SDPBackend.FLASH_ATTENTION}
    return found | ({CUDNN: SDPBackend.CUDNN_ATTENTION} if b.device == "cuda" else {})


def dense_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One causal sequence through PyTorch; [1, heads, tokens, head size]."""
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)


def differentiate(outs, leaves, gradients):
    return torch.autograd.grad(outs, leaves, gradients, retain_graph=True)


def one_by_one(backend: SDPBackend, inputs: list[Tensor], dout: Tensor, lengths):
    """Forward and backward of a peer, a call for each sequence."""
    q, k, v = (tensor.split(lengths) for tensor in inputs)
    sequences = [
        [tensor.detach().requires_grad_() for tensor in sequence] for sequence in zip(q, k, v)
    ]

    def forward():
        return [dense_attention(backend, *sequence) for sequence in sequences]

    gradients = [part.transpose(0, 1)[None] for part in dout.split(lengths)]
    return forward, partial(differentiate, forward(), list(itertools.chain(*sequences)), gradients)


def packed_flash(inputs: list[Tensor], dout: Tensor, cu: Tensor, longest: int):
    """Forward and backward of FlashAttention-2 on packed sequences."""
    q, k, v = (tensor.detach() for tensor in inputs)
    scale = q.shape[-1] ** -0.5

    def forward():
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=scale
        )

    out, lse, seed, offset, _ = forward()

    def backward():
        return torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, cu, cu, longest, longest, 0.0, True, seed, offset, scale=scale
        )

    return forward, backward


def peers_of(b: Bench, inputs: list[Tensor], dout: Tensor, cu: Tensor, lengths):
    """Pairs of forward and backward by name."""
    backends = dense_backends(b)
    if len(lengths) == 1:
        return {name: one_by_one(each, inputs, dout, lengths) for name, each in backends.items()}
    found = {}
    if b.device == "cuda":
        name = f"{CUDNN}, a call for each sequence"
        found[name] = one_by_one(backends[CUDNN], inputs, dout, lengths)
        found[f"{FLASH}, packed"] = packed_flash(inputs, dout, cu, max(lengths))
    return found


def rows(b: Bench):
    cases = [((tokens,), size) for size in HEAD_SIZES for tokens in LENGTHS]
    for lengths, size in [*cases, *((mixture, HEAD_SIZES[0]) for mixture in MIXTURES)]:
        yield from rows_of(b, [b.size(length) for length in lengths], size)


def rows_of(b: Bench, lengths: list[int], size: int):
    tokens = sum(lengths)
    q, k, v = inputs = [
        b.randn(tokens, heads, size, grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    dout = b.randn(tokens, HEADS, size)
    cuts = [0, *itertools.accumulate(lengths)]
    cu = torch.tensor(cuts, dtype=torch.int32, device=b.device)
    shape = {"tokens": tokens, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": size}
    shape |= {"dtype": "bfloat16", "causal": True}
    shape |= {"lengths": lengths} if len(lengths) > 1 else {}
    # Multiply-adds of the visible half, twice forward and five times backward.
    pairs = sum(length * length for length in lengths)
    tera = pairs * size * HEADS / 1e12
    often = {"repeats": 5, "calls": max(1, min(10, PAIRS // pairs))}

    peers = peers_of(b, inputs, dout, cu, lengths)
    forward = partial(ops.segment_attention, q, k, v, cu)
    out = forward()
    backward = partial(differentiate, out, inputs, dout)
    if len(lengths) == 1:
        for name, (peer_forward, peer_backward) in peers.items():
            b.agree(f"segment_attention, {name}", [out], [peer_forward()[0][0].transpose(0, 1)])
            b.agree(f"segment_attention_backward, {name}", backward(), peer_backward())
    with torch.no_grad():
        yield from b.compare(
            "segment_attention",
            shape,
            forward,
            {name: pair[0] for name, pair in peers.items()},
            tera=2 * tera,
            **often,
        )
    yield from b.compare(
        "segment_attention_backward",
        shape,
        backward,
        {name: pair[1] for name, pair in peers.items()},
        tera=5 * tera,
        **often,
    )

    def deterministic():
        torch.use_deterministic_algorithms(True)
        backward()
        torch.use_deterministic_algorithms(False)

    name = "segment_attention_backward"
    any_order = {f"{name} in any order": backward}
    yield from b.compare(f"{name} deterministic", shape, deterministic, any_order, **often)
