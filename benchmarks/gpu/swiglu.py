"""swiglu on CUDA, beside PyTorch's silu and product, and Liger's kernel where it is installed."""

import torch
from torch.nn.functional import silu

from gpu.harness import TOKENS, median_ms, record, share
from lemo import ops, reference

WIDTH = 14336  # the MLP of an 8B model


def liger() -> type[torch.autograd.Function] | None:
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerSiLUMulFunction


def check() -> None:
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        for columns in (WIDTH, 77):
            gate, up, dout = torch.randn(3, 515, columns, device="cuda", dtype=dtype).unbind()
            leaves = [(4 * gate).requires_grad_(), up.clone().requires_grad_()]
            oracles = [leaf.detach().float().requires_grad_() for leaf in leaves]
            result, oracle = ops.swiglu(*leaves), reference.swiglu(*oracles)
            grads = torch.autograd.grad(result, leaves, dout)
            expected = torch.autograd.grad(oracle, oracles, dout.float())
            for value, truth in zip((result, *grads), (oracle, *expected)):
                error = ((value.float() - truth).norm() / truth.norm()).item()
                assert error <= bound, f"swiglu {dtype} {columns}: {error:.1e}"


def bench(bandwidth: float) -> list[dict]:
    rows = TOKENS // 2
    gate, up, dout = (
        torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    peers = {"torch silu * up": lambda gate, up: silu(gate) * up}
    if liger() is not None:
        peers["Liger LigerSiLUMulFunction"] = liger().apply
    shape = {"rows": rows, "width": WIDTH, "dtype": "bfloat16"}
    results = []
    for name, peer in peers.items():
        forward, peer_forward = median_ms(
            lambda: torch.ops.lemo.swiglu(gate, up), lambda peer=peer: peer(gate, up)
        )
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        y = peer(*leaves)
        backward, peer_backward = median_ms(
            lambda: torch.ops.lemo.swiglu_backward(dout, gate, up),
            lambda y=y, leaves=leaves: torch.autograd.grad(y, leaves, dout, retain_graph=True),
        )
        # Our backward has overwritten them with gradients of gradients.
        gate.normal_()
        up.normal_()
        results += [
            record("swiglu", shape, forward, name, peer_forward),
            record("swiglu_backward", shape, backward, name, peer_backward),
        ]
    array_bytes = rows * WIDTH * 2
    return [
        *results,
        share("swiglu bandwidth", shape, 3 * array_bytes, forward, bandwidth),
        share("swiglu_backward bandwidth", shape, 5 * array_bytes, backward, bandwidth),
    ]
