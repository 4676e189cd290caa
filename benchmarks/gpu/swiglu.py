"""swiglu beside PyTorch's silu and product, and Liger's kernel where it is installed."""

import torch
from torch.nn.functional import silu

import lemo.ops  # noqa: F401  registers torch.ops.lemo
from gpu.bench import TOKENS, Bench

try:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Liger
except ImportError:
    Liger = None

WIDTH = 14336  # the MLP of an 8B model


def rows(b: Bench):
    count, width = b.size(TOKENS // 2), b.size(WIDTH)
    gate, up, dout = (b.randn(count, width) for _ in range(3))
    forward, backward = torch.ops.lemo.swiglu, torch.ops.lemo.swiglu_backward
    functions = {"torch silu * up": lambda gate, up: silu(gate) * up}
    if Liger is not None and b.device == "cuda":
        functions["Liger LigerSiLUMulFunction"] = Liger.apply
    leaves = [tensor.clone().requires_grad_() for tensor in (gate, up)]
    results = {name: function(*leaves) for name, function in functions.items()}
    forwards = {name: lambda f=function: f(gate, up) for name, function in functions.items()}
    backwards = {
        name: lambda y=y: torch.autograd.grad(y, leaves, dout, retain_graph=True)
        for name, y in results.items()
    }

    # Our backward overwrites its inputs with their gradients.
    overwritten = gate.clone(), up.clone()
    backward(dout, *overwritten)
    for name in functions:
        b.agree("swiglu", forward(gate, up), results[name])
        b.agree("swiglu_backward", overwritten, backwards[name]())
    overwritten = gate.clone(), up.clone()
    shape = {"rows": count, "width": width, "dtype": "bfloat16"}
    size = count * width * 2
    yield from b.compare("swiglu", shape, lambda: forward(gate, up), forwards, moved=3 * size)
    yield from b.compare(
        "swiglu_backward", shape, lambda: backward(dout, *overwritten), backwards, moved=5 * size
    )
