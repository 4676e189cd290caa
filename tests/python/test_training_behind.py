"""What is read and written behind the device: copies as they were, and errors that arrive."""

import json
import math
import sys
import threading
import time
import weakref
from concurrent.futures import wait
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lemo.packing.blocks import BlockLayout
from lemo.selection.statistics import LayerStatistics
from lemo.settings.finetune import FinetuneConfig
from lemo.training import behind, finetune, step_records
from lemo.training.behind import Copy, HostMemory, Joined, Moment, Writer, short_turns
from lemo.training.run_log import _SCALARS, LOG_NAME, RunLog, read_log
from lemo.training.step_records import StepRecords

pytestmark = pytest.mark.cpu_only


def test_a_copy_holds_what_was_there():
    first, second = torch.arange(6.0).view(2, 3), torch.tensor(7)
    value = {"a": first, "b": [second, "text", None], "c": {"d": first[0], "e": 1.5}}
    copy = Copy(value, HostMemory())
    first += 100
    held = copy.value()
    assert torch.equal(held["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(held["c"]["d"], torch.arange(3.0))
    assert held["b"][1:] == ["text", None]
    assert held["b"][0] == 7
    assert held["c"]["e"] == 1.5


def test_turns_are_short_inside_alone():
    before = sys.getswitchinterval()
    with suppress(EOFError), short_turns():
        assert sys.getswitchinterval() == pytest.approx(1e-4, rel=0.02)
        with short_turns():
            assert sys.getswitchinterval() == pytest.approx(1e-4, rel=0.02)
        raise EOFError
    assert sys.getswitchinterval() == before


def test_turns_that_are_shorter_already_stay():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with short_turns():
            assert sys.getswitchinterval() == pytest.approx(1e-5)
    finally:
        sys.setswitchinterval(before)


def test_joined_tensors_come_back_as_one():
    numbers = torch.arange(30.0)
    joined = Joined([numbers[:6].view(2, 3).T, numbers[6], numbers[7:7], numbers[10:14]])
    value = {"a": numbers[20:22], "b": [joined, Joined([torch.tensor(5)])], "c": numbers[22]}
    copy = Copy(value, HostMemory())
    numbers += 100
    held = copy.value()
    assert held["a"].tolist() == [20, 21]
    assert held["b"][0].tolist() == [0, 3, 1, 4, 2, 5, 6, 10, 11, 12, 13]
    assert held["b"][1].tolist() == [5]
    assert held["c"].item() == 22


def test_what_was_read_is_not_where_the_next_copy_goes():
    memory = HostMemory()
    held = Copy([torch.ones(3), torch.ones(2, dtype=torch.int8)], memory).value()
    Copy([torch.zeros(3), torch.zeros(2, dtype=torch.int8)], memory)
    assert all(bool((x == 1).all()) for x in held)


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


def test_a_loss_that_is_nan_is_explained_where_it_is_known():
    for reason in ("layer 2: the scores are nan", None):
        records = StepRecords(3, None, None, lambda reason=reason: reason)
        records.begin({"step": 1, "tokens": 10}, torch.tensor(math.nan))
        text = "" if reason is None else f"{reason}; "
        with pytest.raises(FloatingPointError, match=f"step 1: the loss is nan; {text}earlier"):
            records.finish()


def test_a_copy_takes_one_piece_of_the_device_at_a_time(monkeypatch):
    taken = []
    cat = torch.cat
    monkeypatch.setattr(behind, "_PIECE", 64)
    monkeypatch.setattr(torch, "cat", lambda parts: taken.append(cat(parts)) or taken[-1])
    numbers = torch.arange(400.0)
    value = [
        *numbers[:30].split(3),  # small ones
        numbers[30:130].view(4, 25),  # larger than a piece
        numbers[130:330].view(4, 5, 10).transpose(0, 2),  # not contiguous
        numbers[330:400].view(1, 7, 10).transpose(1, 2),
        numbers[0],
        numbers[:0],
    ]
    held = Copy(value, HostMemory()).value()
    assert all(torch.equal(x, y) for x, y in zip(held, value, strict=True))
    assert taken
    assert max(x.nbytes for x in taken) <= 64


def test_a_copy_keeps_nothing_on_the_device():
    value = {"a": torch.ones(3), "b": [torch.ones(2)]}
    left = [weakref.ref(value["a"]), weakref.ref(value["b"][0])]
    copy = Copy(value, HostMemory())
    del value
    assert [x() for x in left] == [None, None]
    assert torch.equal(copy.value()["a"], torch.ones(3))


@pytest.fixture
def allocated(monkeypatch):
    """Sizes of what is allocated on the host for copies."""
    sizes, empty = [], torch.empty

    def counted(size, **settings):
        sizes.append(size)
        return empty(size, **settings)

    monkeypatch.setattr(behind.torch, "empty", counted)
    return sizes


def test_copies_after_the_first_allocate_nothing(allocated):
    memory = HostMemory()
    value = {"a": torch.arange(5.0), "b": [torch.arange(3), torch.ones(2, 2, dtype=torch.bool)]}
    made = []
    for _ in range(3):
        made.append(Copy(value, memory).value())
        value["a"] += 10
        value["b"][0] += 10
    assert len(allocated) == 1
    for number, held in enumerate(made):
        assert torch.equal(held["a"], torch.arange(5.0) + 10 * number)
        assert torch.equal(held["b"][0], torch.arange(3) + 10 * number)
        assert held["b"][1].all()
    assert Copy({"none": None}, memory).value() == {"none": None}
    assert len(allocated) == 1


def test_copies_that_are_not_read_yet_share_no_memory(allocated):
    """A checkpoint may be made while the one before is still to be written."""
    memory = HostMemory()
    x = torch.arange(4.0)
    first = Copy(x, memory)
    x += 1
    second = Copy(x, memory)
    assert torch.equal(first.value(), torch.arange(4.0))
    x += 1
    third = Copy(x, memory)
    assert len(allocated) == 2
    assert torch.equal(first.value(), torch.arange(4.0)), "asked again, as after an interrupt"
    assert torch.equal(second.value(), torch.arange(4.0) + 1)
    assert torch.equal(third.value(), torch.arange(4.0) + 2)
    larger = Copy(torch.ones(100), memory)
    assert allocated[2:] == [400]
    assert larger.value().sum() == 100


@pytest.mark.parametrize("shard", [False, True])
def test_checkpoints_and_losses_after_the_first_allocate_nothing(
    tmp_path, monkeypatch, on_a_gpu, allocated, shard
):
    saved, walks = [], []
    monkeypatch.setattr(finetune, "gather_object", lambda x: x)
    monkeypatch.setattr(
        finetune, "adapter_weights", lambda x: walks.append(1) or {"w": torch.ones(3)}
    )
    monkeypatch.setattr(finetune, "save_checkpoint", lambda *a, **k: saved.append(a[3:5]))
    monkeypatch.setattr(Run, "_save", finetune._Run._save)

    def act(step):
        while len(saved) < (step - 1) // 2:
            time.sleep(0.001)

    run = Run(act, None, steps=6)
    run.config = run.config.replace(shard=shard)
    run.windows, run.inputs = SimpleNamespace(fingerprint="f"), {}
    run._write_adapter = lambda folder, weights: None
    run.train(tmp_path, 0, None)
    assert len(saved) == 3
    assert all(torch.equal(w["w"], torch.ones(3)) for w, _ in saved)
    # One for checkpoints, and one for the loss of each step that is under way.
    assert len(allocated) == 1 + finetune.AHEAD
    # Found once; shares of weights are gathered for each checkpoint, and at the end.
    assert len(walks) == (4 if shard else 1)


def test_what_was_kept_is_copied_with_the_rest_of_a_checkpoint(tmp_path, monkeypatch):
    """Read by the thread that writes, it would wait for the steps that were issued since."""
    monkeypatch.setattr(finetune, "gather_object", lambda x: x)
    monkeypatch.setattr(finetune, "adapter_weights", lambda x: {"w": torch.ones(3)})
    monkeypatch.setattr(finetune, "save_checkpoint", lambda *a, **k: None)
    run = Run(None, None)
    run.windows, run.inputs = SimpleNamespace(fingerprint="f"), {}
    layout = BlockLayout.from_seqlens([40, 20], 10, "cpu")
    kept = torch.tensor([1, 3, 4])
    run.kept = SimpleNamespace(last=[LayerStatistics(0, 60, 30, 60, kept, None, layout)])
    write = finetune._Run._save(run, tmp_path, 2)
    kept.zero_()  # as it is on the device by now
    write()
    [layer] = json.loads((tmp_path / "kept_map.json").read_text())["layers"]
    assert layer == {"attention": [1, 3], "mlp": [0, 1, 2, 3]}


def full():
    raise OSError("no space left on device")


def test_the_writer_is_asked_for_errors_without_waiting():
    writer, go = Writer(), threading.Event()
    writer.check()
    writer.submit(lambda: go.wait(10) and full())
    writer.check()
    go.set()
    wait([writer._last], 10)
    with pytest.raises(OSError, match="no space"):
        writer.check()
    writer.check()
    writer.close()


def test_a_writer_that_is_closed_logs_the_error_that_nobody_gets(caplog):
    writer = Writer()
    writer.submit(full)
    writer.close()
    assert "no space left on device" in caplog.text
    caplog.clear()
    writer = Writer()
    writer.submit(full)
    with pytest.raises(OSError, match="no space"):
        writer.wait()
    writer.close()
    assert not caplog.text, "it was raised"


def test_an_interrupt_while_a_file_is_waited_for_hides_no_error(monkeypatch, caplog):
    def fail():
        raise OSError("no space")

    def interrupted(futures):
        raise KeyboardInterrupt

    writer = Writer()
    writer.submit(fail)
    monkeypatch.setattr(behind, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.wait()
    writer.close()
    assert "a file could not be written: no space" in caplog.text


def test_an_interrupt_at_the_first_file_leaves_no_thread_alone(monkeypatch):
    """A thread that has started, but is not known yet, would write on behind the end of a run."""
    writer, done, start = Writer(), [], threading.Thread.start

    def write():
        time.sleep(0.2)
        done.append(1)

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with suppress(KeyboardInterrupt):
        writer.submit(write)
    writer.close()
    assert done == [1]


class Run(finetune._Run):
    """The loop of a run on a GPU whose steps and files are functions of the test."""

    def __init__(self, act, write, steps=4, save_every=2, main=True):
        self.act, self.write, self.saved = act, write, []
        self.config = FinetuneConfig(
            model="m", documents="d", output="o", steps=steps, save_every=save_every
        )
        self.accelerator = SimpleNamespace(
            is_main_process=main,
            device=torch.device("cuda"),
            num_processes=1,
            wait_for_everyone=lambda: None,
            scaler=None,
        )
        self.plan = self.handle = self.windows = self.peft_model = None
        self.kept = SimpleNamespace(last=None)
        self.host_memory = HostMemory()
        self.optimizer = SimpleNamespace(state_dict=lambda: {"a": torch.ones(2)})

    def _batches(self, done):
        return iter(())

    def _step(self, step, batches):
        loss = self.act(step)
        record = dict.fromkeys(_SCALARS, 0.0) | {"step": step, "tokens": 1, "kept": []}
        return record, torch.tensor(1.0 if loss is None else loss)

    def _save(self, folder, step):
        def write():
            self.write(step)
            self.saved.append(step)

        return write


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(finetune.memory, "reset_peak", lambda device: None)
    monkeypatch.setattr(step_records, "Moment", lambda device: Moment(torch.device("cpu")))
    monkeypatch.setattr(finetune, "prefetched", lambda *a: (x for x in ()))
    monkeypatch.setattr(finetune, "get_int_from_env", lambda *a: 1)


def logged(folder) -> list[int]:
    return [record["step"] for record in read_log(folder / LOG_NAME)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError, SystemExit])
def test_a_finished_step_outlives_an_error_of_the_next_one(tmp_path, on_a_gpu, error):
    def act(step):
        if step == 4:
            raise error

    run = Run(act, lambda step: None)
    with pytest.raises(error):
        run.train(tmp_path, 0, None)
    assert logged(tmp_path) == [1, 2, 3]
    assert run.saved == [2]


def test_a_checkpoint_does_not_wait_for_the_next_step(tmp_path, on_a_gpu):
    written = threading.Event()

    def act(step):
        if step == 3:
            assert written.wait(5), "a kill would lose it"
            raise EOFError

    run = Run(act, lambda step: written.set())
    with pytest.raises(EOFError):
        run.train(tmp_path, 0, None)


def test_the_next_step_begins_while_one_with_a_checkpoint_runs(tmp_path, on_a_gpu, monkeypatch):
    """Waiting for it would leave the GPU without work until the host has issued the next one."""
    value, began = Copy.value, threading.Event()

    def slow(self):
        # The device has done step 2 only when the host has issued step 3.
        result = value(self)
        assert result.item() != 2 or began.wait(5)
        return result

    def act(step):
        if step == 3:
            assert not run.saved
            began.set()
        return float(step)

    monkeypatch.setattr(Copy, "value", slow)
    run = Run(act, lambda step: None)
    run._adapter_weights = dict
    run._write_adapter = lambda folder, weights: None
    run.train(tmp_path, 0, None)
    assert run.saved == [2, 4]
    assert logged(tmp_path) == [1, 2, 3, 4]


def test_weights_that_are_not_finite_are_the_error_though_a_loss_follows(tmp_path, on_a_gpu):
    """The checkpoint is of a step before, whenever it gets written."""
    followed = threading.Event()

    def act(step):
        if step == 3:
            followed.set()
            return math.nan
        return None

    def write(step):
        assert followed.wait(5)
        time.sleep(0.1)
        raise FloatingPointError("the trained weights are not finite")

    with pytest.raises(FloatingPointError, match="the trained weights are not finite"):
        Run(act, write).train(tmp_path, 0, None)
    assert logged(tmp_path) == [1, 2]


def test_an_interrupt_while_the_host_waits_loses_nothing(tmp_path, on_a_gpu, monkeypatch):
    value, times = Copy.value, []

    def interrupted(self):
        if threading.current_thread() is threading.main_thread():
            times.append(1)
            if len(times) == 2:
                raise KeyboardInterrupt
        return value(self)

    monkeypatch.setattr(Copy, "value", interrupted)
    run = Run(lambda step: None, lambda step: None)
    with pytest.raises(KeyboardInterrupt):
        run.train(tmp_path, 0, None)
    assert logged(tmp_path) == [1, 2, 3]
    assert run.saved == [2]


def test_the_host_issues_two_steps_before_it_looks_at_one(tmp_path, on_a_gpu, monkeypatch):
    """So a delay of less than a step leaves no GPU without work."""
    value, events = Copy.value, []

    def noted(self):
        result = value(self)
        events.append(f"loss of {result.item():g}")
        return result

    def act(step):
        events.append(f"issue {step}")
        return float(step)

    monkeypatch.setattr(Copy, "value", noted)
    run = Run(act, None, steps=5, save_every=5)
    run._adapter_weights = run._write_adapter = lambda *a: {}
    run._save = lambda folder, step: lambda: None
    run.train(tmp_path, 0, None)
    begun = events[: events.index("issue 5")]
    assert begun == [f"issue {n}" for n in (1, 2, 3)] + ["loss of 1", "issue 4", "loss of 2"]
    assert logged(tmp_path) == [1, 2, 3, 4, 5]


def test_no_checkpoint_is_written_behind_a_loss_that_is_not_finite(tmp_path, on_a_gpu):
    """The thread that writes comes first; the next losses may well be finite again."""
    held = threading.Event()

    def act(step):
        if step == 5:
            held.wait(0.5)
        return math.nan if step == 3 else None

    run = Run(act, lambda step: held.set(), steps=6)
    with pytest.raises(FloatingPointError, match="step 3"):
        run.train(tmp_path, 0, None)
    assert run.saved == [2]
    assert logged(tmp_path) == [1, 2]


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, on_a_gpu, caplog):
    run = Run(lambda step: math.nan if step == 2 else None, lambda step: None)
    with pytest.raises(FloatingPointError, match="step 2"):
        run.train(tmp_path, 0, None)
    assert run.saved == []
    assert logged(tmp_path) == [1]

    def act(step):
        if step == 2:
            raise EOFError
        return math.nan

    with pytest.raises(EOFError):
        Run(act, lambda step: None).train(tmp_path, 0, None)
    assert logged(tmp_path) == []
    assert "step 1: the loss is nan" in caplog.text, "said, though another error ends the run"


def test_a_checkpoint_that_failed_stops_the_run_at_the_next_step(tmp_path, on_a_gpu):
    began = []

    def act(step):
        began.append(step)
        if step > 50:
            failed.wait(10)
            time.sleep(0.02)

    failed = threading.Event()

    def write(step):
        failed.set()
        full()

    with pytest.raises(OSError, match="no space"):
        Run(act, write, steps=100, save_every=50).train(tmp_path, 0, None)
    assert began[-1] < 60
    assert logged(tmp_path) == began


@pytest.mark.parametrize("main", [True, False])
def test_all_processes_gather_and_the_main_one_copies(tmp_path, monkeypatch, main):
    gathered, copied = [], []
    monkeypatch.setattr(finetune, "gather_object", lambda x: gathered.append("random") or x)
    monkeypatch.setattr(finetune, "whole", lambda x: gathered.append("optimizer") or x)
    monkeypatch.setattr(finetune, "adapter_weights", lambda x: gathered.append("weights") or {})
    monkeypatch.setattr(finetune, "Copy", lambda value, memory: copied.append(value))
    run = Run(None, None, main=main)
    write = finetune._Run._save(run, tmp_path, 2)
    assert sorted(gathered) == ["optimizer", "random", "weights"]
    assert len(copied) == main
    assert callable(write) == main


def test_a_checkpoint_that_runs_out_of_memory_is_explained(tmp_path, on_a_gpu):
    def fails(folder, step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = Run(lambda step: None, None)
    run._save = fails
    with pytest.raises(MemoryError, match=r"step 2: CUDA out of memory; .*no checkpoint yet"):
        run.train(tmp_path, 0, None)
    assert logged(tmp_path) == [1]


def test_a_step_is_one_event_however_many_layers_there_are(tmp_path):
    """The host writes them while the GPU works on the next step, which may be as short."""
    log = RunLog(tmp_path, 0)
    record = dict.fromkeys(_SCALARS, 0.5) | {"kept": [{"attention": 0.25, "mlp": 0.75}] * 40}
    for step in (1, 2):
        log.write(record | {"step": step})
    log.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    events = [e for e in EventFileLoader(str(file)).Load() if e.HasField("summary")]
    assert [event.step for event in events] == [1, 2]
    for event in events:
        assert len({value.tag for value in event.summary.value}) == len(_SCALARS) + 2 * 40
