"""The quality benchmark and its retrieval task, with a tiny model on the CPU."""

import itertools
import json

import pytest
import torch

import quality
import quality_page
import quality_table
from lemo.data import Document
from retrieval import (
    DEPTHS,
    PASSAGE_TOKENS,
    retrieval_accuracy,
    retrieval_windows,
    with_copies,
)
from tiny import sample_text, save_tiny_llama, tiny_tokenizer, write_documents

pytestmark = pytest.mark.cpu_only

LENGTH = 512
METHODS = """
dense: {elimination: {keep: 1.0}}
half: {elimination: {keep: 0.5, block_size: context/4, scorer: random}}
before: {steps: 0}
"""


def documents(count, words=8000):
    return [Document(f"{i}", "book", sample_text(words, i)) for i in range(count)]


def test_the_passage_stands_where_it_should_and_is_asked_for_at_the_end():
    windows = retrieval_windows(documents(3), tiny_tokenizer(), LENGTH)
    assert len(windows) == 3 * (1 + len(DEPTHS))
    half = PASSAGE_TOKENS // 2
    for window in windows:
        ids, answer = window["ids"].tolist(), window["answer"]
        assert (len(ids), answer) == (LENGTH, half)
        passage = ids[-PASSAGE_TOKENS:]
        found = [i for i in range(LENGTH - 1) if ids[i : i + PASSAGE_TOKENS] == passage]
        room = LENGTH - 2 * PASSAGE_TOKENS
        places = [] if window["depth"] is None else [int(window["depth"] * room)]
        assert found == [*places, LENGTH - PASSAGE_TOKENS]


def test_what_is_not_planted_is_left_out_and_nothing_else():
    windows = retrieval_windows(documents(2), tiny_tokenizer(), LENGTH, depths=[0.5])
    bare, planted = windows[0]["ids"].tolist(), windows[1]["ids"].tolist()
    place = int(0.5 * (LENGTH - 2 * PASSAGE_TOKENS))
    rest = planted[:place] + planted[place + PASSAGE_TOKENS :]
    assert rest[: LENGTH - 2 * PASSAGE_TOKENS] == bare[: LENGTH - 2 * PASSAGE_TOKENS]


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        (documents(3), 100, "length: expected at least 384, got 100"),
        (documents(1), LENGTH, "documents: expected at least two of 512 tokens or more, got 1"),
        (documents(3, words=20), LENGTH, "documents: expected at least two"),
    ],
)
def test_bad_retrieval_windows(texts, length, message):
    with pytest.raises(ValueError, match=message):
        retrieval_windows(texts, tiny_tokenizer(), length)


def test_copies_are_planted_between_the_words_of_a_text():
    own, other = (" ".join(f"{letter}{i}" for i in range(40000)) for letter in "ab")
    texts = [Document("b", "book", other), Document("a", "book", own)]
    planted = list(with_copies(texts, length=8192))[1].text
    assert [word for word in planted.split() if word.startswith("a")] == own.split()
    passages = [
        tuple(group)
        for foreign, group in itertools.groupby(planted.split(), lambda word: word.startswith("b"))
        if foreign
    ]
    copies = [i for i, passage in enumerate(passages) if passage in passages[:i]]
    assert 0.35 < len(copies) / len(passages) < 0.6
    back = [i - max(j for j in range(i) if passages[j] == passages[i]) for i in copies]
    assert min(back) == 1
    assert 4 < max(back) <= 8192 // (128 + PASSAGE_TOKENS) + 1
    assert planted == list(with_copies(texts, length=8192))[1].text


class Copier(torch.nn.Module):
    """Puts first what followed the earlier occurrence of the last 16 tokens, else token 0."""

    device = torch.device("cpu")

    def __call__(self, input_ids, use_cache, logits_to_keep):
        ids = input_ids[0].tolist()
        logits = torch.zeros(1, logits_to_keep, 300)
        for row in range(logits_to_keep):
            end = len(ids) - logits_to_keep + row + 1
            last = ids[end - 16 : end]
            earlier = [i for i in range(16, end) if ids[i - 16 : i] == last]
            logits[0, row, ids[earlier[-1]] if earlier else 0] = 1.0
        return type("Output", (), {"logits": logits})


def test_a_model_that_copies_is_right_only_where_there_is_something_to_copy():
    windows = retrieval_windows(documents(3), tiny_tokenizer(), LENGTH)
    accuracy = retrieval_accuracy(Copier(), windows)
    assert set(accuracy) == {"none", "mean", *(f"{depth:g}" for depth in DEPTHS)}
    assert accuracy["mean"] == pytest.approx(100.0)
    assert accuracy["none"] < 50.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    save_tiny_llama(folder / "model", context=128)
    write_documents(folder / "documents.jsonl", count=4, words=8000)
    (folder / "methods.yaml").write_text(METHODS)
    return folder


def arguments(inputs, *more):
    return [
        *("--model", f"{inputs / 'model'}", "--train", f"{inputs / 'documents.jsonl'}"),
        *("--eval", f"{inputs / 'documents.jsonl'}", "--file", f"{inputs / 'methods.yaml'}"),
        *("--context", f"{LENGTH}", "--steps", "2", "--batch", "1", "--others", "1"),
        *("--device", "cpu", "--threads", "1", "--work", f"{inputs / 'work'}"),
        *("--output", f"{inputs / 'figures.jsonl'}", *more),
    ]


def test_a_whole_run(inputs, capsys):
    assert quality.main(arguments(inputs, "--jobs", "3")) == 0
    rows = {}
    for line in (inputs / "figures.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["method"]] = row
    assert set(rows) == {"dense", "half", "before"}
    assert rows["half"]["settings"]["elimination"]["block_size"] == LENGTH // 4
    assert rows["half"]["kept_share"] == pytest.approx(0.5)
    assert rows["dense"]["kept_share"] == 1.0
    assert "kept_share" not in rows["before"]
    for row in rows.values():
        assert set(row["perplexity"]) == {"a", "a_tail", "b", "b_tail"}
        assert 0 <= row["retrieval"]["mean"] <= 100
    assert rows["dense"]["perplexity"] != rows["before"]["perplexity"], "nothing was trained"
    printed = capsys.readouterr().out
    assert "| half | 2 | 0.50 |" in printed
    assert "(1.0000)" in printed


def test_equal_time_from_earlier_rows_and_texts_with_copies(inputs):
    run = arguments(inputs, "--copies", "--methods", "dense", "half")
    run[run.index("--output") + 1] = f"{inputs / 'copies.jsonl'}"
    for equal in ("steps", "time"):
        assert quality.main([*run, "--equal", equal]) == 0
    rows = [json.loads(line) for line in (inputs / "copies.jsonl").read_text().splitlines()]
    assert [row["equal"] for row in rows].count("steps") == 2
    (last,) = [row for row in rows if row["equal"] == "time"]
    assert (last["method"], last["shape"]["copies"]) == ("half", True)
    options = quality.parse_arguments([*run, "--learning-rate", "0.5"])
    assert quality.earlier_rows(options) == []


def test_equal_time_gives_the_faster_method_more_steps(inputs):
    options = quality.parse_arguments(arguments(inputs))
    rows = [
        {"method": "dense", "step_seconds": 3.0},
        {"method": "half", "step_seconds": 0.9},
        {"method": "half", "step_seconds": 1.1},
        {"method": "before"},
    ]
    steps = quality.equal_time_steps(options, rows)
    assert steps == {"half": 6}
    jobs = list(quality.jobs_of(options, steps, "time"))
    assert [(job["name"], job["steps"], job["equal"]) for job in jobs] == [("half", 6, "time")]
    with pytest.raises(SystemExit, match="'dense' did not train"):
        quality.equal_time_steps(options, rows[1:])


def test_bad_arguments(inputs, capsys):
    for more, message in [
        (["--methods", "best"], "--methods: expected names of"),
        (["--model", "nowhere"], "--model: expected an existing path, got 'nowhere'"),
        (["--equal", "time", "steps"], "--equal: expected 'steps' first"),
    ]:
        with pytest.raises(SystemExit):
            quality.parse_arguments(arguments(inputs, *more))
        assert message in capsys.readouterr().err


def test_the_methods_of_the_repository_are_valid(inputs):
    options = quality.parse_arguments(
        [*arguments(inputs), "--file", "benchmarks/quality.yaml", "--predictors", "folder"]
    )
    from lemo import LemoConfig

    for method in options.known.values():
        if method["elimination"] is not None:
            LemoConfig(**method["elimination"])


def test_no_method_follows_the_labels_of_the_data(inputs):
    """By lemo's defaults a method would train with random blocks on text, with words on answers."""
    options = quality.parse_arguments(
        [*arguments(inputs), "--file", "benchmarks/quality.yaml", "--predictors", "folder"]
    )
    scorers = {
        name: method["elimination"]["scorer"]
        for name, method in options.known.items()
        if method["elimination"] is not None
    }
    assert "auto" not in scorers.values()
    assert (scorers["tail-0.5"], scorers["paper"]) == ("random", "exact")


@pytest.mark.parametrize(
    ("runs", "shown"),
    [
        ([("dense", 1, 2.0), ("half", 1, 1.0), ("half", 3, 9.0)], ["2.000 H200", "1.000 H200"]),
        ([("dense", 1, 2.0), ("half", 3, 9.0)], ["2.000 H200", ""]),
        (
            [("dense", 3, 8.0), ("half", 3, 4.0), ("half", 4, 9.0)],
            ["8.000 H200 shared by 3", "4.000 H200 shared by 3"],
        ),
    ],
)
def test_times_of_runs_that_shared_a_gpu_stand_only_where_no_run_had_one(runs, shown):
    methods = {}
    for name, at_a_time, seconds in runs:
        row = {"step_seconds": seconds, "runs_at_a_time": at_a_time, "gpu": "NVIDIA H200"}
        row |= {"seed": 0, "shape": {"steps": 9}, "perplexity": {"book": 2.0}}
        methods.setdefault(name, []).append(row | {"retrieval": {"mean": 1.0}})
    lines = quality_table.table_of((16, 9, 1, 1e-3, False, "steps"), methods).splitlines()[4:]
    assert [line.split("|")[4].strip() for line in lines] == shown


def test_the_page_shows_the_recorded_results():
    page = quality_page.PAGE.read_text(encoding="utf-8")
    assert page == quality_page.updated(page, quality_page.read_rows())
