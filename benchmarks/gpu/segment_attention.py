"""segment_attention on CUDA, beside PyTorch's FlashAttention-2 and cuDNN attention."""

import itertools
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.harness import median_ms, record
from lemo import ops, reference

# Tokens of one causal sequence, and packed mixtures of lengths; heads as in Llama-3-8B.
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
MIXTURES = ((16384, 8192, 4096, 2048, 1024, 512, 512), (4096,) * 16)
HEAD_SIZES = (128, 64)
HEADS, KV_HEADS = 32, 8
FLASH, CUDNN = "PyTorch FlashAttention-2", "PyTorch cuDNN attention"
BACKENDS = {FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}
# Query-key pairs of one measurement, at least: so that the GPU never waits for the host.
PAIRS = 2**30


def relative_error(value: Tensor, oracle: Tensor) -> float:
    return ((value.float() - oracle).norm() / oracle.norm()).item()


def cuts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def check() -> None:
    """Errors at most twice plain torch's, on a length that the fp32 oracle can hold."""
    tokens, heads, kv_heads = 2000, 8, 2
    cu = cuts((1200, 800))
    for dtype in (torch.bfloat16, torch.float16):
        for size in HEAD_SIZES:
            shapes = [(tokens, h, size) for h in (heads, kv_heads, kv_heads, heads)]
            q, k, v, dout = (torch.randn(s, device="cuda", dtype=dtype) for s in shapes)

            def run(attention, q, k, v, dout):
                leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
                out = attention(*leaves)
                return out, *torch.autograd.grad(out, leaves, dout)

            def oracle(q, k, v, scale=size**-0.5):
                return reference.segment_attention(q, k, v, cu, cu, None, None, scale, 0, 0)[0]

            ours = run(lambda q, k, v: ops.segment_attention(q, k, v, cu), q, k, v, dout)
            plain = run(oracle, q, k, v, dout)
            wide = run(oracle, *(t.float() for t in (q, k, v, dout)))
            for name, value, rough, right in zip(("out", "dq", "dk", "dv"), ours, plain, wide):
                error, bound = relative_error(value, right), 2 * relative_error(rough, right)
                assert error <= bound, f"{name} {dtype} {size}: {error:.1e}, bound {bound:.1e}"


def bench(bandwidth: float) -> list[dict]:
    cases = [((tokens,), size) for size in HEAD_SIZES for tokens in LENGTHS]
    cases += [(mixture, 128) for mixture in MIXTURES]
    return [line for case in cases for line in bench_case(*case)]


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence through PyTorch; [1, heads, tokens, head size]."""
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=True
        )


def differentiate(outs, leaves, gradients):
    return torch.autograd.grad(outs, leaves, gradients, retain_graph=True)


def one_by_one(backend: SDPBackend, inputs: list[Tensor], dout: Tensor, lengths):
    """Forward and backward of a peer, a call for each sequence."""
    q, k, v = (tensor.split(lengths) for tensor in inputs)
    sequences = [
        [tensor.detach().requires_grad_() for tensor in sequence] for sequence in zip(q, k, v)
    ]

    def forward():
        return [dense(backend, *sequence) for sequence in sequences]

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


def bench_case(lengths: tuple[int, ...], size: int) -> list[dict]:
    tokens = sum(lengths)
    q, k, v = inputs = [
        torch.randn(tokens, h, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    ]
    dout = torch.randn(tokens, HEADS, size, device="cuda", dtype=torch.bfloat16)
    cu = cuts(lengths)
    shape = {"tokens": tokens, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": size}
    shape |= {"dtype": "bfloat16", "causal": True}
    if len(lengths) > 1:
        shape["lengths"] = list(lengths)
    # Multiply-adds of the visible half, twice forward and five times backward.
    pairs = sum(length * length for length in lengths)
    tera = pairs * size * HEADS / 1e12
    time = partial(median_ms, repeats=5, calls=max(1, min(10, PAIRS // pairs)))

    peers = {name: one_by_one(backend, inputs, dout, lengths) for name, backend in BACKENDS.items()}
    if len(lengths) > 1:
        peers[f"{CUDNN}, a call for each sequence"] = peers.pop(CUDNN)
        peers[f"{FLASH}, packed"] = packed_flash(inputs, dout, cu, max(lengths))
        del peers[FLASH]
    with torch.no_grad():
        mine = time(partial(ops.segment_attention, q, k, v, cu), *(f for f, _ in peers.values()))
    backward = partial(differentiate, ops.segment_attention(q, k, v, cu), (q, k, v), dout)
    gradients = time(backward, *(b for _, b in peers.values()))
    torch.use_deterministic_algorithms(True)
    (repeatable,) = time(backward)
    torch.use_deterministic_algorithms(False)

    lines = []
    for i, name in enumerate(peers, 1):
        for bench, work, times in (
            ("segment_attention", 2 * tera, mine),
            ("segment_attention_backward", 5 * tera, gradients),
        ):
            line = record(bench, shape, times[0], name, times[i])
            lines.append(line | {"tflops": round(work / times[0]["median"] * 1e3, 1)})
    any_order = "segment_attention_backward in any order"
    name = "segment_attention_backward deterministic"
    return [*lines, record(name, shape, repeatable, any_order, gradients[0])]
