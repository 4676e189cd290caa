"""predictor: what an operator has to pass, docs/design/testing.md."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bad_inputs import bad_layouts
from devices import on_gpu
from lemo import ops, reference
from lemo.ops.call import call
from lemo.packing.blocks import BlockLayout
from thread_counts import each_number_of_threads
from tolerances import assert_close_fp32, assert_close_low_precision


def draw_weights(hidden, first, second, out, dtype=torch.float32):
    """Three maps of unit gain. Their mean is above 0, so that scores do not cancel to nothing."""
    return [
        (torch.randn(rows, columns) / columns**0.5 + gain / columns).to(dtype).requires_grad_()
        for rows, columns, gain in ((first, hidden, 0), (second, first, 1), (out, second, 2))
    ]


def oracle(x, keys, queries, layout):
    queries = queries or (None, None, None)
    return reference.predictor(x, *keys, *queries, layout.block_starts, layout.cu_blocks)


def cast(weights, dtype):
    return weights and [w.detach().to(dtype).requires_grad_() for w in weights]


def gradients(scores, direction, keys, queries):
    weights = [*keys, *(queries or ())]
    return torch.autograd.grad((scores * direction).sum(), weights)


def compare_in_low_precision(x, keys, queries, layout):
    """Errors at most twice those of plain torch in the dtype of x, to which CUDA rounds weights."""
    dtype = x.dtype
    low_keys, low_queries = cast(keys, dtype), cast(queries, dtype)
    wide_keys, wide_queries = cast(keys, torch.float32), cast(queries, torch.float32)
    direction = torch.rand(layout.num_blocks).to(dtype)
    scores = ops.predictor(x, keys, queries, layout)
    exact = oracle(x.float(), wide_keys, wide_queries, layout)
    plain = oracle(x, low_keys, low_queries, layout)
    assert scores.dtype == torch.float32
    assert_close_low_precision(scores.to(dtype), plain, exact)
    for weight, grad, plain_grad, exact_grad in zip(
        [*keys, *(queries or ())],
        gradients(scores, direction.float(), keys, queries),
        gradients(plain, direction, low_keys, low_queries),
        gradients(exact, direction.float(), wide_keys, wide_queries),
    ):
        assert grad.dtype == weight.dtype
        assert_close_low_precision(grad.to(dtype), plain_grad, exact_grad)


def compare_with_oracle(x, keys, queries, layout):
    exact_keys, exact_queries = cast(keys, torch.double), cast(queries, torch.double)
    expected = oracle(x.double(), exact_keys, exact_queries, layout)
    direction = 0.5 + torch.rand(layout.num_blocks)
    scores = ops.predictor(x, keys, queries, layout)
    assert scores.dtype == torch.float32
    assert_close_fp32(scores, expected)
    if layout.num_blocks == 0:
        return
    grads = gradients(scores, direction, keys, queries)
    expected_grads = gradients(expected, direction.double(), exact_keys, exact_queries)
    for grad, expected_grad in zip(grads, expected_grads):
        assert_close_fp32(grad, expected_grad)


@pytest.mark.parametrize("has_queries", [True, False])
@given(
    seqlens=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    block_size=st.integers(1, 17),
    hidden=st.integers(1, 30),
    first=st.integers(1, 12),
    second=st.integers(1, 12),
    out=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_matches_the_oracle(has_queries, seqlens, block_size, hidden, first, second, out, seed):
    torch.manual_seed(seed)
    layout = BlockLayout.from_seqlens(seqlens, block_size)
    x = torch.randn(layout.num_tokens, hidden)
    keys = draw_weights(hidden, first, second, out if has_queries else 1)
    queries = draw_weights(hidden, second, first, out) if has_queries else None
    compare_with_oracle(x, keys, queries, layout)


@pytest.mark.parametrize("block_size", [100, 600, 2000])
def test_sequences_of_several_panels_and_chunks(block_size):
    # Products cover 256 rows and gradients are summed over chunks of 512: blocks that share a
    # panel, and blocks that span several.
    layout = BlockLayout.from_seqlens([1100, 0, 1, 520], block_size)
    x = torch.randn(layout.num_tokens, 24)
    compare_with_oracle(x, draw_weights(24, 8, 6, 5), draw_weights(24, 7, 9, 5), layout)
    compare_with_oracle(x, draw_weights(24, 8, 6, 1), None, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_queries", [True, False])
def test_low_precision(dtype, has_queries):
    layout = BlockLayout.from_seqlens([90, 33], 16)
    x = torch.randn(layout.num_tokens, 32).to(dtype)
    keys = draw_weights(32, 16, 12, 8 if has_queries else 1, dtype)
    queries = draw_weights(32, 16, 12, 8, dtype) if has_queries else None
    compare_in_low_precision(x, keys, queries, layout)
    if not on_gpu():  # where products are fp32 the inputs are exact and nothing is rounded
        exact = oracle(x.float(), cast(keys, torch.float32), cast(queries, torch.float32), layout)
        assert_close_fp32(ops.predictor(x, keys, queries, layout), exact)


@pytest.mark.parametrize(
    "sizes", [(40, 24), (130, 7), (137, 93), (256, 200), (300, 20)], ids=lambda s: f"{s[0]}-{s[1]}"
)
@pytest.mark.parametrize("block_size", [5, 100, 300])
def test_sizes_of_the_hidden_layers(sizes, block_size):
    # On CUDA 128 and 256 units a layer take the fused kernel, and more take cuBLAS.
    layout = BlockLayout.from_seqlens([400, 0, 37], block_size)
    x = torch.randn(layout.num_tokens, 72).bfloat16()
    first, second = sizes
    keys = draw_weights(72, first, second, 9, torch.bfloat16)
    compare_in_low_precision(x, keys, draw_weights(72, second, first, 9, torch.bfloat16), layout)
    compare_in_low_precision(x, draw_weights(72, first, second, 1, torch.bfloat16), None, layout)


def test_a_hidden_size_between_16_byte_boundaries():
    layout = BlockLayout.from_seqlens([150], 32)
    x = torch.randn(150, 71).bfloat16()
    keys, queries = (draw_weights(71, 20, 12, 5, torch.bfloat16) for _ in range(2))
    compare_in_low_precision(x, keys, queries, layout)


def test_low_precision_activations_with_fp32_weights():
    layout = BlockLayout.from_seqlens([50], 16)
    x = torch.randn(50, 16).bfloat16()
    compare = compare_in_low_precision if on_gpu() else compare_with_oracle
    compare(x, draw_weights(16, 8, 8, 4), draw_weights(16, 8, 8, 4), layout)


def test_the_oracle_agrees_with_central_differences():
    # The op runs in fp32, too coarse for gradcheck; differences of the fp64 oracle check its
    # gradient, which compare_with_oracle compares with the op's.
    layout = BlockLayout.from_seqlens([7, 3], 3)
    x = torch.randn(10, 4, dtype=torch.double)
    weights = cast(draw_weights(4, 3, 5, 2) + draw_weights(4, 5, 3, 2), torch.double)
    assert torch.autograd.gradcheck(
        lambda *w: reference.predictor(x, *w, layout.block_starts, layout.cu_blocks), weights
    )


def test_only_wanted_gradients_and_none_for_x():
    layout = BlockLayout.from_seqlens([20], 8)
    x = torch.randn(20, 6, requires_grad=True)
    keys, queries = draw_weights(6, 4, 4, 3), cast(draw_weights(6, 4, 4, 3), torch.float32)
    expected = oracle(x.detach(), keys, queries, layout).sum()
    (expected_grad,) = torch.autograd.grad(expected, keys[1])
    frozen = [w.detach() for w in queries]
    scores = ops.predictor(x, [keys[0].detach(), keys[1], keys[2].detach()], frozen, layout)
    scores.sum().backward()  # a gradient that torch expands from a single number
    assert_close_fp32(keys[1].grad, expected_grad)
    assert x.grad is None
    assert keys[0].grad is None


def test_strided_inputs():
    layout = BlockLayout.from_seqlens([12], 5)
    keys = [w.detach().T.contiguous().T for w in draw_weights(6, 4, 5, 1)]
    x = torch.randn(6, 12).T
    assert_close_fp32(ops.predictor(x, keys, None, layout), oracle(x, keys, None, layout))


def test_opcheck():
    layout = BlockLayout.from_seqlens([20, 0, 7], 4)
    x, cuts = torch.randn(27, 6), (layout.block_starts, layout.cu_blocks)
    attention = cast(draw_weights(6, 4, 5, 3) + draw_weights(6, 5, 4, 3), torch.float32)
    mlp = cast(draw_weights(6, 4, 5, 1), torch.float32)
    for weights in (attention, [*mlp, None, None, None]):
        weights = [w if w is None else w.detach() for w in weights]
        torch.library.opcheck(torch.ops.lemo.predictor.default, (x, *weights, *cuts))
        torch.library.opcheck(
            torch.ops.lemo.predictor_backward.default,
            (torch.randn(layout.num_blocks), x, *weights, *cuts),
        )


def test_repeats_are_bit_equal_whatever_the_number_of_threads():
    layout = BlockLayout.from_seqlens([1300, 700], 64)
    x = torch.randn(2000, 16)
    keys, queries = draw_weights(16, 8, 8, 4), draw_weights(16, 8, 8, 4)
    direction = torch.randn(layout.num_blocks)

    def results():
        scores = ops.predictor(x, keys, queries, layout)
        return scores, *gradients(scores, direction, keys, queries)

    first = results()
    for _ in each_number_of_threads(1, 2, 3):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(first, results()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_repeats_are_bit_equal(dtype):
    layout = BlockLayout.from_seqlens([700, 90] if on_gpu() else [200, 90], 64)
    x = torch.randn(layout.num_tokens, 64).to(dtype)
    keys, queries = draw_weights(64, 40, 24, 8, dtype), draw_weights(64, 30, 40, 8, dtype)
    direction = torch.randn(layout.num_blocks)

    def results():
        scores = ops.predictor(x, keys, queries, layout)
        return scores, *gradients(scores, direction, keys, queries)

    first = results()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, results()))


LAYOUT = BlockLayout.from_seqlens([6, 4], 4)


def weights_but(index, value):
    weights = [torch.randn(5, 8), torch.randn(3, 5), torch.randn(2, 3)]
    weights[index] = value
    return weights


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"x": torch.randn(80)}, ValueError, "'x': expected 2 dimension"),
        ({"x": torch.ones(10, 8).int()}, TypeError, "'x': expected float32, bfloat16 or float16"),
        (
            {"key_weights": weights_but(0, torch.randn(5, 7))},
            ValueError,
            "'k_down': expected size 8 in dimension 1",
        ),
        (
            {"key_weights": weights_but(1, torch.randn(3, 6))},
            ValueError,
            r"'k_mid': expected size 5 in dimension 1 \(the rows of 'k_down'\)",
        ),
        (
            {"key_weights": weights_but(2, torch.randn(2))},
            ValueError,
            "'k_up': expected 2 dimension",
        ),
        (
            {"query_weights": weights_but(0, torch.ones(5, 8).long())},
            TypeError,
            "'q_down': expected float32, bfloat16 or float16",
        ),
        (
            {"query_weights": weights_but(1, torch.randn(3, 6))},
            ValueError,
            "'q_mid': expected size 5 in dimension 1",
        ),
        (
            {"query_weights": weights_but(2, torch.randn(4, 3))},
            ValueError,
            r"'q_up': expected size 2 in dimension 0 \(the rows of 'k_up'\)",
        ),
        (
            {"query_weights": weights_but(2, None)},
            ValueError,
            "'q_up': expected a tensor, as 'q_down' is one, got None",
        ),
        (
            {"query_weights": weights_but(0, None)},
            ValueError,
            r"'q_mid': expected None, as 'q_down' is, got float32 \[3, 5\]",
        ),
        ({"query_weights": None}, ValueError, r"'k_up': expected size 1 in dimension 0 \(one"),
        (
            {"key_weights": [torch.randn(5, 8)]},
            ValueError,
            r"'key_weights': expected 3 tensors \(down, mid, up\), got 1",
        ),
        *bad_layouts(LAYOUT),
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    arguments = {
        "x": torch.randn(10, 8),
        "key_weights": weights_but(0, torch.randn(5, 8)),
        "query_weights": weights_but(0, torch.randn(5, 8)),
        "layout": LAYOUT,
    }
    with pytest.raises(exception, match="predictor: argument " + message):
        ops.predictor(**(arguments | change))


def test_bad_gradient_names_the_argument():
    cuts = (LAYOUT.block_starts, LAYOUT.cu_blocks)
    weights = [w.detach() for w in draw_weights(8, 5, 3, 1)]
    with pytest.raises(ValueError, match="predictor_backward: argument 'dscores': expected size 3"):
        call(
            torch.ops.lemo.predictor_backward,
            torch.randn(2),
            torch.randn(10, 8),
            *weights,
            None,
            None,
            None,
            *cuts,
        )
