"""What a run of several processes refuses before it begins; test_two_processes.py has the runs."""

import logging
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from torch import distributed

from data_parallel_cases import as_torchrun
from lemo.settings.finetune import FinetuneConfig
from lemo.training.processes import check_passes, enter_folder, of_main
from lemo.training.run_folder import writing
from lemo.training.sharding import check_sharding
from processes import run

pytestmark = pytest.mark.cpu_only

# By two processes with two forward passes of each in a step.
CHECKPOINT = SimpleNamespace(num_processes=2, gradient_accumulation=2, folder="runs/a/step-2")


def config(**settings):
    needed = {"model": "m", "documents": "d", "output": "o", "context_length": 64, "steps": 4}
    return FinetuneConfig.from_dict(needed | settings)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_goes_on_with_as_many_passes_in_a_step(processes, accumulation, dropout, caplog):
    resumed = config(gradient_accumulation=accumulation, lora_dropout=dropout)
    with caplog.at_level(logging.WARNING, "lemo"):
        check_passes(CHECKPOINT, resumed, processes)
    other_draws = dropout > 0 and processes != 2
    wanted = f"{processes} processes draw other dropout than the 2 that wrote runs/a/step-2"
    assert [wanted in message for message in caplog.messages] == [True] * other_draws


@pytest.mark.parametrize(
    ("processes", "accumulation", "hint"),
    [
        (1, 2, "expected gradient_accumulation 4, got 1 processes with 2"),
        (4, 2, "expected gradient_accumulation 1, got 4 processes with 2"),
        (3, 2, "expected a number of processes that divides 4, got 3 processes with 2"),
    ],
)
def test_a_run_with_other_passes_in_a_step_is_told_what_fits(processes, accumulation, hint):
    with pytest.raises(ValueError, match=f"4 in all; {hint}"):
        check_passes(CHECKPOINT, config(gradient_accumulation=accumulation), processes)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_weights_in_fp16_are_not_sharded(precision):
    accelerator = SimpleNamespace(num_processes=2, mixed_precision=precision)
    arguments = config(shard=True, elimination=None), SimpleNamespace(), accelerator
    if precision != "fp16":
        check_sharding(*arguments)
        return
    with pytest.raises(ValueError, match="shard: expected dtype bfloat16 or float32, got float16"):
        check_sharding(*arguments)


def _refused(folder):
    """What a process of two raises where the main one alone meets an error."""
    as_torchrun()
    PartialState(cpu=True)
    main = distributed.get_rank() == 0
    accelerator = SimpleNamespace(is_main_process=main, num_processes=2)

    def compute():
        assert main
        raise ValueError("no plan")

    with pytest.raises(ValueError, match="^no plan$"):
        of_main(compute, accelerator)
    with ExitStack() as stack:
        if main:
            stack.enter_context(writing(Path(folder)))
        with pytest.raises(BlockingIOError):
            enter_folder(Path(folder), accelerator, stack)


def test_an_error_of_the_main_process_is_raised_by_all(tmp_path):
    run(2, _refused, tmp_path, str(tmp_path / "run"))
