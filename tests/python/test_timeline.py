"""The benchmark of a GPU's idle time, as far as it goes without one."""

import gc
import json
import threading
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import timeline
from common import stacks, traces
from common.traces import Span
from lemo.training.behind import Copy, HostMemory, Writer

pytestmark = pytest.mark.cpu_only


def event(kind, name, begin, length):
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": length}


def test_idle_time_and_its_causes(tmp_path):
    events = [
        event("kernel", "a", 0, 100),
        event("gpu_memcpy", "copy", 50, 100),  # runs beside a, until 150
        event("kernel", "b<int>(float)", 170, 30),
        event("kernel", "c", 202, 98),  # a gap too short to have a cause
        event("kernel", "d", 400, 100),
        event("cuda_runtime", "cudaStreamSynchronize", 295, 80),
        event("cuda_runtime", "cudaLaunchKernel", 150, 20),
        event("cpu_op", "aten::add", 300, 90),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = traces.summary(*traces.read_trace(path))
    assert found["milliseconds"] == 0.5
    assert found["idle"] == pytest.approx((20 + 2 + 100) / 500)
    assert found["short_gaps"] == pytest.approx(2 / 500)
    assert found["gaps"] == {"cudaStreamSynchronize": [0.1, 1], "Python, before b": [0.02, 1]}


def test_a_trace_without_times_is_refused():
    spans = traces.spans_of(event("kernel", name, 0.0, 0.0) for name in "ab")
    with pytest.raises(ValueError, match="expected times of 2 kernels"):
        traces.summary(*spans)


def test_spans_that_overlap_are_one():
    spans = [Span(5, 9, "b"), Span(0, 6, "a"), Span(1, 2, "inside"), Span(12, 13, "c")]
    assert traces.busy(spans) == [Span(0, 9, "a"), Span(12, 13, "c")]


def call(name, begin, length, thread=7):
    return event("python_function", name, begin, length) | {"pid": 7, "tid": thread}


def test_gaps_are_told_by_what_the_loop_had_called():
    events = [
        call("lemo/training/finetune.py(345): train", 0, 10_000),
        call("/home/x/lemo/training/finetune.py(430): _step", 100, 3_900),
        call("lemo/models/cuda_graphs.py(120): run", 100, 1_900),
        call("lemo/models/cuda_graphs.py(370): load", 300, 500),
        call("<built-in method copy_ of Tensor object at 0x7f>", 310, 450),
        call("torch/autograd/__init__.py(9): backward", 2_000, 1_500),
        call("lemo/training/finetune.py(500): _save", 5_000, 2_000),
        call("/x/site-packages/torch/functional.py(3): split", 8_000, 900),
        call("<built-in method split of type object at 0x7f>", 8_100, 700),
        # Backward runs in a thread of autograd.
        call("torch/autograd/function.py(300): apply", 2_050, 1_000, thread=8),
        call("lemo/models/cuda_graphs.py(450): backward", 2_100, 900, thread=8),
        # A thread that writes.
        call("lemo/training/checkpoint.py(70): save_checkpoint", 5_500, 1_000, thread=9),
        call("lemo/training/checkpoint.py(260): _to_bytes", 6_000, 100, thread=9),
        call("lemo/training/behind.py(190): wait", 6_600, 3_000, thread=9),
        call("<built-in method acquire of _thread.lock object at 0x7f>", 6_650, 2_900, thread=9),
        {"ph": "M", "name": "process_name"},
    ]
    kernels = [
        (0, 400),
        (800, 2200),
        (2600, 5000),
        (5800, 7000),
        (10_000, 12_000),
        (13_000, 13_100),
    ]
    on_gpu = [Span(begin, end, "k") for begin, end in kernels]
    found = stacks.frames_of_gaps(on_gpu, *stacks.frames_of_threads(events))
    step = "training/finetune.py:430 _step"
    assert list(found["loop"].items()) == [
        ("training/finetune.py:345 train", [2.25, 1]),
        ("not in lemo", [1.0, 1]),
        ("training/finetune.py:500 _save", [0.8, 1]),
        # In two of the eight places of the gap from 7000 to 10000.
        ("training/finetune.py:345 train > torch/functional.py:3 split", [0.75, 1]),
        (f"{step} > models/cuda_graphs.py:450 backward", [0.4, 1]),
        (f"{step} > models/cuda_graphs.py:370 load > built-in method copy_", [0.35, 1]),
        (f"{step} > models/cuda_graphs.py:370 load", [0.05, 1]),
    ]
    # In three of the eight places of the gap from 5000 to 5800.
    assert found["beside"] == {"training/checkpoint.py:70 save_checkpoint": [0.3, 1]}


def test_a_gap_is_shared_out_to_what_the_loop_was_in():
    events = [
        call("lemo/training/finetune.py(345): train", 0, 900),
        call("lemo/a.py(1): first", 100, 300),
        call("lemo/b.py(2): second", 400, 400),
    ]
    on_gpu = [Span(0, 100, "k"), Span(900, 950, "k")]
    found = stacks.frames_of_gaps(on_gpu, *stacks.frames_of_threads(events))
    assert found["loop"] == {
        "b.py:2 second": [0.4, 1],
        "a.py:1 first": [0.3, 1],
        "training/finetune.py:345 train": [0.1, 1],
    }
    assert found["beside"] == {}


def test_calls_of_the_runtime_are_summed():
    times = {"cudaGraphLaunch": (300, 700), "cudaLaunchKernel": (5,)}
    events = [event("cuda_runtime", n, 0, us) for n, all_ in times.items() for us in all_]
    assert stacks.runtime_calls([*events, event("kernel", "k", 0, 9)]) == {
        "cudaGraphLaunch": [1.0, 2, 0.7],
        "cudaLaunchKernel": [0.01, 1, 0.005],
    }


def test_stacks_are_read_as_this_torch_writes_them(tmp_path):
    """Frames of the loop that began before the profile, and those of another thread."""

    def train():
        writer = Writer()
        watched = profile(activities=[ProfilerActivity.CPU], with_stack=True)
        watched.start()
        go = threading.Event()
        writer.submit(lambda: go.wait(10) and HostMemory().take(8, False))
        Copy([torch.ones(3)] * 200, HostMemory())
        go.set()
        writer.wait()
        watched.stop()
        writer.close()
        watched.export_chrome_trace(str(tmp_path / "trace.json"))

    train()
    events = traces.read_events(tmp_path / "trace.json")
    loop, others = stacks.frames_of_threads(events)
    copies = [f for f in loop if f.name.startswith("training/behind.py:") and "__init__" in f.name]
    copied = max(copies, key=lambda frame: frame.end - frame.begin)
    inner = [f for f in loop if copied.begin <= f.begin and f.end <= copied.end]
    assert any(f.name.endswith(" _to_host") for f in inner)
    of_others = [frame.name for frames in others for frame in frames]
    own = [name.split()[1] for name in of_others if name.startswith("training/behind.py:")]
    assert own == ["__init__", "take"]
    assert "~built-in method acquire" in of_others, "as waiting threads are told"
    on_gpu = [Span(0, copied.begin, "k"), Span(copied.end, copied.end + 9, "k")]
    found = stacks.frames_of_gaps(on_gpu, loop, others)["loop"]
    assert sum(ms for ms, _ in found.values()) == pytest.approx(
        (copied.end - copied.begin) / 1e3, abs=0.05
    )
    assert all(name.startswith(copied.name) for name in found)


def test_garbage_collections_are_timed_while_they_count():
    collections = timeline.Collections()
    gc.callbacks.append(collections)
    try:
        gc.collect()
        assert collections.found == [0.0, 0, 0.0]
        collections.counts = True
        gc.collect()
        gc.collect()
    finally:
        gc.callbacks.remove(collections)
    total, count, most = collections.found
    assert count == 2
    assert 0 < most < total


def test_each_profiler_sees_its_own_steps(monkeypatch, tmp_path):
    """Which steps have which profiler, and which are timed without one."""
    running, seen = [], {}

    class Profiler:
        def __init__(self, activities, with_stack=False):
            kinds = [activity.name for activity in activities]
            self.name = "stacks" if with_stack else "calls" if "CPU" in kinds else "kernels"

        def start(self):
            running.append(self.name)

        def stop(self):
            running.remove(self.name)

        __enter__ = start

        def __exit__(self, *error):
            self.stop()

        def export_chrome_trace(self, path):
            Path(path).write_text(self.name)

    def finetune(config, watch):
        for step in range(1, config.steps + 1):
            seen.setdefault(" ".join(running), []).append(step)
            watch({"step": step, "seconds": 1.0 if running else 10.0})

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: torch.zeros(*sizes))
    monkeypatch.setattr("lemo.training.finetune.finetune", finetune)
    paths = ["--model", str(tmp_path), "--documents", str(tmp_path)]
    kept = tmp_path / "kept.json"
    counts = ["--steps", "5", "--save-every", "2", "--trace", str(kept)]
    options = timeline.parse_arguments([*paths, *counts])
    found = timeline.watched_run(options, tmp_path)
    assert seen == {
        "": [*range(1, 14), 23, 24, 25],
        "kernels": [14, 15, 16, 17, 18],
        "calls": [19, 20],
        "stacks": [21, 22],
    }
    assert found.seconds == 50.0
    assert [path.read_text() for path in found.traces] == ["kernels", "calls", "stacks"]
    assert kept.read_text() == "calls"
