"""Scorers of answers: the blocks that a training step keeps by words, by heads, by the caller."""

import json
import types
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import lemo
from devices import no_synchronisation
from lemo import ops
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.layers.architectures import architecture_of
from lemo.models.layers.scout import Scout
from lemo.packing.blocks import BlockLayout
from lemo.predictors.model import model_shape
from lemo.relevance.answers import Answers
from lemo.relevance.attention import head_relevance
from lemo.relevance.heads import RetrievalHeads
from lemo.selection.scorers import AttentionScorer, LexicalScorer, RandomScorer
from lemo.selection.scorers.answers import AnswerScorer
from tiny_models import VOCABULARY, flat_config, make_model
from tolerances import assert_close_fp32

BLOCK = 16


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


@pytest.mark.parametrize("begin", ["begin_step", "begin_replica", "begin_pass"])
def test_text_is_drawn_as_by_the_random_scorer(begin):
    ids = prompts([1, 2])["input_ids"]
    batch, residual = architecture_of(make_model("llama")).embed(
        ForwardArguments(input_ids=ids), BLOCK
    )
    batch = replace(batch, labelled=torch.ones(ids.numel(), dtype=torch.bool))
    draws = []
    for scorer in (LexicalScorer(5), RandomScorer(5)):
        getattr(scorer, begin)(3)
        draws.append(scorer(0, "attention", residual, batch))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], RandomScorer(5)(0, "attention", residual, batch))


def test_what_it_needs_is_named():
    model = make_model("llama")
    lemo.enable(model, lemo.LemoConfig(keep=0.5, block_size=BLOCK, scorer="lexical"))
    batch = prompts([1])
    with pytest.raises(ValueError, match="scorer: 'lexical' .* expected the batch's labels"):
        model(batch["input_ids"])
    embedded = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="expected the batch's input_ids, got inputs_embeds"):
        model(inputs_embeds=embedded, labels=batch["labels"])


def test_the_largest_over_the_answers_of_a_sequence_counts():
    """A block that one of many answers needs is kept beside one that all others need."""
    model = make_model("llama")
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.375, block_size=BLOCK, scorer="lexical"))
    batch = prompts([1])
    ids, labels = batch["input_ids"], batch["labels"]
    ids[0, 50:54] = torch.tensor([20, 21, 22, 23])
    ids[0, 116:128] = torch.tensor([5, 6, 20, 21, 22, 23, 5, 6, 7, 8, 5, 6])
    labels[:] = -100
    for first, end in ((118, 122), (124, 126), (127, 128)):
        labels[0, first:end] = ids[0, first:end]
    model(**batch)
    assert handle.statistics()[0].attention_blocks.tolist() == [1, 3, 7]


class Fixed(AnswerScorer):
    """Two answers that need one block each more than the one that both need."""

    def relevance(self, layer, residual, batch, texts, answers):
        assert torch.equal(texts[0], batch.ids[: batch.layout.seqlens[0]].cpu())
        return [
            None if found is None else torch.tensor([[0.6, 0.4, 0], [0, 0.4, 0.6]])
            for found in answers
        ]


def test_what_several_answers_need_is_not_added_up():
    labelled = torch.zeros(112, dtype=torch.bool)
    labelled[64 + 33] = True
    layout = BlockLayout.from_seqlens([64, 48], BLOCK)
    ids = torch.arange(112)
    batch = types.SimpleNamespace(
        ids=ids, labelled=labelled, layout=layout, on_host=lambda: (ids.cpu(), labelled.cpu())
    )
    scores = Fixed("fixed", 0)(0, "attention", torch.zeros(1), batch)
    drawn = RandomScorer(0)(0, "attention", torch.zeros(1), batch)
    assert torch.equal(scores, torch.cat([drawn[:4], torch.tensor([0.6, 0.4, 0.6])]))


def test_defaults_follow_the_batch():
    """Blocks of 64 tokens that the answer needs, or quarters at random where most has labels."""
    model = make_model("llama", max_position_embeddings=1024)
    handle = lemo.enable(model, lemo.LemoConfig(keep_tokens=0))
    assert handle.block_size == 0.25
    batch = prompts([20], tokens=1024)
    model(**batch).loss.backward()
    assert handle.block_size == 64
    # Block 20 of 16 tokens lies in block 5 of 64; a quarter of 16 blocks is four.
    kept = handle.statistics()[0].attention_blocks.tolist()
    assert len(kept) == 4
    assert {5, 15} <= {*kept}
    handle.set_progress(0.5)
    handle.begin_step(7, 10)
    batch["labels"] = batch["input_ids"]
    draws = set()
    for _ in range(12):
        model(**batch)
        assert handle.block_size == 0.25
        draws.add(tuple(handle.statistics()[0].attention_blocks.tolist()))
    assert {len(draw) for draw in draws} == {2}
    assert len(draws) > 1


def test_padding_does_not_turn_text_into_answers():
    model = make_model("llama", max_position_embeddings=256)
    handle = lemo.enable(model)
    batch = prompts([2], tokens=256)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :160] = 0
    batch["labels"] = batch["input_ids"].where(mask.bool(), -100)
    model(**batch, attention_mask=mask)
    assert handle.block_size == 0.25


def given(scores, **settings):
    """The blocks that a step keeps by the scores of tokens."""
    model = make_model("llama")
    handle = lemo.enable(
        model, lemo.LemoConfig(block_size=BLOCK, scorer="given", keep_last=0, **settings)
    )
    batch = prompts([1, 1])
    batch["labels"] = batch["input_ids"]
    with handle.scored(scores):
        model(**batch).loss.backward()
    return handle.statistics()[0].attention_blocks.tolist()


def test_a_block_has_the_largest_of_the_scores_that_the_caller_gives():
    scores = torch.zeros(2, 128)
    scores[0, 37] = 1.0
    scores[0, 40] = -9.0
    scores[1] = torch.arange(128) % 16 / 100
    scores[1, 15], scores[1, 127] = 3, 2
    assert given(scores, keep=0.25) == [0, 2, 8, 15]


def test_scores_of_padding_are_not_read():
    model = make_model("llama")
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.25, block_size=BLOCK, scorer="given"))
    batch = prompts([1, 1])
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :64] = 0
    scores = torch.zeros(2, 128)
    scores[0, :64], scores[0, 70], scores[1, 5] = 7.0, 1.0, 1.0
    with handle.scored(scores):
        model(**batch, attention_mask=mask)
    assert handle.statistics()[0].attention_blocks.tolist() == [0, 3, 4, 11]


def test_given_scores_are_asked_for_and_have_to_fit():
    model = make_model("llama")
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.25, block_size=BLOCK, scorer="given"))
    batch = prompts([1])
    with pytest.raises(ValueError, match="scorer: 'given' needs scores of the batch's tokens"):
        model(**batch)
    with pytest.raises(ValueError, match=r"scores: expected \[batch, tokens\], got \[128\]"):
        handle.scored(torch.zeros(128)).__enter__()
    message = r"scores: expected one for each token, \[batch, tokens\] = \[1, 128\], got \[1, 64\]"
    with handle.scored(torch.zeros(1, 64)), pytest.raises(ValueError, match=message):
        model(**batch)


@pytest.mark.parametrize(
    ("wrong", "text"), [(torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf"), (1e39, "inf")]
)
def test_given_scores_have_to_be_finite(wrong, text):
    model = make_model("llama")
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.25, block_size=BLOCK, scorer="given"))
    scores = torch.zeros(1, 128, dtype=torch.float64)
    scores[0, 40] = wrong
    with pytest.raises(ValueError, match=f"scores: expected finite numbers in fp32, got {text}$"):
        handle.scored(scores).__enter__()


def test_shares_are_taken_of_scores_of_at_least_0():
    model = make_model("llama")
    settings = {"block_size": BLOCK, "scorer": "given"}
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.25, keep_relevance=0.5, **settings))
    scores = torch.zeros(1, 128)
    scores[0, 40] = -0.5
    message = "scores: expected numbers of at least 0 with keep_relevance, .* got -0.5$"
    with pytest.raises(ValueError, match=message):
        handle.scored(scores).__enter__()
    with handle.scored(-scores):
        model(**prompts([1]))


def heads_file(tmp_path, heads=((1, 0), (1, 2), (2, 1)), model=None):
    model = make_model("llama") if model is None else model
    path = tmp_path / "heads.json"
    RetrievalHeads(model_shape(model.config), tuple(heads)).save(path)
    return path


@pytest.mark.parametrize("scorer", ["random", "lexical", "attention"])
def test_draws_follow_the_seed_of_the_settings(scorer, tmp_path):
    heads = {"heads": str(heads_file(tmp_path))} if scorer == "attention" else {}
    batch = prompts([1, 2, 3, 4])
    batch["labels"] = batch["input_ids"]
    kept = []
    for seed in (1, 1, 2):
        model = make_model("llama")
        config = {"keep": 0.5, "keep_last": 0, "block_size": BLOCK, "scorer": scorer, "seed": seed}
        handle = lemo.enable(model, lemo.LemoConfig(**config, **heads))
        model(**batch)
        kept.append(handle.statistics()[0].attention_blocks.tolist())
    assert kept[0] == kept[1] != kept[2]


def test_heads_come_by_layer():
    layers = RetrievalHeads({}, ((2, 1), (0, 3), (2, 0))).by_layer()
    assert list(layers.items()) == [(0, [3]), (2, [0, 1])]


def test_heads_are_read_as_they_were_written(tmp_path):
    shape = model_shape(make_model("llama").config)
    heads = RetrievalHeads(shape, ((2, 1), (0, 3)), {"count": 2})
    heads.save(tmp_path / "heads.json")
    assert RetrievalHeads.load(tmp_path / "heads.json", shape) == heads
    content = (tmp_path / "heads.json").read_text()
    changed = json.loads(content)
    changed["heads"][1][1] = 2
    (tmp_path / "heads.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="heads: .*json: these are not the heads that were writt"):
        RetrievalHeads.load(tmp_path / "heads.json", shape)
    del changed["digest"]  # as earlier files, and those that somebody writes
    (tmp_path / "heads.json").write_text(json.dumps(changed))
    assert RetrievalHeads.load(tmp_path / "heads.json", shape).heads == ((2, 1), (0, 2))
    (tmp_path / "heads.json").write_text(content.replace('"version"', '"other"'))
    with pytest.raises(ValueError, match="expected version 1, got None"):
        RetrievalHeads.load(tmp_path / "heads.json", shape)


def test_text_costs_no_pass_of_the_first_layers():
    heads = RetrievalHeads({}, ((0, 1),))
    scorer = AttentionScorer(heads, None, lambda *arguments: pytest.fail("scouted"), 0)
    assert scorer.relevance(0, torch.zeros(0), None, [torch.zeros(9)], [None]) == [None]


@pytest.mark.cpu_only
def test_heads_in_front_of_the_layer_that_scores_are_refused(tmp_path):
    def step(*heads):
        model = make_model("llama")
        config = {"keep": 0.5, "block_size": BLOCK, "scorer": "attention"}
        config |= {"heads": str(heads_file(tmp_path, heads)), "dense_layers": [0]}
        lemo.enable(model, flat_config(**config))
        model(**prompts([1]))

    step((1, 0))
    for heads in (((0, 1),), ((0, 1), (2, 0))):
        with pytest.raises(ValueError, match="heads: expected them in layer 1 or behind.* layer 0"):
            step(*heads)


@pytest.mark.cpu_only
def test_heads_look_at_their_own_sequence_alone():
    """Packed between others, with and without answers, each has what it has alone."""
    lengths, size = [40, 24, 56, 33], 8
    labelled = [torch.arange(n) % 21 == 19 for n in lengths]
    answers = [Answers.of(rows) for rows in labelled]
    answers[1] = None
    q, k = torch.randn(2, sum(lengths), 3, 16)
    layout = BlockLayout.from_seqlens(lengths, size)
    packed = head_relevance(q, k, layout, answers, 0.3)
    parts = zip(packed, q.split(lengths), k.split(lengths), lengths, answers, strict=True)
    for found, q_alone, k_alone, length, mine in parts:
        alone = BlockLayout.from_seqlens([length], size)
        [expected] = head_relevance(q_alone, k_alone, alone, [mine], 0.3)
        assert (found is None) == (expected is None) == (mine is None)
        if mine is not None:
            assert_close_fp32(found, expected)


@pytest.mark.cpu_only  # in fp32, which attention on a GPU does not know
def test_heads_are_scored_by_the_models_own_attention(tmp_path):
    """Against the weights that Transformers' eager attention gives."""
    model = make_model("llama", dtype=torch.float32)
    model.set_attn_implementation("eager")
    batch = prompts([1])
    ids, labelled = batch["input_ids"], torch.zeros(1, 128, dtype=torch.bool)
    labelled[0, 123:127] = True
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    heads = RetrievalHeads(model_shape(model.config), ((1, 0), (1, 2), (2, 1)))
    architecture = architecture_of(model)
    scorer = AttentionScorer(heads, architecture, Scout(architecture), 0)
    blocked, residual = architecture.embed(ForwardArguments(input_ids=ids), BLOCK)
    blocked = replace(blocked, labelled=labelled[0])
    with torch.no_grad():
        scores = scorer(0, "attention", residual, blocked)
    looked_at = []
    for layer, head in heads.heads:
        largest = weights[layer][0, head, 123:127].unflatten(-1, (-1, BLOCK)).amax((0, -1))
        largest[7] = 0
        looked_at.append(largest / largest.sum())
    words = ops.word_relevance(ids[0], [123], [127], BLOCK)[0]
    assert_close_fp32(scores, torch.maximum(torch.stack(looked_at).mean(0), words))


@pytest.mark.cpu_only  # in fp32, which attention on a GPU does not know
def test_a_training_step_scouts_without_a_trace(tmp_path):
    """Losses of given scores equal to those of the scout, also with dropout in the adapter."""
    model = make_model("llama", dtype=torch.float32)
    path = heads_file(tmp_path)
    batch = prompts([1, 4, 2])
    config = lemo.LemoConfig(keep=0.25, block_size=BLOCK, scorer="attention", heads=str(path))
    handle = lemo.enable(model, config)
    loss = model(**batch).loss
    loss.backward()
    blocks = handle.statistics()[0].attention_blocks
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    handle.remove()
    model.zero_grad()
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.25, block_size=BLOCK, scorer="given"))
    scores = torch.zeros(3 * 8)
    scores[blocks] = 1.0
    with handle.scored(scores.reshape(3, 8).repeat_interleave(BLOCK, 1)):
        again = model(**batch).loss
    again.backward()
    assert torch.equal(loss, again)
    assert torch.equal(gradient, model.model.layers[0].self_attn.q_proj.weight.grad)


def test_files_of_heads_that_do_not_fit_are_named(tmp_path):
    def enable(path):
        config = lemo.LemoConfig(scorer="attention", heads=str(path), block_size=BLOCK)
        return lemo.enable(make_model("llama"), config)

    with pytest.raises(ValueError, match="heads: scorer 'attention' needs the file"):
        lemo.LemoConfig(scorer="attention")
    with pytest.raises(FileNotFoundError, match=r"heads: .*none\.json: expected a file"):
        enable(tmp_path / "none.json")
    with pytest.raises(ValueError, match=f"heads: {tmp_path}: expected a file, got a folder"):
        enable(tmp_path)
    other, sizes = tmp_path / "other.json", make_model("llama").config
    layers, of_layer = sizes.num_hidden_layers, sizes.num_attention_heads
    for content, message in (
        ("{", "expected JSON, got "),
        ("[" * 100_000, "expected JSON, got "),
        ('{"format": "lemo-heads", "version": 1, "model": [1]}', "but these differ: model_type"),
        ("[]", "expected a file of `lemo relevance heads`"),
        (heads_file(tmp_path).read_text().replace('"version": 1', '"version": 9'), "version 1"),
        *(
            (heads_file(tmp_path, heads).read_text(), r"\[layer, head\] pairs below")
            for heads in (
                *(
                    [(layers, 0)],
                    [(0, of_layer)],
                    [(-1, 0)],
                    [(0, -1)],
                    [(0, 0.5)],
                    [(0, True)],
                    [],
                ),
                *([(0, 0, 0)], [(0,)]),
            )
        ),
        (heads_file(tmp_path, model=make_model("qwen2")).read_text(), "differ: model_type"),
    ):
        other.write_text(content)
        with pytest.raises(ValueError, match=rf"heads: .*other\.json: .*{message}"):
            enable(other)


def test_as_many_blocks_are_kept_as_hold_the_relevance():
    """Two sequences: in one a single block holds nearly everything, in the other ten share it."""
    scores = torch.zeros(2, 256)
    scores[0, 5 * BLOCK], scores[0, 9 * BLOCK] = 0.9, 0.1
    scores[1, : 10 * BLOCK] = 0.1

    def kept(**settings):
        model = make_model("llama", max_position_embeddings=256)
        config = lemo.LemoConfig(block_size=BLOCK, scorer="given", keep_last=0, **settings)
        handle = lemo.enable(model, config)
        batch = prompts([1, 1], tokens=256)
        with handle.scored(scores):
            model(**batch).loss.backward()
        blocks = handle.statistics()[0].attention_blocks.tolist()
        return [b for b in blocks if b < 16], [b - 16 for b in blocks if b >= 16]

    # The last block has labels.
    assert kept(keep=0.5) == ([0, 1, 2, 3, 4, 5, 9, 15], [*range(7), 15])
    assert kept(keep=0.5, keep_relevance=0.85) == ([5, 15], [*range(7), 15])
    assert kept(keep=0.75, keep_relevance=0.85) == ([5, 15], [*range(9), 15])
    assert kept(keep=0.75, keep_relevance=0.95) == ([5, 9, 15], [*range(10), 15])
    assert kept(keep=0.5, keep_relevance=0.25) == ([5, 15], [0, 1, 2, 15])
    # Not 0.3: three tenths add up to it or not, as they are rounded.
    assert kept(keep=0.5, keep_relevance=0.29, keep_least=0.25) == ([0, 5, 9, 15], [0, 1, 2, 15])


def test_without_relevance_blocks_with_labels_are_kept():
    model = make_model("llama")
    settings = {"block_size": BLOCK, "scorer": "given", "keep_last": 0}
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.5, keep_relevance=0.9, **settings))
    with handle.scored(torch.zeros(1, 128)):
        model(**prompts([1])).loss.backward()
    assert handle.statistics()[0].attention_blocks.tolist() == [7]


def test_labels_do_not_push_out_the_prompt():
    """An answer of 6 of 16 blocks, of which a quarter is kept: all of it, and two of the prompt."""
    model = make_model("llama", max_position_embeddings=256)
    settings = {"block_size": BLOCK, "scorer": "given", "keep_last": 0}
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.25, **settings))
    batch = prompts([1], tokens=256)
    batch["labels"][0, 160:] = batch["input_ids"][0, 160:]
    scores = torch.zeros(1, 256)
    scores[0, 3 * BLOCK], scores[0, 7 * BLOCK] = 0.5, 0.4
    with handle.scored(scores):
        model(**batch).loss.backward()
    # Row 159, in block 9, predicts the first label.
    assert handle.statistics()[0].attention_blocks.tolist() == [3, 7, *range(9, 16)]


def test_a_short_prompt_is_kept_whole_by_default():
    model = make_model("llama", max_position_embeddings=2048)
    handle = lemo.enable(model)
    short, long = prompts([20], tokens=960), prompts([20], tokens=2048)
    model(**short).loss.backward()
    assert handle.statistics()[0].attention_blocks is None
    model(**long).loss.backward()
    assert handle.statistics()[0].attention_blocks.numel() == 1024 // 64 + 1


def test_tokens_on_the_host_are_read_there():
    """Those of other facts are given, so that the kept blocks tell which ones were read."""
    batch, others = prompts([1, 5]), prompts([3, 2])["input_ids"].cpu()
    found = []
    for padded, given in ((False, None), (False, others), (True, others)):
        model = make_model("llama", max_position_embeddings=128)
        config = {"keep": 0.25, "keep_last": 0, "scorer": "lexical", "block_size": BLOCK}
        handle = lemo.enable(model, lemo.LemoConfig(**config))
        mask = torch.ones_like(batch["input_ids"])
        if padded:
            mask[0, :BLOCK] = 0
        # Labels that are on a GPU have to be read back anyway.
        call = {
            **batch,
            "labels": batch["labels"].cpu(),
            "attention_mask": mask if padded else None,
        }
        with nullcontext() if given is None else handle.on_host(given):
            model(**call).loss.backward()
        found.append(handle.statistics()[0].attention_blocks.tolist())
    assert {1, 7, 8 + 5, 8 + 7} <= set(found[0])
    assert {3, 7, 8 + 2, 8 + 7} <= set(found[1])
    assert not {1, 8 + 5} & set(found[1])
    # Where tokens are padding the model's own are read.
    assert 7 + 5 in found[2]


@pytest.mark.gpu_only
@pytest.mark.parametrize("scorer", ["lexical", "attention"])
def test_answers_are_scored_without_waiting_for_the_gpu(scorer, tmp_path, monkeypatch):
    """Words are looked for on the host while the GPU runs the first layers."""
    score, called = AnswerScorer.__call__, []

    def checked(self, *arguments):
        with no_synchronisation():
            called.append(self)
            return score(self, *arguments)

    monkeypatch.setattr(AnswerScorer, "__call__", checked)
    heads = {"heads": str(heads_file(tmp_path))} if scorer == "attention" else {}
    model = make_model("llama", max_position_embeddings=128)
    config = {"keep": 0.25, "scorer": scorer, "block_size": BLOCK, **heads}
    handle = lemo.enable(model, lemo.LemoConfig(**config))
    batch = prompts([1, 5])
    with handle.on_host(batch["input_ids"].cpu()):
        model(batch["input_ids"], labels=batch["labels"].cpu()).loss.backward()
    assert called


@pytest.mark.gpu_only
@pytest.mark.parametrize("scorer", ["lexical", "attention"])
def test_a_pass_with_answers_never_waits_for_the_gpu(scorer, tmp_path):
    """So the host issues a pass while the GPU runs the one before."""
    heads = {"heads": str(heads_file(tmp_path))} if scorer == "attention" else {}
    model = make_model("llama", max_position_embeddings=128)
    config = {"keep": 0.25, "scorer": scorer, "block_size": BLOCK, **heads}
    handle = lemo.enable(model, lemo.LemoConfig(**config))
    batch = prompts([1, 5])
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    for step in range(4):
        # The first pass counts labels, the second one captures.
        issued = no_synchronisation() if step > 1 else nullcontext()
        with handle.on_host(ids), issued:
            model(batch["input_ids"], labels=labels).loss.backward()


def test_tokens_on_the_host_have_to_fit():
    batch = prompts([1])
    model = make_model("llama", max_position_embeddings=128)
    config = {"keep": 0.25, "keep_last": 0, "scorer": "lexical", "block_size": BLOCK}
    handle = lemo.enable(model, lemo.LemoConfig(**config))
    with pytest.raises(ValueError, match=r"input_ids: expected \[batch, tokens\], got"):
        handle.on_host(batch["input_ids"][0]).__enter__()
    wrong = torch.zeros(1, 64, dtype=torch.int64, device="cpu")
    message = r"handle.on_host, .* \[1, 64\], got \[1, 128\]"
    with handle.on_host(wrong), pytest.raises(ValueError, match=message):
        model(batch["input_ids"], labels=batch["labels"].cpu())
