"""fp8_rows: what an operator has to pass, docs/design/testing.md; and products of what it gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo import ops, reference

# e4m3 has three bits behind the point: to nearest, half of the last one. Below 2^-6 numbers are
# 2^-9 apart.
ROUNDING, STEP = 2.0**-4, 2.0**-10


def rounding_errors(x, scales):
    """The most by which each element of x [R, C] is rounded, in fp32."""
    return torch.maximum(ROUNDING * x.abs(), STEP * scales)


@given(
    rows=st.integers(0, 20),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scaled=st.booleans(),
)
def test_every_bit_is_the_oracles(rows, columns, seed, dtype, scaled):
    torch.manual_seed(seed)
    x = (torch.randn(rows, columns) * torch.randn(rows, 1).exp() * 3).to(dtype)
    factors = torch.rand(columns) + 0.01 if scaled else None
    values, scales = ops.fp8_rows(x, factors)
    expected, expected_scales = reference.fp8_rows(x, factors)
    assert values.dtype == torch.float8_e4m3fn
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.float(), expected)


def test_every_number_of_bf16_is_rounded_to_the_nearest():
    """Against all numbers of e4m3, where the scale is 1."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16)
    every = every[every.float() <= 448]
    for sign in (1, -1):
        x = torch.cat([every * sign, torch.tensor([448.0]).bfloat16()])
        values, scales = ops.fp8_rows(x[None])
        assert scales.item() == 1
        found = (values.float()[0, :-1] - every.float() * sign).abs()
        step = 4096
        nearest = torch.cat(
            [(part.float()[:, None] - codes).abs().amin(1) for part in every.split(step)]
        )
        assert torch.equal(found, nearest)


def test_the_error_is_that_of_three_bits():
    torch.manual_seed(0)
    x = torch.randn(64, 256) * torch.randn(64, 256).mul(4).exp()
    values, scales = ops.fp8_rows(x)
    error = (values.float() * scales - x).abs()
    # fp32 rounds the inverse and both products.
    assert (error <= rounding_errors(x, scales) * (1 + 2**-20)).all()
    assert (error > 0.9 * rounding_errors(x, scales)).any(), "the bound is reached"


def test_rows_of_zeros_and_of_tiny_numbers():
    x = torch.zeros(4, 32)
    x[1, 3] = 1e-45
    x[2, 5] = 1e-38
    x[3] = -0.0
    values, scales = ops.fp8_rows(x)
    assert (scales > 0).all()
    assert torch.isfinite(values.float()).all()
    assert not values.float()[[0, 3]].any()
    assert ((values.float() * scales - x).abs() <= 2**-110).all()


def test_what_is_not_finite_makes_its_row_nan():
    x = torch.randn(3, 32)
    x[0, 4], x[2, 7] = torch.nan, -torch.inf
    values, scales = ops.fp8_rows(x)
    product = ops.fp8_product((values, scales), ops.fp8_rows(torch.randn(16, 32)), torch.float32)
    assert product[[0, 2]].isnan().all()
    assert product[1].isfinite().all()


def test_outliers_leave_the_others_their_precision():
    """Numbers are floating point: a factor of 2^14 within a row costs no precision."""
    torch.manual_seed(0)
    x = 1 + torch.rand(8, 128)
    x[:, 5] = 2.0**14
    values, scales = ops.fp8_rows(x)
    error = ((values.float() * scales - x) / x).abs()
    assert error.amax() <= ROUNDING * (1 + 2**-20)
    x[:, 5] = 2.0**24
    values, _ = ops.fp8_rows(x)
    assert not values.float()[:, :5].any(), "beyond e4m3's range they are lost"


def error_bound(x, w, x_scales, w_scales):
    """The most by which each element of x w^T errs, from the rounding of its factors."""
    dx, dw = rounding_errors(x, x_scales), rounding_errors(w, w_scales)
    return x.abs() @ dw.T + dx @ w.abs().T + dx @ dw.T


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_err_by_the_rounding_of_their_factors(outliers, with_bias):
    torch.manual_seed(0)
    x, w = torch.randn(40, 256), torch.randn(48, 256) / 16
    bias = torch.randn(48) if with_bias else None
    if outliers:
        x[:, 7] *= 1000
        w[3] *= 100
    rows, weight = ops.fp8_rows(x), ops.fp8_rows(w)
    y = ops.fp8_product(rows, weight, torch.float32, bias)
    exact = x @ w.T if bias is None else x @ w.T + bias
    bound = error_bound(x, w, rows[1], weight[1])
    assert ((y - exact).abs() <= bound + 1e-4 * (x.abs() @ w.abs().T)).all()
    # Roundings are independent, so that the error is far from the bound, but not zero.
    assert (y - exact).abs().mean() > 0.01 * bound.mean()


def test_gradients_contract_over_the_rows_of_the_weight():
    """dy w, with the scales of w's rows multiplied into the columns of dy before it is rounded."""
    torch.manual_seed(0)
    dy, w = torch.randn(40, 48), torch.randn(48, 64) * torch.randn(48, 1).exp()
    values, scales = ops.fp8_rows(w)
    rows = ops.fp8_rows(dy, scales[:, 0])
    ones = torch.ones(64, 1)
    dx = ops.fp8_product(rows, (ops.fp8_transpose(values), ones), torch.float32)
    scaled = dy * scales[:, 0]
    bound = rounding_errors(scaled, rows[1]) @ values.float().abs()
    bound += dy.abs() @ rounding_errors(w, scales)
    bound += rounding_errors(scaled, rows[1]) @ (rounding_errors(w, scales) / scales)
    assert ((dx - dy @ w).abs() <= bound + 1e-4 * (dy.abs() @ w.abs())).all()


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 160), (144, 272), (0, 16), (32, 0)])
def test_transpose(shape):
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    y = ops.fp8_transpose(values.view(torch.float8_e4m3fn))
    assert y.is_contiguous()
    assert torch.equal(y.view(torch.uint8), values.T)


def test_repeats_and_strided_inputs():
    x = torch.randn(64, 40).bfloat16()
    first = ops.fp8_rows(x.T)
    for values, scales in [ops.fp8_rows(x.T.contiguous())] * 10:
        assert torch.equal(values.view(torch.uint8), first[0].view(torch.uint8))
        assert torch.equal(scales, first[1])


def test_opcheck():
    x, factors = torch.randn(5, 6), torch.rand(6)
    # The test of schemas multiplies results, which torch does not do in this dtype.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.lemo.fp8_rows.default, (x, None), test_utils=tests)
    torch.library.opcheck(torch.ops.lemo.fp8_rows.default, (x, factors), test_utils=tests)
    values = torch.zeros(16, 32, dtype=torch.float8_e4m3fn)
    torch.library.opcheck(torch.ops.lemo.fp8_transpose.default, (values,), test_utils=tests)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ((torch.randn(6), None), ValueError, "'x': expected 2 dimension"),
        ((torch.randn(6, 4).long(), None), TypeError, "'x': expected float32, bfloat16"),
        ((torch.randn(6, 4), torch.rand(5)), ValueError, "'columns': expected size 4"),
        ((torch.randn(6, 4), torch.rand(4).half()), TypeError, "'columns': expected float32"),
    ],
)
def test_bad_inputs_name_the_argument(arguments, exception, message):
    with pytest.raises(exception, match=message):
        ops.fp8_rows(*arguments)


def test_bad_inputs_of_the_transpose():
    with pytest.raises(TypeError, match="'x': expected float8_e4m3fn"):
        ops.fp8_transpose(torch.randn(16, 16))
    with pytest.raises(ValueError, match="'x': expected sizes that are multiples of 16, got 20"):
        ops.fp8_transpose(torch.zeros(16, 20, dtype=torch.float8_e4m3fn))
