"""The benchmark of predictors, with a tiny model on the CPU."""

import json

import pytest
import torch

import predictors
from lemo.packing.blocks import BlockLayout
from lemo.preparation.pipeline import prepare
from lemo.settings.preparation import PredictorSettings
from lemo.training.model import load_tokenizer
from tiny import save_tiny_llama, write_documents

pytestmark = pytest.mark.cpu_only

EXPERIMENTS = """
base:
  windows: [[4, context/2]]
  held_out: [4, context/2]
  one_kind: false
  settings: {block_size: 16, rank: rank, keep: 0.5, steps: 6}
block8: {settings: {block_size: 8}}
half-rank: {settings: {rank: rank/2}}
elastic: {settings: {prune_to: 0.6}}
one-kind: {one_kind: true}
mixed: {windows: [[4, context/2], [2, context]], held_out: [2, context]}
impossible: {settings: {block_size: 256}}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictors")
    save_tiny_llama(folder / "model", context=128)
    write_documents(folder / "train.jsonl", count=4, words=2000)
    write_documents(folder / "eval.jsonl", count=6, words=1500)
    (folder / "experiments.yaml").write_text(EXPERIMENTS)
    return folder


def arguments(inputs, *more):
    return [
        *("--model", f"{inputs / 'model'}", "--train", f"{inputs / 'train.jsonl'}"),
        *("--eval", f"{inputs / 'eval.jsonl'}", "--work", f"{inputs / 'work'}"),
        *("--output", f"{inputs / 'figures.jsonl'}", "--file", f"{inputs / 'experiments.yaml'}"),
        *("--device", "cpu", "--threads", "1", "--context", "512", "--commit", "abc", *more),
    ]


def test_a_whole_run(inputs, capsys):
    # The last one fails: its windows leave nothing to choose.
    assert predictors.main(arguments(inputs, "--jobs", "2")) == 1
    rows = {}
    for line in (inputs / "figures.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["experiment"]] = row
    assert list(rows) == ["base", "block8", "half-rank", "elastic", "one-kind", "mixed"]
    assert not list((inputs / "work").iterdir()), "the predictors are left behind"
    for row in rows.values():
        assert (row["bench"], row["commit"], row["gpu"]) == ("predictors", "abc", None)
        recall = row["recall"]
        assert set(recall) == {"attention", "mlp", "place_alone", "by_kind"}
        assert set(recall["by_kind"]) == {"a", "b"}
        shares = [recall["attention"], recall["mlp"], recall["place_alone"]]
        shares += [value for figures in recall["by_kind"].values() for value in figures.values()]
        assert all(0 <= share <= 1 for share in shares)
        assert all(0 < row["captured"][kind] <= 1 for kind in ("attention", "mlp"))
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
    assert rows["mixed"]["settings"]["windows"] == {"256": 4, "512": 2}
    assert rows["mixed"]["settings"]["test_length"] == 512
    printed = capsys.readouterr().out
    assert "| base | 16 | 4 x 256 | 256 |" in printed
    assert "impossible: exit code 1" in printed

    # What is recorded is what `prepare` says of the same windows.
    options = predictors.parse_arguments(arguments(inputs, "--experiments", "base"))
    model = predictors.load(str(options.model), options.context, "cpu")
    tokenizer = load_tokenizer(str(options.model))
    windows = [
        predictors.cut_windows(path, ["a", "b"], tokenizer, 256, 4, seed=0)
        for path in (options.train, options.eval)
    ]
    settings = PredictorSettings(**options.chosen["base"]["settings"], search_rounds=0)
    description = prepare(model, *windows, inputs / "folder", settings)
    assert base["parameters"] == description["parameters"]
    for kind in ("attention", "mlp"):
        assert base["recall"][kind] == pytest.approx(description["recall"][kind], abs=1e-4)
    layers = description["layers"]
    place = sum(layer["attention"]["recall_of_place_alone"] for layer in layers) / len(layers)
    assert base["recall"]["place_alone"] == pytest.approx(place, abs=1e-4)


def test_captured_is_a_share_of_the_best_choice():
    exact = torch.tensor([9.0, 1.0, 4.0, 3.0, 2.0, 9.0])
    layout = BlockLayout.from_seqlens([6], 1, "cpu")

    def captured(scores, keep):
        settings = PredictorSettings(keep=keep, keep_first=1, keep_last=1)
        return predictors.captured_share(scores, exact, layout, settings)

    # Of six blocks three are kept, both ends in any case: the choice is of one of four.
    assert captured(exact, 0.5) == 1.0
    assert captured(-exact, 0.5) == pytest.approx(1 / 4)
    assert captured(-exact, 0.3) == 1.0


def test_the_experiments_of_the_repository_are_valid(inputs):
    given = arguments(inputs, "--file", "benchmarks/predictors.yaml", "--context", "32768")
    chosen = predictors.parse_arguments(given).chosen
    for name, experiment in chosen.items():
        settings = PredictorSettings(**experiment["settings"])
        assert experiment["windows"], name
        number, tokens = experiment["held_out"]
        assert number > 1
        assert tokens / settings.block_size > 2, name
    assert chosen["long"]["windows"] == [[8, 32768]]
    assert chosen["double-rank"]["settings"]["rank"] == 2 * chosen["base"]["settings"]["rank"]
    changed = [name for name, experiment in chosen.items() if experiment == chosen["base"]]
    assert changed == ["base"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--experiments", "best"], "--experiments: expected names of"),
        (["--eval", "nowhere"], "--eval: expected an existing path, got 'nowhere'"),
    ],
)
def test_bad_arguments(inputs, more, message, capsys):
    with pytest.raises(SystemExit):
        predictors.parse_arguments(arguments(inputs, *more))
    assert message in capsys.readouterr().err
