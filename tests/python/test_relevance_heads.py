"""Which heads `lemo relevance heads` chooses from how good each of them is."""

import pytest
import torch

from lemo.preparation.heads import chosen_heads

LAYERS, HEADS = 6, 3


def goodness(**found):
    """[layers, heads]; `l1h2=0.3` is layer 1, head 2; the others find next to nothing."""
    mean = torch.full((LAYERS, HEADS), 0.01)
    for name, value in found.items():
        mean[int(name[1]), int(name[3])] = value
    return mean


@pytest.mark.parametrize(
    ("found", "expected"),
    {
        "the best is early": ({"l1h2": 0.3, "l4h0": 0.29}, ((1, 2),)),
        "an early one is nearly as good": ({"l1h2": 0.29, "l4h0": 0.3}, ((1, 2),)),
        "an early one is not as good": ({"l1h2": 0.28, "l4h0": 0.3}, ((1, 2), (4, 0))),
        "in one layer": ({"l2h1": 0.3, "l2h0": 0.2}, ((2, 0), (2, 1))),
        "the last layer": ({"l5h2": 0.3}, ((5, 2),)),
        "half as good": ({"l1h0": 0.16, "l0h0": 0.14, "l2h1": 0.3}, ((1, 0), (2, 1))),
        "too many": (
            {"l0h0": 0.16, "l1h0": 0.17, "l1h1": 0.18, "l1h2": 0.19, "l2h0": 0.3},
            ((1, 0), (1, 1), (1, 2), (2, 0)),
        ),
    }.values(),
)
def test_the_best_heads_of_few_layers(found, expected):
    assert chosen_heads(goodness(**found), 4) == expected


def test_layers_may_be_said():
    found = goodness(l1h2=0.3, l3h0=0.2, l4h0=0.29)
    assert chosen_heads(found, 4, layers=LAYERS) == ((1, 2), (3, 0), (4, 0))
    assert chosen_heads(found, 2, layers=LAYERS) == ((1, 2), (4, 0))
    assert chosen_heads(found, 4, layers=4) == ((1, 2), (3, 0))
    assert chosen_heads(found, 1, layers=1) == ((0, 0),)
