"""fp8_rows beside PyTorch's own rounding, and products in e4m3 beside bf16 ones (cuBLAS).

Products are those of an 8B model's layers, forward and for the gradients of inputs, with what they
need of fp8_rows and fp8_transpose, and alone: with a scale for each row, with one for each tensor,
and with the sums of tensor cores alone ("fast", 14 bits).
"""

import torch

from gpu.bench import Bench
from lemo import ops

# Outputs and inputs of q, k and v together, o, gate and up together, and down.
LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (8192, 32768)
LARGEST = 448.0


def by_torch(x):
    scales = (x.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    return (x / scales).to(torch.float8_e4m3fn), scales


def rounded(b: Bench, width: int):
    count, width = b.size(ROWS[-1]), b.size(width)
    x, factors = b.randn(count, width), torch.rand(width, device=b.device) + 0.5
    shape = {"rows": count, "width": width, "dtype": "bfloat16"}
    size = 3 * count * width
    values, scales = ops.fp8_rows(x)
    wide, wide_scales = by_torch(x)
    b.agree("fp8_rows", values.float() * scales, wide.float() * wide_scales)
    peers = {"torch amax, division and cast": lambda: by_torch(x)}
    yield from b.compare("fp8_rows", shape, lambda: ops.fp8_rows(x), peers, moved=size)
    peers = {"torch amax, division and cast": lambda: by_torch(x * factors.to(x.dtype))}
    yield from b.compare(
        "fp8_rows columns", shape, lambda: ops.fp8_rows(x, factors), peers, moved=size
    )


def transposed(b: Bench):
    outputs, inputs = b.size(14336), b.size(4096)
    values, _ = ops.fp8_rows(b.randn(outputs, inputs))
    peers = {"torch contiguous": lambda: values.view(torch.uint8).t().contiguous()}
    b.agree("fp8_transpose", ops.fp8_transpose(values).float(), values.float().T)
    shape = {"rows": outputs, "width": inputs, "dtype": "float8_e4m3fn"}
    yield from b.compare(
        "fp8_transpose",
        shape,
        lambda: ops.fp8_transpose(values),
        peers,
        moved=2 * outputs * inputs,
    )


def alone(values, scales, weights, weight_scales, fast):
    """A product without what makes its factors; with one scale for each tensor where these are."""
    return lambda: torch._scaled_mm(
        values,
        weights.t(),
        scale_a=scales,
        scale_b=weight_scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def products(b: Bench, count: int, outputs: int, inputs: int):
    count, outputs, inputs = b.size(count), b.size(outputs), b.size(inputs)
    x, dy, weight = b.randn(count, inputs), b.randn(count, outputs), b.randn(outputs, inputs)
    values, scales = ops.fp8_rows(weight)
    factors, ones = scales.flatten(), torch.ones(inputs, 1, device=b.device)

    def forward():
        return ops.fp8_product(ops.fp8_rows(x), (values, scales), torch.bfloat16)

    def backward():
        rows = ops.fp8_rows(dy, factors)
        return ops.fp8_product(rows, (ops.fp8_transpose(values), ones), torch.bfloat16)

    shape = {"rows": count, "outputs": outputs, "inputs": inputs, "dtype": "bfloat16"}
    tera = 2 * count * outputs * inputs / 1e12
    few = {"repeats": 5, "calls": 3}
    for name, ours, plain, rows, matrix in (
        ("fp8 product", forward, lambda: x @ weight.T, ops.fp8_rows(x), (values, scales)),
        (
            "fp8 input gradient",
            backward,
            lambda: dy @ weight,
            ops.fp8_rows(dy, factors),
            (ops.fp8_transpose(values), ones),
        ),
    ):
        # By what rounding both factors makes of random numbers (tests/python/test_models_fp8.py).
        b.agree(name, ours(), plain(), bound=0.045)
        peers = {"bf16": plain}
        if b.device == "cuda":
            one = torch.ones(1, 1, device=b.device)
            for kind, row_scales, weight_scales in (
                ("a scale each row", rows[1], matrix[1]),
                ("a scale each tensor", one, one),
            ):
                for fast in (False, True):
                    label = f"_scaled_mm alone, {kind}{', fast' if fast else ''}"
                    peers[label] = alone(rows[0], row_scales, matrix[0], weight_scales, fast)
        yield from b.compare(name, shape, ours, peers, tera=tera, **few)


def rows(b: Bench):
    for width in (4096, 14336):
        yield from rounded(b, width)
    yield from transposed(b)
    for count in ROWS:
        for outputs, inputs in LAYERS:
            yield from products(b, count, outputs, inputs)
