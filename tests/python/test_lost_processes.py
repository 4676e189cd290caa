"""What ends a process that waits in NCCL for another one that is gone; NCCL itself needs GPUs."""

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch import distributed

from lemo.training import processes
from processes import run

pytestmark = pytest.mark.cpu_only

# Waits without an end, as for a GPU, while a group says what NCCL's say: the given words, in turn.
WAITING = """
import sys, time
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from torch._C._distributed_c10d import ErrorType
from lemo.training import processes

said = [getattr(ErrorType, name) for name in sys.argv[2:]]
said = chain(said, repeat(said[-1]))
processes._PAUSE = 0.1
processes._errors = lambda: [lambda: ErrorType.SUCCESS, lambda: next(said)]
with processes.naming_lost_processes(Path("runs/a")):
    time.sleep(float(sys.argv[1]))
print("came to the end")
"""


def waiting(seconds, *said):
    command = [sys.executable, "-c", WAITING, str(seconds), *said]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("error", ["TIMEOUT", "COMM_ERROR", "REMOTE_ERROR"])
def test_a_process_that_waits_for_a_lost_one_is_ended(error):
    begun = time.monotonic()
    ended = waiting(100, "SUCCESS", "SUCCESS", error)
    assert time.monotonic() - begun < 90
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("lemo: error")]
    assert "processes: another process of the run is gone" in line
    assert "the checkpoints in 'runs/a' are whole: start the run again with --resume" in line


def test_a_process_is_left_alone_as_long_as_nothing_is_wrong():
    ended = waiting(0.5, "SUCCESS")
    assert (ended.returncode, ended.stdout) == (0, "came to the end\n")


def _kept_waiting():
    """What the first of two processes raises, which waits for the other one for too long."""
    group = distributed.new_group(timeout=timedelta(seconds=1))
    said = ""
    if distributed.get_rank() == 0:
        with pytest.raises(ConnectionError) as caught, processes.naming_lost_processes(Path("a")):
            distributed.barrier(group)
        assert "Timed out" in str(caught.value.__cause__)
        said = str(caught.value)
    distributed.barrier()
    return said


def test_a_process_that_was_kept_waiting_says_so(tmp_path):
    said, _ = run(2, _kept_waiting, tmp_path)
    assert "or has kept this one waiting for the timeout of their group" in said
    assert "the checkpoints in 'a' are whole: start the run again with --resume" in said


def test_other_errors_of_torch_stay_as_they_are():
    with (
        pytest.raises(RuntimeError, match="^shapes differ$"),
        processes.naming_lost_processes(Path("a")),
    ):
        raise RuntimeError("shapes differ")


def _asked():
    backends = [backend for backend, _ in distributed.distributed_c10d._world.pg_map.values()]
    return backends, len(processes._errors())


def test_gloo_has_no_errors_to_tell(tmp_path):
    assert processes._errors() == []
    assert run(1, _asked, tmp_path) == [(["gloo"], 0)]


class _Group:
    """A group of two kinds of devices, of which NCCL's is asked."""

    _device_types = ("cuda", "cpu")

    def _get_backend(self, kind):
        nccl = type("ProcessGroupNCCL", (), {"get_error": lambda self: "an error"})
        return nccl() if kind == "cuda" else object()


def test_every_group_is_asked(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.distributed_c10d, "_pg_map", {_Group(): 0, _Group(): 1})
    assert [error() for error in processes._errors()] == ["an error"] * 2


def test_the_run_is_watched_and_then_not(monkeypatch):
    looks = []
    monkeypatch.setattr(processes, "_PAUSE", 0.01)
    monkeypatch.setattr(processes, "_errors", lambda: looks.append(1) or [])
    with processes.naming_lost_processes(Path("runs/a")):
        time.sleep(0.2)
    seen = len(looks)
    time.sleep(0.1)
    assert seen > 1
    assert len(looks) == seen
