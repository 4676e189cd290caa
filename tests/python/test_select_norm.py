"""select_norm and residual_select_norm: what an operator has to pass, docs/design/testing.md."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bad_inputs import BAD_ROWS
from lemo import ops, reference
from lemo.ops.call import call
from thread_counts import each_number_of_threads
from tolerances import assert_close_fp32, assert_close_low_precision

KINDS = ["rms", "layer"]
EPS = 1e-5


def draw_rows(tokens: int, kept: int) -> torch.Tensor:
    return torch.randperm(tokens)[:kept].sort().values.int()


def draw_parameters(hidden: int, kind: str, dtype=torch.float32):
    weight = (1 + torch.randn(hidden) / 4).to(dtype).requires_grad_()
    bias = torch.randn(hidden).to(dtype).requires_grad_() if kind == "layer" else None
    return weight, bias


def gradients(output, weights, *inputs):
    wanted = [t for t in inputs if t is not None]
    return torch.autograd.grad((output * weights).sum(), wanted)


@pytest.mark.parametrize("kind", KINDS)
@given(
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 70),
    share=st.none() | st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_forward_and_backward_match_the_oracle(kind, tokens, hidden, share, seed):
    torch.manual_seed(seed)
    rows = None if share is None else draw_rows(tokens, round(share * tokens))
    x = (torch.randn(tokens, hidden) + 1).requires_grad_()
    weight, bias = draw_parameters(hidden, kind)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    # With a small eps a row of one or two numbers has hardly any gradient: it would cancel in fp32.
    eps = 1.0 if hidden < 8 else EPS
    expected = reference.select_norm(exact[0], rows, exact[1], exact[2], eps, kind)
    weights = torch.randn(expected.shape)
    y = ops.select_norm(x, weight, bias, rows, eps, kind)
    assert_close_fp32(y, expected)
    for grad, expected_grad in zip(
        gradients(y, weights, x, weight, bias), gradients(expected, weights.double(), *exact)
    ):
        assert_close_fp32(grad, expected_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(kind, dtype):
    rows = draw_rows(700, 600)  # three ranges of rows in the sums of dweight
    x = torch.randn(700, 48).to(dtype).requires_grad_()
    weight, bias = draw_parameters(48, kind, dtype)
    weights = torch.randn(600, 48).to(dtype)
    wide = [t if t is None else t.detach().float().requires_grad_() for t in (x, weight, bias)]
    oracle = reference.select_norm(wide[0], rows, wide[1], wide[2], EPS, kind)
    plain = reference.select_norm(x, rows, weight, bias, EPS, kind)
    y = ops.select_norm(x, weight, bias, rows, EPS, kind)
    assert y.dtype == dtype
    assert_close_low_precision(y, plain, oracle)
    for grad, plain_grad, oracle_grad in zip(
        gradients(y, weights, x, weight, bias),
        gradients(plain, weights, x, weight, bias),
        gradients(oracle, weights.float(), *wide),
    ):
        assert grad.dtype == dtype
        assert_close_low_precision(grad, plain_grad, oracle_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_mixed_dtypes(kind, dtype, weight_dtype):
    x = torch.randn(30, 16).to(dtype).requires_grad_()
    weight, bias = draw_parameters(16, kind, weight_dtype)
    wide = [t if t is None else t.detach().float().requires_grad_() for t in (x, weight, bias)]
    oracle = reference.select_norm(wide[0], None, wide[1], wide[2], EPS, kind)
    y = ops.select_norm(x, weight, bias, None, EPS, kind)
    assert y.dtype == dtype
    weights = torch.randn(30, 16).to(dtype)
    results = (y, *gradients(y, weights, x, weight, bias))
    for value, exact in zip(results, (oracle, *gradients(oracle, weights.float(), *wide))):
        if value.dtype == torch.float32:
            assert_close_fp32(value, exact)
        else:  # rounded once, from exact inputs
            assert_close_low_precision(value, exact.to(value.dtype), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_agrees_with_central_differences(kind):
    # In fp32 the op is too coarse for gradcheck; differences of the fp64 oracle check its gradient,
    # which test_forward_and_backward_match_the_oracle compares with the op's.
    rows = draw_rows(6, 4)
    x = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    weight, bias = draw_parameters(5, kind, torch.double)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    assert torch.autograd.gradcheck(
        lambda x, w, b=None: reference.select_norm(x, rows, w, b, EPS, kind), inputs
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_stream_adds_its_gradient_into_the_stream(kind, share):
    rows = None if share is None else draw_rows(12, round(12 * share))
    leaf = torch.randn(12, 6, requires_grad=True)
    weight, bias = draw_parameters(6, kind)
    expected_y = reference.select_norm(leaf, rows, weight, bias, EPS, kind)
    weights, row_weights = torch.randn(12, 6), torch.randn(expected_y.shape)
    inputs = [t for t in (leaf, weight, bias) if t is not None]
    expected = torch.autograd.grad(
        (leaf * weights).sum() + (expected_y * row_weights).sum(), inputs
    )
    before = leaf.clone()
    x, y = ops.residual_select_norm(before, weight, bias, rows, EPS, kind)
    assert x.data_ptr() == before.data_ptr()
    assert_close_fp32(y, expected_y)
    grads = torch.autograd.grad((x * weights).sum() + (y * row_weights).sum(), inputs)
    for grad, expected_grad in zip(grads, expected):
        assert_close_fp32(grad, expected_grad)


def test_stream_may_change_in_place_and_its_gradient_stays_one_buffer():
    rows = draw_rows(20, 9)
    leaf = torch.randn(20, 8, requires_grad=True)
    weight, _ = draw_parameters(8, "rms")
    weights = torch.randn(20, 8)

    def oracle(x):
        y = reference.select_norm(x, rows, weight, None, EPS, "rms")
        return reference.residual_scatter(x, y.tanh(), rows)

    expected = torch.autograd.grad((oracle(oracle(leaf)) * weights).sum(), (leaf, weight))
    x, incoming = leaf.clone(), []
    for _ in range(2):
        x, y = ops.residual_select_norm(x, weight, None, rows, EPS)
        x = ops.residual_scatter_(x, y.tanh(), rows)
        x.register_hook(lambda dx: incoming.append(dx.data_ptr()))
    grads = torch.autograd.grad((x * weights).sum(), (leaf, weight))
    for grad, expected_grad in zip(grads, expected):
        assert_close_fp32(grad, expected_grad)
    # The first one may be somebody else's; the ops work on one buffer from there on.
    assert len(incoming) == 2
    assert incoming[1] == grads[0].data_ptr()


@pytest.mark.parametrize("used", ["x", "y"])
def test_only_one_result_of_the_stream_is_used(used):
    rows = draw_rows(10, 4)
    leaf = torch.randn(10, 5, requires_grad=True)
    weight, _ = draw_parameters(5, "rms")
    expected_y = reference.select_norm(leaf, rows, weight, None, EPS, "rms")
    x, y = ops.residual_select_norm(leaf.clone(), weight, None, rows, EPS)
    value, expected = (x, leaf) if used == "x" else (y, expected_y)
    (grad,) = torch.autograd.grad(value.square().sum(), leaf)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), leaf)
    assert_close_fp32(grad, expected_grad)


@pytest.mark.parametrize("function", [ops.select_norm, ops.residual_select_norm])
def test_gradients_only_where_they_are_wanted(function):
    rows = draw_rows(10, 4)

    def result(x, weight, bias):
        output = function(x, weight, bias, rows, EPS, "layer")
        return output[1] if isinstance(output, tuple) else output

    weight, bias = draw_parameters(5, "layer")
    x = torch.randn(10, 5)
    assert not result(x.clone(), weight.detach(), bias.detach()).requires_grad
    with torch.no_grad():
        assert not result(x.clone(), weight, bias).requires_grad
    expected = reference.select_norm(x, rows, weight, bias, EPS, "layer").square().sum()
    for arguments, wanted in (
        ((weight, bias), (weight, bias)),
        ((weight, bias.detach()), (weight,)),
        ((weight.detach(), bias), (bias,)),
    ):
        grads = torch.autograd.grad(result(x.clone(), *arguments).square().sum(), wanted)
        expected_grads = torch.autograd.grad(expected, wanted, retain_graph=True)
        for grad, expected_grad in zip(grads, expected_grads):
            assert_close_fp32(grad, expected_grad)


def test_frozen_weights_ask_for_no_weight_gradient():
    x, rows = torch.randn(9, 4), draw_rows(9, 3)
    y, x_rows, mean, rstd = torch.ops.lemo.select_norm(
        x, rows, torch.ones(4), torch.zeros(4), EPS, "layer", True
    )
    assert torch.equal(x_rows, x[rows.long()])
    dweight, dbias = torch.ops.lemo.select_norm_backward(
        y, x_rows, rows, torch.ones(4), mean, rstd, "layer", torch.zeros(9, 4), False
    )
    assert dweight.numel() == dbias.numel() == 0


def test_nothing_kept_gives_zero_gradients():
    x = torch.randn(5, 3, requires_grad=True)
    weight, bias = draw_parameters(3, "layer")
    y = ops.select_norm(x, weight, bias, torch.zeros(0, dtype=torch.int32), EPS, "layer")
    assert y.shape == (0, 3)
    for grad in torch.autograd.grad(y.sum(), (x, weight, bias)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_strided_input():
    x = torch.randn(8, 6).T.requires_grad_()
    weight, _ = draw_parameters(8, "rms")
    y, expected = (
        ops.select_norm(x, weight, eps=EPS),
        reference.select_norm(x, None, weight, None, EPS, "rms"),
    )
    weights = torch.randn(8, 6).T
    assert_close_fp32(y, expected)
    assert_close_fp32(gradients(y, weights, x)[0], gradients(expected, weights, x)[0])


def test_opcheck():
    rows = draw_rows(9, 4)
    for kind in KINDS:
        weight, bias = torch.randn(6), torch.randn(6) if kind == "layer" else None
        for index in (rows, None):
            sample = (torch.randn(9, 6), index, weight, bias, EPS, kind, True)
            torch.library.opcheck(torch.ops.lemo.select_norm.default, sample)
            y, x_rows, mean, rstd = torch.ops.lemo.select_norm(*sample)
            for weight_grad in (True, False):
                torch.library.opcheck(
                    torch.ops.lemo.select_norm_backward.default,
                    (y, x_rows, index, weight, mean, rstd, kind, torch.randn(9, 6), weight_grad),
                )


def test_repeats_are_bit_equal_whatever_the_number_of_threads():
    rows = draw_rows(1500, 1200)
    x = torch.randn(1500, 64, requires_grad=True)
    weight, bias = draw_parameters(64, "layer")
    weights = torch.randn(1200, 64)

    def results():
        y = ops.select_norm(x, weight, bias, rows, EPS, "layer")
        return y, *gradients(y, weights, x, weight, bias)

    first = results()
    for _ in each_number_of_threads(1, 2, 3):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(first, results()))


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"x": torch.randn(6)}, ValueError, "'x': expected 2 dimension"),
        ({"x": torch.ones(6, 4).long()}, TypeError, "'x': expected float32, bfloat16 or float16"),
        ({"x": torch.ones(6, 0), "weight": torch.ones(0)}, ValueError, "'x': expected a hidden"),
        ({"weight": torch.ones(5)}, ValueError, "'weight': expected size 4 in dimension 0"),
        ({"weight": torch.ones(4).double()}, TypeError, "'weight': expected float32, bfloat16"),
        ({"bias": torch.ones(3)}, ValueError, "'bias': expected size 4 in dimension 0"),
        ({"kind": "rms"}, ValueError, "'bias': expected None for kind 'rms', got float32"),
        ({"kind": "batch"}, ValueError, "'kind': expected 'rms' or 'layer', got 'batch'"),
        ({"eps": -1.0}, ValueError, "'eps': expected a finite number of at least 0, got -1"),
        ({"eps": float("nan")}, ValueError, "'eps': expected a finite number of at least 0"),
        *BAD_ROWS,
    ],
)
@pytest.mark.parametrize("function", [ops.select_norm, ops.residual_select_norm])
def test_bad_inputs_name_the_argument(function, change, exception, message):
    arguments = {
        "x": torch.randn(6, 4),
        "weight": torch.ones(4),
        "bias": torch.ones(4),
        "rows": torch.tensor([1, 3]).int(),
        "kind": "layer",
    }
    with pytest.raises(exception, match="select_norm: argument " + message):
        function(**(arguments | change))


@pytest.mark.parametrize(
    ("index", "value", "exception", "message"),
    [
        (0, torch.randn(3, 4), ValueError, "'dy': expected size 2 in dimension 0"),
        (0, torch.randn(2, 4).bfloat16(), TypeError, "'dy': expected the dtype of 'dx'"),
        (1, torch.randn(2, 5), ValueError, "'x_rows': expected size 4 in dimension 1"),
        (4, torch.zeros(0), ValueError, "'mean': expected size 2 in dimension 0"),
        (5, torch.zeros(3), ValueError, "'rstd': expected size 2 in dimension 0"),
        (7, torch.randn(4, 6).T, ValueError, "'dx': expected a contiguous tensor"),
    ],
)
def test_bad_inputs_of_the_backward_op(index, value, exception, message):
    rows = torch.tensor([1, 3]).int()
    arguments = [torch.randn(2, 4), torch.randn(2, 4), rows, torch.ones(4)]
    arguments += [torch.zeros(2), torch.ones(2), "layer", torch.randn(6, 4), True]
    arguments[index] = value
    with pytest.raises(exception, match="select_norm_backward: argument " + message):
        call(torch.ops.lemo.select_norm_backward, *arguments)
