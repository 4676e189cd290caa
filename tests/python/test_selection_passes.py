"""What a pass keeps as a whole: one set or several, fixed ends, what is said of it afterwards."""

from contextlib import nullcontext

import pytest
import torch

from lemo.packing.blocks import BlockLayout
from lemo.selection.selector import Selector
from lemo.selection.statistics import blocks_of, kept_map
from selection_cases import LAYOUT, cut, run
from tiny_models import config_of


@pytest.mark.parametrize(
    ("settings", "one_set"),
    [
        ({}, True),
        ({"keep": [0.5] * 4}, True),
        ({"keep_mlp": 0.5}, False),
        ({"keep": [0.5, 0.5, 0.5, 0.25]}, False),
        ({"select_at": "all"}, False),
        ({"select_at": [0, 2]}, False),
        ({"dense_layers": [3]}, False),
        ({"dense_layers": [0]}, False),
        ({"keep_schedule": [(0.5, 0.25), (0.9, 1.0)]}, True),
        ({"keep": [0.5, 0.5, 0.5, 0.25], "keep_schedule": [(0.0, 0.5)]}, True),
        ({"keep_mlp": 0.5, "keep_schedule": [(0.0, 0.5)]}, False),
    ],
)
def test_whether_all_sub_blocks_keep_the_same(settings, one_set):
    settings = {"keep": 0.5, "dense_layers": []} | settings
    selector = Selector(config_of(**settings).resolved(answers=False), 4)
    assert selector.always_has_one_set is one_set
    for progress in (0.0, 0.5, 1.0):
        selector.set_progress(progress)
        assert selector.has_one_set is one_set
    with selector.keeping_everything():
        assert selector.has_one_set
        assert selector.is_overruled
    assert selector.has_one_set is one_set
    assert not selector.is_overruled


def test_a_schedule_that_begins_with_everything_may_end_with_several_sets():
    schedule = {"keep_schedule": [[0.0, 1.0], [0.5, 0.25]]}
    selector = Selector(config_of(dense_layers=[3], **schedule).resolved(answers=False), 4)
    assert selector.has_one_set
    assert not selector.always_has_one_set
    selector.set_progress(0.5)
    assert not selector.has_one_set
    config = config_of(dense_layers=[], **schedule).resolved(answers=False)
    assert Selector(config, 4).always_has_one_set


@pytest.mark.parametrize(("mask_loss", "masks"), [(True, True), (0.25, True), (False, False)])
def test_whether_the_loss_of_some_rows_does_not_count(mask_loss, masks):
    config = config_of(keep=0.5, mask_loss=mask_loss).resolved(answers=False)
    assert Selector(config, 4).masks_loss is masks


@pytest.mark.parametrize(("scorer", "ends"), [("random", 0), ("pooled", 1)])
def test_ends_are_fixed_unless_random_scores_have_no_room_beside_them(scorer, ends):
    config = config_of(scorer=scorer, keep=0.25, dense_layers=[], keep_first=1, keep_last=1)
    kept, *_ = run(config)
    assert kept[0, "attention"] == cut(0, "attention", "ratio", 0.25, ends, ends)


def test_a_pass_that_repeats_an_earlier_one_leaves_the_latest():
    config = config_of(keep=0.5, dense_layers=[], keep_first=0, keep_last=0)
    selector, passes = Selector(config, 1), []
    for number in range(2):
        selector.begin(BlockLayout.from_seqlens([16], 8))
        selector.select(0, "attention", lambda number=number: torch.eye(2)[number])
        selector.select(0, "mlp", lambda: None)
        passes.append(selector.latest)
    for earlier, number in zip(passes, (0, 1)):
        with selector.repeating(earlier):
            selector.begin(BlockLayout.from_seqlens([16], 8))
            assert selector.select(0, "mlp", lambda: None).kept_blocks.tolist() == [number]
            assert selector.latest is earlier
        assert selector.latest is passes[1]
        assert selector.statistics()[0].attention_blocks.tolist() == [1]


def test_statistics_count_rows_and_the_map_is_of_the_first_sequence():
    kept, _, selector = run(config_of(keep=0.5, keep_mlp=0.25, dense_layers=[3]))
    statistics = selector.statistics()
    sizes = LAYOUT.block_starts.diff().tolist()
    for each in statistics:
        for kind, rows in (("attention", each.attention_rows), ("mlp", each.mlp_rows)):
            blocks = kept[each.layer, kind]
            assert rows == sum(sizes if blocks is None else (sizes[block] for block in blocks))
    found = kept_map(statistics, blocks_of(statistics))
    assert (found["block_size"], found["tokens"]) == (8, 61)
    for layer, of_layer in enumerate(found["layers"]):
        for kind, blocks in of_layer.items():
            everywhere = range(8) if kept[layer, kind] is None else kept[layer, kind]
            assert blocks == [block for block in everywhere if block < 8]


def test_equal_sets_are_one_object():
    _, _, selector = run(config_of(keep=0.4, keep_mlp=0.6, dense_layers=[]))
    for kind in ("attention", "mlp"):
        assert len({id(selector.selected(layer, kind)) for layer in range(4)}) == 1


@pytest.mark.parametrize(
    ("lengths", "threshold", "dense", "message"),
    [
        # Ends of short sequences are not more than their blocks.
        ([8, 8, 8, 80], 0.5, [], None),
        ([8, 8, 8, 80], 2.0, [], "expected some block to reach one, got none of 13"),
        # Dense layers keep everything anyway.
        ([8, 80], 2.0, [0], "expected some block to reach one, got none of 11"),
        ([8, 80], 2.0, [0, 1, 2, 3], None),
        ([8, 16], 2.0, [], None),
    ],
)
def test_thresholds_that_no_block_reaches(lengths, threshold, dense, message):
    layout = BlockLayout.from_seqlens(lengths, 8)
    settings = {"policy": "threshold", "thresholds": [threshold] * 4, "dense_layers": dense}
    _, _, selector = run(config_of(**settings, keep_first=1, keep_last=1), layout=layout)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        selector.check_kept()


def test_a_threshold_that_was_reached_once_may_be_missed_later():
    settings = {"policy": "threshold", "thresholds": [0.5] * 4, "dense_layers": []}
    _, _, selector = run(config_of(**settings, keep_first=1, keep_last=1))
    selector.check_kept()
    selector.begin(LAYOUT)
    for layer in range(4):
        for kind in ("attention", "mlp"):
            selector.select(layer, kind, lambda: torch.zeros(LAYOUT.num_blocks))
    selector.check_kept()


def test_a_share_next_to_all_leaves_blocks_out():
    layout = BlockLayout.from_seqlens([800], 4)
    kept, *_ = run(config_of(keep=0.99, dense_layers=[]), layout=layout)
    assert len(kept[0, "mlp"]) == 198


def test_what_keeps_nothing_may_keep_some_later():
    settings = {"keep": 0.0, "dense_layers": [], "keep_first": 1, "keep_last": 0}
    config = config_of(**settings, keep_schedule=[(0.5, 0.5)])
    assert run(config, progress=0.5)[0][0, "mlp"] == cut(0, "attention", "ratio", 0.5, 1, 0)
