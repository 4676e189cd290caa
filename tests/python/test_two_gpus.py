"""The script that trains on two GPUs: which lines of a failed run it shows."""

import pytest

import two_gpus

pytestmark = pytest.mark.cpu_only

LAUNCHERS = [
    "E1129 22:26:23.000 8360 torch/distributed/elastic/multiprocessing/api.py:882] failed",
    "Traceback (most recent call last):",
    '  File "torch/distributed/launcher/api.py", line 317, in launch_agent',
    "    raise ChildFailedError(",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
    *("=" * 60 for _ in range(30)),
]
DEEP = [f'  File "module_{i}.py", line {i}, in call' for i in range(100)]


def test_the_first_error_of_a_worker_is_shown_before_the_launchers():
    raised = [
        "[rank1]: Traceback (most recent call last):",
        *(f"[rank1]: {line}" for line in DEEP),
        "[rank1]: ValueError: expected a plugin",
    ]
    shown = two_gpus.first_error(["Loading weights", *raised, *LAUNCHERS])
    assert "[rank1]: ValueError: expected a plugin" in shown
    assert raised[-2] in shown
    assert len(shown) <= two_gpus.LINES_OF_FAILED


def test_tracebacks_of_two_processes_may_be_mixed():
    both = [line for pair in zip(DEEP[:5], DEEP[:5]) for line in pair]
    head = "Traceback (most recent call last):"
    shown = two_gpus.first_error(["begun", head, DEEP[0], head, *both, "KeyError: 1", *LAUNCHERS])
    assert shown[0] == head
    assert "KeyError: 1" in shown


@pytest.mark.parametrize(
    "line",
    [
        "lemo: error: shard: expected several processes",
        "[rank0]:[E1129 22:27:18.96 ProcessGroupNCCL.cpp:689] Watchdog caught collective timeout",
        "terminate called after throwing an instance of 'c10::DistBackendError'",
    ],
)
def test_an_error_without_a_traceback_is_shown(line):
    assert two_gpus.first_error(["begun", line, *LAUNCHERS])[0] == line


def test_the_end_of_a_log_without_errors_is_shown():
    log = [f"step {i}" for i in range(100)]
    assert two_gpus.first_error(log) == log[-two_gpus.LINES_OF_FAILED :]


def test_a_trainer_that_shares_out_rows_is_started_as_accelerate_wants_it():
    """It has context parallelism with its FSDP plugin only."""
    for run in two_gpus.RUNS:
        if run.by != "finetune" and run.groups > 1:
            assert "--use_fsdp" in run.settings
