"""What is read and written behind the device: copies as they were, and errors that arrive."""

import math
import threading

import pytest
import torch

from lemo.training.behind import Copy, Writer
from lemo.training.step_records import StepRecords

pytestmark = pytest.mark.cpu_only


def test_a_copy_holds_what_was_there():
    first, second = torch.arange(6.0).view(2, 3), torch.tensor(7)
    value = {"a": first, "b": [second, "text", None], "c": {"d": first[0], "e": 1.5}}
    copy = Copy(value)
    first += 100
    held = copy.value()
    assert torch.equal(held["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(held["c"]["d"], torch.arange(3.0))
    assert held["b"][1:] == ["text", None]
    assert held["b"][0] == 7
    assert held["c"]["e"] == 1.5
    tensors = (held["a"], held["b"][0], held["c"]["d"])
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == 3, "each its own"


def test_the_writer_works_beside_and_passes_errors_on():
    writer, go, done = Writer(), threading.Event(), []

    def write():
        assert go.wait(10)
        done.append(1)

    def full():
        raise OSError("no space left on device")

    writer.submit(write)
    assert done == []
    go.set()
    writer.submit(full)
    assert done == [1]
    with pytest.raises(OSError, match="no space"):
        writer.wait()
    writer.wait()
    writer.close()


def test_a_record_is_complete_when_the_next_step_has_begun():
    shown, written = [], []
    records = StepRecords(3, None, None)
    records._log = type("Log", (), {"write": lambda self, record: shown.append(record)})()
    loss = torch.tensor(2.5)
    records.begin({"step": 1, "tokens": 10}, loss, lambda: written.append(1))
    loss += 1  # the next step's
    assert shown == written == []
    records.finish()
    records.finish()
    [record] = shown
    assert record["loss"] == 2.5
    assert record["seconds"] > 0
    assert record["tokens_per_second"] == 10 / record["seconds"]
    assert written == [1]
    records.begin({"step": 2, "tokens": 10}, torch.tensor(math.nan), lambda: written.append(2))
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        records.finish()
    assert written == [1], "no checkpoint of it"
