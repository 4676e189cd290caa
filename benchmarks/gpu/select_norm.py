"""select_norm on CUDA, beside torch's index_select and rms_norm."""

import torch

from gpu.harness import HIDDEN, TOKENS, half_of_the_blocks, median_ms, record, share
from lemo import ops, reference


def check() -> None:
    for kind in ("rms", "layer"):
        for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
            for hidden in (4096, 384, 7):
                rows = half_of_the_blocks(4096)[:-3]
                x = torch.randn(4096, hidden, device="cuda", dtype=dtype, requires_grad=True)
                weight = torch.rand(hidden, device="cuda", requires_grad=True)
                bias = torch.randn(hidden, device="cuda", requires_grad=True)
                bias = bias if kind == "layer" else None
                leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
                dy = torch.randn(len(rows), hidden, device="cuda", dtype=dtype)
                oracle = reference.select_norm(x.float(), rows, weight, bias, 1e-5, kind)
                expected = torch.autograd.grad(oracle, leaves, dy.float())
                result = ops.select_norm(x, weight, bias, rows, 1e-5, kind)
                grads = torch.autograd.grad(result, leaves, dy)
                for value, truth in zip((result, *grads), (oracle, *expected)):
                    error = ((value.float() - truth).norm() / truth.norm()).item()
                    assert error <= bound, f"select_norm {kind} {dtype} {hidden}: {error:.1e}"


def bench(bandwidth: float) -> list[dict]:
    rows = half_of_the_blocks(TOKENS)
    index = rows.long()
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(HIDDEN, device="cuda", dtype=torch.bfloat16)
    select = torch.ops.lemo.select_norm
    forward, torch_forward = median_ms(
        lambda: select(x, rows, weight, None, 1e-5, "rms", True),
        lambda: torch.nn.functional.rms_norm(x.index_select(0, index), (HIDDEN,), weight, 1e-5),
    )
    _, x_rows, mean, rstd = select(x, rows, weight, None, 1e-5, "rms", True)
    dy, dx = torch.randn_like(x_rows), torch.randn_like(x)
    leaf = x_rows.clone().requires_grad_()
    y = torch.nn.functional.rms_norm(leaf, (HIDDEN,), weight, 1e-5)

    def torch_backward() -> None:
        (grad,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
        dx.index_add_(0, index, grad)

    backward, plain_backward = median_ms(
        lambda: torch.ops.lemo.select_norm_backward(
            dy, x_rows, rows, weight, mean, rstd, "rms", dx, False
        ),
        torch_backward,
    )
    shape = {"tokens": TOKENS, "rows": len(rows), "hidden": HIDDEN, "dtype": "bfloat16"}
    row_bytes = len(rows) * HIDDEN * 2
    return [
        record("select_norm", shape, forward, "torch index_select + rms_norm", torch_forward),
        share("select_norm bandwidth", shape, 3 * row_bytes, forward, bandwidth),
        record("select_norm_backward", shape, backward, "torch + index_add_", plain_backward),
        share("select_norm_backward bandwidth", shape, 4 * row_bytes, backward, bandwidth),
    ]
