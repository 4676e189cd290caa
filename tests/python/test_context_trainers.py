"""Trainers whose processes share out the kept rows of a batch, against one process."""

import pytest
import torch

from data_parallel_cases import refusals, train_in_groups
from processes import run
from tolerances import FP32_RELATIVE_ERROR, assert_close_fp32

pytestmark = pytest.mark.cpu_only

KINDS = ("Trainer", "Trainer, generic", "SFTTrainer", "SFTTrainer, completions")
OF_FOUR = ("Trainer", "SFTTrainer")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train_in_groups(str(tmp_path_factory.mktemp("one")), 1, KINDS)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run(2, train_in_groups, folder, str(folder), 2, KINDS)


def check(one, several, kind):
    for found in several:
        expected = one[kind]
        assert found[kind]["sharded"] == found[kind]["parameters"] > 0
        assert found[kind]["losses"] == pytest.approx(expected["losses"], rel=FP32_RELATIVE_ERROR)
        for what in ("trained", "saved"):
            weights = (torch.tensor(run[kind][what]) for run in (found, one))
            assert_close_fp32(*weights, f"{what} weights")
        evaluated = expected["evaluated"]
        assert found[kind]["evaluated"] == pytest.approx(evaluated, rel=FP32_RELATIVE_ERROR)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_that_share_out_rows_train_as_one(one, of_two, kind):
    check(one, of_two, kind)


def test_two_groups_of_two_train_as_one_process(one, tmp_path):
    four = run(4, train_in_groups, tmp_path, str(tmp_path), 2, OF_FOUR)
    for kind in OF_FOUR:
        check(one, four, kind)


def test_trainers_with_other_groups_are_refused(tmp_path):
    for found in run(2, refusals, tmp_path, str(tmp_path)):
        assert "expected cp_size 1, got 2: accelerate would give" in found["lemo knows of no group"]
        assert "expected cp_size 1, got 2: accelerate would give" in found["nothing told"]
        assert "got cp_size 1; set parallelism_config" in found["the trainer knows of no group"]
        assert "expected a trainer that handle.attach" in found["the callback alone"]
        assert "average_tokens_across_devices: expected true" in found["labels of a process"]
        assert "gives 1 processes the same batch, got cp_size 2" in found["a group of one"]
        # Accelerate's own words.
        assert "no `fsdp_plugin` was provided" in found["not sharded"]
        assert found["fits"] == ""
