"""block_scores: the ladder of docs/DESIGN.md, section 4. It is not differentiable."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo import ops, reference
from lemo.layout import BlockLayout
from tolerances import assert_close_fp32, assert_close_low_precision


def draw(layout, heads, key_heads, head_dim, dtype=torch.float32):
    q = torch.randn(layout.num_tokens, heads, head_dim).to(dtype)
    return q, torch.randn(layout.num_tokens, key_heads, head_dim).to(dtype)


def oracle(q, k, layout, scale):
    return reference.block_scores(q, k, layout.block_starts, layout.cu_blocks, scale)


@given(
    seqlens=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    block_size=st.integers(1, 17),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_matches_the_oracle(seqlens, block_size, key_heads, group, head_dim, seed):
    torch.manual_seed(seed)
    layout = BlockLayout.from_seqlens(seqlens, block_size)
    q, k = draw(layout, key_heads * group, key_heads, head_dim)
    scores = ops.block_scores(q, k, layout, 0.3)
    assert scores.dtype == torch.float32
    assert_close_fp32(scores, oracle(q.double(), k.double(), layout, 0.3))


@pytest.mark.parametrize("block_size", [48, 64, 300, 1000])
def test_sequences_of_several_tiles(block_size):
    # Tiles hold 128 queries and 256 keys: blocks that share a tile, and blocks that span several.
    layout = BlockLayout.from_seqlens([700, 0, 1, 290], block_size)
    q, k = draw(layout, 4, 2, 8)
    scores = ops.block_scores(q, k, layout)
    assert_close_fp32(scores, oracle(q.double(), k.double(), layout, 8**-0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    layout = BlockLayout.from_seqlens([150, 33], 16)
    q, k = draw(layout, 4, 2, 16, dtype)
    scores = ops.block_scores(q, k, layout)
    expected = oracle(q.float(), k.float(), layout, 0.25)
    plain = oracle(q, k, layout, 0.25)
    assert scores.dtype == torch.float32
    assert_close_low_precision(scores.to(dtype), plain, expected)
    assert_close_fp32(scores, expected)  # the inputs are exact in fp32 and nothing is rounded


def test_a_block_is_not_asked_by_itself_or_by_earlier_rows():
    layout = BlockLayout.from_seqlens([2, 1], 1)
    q = torch.tensor([[[5.0]], [[2.0]], [[7.0]]])
    k = torch.tensor([[[3.0]], [[11.0]], [[13.0]]])
    # Block 0 is asked by row 1 only (2 * 3, over two query blocks); nothing asks blocks 1 and 2.
    assert ops.block_scores(q, k, layout, 1.0).tolist() == [3.0, 0.0, 0.0]


def test_negative_products_count_as_zero_and_heads_are_averaged():
    layout = BlockLayout.from_seqlens([2], 2)
    q = torch.tensor([[[0.0], [0.0]], [[-4.0], [6.0]]])
    k = torch.tensor([[[1.0]], [[0.0]]])
    assert ops.block_scores(q, k, layout, 2.0).tolist() == [6.0]


def test_inputs_that_require_grad_and_strided_ones():
    layout = BlockLayout.from_seqlens([30], 8)
    q = torch.randn(2, 30, 4).transpose(0, 1).requires_grad_()
    k = torch.randn(1, 30, 4).transpose(0, 1).requires_grad_()
    scores = ops.block_scores(q, k, layout, 1.0)
    assert not scores.requires_grad
    assert_close_fp32(scores, oracle(q.double(), k.double(), layout, 1.0))


def test_opcheck():
    layout = BlockLayout.from_seqlens([20, 0, 7], 4)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = draw(layout, 4, 2, 8, dtype)
        sample = (q, k, layout.block_starts, layout.cu_blocks, 0.5)
        torch.library.opcheck(torch.ops.lemo.block_scores.default, sample)


def test_repeats_are_bit_equal_whatever_the_number_of_threads():
    layout = BlockLayout.from_seqlens([900, 400], 32)
    q, k = draw(layout, 2, 1, 16)
    first, threads = ops.block_scores(q, k, layout), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(first, ops.block_scores(q, k, layout)) for _ in range(2))
    finally:
        torch.set_num_threads(threads)


LAYOUT = BlockLayout.from_seqlens([6, 4], 4)


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"q": torch.randn(10, 16)}, ValueError, "'q': expected 3 dimension"),
        ({"q": torch.ones(10, 4, 4).long()}, TypeError, "'q': expected float32, bfloat16"),
        ({"q": torch.randn(10, 3, 4)}, ValueError, r"'q': expected a multiple of the 2 head\(s\)"),
        ({"k": torch.randn(9, 2, 4)}, ValueError, "'k': expected size 10 in dimension 0"),
        ({"k": torch.randn(10, 2, 5)}, ValueError, "'k': expected size 4 in dimension 2"),
        ({"k": torch.randn(10, 0, 4)}, ValueError, "'k': expected at least one head"),
        (
            {"k": torch.randn(10, 2, 4).half()},
            TypeError,
            r"'k': expected the dtype of 'q' \(float32\), got float16",
        ),
        ({"scale": 0.0}, ValueError, "'scale': expected a finite number above 0, got 0"),
        ({"scale": float("inf")}, ValueError, "'scale': expected a finite number above 0"),
        (
            {"layout": BlockLayout.from_seqlens([11], 4)},
            ValueError,
            "'block_starts': expected a last entry of 10, got 11",
        ),
        (
            {"layout": dataclasses.replace(LAYOUT, block_starts=LAYOUT.block_starts.long())},
            TypeError,
            "'block_starts': expected int32, got int64",
        ),
        (
            {"layout": dataclasses.replace(LAYOUT, block_starts=torch.empty(0).int())},
            ValueError,
            "'block_starts': expected at least one entry",
        ),
        (
            {"layout": dataclasses.replace(LAYOUT, cu_blocks=LAYOUT.cu_blocks[:-1])},
            ValueError,
            "'cu_blocks': expected a last entry of 3, got 2",
        ),
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    arguments = {"q": torch.randn(10, 4, 4), "k": torch.randn(10, 2, 4), "layout": LAYOUT}
    with pytest.raises(exception, match="block_scores: argument " + message):
        ops.block_scores(**(arguments | change))
