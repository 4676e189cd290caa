"""block_attention: what an operator has to pass, docs/design/testing.md. It is not differentiable.

Low-precision inputs are exact in fp32 and every sum is fp32, so the fp32 tolerance holds for all
dtypes.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bad_inputs import bad_layouts
from devices import kernel_dtypes, no_synchronisation, on_gpu, working_dtype
from lemo import ops, reference
from lemo.packing.blocks import BlockLayout
from thread_counts import each_number_of_threads
from tolerances import assert_close_fp32

# The CUDA kernel takes head sizes that are multiples of 8 up to 128.
HEAD_SIZES = st.sampled_from([8, 24, 64, 72, 128]) if on_gpu() else st.integers(1, 20)


def draw(layout, num_rows, heads, key_heads, head_dim, dtype=None):
    """Queries at random rows, which may repeat, and keys."""
    dtype = working_dtype() if dtype is None else dtype
    rows = torch.randint(max(layout.num_tokens, 1), (num_rows if layout.num_tokens else 0,))
    q = torch.randn(len(rows), heads, head_dim).to(dtype)
    return q, torch.randn(layout.num_tokens, key_heads, head_dim).to(dtype), rows


def assert_matches_the_oracle(q, k, rows, layout, scale=0.3):
    results = ops.block_attention(q, k, rows, layout, scale)
    expected = reference.block_attention(
        q.double(), k.double(), rows, layout.block_starts, layout.cu_blocks, scale
    )
    for name, result, oracle in zip(("maximum", "logsumexp"), results, expected, strict=True):
        assert result.dtype == torch.float32
        assert_close_fp32(result, oracle, name)


@given(
    seqlens=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    block_size=st.integers(1, 17),
    num_rows=st.integers(0, 9),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=HEAD_SIZES,
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_matches_the_oracle(seqlens, block_size, num_rows, key_heads, group, head_dim, index, seed):
    torch.manual_seed(seed)
    layout = BlockLayout.from_seqlens(seqlens, block_size)
    q, k, rows = draw(layout, num_rows, key_heads * group, key_heads, head_dim)
    assert_matches_the_oracle(q, k, rows.to(index), layout)


# Tiles hold 128 queries and 64 or 512 keys; a thread block of a GPU takes the blocks that begin in
# 512 tokens.
@pytest.mark.parametrize("block_size", [1, 16, 48, 64, 100, 512, 513, 1500, 5000])
def test_blocks_of_every_size(block_size):
    layout = BlockLayout.from_seqlens([2300, 0, 1, 290], block_size)
    for head_dim in (64, 128):
        assert_matches_the_oracle(*draw(layout, 150, 4, 2, head_dim), layout)


def test_blocks_of_different_sizes():
    starts = [0, 5, 6, 150, 151, 600, 604, 700, 701, 702, 960]
    layout = dataclasses.replace(
        BlockLayout.from_seqlens([600, 360], 100),
        block_starts=torch.tensor(starts, dtype=torch.int32),
        cu_blocks=torch.tensor([0, 5, 10], dtype=torch.int32),
    )
    assert_matches_the_oracle(*draw(layout, 40, 2, 1, 16), layout)


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 700])
def test_tiles_of_queries(num_rows):
    layout = BlockLayout.from_seqlens([300, 77], 32)
    assert_matches_the_oracle(*draw(layout, num_rows, 3, 3, 32), layout)


@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (16, 2)], ids=["mqa", "mha", "gqa"])
def test_groups_of_heads(heads):
    layout = BlockLayout.from_seqlens([300, 77], 32)
    assert_matches_the_oracle(*draw(layout, 20, *heads, 32), layout)


@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_low_precision(dtype):
    layout = BlockLayout.from_seqlens([150, 33], 16)
    assert_matches_the_oracle(*draw(layout, 30, 4, 2, 16, dtype), layout)


def test_sequences_without_a_chosen_row_and_rows_in_any_order():
    layout = BlockLayout.from_seqlens([40, 600, 40, 9], 16)
    q, k, _ = draw(layout, 4, 2, 1, 8)
    rows = torch.tensor([639, 2, 638, 39])
    assert_matches_the_oracle(q, k, rows, layout)
    maximum, _ = ops.block_attention(q, k, rows, layout)
    seen = torch.isfinite(maximum[:, 0]).sum(1)
    assert seen.tolist() == [38, 1, 38, 3]


def widen(values):
    """Heads of size 1 as heads of size 8, padded with zeros."""
    return torch.nn.functional.pad(torch.tensor(values, dtype=working_dtype()), (0, 7))


def test_numbers_worked_out_by_hand():
    # Two sequences, of 3 tokens and of 1, in blocks of 2.
    layout = BlockLayout.from_seqlens([3, 1], 2)
    k = widen([[[1.0]], [[3.0]], [[5.0]], [[7.0]]])
    q = widen([[[2.0]], [[1.0]], [[-1.0]]])
    maximum, logsumexp = ops.block_attention(q, k, torch.tensor([2, 0, 3]), layout, 0.5)
    nothing = -math.inf
    assert maximum[:, 0].tolist() == [
        [3.0, 5.0, nothing],
        [0.5, nothing, nothing],
        [nothing, nothing, -3.5],
    ]
    pair = math.log(math.exp(1) + math.exp(3))
    expected = [[pair, 5.0, nothing], [0.5, nothing, nothing], [nothing, nothing, -3.5]]
    assert_close_fp32(logsumexp[:, 0], torch.tensor(expected))


def test_logits_that_no_exponential_holds():
    layout = BlockLayout.from_seqlens([3000], 1000)
    q, k, rows = draw(layout, 20, 2, 1, 64)
    assert_matches_the_oracle(64 * q, 64 * k, rows, layout, 1.0)


def test_weights_of_blocks_are_those_of_attention():
    layout = BlockLayout.from_seqlens([200], 64)
    q, k, rows = draw(layout, 10, 1, 1, 32)
    maximum, logsumexp = ops.block_attention(q, k, rows, layout)
    lse = logsumexp.logsumexp(-1, keepdim=True)
    logits = (q[:, 0].float() @ k[:, 0].float().T) * 32**-0.5
    weights = logits.masked_fill(torch.arange(200) > rows[:, None], -math.inf).softmax(-1)
    blocks = torch.nn.functional.pad(weights, (0, 56)).view(10, 4, 64)
    assert_close_fp32((maximum - lse).exp()[:, 0], blocks.amax(-1))
    assert_close_fp32((logsumexp - lse).exp()[:, 0], blocks.sum(-1))


def test_inputs_that_require_grad_and_strided_ones():
    layout = BlockLayout.from_seqlens([30], 8)
    q = torch.randn(2, 6, 8, dtype=working_dtype()).transpose(0, 1).requires_grad_()
    k = torch.randn(1, 30, 8, dtype=working_dtype()).transpose(0, 1).requires_grad_()
    rows = torch.arange(60).flip(0)[::10][:6] // 2
    assert not any(result.requires_grad for result in ops.block_attention(q, k, rows, layout))
    assert_matches_the_oracle(q.detach(), k.detach(), rows, layout)


def test_a_view_that_begins_between_16_byte_boundaries():
    layout = BlockLayout.from_seqlens([70], 16)
    q, k, rows = draw(layout, 9, 2, 1, 16)
    storage = torch.empty(k.numel() + 1, dtype=k.dtype)
    shifted = storage[1:].view(k.shape).copy_(k)
    results = (ops.block_attention(q, keys, rows, layout) for keys in (shifted, k))
    assert all(map(torch.equal, *results))


def test_opcheck():
    layout = BlockLayout.from_seqlens([20, 0, 7], 4)
    for dtype in kernel_dtypes():
        q, k, rows = draw(layout, 5, 4, 2, 8, dtype)
        sample = (q, k, rows, layout.block_starts, layout.cu_blocks, 0.5)
        torch.library.opcheck(torch.ops.lemo.block_attention.default, sample)


def test_repeats_are_bit_equal_whatever_the_number_of_threads():
    layout = BlockLayout.from_seqlens([900, 400], 32)
    arguments = *draw(layout, 200, 4, 2, 16), layout
    first = ops.block_attention(*arguments)
    for _ in each_number_of_threads(1, 2, 3):
        assert all(map(torch.equal, first, ops.block_attention(*arguments)))


@pytest.mark.parametrize("size", [64, 128] if on_gpu() else [8])
def test_a_hundred_repeats_are_bit_equal(size):
    layout = BlockLayout.from_seqlens([3000, 500] if on_gpu() else [200, 90], 32)
    arguments = *draw(layout, 300 if on_gpu() else 20, 4, 2, size), layout
    first = ops.block_attention(*arguments)
    for _ in range(99):
        assert all(map(torch.equal, first, ops.block_attention(*arguments)))


def test_the_host_does_not_wait():
    layout = BlockLayout.from_seqlens([100, 30], 16)
    arguments = *draw(layout, 20, 2, 1, 8), layout
    with no_synchronisation():
        ops.block_attention(*arguments)


@pytest.mark.gpu_only
def test_rows_that_are_no_tokens_see_nothing():
    layout = BlockLayout.from_seqlens([100, 30], 16)
    rows = torch.tensor([-1, 129, 130, 2**31 - 1, -(2**31)])
    q, k, _ = draw(layout, 5, 2, 1, 8)
    seen = torch.tensor([False, True, False, False, False])
    for index in (rows, rows.int(), rows.where(seen, rows + 2**40)):
        for result in ops.block_attention(q, k, index, layout):
            assert torch.equal(torch.isfinite(result).any(-1).all(-1), seen)


@pytest.mark.gpu_only
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((10, 2, 16), torch.float32, "'q': expected bfloat16 or float16 on CUDA, got float32"),
        ((10, 2, 12), torch.bfloat16, "'q': expected a head size .* multiple of 8 up to 128"),
        ((10, 2, 136), torch.bfloat16, "'q': expected a head size .* multiple of 8 up to 128"),
    ],
)
def test_what_the_kernel_does_not_support(shape, dtype, message):
    q = torch.randn(shape, dtype=dtype)
    with pytest.raises(NotImplementedError, match="block_attention: argument " + message):
        ops.block_attention(q, q, torch.arange(10), LAYOUT)


@pytest.mark.gpu_only
@pytest.mark.parametrize("name", ["k", "rows", "layout"])
def test_an_argument_on_another_device(name):
    q = torch.randn(10, 2, 8, dtype=torch.bfloat16)
    arguments = {"q": q, "k": q, "rows": torch.arange(10), "layout": LAYOUT}
    if name == "layout":
        arguments[name] = BlockLayout.from_seqlens([6, 4], 4, device="cpu")
    else:
        arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=r"expected the device of 'q' \(cuda:\d+\), got cpu"):
        ops.block_attention(**arguments)


LAYOUT = BlockLayout.from_seqlens([6, 4], 4)


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"q": torch.randn(3, 16)}, ValueError, "'q': expected 3 dimension"),
        ({"q": torch.ones(3, 4, 4).long()}, TypeError, "'q': expected float32, bfloat16"),
        ({"q": torch.randn(3, 3, 4)}, ValueError, r"'q': expected a multiple of the 2 head\(s\)"),
        ({"k": torch.randn(10, 8)}, ValueError, "'k': expected 3 dimension"),
        ({"k": torch.randn(10, 2, 5)}, ValueError, "'k': expected size 4 in dimension 2"),
        ({"k": torch.randn(10, 0, 4)}, ValueError, "'k': expected at least one head"),
        (
            {"k": torch.randn(10, 2, 4).half()},
            TypeError,
            r"'k': expected the dtype of 'q' \(float32\), got float16",
        ),
        ({"rows": torch.ones(3)}, TypeError, "'rows': expected int32 or int64, got float32"),
        ({"rows": torch.ones(3, 1).int()}, ValueError, "'rows': expected 1 dimension"),
        ({"rows": torch.ones(4).int()}, ValueError, "'rows': expected size 3 in dimension 0"),
        pytest.param(
            {"rows": torch.tensor([1, -1, 2])},
            ValueError,
            "'rows': expected indices of the 10 rows of 'k', got -1",
            marks=pytest.mark.cpu_only,
        ),
        pytest.param(
            {"rows": torch.tensor([1, 2**32 + 3, 2])},
            ValueError,
            "'rows': expected indices of the 10 rows of 'k', got 4294967299",
            marks=pytest.mark.cpu_only,
        ),
        ({"scale": 0.0}, ValueError, "'scale': expected a finite number above 0, got 0"),
        ({"scale": 1e300}, ValueError, "'scale': expected a finite number above 0"),
        *bad_layouts(LAYOUT),
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    arguments = {
        "q": torch.randn(3, 4, 4),
        "k": torch.randn(10, 2, 4),
        "rows": torch.tensor([9, 0, 4]),
        "layout": LAYOUT,
    }
    with pytest.raises(exception, match="block_attention: argument " + message):
        ops.block_attention(**(arguments | change))
