"""bf16_split, bf16_split_all: what operators have to pass (docs/design/testing.md); products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo import ops, reference
from tolerances import relative_error


@pytest.mark.parametrize("left", [False, True])
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 70),
    blocks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_matches_the_oracle(rows, columns, blocks, seed, left):
    torch.manual_seed(seed)
    x = torch.randn(rows, 3, columns) if blocks else torch.randn(rows, columns)
    found = ops.bf16_split(x, 0.7, left)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), reference.bf16_split(x, 0.7, left))


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
def test_several_matrices_are_split_one_behind_another(shapes, seed):
    torch.manual_seed(seed)
    xs = [torch.randn(shape) for shape in shapes]
    found = ops.bf16_split_all(xs, [rows for rows, _ in shapes])
    expected = [reference.bf16_split(x, 1.0, False).flatten() for x in xs]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), torch.cat(expected))


def test_a_matrix_is_read_as_so_many_rows():
    x = torch.randn(6, 8)
    for rows in (1, 2, 16, 48):
        found = ops.bf16_split_all([x[:, ::2], x], [1, rows])[3 * 24 :].float()
        assert torch.equal(found, reference.bf16_split(x.view(rows, -1), 1.0, False).flatten())


def test_ends_of_the_number_range():
    least = torch.finfo(torch.float32).tiny
    x = torch.tensor([[torch.inf, -torch.inf, 3.4e38, torch.nan, 0.0, -0.0, least, 1e30]])
    for left in (False, True):
        found, expected = ops.bf16_split(x, 1.0, left), reference.bf16_split(x, 1.0, left)
        assert torch.equal(found.float().nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_a_product_of_two_keeps_16_bits():
    torch.manual_seed(0)
    left, right = torch.randn(40, 16), torch.randn(30, 16)
    parts = ops.bf16_split(left, left=True), ops.bf16_split(right)
    wide = [part.flatten(1).double() for part in parts]
    oracle = left.double() @ right.double().T
    # Of each number half of an 8-bit number's last bit of a rest is missing, and low * low.
    assert relative_error(wide[0] @ wide[1].T, oracle) < 3 * 2**-17
    assert relative_error(left.bfloat16().double() @ right.bfloat16().double().T, oracle) > 2**-10


def test_blocks_of_a_product_are_added_up():
    """Rows in bf16 by a right operand, block by block, and the sum as a left operand."""
    torch.manual_seed(0)
    rows, right = torch.randn(20, 32).bfloat16(), torch.randn(8, 32)
    parts = ops.bf16_split(right.view(1, -1)).view(24, 32)
    product = (rows.float() @ parts.float().T).view(20, 3, 8)
    high, again, low = ops.bf16_split(product, 2.0, left=True).float().unbind(1)
    assert torch.equal(high, again)
    assert relative_error(high + low, 2 * rows.double() @ right.double().T) < 3 * 2**-17


def test_strided_rows():
    x = torch.randn(7, 24)[:, ::2]
    assert torch.equal(ops.bf16_split(x), ops.bf16_split(x.contiguous()))


def test_repeated_calls_are_bit_equal():
    x = torch.randn(300, 3, 16)
    first = ops.bf16_split(x, left=True)
    for again in [ops.bf16_split(x, left=True) for _ in range(5)]:
        assert torch.equal(first, again)


def test_opcheck():
    tests = ("test_schema", "test_faketensor")
    for x in (torch.randn(5, 8), torch.randn(5, 3, 8)):
        torch.library.opcheck(torch.ops.lemo.bf16_split.default, (x, 1.0, True), test_utils=tests)
    several = ([torch.randn(5, 8), torch.randn(3, 2)], [5, 1])
    torch.library.opcheck(torch.ops.lemo.bf16_split_all.default, several, test_utils=tests)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(4),), ValueError, "'x': expected 2 dimension"),
        ((torch.ones(4, 2, 2),), ValueError, r"'x': expected size 3 in dimension 1 \(the blocks"),
        ((torch.ones(4, 4, dtype=torch.float64),), TypeError, "'x': expected float32, got"),
        ((torch.ones(4, 4).bfloat16(),), TypeError, "'x': expected float32, got bfloat16"),
        ((torch.ones(4, 4), 1e39), ValueError, "'scale': expected a finite number, got"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.bf16_split(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], []), ValueError, "'xs': expected at least one matrix, got none"),
        (([torch.ones(2, 4)], [2, 2]), ValueError, "'rows': expected a number for each of the 1 "),
        (([torch.ones(2, 4)], [3]), ValueError, r"'rows': expected a divisor .*\[2, 4\] .* got 3"),
        (([torch.ones(2, 4)], [0]), ValueError, "'rows': expected a divisor .* got 0"),
        (([torch.ones(2, 4)], [-2]), ValueError, "'rows': expected a divisor .* got -2"),
        (([torch.ones(4).bfloat16()], [1]), TypeError, "'xs': expected float32, got bfloat16"),
        (
            ([torch.ones(4), torch.ones(4).double()], [1, 1]),
            TypeError,
            "'xs': expected float32, got",
        ),
    ],
)
def test_bad_arguments_of_several(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.bf16_split_all(*arguments)


def test_tangents_are_refused():
    x = torch.ones(2, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ops.bf16_split_all([x, dual], [2, 2])
