"""The benchmark of a GPU's idle time, as far as it goes without one."""

import json

import pytest

from common import traces
from common.traces import Span

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


def test_spans_that_overlap_are_one():
    spans = [Span(5, 9, "b"), Span(0, 6, "a"), Span(1, 2, "inside"), Span(12, 13, "c")]
    assert traces.busy(spans) == [Span(0, 9, "a"), Span(12, 13, "c")]
