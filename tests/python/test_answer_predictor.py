"""The benchmark that trains a predictor of relevance on tasks of answers, on a tiny model."""

import json

import pytest
import torch

import answer_predictor
from answer_cases import ASKED, FACTS, TOKENS, documents
from answer_predictor import _Windows, relevance_window, without_needs
from answer_tasks import Answer, Window
from lemo.predictors.model import model_shape
from lemo.predictors.storage import load_relevance
from lemo.relevance.heads import RetrievalHeads
from lemo.training.model import load_config
from tiny import save_tiny_llama

pytestmark = pytest.mark.cpu_only


def test_a_window_says_which_rows_predict_and_what_is_needed():
    ids = torch.arange(10)
    labels = torch.full_like(ids, -100)
    labels[4:6] = labels[9] = 1
    answers = Answer(4, 6, ((0, 2), (3, 4)), 0.0), Answer(9, 10, (), None)
    made = relevance_window(Window("task", ids, labels, answers))
    assert made.labelled.nonzero()[:, 0].tolist() == [3, 4, 8]
    assert (made.kind, made.needed) == ("task", (((0, 2), (3, 4)), ()))
    assert torch.equal(made.ids, ids)
    assert without_needs(made).needed is None


def test_mixtures_take_turns_after_each_round_of_tasks():
    class Fake:
        tasks = ("a", "b")

        def __init__(self, name):
            self.name = name

        def window(self, index, tokens):
            ids = torch.full((tokens,), index)
            return Window(self.name, ids, torch.full_like(ids, -100), ())

    windows = _Windows([Fake("few"), Fake("many")], 6, 8)
    found = [(each.kind, int(each.ids[0])) for each in (windows[i] for i in range(len(windows)))]
    names = ["few", "few", "many", "many", "few", "few"]
    assert found == [(name, index) for index, name in enumerate(names)]


def trained(taught_by, tmp_path):
    """(predictor.json, rows) of a run."""
    save_tiny_llama(tmp_path / "model", context=1024)
    for name in ("train", "eval"):
        rows = (json.dumps({"text": each.text}) for each in documents())
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    arguments = [
        *("--model", f"{tmp_path}/model", "--train", f"{tmp_path}/train.jsonl"),
        *("--eval", f"{tmp_path}/eval.jsonl", "--folder", f"{tmp_path}/out"),
        *("--tasks", "number", "book", "--tokens", f"{TOKENS}", "--windows", "8"),
        *("--eval-windows", "2", "--facts", "6", f"{FACTS}", "--asked", f"{ASKED}"),
        *("--set", "steps=2", "rank=8", "learning_rate=1e-3", "--cache", f"{tmp_path}/cache"),
        *("--workers", "0", "--device", "cpu", "--output", f"{tmp_path}/rows.jsonl"),
    ]
    if taught_by == "heads":
        shape = model_shape(load_config(f"{tmp_path}/model"))
        RetrievalHeads(shape, ((0, 1),)).save(tmp_path / "heads.json")
        arguments += ["--heads", f"{tmp_path}/heads.json"]
    assert answer_predictor.main(arguments) == 0
    load_relevance(tmp_path / "out")  # refuses what is damaged
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    return json.loads((tmp_path / "out" / "predictor.json").read_text()), rows


def test_a_predictor_is_trained_and_measured(tmp_path):
    made = {}
    for taught_by in ("known", "heads"):
        (folder := tmp_path / taught_by).mkdir()
        made[taught_by], rows = trained(taught_by, folder)
        assert made[taught_by]["windows"] == {"training": 8, "held_out": 4}
        assert {row["task"] for row in rows} == {"number", "book", "mean"}
        for row in rows:
            assert (row["teacher"], row["facts"], row["keep"]) == (taught_by, [6, FACTS], 0.25)
            assert row["settings"] == {"steps": "2", "rank": "8", "learning_rate": "1e-3"}
            for name, share in made[taught_by]["recall"][row["task"]].items():
                assert row[name] == pytest.approx(100 * share, abs=0.01)
    # Heads of random weights look elsewhere than at what is needed.
    assert made["known"]["loss"] != made["heads"]["loss"]
