"""token_select: what an operator has to pass (docs/design/testing.md), and one read-back."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from devices import no_synchronisation, on_gpu
from lemo import _C, LemoConfig, ops, reference
from lemo.models.layers.batch import Batch
from lemo.packing.batch import PackedBatch
from lemo.packing.blocks import BlockLayout, block_tokens, kept_blocks
from lemo.selection.selector import Selector


def compare(scores, layout, policy, value, keep_first, keep_last):
    selection = ops.token_select(scores, layout, policy, value, keep_first, keep_last)
    expected = reference.token_select(
        scores, layout.block_starts, layout.cu_blocks, policy, value, keep_first, keep_last
    )
    names = ("rows", "positions", "cu_rows", "kept_blocks")
    for name, oracle in zip(names, expected):
        result = getattr(selection, name)
        assert result.dtype == torch.int32
        assert torch.equal(result, oracle), f"{name}: {result.tolist()}, oracle {oracle.tolist()}"
    return selection


@given(
    seqlens=st.lists(st.integers(0, 70), min_size=0, max_size=5),
    block_size=st.integers(1, 20),
    policy=st.sampled_from(["ratio", "threshold"]),
    value=st.floats(0, 1),
    keep_first=st.integers(0, 3),
    keep_last=st.integers(0, 3),
    levels=st.sampled_from([2, 5, 10**6]),  # few levels: many ties
    seed=st.integers(0, 99),
)
def test_matches_the_oracle(
    seqlens, block_size, policy, value, keep_first, keep_last, levels, seed
):
    torch.manual_seed(seed)
    layout = BlockLayout.from_seqlens(seqlens, block_size)
    scores = torch.randint(levels, (layout.num_blocks,)) / levels
    compare(scores, layout, policy, value, keep_first, keep_last)


@given(
    seqlens=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    block_size=st.integers(1, 20),
    value=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_kept_and_left_out_rows_are_all_rows(seqlens, block_size, value, seed):
    torch.manual_seed(seed)
    layout = BlockLayout.from_seqlens(seqlens, block_size)
    kept = ops.token_select(torch.rand(layout.num_blocks), layout, "threshold", value, 0, 0)
    left_out = ops.left_out(kept)
    rows, order = torch.cat((kept.rows, left_out.rows)).sort()
    assert torch.equal(rows, torch.arange(layout.num_tokens, dtype=torch.int32))
    positions = [torch.arange(length, dtype=torch.int32) for length in seqlens]
    assert torch.equal(torch.cat((kept.positions, left_out.positions))[order], torch.cat(positions))
    assert torch.equal(kept.cu_rows + left_out.cu_rows, layout.cu_seqlens)
    blocks = torch.cat((kept.kept_blocks, left_out.kept_blocks)).sort().values
    assert torch.equal(blocks, torch.arange(layout.num_blocks, dtype=torch.int32))


@pytest.mark.parametrize("percent", [0, 7, 14, 28, 55, 56, 57, 100])
def test_share_is_rounded_up_from_the_exact_product(percent):
    # In floating point 0.07 * 100, 0.28 * 25 and others lie above the whole number they stand for.
    for count in range(1, 101):
        layout = BlockLayout.from_seqlens([count], 1)
        scores = torch.rand(count)
        selection = ops.token_select(scores, layout, "ratio", percent / 100, 0, 0)
        exact = -(-percent * count // 100)
        assert selection.num_rows == kept_blocks(percent / 100, count) == exact, count
        assert block_tokens(percent / 100, count) == max(exact, 1), count
        kept = scores[selection.kept_blocks.long()]
        left_out = scores.index_fill(0, selection.kept_blocks.long(), -1.0)
        assert selection.num_rows == 0 or kept.min() >= left_out.max()


def test_nothing_kept_one_token_and_empty_sequences():
    layout = BlockLayout.from_seqlens([0, 130, 0, 1], 64)
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    nothing = compare(scores, layout, "ratio", 0.0, 0, 0)
    assert nothing.num_rows == 0
    assert nothing.cu_rows.tolist() == [0, 0, 0, 0, 0]
    only_ends = compare(scores, layout, "threshold", float("inf"), 1, 1)
    assert only_ends.kept_blocks.tolist() == [0, 2, 3]
    assert only_ends.cu_rows.tolist() == [0, 0, 66, 66, 67]
    everything = compare(scores, layout, "threshold", float("-inf"), 0, 0)
    assert torch.equal(everything.rows, torch.arange(131).int())
    empty = BlockLayout.from_seqlens([], 64)
    assert compare(torch.zeros(0), empty, "ratio", 0.5, 1, 1).num_rows == 0


def test_infinite_scores_are_ordered():
    layout = BlockLayout.from_seqlens([4], 1)
    scores = torch.tensor([float("-inf"), 0.0, float("inf"), float("-inf")])
    assert compare(scores, layout, "ratio", 0.75, 0, 0).kept_blocks.tolist() == [0, 1, 2]


def test_scores_that_require_grad_and_strided_ones():
    layout = BlockLayout.from_seqlens([9], 2)
    scores = torch.rand(10, requires_grad=True)[::2]
    selection = compare(scores, layout, "ratio", 0.5, 1, 1)
    assert not selection.rows.requires_grad
    assert selection.layout is layout


def test_opcheck():
    layout = BlockLayout.from_seqlens([50, 0, 7], 4)
    scores = torch.rand(layout.num_blocks)
    known = _C.plan_selection(layout.seqlens, 4, 0.5, 1, 1)
    for policy, value, sizes in (
        ("ratio", 0.5, (-1, -1)),
        ("ratio", 0.5, known),
        ("threshold", 0.7, (-1, -1)),
        ("ratio", 0.0, (-1, -1)),
    ):
        sample = (scores, layout.block_starts, layout.cu_blocks, policy, value, 1, 1, *sizes)
        torch.library.opcheck(torch.ops.lemo.token_select.default, sample)


def test_repeats_are_bit_equal():
    layout = BlockLayout.from_seqlens([3000, 2000], 16)
    scores = torch.randint(50, (layout.num_blocks,)).float()
    first = ops.token_select(scores, layout, "ratio", 0.4, 1, 1)
    for _ in range(100):
        again = ops.token_select(scores, layout, "ratio", 0.4, 1, 1)
        assert torch.equal(first.rows, again.rows)
        assert torch.equal(first.positions, again.positions)


LAYOUT = BlockLayout.from_seqlens([10, 5], 4)  # 3 + 2 blocks


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"scores": torch.rand(4)}, ValueError, "'scores': expected size 5 in dimension 0"),
        ({"scores": torch.rand(5, 1)}, ValueError, "'scores': expected 1 dimension"),
        (
            {"scores": torch.rand(5).double()},
            TypeError,
            "'scores': expected float32, got another dtype",
        ),
        pytest.param(
            {"scores": torch.tensor([0.0, 1.0, float("nan"), 0.0, 0.0])},
            ValueError,
            "'scores': expected numbers, got nan for block 2",
            marks=pytest.mark.cpu_only,
        ),
        ({"policy": "top"}, ValueError, "'policy': expected 'ratio' or 'threshold', got 'top'"),
        ({"value": 1.01}, ValueError, "'value': expected a share between 0 and 1, got 1.01"),
        ({"value": -0.5}, ValueError, "'value': expected a share between 0 and 1, got -0.5"),
        (
            {"policy": "threshold", "value": float("nan")},
            ValueError,
            "'value': expected a threshold that is a number, got nan",
        ),
        ({"keep_first": -1}, ValueError, "'keep_first': expected at least 0, got -1"),
        ({"keep_last": -1}, ValueError, "'keep_last': expected at least 0, got -1"),
        ({"keep_last": -2}, ValueError, "'keep_last': expected at least 0, got -2"),
        (
            {"layout": dataclasses.replace(LAYOUT, block_starts=LAYOUT.block_starts.long())},
            TypeError,
            "'block_starts': expected int32, got int64",
        ),
        pytest.param(
            {"layout": dataclasses.replace(LAYOUT, cu_blocks=LAYOUT.cu_blocks + 1)},
            ValueError,
            "'cu_blocks': expected a first entry of 0, got 1",
            marks=pytest.mark.cpu_only,
        ),
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    arguments = {"scores": torch.rand(5), "layout": LAYOUT, "policy": "ratio", "value": 0.5}
    arguments |= {"keep_first": 1, "keep_last": 1}
    with pytest.raises(exception, match=message):
        ops.token_select(**(arguments | change))


@given(
    seqlens=st.lists(st.integers(0, 30), min_size=0, max_size=4),
    block_size=st.integers(1, 9),
    value=st.floats(0, 1),
    keep_first=st.integers(0, 3),
    keep_last=st.integers(0, 3),
)
def test_planned_sizes_are_those_of_every_draw_of_scores(
    seqlens, block_size, value, keep_first, keep_last
):
    layout = BlockLayout.from_seqlens(seqlens, block_size)
    arguments = (value, keep_first, keep_last)
    blocks, rows = _C.plan_selection(seqlens, block_size, *arguments)
    found = set()
    for seed in range(20):
        torch.manual_seed(seed)
        scores = torch.rand(layout.num_blocks)
        _, _, cu_rows, kept = reference.token_select(
            scores, layout.block_starts, layout.cu_blocks, "ratio", *arguments
        )
        assert len(kept) == blocks
        found.add(int(cu_rows[-1]))
    assert rows == -1 or found == {rows}
    # Unknown only where it has to be: some ragged last block may stay out.
    ragged_and_open = any(length % block_size for length in seqlens) and keep_last == 0
    assert rows >= 0 or ragged_and_open


@pytest.mark.cpu_only
def test_wrong_sizes_raise():
    sample = (torch.rand(5), LAYOUT.block_starts, LAYOUT.cu_blocks, "ratio", 0.5, 1, 1)
    assert _C.plan_selection(LAYOUT.seqlens, 4, 0.5, 1, 1) == (4, 11)
    for sizes, message in (
        ((5, 11), "'num_kept_blocks': expected 4, what the policy keeps, got 5"),
        ((4, 12), "'num_kept_rows': expected 11, the rows of the kept blocks, got 12"),
        ((6, 11), "'num_kept_blocks': expected at most 5, or -1, got 6"),
        ((4, -2), "'num_kept_rows': expected at least 0, or -1, got -2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lemo.token_select(*sample, *sizes)


def test_many_sequences_and_a_long_one():
    seqlens = torch.randint(0, 200, (1500,)).tolist()
    layout = BlockLayout.from_seqlens([*seqlens, 40000], 8)
    scores = (torch.randn(layout.num_blocks) * 100).round() / 100
    compare(scores, layout, "ratio", 0.3, 1, 1)
    compare(scores, layout, "ratio", 0.3, 0, 0)
    compare(scores, layout, "threshold", 0.5, 1, 1)
    compare(torch.zeros_like(scores), layout, "ratio", 0.3, 1, 1)  # ties only
    compare(-scores.abs() * (scores > 0), layout, "ratio", 0.6, 0, 1)  # 0 and -0 are equal


def test_a_selection_never_waits_for_the_gpu():
    """With the ratio policy; the kept set of a threshold has to be read back, once."""
    layout = BlockLayout.from_seqlens([1030], 64)
    scores = torch.rand(layout.num_blocks)
    with no_synchronisation():
        # A new batch, two layers that score for themselves, and what attention and loss need.
        packed = PackedBatch((1, 1030), None, None, scores.device)
        tables = tuple(torch.randn(2, 1030, 8).unbind())
        batch = dataclasses.replace(Batch.of(packed, 64, scores.device), rotary=tables)
        selector = Selector(
            LemoConfig(keep=0.5, layerwise={"select_at": "all"}).resolved(answers=False), 2
        )
        selector.begin(batch.layout)
        for layer in range(2):
            kept = selector.select(layer, "attention", lambda: scores)
            selector.select(layer, "mlp", lambda: scores)
            batch.rotate(torch.randn(kept.num_rows, 2, 8), kept)
            selector.left_out(kept)
        assert batch.positions.numel() == 1030
        selector.masked_rows()
        selector.statistics()
    if on_gpu():
        with pytest.raises(RuntimeError), no_synchronisation():
            ops.token_select(scores, layout, "threshold", 0.5, 1, 1)
