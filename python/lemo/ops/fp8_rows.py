"""fp8_rows: rows in e4m3 with a scale each, and products of such rows."""

import torch
from torch import Tensor

from lemo.ops.call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::fp8_rows")
def _(x, columns):
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return values, x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.register_fake("lemo::fp8_transpose")
def _(x):
    return x.new_empty((x.shape[1], x.shape[0]))


def fp8_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits: `x * columns` is about `values * scales` (e4m3, arXiv 2209.05433).

    A row's scale is its largest magnitude / 448, the largest number of e4m3. Values are rounded to
    nearest even, with a relative error of at most 2^-4, and an absolute one of 2^-10 scales where
    that is more. A row of zeros stays one. NaN stays NaN, and an infinity makes its row NaN where
    scales are multiplied in.

    Args:
        x: [R, C] float.
        columns: [C] fp32, what columns are multiplied with before they are rounded; None: with 1.

    Returns:
        values [R, C] float8_e4m3fn and scales [R, 1] fp32. Not differentiable.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    return call(_ops.fp8_rows, x, columns)


def fp8_transpose(values: Tensor) -> Tensor:
    """[C, R], the transpose of values in e4m3 [R, C] in memory of its own.

    Args:
        values: [R, C] float8_e4m3fn; R and C are multiples of 16.
    """
    return call(_ops.fp8_transpose, values)


def fp8_product(
    rows: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """rows @ weight^T (+ bias) of values in e4m3 with their scales, [R, out].

    Sums are in fp32, and rounded once. On a GPU it is torch's `_scaled_mm`.

    Args:
        rows: [R, in] float8_e4m3fn, and scales [R, 1] fp32.
        weight: [out, in] float8_e4m3fn, and scales [out, 1] fp32. `in` and `out` are multiples
            of 16.
        dtype: of the result.
        bias: [out] of that dtype.
        fast: on a GPU, whether the tensor cores sum up by themselves (cuBLASLt's fast
            accumulation): 5 to 13% faster on Hopper, with an error of 2e-3 to 5e-3 of the result
            beside the 4e-2 that rounding the factors has.
    """
    (values, scales), (weights, weight_scales) = rows, weight
    if values.device.type == "cuda":
        fused = None if dtype == torch.float32 else bias
        y = torch._scaled_mm(
            values,
            weights.t(),
            scale_a=scales,
            scale_b=weight_scales.t(),
            bias=fused,
            out_dtype=dtype,
            use_fast_accum=fast,
        )
        return y if bias is None or fused is not None else y.add_(bias)
    with torch.autocast(values.device.type, enabled=False):
        y = values.float() @ weights.float().T * scales * weight_scales.T
    return (y if bias is None else y + bias.float()).to(dtype)
