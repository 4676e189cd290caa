"""Operators on tensors of more than 2^31 elements.

On a GPU a small batch is repeated until it is that large: the results have to be the small one's,
repeated, everywhere. A test takes up to 17 GiB. On the CPU memory that is never touched takes no
room, so rows behind the 2^31st element of a residual are read and written.
"""

import pytest
import torch

from lemo import ops
from lemo.ops.segment_attention import attention_gradients
from lemo.ops.select_norm import select_norm_into
from lemo.packing.blocks import BlockLayout

PERIOD = 1024
HIDDEN, HEADS, DIM = 4096, 32, 128
# So many rows of 4096 features are a little more than 2^31 elements.
TIMES = 2**31 // (PERIOD * HIDDEN) + 1
ROWS = TIMES * PERIOD


def base(*shape):
    return torch.randn(PERIOD, *shape, dtype=torch.bfloat16)


def repeated(x):
    return x.repeat(TIMES, *[1] * (x.ndim - 1))


def assert_repeats(large, small):
    """Every period of `large` is the first one, and that is `small`."""
    assert torch.equal(large[: len(small)], small)
    for part in large.unflatten(0, (-1, len(small))).split(64):
        assert torch.equal(part, part[:1].expand_as(part))
        assert torch.equal(part[0], small)


# Rows of the residual


@pytest.fixture
def residual():
    """bf16 [ROWS, HIDDEN] whose memory nobody has touched, and some of its rows."""
    rows = torch.tensor([0, 2**19 - 1, 2**19, ROWS - 1], dtype=torch.int32)
    x = torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16)
    x[rows.long()] = torch.randn(len(rows), HIDDEN).to(x)
    return x, rows


def test_gathering(residual):
    x, rows = residual
    assert torch.equal(ops.residual_gather(x, rows)[1], x[rows.long()])


def test_scattering(residual):
    x, rows = residual
    y = torch.randn(len(rows), HIDDEN, dtype=torch.bfloat16)
    expected = x[rows.long()] + y
    ops.residual_scatter_(x, y, rows)
    assert torch.equal(x[rows.long()], expected)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_rows(residual, kind):
    x, rows = residual
    weight = torch.randn(HIDDEN, dtype=torch.bfloat16)
    picked = x[rows.long()]
    expected = ops.select_norm(picked, weight, kind=kind)
    assert torch.equal(ops.select_norm(x, weight, rows=rows, kind=kind), expected)
    leaf = picked.clone().requires_grad_()
    dy = torch.randn(len(rows), HIDDEN, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(ops.select_norm(leaf, weight, kind=kind), leaf, dy)
    before = x[rows.long()]
    leaf = picked.clone().requires_grad_()
    select_norm_into(leaf, weight, None, rows, x, 1e-6, kind).backward(dy)
    difference = (x[rows.long()] - before).float() - gradient.float()
    assert difference.norm() < 0.02 * gradient.float().norm()


def test_tables_of_rotations():
    positions = 2**31 // DIM + 4
    cos, sin = (torch.empty(positions, DIM, dtype=torch.bfloat16) for _ in range(2))
    rows = torch.tensor([0, 2**24 - 1, positions - 1], dtype=torch.int32)
    for table in (cos, sin):
        table[rows.long()] = torch.randn(len(rows), DIM).to(table)
    x = torch.randn(len(rows), 4, DIM, dtype=torch.bfloat16)
    expected = ops.rope(x, cos[rows.long()], sin[rows.long()])
    assert torch.equal(ops.rope(x, cos, sin, rows), expected)


def test_rows_of_long_sequences():
    """4 million tokens in blocks of 64."""
    tokens = 2**22 - 5
    layout = BlockLayout.from_seqlens([tokens], 64)
    selection = ops.token_select(torch.rand(layout.num_blocks), layout, "ratio", 1 / 16, 0, 1)
    rows = selection.rows.long()
    assert selection.num_rows == 4096 * 64 - 5
    assert rows[-1] == tokens - 1
    assert torch.equal(rows.unique(), rows)
    assert torch.equal(selection.positions.long(), rows)


# Everything large, on a GPU


@pytest.mark.gpu_only
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_everything(kind):
    small, weight = base(HIDDEN), torch.randn(HIDDEN, dtype=torch.bfloat16)
    leaf, dy = small.clone().requires_grad_(), base(HIDDEN)
    expected = ops.select_norm(leaf, weight, kind=kind)
    (gradient,) = torch.autograd.grad(expected, leaf, dy)
    large = repeated(small).requires_grad_()
    y = ops.select_norm(large, weight, kind=kind)
    assert_repeats(y.detach(), expected.detach())
    assert_repeats(torch.autograd.grad(y, large, repeated(dy))[0], gradient)


@pytest.mark.gpu_only
def test_swiglu():
    small, dy = base(HIDDEN), base(HIDDEN)
    leaf = small.clone().requires_grad_()
    expected = ops.swiglu(leaf, leaf * 1)
    gradients = torch.autograd.grad(ops.swiglu(leaf, small), leaf, dy)
    large = repeated(small)
    assert_repeats(ops.swiglu(large, large), expected.detach())
    leaf = large.requires_grad_()
    y = ops.swiglu(leaf, leaf.detach())
    assert_repeats(torch.autograd.grad(y, leaf, repeated(dy))[0], gradients[0])


@pytest.mark.gpu_only
def test_rotations():
    small = base(HEADS, DIM)
    cos, sin = base(DIM), base(DIM)
    for transposed in (False, True):
        expected = ops.rope(small, cos, sin, None, transposed)
        index = torch.arange(PERIOD, dtype=torch.int32).repeat(TIMES)
        assert_repeats(ops.rope(repeated(small), cos, sin, index, transposed), expected)


@pytest.mark.gpu_only
@pytest.mark.parametrize("group_size", [0, 256])
@pytest.mark.parametrize("window", [0, 300])
def test_attention(window, group_size):
    """Many short sequences; gradients as if the results' gradient were the queries."""
    q, k, v = base(HEADS, DIM), base(2, DIM), base(2, DIM)
    settings = DIM**-0.5, window, group_size
    cu = torch.tensor([0, PERIOD], dtype=torch.int32)
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = torch.ops.lemo.segment_attention(q, k, v, cu, cu, None, None, *settings)
        expected = attention_gradients(q, q, k, v, out, lse, cu, cu, None, None, *settings)
        cu = torch.arange(TIMES + 1, dtype=torch.int32) * PERIOD
        q, k, v = map(repeated, (q, k, v))
        large, lse = torch.ops.lemo.segment_attention(q, k, v, cu, cu, None, None, *settings)
        assert_repeats(large, out)
        large = attention_gradients(q, q, k, v, large, lse, cu, cu, None, None, *settings)
        del q, k, v, lse
        for gradient, small in zip(large, expected):
            assert_repeats(gradient, small)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu_only
def test_attention_to_a_far_key():
    """One sequence of more than 2^31 elements, whose heads see a window."""
    window = 64
    q, k, v = base(HEADS, DIM), base(2, DIM), base(2, DIM)
    settings = DIM**-0.5, window, 0
    cu = torch.tensor([0, 2 * PERIOD], dtype=torch.int32)
    twice = [torch.cat((x, x)) for x in (q, k, v)]
    out, _ = torch.ops.lemo.segment_attention(*twice, cu, cu, None, None, *settings)
    cu = torch.tensor([0, ROWS], dtype=torch.int32)
    large = map(repeated, (q, k, v))
    large, _ = torch.ops.lemo.segment_attention(*large, cu, cu, None, None, *settings)
    assert torch.equal(large[:PERIOD], out[:PERIOD])
    for part in large[PERIOD:].unflatten(0, (-1, PERIOD)).split(64):
        error = (part.float() - out[PERIOD:].float()).norm() / part.float().norm()
        assert error < 1e-3


@pytest.mark.gpu_only
def test_loss():
    vocabulary = 256
    small, weight = base(HIDDEN), torch.randn(vocabulary, HIDDEN, dtype=torch.bfloat16) / 64
    labels = torch.randint(vocabulary, (PERIOD,))
    leaf = small.clone().requires_grad_()
    # Chunks of the same size, so that products are the same.
    settings = {"chunk_rows": PERIOD, "divisor": 1.0}
    expected = ops.linear_cross_entropy(leaf, weight, labels, **settings)
    (gradient,) = torch.autograd.grad(expected, leaf)
    leaf = repeated(small).requires_grad_()
    loss = ops.linear_cross_entropy(leaf, weight, labels.repeat(TIMES), **settings)
    assert loss.item() == pytest.approx(TIMES * expected.item(), rel=1e-3)
    assert_repeats(torch.autograd.grad(loss, leaf)[0], gradient)


@pytest.mark.gpu_only
def test_scores_of_blocks():
    q, k = base(HEADS, DIM), base(2, DIM)
    small = BlockLayout.from_seqlens([PERIOD], 64)
    large = BlockLayout.from_seqlens([PERIOD] * TIMES, 64)
    expected = ops.block_scores(q, k, small)
    found = ops.block_scores(repeated(q), repeated(k), large).unflatten(0, (TIMES, -1))
    # Sums are cut into parts by the number of all tiles.
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=0.0)


@pytest.mark.gpu_only
def test_predictors():
    x, small = base(HIDDEN), BlockLayout.from_seqlens([PERIOD], 64)
    large = BlockLayout.from_seqlens([PERIOD] * TIMES, 64)
    shapes = ((64, HIDDEN), (32, 64), (16, 32))
    keys, queries = (
        [torch.randn(s, dtype=torch.bfloat16) / s[1] ** 0.5 for s in shapes] for _ in "12"
    )
    expected = ops.predictor(x, keys, queries, small)
    found = ops.predictor(repeated(x), keys, queries, large)
    for part in found.unflatten(0, (TIMES, -1)):
        assert torch.allclose(part, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu_only
def test_attention_of_chosen_rows():
    """Keys of more than 2^31 elements."""
    q, k = base(HEADS, DIM)[-8:], base(HEADS, DIM)
    small = BlockLayout.from_seqlens([PERIOD], 64)
    large = BlockLayout.from_seqlens([PERIOD] * TIMES, 64)
    rows = torch.arange(PERIOD - 8, PERIOD)
    expected = ops.block_attention(q, k, rows, small)
    found = ops.block_attention(q, repeated(k), rows + ROWS - PERIOD, large)
    for all_blocks, blocks in zip(found, expected):
        assert torch.allclose(all_blocks[:, :, -blocks.shape[2] :], blocks, atol=1e-4)
        assert all_blocks[:, :, : -blocks.shape[2]].isneginf().all()
