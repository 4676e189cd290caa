"""Training in two processes against one process on the same data."""

import shutil

import pytest
import torch

import lemo
from data_parallel_cases import KINDS, PASSES, STEPS, train
from finetune_cases import adapter, in_two, losing_one, losses, save_packed, stop
from finetune_cases import train as finetune
from processes import run
from tiny import save_tiny_llama, write_documents
from tiny_models import config_of, make_model
from tolerances import FP32_RELATIVE_ERROR, assert_close_fp32

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainers")
    return train(str(folder / "one")), run(2, train, folder, str(folder / "two"))


@pytest.mark.parametrize("kind", KINDS)
def test_trainers_train_in_two_processes_as_in_one(trained, kind):
    one, both = trained
    for found in both:
        assert found[kind]["losses"] == pytest.approx(one[kind]["losses"], rel=FP32_RELATIVE_ERROR)
        trained_weights = (torch.tensor(run[kind]["trained"]) for run in (found, one))
        assert_close_fp32(*trained_weights, "trained weights")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_reduced_once_a_step(trained, kind):
    for found in trained[1]:
        assert found[kind]["reduced"] == ([False] * (PASSES // 2 - 1) + [True]) * STEPS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_tiny_llama(folder / "model")
    write_documents(folder / "d.jsonl", count=8)
    finetune(str(folder), "one")
    finetune(str(folder), "dense", elimination=None)
    finetune(str(folder), "nf4", quantize="nf4")
    finetune(str(folder), "nf4, dense", quantize="nf4", elimination=None)
    save_packed(str(folder))
    errors = run(2, in_two, folder, str(folder))
    for name, source in (("resumed by one", "two"), ("resumed by one, whole", "sharded")):
        stop(folder / source, folder / name)
        finetune(str(folder), name, resume=True)
    return folder, errors


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("two", "one"),
        ("sharded", "one"),
        ("sharded, recomputed", "one"),
        ("sharded, dense", "dense"),
        ("sharded, nf4", "nf4"),
        ("sharded, nf4, selective", "nf4"),
        ("sharded, nf4, dense", "nf4, dense"),
        ("sharded, packed", "nf4"),
        ("resumed sharded", "one"),
        ("resumed whole", "one"),
        ("resumed by two", "one"),
        ("resumed by one", "one"),
        ("resumed by one, whole", "one"),
    ],
)
def test_runs_of_two_processes_are_as_those_of_one(runs, name, like):
    folder, _ = runs
    found, expected = folder / name, folder / like
    assert losses(found) == pytest.approx(losses(expected), rel=FP32_RELATIVE_ERROR)
    assert_close_fp32(adapter(found), adapter(expected), "adapter")


def test_resuming_with_other_windows_in_a_step_is_refused(runs, tmp_path):
    folder, _ = runs
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "d.jsonl", tmp_path)
    stop(folder / "two", tmp_path / "two")
    wanted = r"written by 2 processes with 2 .* expected gradient_accumulation 4, got 1 processes"
    with pytest.raises(ValueError, match=wanted):
        finetune(str(tmp_path), "two", resume=True, gradient_accumulation=2)
    shutil.rmtree(tmp_path / "two" / "checkpoints")
    with pytest.raises(ValueError, match="other settings: gradient_accumulation was 2, now 4"):
        finetune(str(tmp_path), "two", resume=True)


def test_quantised_weights_are_not_sharded(runs):
    for found in runs[1]:
        assert "expected weights that are not quantised, or in 4 bits" in found["quantised"]


def test_one_process_shards_nothing(runs):
    with pytest.raises(ValueError, match=r"shard: expected several processes, .* got one"):
        finetune(str(runs[0]), "alone", shard=True)


def test_a_lost_process_is_named_and_the_run_resumes(runs):
    folder, _ = runs
    message, other = run(2, losing_one, folder, str(folder))
    assert "another process of the run is gone" in message
    assert "start the run again with --resume" in message
    assert other == ""
    finetune(str(folder), "lost", resume=True)
    assert losses(folder / "lost") == pytest.approx(losses(folder / "one"), FP32_RELATIVE_ERROR)


def test_draws_are_named_by_the_pass_of_the_step():
    """The second of two processes keeps what one process keeps in its second pass."""
    scores = []
    for index in (0, 1, 1):
        model = make_model("llama")
        handle = lemo.enable(
            model, config_of(keep=0.5, block_size=8, scorer="random", dense_layers=())
        )
        handle.begin_step(3, 5)
        handle.begin_pass(index)
        ids = torch.arange(3, 51)[None]
        scores.append(model(ids, labels=ids).loss.item())
    assert scores[1] == scores[2] != scores[0]
    with pytest.raises(ValueError, match="index: expected a number of 0 or more, got -1"):
        handle.begin_pass(-1)
