"""Parts of answers.py: shorter windows, exact answers and recall."""

import math
from types import SimpleNamespace

import pytest
import torch

from answer_chunks import Chunks, targets_of
from answer_runs import Method, Trial, exact_answers, share_of_needed, shares
from answer_tasks import Answer, Window
from lemo.models.projections.fp8 import fp8_of
from tiny_models import make_model

pytestmark = pytest.mark.cpu_only


def tokens_of_window(tokens=256, seed=0):
    """A window whose answer, the last 4 tokens, stands in tokens 54 to 57, too."""
    ids = torch.randint(100, 10_000, (tokens,), generator=torch.Generator().manual_seed(seed))
    ids[54:58] = ids[-4:] = torch.tensor([11, 12, 13, 14])
    labels = torch.full((tokens,), -100)
    labels[-4:] = ids[-4:]
    return ids, labels


@pytest.mark.parametrize("words", [0.0, 0.5])
def test_blocks_by_words_and_random_ones(words):
    windows = [tokens_of_window(seed=seed) for seed in range(40)]
    ids, labels = (torch.stack(each) for each in zip(*windows))
    chunks = Chunks({"keep": 0.25, "block_size": 16, "words": words}, seed=1)
    found = chunks.of(ids, labels)
    assert "bias" not in found
    assert found["ids"].shape == (40, 64)
    assert torch.equal(found["ids"], ids.gather(1, found["positions"]))
    assert torch.equal(found["targets"], targets_of(labels).gather(1, found["positions"]))
    assert (found["positions"].diff() > 0).all()
    # The last block has labels; three more of 15 are kept, two of them by words.
    counts = torch.bincount(torch.tensor(chunks.kept).flatten(), minlength=16)
    assert counts[15] == 40
    assert (counts[3] == 40) == bool(words)
    assert (counts > 0).sum() >= 13


def test_blocks_with_labels_and_the_last_one_are_always_taken():
    """The last block may be ragged; labels take all of the share, or words take the rest."""
    ids = torch.randint(100, 10_000, (1, 250), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[0, 1:3] = ids[0, 1:3]
    for settings, tokens in (({"keep": 0.01}, 26), ({"keep": 0.5, "words": 1.0}, 7 * 16 + 10)):
        chunks = Chunks({"block_size": 16, **settings}, seed=0)
        assert chunks.of(ids, labels)["ids"].shape == (1, tokens)
        [kept] = chunks.kept
        assert {0, 15} <= {*kept}


def test_keys_of_random_blocks_count_for_those_that_are_left_out():
    """The mean of the softmax's sum over draws is the sum over all keys."""
    ids, labels = tokens_of_window()
    chunks = Chunks({"keep": 0.375, "block_size": 16, "words": 0.25, "weights": True}, seed=2)
    logits = torch.randn(256, 256, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    query, sums = 253, []
    for _ in range(3000):
        found = chunks.of(ids[None], labels[None])
        mask = Chunks.mask(found["bias"], found["blocks"], torch.float64)[0, 0]
        [positions] = found["positions"]
        row = int((positions == query).nonzero())
        sums.append((logits[query, positions] + mask[row]).exp().sum())
    expected = logits[query, : query + 1].exp().sum()
    error = torch.stack(sums).std() / math.sqrt(len(sums))
    assert abs(torch.stack(sums).mean() - expected) < 4 * error
    assert error < 0.02 * expected


def test_a_mask_of_weights():
    bias = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]])
    blocks = torch.tensor([[0, 0, 1, 1, 4]])
    inf = math.inf
    assert Chunks.mask(bias, blocks, torch.float32)[0, 0].tolist() == [
        [0.0, -inf, -inf, -inf, -inf],
        [0.0, 0.0, -inf, -inf, -inf],
        [0.0, 0.0, 0.0, -inf, -inf],
        [0.0, 0.0, 0.0, 0.0, -inf],
        [0.0, 0.0, 2.0, 2.0, 0.0],
    ]


# --- what a run measures


def window(ids, *found):
    made = torch.tensor(ids)
    labels = torch.full_like(made, -100)
    for answer in found:
        labels[answer.start : answer.end] = made[answer.start : answer.end]
    return Window("task", made, labels, found)


class Wrong(torch.nn.Module):
    """Puts the next token first, but for the tokens at some places."""

    device = torch.device("cpu")

    def __init__(self, ids, places):
        super().__init__()
        self.predicted = torch.tensor([*ids[1:], 0])
        for place in places:
            self.predicted[place - 1] += 1

    def forward(self, input_ids, use_cache, logits_to_keep):
        assert not self.training
        rows = torch.nn.functional.one_hot(self.predicted, 99)[-logits_to_keep:]
        return SimpleNamespace(logits=rows[None].float())


def test_an_answer_is_exact_if_every_token_of_it_is():
    ids = list(range(20))
    found = (
        Answer(8, 11, ((1, 3),), 0.05),
        Answer(13, 15, ((6, 7),), 0.3),
        Answer(17, 20, (), None),
    )
    for wrong, exact in [
        ((), [True, True, True]),
        ((10, 17), [False, True, False]),
        ((8, 14, 19), [False, False, False]),
        ((7, 11, 12, 15, 16), [True, True, True]),  # no answer's token
    ]:
        model = Wrong(ids, wrong).train()
        answers_found = exact_answers(model, [window(ids, *found)])
        assert [answer["exact"] for answer in answers_found] == exact
        assert model.training
    shown = shares(exact_answers(Wrong(ids, (10,)), [window(ids, *found)]))
    assert shown == {
        "exact": 66.67,
        "answers": 3,
        "depth": {"0": 0.0, "1": 100.0},
        "not_stated": 100.0,
    }


def test_recall_counts_blocks_with_needed_tokens():
    made = window(range(40), Answer(30, 32, ((7, 9), (9, 12)), 0.2), Answer(35, 37, (), None))
    assert share_of_needed(made, 4, [0, 1, 9]) == 0.5  # of blocks 1 and 2
    assert share_of_needed(made, 4, [2, 1]) == 1.0
    assert share_of_needed(made, 8, [1]) == 0.5
    assert share_of_needed(window(range(40), Answer(35, 37, (), None)), 4, [1]) is None


def test_layers_that_stay_in_their_dtype():
    base = make_model("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    elimination = {"keep": 1.0, "products": "fp8"}
    found = {}
    for layers in ((), ("v_proj", "o_proj")):
        method = Method("m", elimination, in_dtype=layers)
        model = Trial(base, method, 4, 0, "cpu").model
        names = [
            name.split(".")[-2]
            for name, module in model.named_modules()
            if name.endswith("base_layer") and fp8_of(module) is not None
        ]
        found[layers] = {name: names.count(name) for name in names}
    # Queries, keys and the last layer's MLP are never in 8 bits.
    mlps = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2)
    assert found[()] == mlps | {"v_proj": 3, "o_proj": 3}
    assert found["v_proj", "o_proj"] == mlps
