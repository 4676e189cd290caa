"""select_norm beside torch's index_select and rms_norm."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

import lemo.ops  # noqa: F401  registers torch.ops.lemo
from gpu.bench import HIDDEN, TOKENS, Bench

EPS = 1e-5


def rows(b: Bench):
    tokens, hidden = b.size(TOKENS), b.size(HIDDEN)
    kept = b.half_of_the_blocks(tokens)
    index = kept.long()
    x, weight = b.randn(tokens, hidden), b.randn(hidden).abs()
    select, add_gradient = torch.ops.lemo.select_norm, torch.ops.lemo.select_norm_backward

    def forward() -> tuple[Tensor, ...]:
        return select(x, kept, weight, None, EPS, "rms", True)

    def in_torch() -> Tensor:
        return rms_norm(x.index_select(0, index), (hidden,), weight, EPS)

    y, x_rows, mean, rstd = forward()
    leaf = x_rows.clone().requires_grad_()
    torch_y = rms_norm(leaf, (hidden,), weight, EPS)
    dy, dx = b.randn(len(kept), hidden), b.randn(tokens, hidden)

    def backward(dx: Tensor = dx) -> Tensor:
        add_gradient(dy, x_rows, kept, weight, mean, rstd, "rms", dx, False)
        return dx

    def torch_backward(dx: Tensor = dx) -> Tensor:
        (gradient,) = torch.autograd.grad(torch_y, leaf, dy, retain_graph=True)
        return dx.index_add_(0, index, gradient)

    b.agree("select_norm", y, in_torch())
    b.agree("select_norm_backward", backward(dx.clone()), torch_backward(dx.clone()))
    shape = {"tokens": tokens, "rows": len(kept), "hidden": hidden, "dtype": "bfloat16"}
    row_bytes = len(kept) * hidden * 2
    peers = {"torch index_select + rms_norm": in_torch}
    yield from b.compare("select_norm", shape, forward, peers, moved=3 * row_bytes)
    peers = {"torch + index_add_": torch_backward}
    yield from b.compare("select_norm_backward", shape, backward, peers, moved=4 * row_bytes)
