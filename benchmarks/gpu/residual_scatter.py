"""residual_scatter on CUDA, beside torch's index_add_ and index_select."""

import torch

from gpu.harness import HIDDEN, TOKENS, half_of_the_blocks, median_ms, record, share
from lemo import ops, reference


def check() -> None:
    for dtype, addend_dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ):
        for hidden in (4096, 384, 7):
            rows = half_of_the_blocks(4096)[:-3]
            x = torch.randn(4096, hidden, device="cuda", dtype=dtype)
            y = torch.randn(len(rows), hidden, device="cuda", dtype=addend_dtype)
            oracle = reference.residual_scatter(x.float(), y.float(), rows).to(dtype)
            result = ops.residual_scatter_(x.clone(), y, rows)
            assert torch.equal(result, oracle), f"residual_scatter {dtype} {hidden}"
            gathered = torch.ops.lemo.gather_rows(x, rows)
            assert torch.equal(gathered, x[rows.long()]), f"gather {dtype} {hidden}"
            everything = torch.randn_like(x)
            result = ops.residual_scatter_(x.clone(), everything)
            oracle = (x.float() + everything.float()).to(dtype)
            assert torch.equal(result, oracle), f"residual_scatter of every row {dtype} {hidden}"
    rows = half_of_the_blocks(4096)
    x, y = torch.randn(4096, 4096, device="cuda"), torch.randn(2048, 4096, device="cuda")
    first = ops.residual_scatter_(x.clone(), y, rows)
    assert all(torch.equal(first, ops.residual_scatter_(x.clone(), y, rows)) for _ in range(100))


def bench(bandwidth: float) -> list[dict]:
    rows = half_of_the_blocks(TOKENS)
    index = rows.long()
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(len(rows), HIDDEN, device="cuda", dtype=torch.bfloat16)
    dy = torch.empty_like(y)
    scatter, index_add = median_ms(
        lambda: torch.ops.lemo.residual_scatter(x, y, rows), lambda: x.index_add_(0, index, y)
    )
    gather, index_select = median_ms(
        lambda: torch.ops.lemo.gather_rows(x, rows),
        lambda: torch.index_select(x, 0, index, out=dy),
    )
    shape = {"tokens": TOKENS, "rows": len(rows), "hidden": HIDDEN, "dtype": "bfloat16"}
    row_bytes = len(rows) * HIDDEN * 2
    return [
        record("residual_scatter", shape, scatter, "torch index_add_", index_add),
        share("residual_scatter bandwidth", shape, 3 * row_bytes, scatter, bandwidth),
        record("gather_rows", shape, gather, "torch index_select", index_select),
        share("gather_rows bandwidth", shape, 2 * row_bytes, gather, bandwidth),
    ]
