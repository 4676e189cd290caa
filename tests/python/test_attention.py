"""lemo.attention: the drop-in module, and "lemo" as an attention implementation of Transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, StaticCache

import lemo.attention
from devices import working_dtype
from generic_cases import make
from lemo import reference
from lemo.models.layers.batch import Batch
from lemo.packing.batch import PackedBatch
from tiny_models import (
    ARCHITECTURES,
    all_of,
    as_padded,
    gradients,
    make_ids,
    make_model,
    packed_batch,
    padded_batch,
)
from tolerances import assert_close_fp32, assert_close_low_precision

# The GPU's attention knows no fp32.
fp32 = pytest.mark.cpu_only

# SegmentAttention


@fp32
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.booleans(),
    st.sampled_from([0, 5]),
    st.sampled_from([0, 8]),
)
def test_segment_attention(lengths, heads, rotate, window, group_size):
    torch.manual_seed(0)
    module = lemo.attention.SegmentAttention(
        24, *heads, head_dim=8, bias=True, window=window, group_size=group_size
    )
    x = torch.randn(sum(lengths), 24, requires_grad=True)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([2 * torch.arange(n) for n in lengths]).to(torch.int32)  # with gaps
    rotary = lemo.attention.rotary_tables(positions, 8) if rotate else None
    out = module(x, cu, positions, rotary)
    grad = torch.randn_like(out)
    out.backward(grad)
    actual = [x.grad, *(p.grad for p in module.parameters())]

    x.grad = None
    module.zero_grad()
    q, k, v = (
        projection(x).view(len(x), -1, 8)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if rotate:
        q, k = rotated(q, positions), rotated(k, positions)
    expected, _ = reference.segment_attention(
        q, k, v, cu, cu, positions, positions, 8**-0.5, window, group_size
    )
    expected = module.o_proj(expected.flatten(1))
    expected.backward(grad)
    assert_close_fp32(out, expected)
    oracle = [x.grad, *(p.grad for p in module.parameters())]
    scale = torch.cat([gradient.flatten() for gradient in oracle]).norm()
    for mine, theirs in zip(actual, oracle):
        # Relative to all gradients: that of a key bias without rotation is zero but for rounding.
        assert (mine - theirs).norm() <= 2e-5 * scale


def rotated(heads, positions, theta=10000.0):
    """Rotation as complex numbers, pair (i, i + D/2) by position * theta ** (-2i/D)."""
    half = heads.shape[-1] // 2
    frequency = theta ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones(len(positions), half), positions[:, None] * frequency)
    pairs = torch.complex(heads[..., :half], heads[..., half:]) * turn[:, None]
    return torch.cat((pairs.real, pairs.imag), -1)


@pytest.mark.parametrize("settings", [{}, {"window": 5}, {"group_size": 8}, {"num_kv_heads": 1}])
def test_segment_attention_in_bf16(settings):
    head_dim, hidden = 64, 48
    module = lemo.attention.SegmentAttention(hidden, 4, head_dim=head_dim, **settings).bfloat16()
    cu = torch.tensor([0, 20, 21, 57], dtype=torch.int32)
    positions = torch.cat([2 * torch.arange(n) for n in (20, 1, 36)]).int()  # with gaps
    rotary = lemo.attention.rotary_tables(positions, head_dim)
    x, dy = torch.randn(2, 57, hidden, dtype=torch.bfloat16)

    def oracle(dtype):
        inputs = x.to(dtype, copy=True).requires_grad_()
        weights = [weight.detach().to(dtype).requires_grad_() for weight in module.parameters()]
        q, k, v = (
            torch.nn.functional.linear(inputs, weight).unflatten(-1, (-1, head_dim))
            for weight in weights[:3]
        )
        q, k = (reference.rope(heads, *rotary, None, False) for heads in (q, k))
        window, group_size = settings.get("window", 0), settings.get("group_size", 0)
        heads, _ = reference.segment_attention(
            *(q, k, v, cu, cu, positions, positions, head_dim**-0.5, window, group_size)
        )
        y = torch.nn.functional.linear(heads.flatten(1), weights[3])
        y.backward(dy.to(dtype))
        return [y.detach(), inputs.grad, *(weight.grad for weight in weights)]

    inputs = x.clone().requires_grad_()
    y = module(inputs, cu, positions, rotary)
    y.backward(dy)
    value = [y.detach(), inputs.grad, *(weight.grad for weight in module.parameters())]
    for mine, plain, exact in zip(value, oracle(torch.bfloat16), oracle(torch.float32)):
        assert_close_low_precision(mine, plain, exact)


def test_positions_default_to_the_index_in_the_sequence():
    module = lemo.attention.SegmentAttention(128, 2).to(working_dtype())
    x = torch.randn(9, 128, dtype=working_dtype())
    cu = torch.tensor([0, 5, 9], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3], dtype=torch.int32)
    assert torch.equal(module(x, cu), module(x, cu, positions))


@fp32
def test_segment_attention_under_autocast():
    module = lemo.attention.SegmentAttention(16, 2)
    x, cu = torch.randn(9, 16), torch.tensor([0, 9], dtype=torch.int32)
    rotary = lemo.attention.rotary_tables(torch.arange(9), 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, cu, rotary=rotary)
    assert out.dtype == torch.bfloat16
    assert (out - module(x, cu, rotary=rotary)).abs().max() < 0.02


def test_segment_attention_names_bad_arguments():
    with pytest.raises(
        ValueError, match="num_kv_heads: expected a divisor of num_heads = 4, got 3"
    ):
        lemo.attention.SegmentAttention(16, 4, 3)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size = 16"):
        lemo.attention.SegmentAttention(16, 3)
    with pytest.raises(ValueError, match="num_kv_heads: expected at least 1, got 0"):
        lemo.attention.SegmentAttention(16, 4, 0)
    with pytest.raises(ValueError, match="window: expected at least 0, got -1"):
        lemo.attention.SegmentAttention(16, 4, window=-1)
    with pytest.raises(ValueError, match="head_dim: expected an even size, got 3"):
        lemo.attention.rotary_tables(torch.arange(4), 3)


# attn_implementation="lemo"


BATCHES = {
    "plain": lambda: {"input_ids": make_ids(2, 30), "labels": make_ids(2, 30)},
    "right": lambda: padded_batch([30, 1, 17]),
    "left": lambda: padded_batch([30, 17], "left"),
    "packed": lambda: packed_batch([20, 1, 9]),
}


@fp32
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_implementation(architecture, kind):
    model = make_model(architecture, attn_implementation="lemo")
    dense = make_model(architecture)
    batch = BATCHES[kind]()
    expected = dense(**(as_padded(batch) if kind == "packed" else batch))
    outputs = model(**batch, use_cache=False)
    assert_close_fp32(outputs.loss, expected.loss, "loss")
    for each in (outputs, expected):
        each.loss.backward()
    theirs = gradients(dense)
    for name, gradient in gradients(model).items():
        if not (architecture == "opt" and name.endswith("k_proj.bias")):  # zero but for rounding
            assert_close_fp32(gradient, theirs[name], name)


# Models with soft-capped scores, and with sinks. The cap is low enough to bend the scores. All
# experts run: rounding chooses none of them.
SCORES = {
    "gemma2": {"attn_logit_softcapping": 2.0, "head_dim": 64},
    "gpt_oss": {"num_experts_per_tok": 4, "output_router_logits": False, "head_dim": 64},
}


def of_scores(name, attention):
    model = make(name, **SCORES[name])
    model.set_attn_implementation(attention)
    return model


@fp32
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", SCORES)
def test_soft_capped_scores_and_sinks(name, kind):
    model, dense = of_scores(name, "lemo"), of_scores(name, "eager")
    batch = BATCHES[kind]()
    outputs = model(**batch, use_cache=False)
    expected = dense(**(as_padded(batch) if kind == "packed" else batch))
    assert_close_fp32(outputs.loss, expected.loss, "loss")
    for each in (outputs, expected):
        each.loss.backward()
    mine, theirs = gradients(model), gradients(dense)
    assert mine.keys() == theirs.keys()
    assert any("sinks" in key for key in mine) == (name == "gpt_oss")
    for key, gradient in mine.items():
        assert_close_fp32(gradient, theirs[key], key)


@fp32
@pytest.mark.parametrize("name", SCORES)
def test_generation_with_soft_capped_scores_and_sinks(name):
    batch = padded_batch([30, 17], "left")
    del batch["labels"]
    tokens = [
        of_scores(name, attention).eval().generate(**batch, max_new_tokens=5, do_sample=False)
        for attention in ("lemo", "eager")
    ]
    assert torch.equal(*tokens)


@pytest.mark.cpu_only  # On a GPU the operator's own tests have both.
@pytest.mark.parametrize("name", SCORES)
def test_soft_capped_scores_and_sinks_in_bf16(name):
    batch, results = BATCHES["right"](), []
    kinds = (("lemo", torch.bfloat16), ("eager", torch.bfloat16), ("eager", torch.float32))
    for attention, dtype in kinds:
        model = of_scores(name, attention).to(torch.bfloat16).to(dtype)
        model(**batch, use_cache=False).loss.backward()
        results.append(all_of(gradients(model)))
    assert_close_low_precision(results[0].bfloat16(), *results[1:])


@fp32
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation(architecture):
    batch = padded_batch([30, 17], "left")
    del batch["labels"]
    tokens = [
        make_model(architecture, attn_implementation=name)
        .eval()
        .generate(**batch, max_new_tokens=5, do_sample=False)
        for name in ("lemo", "eager")
    ]
    assert torch.equal(*tokens)


@fp32
def test_a_cache_filled_in_two_steps():
    model, dense = (make_model("qwen2", attn_implementation=n).eval() for n in ("lemo", "sdpa"))
    ids = make_ids(2, 30)
    past = model(ids[:, :13], use_cache=True).past_key_values
    outputs = model(ids[:, 13:], past_key_values=past, use_cache=True)
    assert_close_fp32(outputs.logits, dense(ids).logits[:, 13:])


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"attention_dropout": 0.5}, {}, "attention_dropout: attention 'lemo' has none"),
        ({}, {"attention_mask": torch.ones(2, 1, 30, 30)}, r"attention_mask: .*\[2, 1, 30, 30\]"),
        ({}, {"is_causal": False}, "is_causal: attention 'lemo' is causal"),
    ],
)
def test_unsupported_calls_are_named(settings, arguments, message):
    model = make_model("llama", attn_implementation="lemo", **settings)
    with pytest.raises(ValueError, match=message):
        model(make_ids(2, 30), **arguments)


def test_a_static_cache_is_refused():
    """Its places for tokens to come look like tokens."""
    model = make_model("llama", attn_implementation="lemo").eval()
    with pytest.raises(ValueError, match=r"past_key_values: .* 40 places for tokens up to 30"):
        model(make_ids(1, 30), past_key_values=StaticCache(model.config, max_cache_len=40))


def test_models_that_attend_both_ways_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=64, vocab_size=64)
    config._attn_implementation = "lemo"
    with pytest.raises(ValueError, match="is_causal: .* BertSelfAttention attends both ways"):
        BertModel(config).eval()(make_ids(1, 30) % 64)


@pytest.mark.parametrize("batch", ["plain", "right", "left"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_implementation_in_bf16(architecture, batch):
    batch = BATCHES[batch]()
    kinds = (("lemo", torch.bfloat16), ("eager", torch.bfloat16), ("eager", torch.float32))
    results = []
    for name, dtype in kinds:
        model = make_model(architecture, attn_implementation=name).to(torch.bfloat16).to(dtype)
        model(**batch, use_cache=False).loss.backward()
        results.append(all_of(gradients(model)))
    assert_close_low_precision(results[0].bfloat16(), *results[1:])


# Packing


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any), st.booleans())
def test_pack_and_unpack(lengths, left):
    tokens = max(lengths)
    columns, ends = torch.arange(tokens), torch.tensor(lengths)[:, None]
    mask = columns >= tokens - ends if left else columns < ends
    batch = PackedBatch(tuple(mask.shape), mask.long(), None, torch.get_default_device())
    assert batch.seqlens == tuple(lengths)
    values = torch.randn(*mask.shape, 3)
    assert torch.equal(batch.pack(values), values[mask])
    assert torch.equal(batch.unpack(batch.pack(values)), values * mask[..., None])
    expected = [position for length in lengths for position in range(length)]
    assert batch.positions.tolist() == expected


def test_where_there_is_a_mask_positions_cut_nothing():
    """As in Transformers. Positions of a batch with padding on the left often are of all columns,
    or begin again behind it."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    device = torch.get_default_device()
    for positions in (torch.arange(5)[None], torch.tensor([[1, 1, 0, 1, 2], [0, 1, 0, 1, 2]])):
        batch = PackedBatch((2, 5), mask, positions, device)
        assert batch.seqlens == (3, 5)
        assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1], [1, 0, 1]], "got 2 runs in row 1"),
        ([[0, 1, 0, 1]], "got 2 runs in row 0"),
        ([[1, 0, 1, 0, 1], [1, 0, 1, 1, 1]], "got 3 runs in row 0"),
        ([[0, 0], [0, 0]], "at least one token, got only zeros"),
    ],
)
def test_masks_with_gaps_or_without_tokens_are_refused(mask, message):
    mask = torch.tensor(mask)
    with pytest.raises(ValueError, match=f"attention_mask: expected .*{message}"):
        PackedBatch(tuple(mask.shape), mask, None, mask.device)


@pytest.mark.parametrize(
    ("lengths", "share", "size"),
    [([20], 0.25, 5), ([21, 8], 0.25, 6), ([30], 0.1, 3), ([3], 0.25, 1), ([9], 1.0, 9)],
)
def test_blocks_that_are_a_share_of_the_longest_sequence(lengths, share, size):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    device = torch.get_default_device()
    packed = PackedBatch(tuple(mask.shape), mask.long(), None, device)
    batch = Batch.of(packed, share, device)
    assert batch.layout.block_size == size
    assert batch.layout.num_blocks == sum(-(-length // size) for length in lengths)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3))
def test_positions_that_restart_cut_sequences(rows):
    tokens = max(map(sum, rows))
    rows = [[*row, tokens - sum(row)] if sum(row) < tokens else row for row in rows]
    ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    batch = PackedBatch(tuple(ids.shape), None, ids, torch.get_default_device())
    assert batch.seqlens == tuple(length for row in rows for length in row)
    assert batch.positions.tolist() == ids.flatten().tolist()


def test_any_step_but_to_the_next_position_cuts():
    device = torch.get_default_device()
    ids = torch.tensor([[5, 6, 7, 9, 10, 10, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13]], device=device)
    assert PackedBatch((2, 8), None, ids, device).seqlens == (3, 2, 1, 2, 8)
    # Positions of one row are those of all.
    assert PackedBatch((2, 8), None, ids[:1], device).seqlens == 2 * (3, 2, 1, 2)
