"""`lemo finetune --context-parallel`: groups of processes train as one process does."""

import json
from pathlib import Path

import pytest

import context_runs
import processes
from context_runs import losses
from lemo.settings.finetune import FinetuneConfig
from lemo.training.finetune import finetune
from tiny import save_tiny_llama, write_documents

pytestmark = pytest.mark.cpu_only

SHARED = {"context_parallel": 2}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of a run, but for its folder."""
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model": str(save_tiny_llama(folder / "model")),
        "documents": str(write_documents(folder / "documents.jsonl")),
        "context_length": 96,
        "steps": 4,
        "warmup_steps": 1,
        "learning_rate": 5e-3,
        "lora_rank": 4,
        "gradient_accumulation": 2,
        "save_every": 2,
        "device": "cpu",
        "elimination": {"block_size": 8},
    }


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    finetune(FinetuneConfig.from_dict(settings | {"output": str(folder)}))
    return losses(folder)


def test_two_processes_go_on_as_one_where_one_of_them_was_lost(settings, one, tmp_path):
    run = settings | SHARED | {"output": str(tmp_path / "run")}
    with pytest.raises(AssertionError, match="process 0: .*"):
        processes.run(2, context_runs.train, tmp_path, run, 3)
    assert losses(run["output"]) == pytest.approx(one[:3], rel=1e-5)
    processes.run(2, context_runs.train, tmp_path, run | {"resume": True})
    assert losses(run["output"]) == pytest.approx(one, rel=1e-5)


def test_two_groups_train_as_two_processes(settings, tmp_path):
    drawn = settings | {"gradient_accumulation": 1}
    scored = drawn | {"elimination": {"block_size": 8, "scorer": "pooled"}}
    runs = {name: drawn | {"output": str(tmp_path / name)} for name in ("two", "four")}
    processes.run(2, context_runs.train, tmp_path, runs["two"])
    cut = drawn | {"output": str(tmp_path / "cut"), "shard": True}
    of_four = [runs["four"], scored | {"output": str(tmp_path / "scored")}, cut]
    processes.run(4, context_runs.train_all, tmp_path, [run | SHARED for run in of_four])
    for name in ("four", "cut"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "two"), rel=1e-5)

    one = scored | {"output": str(tmp_path / "one"), "batch_size": 2}
    finetune(FinetuneConfig.from_dict(one))
    assert losses(tmp_path / "scored") == pytest.approx(losses(one["output"]), rel=1e-5)


def test_a_group_shares_out_rows_and_weights(settings, one, tmp_path):
    run = settings | SHARED | {"output": str(tmp_path / "run"), "shard": True}
    processes.run(2, context_runs.train, tmp_path, run)
    assert losses(run["output"]) == pytest.approx(one, rel=1e-5)


def test_a_group_has_one_plan(settings, one, tmp_path):
    run = settings | SHARED | {"output": str(tmp_path / "run"), "memory_limit": 1.0}
    cut = run | {"output": str(tmp_path / "cut"), "shard": True}
    processes.run(2, context_runs.train_all, tmp_path, [run, cut])
    for each in (run, cut):
        assert losses(each["output"]) == pytest.approx(one, rel=1e-5)
        plan = json.loads((Path(each["output"]) / "plan.json").read_text())
        assert set(plan["modes"]) == {"none"}
    # Said by every process; the first that ends is named.
    little = run | {"output": str(tmp_path / "little"), "memory_limit": 1e-4}
    with pytest.raises(AssertionError, match="memory_limit: expected a step of 1 x 96 tokens that"):
        processes.run(2, context_runs.train, tmp_path, little)


def test_a_group_is_a_part_of_the_processes(settings, tmp_path):
    with pytest.raises(ValueError, match="context_parallel: expected a divisor of the 1 proc"):
        finetune(FinetuneConfig.from_dict(settings | SHARED | {"output": str(tmp_path / "run")}))
    with pytest.raises(ValueError, match="context_parallel: expected 1 without elimination"):
        FinetuneConfig.from_dict(settings | SHARED | {"output": "run", "elimination": None})
