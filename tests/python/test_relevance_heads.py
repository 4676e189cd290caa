"""How good `lemo relevance heads` finds each head, and which it chooses."""

import pytest
import torch

from lemo.preparation.heads import chosen_heads, find_heads, find_heads_in_documents
from lemo.relevance.needles import NeedleWindow
from lemo.settings.relevance import HeadsConfig
from tiny import save_tiny_llama, write_documents
from tiny_models import VOCABULARY, make_model
from tolerances import assert_close_fp32

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


BLOCK, TOKENS = 16, 128


def window(seed):
    """Facts of one block, to its end, and of the ends of two; answers of four and of two tokens."""
    draw = torch.Generator("cpu").manual_seed(seed)
    labelled = torch.zeros(TOKENS, dtype=torch.bool)
    labelled[105:109] = labelled[124:126] = True
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    return NeedleWindow(ids, labelled, ((16, 32), (45, 50)))


@pytest.mark.cpu_only  # in fp32, which attention on a GPU does not know
def test_a_head_is_as_good_as_its_share_of_looks_at_facts():
    """Against the weights that Transformers' eager attention gives."""
    model = make_model("llama", dtype=torch.float32)
    windows, shares = [window(0), window(1)], []
    for each in windows:
        with torch.no_grad():
            weights = torch.cat(model(each.ids[None], output_attentions=True).attentions)
        for rows, needed in ((slice(105, 109), [1]), (slice(124, 126), [2, 3])):
            largest = weights[:, :, rows].unflatten(-1, (-1, BLOCK)).amax((2, 4))
            largest[..., [6, 7]] = 0  # with labels
            shares.append(largest[..., needed].sum(-1) / largest.sum(-1))
    expected = torch.stack(shares).mean(0)
    layers, heads = expected.shape
    found = find_heads(model, windows, BLOCK, count=layers * heads, layers=layers)
    assert found.heads == chosen_heads(expected, layers * heads, layers)
    for layer, head in found.heads:
        share = torch.tensor(found.found_by["share_of_looks"][f"{layer}.{head}"])
        assert_close_fp32(share, (1e4 * expected[layer, head]).round() / 1e4)


@pytest.mark.cpu_only
def test_looks_that_are_not_finite_are_refused():
    model = make_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[window(0).ids[20], 0] = torch.nan
    with pytest.raises(ValueError, match="model: what its heads look at is not finite"):
        find_heads(model, [window(0)], BLOCK)


@pytest.mark.cpu_only
def test_the_model_has_the_layers_that_are_asked_for(tmp_path):
    places = {"model": str(save_tiny_llama(tmp_path / "m")), "output": str(tmp_path / "heads.json")}
    documents = write_documents(tmp_path / "d.jsonl")
    config = HeadsConfig(**places, documents=str(documents), layers=3)
    with pytest.raises(ValueError, match="layers: expected at most the model's 2, got 3"):
        find_heads_in_documents(config)
