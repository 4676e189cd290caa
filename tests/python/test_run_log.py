"""The two logs of a run: what a resumed run drops, and what a full disk leaves."""

import json
import math
import resource
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lemo.training.run_log import LOG_NAME, TENSORBOARD_NAME, RunLog, parse_log

pytestmark = pytest.mark.cpu_only


def record_of(step, loss):
    numbers = {"learning_rate": 0.5, "tokens_per_second": 8.0, "peak_memory_bytes": 64}
    kept = [{"attention": 0.25, "mlp": 0.5}, {"attention": 1.0, "mlp": 0.125}]
    return {"step": step, "loss": loss, "kept_share": 0.5, "kept": kept, **numbers}


def test_both_logs_hold_what_json_does_not_know(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(record_of(1, 2.0) | {"tokens_per_second": math.inf})
    log.close()
    RunLog(tmp_path, 1).close()
    text = (tmp_path / LOG_NAME).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["tokens_per_second"] is None


def test_a_resumed_run_goes_on_behind_its_step_in_both_logs(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.write(record_of(step, float(step)))
        # Nothing waits in the process: it may be killed.
        assert len((tmp_path / LOG_NAME).read_bytes().splitlines()) == step
    log.close()
    # TensorBoard reads its files by their names, which hold the second.
    time.sleep(1.0)
    log = RunLog(tmp_path, 2)
    assert [record["step"] for record in parse_log(tmp_path / LOG_NAME)[0]] == [1, 2]
    log.write(record_of(3, 30.0))
    log.close()
    expected = [(1, 1.0), (2, 2.0), (3, 30.0)]
    records, broken = parse_log(tmp_path / LOG_NAME)
    assert [(record["step"], record["loss"]) for record in records] == expected
    assert not broken
    board = EventAccumulator(str(tmp_path / TENSORBOARD_NAME)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == expected
    for tag, value in {
        "kept/attention/000": 0.25,
        "kept/mlp/000": 0.5,
        "kept/attention/001": 1.0,
        "kept/mlp/001": 0.125,
        "peak_memory_bytes": 64,
    }.items():
        assert [(each.step, each.value) for each in board.Scalars(tag)] == [
            (step, value) for step, _ in expected
        ]


def test_a_write_that_the_disk_takes_a_part_of_leaves_nothing(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(record_of(1, 1.0))
    path = tmp_path / LOG_NAME
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=LOG_NAME):
            log.write(record_of(2, 2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    log.write(record_of(2, 2.5))
    log.close()
    assert path.read_bytes() == before + (json.dumps(record_of(2, 2.5)) + "\n").encode()


@pytest.mark.parametrize("kept", [5, [1], {"mlp": 0.5}])
def test_a_record_without_a_list_of_layers_is_named(kept, tmp_path):
    (tmp_path / LOG_NAME).write_text(json.dumps({"step": 1, "loss": 1.0, "kept": kept}) + "\n")
    records, broken = parse_log(tmp_path / LOG_NAME)
    assert not records
    assert broken[1].startswith("field 'kept': expected a list of objects, got ")
