"""rope: what an operator has to pass, docs/design/testing.md."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo import ops, reference
from lemo.models.layers.batch import Batch
from lemo.packing.batch import PackedBatch
from tolerances import assert_close_fp32, assert_close_low_precision


def forward_and_grad(function, x, dy, *arguments):
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf, *arguments)
    return y, torch.autograd.grad(y, leaf, dy.to(y.dtype))[0]


def oracle_of(x, dy, cos, sin, rows):
    return forward_and_grad(reference.rope, x, dy, cos, sin, rows, False)


def draw_rows(tables: int, rows: int) -> torch.Tensor:
    return torch.randint(tables, (rows,)).int()


@given(
    rows=st.integers(0, 20),
    heads=st.integers(0, 5),
    half=st.integers(1, 70),
    tables=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_forward_and_backward_match_the_oracle(rows, heads, half, tables, seed):
    torch.manual_seed(seed)
    # Any tables: the two halves of a model's table are equal, which would hide a mix-up.
    cos, sin = torch.randn(2, tables, 2 * half).unbind()
    x, dy = torch.randn(2, rows, heads, 2 * half).unbind()
    index = draw_rows(tables, rows)
    results = forward_and_grad(ops.rope, x, dy, cos, sin, index)
    for result, oracle in zip(results, oracle_of(x, dy, cos, sin, index)):
        assert_close_fp32(result, oracle)
    whole = cos[index.long()], sin[index.long()]
    for result, oracle in zip(forward_and_grad(ops.rope, x, dy, *whole), results):
        assert torch.equal(result, oracle)


@pytest.mark.parametrize("table_dtype", [torch.float32, None])
@pytest.mark.parametrize("head_size", [64, 80, 128, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, head_size, table_dtype):
    cos, sin = torch.randn(2, 50, head_size, dtype=table_dtype or dtype).unbind()
    x, dy = torch.randn(2, 33, 9, head_size, dtype=dtype).unbind()
    rows = draw_rows(50, 33)
    results = forward_and_grad(ops.rope, x, dy, cos, sin, rows)
    plain = oracle_of(x, dy, cos, sin, rows)
    oracles = oracle_of(x.float(), dy.float(), cos.float(), sin.float(), rows)
    for result, by_torch, oracle in zip(results, plain, oracles):
        assert result.dtype == dtype
        assert_close_low_precision(result, by_torch, oracle)


def test_turns_pairs_by_position_times_frequency():
    half, positions = 8, torch.tensor([0, 1, 5, 1000])
    frequency = 10000.0 ** (-torch.arange(half) / half)
    angles = (positions[:, None] * frequency).repeat(1, 2)
    x = torch.randn(4, 3, 2 * half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones(4, 1, half), angles[:, None, :half]
    )
    result = ops.rope(x, angles.cos(), angles.sin())
    assert_close_fp32(result, torch.cat((turned.real, turned.imag), -1))
    back = torch.ops.lemo.rope(result, angles.cos(), angles.sin(), None, True)
    assert_close_fp32(back, x)


def test_a_batch_rotates_kept_rows_by_their_own_tables():
    device = torch.get_default_device()
    packed = PackedBatch((1, 40), None, None, device)
    heads = torch.randn(40, 2, 6)
    batch = Batch.of(packed, 8, device)
    assert batch.rotate(heads) is heads
    cos, sin = torch.randn(2, 40, 6).unbind()
    batch = replace(batch, rotary=(cos, sin))
    kept = ops.token_select(torch.rand(5), batch.layout, "ratio", 0.5, 1, 1)
    rows = kept.rows.long()
    assert torch.equal(batch.rotate(heads[rows], kept), batch.rotate(heads)[rows])
    assert_close_fp32(batch.rotate(heads), reference.rope(heads, cos, sin, None, False))


def test_saves_the_tables_and_the_index_only():
    cos, sin = torch.randn(2, 50, 6).unbind()
    rows, saved = draw_rows(50, 9), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.rope(torch.randn(9, 2, 6, requires_grad=True), cos, sin, rows)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (cos, sin, rows)}


def test_strided_inputs_and_a_second_derivative():
    cos, sin = torch.randn(7, 12).chunk(2, -1)
    x = torch.randn(7, 6, 5).transpose(1, 2)
    dy = torch.randn(6, 7, 5).permute(1, 2, 0)
    results = forward_and_grad(ops.rope, x, dy, cos, sin)
    for result, oracle in zip(results, oracle_of(x, dy, cos, sin, None)):
        assert_close_fp32(result, oracle)
    grads = []
    for function in (ops.rope, lambda *inputs: reference.rope(*inputs, None, False)):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(
            function(leaf, cos, sin).pow(3).sum(), leaf, create_graph=True
        )
        grads.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert_close_fp32(*grads)


def test_opcheck():
    cos, sin = torch.randn(2, 9, 6).unbind()
    x = torch.randn(5, 2, 6, requires_grad=True)
    for rows, tables in ((draw_rows(9, 5), (cos, sin)), (None, (cos[:5], sin[:5]))):
        torch.library.opcheck(torch.ops.lemo.rope.default, (x, *tables, rows, False))
        torch.library.opcheck(torch.ops.lemo.rope.default, (x, *tables, rows, True))


def test_repeats_are_bit_equal():
    cos, sin = torch.randn(2, 60, 32).unbind()
    x, dy = torch.randn(2, 70, 4, 32, dtype=torch.bfloat16).unbind()
    rows = draw_rows(60, 70)
    first = forward_and_grad(ops.rope, x, dy, cos, sin, rows)
    for _ in range(100):
        again = forward_and_grad(ops.rope, x, dy, cos, sin, rows)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"x": torch.randn(3, 4)}, ValueError, "'x': expected 3 dimension"),
        (
            {"x": torch.randn(3, 2, 4).long()},
            TypeError,
            "'x': expected float32, bfloat16 or float16, got int64",
        ),
        ({"x": torch.randn(3, 2, 5)}, ValueError, "'x': expected an even head size"),
        ({"cos": torch.randn(9, 6)}, ValueError, "'cos': expected size 4 in dimension 1"),
        ({"sin": torch.randn(9, 6)}, ValueError, "'sin': expected size 4 in dimension 1"),
        ({"sin": torch.randn(8, 4)}, ValueError, "'sin': expected size 9 in dimension 0"),
        ({"sin": torch.randn(9, 4).half()}, TypeError, "'sin': expected the dtype of 'cos'"),
        ({"cos": torch.randn(9)}, ValueError, "'cos': expected 2 dimension"),
        ({"rows": None}, ValueError, "'cos': expected size 3 in dimension 0"),
        (
            {"rows": torch.tensor([1, 2]).int()},
            ValueError,
            "'rows': expected size 3 in dimension 0",
        ),
        ({"rows": torch.tensor([1, 2, 3])}, TypeError, "'rows': expected int32, got int64"),
        pytest.param(
            {"rows": torch.tensor([1, 9, 0]).int()},
            ValueError,
            "'rows': expected rows of the tables, below 9, got 9 at index 1",
            marks=pytest.mark.cpu_only,
        ),
        pytest.param(
            {"rows": torch.tensor([1, 2, -1]).int()},
            ValueError,
            "'rows': expected rows of the tables, below 9, got -1 at index 2",
            marks=pytest.mark.cpu_only,
        ),
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    arguments = {
        "x": torch.randn(3, 2, 4),
        "cos": torch.randn(9, 4),
        "sin": torch.randn(9, 4),
        "rows": torch.tensor([8, 0, 3]).int(),
    }
    with pytest.raises(exception, match=message):
        ops.rope(**(arguments | change))
