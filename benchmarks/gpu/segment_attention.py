"""segment_attention on CUDA, beside PyTorch's FlashAttention-2 and cuDNN attention."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.harness import median_ms, record
from lemo import ops, reference

# (tokens, query heads, key/value heads, head size): Llama-3-8B at several lengths, a small head.
SHAPES = (
    (16384, 32, 8, 128),
    (32768, 32, 8, 128),
    (65536, 32, 8, 128),
    (32768, 32, 8, 64),
)
PEERS = {
    "PyTorch FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "PyTorch cuDNN attention": SDPBackend.CUDNN_ATTENTION,
}


def relative_error(value: Tensor, oracle: Tensor) -> float:
    return ((value.float() - oracle).norm() / oracle.norm()).item()


def check() -> None:
    """Errors at most twice plain torch's, on a length that the fp32 oracle can hold."""
    tokens, heads, kv_heads = 2000, 8, 2
    cu = torch.tensor([0, 1200, tokens], dtype=torch.int32, device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        for size in (64, 128):
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
    return [line for shape in SHAPES for line in bench_shape(*shape)]


def bench_shape(tokens: int, heads: int, kv_heads: int, size: int) -> list[dict]:
    q, k, v = (
        torch.randn(tokens, h, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    )
    dout = torch.randn(tokens, heads, size, device="cuda", dtype=torch.bfloat16)
    cu = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    shape = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_size": size}
    shape |= {"dtype": "bfloat16", "causal": True}
    # Multiply-adds of the visible half, twice forward and five times backward.
    tera = tokens * tokens * size * heads / 1e12
    time = partial(median_ms, repeats=5, calls=max(1, 32768 // tokens))

    def theirs(backend):
        heads_first = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                *heads_first, is_causal=True, enable_gqa=True
            )

    def backward(out, gradient):
        return torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    gradient = dout.transpose(0, 1)[None]
    forwards = [partial(theirs, backend) for backend in PEERS.values()]
    backwards = [partial(backward, theirs(backend), gradient) for backend in PEERS.values()]
    out = ops.segment_attention(q, k, v, cu)
    mine = time(partial(ops.segment_attention, q, k, v, cu), *forwards)
    gradients = time(partial(backward, out, dout), *backwards)
    torch.use_deterministic_algorithms(True)
    (repeatable,) = time(partial(backward, out, dout))
    torch.use_deterministic_algorithms(False)

    lines = []
    for i, name in enumerate(PEERS, 1):
        for bench, work, times in (
            ("segment_attention", 2 * tera, mine),
            ("segment_attention_backward", 5 * tera, gradients),
        ):
            line = record(bench, shape, times[0], name, times[i])
            lines.append(line | {"tflops": round(work / times[0]["median"] * 1e3, 1)})
    any_order = "segment_attention_backward in any order"
    name = "segment_attention_backward deterministic"
    return [*lines, record(name, shape, repeatable, any_order, gradients[0])]
