"""Rows that the planner takes layers to keep, against what the selection keeps of random scores."""

import random

import pytest
import torch

from lemo.packing.blocks import BlockLayout, block_tokens
from lemo.planner.plan import NOMINAL
from lemo.planner.request import Request
from lemo.planner.rows import drops_rows, embeds_all, has_one_set, rows_of, selections
from lemo.planner.shape import Adapters, LayerRows, ModelShape
from lemo.selection import scorers
from lemo.selection.selector import Selector
from tiny_models import flat_config

pytestmark = pytest.mark.cpu_only

LAYERS = 3
# Just before and after each begin of a schedule.
MOMENTS = (0.0, 0.19, 0.2, 0.59, 0.6, 1.0)
LENGTHS = [[96], [100], [61, 45], [96, 16, 7], [33, 128]]


def selected(config, lengths, labelled=None):
    """Of passes at all moments: (rows of each sub-block, whether all share a set, scores asked)."""
    selector = Selector(config, LAYERS)
    size = block_tokens(config.block_size, max(lengths))
    for moment in MOMENTS:
        selector.set_progress(moment)
        for seed in range(4):
            layout = BlockLayout.from_seqlens(lengths, size, "cpu")
            selector.begin(layout, labelled)
            generator, asked = torch.Generator().manual_seed(seed), []

            def score(layout=layout, generator=generator, asked=asked):
                asked.append(1)
                return torch.rand(layout.num_blocks, generator=generator)

            pairs = [
                [selector.select(layer, kind, score).num_rows for kind in ("attention", "mlp")]
                for layer in range(LAYERS)
            ]
            yield moment, pairs, selector.has_one_set, len(asked)


def drawn_settings(draw):
    shares = [0.0625, 0.25, 0.5, 0.75, 1.0]
    schedule = {0: (), 1: ((0.2, draw.choice(shares)),)}
    schedule[2] = ((0.2, draw.choice(shares)), (0.6, draw.choice(shares)))
    of_layers = [0.0, *(draw.choice(shares) for _ in range(LAYERS - 1))]
    keep = draw.choice([*shares, draw.sample(of_layers, LAYERS)])
    return {
        "keep": keep,
        "keep_mlp": draw.choice([None, None, *shares]),
        "keep_schedule": schedule[draw.choice([0, 0, 1, 2])],
        "select_at": draw.choice(["first", "first", "all"]),
        "dense_layers": draw.choice([(), (), (0,), (0, -1)]),
        "keep_first": draw.choice([0, 0, 1, 2]),
        "keep_last": draw.choice([0, 0, 1]),
        "block_size": draw.choice([8, 16, 0.0625, 0.125]),
        "mask_loss": draw.choice([True, False, 0.5]),
        "scorer": "pooled",
    }


def test_what_the_selection_keeps():
    """The most rows of any pass, one set, and how often scores are asked for."""
    draw, kinds, exact = random.Random(0), set(), 0
    for _ in range(150):
        config = flat_config(**drawn_settings(draw)).resolved(answers=False)
        lengths = draw.choice(LENGTHS)
        passes = list(selected(config, lengths))
        found = [LayerRows(0, 0)] * LAYERS
        for _, pairs, _, _ in passes:
            found = [LayerRows(*map(max, *pair)) for pair in zip(found, pairs)]
        planned = rows_of(config, LAYERS, lengths)
        size = block_tokens(config.block_size, max(lengths))
        for most, mine in zip(planned, found, strict=True):
            for kind in range(2):
                # Of each sequence the last block, shorter than the others, is kept or not.
                assert mine[kind] <= most[kind] <= mine[kind] + (size - 1) * len(lengths)
                if not any(length % size for length in lengths):
                    assert mine[kind] == most[kind], (config, lengths)
                    exact += 1
        one_set = all(alike for *_, alike, _ in passes)
        assert has_one_set(config, LAYERS) == one_set
        assert drops_rows(config, LAYERS) == (one_set and config.mask_loss is not False)
        asked = {count for moment, *_, count in passes if moment == 0.0}
        assert {selections(config, LAYERS)} == {max(count - 1, 0) for count in asked}
        kinds.add((one_set, config.mask_loss))
    assert exact > 100
    assert len(kinds) == 6


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("tokens", [13, 32, 64])
@pytest.mark.parametrize("keep", [0.0625, 0.5])
def test_prompts_that_are_kept_at_least(keep, tokens, lengths):
    """Beside a block with labels, the last one of each sequence."""
    settings = {"keep": keep, "keep_tokens": tokens, "scorer": "lexical", "block_size": 8}
    config = flat_config(**settings).resolved(answers=True)
    labelled = torch.cat([torch.arange(length) == length - 1 for length in lengths])
    found = {
        rows
        for _, pairs, *_ in selected(config, lengths, labelled)
        for row in pairs
        for rows in row
    }
    most = rows_of(config, LAYERS, lengths)[0].attention
    assert max(found) <= most <= max(found) + 7 * len(lengths)


def test_by_thresholds_all_may_be_kept():
    config = flat_config(policy="threshold", thresholds=[0.5] * LAYERS, select_at="first")
    config = config.resolved(answers=False)
    assert rows_of(config, LAYERS, [61, 45]) == [LayerRows(106, 106)] * LAYERS
    # How many rows are kept is not known before they are, so no room is planned for fewer.
    assert not has_one_set(config, LAYERS)
    assert not drops_rows(config, LAYERS)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("random", [scorers.RandomScorer]),
        ("lexical", [scorers.LexicalScorer]),
        ("attention", [scorers.AttentionScorer]),
        ("given", [scorers.GivenScorer]),
        ("pooled", [scorers.PooledScorer]),
        ("exact", [scorers.ExactScorer]),
        ("predictor", [scorers.RelevanceScorer, scorers.PredictorScorer]),
    ],
    ids=str,
)
def test_all_tokens_are_embedded_for_scores_of_the_residual(name, kinds):
    config = flat_config(keep=0.5).model_copy(update={"scorer": name})
    assert {embeds_all(config)} == {kind.reads_residual for kind in kinds}


@pytest.mark.parametrize(
    ("settings", "counted"),
    [({}, 512), ({"mask_loss": False}, 4096), ({"select_at": "all"}, 4096)],
    ids=str,
)
def test_rows_whose_loss_is_planned(settings, counted):
    """Layers that keep different rows together keep more than each of them."""
    config = flat_config(keep=0.125, block_size=64, **settings).resolved(answers=False)
    shape = ModelShape(LAYERS, 64, 128, 4, 2, 16, 256)
    step = Request(shape, Adapters(), config, NOMINAL).planner(4096)._memory.step
    assert step.labels == counted
    assert {rows for layer in step.rows for rows in layer} == {512}
