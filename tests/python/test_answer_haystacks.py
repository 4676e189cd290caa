"""Texts that windows of answers.py are cut from, and which of them a run reads."""

import json
import random

import numpy as np
import pytest
import torch

import answers
from answer_cases import ASKED, FACTS, TOKENIZER, TOKENS, documents
from answer_cases import text as sentences
from answer_runs import shares
from answer_tasks import Mixture, haystacks, load_haystacks, make_haystacks
from answer_tasks.haystacks import Haystack, Haystacks
from answer_tasks.text import LABELLED_TOKENS, text
from answer_tasks.windows import Plan, Question, plant
from lemo.data import Document, read_documents
from tiny import save_tiny_llama

pytestmark = pytest.mark.cpu_only


def haystack(tokens):
    return Haystack(np.arange(tokens, dtype=np.int32), np.zeros((0, 2), np.int64), np.zeros(0))


def test_a_text_begins_anywhere_in_any_document_that_is_long_enough():
    texts = Haystacks([haystack(9), haystack(10), haystack(12)])
    draw = random.Random(0)
    cuts = {(len(found.ids), start) for found, start in (texts.cut(draw, 10) for _ in range(80))}
    assert cuts == {(10, 0), (12, 0), (12, 1), (12, 2)}


def test_sentences_are_found_in_every_piece(monkeypatch):
    """Whole ones of 32 to 80 tokens, as a reader finds them; a piece ends one."""
    monkeypatch.setattr(haystacks, "_PIECE_CHARACTERS", 1000)
    whole = sentences(200, 0)
    [found] = make_haystacks([Document("a", "b", whole)], TOKENIZER, 5000).documents
    read = TOKENIZER.decode(found.ids)
    skipped = min(4000, len(whole) // 4)
    assert read == whole[skipped : skipped + 5000]
    lengths = (found.sentences[:, 1] - found.sentences[:, 0]).tolist()
    assert min(lengths) >= 32
    assert max(lengths) <= 80
    assert {int(start) // 1000 for start, _ in found.sentences} == {*range(5)}
    for start, end in found.sentences:
        sentence = read[start:end].strip()
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert sentence.count(".") == 1


def test_rare_sentences_are_those_of_rare_tokens():
    common, rare = "The tone is the note that he has set.", "Quick wizards jump by vexed fog now."
    lines = 60 * [common] + [rare] + 60 * [common]
    [found] = make_haystacks([Document("a", "b", " ".join(lines))], TOKENIZER, 9000).documents
    read = [TOKENIZER.decode(found.ids[start:end]).strip() for start, end in found.sentences]
    assert read[int(found.rarity.argmax())] == rare
    counts = np.bincount(found.ids, minlength=found.ids.max() + 1) + 1
    surprise = np.log(counts.sum()) - np.log(counts)
    for (start, end), value in zip(found.sentences, found.rarity):
        assert value == pytest.approx(surprise[found.ids[start:end]].mean(), rel=1e-5)


def test_a_cache_is_of_a_file_a_tokenizer_and_a_length(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": sentences(100, 0)}))
    other = type(TOKENIZER).from_pretrained(save_tiny_llama(tmp_path / "model"))
    other.add_tokens(["the"])
    for tokenizer, characters in ((TOKENIZER, 900), (TOKENIZER, 800), (other, 900)):
        for _ in range(2):
            [found] = load_haystacks(path, tokenizer, characters, tmp_path / "cache").documents
            [made] = make_haystacks(read_documents(path), tokenizer, characters).documents
            assert found.ids.tolist() == made.ids.tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_facts_stand_in_all_parts_of_a_window():
    texts = Haystacks([haystack(4000)])
    plan = Plan(["a fact.", "one more."], [Question("which?", "it", (1, 0))])
    places = []
    for seed in range(60):
        window = plant("t", plan, texts, TOKENIZER, 2000, random.Random(seed))
        [answer] = window.answers
        places += [start / 2000 for start, _ in answer.needed]
        # The first of what is needed says how deep one has to look.
        assert answer.depth == min(start for start, _ in answer.needed) / 2000
    assert all(sum(int(4 * place) == quarter for place in places) > 15 for quarter in range(4))


def test_text_has_labels_at_its_end():
    window = text(Haystacks([haystack(400)]), 300, random.Random(0))
    assert (window.labels != -100).tolist() == [i >= 300 - LABELLED_TOKENS for i in range(300)]


@pytest.mark.parametrize(("facts", "asked"), [(3, 4), (3, 0)])
def test_as_many_questions_as_there_are_facts(facts, asked):
    texts = make_haystacks(documents(1), TOKENIZER, 9000)
    with pytest.raises(
        ValueError, match=f"asked: expected 1 to 3, the number of facts, got {asked}"
    ):
        Mixture(["number"], texts, TOKENIZER, 0, facts, asked)


@pytest.mark.parametrize(("task", "each"), [("values", 3), ("query", 3), ("hops", 2), ("chain", 2)])
def test_questions_that_need_several_facts_are_fewer(task, each):
    texts = make_haystacks(documents(), TOKENIZER, 20_000)
    window = Mixture([task], texts, TOKENIZER, 0, 24, 6).window(0, 3000)
    assert len(window.answers) == 6 // each


# --- a run


METHODS = """
own: {elimination: {keep: 0.25, block_size: 64, scorer: lexical, recompute: layer}}
plain: {elimination: {keep: 0.25, block_size: 64, scorer: lexical}}
"""


@pytest.fixture
def arguments(tmp_path):
    save_tiny_llama(tmp_path / "model", context=1024)
    for name, first in (("train", 0), ("eval", 3)):
        rows = (json.dumps({"text": sentences(400, seed)}) for seed in range(first, first + 3))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "methods.yaml").write_text(METHODS)
    return [
        *("--model", f"{tmp_path}/model", "--train", f"{tmp_path}/train.jsonl"),
        *("--eval", f"{tmp_path}/eval.jsonl", "--file", f"{tmp_path}/methods.yaml"),
        *("--tokens", f"{TOKENS}", "--facts", f"{FACTS}", "--asked", f"{ASKED}"),
        *("--eval-windows", "2", "--device", "cpu", "--cache", f"{tmp_path}/cache"),
    ]


def test_what_is_evaluated_is_held_out(arguments, tmp_path):
    """Other documents, other draws for every seed of training, other paraphrases. Documents are
    read as far as a window needs."""
    tasks = ["paraphrase", "book"]
    options = answers.parse_arguments([*arguments, "--tasks", *tasks, "--characters", "100"])
    setting = answers.load(options)
    path = tmp_path / "eval.jsonl"
    texts = make_haystacks(read_documents(path), TOKENIZER, 8 * TOKENS)
    expected = [
        Mixture([task], texts, TOKENIZER, 10_000, FACTS, ASKED, held_out=True).window(i, TOKENS)
        for task in tasks
        for i in range(2)
    ]
    for found, made in zip(setting.windows, expected, strict=True):
        assert torch.equal(found.ids, made.ids)
        assert found.answers == made.answers


def test_a_method_keeps_its_own_recomputation(arguments):
    methods = answers.parse_arguments([*arguments, "--recompute", "none"]).methods
    assert [method.elimination["recompute"] for method in methods] == ["layer", "none"]


def test_rows_go_where_they_belong(arguments):
    assert answers.parse_arguments(arguments).output.name == "answers.jsonl"
    of_scorers = answers.parse_arguments([*arguments, "--relevance", "lexical"])
    assert of_scorers.output.name == "relevance.jsonl"


@pytest.mark.parametrize(
    ("more", "methods", "message"),
    [
        (["--minutes", "1", "--shared"], METHODS, "--shared: expected --steps, because time tells"),
        ([], "odd: {elimination: null, keep: 1}", "odd: expected elimination, scores, chunks, in_"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, tmp_path, more, methods, message, capsys):
    (tmp_path / "methods.yaml").write_text(methods)
    with pytest.raises(SystemExit):
        answers.parse_arguments([*arguments, *more])
    assert message in capsys.readouterr().err


def test_a_method_that_runs_out_of_memory_does_not_end_the_others(arguments, monkeypatch, tmp_path):
    def run(method, *_):
        if method.name == "own":
            raise torch.OutOfMemoryError("no memory")
        return [{"method": method.name, "keep": 0.25, "task": "mean"}]

    monkeypatch.setattr(answers, "load", lambda options: None)
    monkeypatch.setattr(answers, "run", run)
    output = tmp_path / "rows.jsonl"
    assert answers.main([*arguments, "--output", f"{output}"]) == 1
    [row] = output.read_text().splitlines()
    assert json.loads(row)["method"] == "plain"
    assert answers.main([*arguments, "--output", f"{output}", "--method", "plain"]) == 0


def test_the_mean_is_that_of_the_tasks():
    def found(task, *exact):
        return [{"task": task, "depth": None, "exact": each} for each in exact]

    by_task = answers.by_task([*found("a", True), *found("b", True, False)])
    assert shares(by_task["b"])["exact"] == 50.0
    assert answers.mean_of(by_task) == 75.0
