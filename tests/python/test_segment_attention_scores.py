"""segment_attention with what models add to it: soft caps, sinks, values of another size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import (
    KERNELS,
    check_against_oracle,
    cuts,
    differentiate,
    make_dout,
    make_inputs,
)
from devices import on_gpu, working_dtype
from lemo import ops, reference
from lemo.ops.segment_attention import SavedAttention
from tolerances import assert_close_fp32, relative_error

# Head sizes of keys and of values: every pair of tiles of the CUDA kernels, full and in part.
SIZES = (
    [(64, 64), (96, 96), (128, 64), (72, 128), (192, 128), (136, 96), (256, 256), (192, 192)]
    if on_gpu()
    else [(16, 16), (12, 8), (5, 9), (24, 16)]
)


def make_sinks(heads=6, spread=2.0):
    return spread * torch.randn(heads)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    heads_per_kv=st.integers(1, 3),
    sizes=st.sampled_from(SIZES),
    kernel=st.sampled_from(KERNELS),
    with_positions=st.booleans(),
    window=st.sampled_from([0, 1, 7, 30]),
    group_size=st.sampled_from([0, 13]),
    softcap=st.sampled_from([0.0, 0.5, 20.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_and_backward_match_the_oracle(
    lengths,
    kv_heads,
    heads_per_kv,
    sizes,
    kernel,
    with_positions,
    window,
    group_size,
    softcap,
    with_sinks,
    seed,
):
    torch.manual_seed(seed)
    heads = kv_heads * heads_per_kv
    inputs = make_inputs(
        [q for q, _ in lengths],
        [k for _, k in lengths],
        heads=(heads, kv_heads),
        size=sizes[0],
        value_size=sizes[1],
        span=60 if with_positions else None,
    )
    sinks = make_sinks(heads) if with_sinks else None
    settings = {"window": window, "group_size": group_size, "softcap": softcap}
    check_against_oracle(inputs, kernel, sinks, **settings)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"softcap": 2.0}, {"window": 128}, {"softcap": 5.0, "window": 300, "scale": -0.3}],
    ids=str,
)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_several_tiles(sizes, settings, with_sinks, kernel):
    """Longer than a tile of queries and two tiles of keys, and of different kept sets."""
    size, value_size = sizes
    inputs = make_inputs([420, 0, 70], [500, 9, 300], (4, 2), size, 900, value_size=value_size)
    check_against_oracle(inputs, kernel, make_sinks(4) if with_sinks else None, **settings)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[-2]], ids=str)
def test_low_precision(dtype, sizes, kernel):
    size, value_size = sizes
    inputs = make_inputs([150, 40], [130, 60], (6, 2), size, 200, dtype, value_size)
    check_against_oracle(inputs, kernel, make_sinks(), softcap=4.0, window=90)


@pytest.mark.gpu_only
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(192, 128), (136, 72), (256, 256), (200, 200)], ids=str)
@pytest.mark.parametrize("heads", [(8, 1), (4, 2), (2, 2)], ids=["mqa", "gqa", "mha"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"softcap": 3.0}, {"window": 70}, {"window": 90, "group_size": 128, "softcap": 8.0}],
    ids=str,
)
def test_large_heads_in_many_tiles(settings, heads, sizes, kernel):
    """Walks longer than the rings of buffers; sequences without queries, without keys, of one."""
    lengths = [700, 0, 130, 1, 64], [640, 90, 0, 1, 33]
    inputs = make_inputs(*lengths, heads, sizes[0], 1000, value_size=sizes[1])
    check_against_oracle(inputs, kernel, make_sinks(heads[0]), **settings)
    plain = make_inputs([513], heads=heads, size=sizes[0], value_size=sizes[1])
    check_against_oracle(plain, kernel, **settings)


def test_scores_far_beyond_the_softcap():
    """All of them are at the bound: the mean of the values, and no gradient of the scores."""
    q, k, v, cu, *_ = make_inputs([30], size=16)
    q, k = q.abs() * 100, k.abs() + 1
    results = differentiate(
        lambda *args: ops.segment_attention(*args, softcap=3.0),
        (q, k, v, cu),
        q.dtype,
        v.new_ones(1).expand(30, 6, 16),
    )
    counts = torch.arange(1, 31)[:, None, None]
    means = (v.float().cumsum(0) / counts).repeat_interleave(3, 1)
    assert relative_error(results[0], means) < 2 * torch.finfo(q.dtype).eps
    assert torch.equal(results[1], torch.zeros_like(q))
    assert torch.equal(results[2], torch.zeros_like(k))


@pytest.mark.gpu_only
def test_what_no_cuda_kernel_takes():
    q, k, v, cu, *_ = make_inputs([6], size=64, value_size=12)
    with pytest.raises(NotImplementedError, match="'v': expected a head size .* got 12"):
        ops.segment_attention(q, k, v, cu)


@pytest.mark.cpu_only
def test_a_large_softcap_changes_nothing():
    inputs = make_inputs([40], size=16)
    capped = ops.segment_attention(*inputs[:4], softcap=1e4)
    assert_close_fp32(capped, ops.segment_attention(*inputs[:4]))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sink", [-torch.inf, -200.0, 200.0])
def test_sinks_that_count_for_nothing_and_for_everything(sink, kernel):
    inputs = make_inputs([40], size=16)[:4]
    sinks = torch.full((6,), sink)
    out = ops.segment_attention(*inputs, sinks=sinks, kernel=kernel)
    if sink < 0:
        assert torch.equal(out, ops.segment_attention(*inputs, kernel=kernel))
        check = differentiate(
            lambda *args, **kwargs: ops.segment_attention(*args, **kwargs, kernel=kernel),
            inputs,
            inputs[0].dtype,
            make_dout(inputs),
            sinks,
        )
        assert torch.equal(check[-1], torch.zeros(6))
    else:
        assert out.abs().max() < 1e-30


@pytest.mark.parametrize("kernel", KERNELS)
def test_query_that_sees_a_sink_only(kernel):
    """The first two queries stand before every key; their log-sum-exp is the sink."""
    q, k, v, cu_q, cu_k, *_ = make_inputs([3], [2])
    positions = torch.tensor([0, 3, 5]).int(), torch.tensor([5, 6]).int()
    sinks = make_sinks()
    arguments = (q, k, v, cu_q, cu_k, *positions, 1.0, 0, 0, 0.0)
    out, lse = torch.ops.lemo.segment_attention(*arguments, sinks, kernel)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert_close_fp32(lse[:, :2], sinks[:, None].expand(-1, 2))
    check_against_oracle((q, k, v, cu_q, cu_k, *positions), kernel, sinks)


@pytest.mark.parametrize("kernel", KERNELS)
def test_log_sum_exp(kernel):
    inputs = make_inputs([90, 3], [80, 4], span=120)
    sinks = make_sinks()
    settings = (0.5, 40, 0, 3.0, sinks)
    _, lse = torch.ops.lemo.segment_attention(*inputs, *settings, kernel)
    wide = [tensor.float() for tensor in inputs[:3]]
    assert_close_fp32(lse, reference.segment_attention(*wide, *inputs[3:], *settings)[1])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_opcheck(direction):
    inputs = make_inputs([9, 3], [7, 4], span=20, size=16, value_size=8)
    sinks = make_sinks()
    settings = (0.3, 5, 4, 2.0)
    if direction == "backward":
        out, lse = torch.ops.lemo.segment_attention(*inputs, *settings, sinks)
        sample = (torch.randn_like(out), *inputs[:3], out, lse, *inputs[3:], *settings, sinks)
        torch.library.opcheck(torch.ops.lemo.segment_attention_backward.default, sample)
        return
    leaves = [tensor.clone().requires_grad_() for tensor in (*inputs[:3], sinks)]
    sample = (*leaves[:3], *inputs[3:], *settings, leaves[3])
    torch.library.opcheck(torch.ops.lemo.segment_attention.default, sample)


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck asks for fp64
def test_gradcheck_by_central_differences():
    """The op runs in fp32: steps of 1e-2 leave differences good to about 1e-3."""
    q, k, v, cu_q, cu_k, *positions = make_inputs([5, 2], [4, 3], (2, 1), 3, 9, value_size=2)

    def attention(q, k, v, sinks):
        settings = {"softcap": 1.5, "sinks": sinks}
        return ops.segment_attention(q, k, v, cu_q, cu_k, *positions, **settings)

    leaves = [tensor.requires_grad_() for tensor in (q, k, v, make_sinks(2))]
    tolerances = {"eps": 1e-2, "atol": 2e-3, "rtol": 1e-2, "nondet_tol": 0.0}
    assert torch.autograd.gradcheck(attention, leaves, **tolerances)


def test_sinks_of_the_dtype_of_the_model():
    q, k, v, cu, *_ = make_inputs([20], dtype=torch.bfloat16)
    sinks = make_sinks().bfloat16().requires_grad_()
    wide = sinks.detach().float().requires_grad_()
    for each in (sinks, wide):
        ops.segment_attention(q, k, v, cu, sinks=each).float().sum().backward()
    assert sinks.grad.dtype == torch.bfloat16
    assert torch.equal(sinks.grad, wide.grad.bfloat16())


def test_a_saved_result_has_the_same_gradients():
    inputs = make_inputs([50], size=16, value_size=8)
    sinks, dout = make_sinks(), make_dout(inputs)
    settings = (*inputs[3:], 0.2, 20, 0)

    def plain(q, k, v, sinks):
        return ops.segment_attention(q, k, v, *settings, softcap=3.0, sinks=sinks)

    def saved(q, k, v, sinks):
        attention = SavedAttention()
        with torch.no_grad():
            attention(q, k, v, *settings, 3.0, sinks)
        return SavedAttention(*attention.result)(q, k, v, *settings, 3.0, sinks)

    def run(attention):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (*inputs[:3], sinks)]
        out = attention(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    torch.use_deterministic_algorithms(True)
    try:
        pairs = zip(run(plain), run(saved))
        assert all(torch.equal(a, b) for a, b in pairs)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("sizes", [(192, 128), (256, 256)] if on_gpu() else [(8, 4)], ids=str)
def test_repeats_are_bit_equal(sizes, softcap, kernel):
    lengths = [1500, 600] if on_gpu() else [200, 30]
    inputs = make_inputs(lengths, heads=(4, 2), size=sizes[0], value_size=sizes[1])
    dout, sinks = make_dout(inputs), make_sinks(4)

    def run():
        def attention(*args, **kwargs):
            return ops.segment_attention(*args, **kwargs, softcap=softcap, kernel=kernel)

        return differentiate(attention, inputs, working_dtype(), dout, sinks)

    torch.use_deterministic_algorithms(True)
    try:
        first = run()
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(run(), first))
    finally:
        torch.use_deterministic_algorithms(False)


def test_equals_the_softmax_with_a_column_for_the_sink():
    """As models write it: the column of the sinks is dropped behind the softmax."""
    q, k, v, *_ = make_inputs([25], heads=(4, 4), size=8, dtype=torch.float32)
    if on_gpu():
        q, k, v = (tensor.bfloat16() for tensor in (q, k, v))
    sinks = make_sinks(4)
    scores = 8**-0.5 * torch.einsum("ihd,jhd->hij", q.float(), k.float())
    scores = 2.0 * torch.tanh(scores / 2.0)
    scores = scores.masked_fill(torch.ones(25, 25).triu(1).bool(), -torch.inf)
    joined = torch.cat((scores, sinks[:, None, None].expand(-1, 25, 1)), -1)
    weights = (joined - joined.max(-1, keepdim=True).values).softmax(-1)[..., :-1]
    expected = torch.einsum("hij,jhd->ihd", weights, v.float())
    out = ops.segment_attention(q, k, v, cuts([25]), softcap=2.0, sinks=sinks)
    bound = 1e-6 if q.dtype == torch.float32 else 2 * torch.finfo(q.dtype).eps
    assert relative_error(out, expected) < bound
