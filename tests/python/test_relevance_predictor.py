"""The predictor of relevance: its scores, what it learns, its folder, the scorer, the command."""

import json
import math
import types

import pytest
import torch

import lemo
from lemo import predictors
from lemo.cli.main import main
from lemo.packing.blocks import BlockLayout
from lemo.predictors import storage
from lemo.predictors.model import model_description, model_shape
from lemo.predictors.relevance import EMBEDDING, REACH, RelevancePredictor, query_rows
from lemo.preparation.documents import _examples
from lemo.preparation.relevance import (
    RelevanceWindow,
    _held,
    _Lesson,
    _scores,
    prepare_relevance,
)
from lemo.relevance.answers import Answers
from lemo.relevance.heads import RetrievalHeads
from lemo.selection.scorers.relevance import RelevanceScorer, merged, predicted_relevance
from lemo.settings.preparation import PredictorSettings, PrepareConfig
from lemo.training.model import load_config
from tiny import save_tiny_llama
from tiny_models import VOCABULARY, make_model
from tolerances import assert_close_fp32

pytestmark = pytest.mark.cpu_only

BLOCK, BLOCKS, FACT = 16, 12, 8
TOKENS = BLOCK * BLOCKS
SETTINGS = PredictorSettings(
    target="relevance",
    block_size=BLOCK,
    keep=0.25,
    rank=32,
    steps=250,
    windows_per_step=8,
    learning_rate=2e-2,
    prune_every=40,
)


def window(seed, known=True):
    """A prompt whose answers say in one half of the vocabulary what a fact says in the other half:
    token t for token t + half. Nothing is repeated, so words find nothing."""
    half = VOCABULARY // 2
    draw = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(half, VOCABULARY, (TOKENS,), generator=draw)
    labelled = torch.zeros(TOKENS, dtype=torch.bool)
    needed = []
    for answer, block in enumerate(torch.randperm(BLOCKS - 2, generator=draw)[:2].tolist()):
        first, start = block * BLOCK + 3, TOKENS - 20 + answer * 10
        ids[start : start + FACT] = ids[first : first + FACT] - half
        labelled[start - 1 : start + FACT - 1] = True
        needed.append(((first, first + FACT),))
    return RelevanceWindow("reworded", ids, labelled, tuple(needed) if known else None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, folder, description) of one preparation."""
    folder = tmp_path_factory.mktemp("prepared") / "relevance"
    model = make_model("llama")
    training = [window(seed) for seed in range(1000)]
    held_out = [window(seed) for seed in range(2000, 2012)]
    return model, folder, prepare_relevance(model, training, held_out, folder, SETTINGS)


def naive(predictor, x, answers, size=BLOCK):
    """Token by token."""

    def net(name, token):
        maps = getattr(predictor, name)
        hidden = torch.relu(maps.down @ (token * predictor.scale))
        return maps.up @ torch.relu(maps.mid @ hidden)

    def mixed(name, place):
        weights = getattr(predictor, f"{name}_mix")
        result = torch.zeros(EMBEDDING)
        for offset in range(-REACH, REACH + 1):
            if 0 <= place + offset < len(x):
                result += weights[offset + REACH] * net(name, x[place + offset])
        return result

    keys = [mixed("key", place) for place in range(len(x))]
    keys = [key / key.norm() for key in keys]
    result = torch.zeros(len(answers), -(-len(x) // size))
    with_labels = {row // size for row in answers.rows()}
    for answer, (first, end) in enumerate(zip(answers.firsts, answers.ends)):
        scores = {}
        for block in range(first // size):
            if block in with_labels:
                continue
            scores[block] = 0.0
            for row in range(max(first - 15, 0), min(end, len(x) - 1) + 1):
                query = mixed("query", row)
                places = range(block * size, (block + 1) * size)
                scores[block] += max(float(query @ keys[place]) for place in places)
        scale = 0.25
        total = torch.logsumexp(torch.tensor([scale * score for score in scores.values()]), 0)
        for block, score in scores.items():
            result[answer, block] = math.exp(scale * score - total)
    return result


@torch.no_grad()
def test_scores_are_sums_of_the_best_products_of_each_block():
    draw = torch.Generator("cpu").manual_seed(0)
    predictor = RelevancePredictor(12, 8, torch.rand(12, generator=draw), draw)
    predictor.query_mix.add_(0.1 * torch.randn(predictor.query_mix.shape, generator=draw))
    x = torch.randn(6 * BLOCK + 5, 12, generator=draw)
    labelled = torch.zeros(len(x), dtype=torch.bool)
    # One answer asks from the first tokens on, one is in the middle, and the last token of one is
    # the last of the sequence.
    labelled[16:18] = labelled[36:40] = labelled[-4:-1] = True
    answers = Answers.of(labelled)
    layout = BlockLayout.from_seqlens([len(x)], BLOCK)
    [found] = predicted_relevance(predictor, x, layout, [answers])
    assert_close_fp32(found, naive(predictor, x, answers))
    # Packed behind and before others nothing changes.
    others = torch.randn(40, 12, generator=draw)
    layout = BlockLayout.from_seqlens([40, len(x), 40, len(x)], BLOCK)
    packed = torch.cat([others, x, others, x])
    results = predicted_relevance(predictor, packed, layout, [None, answers, None, answers])
    assert results[0] is results[2] is None
    for result in results[1::2]:
        assert_close_fp32(result, found)
    # Nor where tokens at the begin of the sequence look, whose neighbours are another's.
    results = [
        predicted_relevance(predictor, rows, BlockLayout.from_seqlens(lengths, 4), of_each)[-1]
        for rows, lengths, of_each in (
            (x, [len(x)], [answers]),
            (packed[: 40 + len(x)], [40, len(x)], [None, answers]),
        )
    ]
    assert_close_fp32(*results)
    assert_close_fp32(results[0], naive(predictor, x, answers, 4))
    # What is trained is what runs.
    free = found > 0
    trained = _scores(predictor, x, answers, BLOCK).masked_fill(~free, -torch.inf).softmax(-1)
    assert_close_fp32(found, trained)


def test_tokens_that_look_are_those_of_the_answer_and_of_its_question():
    answers = Answers((5, 60), (8, 63))
    rows, of_rows = query_rows(answers, 64)
    assert rows == [*range(9), *range(45, 64)]
    assert of_rows == [0] * 9 + [1] * 19
    # The last row of a sequence may have a label, that of labels which are shifted already.
    assert query_rows(Answers((5,), (8,)), 8) == ([*range(8)], [0] * 8)


@torch.no_grad()
def test_nets_begin_nearly_alike():
    """And mix next to nothing of the neighbours in, so that a token fits itself best."""
    draw = torch.Generator("cpu").manual_seed(0)
    predictor = RelevancePredictor(64, 32, torch.ones(64), draw)
    for mine, other in zip(predictor.query.weights, predictor.key.weights):
        pairs = torch.stack([mine.flatten(), other.flatten()])
        assert torch.corrcoef(pairs)[0, 1].item() == pytest.approx(0.95, abs=0.02)
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05)
    for mix in (predictor.key_mix, predictor.query_mix):
        assert_close_fp32(mix.round(), torch.eye(5)[2][:, None].expand(5, EMBEDDING))
    x = torch.randn(100, 64, generator=draw)
    predictor.centre(x)
    layout = BlockLayout.from_seqlens([100], BLOCK)
    products = predictor.queries(x, range(100), 100 * [(0, 100)]) @ predictor.keys(x, layout).T
    assert (products.argmax(-1) == torch.arange(100)).float().mean() > 0.9


def test_the_best_of_both_scores_come_in_turn():
    predicted = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]])
    words = torch.tensor([[0.0, 0.01, 0.0, 0.0, 0.99]])
    found = merged(predicted, words)
    assert_close_fp32(found, torch.tensor([[1.0, 1 / 2, 1 / 3, 1 / 4, 1.0]]))
    # What a score says nothing of it does not find.
    assert merged(torch.zeros(1, 3), torch.zeros(1, 3)).sum() == 0
    found = merged(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3))
    assert_close_fp32(found, torch.tensor([[0.0, 0.0, 1.0]]))


@torch.no_grad()
def test_an_answer_needs_nothing_behind_it_and_the_first_nothing_at_all():
    draw = torch.Generator("cpu").manual_seed(0)
    predictor = RelevancePredictor(12, 8, torch.rand(12, generator=draw), draw)
    ids = torch.arange(100, 100 + 6 * BLOCK)
    labelled = torch.zeros(len(ids), dtype=torch.bool)
    # Nothing stands before the first answer. What the second says is in block 1 and behind it.
    labelled[2:4] = labelled[39:43] = True
    ids[20:24] = ids[70:74] = ids[40:44]
    answers = Answers.of(labelled)
    batch = types.SimpleNamespace(layout=BlockLayout.from_seqlens([len(ids)], BLOCK))
    x = torch.randn(len(ids), 12, generator=draw)
    [found] = RelevanceScorer(predictor, 0).relevance(0, x, batch, [ids], [answers])
    assert found.tolist() == [[0.0] * 6, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]


def test_it_learns_what_other_words_say(made):
    recall = made[2]["recall"]["mean"]
    assert recall["most"] == 1.0
    assert recall["words"] < 0.4
    assert recall["predicted"] > 0.85


def test_hidden_units_that_are_never_used_go(made):
    units = made[2]["hidden_units"]
    assert {*units} == {"key", "query"}
    assert all(0 < size <= 32 for sizes in units.values() for size in sizes)


def test_the_folder_gives_back_what_was_measured(made):
    model, folder, _ = made
    loaded = storage.load_relevance(folder, model_config=model.config)
    example = window(2001)
    answers = Answers.of(example.labelled)
    x = model.get_input_embeddings()(example.ids).detach()
    layout = BlockLayout.from_seqlens([len(x)], BLOCK)
    found = predicted_relevance(loaded, x, layout, [answers])[0].amax(0)
    needed = {span[0] // BLOCK for (span,) in example.needed}
    assert needed <= {*found.topk(3).indices.tolist()}
    assert json.loads((folder / "predictor.json").read_text())["parameters"] == sum(
        parameter.numel() for parameter in loaded.parameters()
    )
    digest = storage.content_digest(folder)
    assert digest == storage.content_digest(folder)
    with pytest.raises(ValueError, match="expected scores of sub-blocks, but .* 'relevance'"):
        predictors.load(folder)


def test_a_step_keeps_what_it_predicts(made):
    model, folder, _ = made
    config = lemo.LemoConfig(scorer="predictor", predictor=str(folder), keep=0.5, block_size=BLOCK)
    assert config.finds_answers
    example = window(2002)
    labels = torch.full_like(example.ids, -100)
    predicted = torch.nn.functional.pad(example.labelled, (1, 0))[:-1]
    labels[predicted] = example.ids[predicted]
    handle = lemo.enable(model, config)
    try:
        model(input_ids=example.ids[None], labels=labels[None]).loss.backward()
        kept = handle.statistics()[0].attention_blocks.tolist()
    finally:
        handle.remove()
    assert {span[0] // BLOCK for (span,) in example.needed} <= {*kept}
    assert len(kept) == 6


def test_draws_for_text_follow_the_seed_of_the_settings(made):
    model, folder, _ = made
    ids, kept = window(2002).ids[None], []
    for seed in (1, 1, 2):
        settings = {"scorer": "predictor", "predictor": str(folder), "seed": seed}
        handle = lemo.enable(model, lemo.LemoConfig(keep=0.5, block_size=BLOCK, **settings))
        try:
            model(input_ids=ids, labels=ids)
            kept.append(handle.statistics()[0].attention_blocks.tolist())
        finally:
            handle.remove()
    assert kept[0] == kept[1] != kept[2]


def test_recall_counts_as_many_blocks_as_a_step_keeps():
    """0.07 of 100 blocks, in floating point a little more than 7: six, and that with the label."""
    labelled = torch.zeros(100 * BLOCK, dtype=torch.bool)
    labelled[-2] = True
    answers = Answers.of(labelled)
    scores = torch.arange(100, 0, -1.0)
    settings = PredictorSettings(target="relevance", block_size=BLOCK, keep=0.07)
    for block, held in ((5, 1.0), (6, 0.0)):
        shares = torch.zeros(1, 100)
        shares[0, block] = 1.0
        lesson = _Lesson(RelevanceWindow("a", labelled.long(), labelled), answers, shares)
        assert _held(scores, lesson, settings) == held


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_stays_nan(wrong):
    """Neither a maximum nor a rank makes a number of it."""
    labelled = torch.arange(TOKENS) >= TOKENS - 20
    answers = Answers.of(labelled)
    layout = BlockLayout.from_seqlens([TOKENS], BLOCK, "cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    predictor = RelevancePredictor(16, 8, torch.ones(16), generator)
    x = torch.randn(TOKENS, 16, generator=generator)
    [sound] = predicted_relevance(predictor, x, layout, [answers])
    assert torch.allclose(sound.sum(-1), torch.ones(1))
    x[3, 2] = wrong
    [found] = predicted_relevance(predictor, x, layout, [answers])
    assert found[sound > 0].isnan().all()
    # Nor where a single token that looks is not, as of products that are too large.
    x[3, 2], queries = 0.0, predictor.queries
    predictor.queries = lambda *of: queries(*of).index_fill(0, torch.tensor([2]), wrong)
    [found] = predicted_relevance(predictor, x, layout, [answers])
    assert found[sound > 0].isnan().all()
    ranked = merged(torch.tensor([[0.5, math.nan, 0.0]]), torch.tensor([[0.0, 0.0, 0.2]]))
    assert ranked[0, 1].isnan()
    assert ranked[0, 2] == 1.0


def test_the_sum_of_many_keys_is_no_infinity_in_fp16():
    tokens = 20000
    answers = Answers.of(torch.arange(tokens) >= tokens - 20)
    layout = BlockLayout.from_seqlens([tokens], 1024, "cpu")
    predictor = RelevancePredictor(16, 8, torch.ones(16), torch.Generator("cpu").manual_seed(0))
    with torch.no_grad():
        for net in (predictor.key, predictor.query):
            net.up.abs_()  # features of one sign
    x = torch.randn(tokens, 16, generator=torch.Generator("cpu").manual_seed(0)).half()
    assert predictor.keys(x, layout).float().sum().abs() > torch.finfo(torch.float16).max
    [found] = predicted_relevance(predictor, x, layout, [answers])
    assert torch.allclose(found.sum(-1), torch.ones(1))


def test_what_is_open_follows_answers(made):
    config = lemo.LemoConfig(scorer="predictor", predictor=str(made[1]))
    resolved = config.resolved(answers=True)
    assert (resolved.block_size, resolved.keep, resolved.keep_tokens) == (64, 0.25, 1024)
    assert not lemo.LemoConfig(scorer="predictor", predictor="nowhere").finds_answers


def test_dense_first_layers_are_refused(made):
    model, folder, _ = made
    config = lemo.LemoConfig(
        scorer="predictor",
        predictor=str(folder),
        keep=0.25,
        block_size=BLOCK,
        layerwise={"dense_layers": [0]},
    )
    example = window(0)
    labels = example.ids.clone()
    labels[: TOKENS - 20] = -100
    handle = lemo.enable(model, config)
    try:
        with pytest.raises(ValueError, match="one of relevance reads what enters layer 0"):
            model(input_ids=example.ids[None], labels=labels[None])
    finally:
        handle.remove()


def test_heads_teach_where_nobody_knows(tmp_path):
    model = make_model("llama")
    training = [window(seed, known=False) for seed in range(3)]
    with pytest.raises(ValueError, match="heads: expected retrieval heads, because windows of"):
        prepare_relevance(model, training, training, tmp_path / "none", SETTINGS)
    assert not (tmp_path / "none").exists()
    heads = RetrievalHeads(model_shape(model.config), ((0, 1), (1, 0)))
    settings = PredictorSettings(**SETTINGS.to_dict() | {"steps": 4, "rank": 8})
    description = prepare_relevance(
        model, training, training, tmp_path / "some", settings, heads=heads
    )
    assert description["windows"] == {"training": 3, "held_out": 3}
    held = description["recall"]["mean"]
    assert 0 < held["predicted"] <= held["most"] + 1e-6


def test_heads_of_another_model_teach_with_a_warning(tmp_path, caplog):
    settings = PredictorSettings(**SETTINGS.to_dict() | {"steps": 1, "rank": 8})
    training = [window(seed, known=False) for seed in range(3)]
    for seed, warned in ((0, False), (1, True)):
        other, model = make_model("llama", seed=seed), make_model("llama")
        shape = model_description(other.config, other.get_input_embeddings().weight)
        heads = RetrievalHeads(shape, ((0, 1), (1, 0)))
        folder = tmp_path / f"{seed}"
        prepare_relevance(model, training, training, folder, settings, heads=heads)
        assert ("heads: made for another model of this shape" in caplog.text) == warned


def test_heads_that_look_at_nothing_finite_teach_nothing(tmp_path):
    """They were taken for answers that need nothing, and the others alone were learned from."""
    model = make_model("llama")
    training = [window(seed, known=False) for seed in range(3)]
    rare = next(iter({*training[0].ids.tolist()} - {*training[1].ids.tolist()}))
    with torch.no_grad():
        model.get_input_embeddings().weight[rare, 0] = math.nan
    heads = RetrievalHeads(model_shape(model.config), ((0, 1), (1, 0)))
    settings = PredictorSettings(**SETTINGS.to_dict() | {"steps": 4, "rank": 8})
    with pytest.raises(ValueError, match=f"heads look at in {TOKENS} tokens is not finite"):
        prepare_relevance(model, training, training, tmp_path / "some", settings, heads=heads)
    assert not (tmp_path / "some").exists()


def test_settings_of_relevance_have_defaults_of_their_own():
    settings = PredictorSettings(target="relevance")
    assert (settings.block_size, settings.keep) == (64, 0.25)
    assert PredictorSettings(target="relevance", keep=0.5).keep == 0.5
    assert PredictorSettings().block_size == 1024
    given = {"model": "m", "documents": "d", "output": "o"}
    with pytest.raises(ValueError, match="heads: target 'relevance' needs the file written by"):
        PrepareConfig(**given, target="relevance")
    with pytest.raises(ValueError, match="heads: is for target 'relevance', got target 'exact'"):
        PrepareConfig(**given, heads="heads.json", target="exact")
    settings = PrepareConfig(**given, heads="heads.json")
    assert (settings.target, settings.block_size) == ("relevance", 64)
    assert PrepareConfig(**given).target == "exact"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder)
    return folder


def code_of(arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def conversations(path):
    rows = [
        {"prompt": f"fact number {i}. " * 12 + "What number?", "completion": f" It is number {i}."}
        for i in range(6)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_command_makes_a_folder_from_conversations(llama, tmp_path, capsys):
    shape = model_shape(load_config(str(llama)))
    heads = RetrievalHeads(shape, ((0, 0),))
    heads.save(tmp_path / "heads.json")
    arguments = ["prepare", "--model", llama, "--documents", conversations(tmp_path / "d.jsonl")]
    arguments += ["--output", tmp_path / "out", "--heads", tmp_path / "heads.json", "--steps", 2]
    arguments += ["--target", "relevance", "--block-size", 16, "--lengths", 256, "--rank", 8]
    assert code_of(arguments) == 0
    assert "predictor" in capsys.readouterr().out
    storage.load_relevance(tmp_path / "out")  # refuses what has another target


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_an_example_are_on_one_side(llama, tmp_path, seed):
    path = conversations(tmp_path / "d.jsonl")
    once = path.read_text().splitlines()
    given = {"model": str(llama), "output": "o", "heads": "h", "lengths": (256,), "seed": seed}
    config = PrepareConfig(**given, documents=str(path), target="relevance", held_out_windows=4)

    def parts(lines, config=config):
        path.write_text("\n".join(lines))
        return [[tuple(each.ids.tolist()) for each in part] for part in _examples(config, 257)]

    training, held_out = parts(4 * once)
    assert len(held_out) == 1
    assert len(training) == 5 * 4
    assert not {*training} & {*held_out}
    assert parts(4 * once) == [training, held_out]
    # An example with the same prompt and another answer is another one.
    other = json.dumps(json.loads(once[0]) | {"completion": " It is another."})
    training, held_out = parts([once[0], other])
    assert not {*training} & {*held_out}
    with pytest.raises(ValueError, match="two different examples or more, one to hold out"):
        parts([once[0]] * 3)
    tests = tmp_path / "t.jsonl"
    tests.write_text("\n".join(once[:2]))
    config = config.model_copy(update={"held_out_documents": str(tests)})
    training, held_out = parts(once, config)
    assert (len(training), len(held_out)) == (4, 2)
    assert not {*training} & {*held_out}


def test_texts_teach_no_relevance(llama, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"id": "a", "kind": "book", "text": "some words " * 400}))
    shape = model_shape(load_config(str(llama)))
    RetrievalHeads(shape, ((0, 0),)).save(tmp_path / "h.json")
    arguments = ["prepare", "--model", llama, "--documents", text, "--output", tmp_path / "out"]
    arguments += ["--heads", tmp_path / "h.json", "--target", "relevance", "--lengths", 256]
    assert code_of(arguments) == 1
    assert "documents: expected conversations, or prompts with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
