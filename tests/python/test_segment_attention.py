"""segment_attention: the ladder of docs/DESIGN.md, section 4."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo import ops, reference
from tolerances import assert_close_fp32, assert_close_low_precision


def cuts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def draw_positions(lengths: list[int], span: int) -> torch.Tensor:
    """Ascending positions below `span`, drawn anew for each sequence."""
    drawn = [torch.randperm(span)[:length].sort().values for length in lengths]
    return torch.cat([torch.zeros(0, dtype=torch.long), *drawn]).int()


def make_inputs(q_lengths, k_lengths=None, heads=(6, 2), size=8, span=None, dtype=torch.float32):
    """(q, k, v, cu_q, cu_k, q_positions, k_positions); positions only with a span."""
    k_lengths = q_lengths if k_lengths is None else k_lengths
    q = torch.randn(sum(q_lengths), heads[0], size, dtype=dtype)
    k = torch.randn(sum(k_lengths), heads[1], size, dtype=dtype)
    v = torch.randn(sum(k_lengths), heads[1], size, dtype=dtype)
    positions = (None, None)
    if span is not None:
        positions = (draw_positions(q_lengths, span), draw_positions(k_lengths, span))
    return q, k, v, cuts(q_lengths), cuts(k_lengths), *positions


def differentiate(attention, inputs, dtype, dout):
    """(out, dq, dk, dv) of `attention(q, k, v, ...)` computed from q, k, v in `dtype`."""
    qkv = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs[:3]]
    out = attention(*qkv, *inputs[3:])
    return out, *torch.autograd.grad(out, qkv, dout.to(out.dtype))


def oracle(window=0, group_size=0, scale=None):
    def attention(q, *rest):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.segment_attention(q, *rest, factor, window, group_size)[0]

    return attention


def check_against_oracle(inputs, **settings):
    dout = torch.randn_like(inputs[0])
    results = differentiate(
        lambda *args: ops.segment_attention(*args, **settings), inputs, torch.float32, dout
    )
    expected = differentiate(oracle(**settings), inputs, torch.float64, dout)
    for name, result, right in zip(("out", "dq", "dk", "dv"), results, expected):
        assert_close_fp32(result, right, name)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    heads_per_kv=st.integers(1, 3),
    size=st.integers(1, 17),
    with_positions=st.booleans(),
    window=st.sampled_from([0, 1, 7, 30]),
    group_size=st.sampled_from([0, 1, 8, 13]),
    seed=st.integers(0, 99),
)
def test_forward_and_backward_match_the_oracle(
    lengths, kv_heads, heads_per_kv, size, with_positions, window, group_size, seed
):
    torch.manual_seed(seed)
    inputs = make_inputs(
        [q for q, _ in lengths],
        [k for _, k in lengths],
        heads=(kv_heads * heads_per_kv, kv_heads),
        size=size,
        span=60 if with_positions else None,
    )
    check_against_oracle(inputs, window=window, group_size=group_size)


@pytest.mark.parametrize("heads", [(6, 2), (3, 1), (2, 2)], ids=["gqa", "mqa", "mha"])
@pytest.mark.parametrize(
    "settings", [{}, {"window": 300}, {"group_size": 256}, {"scale": -0.3}], ids=str
)
def test_several_tiles(heads, settings):
    """Longer than a tile of queries and two tiles of keys, and of different kept sets."""
    inputs = make_inputs([620, 0, 70], [700, 9, 300], heads, size=16, span=1200)
    check_against_oracle(inputs, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"window": 50, "group_size": 64}], ids=str)
def test_low_precision(dtype, settings):
    inputs = make_inputs([150, 40], [130, 60], size=32, span=200, dtype=dtype)
    dout = torch.randn_like(inputs[0])
    results = differentiate(
        lambda *args: ops.segment_attention(*args, **settings), inputs, dtype, dout
    )
    plain = differentiate(oracle(**settings), inputs, dtype, dout)
    expected = differentiate(oracle(**settings), inputs, torch.float32, dout)
    for name, result, rough, right in zip(("out", "dq", "dk", "dv"), results, plain, expected):
        assert result.dtype == dtype
        assert_close_low_precision(result, rough, right, name)


def test_equals_dense_attention_of_torch_when_everything_is_kept():
    q, k, v, cu, *_ = make_inputs([90], size=16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert_close_fp32(ops.segment_attention(q, k, v, cu), expected[0].transpose(0, 1))


def test_log_sum_exp():
    inputs = make_inputs([90, 3], [80, 4], span=120)
    settings = (0.5, 40, 0)
    out, lse = torch.ops.lemo.segment_attention(*inputs, *settings)
    expected_out, expected_lse = reference.segment_attention(*inputs, *settings)
    assert_close_fp32(out, expected_out)
    assert_close_fp32(lse, expected_lse)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_opcheck(kernel):
    inputs = make_inputs([9, 3], [7, 4], span=20)
    settings = (0.3, 5, 4)
    if kernel == "backward":
        out, lse = torch.ops.lemo.segment_attention(*inputs, *settings)
        sample = (torch.randn_like(out), *inputs[:3], out, lse, *inputs[3:], *settings)
        torch.library.opcheck(torch.ops.lemo.segment_attention_backward.default, sample)
        return
    for positions in (inputs[5:], (None, None)):
        qkv = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
        sample = (*qkv, *inputs[3:5], *positions, *settings)
        torch.library.opcheck(torch.ops.lemo.segment_attention.default, sample)


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck asks for fp64
def test_gradcheck_by_central_differences():
    """The op runs in fp32: steps of 1e-2 leave differences good to about 1e-3."""
    q, k, v, cu_q, cu_k, *positions = make_inputs([5, 2], [4, 3], (2, 1), size=3, span=9)

    def attention(*qkv):
        return ops.segment_attention(*qkv, cu_q, cu_k, *positions)

    qkv = [tensor.requires_grad_() for tensor in (q, k, v)]
    assert torch.autograd.gradcheck(attention, qkv, eps=1e-2, atol=2e-3, rtol=1e-2, nondet_tol=0.0)


def test_query_that_sees_no_key():
    """The first two queries stand before every key; the third sees one."""
    q, k, v, cu_q, cu_k, *_ = make_inputs([3], [2])
    positions = torch.tensor([0, 3, 5]).int(), torch.tensor([5, 6]).int()
    out, lse = torch.ops.lemo.segment_attention(q, k, v, cu_q, cu_k, *positions, 1.0, 0, 0)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert torch.equal(lse[:, :2], torch.full_like(lse[:, :2], -torch.inf))
    assert_close_fp32(out[2], v[0].repeat_interleave(3, 0))
    qkv = [tensor.requires_grad_() for tensor in (q, k, v)]
    ops.segment_attention(*qkv, cu_q, cu_k, *positions).sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))
    assert torch.equal(v.grad[1], torch.zeros_like(v[1]))
    assert_close_fp32(v.grad[0], torch.full_like(v[0], 3.0))


@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [0, 0]), ([4], [0]), ([0], [4])], ids=str)
def test_nothing_kept(lengths):
    inputs = make_inputs(*lengths)
    results = differentiate(
        ops.segment_attention, inputs, torch.float32, torch.randn_like(inputs[0])
    )
    for result, like in zip(results, (inputs[0], *inputs[:3])):
        assert torch.equal(result, torch.zeros_like(like))


def test_one_token_attends_to_itself():
    q, k, v, cu, *_ = make_inputs([1, 1])
    assert_close_fp32(ops.segment_attention(q, k, v, cu), v.repeat_interleave(3, 1))


def test_large_scores_do_not_overflow():
    """exp() of fp32 overflows at 88; far larger scores would test the rounding of q . k instead."""
    q, k, *rest = make_inputs([40], size=16)
    assert (q[:, 0] @ k[:, 0].T).max() * 36 / 4 > 88
    check_against_oracle((q * 6, k * 6, *rest))


def test_views_are_taken_as_they_are():
    """Slices of one projection and a transposed gradient, as models pass them."""
    qkv = torch.randn(20, 10, 8, requires_grad=True)
    cu = cuts([20])

    def loss(attention):
        out = attention(qkv[:, :6], qkv[:, 6:8], qkv[:, 8:], cu)
        return torch.autograd.grad((out.transpose(0, 1) * weights).sum(), qkv)[0]

    weights = torch.randn(6, 20, 8)
    expected = loss(lambda q, k, v, cu: oracle()(q, k, v, cu, cu, None, None))
    assert_close_fp32(loss(ops.segment_attention), expected)


def test_repeats_are_bit_equal_whatever_the_threads():
    """One key/value head, so that several threads add to the same rows of dq at the same time."""
    inputs = make_inputs([1500, 100], heads=(4, 1), size=16)
    dout = torch.randn_like(inputs[0])
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 4, 8, 1):
            torch.set_num_threads(count)
            runs.append(differentiate(ops.segment_attention, inputs, torch.float32, dout))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"q": torch.randn(6, 8)}, ValueError, "'q': expected 3 dimension"),
        ({"q": torch.ones(6, 4, 8).long()}, TypeError, "'q': expected float32, .* got int64"),
        ({"q": torch.randn(6, 3, 8)}, ValueError, "'q': expected a number of heads that is a mul"),
        ({"k": torch.randn(6, 2)}, ValueError, "'k': expected 3 dimension"),
        ({"k": torch.randn(6, 2, 8).bfloat16()}, TypeError, "'k': expected the dtype of 'q'"),
        ({"k": torch.randn(6, 2, 7)}, ValueError, "'k': expected size 8 in dimension 2"),
        ({"v": torch.randn(5, 2, 8)}, ValueError, "'v': expected size 6 in dimension 0"),
        ({"v": torch.randn(6, 2, 8).half()}, TypeError, "'v': expected the dtype of 'q'"),
        ({"cu_q": torch.tensor([0, 6])}, TypeError, "'cu_q': expected int32, got int64"),
        ({"cu_q": cuts([2, 3])}, ValueError, "'cu_q': expected a last entry of 6, got 5"),
        ({"cu_q": torch.tensor([0, 7, 6]).int()}, ValueError, "'cu_q': .* got 6 after 7"),
        ({"cu_k": torch.tensor([1, 6]).int()}, ValueError, "'cu_k': expected a first entry of 0"),
        ({"cu_k": cuts([2, 2, 2])}, ValueError, "'cu_k': expected size 3 in dimension 0"),
        ({"q_positions": None}, ValueError, "'q_positions': expected positions of both sides"),
        ({"k_positions": None}, ValueError, "'k_positions': expected positions of both sides"),
        ({"q_positions": torch.arange(6)}, TypeError, "'q_positions': expected int32, got int64"),
        ({"q_positions": torch.arange(5).int()}, ValueError, "'q_positions': expected size 6"),
        (
            {"k_positions": torch.tensor([0, 1, 1, 0, 1, 2]).int()},
            ValueError,
            "'k_positions': expected strictly ascending positions, .* got 1 after 1 at index 2",
        ),
        (
            {"k_positions": torch.tensor([-1, 0, 1, 0, 1, 2]).int()},
            ValueError,
            "'k_positions': .* got -1 after -1 at index 0",
        ),
        ({"scale": float("nan")}, ValueError, "'scale': expected a finite number, got nan"),
        ({"window": -1}, ValueError, "'window': expected at least 0, got -1"),
        ({"group_size": -4}, ValueError, "'group_size': expected at least 0, got -4"),
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    positions = torch.tensor([0, 1, 2, 0, 1, 2]).int()
    arguments = {
        "q": torch.randn(6, 4, 8),
        "k": torch.randn(6, 2, 8),
        "v": torch.randn(6, 2, 8),
        "cu_q": cuts([3, 3]),
        "cu_k": cuts([3, 3]),
        "q_positions": positions,
        "k_positions": positions,
    }
    with pytest.raises(exception, match=message):
        ops.segment_attention(**(arguments | change))


@pytest.mark.parametrize("name", ["dout", "out", "lse"])
def test_bad_inputs_of_the_backward_op(name):
    inputs = make_inputs([6])
    settings = (1.0, 0, 0)
    out, lse = torch.ops.lemo.segment_attention(*inputs, *settings)
    saved = {"dout": out, "out": out, "lse": lse} | {name: torch.randn(6, 5)}
    sample = (saved["dout"], *inputs[:3], saved["out"], saved["lse"], *inputs[3:], *settings)
    with pytest.raises(RuntimeError, match=f"segment_attention_backward: argument '{name}'"):
        torch.ops.lemo.segment_attention_backward(*sample)
