"""segment_attention: what an operator has to pass, docs/design/testing.md."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import (
    KERNELS,
    check_against_oracle,
    check_close,
    cuts,
    differentiate,
    make_inputs,
    oracle,
)
from devices import on_gpu, working_dtype
from lemo import ops, reference
from thread_counts import each_number_of_threads
from tolerances import assert_close_fp32

# The CUDA kernels take head sizes that are multiples of 8 up to 256, in tiles of several sizes.
HEAD_SIZES = st.sampled_from([8, 24, 64, 72, 128, 160, 256]) if on_gpu() else st.integers(1, 17)
DTYPE = working_dtype()


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    heads_per_kv=st.integers(1, 3),
    size=HEAD_SIZES,
    kernel=st.sampled_from(KERNELS),
    with_positions=st.booleans(),
    window=st.sampled_from([0, 1, 7, 30]),
    group_size=st.sampled_from([0, 1, 8, 13]),
    seed=st.integers(0, 99),
)
def test_forward_and_backward_match_the_oracle(
    lengths, kv_heads, heads_per_kv, size, kernel, with_positions, window, group_size, seed
):
    torch.manual_seed(seed)
    inputs = make_inputs(
        [q for q, _ in lengths],
        [k for _, k in lengths],
        heads=(kv_heads * heads_per_kv, kv_heads),
        size=size,
        span=60 if with_positions else None,
    )
    check_against_oracle(inputs, kernel, window=window, group_size=group_size)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [(6, 2), (3, 1), (2, 2)], ids=["gqa", "mqa", "mha"])
@pytest.mark.parametrize(
    "settings", [{}, {"window": 300}, {"group_size": 256}, {"scale": -0.3}], ids=str
)
def test_several_tiles(heads, settings, kernel):
    """Longer than a tile of queries and two tiles of keys, and of different kept sets."""
    for size in (64, 128) if on_gpu() else (16,):
        inputs = make_inputs([620, 0, 70], [700, 9, 300], heads, size=size, span=1200)
        check_against_oracle(inputs, kernel, **settings)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"window": 50, "group_size": 64}], ids=str)
def test_low_precision(dtype, settings, kernel):
    for size in (32, 128) if on_gpu() else (32,):
        inputs = make_inputs([150, 40], [130, 60], size=size, span=200, dtype=dtype)
        check_against_oracle(inputs, kernel, **settings)


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_sets_attend_in_row_order(kernel):
    """One kept set for queries and keys: the positions add nothing to the causal order."""
    q, k, v, cu, _, positions, _ = make_inputs([300, 5, 130], heads=(4, 1), size=64, span=900)
    check_against_oracle((q, k, v, cu, cu, positions, positions), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [8, 64, 128])
def test_equals_dense_attention_of_torch_when_everything_is_kept(size, kernel):
    q, k, v, cu, *_ = make_inputs([290], size=size)

    def dense(*qkv):
        heads_first = (t.transpose(0, 1)[None] for t in qkv)
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    dout = torch.randn_like(q)
    results = differentiate(
        lambda *args: ops.segment_attention(*args, kernel=kernel), (q, k, v, cu), q.dtype, dout
    )
    expected = differentiate(dense, (q, k, v), torch.float32, dout)
    plain = differentiate(dense, (q, k, v), q.dtype, dout)
    for name, result, rough, right in zip(("out", "dq", "dk", "dv"), results, plain, expected):
        check_close(result, rough, right, name)


def test_log_sum_exp():
    inputs = make_inputs([90, 3], [80, 4], span=120)
    settings = (0.5, 40, 0)
    out, lse = torch.ops.lemo.segment_attention(*inputs, *settings)
    wide = [tensor.float() for tensor in inputs[:3]]
    expected_out, expected_lse = reference.segment_attention(*wide, *inputs[3:], *settings)
    plain_out, _ = reference.segment_attention(*inputs, *settings)
    check_close(out, plain_out, expected_out)
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


@pytest.mark.cpu_only
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
        ops.segment_attention, inputs, inputs[0].dtype, torch.randn_like(inputs[0])
    )
    for result, like in zip(results, (inputs[0], *inputs[:3])):
        assert torch.equal(result, torch.zeros_like(like))


@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [0, 0]), ([4], [0]), ([0], [4])], ids=str)
def test_deterministic_with_nothing_kept(lengths, deterministic_algorithms):
    test_nothing_kept(lengths)


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
    qkv = torch.randn(20, 10, 8, dtype=working_dtype(), requires_grad=True)
    cu = cuts([20])

    def loss(attention, qkv):
        out = attention(qkv[:, :6], qkv[:, 6:8], qkv[:, 8:], cu)
        return torch.autograd.grad((out.transpose(0, 1) * weights).sum(), qkv)[0]

    def plain(q, k, v, cu):
        return oracle()(q, k, v, cu, cu, None, None)

    weights = torch.randn(6, 20, 8)
    expected = loss(plain, qkv.detach().float().requires_grad_())
    check_close(loss(ops.segment_attention, qkv), loss(plain, qkv), expected)


def test_a_view_that_begins_between_16_byte_boundaries():
    q, k, v, cu, *_ = make_inputs([70], size=64)
    storage = torch.empty(q.numel() + 1, dtype=q.dtype)
    shifted = storage[1:].view(q.shape).copy_(q)
    assert torch.equal(ops.segment_attention(shifted, k, v, cu), ops.segment_attention(q, k, v, cu))


@pytest.fixture
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [64, 128])
def test_a_hundred_repeats_are_bit_equal(size, kernel, deterministic_algorithms):
    """Several key tiles add to each query tile, from thread blocks that run at the same time."""
    lengths = [1500, 600] if on_gpu() else [200, 30]
    inputs = make_inputs(lengths, heads=(4, 2), size=size if on_gpu() else 8)
    dout = torch.randn_like(inputs[0])

    def run():
        return differentiate(
            lambda *args: ops.segment_attention(*args, kernel=kernel), inputs, dout.dtype, dout
        )

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


@pytest.mark.cpu_only
def test_repeats_are_bit_equal_whatever_the_threads():
    """One key/value head, so that several threads add to the same rows of dq at the same time."""
    inputs = make_inputs([1500, 100], heads=(4, 1), size=16)
    dout = torch.randn_like(inputs[0])
    runs = [
        differentiate(ops.segment_attention, inputs, torch.float32, dout)
        for _ in each_number_of_threads(1, 2, 3, 4, 8, 1)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def reads_data(change, message):
    """A bad value that only the CPU looks for: on a GPU the check would wait for the device."""
    return pytest.param(change, ValueError, message, marks=pytest.mark.cpu_only)


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"q": torch.randn(6, 8)}, ValueError, "'q': expected 3 dimension"),
        ({"q": torch.ones(6, 4, 8).long()}, TypeError, "'q': expected float32, .* got int64"),
        (
            {"q": torch.randn(6, 3, 8).to(DTYPE)},
            ValueError,
            r"'q': expected a multiple of the 2 head\(s\) of 'k', got 3 head",
        ),
        ({"k": torch.randn(6, 2)}, ValueError, "'k': expected 3 dimension"),
        ({"k": torch.randn(6, 2, 8).double()}, TypeError, "'k': expected float32, .* got another"),
        ({"k": torch.randn(6, 2, 8).half()}, TypeError, "'k': expected the dtype of 'q'"),
        ({"k": torch.randn(6, 2, 7).to(DTYPE)}, ValueError, "'k': expected size 8 in dimension 2"),
        ({"v": torch.randn(5, 2, 8).to(DTYPE)}, ValueError, "'v': expected size 6 in dimension 0"),
        ({"v": torch.randn(6, 1, 8).to(DTYPE)}, ValueError, "'v': expected size 2 in dimension 1"),
        ({"v": torch.randn(6, 2, 8).half()}, TypeError, "'v': expected the dtype of 'q'"),
        ({"cu_q": torch.tensor([0, 6])}, TypeError, "'cu_q': expected int32, got int64"),
        reads_data({"cu_q": cuts([2, 3])}, "'cu_q': expected a last entry of 6, got 5"),
        reads_data({"cu_q": torch.tensor([0, 7, 6]).int()}, "'cu_q': .* got 6 after 7"),
        reads_data({"cu_k": torch.tensor([1, 6]).int()}, "'cu_k': expected a first entry of 0"),
        ({"cu_k": cuts([2, 2, 2])}, ValueError, "'cu_k': expected size 3 in dimension 0"),
        ({"q_positions": None}, ValueError, "'q_positions': expected positions of both sides"),
        ({"k_positions": None}, ValueError, "'k_positions': expected positions of both sides"),
        ({"q_positions": torch.arange(6)}, TypeError, "'q_positions': expected int32, got int64"),
        ({"q_positions": torch.arange(5).int()}, ValueError, "'q_positions': expected size 6"),
        reads_data(
            {"k_positions": torch.tensor([0, 1, 1, 0, 1, 2]).int()},
            "'k_positions': expected strictly ascending positions, .* got 1 after 1 at index 2",
        ),
        reads_data(
            {"k_positions": torch.tensor([-1, 0, 1, 0, 1, 2]).int()},
            "'k_positions': .* got -1 after -1 at index 0",
        ),
        ({"scale": float("nan")}, ValueError, "'scale': expected a finite number, got nan"),
        ({"window": -1}, ValueError, "'window': expected at least 0, got -1"),
        ({"group_size": -4}, ValueError, "'group_size': expected at least 0, got -4"),
        (
            {"softcap": -1.0},
            ValueError,
            "'softcap': expected a finite number of at least 0, got -1",
        ),
        ({"softcap": float("inf")}, ValueError, "'softcap': expected a finite number .* got inf"),
        ({"sinks": torch.zeros(2)}, ValueError, "'sinks': expected size 4 in dimension 0"),
        ({"sinks": torch.zeros(4, 1)}, ValueError, "'sinks': expected 1 dimension"),
        ({"sinks": torch.zeros(4).double()}, TypeError, "'sinks': expected float32, got"),
        ({"kernel": "fast"}, ValueError, "'kernel': expected .*'auto'.*, got 'fast'"),
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
    if on_gpu():
        arguments = {
            name: value.bfloat16() if value.is_floating_point() else value
            for name, value in arguments.items()
        }
    with pytest.raises(exception, match=message):
        ops.segment_attention(**(arguments | change))


@pytest.mark.gpu_only
@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        (torch.float32, 64, "'q': expected bfloat16 or float16 on a GPU, got float32"),
        (torch.bfloat16, 12, "'q': expected a head size that is a multiple of 8 .* got 12"),
        (torch.bfloat16, 264, "'q': expected a head size .* from 8 to 256 on a GPU, got 264"),
    ],
)
def test_what_no_cuda_kernel_takes(dtype, size, message):
    q, k, v, cu, *_ = make_inputs([6], size=size, dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        ops.segment_attention(q, k, v, cu)
    lse = torch.zeros(6, 6)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lemo.segment_attention_backward(q, q, k, v, q, lse, cu, cu, None, None, 1.0, 0, 0)


@pytest.mark.parametrize("name", ["dout", "out", "lse"])
def test_bad_inputs_of_the_backward_op(name):
    inputs = make_inputs([6])
    settings = (1.0, 0, 0)
    out, lse = torch.ops.lemo.segment_attention(*inputs, *settings)
    saved = {"dout": out, "out": out, "lse": lse} | {name: torch.randn(6, 5)}
    sample = (saved["dout"], *inputs[:3], saved["out"], saved["lse"], *inputs[3:], *settings)
    with pytest.raises(RuntimeError, match=f"segment_attention_backward: argument '{name}'"):
        torch.ops.lemo.segment_attention_backward(*sample)
