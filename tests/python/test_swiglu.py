"""swiglu: what an operator has to pass, docs/design/testing.md."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from lemo import ops, reference
from tolerances import assert_close_fp32, assert_close_low_precision


def forward_and_grads(function, gate, up, dout):
    """(result, gradient of gate, gradient of up); the inputs are no leaves, as in a model."""
    leaves = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    y = function(*(leaf * 1 for leaf in leaves))
    return (y, *torch.autograd.grad(y, leaves, dout.to(y.dtype)))


@given(rows=st.integers(0, 40), columns=st.integers(0, 70), seed=st.integers(0, 99))
def test_forward_and_backward_match_the_oracle(rows, columns, seed):
    torch.manual_seed(seed)
    gate, up, dout = torch.randn(3, rows, columns).unbind()
    results = forward_and_grads(ops.swiglu, 4 * gate, up, dout)
    oracles = forward_and_grads(reference.swiglu, 4 * gate, up, dout)
    for name, result, oracle in zip(("y", "dgate", "dup"), results, oracles):
        assert_close_fp32(result, oracle, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    gate, up, dout = torch.randn(3, 33, 200, dtype=dtype).unbind()
    results = forward_and_grads(ops.swiglu, 3 * gate, up, dout)
    plain = forward_and_grads(lambda gate, up: silu(gate) * up, 3 * gate, up, dout)
    oracles = forward_and_grads(reference.swiglu, (3 * gate).float(), up.float(), dout.float())
    for name, result, by_torch, oracle in zip(("y", "dgate", "dup"), results, plain, oracles):
        assert result.dtype == dtype
        assert_close_low_precision(result, by_torch, oracle, name)


def test_ends_of_the_number_range():
    gate = torch.tensor([[-3e38, -1e4, -100.0, -88.0, -0.0, 0.0, 88.0, 1e4, 3e38, torch.nan]])
    y, dgate, dup = forward_and_grads(ops.swiglu, gate, torch.ones(1, 10), torch.ones(1, 10))
    expected, expected_dgate, _ = forward_and_grads(
        lambda gate, up: silu(gate) * up, gate, torch.ones(1, 10), torch.ones(1, 10)
    )
    assert torch.allclose(y, expected, rtol=2e-5, atol=1e-30, equal_nan=True)
    # 0 and 1 but for rounding, and nan stays nan.
    assert torch.allclose(dgate, expected_dgate, rtol=2e-5, atol=1e-30, equal_nan=True)
    assert torch.allclose(dup, expected, rtol=2e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 64), (33, 200), (3, 7), (0, 16), (2, 0)])
def test_the_result_in_8_bits_comes_with_it(shape, dtype):
    """The same bits as by two passes, and the same gradients."""
    gate, up, dout = torch.randn(3, *shape, dtype=dtype).unbind()
    y, (values, scales) = ops.swiglu_fp8(3 * gate, up)
    assert torch.equal(y, ops.swiglu(3 * gate, up))
    expected, expected_scales = ops.fp8_rows(y)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
    results = forward_and_grads(lambda *x: ops.swiglu_fp8(*x)[0], gate, up, dout)
    assert all(map(torch.equal, results, forward_and_grads(ops.swiglu, gate, up, dout)))


def test_strided_inputs():
    fused = torch.randn(7, 24)
    gate, up = fused.chunk(2, -1)
    dout = torch.randn(12, 7).T
    for inputs in ((gate, up), (gate.T.contiguous().T, up)):
        results = forward_and_grads(ops.swiglu, *inputs, dout)
        oracles = forward_and_grads(reference.swiglu, *inputs, dout)
        for result, oracle in zip(results, oracles):
            assert_close_fp32(result, oracle)


def test_fused_and_equal_inputs_do_not_overwrite_each_other():
    leaf, dout = torch.randn(6, 8, requires_grad=True), torch.randn(6, 4)
    for function in (ops.swiglu, reference.swiglu):
        (columns,) = torch.autograd.grad(function(*(leaf * 1).chunk(2, -1)), leaf, dout)
        (rows,) = torch.autograd.grad(function(*(leaf * 1).chunk(2)), leaf, dout.view(3, 8))
        same = leaf * 1
        (square,) = torch.autograd.grad(function(same, same), leaf, torch.ones(6, 8))
        if function is ops.swiglu:
            results = columns, rows, square
    for result, oracle in zip(results, (columns, rows, square)):
        assert_close_fp32(result, oracle)


def test_leaves_and_their_views_stay_as_they_are():
    gate, up = torch.randn(5, 8, requires_grad=True), torch.randn(4, 10, requires_grad=True)
    before = gate.detach().clone(), up.detach().clone()
    ops.swiglu(gate, up.view(5, 8)).square().sum().backward()
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
    assert gate.grad.any()
    assert up.grad.any()


def test_only_the_wanted_gradient_is_given():
    gate, up = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    before = gate.clone()
    (result,) = torch.autograd.grad(ops.swiglu(gate, up * 1).sum(), up)
    assert_close_fp32(result, silu(gate))
    assert torch.equal(gate, before)
    assert not ops.swiglu(gate, up.detach()).requires_grad


def test_a_graph_that_is_kept_runs_backward_again():
    leaf = torch.randn(3, 4, requires_grad=True)
    y = ops.swiglu(leaf * 1, leaf * 2)
    (expected,) = torch.autograd.grad((silu(leaf) * leaf * 2).sum(), leaf)
    for keeps in (True, True, False):
        (result,) = torch.autograd.grad(y.sum(), leaf, retain_graph=keeps)
        assert_close_fp32(result, expected)
    with pytest.raises(RuntimeError, match="a second time|modified by an inplace operation"):
        y.sum().backward()


def test_another_reader_of_the_overwritten_values_raises():
    leaf = torch.randn(3, 4, requires_grad=True)
    gate = leaf * 1
    square = gate * gate  # saves gate, and its backward pass comes after swiglu's
    y = ops.swiglu(gate, leaf * 2)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(use_reentrant):
    leaf = torch.randn(6, 8, requires_grad=True)

    def function(leaf):
        return ops.swiglu(leaf * 1.5, leaf * 2)

    (expected,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
    checkpoint(function, leaf, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(leaf.grad, expected)


def test_backward_allocates_nothing_and_saves_its_inputs_only():
    leaf = torch.randn(6, 8, requires_grad=True)
    gate, up = leaf * 1, leaf * 2
    storages = {gate.data_ptr(), up.data_ptr()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.swiglu(gate, up)
    assert {tensor.data_ptr() for tensor in saved} == storages
    grads = []
    gate.register_hook(lambda grad: grads.append(grad.data_ptr()))
    up.register_hook(lambda grad: grads.append(grad.data_ptr()))
    y.sum().backward()
    assert set(grads) == storages


def test_opcheck():
    gate, up, dout = torch.randn(3, 5, 6).unbind()
    torch.library.opcheck(torch.ops.lemo.swiglu.default, (gate, up))
    tests = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.lemo.swiglu_fp8.default, (gate, up), test_utils=tests)
    torch.library.opcheck(torch.ops.lemo.swiglu_backward.default, (dout, gate.clone(), up.clone()))


def test_repeats_are_bit_equal():
    gate, up, dout = torch.randn(3, 130, 72, dtype=torch.bfloat16).unbind()
    first = forward_and_grads(ops.swiglu, gate, up, dout)
    for _ in range(100):
        again = forward_and_grads(ops.swiglu, gate, up, dout)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"gate": torch.randn(6)}, ValueError, "'gate': expected 2 dimension"),
        (
            {"gate": torch.randn(6, 4).long()},
            TypeError,
            "'gate': expected float32, bfloat16 or float16, got int64",
        ),
        ({"up": torch.randn(6, 4).double()}, TypeError, "'up': expected float32, bfloat16"),
        ({"up": torch.randn(6, 4).half()}, TypeError, "'up': expected the dtype of 'gate'"),
        ({"up": torch.randn(5, 4)}, ValueError, "'up': expected size 6 in dimension 0"),
        ({"up": torch.randn(6, 5)}, ValueError, "'up': expected size 4 in dimension 1"),
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    arguments = {"gate": torch.randn(6, 4), "up": torch.randn(6, 4)}
    with pytest.raises(exception, match=message):
        ops.swiglu(**(arguments | change))
