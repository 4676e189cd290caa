"""Records of steps: when they are complete, logged and shown."""

import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from lemo.training import behind
from lemo.training.behind import Copy
from lemo.training.step_records import StepRecords

pytestmark = pytest.mark.cpu_only


def test_a_record_is_complete_when_the_next_step_has_begun():
    shown, written = [], []
    records = StepRecords(3, None, None)
    records._log = type("Log", (), {"write": lambda self, record: shown.append(record)})()
    loss = torch.tensor(2.5)
    records.begin({"step": 1, "tokens": 10}, loss)
    write = records.when_done(lambda: written.append(1))
    loss += 1  # the next step's
    assert shown == written == []
    records.finish()
    records.finish()
    write()
    [record] = shown
    assert record["loss"] == 2.5
    assert record["seconds"] > 0
    assert record["tokens_per_second"] == 10 / record["seconds"]
    assert written == [1]
    records.begin({"step": 2, "tokens": 10}, torch.tensor(math.nan))
    write = records.when_done(lambda: written.append(2))
    write()
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        records.finish()
    write()
    assert written == [1], "no checkpoint of it"
    assert len(shown) == 1


def test_a_step_takes_the_time_from_the_end_of_the_one_before_to_its_own():
    """However late the host looks at both."""
    shown = []
    records = StepRecords(3, None, None)
    records._log = type("Log", (), {"write": lambda self, record: shown.append(record)})()
    records.begin({"step": 1, "tokens": 10}, torch.tensor(2.5))
    time.sleep(0.1)
    records.begin({"step": 2, "tokens": 10}, torch.tensor(2.5))
    time.sleep(0.3)
    records.finish()
    first, second = (record["seconds"] for record in shown)
    assert first < 0.1 <= second < 0.3


def test_a_record_is_in_the_log_before_its_checkpoint_is_written():
    """Whichever of two threads comes first; a run that goes on from it finds the step there."""
    events = []
    records = StepRecords(3, None, lambda record: events.append("shown"))
    records._log = type("Log", (), {"write": lambda self, record: events.append(record["loss"])})()
    records.begin({"step": 1, "tokens": 10}, torch.tensor(2.5))
    write = records.when_done(lambda: events.append("written"))
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert events == [2.5, "written"]
    records.finish()
    assert events == [2.5, "written", "shown"], "in the main thread, and logged once"


def test_steps_behind_a_loss_that_is_not_finite_are_forgotten(caplog):
    shown = []
    records = StepRecords(3, None, shown.append)
    records._log = type("Log", (), {"write": lambda self, record: shown.append(record)})()
    records.begin({"step": 1, "tokens": 10}, torch.tensor(math.inf))
    records.begin({"step": 2, "tokens": 10}, torch.tensor(2.5))
    with pytest.raises(FloatingPointError, match="step 1: the loss is inf"):
        records.finish()
    records.leave()
    assert shown == []
    records.begin({"step": 3, "tokens": 10}, torch.tensor(math.nan))
    records.leave()
    assert "step 3: the loss is nan" in caplog.text


def test_only_the_process_with_the_log_shows_steps():
    shown = []
    records = StepRecords(3, None, shown.append)
    records.begin({"step": 1, "tokens": 10}, torch.tensor(2.5))
    records.finish()
    assert shown == []


def test_a_step_is_timed_once(monkeypatch):
    """Though the thread that writes its checkpoint completes it, and `finish` comes later."""
    # Before the first step, behind it, where the second one begins, behind that.
    clock, written, shown = iter((0.0, 3.0, 8.0, 15.0)), [], []
    monkeypatch.setattr(behind, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    records = StepRecords(3, None, shown.append)
    records._log = type("Log", (), {"write": lambda self, record: written.append(dict(record))})()
    records.begin({"step": 1, "tokens": 12}, torch.tensor(2.5))
    records.when_done(lambda: None)()
    records.finish()
    records.restart()
    records.begin({"step": 2, "tokens": 12}, torch.tensor(2.5))
    records.finish()
    assert [record["seconds"] for record in written] == [3.0, 7.0]
    assert [record["seconds"] for record in shown] == [3.0, 7.0]
    assert [record["tokens_per_second"] for record in shown] == [4.0, 12 / 7]
    assert [record["seconds_left"] for record in shown] == [2 * 3.0, 1 * 5.0]


def test_no_checkpoint_is_written_of_a_step_that_is_not_in_the_log():
    """The loop comes first, its log fails, and another step is behind it."""
    written = []
    records = StepRecords(3, None, None)

    def full(self, record):
        raise OSError("no space")

    records._log = type("Log", (), {"write": full})()
    records.begin({"step": 1, "tokens": 10}, torch.tensor(2.5))
    records.begin({"step": 2, "tokens": 10}, torch.tensor(2.5))
    write = records.when_done(lambda: written.append(2))
    with pytest.raises(OSError, match="no space"):
        records.finish()
    records.leave()
    with pytest.raises(OSError, match="no space"):
        write()
    assert written == []


def test_an_earlier_step_is_looked_at_while_a_thread_waits_for_a_later_one(monkeypatch):
    shown, done, waits = [], threading.Event(), threading.Event()
    records = StepRecords(3, None, None)
    records._log = type("Log", (), {"write": lambda self, record: shown.append(record["step"])})()
    losses = iter((torch.tensor(1.0), torch.tensor(2.0)))
    records.begin({"step": 1, "tokens": 10}, next(losses))
    records.begin({"step": 2, "tokens": 10}, next(losses))
    later = records._waiting[1].loss

    def wait(self):
        if self is later:
            waits.set()
            assert done.wait(5), "nobody looked at step 1 meanwhile"

    monkeypatch.setattr(Copy, "wait", wait)
    thread = threading.Thread(target=records.when_done(lambda: shown.append("written")))
    thread.start()
    assert waits.wait(5)
    records.finish(leave=1)
    done.set()
    thread.join()
    records.finish()
    assert shown == [1, 2, "written"]
