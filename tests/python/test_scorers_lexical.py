"""Lexical scores: against sets of words, and the blocks that a training step keeps by them."""

import math
import random

import pytest
import torch

import lemo
import lemo.packing.blocks
from lemo.selection.scorers import LexicalScorer
from lemo.selection.scorers.lexical import lexical_scores
from tiny_models import VOCABULARY, make_model
from tolerances import assert_close_fp32

BLOCK = 16


def by_sets(ids, answers, block_size):
    """The same scores from Python's sets; `answers` are (first, end) of tokens with labels."""
    count = -(-len(ids) // block_size)
    blocks = [set(ids[i * block_size : (i + 1) * block_size]) for i in range(count)]
    with_labels = {(t - 1) // block_size for a, b in answers for t in range(a, b)}
    best = [0.0] * count
    for first, end in answers:
        words = set(ids[max(first - 8, 0) : end])
        scores = [
            sum(math.log(count / sum(w in other for other in blocks)) for w in words & block)
            for block in blocks
        ]
        total = sum(score for n, score in enumerate(scores) if n not in with_labels)
        if total > 0:
            best = [max(old, score / total) for old, score in zip(best, scores)]
    return best


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_sets_of_words(seed):
    draw = random.Random(seed)
    length = draw.randrange(100, 300)
    ids = [draw.randrange(120) for _ in range(length)]
    answers = [(length - 40, length - 35), (length - 20, length - 12), (length - 2, length)]
    labelled = torch.zeros(length, dtype=torch.bool)
    for first, end in answers:
        labelled[first - 1 : end - 1] = True
    scores = lexical_scores(torch.tensor(ids), labelled, BLOCK)
    assert scores.dtype == torch.float32
    assert_close_fp32(scores, torch.tensor(by_sets(ids, answers, BLOCK)))


def test_a_label_on_the_first_tokens_and_a_word_that_is_everywhere():
    ids = torch.full((64,), 7)
    labelled = torch.zeros(64, dtype=torch.bool)
    labelled[0] = True
    assert torch.equal(lexical_scores(ids, labelled, BLOCK), torch.zeros(4))


def prompts(facts, tokens=128):
    """A batch of prompts; the fact in block `facts[n]` of sequence n is what its answer repeats."""
    draw = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(40, VOCABULARY, (len(facts), tokens), generator=draw, device="cpu")
    for row, block in enumerate(facts):
        fact = torch.arange(3, 15)
        ids[row, block * BLOCK + 2 : block * BLOCK + 14] = fact
        ids[row, -12:] = fact
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = ids[:, -4:]
    device = torch.get_default_device()
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def test_a_step_keeps_the_block_that_the_answer_needs():
    model = make_model("llama")
    config = lemo.LemoConfig(keep=0.25, block_size=BLOCK, scorer="lexical")
    handle = lemo.enable(model, config)
    facts = [1, 5, 3]
    model(**prompts(facts)).loss.backward()
    kept = handle.statistics()[0].attention_blocks.tolist()
    assert kept == sorted(8 * n + block for n, fact in enumerate(facts) for block in (fact, 7))


def test_text_is_scored_at_random_and_repeats_with_the_step():
    model = make_model("llama")
    config = lemo.LemoConfig(keep=0.5, block_size=BLOCK, scorer="lexical", keep_last=0)
    handle = lemo.enable(model, config)
    batch = prompts([1])
    batch["labels"] = batch["input_ids"]

    def kept(step):
        handle.begin_step(step, 50)
        model(**batch)
        return tuple(handle.statistics()[0].attention_blocks.tolist())

    draws = [kept(step) for step in range(20)]
    assert len({*draws}) > 3
    assert draws == [kept(step) for step in range(20)]


def test_what_it_needs_is_named():
    model = make_model("llama")
    lemo.enable(model, lemo.LemoConfig(keep=0.5, block_size=BLOCK, scorer="lexical"))
    batch = prompts([1])
    with pytest.raises(ValueError, match="scorer: 'lexical' needs the batch's labels, which are"):
        model(batch["input_ids"])
    embedded = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="scorer: 'lexical' needs the batch's input_ids"):
        model(inputs_embeds=embedded, labels=batch["labels"])


def test_all_layers_get_the_same_scores():
    class Rows:
        pass

    batch = Rows()
    batch.layout = lemo.packing.blocks.BlockLayout.from_seqlens([64, 64], BLOCK)
    batch.ids = torch.arange(128)
    batch.labelled = torch.zeros(128, dtype=torch.bool)
    batch.labelled[[60, 61, 120]] = True
    scorer, x = LexicalScorer(0), torch.zeros(128, 8)
    first, second = (
        scorer(layer, kind, x, batch) for layer, kind in ((0, "attention"), (3, "mlp"))
    )
    assert torch.equal(first, second)
