"""Selector and scorers: policies, sharing, forced blocks, and the mathematics of the scores."""

import math
import types
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lemo
from lemo import reference
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.layers.architectures import architecture_of
from lemo.packing.blocks import BlockLayout, Selection
from lemo.selection.loss_mask import masked_rows
from lemo.selection.priority import always_kept
from lemo.selection.scorers import ExactScorer, PooledScorer, RandomScorer
from lemo.selection.scorers.paper.pooled import block_means, visible_means
from lemo.selection.selector import Selector
from selection_cases import LAYOUT, cut, run, scores_of
from tiny_models import HIDDEN, config_of, make_model, padded_batch
from tolerances import assert_close_fp32

seqlens = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)


def labels_of(*rows):
    labelled = torch.zeros(LAYOUT.num_tokens, dtype=torch.bool)
    labelled[list(rows)] = True
    return labelled


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.6])
@pytest.mark.parametrize("rows", [(), (3,), (40, 24), (63,), (16, 25, 48, 62, 80, 87, 108)])
def test_blocks_that_have_a_label_come_first(keep, rows):
    config = config_of(keep=keep, dense_layers=[], keep_first=0, keep_last=1)
    kept, _, _ = run(config, labelled=labels_of(*rows))
    scores = scores_of(0, "attention")
    cuts, firsts = LAYOUT.cu_blocks.tolist(), LAYOUT.block_starts.tolist()
    for begin, end in pairwise(cuts):
        blocks = range(begin, end)
        # Lists of Python: labels first, then the last block, which is always kept, then scores.
        with_label = {b for b in blocks if any(firsts[b] <= row < firsts[b + 1] for row in rows)}
        order = sorted(
            blocks, key=lambda b: (b not in with_label, b != blocks[-1], -scores[b].item())
        )
        expected = sorted(order[: math.ceil(keep * len(blocks))])
        assert [b for b in kept[2, "mlp"] if b in blocks] == expected


@pytest.mark.parametrize(
    ("scores", "labels", "kept"),
    [
        # Two sequences of four blocks; a score of one does not touch the order of the other.
        ([1e6, 0, 0, 0, 0.01, 0.02, 0.03, 0.04], [1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 6, 7]),
        ([math.inf, 0, 0, 0, 0.01, 0.02, 0.03, 0.04], [1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 6, 7]),
        # Too close together, too large, or endless for sums.
        ([1e-9, 2e-9, 3e-9, 4e-9] * 2, [0] * 8, [2, 3, 6, 7]),
        ([3e8] * 8, [0, 0, 1, 1, 0, 1, 0, 0], [2, 3, 4, 5]),
        ([math.inf, -math.inf, 0, 1] * 2, [0, 1, 0, 0, 1, 1, 1, 1], [0, 1, 4, 7]),
    ],
)
def test_labels_first_keeps_the_order_of_any_scores(scores, labels, kept):
    layout = BlockLayout.from_seqlens([8, 8], 2)
    selector = Selector(config_of(keep=0.5, dense_layers=[], keep_first=0, keep_last=0), 1)
    selector.begin(layout, torch.tensor(labels, dtype=torch.bool).repeat_interleave(2))
    selection = selector.select(0, "attention", lambda: torch.tensor(scores, dtype=torch.float32))
    assert selection.kept_blocks.tolist() == kept


def test_where_all_have_labels_scores_are_as_they_were():
    config = config_of(keep=0.4, dense_layers=[])
    everything = labels_of(*range(LAYOUT.num_tokens))
    assert run(config, labelled=everything)[0] == run(config)[0]
    assert run(config, labelled=labels_of(*range(0, LAYOUT.num_tokens, 3)))[0] == run(config)[0]


def test_a_threshold_does_not_look_at_labels():
    thresholds = {"policy": "threshold", "thresholds": [0.6] * 4, "dense_layers": []}
    config, labelled = config_of(**thresholds), labels_of(40)
    assert run(config, labelled=labelled)[0] == run(config)[0]
    # A schedule cuts by ratio.
    config = config_of(**thresholds, keep_schedule=[(0.0, 0.3)])
    assert run(config, labelled=labelled)[0] != run(config)[0]


@given(seqlens, st.integers(1, 9), st.sets(st.integers(0, 159)))
def test_blocks_with_rows(lengths, block_size, rows):
    layout = BlockLayout.from_seqlens(lengths, block_size)
    chosen = torch.zeros(layout.num_tokens, dtype=torch.bool)
    chosen[[row for row in rows if row < layout.num_tokens]] = True
    expected = [any(chosen[a:b].tolist()) for a, b in pairwise(layout.block_starts.tolist())]
    assert layout.blocks_with(chosen).tolist() == expected


@pytest.mark.parametrize("lengths", [[3], [3, 9], [1, 2, 3]])
def test_tensors_of_a_layout_begin_where_kernels_load_wide_units(lengths):
    layout = BlockLayout.from_seqlens(lengths, 1)
    tensors = layout.block_starts, layout.cu_blocks, layout.cu_seqlens
    assert [tensor.data_ptr() % 16 for tensor in tensors] == [0, 0, 0]


def test_kept_rows_are_as_many_where_the_residual_has_them_alone():
    kept = lemo.ops.token_select(scores_of(0, "mlp"), LAYOUT, "ratio", 0.5, 0, 0)
    alone = kept.of_kept_rows()
    assert alone.rows is None
    assert alone.num_rows == kept.rows.numel() < LAYOUT.num_tokens


def test_the_first_layer_chooses_for_all():
    kept, scored, _ = run(config_of(keep=0.4, dense_layers=[0, -1]))
    assert scored == [(1, "attention")]
    expected = cut(1, "attention", "ratio", 0.4)
    for kind in ("attention", "mlp"):
        assert kept[0, kind] is None
        assert kept[1, kind] == kept[2, kind] == expected
        assert kept[3, kind] is None


def test_every_layer_chooses_with_a_set_for_the_mlp():
    config = config_of(keep=[0.3, 0.5, 0.7, 1.0], keep_mlp=0.6, dense_layers=[], select_at="all")
    kept, scored, _ = run(config)
    # Layer 3's attention keeps everything, so nobody scores it.
    assert scored == [*[(i, k) for i in range(4) for k in ("attention", "mlp")][:-2], (3, "mlp")]
    for layer, keep in enumerate([0.3, 0.5, 0.7]):
        assert kept[layer, "attention"] == cut(layer, "attention", "ratio", keep)
    assert kept[3, "attention"] is None
    for layer in range(4):
        assert kept[layer, "mlp"] == cut(layer, "mlp", "ratio", 0.6)


def test_layers_that_share_scores_may_keep_different_shares():
    kept, scored, _ = run(config_of(keep=[0.2, 0.8, 0.2, 0.5], dense_layers=[], select_at=[0, 3]))
    assert scored == [(0, "attention"), (3, "attention")]
    for layer, keep in ((0, 0.2), (1, 0.8), (2, 0.2)):
        assert kept[layer, "attention"] == cut(0, "attention", "ratio", keep)
    assert set(kept[0, "attention"]) < set(kept[1, "attention"])
    assert kept[3, "mlp"] == cut(3, "attention", "ratio", 0.5)


def test_a_dense_layer_may_choose_for_others():
    kept, scored, _ = run(config_of(keep=0.4, dense_layers=[0, 3], select_at=[0, 3]))
    assert scored == [(0, "attention")], "layer 3 has nobody to choose for"
    assert kept[0, "attention"] is None
    assert kept[1, "attention"] == kept[2, "mlp"] == cut(0, "attention", "ratio", 0.4)


def test_thresholds_of_the_layer_that_scored():
    config = config_of(
        policy="threshold",
        thresholds=[0.5, 2.0, 0.7, 0.0],
        mlp_thresholds=[0.4, 2.0, 0.6, 0.0],
        dense_layers=[],
        select_at=[0, 2],
        keep_first=0,
        keep_last=2,
    )
    kept, scored, _ = run(config)
    assert scored == [(0, "attention"), (0, "mlp"), (2, "attention"), (2, "mlp")]
    for layer, source, value, of_mlp in (
        (0, 0, 0.5, 0.4),
        (1, 0, 0.5, 0.4),
        (2, 2, 0.7, 0.6),
        (3, 2, 0.7, 0.6),
    ):
        assert kept[layer, "attention"] == cut(source, "attention", "threshold", value, 0, 2)
        assert kept[layer, "mlp"] == cut(source, "mlp", "threshold", of_mlp, 0, 2)


def test_thresholds_of_the_predictor_folder():
    settings = {"policy": "threshold", "scorer": "predictor", "predictor": "folder"}
    settings |= {"dense_layers": [], "select_at": "all"}
    folder = {"attention": [0.5] * 4, "mlp": [0.3] * 4}
    kept, *_ = run(config_of(**settings), folder=folder)
    assert kept[2, "attention"] == cut(2, "attention", "threshold", 0.5)
    assert kept[2, "mlp"] == cut(2, "mlp", "threshold", 0.3)
    kept, *_ = run(config_of(**settings, thresholds=[0.6] * 4), folder=folder)
    assert kept[2, "attention"] == kept[2, "mlp"] == cut(2, "attention", "threshold", 0.6)
    with pytest.raises(ValueError, match="thresholds: .* predictor folder has none either"):
        run(config_of(**settings), folder={})


def test_the_schedule_replaces_shares_and_thresholds():
    config = config_of(
        policy="threshold",
        thresholds=[0.5] * 4,
        dense_layers=[0],
        keep_schedule=[[0.5, 0.25], [0.9, 1.0]],
    )
    assert run(config, progress=0.4)[0][1, "mlp"] == cut(1, "attention", "threshold", 0.5)
    assert run(config, progress=0.5)[0][2, "mlp"] == cut(1, "attention", "ratio", 0.25)
    kept, scored, _ = run(config, progress=1.0)
    assert not scored, "a dense finish needs no scores"
    assert set(kept.values()) == {None}


def test_where_everything_is_kept_nothing_is_scored():
    _, _, selector = run(config_of(keep=0.4, dense_layers=[]))
    selector.begin(LAYOUT)
    with selector.keeping_everything():
        assert selector.has_one_set
        for kind in ("attention", "mlp"):
            assert selector.select(0, kind, lambda: pytest.fail("scored")).rows is None


def test_a_cut_that_keeps_every_block_is_the_dense_case():
    kept, scored, selector = run(config_of(keep=0.5, dense_layers=[], keep_first=8))
    assert scored == [(0, "attention")]
    assert set(kept.values()) == {None}
    assert all(layer.attention_rows == LAYOUT.num_tokens for layer in selector.statistics())


def test_rows_that_no_sub_block_kept():
    config = config_of(keep=0.3, keep_mlp=0.4, dense_layers=[], select_at="all")
    kept, _, selector = run(config)
    blocks = sorted({block for each in kept.values() for block in each})
    starts = LAYOUT.block_starts.tolist()
    untouched = torch.ones(LAYOUT.num_tokens, dtype=torch.bool)
    for block in blocks:
        untouched[starts[block] : starts[block + 1]] = False
    assert 0 < untouched.sum() < LAYOUT.num_tokens
    assert torch.equal(selector.masked_rows(), untouched)
    assert run(config_of(keep=0.3))[2].masked_rows() is None, "dense layers touch every row"
    off = config_of(keep=0.3, keep_mlp=0.4, dense_layers=[], select_at="all", mask_loss=False)
    assert run(off)[2].masked_rows() is None


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("dense", [[], [0, -1]])
def test_rows_that_few_sub_blocks_kept(share, dense):
    settings = {"keep": 0.3, "keep_mlp": 0.5, "select_at": "all", "dense_layers": dense}
    kept, _, selector = run(config_of(**settings, mask_loss=share))
    starts = LAYOUT.block_starts.tolist()
    times = torch.zeros(LAYOUT.num_tokens)
    for blocks in kept.values():
        for block in range(LAYOUT.num_blocks) if blocks is None else blocks:
            times[starts[block] : starts[block + 1]] += 1
    expected = times / len(kept) < share
    masked = selector.masked_rows()
    assert torch.equal(expected if masked is None else masked, expected)
    assert expected.any() == (masked is not None)


@pytest.mark.parametrize("burn_in", [0, 3, 8, 50, 0.3, 0.99])
@pytest.mark.parametrize("lengths", [[61, 8, 40], [0, 40, 0, 23, 0]])
def test_rows_behind_a_gap(burn_in, lengths):
    layout = BlockLayout.from_seqlens(lengths, 8)
    config = config_of(keep=0.5, dense_layers=[], burn_in=burn_in)
    kept, _, selector = run(config, layout=layout)
    kept = kept[0, "attention"]
    starts, firsts = layout.block_starts.tolist(), set(layout.cu_blocks.tolist())
    count = math.ceil(burn_in * 8) if isinstance(burn_in, float) else burn_in
    expected = torch.ones(layout.num_tokens, dtype=torch.bool)
    for block in kept:
        behind_a_gap = block not in firsts and block - 1 not in kept
        first = starts[block] + (count if behind_a_gap else 0)
        expected[first : starts[block + 1]] = False
    assert torch.equal(selector.masked_rows(), expected)


def test_nothing_is_burnt_in_where_left_out_rows_are_computed():
    settings = {"keep": 0.5, "dense_layers": [], "visible_keys": "computed"}
    masked, expected = (
        run(config_of(**settings, burn_in=burn_in))[2].masked_rows() for burn_in in (0.5, 0)
    )
    assert torch.equal(masked, expected)


def test_nothing_is_burnt_in_without_a_mask():
    settings = {"keep": 0.3, "dense_layers": [], "mask_loss": False}
    assert run(config_of(**settings, burn_in=0.5))[2].masked_rows() is None


def test_the_last_pass_is_forgotten():
    _, _, selector = run(config_of(keep=0.3, dense_layers=[]))
    other = BlockLayout.from_seqlens([16], 8)
    selector.begin(other)
    assert selector.statistics() == []
    selector.select(0, "attention", lambda: torch.tensor([1.0, 0.0]))
    selector.select(0, "mlp", lambda: torch.tensor([1.0, 0.0]))
    assert selector.statistics()[0].layout is other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": [0.5, 0.5]}, "keep: expected 4 entries, one for each layer, got 2"),
        ({"keep_mlp": [0.5] * 5}, "keep_mlp: expected 4 entries, .* got 5"),
        ({"keep": [0.0] * 4, "dense_layers": []}, "keep: expected more than 0 in some layer"),
        ({"dense_layers": [4]}, "dense_layers: expected layers between -4 and 3, got 4"),
        ({"select_at": [-5]}, "select_at: expected layers between -4 and 3, got -5"),
        ({"select_at": [2], "dense_layers": [0]}, "select_at: layer 1 is not dense, so expected"),
        (
            {"policy": "threshold", "thresholds": [0.5] * 3},
            "thresholds: expected 4 entries, one for each layer, got 3",
        ),
        (
            {"policy": "threshold", "thresholds": [0.5] * 4, "mlp_thresholds": [0.5]},
            "mlp_thresholds: expected 4 entries, one for each layer, got 1",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(settings, message):
    with pytest.raises(ValueError, match=message):
        Selector(config_of(**settings).resolved(answers=False), 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"dense_layers": [2]},
        {"dense_layers": [], "keep_mlp": [0.0, 0.0, 0.25, 0.0]},
        {"dense_layers": [], "keep_schedule": [(0.5, 0.25)]},
        {"dense_layers": [], "policy": "threshold", "thresholds": [0.5] * 4},
    ],
    ids=str,
)
def test_a_share_of_nothing_is_taken_where_something_else_is_kept(settings):
    settings = {"keep": 0.0, "select_at": "all"} | settings
    assert Selector(config_of(**settings).resolved(answers=False), 4).config.keep == 0.0


# Scores


@given(seqlens, st.integers(1, 9), st.sampled_from([1, 60, 1 << 24]))
def test_block_means(lengths, block_size, tile):
    layout = BlockLayout.from_seqlens(lengths, block_size)
    x = torch.randn(sum(lengths), 3)
    starts = layout.block_starts.tolist()
    expected = [x[first:end].mean(0) for first, end in pairwise(starts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lemo.selection.scorers.paper.pooled._TILE_ELEMENTS", tile)
        assert_close_fp32(block_means(x, layout), torch.stack(expected))
    assert block_means(x.bfloat16(), layout).dtype == torch.float32


@given(seqlens, st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.sampled_from([1, 1 << 24]))
def test_visible_means(lengths, heads, tile):
    layout = BlockLayout.from_seqlens(lengths, 4)
    q, k = (torch.randn(layout.num_blocks, count, 5) for count in heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lemo.selection.scorers.paper.pooled._TILE_ELEMENTS", tile)
        scores = visible_means(q, k, layout, 0.3)
    keys = k.repeat_interleave(heads[0] // heads[1], 1)
    products = 0.3 * torch.einsum("mhd,nhd->hmn", q, keys).clamp(min=0).mean(0)
    cuts = layout.cu_blocks.tolist()
    for first, end in pairwise(cuts):
        for n in range(first, end):
            assert_close_fp32(scores[n], products[n:end, n].mean())


def captured(scorer_type, architecture):
    """Scores of layer 1 by a scorer, and the modules' own tensors to check them against."""
    model = make_model(architecture, dtype=torch.float32)
    architecture = architecture_of(model)
    given = padded_batch([37, 20])
    names = "input_ids", "attention_mask"
    arguments = ForwardArguments(**{name: given[name] for name in names})
    batch, residual = architecture.embed(arguments, 8)
    scorer, layer = scorer_type(architecture), model.model.layers[1]
    with torch.no_grad():
        scores = {kind: scorer(1, kind, residual, batch) for kind in ("attention", "mlp")}
        rows = {
            "attention": layer.input_layernorm(residual),
            "mlp": layer.post_attention_layernorm(residual),
        }
    return layer, batch, rows, scores, model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_pooled_scores(architecture):
    layer, batch, rows, scores, _ = captured(PooledScorer, architecture)
    starts = batch.layout.block_starts.tolist()
    means, mlp_means = (
        torch.stack([rows[kind][a:b].mean(0) for a, b in pairwise(starts)])
        for kind in ("attention", "mlp")
    )
    attention = layer.self_attn
    q = attention.q_proj(means).view(len(means), -1, attention.head_dim)
    k = attention.k_proj(means).view(len(means), -1, attention.head_dim)
    if architecture == "qwen3":
        q, k = attention.q_norm(q), attention.k_norm(k)
    products = torch.einsum("mhd,nhd->hmn", q, k.repeat_interleave(2, 1)).clamp(min=0).mean(0)
    products *= attention.head_dim**-0.5
    cuts = batch.layout.cu_blocks.tolist()
    expected = [products[n:end, n].mean() for a, end in pairwise(cuts) for n in range(a, end)]
    assert_close_fp32(scores["attention"], torch.stack(expected))
    activation = layer.mlp.act_fn(layer.mlp.gate_proj(mlp_means))
    activation = activation * layer.mlp.up_proj(mlp_means)
    assert_close_fp32(scores["mlp"], activation.abs().mean(1))


def test_autocast_does_not_round_pooled_scores():
    queries, keys = torch.randn(LAYOUT.num_blocks, 4, 8), torch.randn(LAYOUT.num_blocks, 2, 8)
    scores = visible_means(queries, keys, LAYOUT, 0.5)
    with torch.autocast(scores.device.type, torch.bfloat16):
        assert torch.equal(visible_means(queries, keys, LAYOUT, 0.5), scores)


# The GPU's block_scores knows no fp32; its own tests compare it there.
@pytest.mark.cpu_only
def test_exact_scores():
    layer, batch, rows, scores, model = captured(ExactScorer, "llama")
    attention = layer.self_attn
    position = torch.cat([torch.arange(37), torch.arange(20)])
    cos, sin = model.model.rotary_emb(rows["mlp"], position[None])

    def rotated(projection):
        heads = projection(rows["attention"]).view(57, -1, attention.head_dim)
        left, right = heads.chunk(2, -1)
        return heads * cos[0][:, None] + torch.cat((-right, left), -1) * sin[0][:, None]

    layout = batch.layout
    expected = reference.block_scores(
        rotated(attention.q_proj),
        rotated(attention.k_proj),
        layout.block_starts,
        layout.cu_blocks,
        attention.scaling,
    )
    assert_close_fp32(scores["attention"], expected)
    x = rows["mlp"]
    activation = layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
    starts = layout.block_starts.tolist()
    per_token = activation.abs().mean(1)
    expected = torch.stack([per_token[a:b].mean() for a, b in pairwise(starts)])
    assert_close_fp32(scores["mlp"], expected)


def test_random_scores_follow_the_seed():
    batch = types.SimpleNamespace(layout=LAYOUT)
    one, same, other = (RandomScorer(seed) for seed in (1, 1, 2))
    x = torch.zeros(1)
    first = one(0, "attention", x, batch)
    assert torch.equal(first, same(0, "attention", x, batch))
    assert not torch.equal(first, other(0, "attention", x, batch))
    assert not torch.equal(first, one(0, "attention", x, batch)), "the draw is not fresh"


def test_processes_draw_different_scores(monkeypatch):
    batch = types.SimpleNamespace(layout=LAYOUT)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    drawn = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        drawn.append(RandomScorer(1)(0, "attention", torch.zeros(1), batch))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_every_process_and_step_has_draws_of_its_own(monkeypatch):
    batch, drawn = types.SimpleNamespace(layout=LAYOUT), set()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        scorer = RandomScorer(1)
        for step in range(3):
            scorer.begin_step(step)
            drawn.add(tuple(scorer(0, "attention", torch.zeros(1), batch).tolist()))
        # One process of several passes draws what several processes draw.
        scorer.begin_pass(7)
        drawn.add(tuple(scorer(0, "attention", torch.zeros(1), batch).tolist()))
    assert len(drawn) == 9 + 1


@pytest.mark.parametrize("block_size", [8, 0.25])
def test_predicted_scores(monkeypatch, block_size):
    calls = []

    def scores(layer, kind, x, layout):
        calls.append((layer, kind, tuple(x.shape)))
        return torch.arange(layout.num_blocks).float()

    thresholds = {"attention": [3.0] * 3, "mlp": [100.0] * 3}
    predictors = types.SimpleNamespace(block_size=8, scores=scores, thresholds=thresholds)
    monkeypatch.setattr(
        "lemo.selection.scorers.paper.predictor.load", lambda *arguments: predictors
    )
    settings = {"scorer": "predictor", "predictor": "folder", "policy": "threshold"}
    config = config_of(**settings, dense_layers=[0], block_size=block_size)
    model = make_model("llama")
    handle = lemo.enable(model, config)
    model(**padded_batch([61]))
    assert calls == [(1, "attention", (61, HIDDEN)), (1, "mlp", (61, HIDDEN))]
    assert handle.statistics()[2].attention_blocks.tolist() == [0, 3, 4, 5, 6, 7]
    assert handle.statistics()[2].mlp_blocks.tolist() == [0, 7]
    with pytest.raises(ValueError, match="block_size: the predictors were trained for 8, got 64"):
        lemo.enable(make_model("llama"), config_of(**settings, block_size=64))


def test_scores_ignore_the_other_sequences_of_a_batch():
    def kept(lengths):
        model = make_model("llama")
        handle = lemo.enable(model, config_of(keep=0.5, dense_layers=[0], block_size=8))
        batch = padded_batch([61, 40])
        rows = batch["attention_mask"].shape[0] if lengths == 2 else 1
        model(**{name: value[:rows] for name, value in batch.items()})
        return [b for b in handle.statistics()[1].attention_blocks.tolist() if b < 8]

    assert kept(1) == kept(2)


@pytest.mark.parametrize("leave_room", [False, True])
@pytest.mark.parametrize(("keep_first", "keep_last"), [(0, 0), (1, 0), (0, 1), (2, 1), (3, 3)])
@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_ends_are_kept_where_the_share_has_room(keep, keep_first, keep_last, leave_room):
    counts = [0, 1, 2, 3, 4, 8, 12]
    layout = BlockLayout.from_seqlens([8 * count for count in counts], 8)
    expected, crowded, start = [], False, 0
    for count in counts:
        ends = [b for b in range(count) if b < keep_first or b >= count - keep_last]
        # Quarters, which are exact.
        has_room = len(ends) < math.ceil(keep * count) or not leave_room
        expected += [start + block for block in ends] if has_room else []
        crowded |= count > 0 and not has_room
        start += count
    assert always_kept(layout, keep, keep_first, keep_last, leave_room) == (expected, crowded)


@pytest.mark.parametrize("burn_in", [0, 3, 0.5])
@pytest.mark.parametrize("mask_loss", [True, 1e-12, 0.125, 0.25, 0.3, 1.0])
def test_rows_count_that_enough_sub_blocks_keep(mask_loss, burn_in):
    layout = BlockLayout.from_seqlens([19, 8, 0, 30, 1], 8)
    keeping_all = Selection.everything(layout)
    kept = [torch.randperm(layout.num_blocks)[:count].sort().values for count in (1, 2, 4, 5, 6, 6)]
    selections = [replace(keeping_all, rows=blocks, kept_blocks=blocks.int()) for blocks in kept]
    selections += [keeping_all, selections[-1]]
    for chosen in (selections[:6], selections, selections[-1:] * 3):
        needed = 1 if mask_loss is True else math.ceil(Fraction(str(mask_loss)) * len(chosen))
        times = [
            sum(s.kept_blocks is None or block in s.kept_blocks.tolist() for s in chosen)
            for block in range(layout.num_blocks)
        ]
        masked = [count < needed for count in times]
        expected, block = [], 0
        for tokens in layout.seqlens:
            for first in range(0, tokens, 8):
                size = min(8, tokens - first)
                burnt = math.ceil(burn_in * (8 if burn_in < 1 else 1))
                before = first > 0 and masked[block - 1]
                expected += [masked[block] or (before and row < burnt) for row in range(size)]
                block += 1
        found = masked_rows(layout, chosen, mask_loss, burn_in)
        assert ([False] * layout.num_tokens if found is None else found.tolist()) == expected


def test_a_share_of_sub_blocks_is_taken_without_its_rounding_error():
    """0.28 * 50 lies above 14."""
    layout = BlockLayout.from_seqlens([16], 8)
    first, second = (
        replace(Selection.everything(layout), rows=blocks, kept_blocks=blocks.int())
        for blocks in torch.tensor([[0], [1]])
    )
    selections = [replace(first) for _ in range(14)] + [replace(second) for _ in range(36)]
    assert not masked_rows(layout, selections, 0.28, 0).any()
    assert masked_rows(layout, selections, 0.3, 0).tolist() == [True] * 8 + [False] * 8
