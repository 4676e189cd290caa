"""residual_scatter: what an operator has to pass, docs/design/testing.md."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bad_inputs import BAD_ROWS
from lemo import ops, reference
from tolerances import assert_close_fp32, assert_close_low_precision


def draw_rows(tokens: int, kept: int) -> torch.Tensor:
    return torch.randperm(tokens)[:kept].sort().values.int()


@given(
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 33),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_forward_and_backward_match_the_oracle(tokens, hidden, share, seed):
    torch.manual_seed(seed)
    rows = draw_rows(tokens, round(share * tokens))
    x = torch.randn(tokens, hidden, requires_grad=True)
    y = torch.randn(len(rows), hidden, requires_grad=True)
    weights = torch.randn(tokens, hidden)
    expected = reference.residual_scatter(x, y, rows)
    expected_grads = torch.autograd.grad((expected * weights).sum(), (x, y))
    result = ops.residual_scatter_(x.clone(), y, rows)
    grads = torch.autograd.grad((result * weights).sum(), (x, y))
    assert_close_fp32(result, expected)
    for grad, expected_grad in zip(grads, expected_grads):
        assert_close_fp32(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    rows = draw_rows(50, 20)
    x, y = torch.randn(50, 24, dtype=dtype), torch.randn(20, 24, dtype=dtype)
    oracle = reference.residual_scatter(x.float(), y.float(), rows)
    result = ops.residual_scatter_(x.clone(), y, rows)
    assert_close_low_precision(result, reference.residual_scatter(x, y, rows), oracle)


def test_every_row_without_an_index_and_mixed_dtypes():
    x, y = torch.randn(7, 5), torch.randn(7, 5, dtype=torch.bfloat16, requires_grad=True)
    expected = x + y.float()
    result = ops.residual_scatter_(x.clone(), y)
    assert_close_fp32(result, expected)
    result.square().sum().backward()
    assert y.grad.dtype == torch.bfloat16
    assert_close_low_precision(y.grad, (2 * expected).bfloat16(), 2 * expected)


def test_residual_gather_adds_its_gradient_into_the_residual_s():
    rows = draw_rows(12, 5)
    leaf = torch.randn(12, 3, requires_grad=True)
    weights, row_weights = torch.randn(12, 3), torch.randn(5, 3)
    expected = (leaf * weights).sum() + (leaf[rows.long()] * row_weights).sum()
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    x, x_rows = ops.residual_gather(leaf.clone(), rows)
    (grad,) = torch.autograd.grad((x * weights).sum() + (x_rows * row_weights).sum(), leaf)
    assert_close_fp32(grad, expected_grad)
    assert torch.equal(x_rows, leaf[rows.long()])


def test_opcheck():
    rows = draw_rows(9, 4)
    samples = [
        (torch.randn(9, 6), torch.randn(4, 6), rows),
        (torch.randn(9, 6), torch.randn(9, 6), None),
    ]
    for sample in samples:
        torch.library.opcheck(torch.ops.lemo.residual_scatter.default, sample)
        torch.library.opcheck(torch.ops.lemo.gather_rows.default, (sample[0], sample[2]))


def test_repeats_are_bit_equal():
    rows = draw_rows(300, 170)
    x, y = torch.randn(300, 64), torch.randn(170, 64)
    first = ops.residual_scatter_(x.clone(), y, rows)
    assert all(torch.equal(first, ops.residual_scatter_(x.clone(), y, rows)) for _ in range(5))


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"x": torch.randn(6)}, ValueError, "'x': expected 2 dimension"),
        (
            {"x": torch.randn(6, 4).long()},
            TypeError,
            "'x': expected float32, bfloat16 or float16, got int64",
        ),
        ({"x": torch.randn(4, 6).T}, ValueError, "'x': expected a contiguous tensor"),
        ({"y": torch.randn(2, 5)}, ValueError, "'y': expected size 4 in dimension 1"),
        ({"y": torch.randn(3, 4)}, ValueError, "'y': expected size 2 in dimension 0"),
        *BAD_ROWS,
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    arguments = {"x": torch.randn(6, 4), "y": torch.randn(2, 4), "rows": torch.tensor([1, 3]).int()}
    before = arguments["x"].clone()
    with pytest.raises(exception, match=message):
        ops.residual_scatter_(**(arguments | change))
    assert torch.equal(arguments["x"], before)
