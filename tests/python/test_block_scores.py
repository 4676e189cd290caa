"""block_scores: what an operator has to pass, docs/design/testing.md. It is not differentiable."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bad_inputs import bad_layouts
from devices import kernel_dtypes, on_gpu, working_dtype
from lemo import ops, reference
from lemo.packing.blocks import BlockLayout
from thread_counts import each_number_of_threads
from tolerances import assert_close_fp32, assert_close_low_precision

# The CUDA kernels take head sizes that are multiples of 8 up to 128. Low-precision inputs are exact
# in fp32 and every sum is fp32, so the fp32 tolerance holds for them, too.
HEAD_SIZES = st.sampled_from([8, 24, 64, 72, 128]) if on_gpu() else st.integers(1, 20)


def block_scores_kernels() -> tuple[str, ...]:
    """The names of the CUDA kernels that this GPU runs."""
    hopper = ("hopper",) if torch.cuda.get_device_capability() == (9, 0) else ()
    return (*hopper, "portable")


KERNELS = block_scores_kernels() if on_gpu() else ("auto",)


def draw(layout, heads, key_heads, head_dim, dtype=None):
    dtype = working_dtype() if dtype is None else dtype
    q = torch.randn(layout.num_tokens, heads, head_dim).to(dtype)
    return q, torch.randn(layout.num_tokens, key_heads, head_dim).to(dtype)


def oracle(q, k, layout, scale):
    return reference.block_scores(q, k, layout.block_starts, layout.cu_blocks, scale)


@given(
    seqlens=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    block_size=st.integers(1, 17),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=HEAD_SIZES,
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 99),
)
def test_matches_the_oracle(seqlens, block_size, key_heads, group, head_dim, kernel, seed):
    torch.manual_seed(seed)
    layout = BlockLayout.from_seqlens(seqlens, block_size)
    q, k = draw(layout, key_heads * group, key_heads, head_dim)
    scores = ops.block_scores(q, k, layout, 0.3, kernel)
    assert scores.dtype == torch.float32
    assert_close_fp32(scores, oracle(q.double(), k.double(), layout, 0.3))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block_size", [48, 64, 100, 300, 1000])
def test_sequences_of_several_tiles(block_size, kernel):
    # Tiles hold 128 queries and 256 keys: blocks that share a tile, and blocks that span several.
    layout = BlockLayout.from_seqlens([700, 0, 1, 290], block_size)
    for head_dim in (64, 128) if on_gpu() else (8,):
        q, k = draw(layout, 4, 2, head_dim)
        scores = ops.block_scores(q, k, layout, kernel=kernel)
        assert_close_fp32(scores, oracle(q.double(), k.double(), layout, head_dim**-0.5))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (20, 2)], ids=["mqa", "mha", "gqa"])
def test_groups_of_heads(heads, kernel):
    layout = BlockLayout.from_seqlens([300, 77], 32)
    q, k = draw(layout, *heads, 32)
    scores = ops.block_scores(q, k, layout, 1.0, kernel)
    assert_close_fp32(scores, oracle(q.double(), k.double(), layout, 1.0))


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_of_different_sizes(kernel):
    starts = [0, 5, 6, 150, 151, 600, 604, 700, 701, 702, 960]
    layout = dataclasses.replace(
        BlockLayout.from_seqlens([600, 360], 100),
        block_starts=torch.tensor(starts, dtype=torch.int32),
        cu_blocks=torch.tensor([0, 5, 10], dtype=torch.int32),
    )
    q, k = draw(layout, 2, 1, 16)
    scores = ops.block_scores(q, k, layout, 1.0, kernel)
    assert_close_fp32(scores, oracle(q.double(), k.double(), layout, 1.0))


@pytest.mark.gpu_only
@pytest.mark.parametrize("kernel", KERNELS)
def test_more_tiles_of_queries_than_parts_of_a_sum(kernel):
    # The kernels cut a sum into at most 128 parts: here a part has several tiles.
    tokens, blocks = 16500, 258
    layout = BlockLayout.from_seqlens([tokens, 200], 64)
    q, k = draw(layout, 1, 1, 8)
    pairs = torch.einsum("ihd,jhd->ij", q[:tokens].float(), k[:tokens].float()).clamp(min=0)
    pairs = torch.nn.functional.pad(pairs.tril(-1), (0, blocks * 64 - tokens) * 2)
    maxima = pairs.view(blocks, 64, blocks, 64).amax((1, 3))
    scores = ops.block_scores(q, k, layout, 1.0, kernel)
    assert_close_fp32(scores[:blocks], maxima.sum(0) / torch.arange(blocks, 0, -1))


@pytest.mark.gpu_only
@pytest.mark.parametrize("size", [64, 128])
def test_kernels_agree_where_a_thread_block_takes_many_tiles(size):
    # Every ring of buffers goes round many times; blocks begin at multiples of 8 and elsewhere.
    for block_size in (64, 100):
        layout = BlockLayout.from_seqlens([11000, 0, 3, 5000, 140, 77], block_size)
        q, k = draw(layout, 8, 2, size)
        scores = [ops.block_scores(q, k, layout, 1.0, kernel) for kernel in KERNELS]
        for other in scores[1:]:
            assert_close_fp32(other, scores[0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, kernel):
    layout = BlockLayout.from_seqlens([150, 33], 16)
    q, k = draw(layout, 4, 2, 16, dtype)
    scores = ops.block_scores(q, k, layout, kernel=kernel)
    expected = oracle(q.float(), k.float(), layout, 0.25)
    plain = oracle(q, k, layout, 0.25)
    assert scores.dtype == torch.float32
    assert_close_low_precision(scores.to(dtype), plain, expected)
    assert_close_fp32(scores, expected)  # the inputs are exact in fp32 and nothing is rounded


def widen(values):
    """Heads of size 1 as heads of size 8, padded with zeros."""
    return torch.nn.functional.pad(torch.tensor(values, dtype=working_dtype()), (0, 7))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_block_is_not_asked_by_itself_or_by_earlier_rows(kernel):
    layout = BlockLayout.from_seqlens([2, 1], 1)
    q = widen([[[5.0]], [[2.0]], [[7.0]]])
    k = widen([[[3.0]], [[11.0]], [[13.0]]])
    # Block 0 is asked by row 1 only (2 * 3, over two query blocks); nothing asks blocks 1 and 2.
    assert ops.block_scores(q, k, layout, 1.0, kernel).tolist() == [3.0, 0.0, 0.0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_negative_products_count_as_zero_and_heads_are_averaged(kernel):
    layout = BlockLayout.from_seqlens([2], 2)
    q = widen([[[0.0], [0.0]], [[-4.0], [6.0]]])
    k = widen([[[1.0]], [[0.0]]])
    assert ops.block_scores(q, k, layout, 2.0, kernel).tolist() == [6.0]


def test_inputs_that_require_grad_and_strided_ones():
    layout = BlockLayout.from_seqlens([30], 8)
    q = torch.randn(2, 30, 8, dtype=working_dtype()).transpose(0, 1).requires_grad_()
    k = torch.randn(1, 30, 8, dtype=working_dtype()).transpose(0, 1).requires_grad_()
    scores = ops.block_scores(q, k, layout, 1.0)
    assert not scores.requires_grad
    assert_close_fp32(scores, oracle(q.double(), k.double(), layout, 1.0))


def test_a_view_that_begins_between_16_byte_boundaries():
    layout = BlockLayout.from_seqlens([70], 16)
    q, k = draw(layout, 2, 1, 16)
    storage = torch.empty(q.numel() + 1, dtype=q.dtype)
    shifted = storage[1:].view(q.shape).copy_(q)
    assert torch.equal(ops.block_scores(shifted, k, layout), ops.block_scores(q, k, layout))


def test_opcheck():
    layout = BlockLayout.from_seqlens([20, 0, 7], 4)
    for dtype in kernel_dtypes():
        q, k = draw(layout, 4, 2, 8, dtype)
        sample = (q, k, layout.block_starts, layout.cu_blocks, 0.5)
        torch.library.opcheck(torch.ops.lemo.block_scores.default, sample)


def test_repeats_are_bit_equal_whatever_the_number_of_threads():
    layout = BlockLayout.from_seqlens([900, 400], 32)
    q, k = draw(layout, 2, 1, 16)
    first = ops.block_scores(q, k, layout)
    for _ in each_number_of_threads(1, 2, 3):
        assert all(torch.equal(first, ops.block_scores(q, k, layout)) for _ in range(2))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [64, 128] if on_gpu() else [8])
def test_a_hundred_repeats_are_bit_equal(size, kernel):
    layout = BlockLayout.from_seqlens([3000, 500] if on_gpu() else [200, 90], 32)
    q, k = draw(layout, 4, 2, size)
    first = ops.block_scores(q, k, layout, kernel=kernel)
    for _ in range(99):
        assert torch.equal(first, ops.block_scores(q, k, layout, kernel=kernel))


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
    with pytest.raises(NotImplementedError, match="block_scores: argument " + message):
        ops.block_scores(q, q, LAYOUT)


@pytest.mark.gpu_only
def test_hopper_is_taken_or_refused():
    layout = BlockLayout.from_seqlens([900], 64)
    q, k = draw(layout, 2, 1, 16)
    if "hopper" in KERNELS:
        auto = ops.block_scores(q, k, layout)
        assert torch.equal(auto, ops.block_scores(q, k, layout, kernel="hopper"))
        return
    message = "'kernel': expected 'auto' or 'portable' on this GPU with this build, got 'hopper'"
    with pytest.raises(NotImplementedError, match="block_scores: argument " + message):
        ops.block_scores(q, k, layout, kernel="hopper")


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
        pytest.param(
            {"kernel": "portable"},
            ValueError,
            "'kernel': expected 'auto' on the CPU, got 'portable'",
            marks=pytest.mark.cpu_only,
        ),
        *bad_layouts(LAYOUT),
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    arguments = {"q": torch.randn(10, 4, 4), "k": torch.randn(10, 2, 4), "layout": LAYOUT}
    with pytest.raises(exception, match="block_scores: argument " + message):
        ops.block_scores(**(arguments | change))


def test_an_unknown_kernel_is_refused_with_the_choices():
    q = torch.randn(10, 2, 8, dtype=working_dtype())
    message = "block_scores: argument 'kernel': expected .*'auto'.*, got 'fast'"
    with pytest.raises(ValueError, match=message):
        ops.block_scores(q, q, LAYOUT, kernel="fast")
