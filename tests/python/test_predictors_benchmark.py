"""The benchmark of predictors, with a tiny model on the CPU."""

import json
import sys

import pytest
import torch

import predictors
from lemo.preparation.pipeline import prepare
from lemo.preparation.ranking import Budget
from lemo.preparation.windows import Window
from lemo.settings.preparation import PredictorSettings
from lemo.training.model import extend_context, load_config, load_model
from tiny import save_tiny_llama, write_documents

pytestmark = pytest.mark.cpu_only

CHOSEN = ["block8", "base", "half-rank", "elastic", "one-kind", "longer", "long-block64", "mixed"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictors")
    save_tiny_llama(folder / "model", context=128)
    write_documents(folder / "train.jsonl", count=4, words=2000)
    write_documents(folder / "eval.jsonl", count=6, words=1500)
    return folder


def arguments(inputs, *more):
    return [
        *("--model", f"{inputs / 'model'}", "--train", f"{inputs / 'train.jsonl'}"),
        *("--eval", f"{inputs / 'eval.jsonl'}", "--work", f"{inputs / 'work'}"),
        *("--output", f"{inputs / 'figures.jsonl'}", "--device", "cpu", "--threads", "1"),
        *("--length", "256", "--long-length", "512", "--blocks", "8", "16", "--long-block", "64"),
        *("--windows", "4", "--many-windows", "6", "--long-windows", "2", "--held-out", "4"),
        *("--long-held-out", "2", "--steps", "6", "--commit", "abc", *more),
    ]


def run(inputs, monkeypatch, *more):
    """Rows by experiment."""
    (inputs / "figures.jsonl").unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["predictors.py", *arguments(inputs, *more)])
    predictors.main()
    lines = (inputs / "figures.jsonl").read_text().splitlines()
    return {row["experiment"]: row for row in map(json.loads, lines)}


def test_a_whole_run(inputs, monkeypatch, capsys):
    rows = run(inputs, monkeypatch, "--experiments", *CHOSEN)
    assert list(rows) == CHOSEN
    assert not list((inputs / "work").iterdir()), "the features are left behind"
    for row in rows.values():
        assert (row["bench"], row["commit"], row["gpu"]) == ("predictors", "abc", None)
        recall = row["recall"]
        assert set(recall) == {"attention", "mlp", "place_alone", "by_kind"}
        assert set(recall["by_kind"]) == {"a", "b"}
        for figures in (recall, *recall["by_kind"].values()):
            assert all(0 <= figures[name] <= 1 for name in ("attention", "mlp", "place_alone"))
        assert 0 < row["captured"]["attention"] <= 1
        assert row["bytes"] == 2 * row["parameters"]
    base = rows["base"]
    assert base["settings"]["block_size"] == 16
    assert rows["block8"]["settings"]["block_size"] == 8
    assert rows["half-rank"]["settings"]["rank"] == base["settings"]["rank"] // 2
    assert rows["half-rank"]["bytes"] < base["bytes"]
    # Of the hidden units .6 are left, so of the parameters fewer than two thirds.
    assert rows["elastic"]["pruned_share"] > 1 / 3
    assert rows["elastic"]["recall_of_base"] == base["recall"]
    assert "recall_of_base" not in base
    # The very same predictors, on other windows.
    assert rows["longer"]["parameters"] == base["parameters"]
    assert rows["longer"]["settings"]["test_length"] == 512
    assert rows["mixed"]["settings"]["windows"] == {"256": 4, "512": 2}
    printed = capsys.readouterr().out
    assert "| base | 16 | 4 x 256 | 256 |" in printed
    assert "| longer | 16 | 4 x 256 | 512 |" in printed


def test_base_is_what_prepare_measures(inputs, monkeypatch, tmp_path):
    row = run(inputs, monkeypatch, "--experiments", "base", "windows", "one-kind")["base"]
    options = predictors.parse_arguments(arguments(inputs, "--experiments", "base"))
    tokenizer = predictors.load_tokenizer(str(options.model))
    samples, ids, _ = predictors.cut_windows(options, tokenizer)
    config = load_config(str(options.model))
    extend_context(config, 512, "linear")
    model = load_model(str(options.model), config, torch.float32)
    windows = {
        held_out: [Window(s.kind, i) for s, i in zip(samples, ids) if s.held_out == held_out]
        for held_out in (False, True)
    }
    settings = PredictorSettings(block_size=16, keep=0.5, steps=6, search_rounds=0)
    description = prepare(model, windows[False], windows[True], tmp_path / "folder", settings)
    assert row["parameters"] == description["parameters"]
    assert row["share_of_model"] == pytest.approx(description["share_of_model"], abs=1e-5)
    # The benchmark scores in bf16, as fine-tuning does: a block at the boundary may change sides.
    for kind in ("attention", "mlp"):
        assert row["recall"][kind] == pytest.approx(description["recall"][kind], abs=0.05)
    layers = description["layers"]
    place = sum(layer["attention"]["recall_of_place_alone"] for layer in layers) / len(layers)
    assert row["recall"]["place_alone"] == pytest.approx(place, abs=1e-4)


def test_processes_give_the_same_figures(inputs, monkeypatch):
    # One is enough to see what goes there and back, and starts sooner than two.
    start = predictors.ProcessPoolExecutor
    monkeypatch.setattr(predictors, "ProcessPoolExecutor", lambda jobs, *setup: start(1, *setup))
    alone, shared = (
        run(inputs, monkeypatch, "--experiments", "base", "longer", "--jobs", jobs)
        for jobs in ("1", "2")
    )
    for name in ("base", "longer"):
        assert alone[name]["recall"] == shared[name]["recall"]


def test_captured_is_a_share_of_the_best_choice():
    exact = torch.tensor([9.0, 1.0, 4.0, 3.0, 2.0, 9.0])
    # Of six blocks three are kept, both ends in any case: the choice is of one of four.
    assert predictors.captured(exact, exact, Budget(0.5, 1, 1)) == 1.0
    assert predictors.captured(-exact, exact, Budget(0.5, 1, 1)) == pytest.approx(1 / 4)
    assert predictors.captured(-exact, exact, Budget(0.3, 1, 1)) == 1.0


def test_default_experiments(inputs):
    options = predictors.parse_arguments(arguments(inputs))
    known = predictors.experiments_of(options, 24)
    assert [*options.chosen] == [name for name in known if name not in predictors.OPTIONAL]
    assert set(predictors.OPTIONAL) < set(known)
    assert options.jobs == 1
    trainings = {experiment.training for experiment in options.chosen.values()}
    assert len(trainings) == len(options.chosen) - 1, "only 'longer' shares its predictors"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--experiments", "best"], "--experiments: expected block8, base, windows"),
        (["--eval", "nowhere"], "--eval: expected an existing path, got 'nowhere'"),
        (["--blocks", "64"], "base: nothing to choose in 256 tokens of blocks of 64"),
    ],
)
def test_bad_arguments(inputs, more, message, capsys):
    with pytest.raises(SystemExit):
        predictors.parse_arguments(arguments(inputs, *more))
    assert message in capsys.readouterr().err
