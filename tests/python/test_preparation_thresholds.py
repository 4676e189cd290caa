"""Thresholds: the budget and Algorithm 1."""

import math

import pytest
import torch

from lemo.preparation.thresholds import (
    LayerScores,
    mean_thresholds,
    search,
    thresholds_for_budget,
)

# Mathematics on the CPU, whatever device the model is on.
pytestmark = pytest.mark.cpu_only


def layers():
    """Scores of unlike scale and skew, 200 free blocks and 20 fixed ones in each layer."""
    g = torch.Generator("cpu").manual_seed(0)
    normal = torch.randn(3, 200, generator=g)
    return [
        LayerScores(normal[0], 20),
        LayerScores(100 + 5 * torch.exp(normal[1]), 20),  # a long upper tail
        LayerScores(-3 - 0.01 * torch.exp(normal[2]), 20),  # a long lower tail
    ]


def kept(scores, thresholds):
    """An independent count, block by block, in fp32 as the selection compares."""
    total = blocks = 0
    for layer, threshold in zip(scores, thresholds):
        limit = torch.tensor(threshold, dtype=torch.float32)
        total += layer.fixed + sum(bool(s >= limit) for s in layer.free)
        blocks += layer.fixed + len(layer.free)
    return total / blocks


def test_start_is_the_mean_score():
    for threshold, layer in zip(mean_thresholds(layers()), layers()):
        assert threshold == pytest.approx(layer.free.double().mean().item())


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_budget_is_met_and_shared_out(keep):
    scores = layers()
    thresholds = thresholds_for_budget(scores, keep)
    assert kept(scores, thresholds) == pytest.approx(keep, abs=1 / 660 + 1e-9)
    shares = [layer.kept_share(t) for layer, t in zip(scores, thresholds)]
    assert len({round(share, 3) for share in shares}) == 3
    if keep == 0.5:
        assert shares[1] < shares[0] < shares[2]


def test_budget_holds_at_any_offsets_and_a_higher_offset_keeps_less():
    scores = layers()
    plain = thresholds_for_budget(scores, 0.5)
    moved = thresholds_for_budget(scores, 0.5, offsets=[1.0, 0.0, -0.5])
    assert kept(scores, moved) == pytest.approx(0.5, abs=1 / 660 + 1e-9)
    assert scores[0].kept_share(moved[0]) < scores[0].kept_share(plain[0])
    assert scores[2].kept_share(moved[2]) > scores[2].kept_share(plain[2])


def test_budget_counts_only_layers_that_eliminate():
    scores = layers()
    thresholds = thresholds_for_budget(scores, 0.4, counted=[0, 2])
    assert kept([scores[0], scores[2]], [thresholds[0], thresholds[2]]) == pytest.approx(
        0.4, abs=1 / 440 + 1e-9
    )
    assert len(thresholds) == 3


def test_budget_at_its_ends():
    scores = layers()
    assert kept(scores, thresholds_for_budget(scores, 1.0)) == 1.0
    # Less than what is fixed: nothing else is kept.
    assert kept(scores, thresholds_for_budget(scores, 0.0)) == pytest.approx(60 / 660)
    equal = [LayerScores(torch.full((10,), 2.0), 0)]
    assert math.isfinite(thresholds_for_budget(equal, 0.5)[0])


def test_bad_scores_and_budgets_are_named():
    with pytest.raises(ValueError, match="keep: expected a share"):
        thresholds_for_budget(layers(), 1.5)
    with pytest.raises(ValueError, match="scores: expected at least one block"):
        LayerScores(torch.zeros(0), 4)
    with pytest.raises(ValueError, match="scores: expected .*finite"):
        LayerScores(torch.tensor([1.0, float("nan")]), 4)


def test_search_finds_a_known_optimum():
    optimum = [1.0, -0.5, 0.25]

    def loss(offsets):
        return 2 + sum((i + 1) * (o - m) ** 2 for i, (o, m) in enumerate(zip(offsets, optimum)))

    result = search(loss, [0.0, 0.0, 0.0], rounds=40)
    assert result.offsets == pytest.approx(optimum, abs=0.05)
    assert result.losses[-1] == pytest.approx(2.0, abs=0.01)
    assert result.losses == sorted(result.losses, reverse=True)
    assert result.losses[-1] == pytest.approx(loss(result.offsets))


def test_search_uses_central_differences_of_the_given_width():
    seen = []

    def loss(offsets):
        seen.append(tuple(offsets))
        return (offsets[0] - 1) ** 2 + offsets[1] ** 2

    result = search(loss, [0.0, 0.0], rounds=1, step=0.25, rate=0.5)
    assert seen[:5] == [(0, 0), (0.25, 0), (-0.25, 0), (0, 0.25), (0, -0.25)]
    # The slopes are exactly -2 and 0, so the steepest one moves by the rate.
    assert result.offsets == [0.5, 0.0]
    assert result.evaluations == len(seen)


def test_search_on_a_staircase_never_ends_worse():
    scores = layers()
    best = [0.4, -0.8, 0.3]

    def loss(offsets):
        thresholds = thresholds_for_budget(scores, 0.5, offsets)
        wanted = thresholds_for_budget(scores, 0.5, best)
        return 1 + sum(
            abs(s.kept_share(a) - s.kept_share(b)) for s, a, b in zip(scores, thresholds, wanted)
        )

    result = search(loss, [0.0] * 3, rounds=20)
    assert result.losses[-1] - 1 < 0.35 * (result.losses[0] - 1)


def test_search_stops_where_nothing_helps():
    flat = search(lambda offsets: 1.0, [0.0, 0.0], rounds=9)
    assert (flat.offsets, flat.losses, flat.evaluations) == ([0.0, 0.0], [1.0], 5)
    sharp = search(lambda offsets: abs(offsets[0]) + 0.01 * offsets[0], [0.0], rounds=9)
    assert sharp.offsets == [0.0]
    assert sharp.losses == [0.0]
    with pytest.raises(ValueError, match="expected a finite loss, got nan"):
        search(lambda offsets: float("nan"), [0.0], rounds=1)
