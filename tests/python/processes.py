"""Groups of processes that tests start, with gloo on the CPU."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import torch.distributed as dist

# Whatever a test does wrong, its processes do not wait for each other longer.
_PATIENCE = timedelta(seconds=60)

# Seconds that a process has to tell of its error behind another one's.
_MOMENT = 1.0

_MEETING = "meeting"
_STACKS = "stacks"

# Started once; the processes are copies of it, which have imported what takes seconds. It has one
# thread, as what is copied should: pyarrow's allocator would start another one.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
_server = get_context("forkserver")
_server.set_forkserver_preload(
    [
        "lemo.training.finetune",
        "torch.distributed.tensor",
        "torch.utils.tensorboard",
        "transformers.models.llama.modeling_llama",
    ]
)


def run(count: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of `count` processes of one group.

    Args:
        count: how many processes.
        function: of a module, so that they can import it.
        folder: where they meet.
        arguments: for each process; they can be pickled.

    Raises:
        AssertionError: some process raised an error, or ended without a result.
    """
    (folder / _MEETING).unlink(missing_ok=True)
    results = _server.Queue()
    processes = [
        _server.Process(
            target=_member, args=(results, rank, count, str(folder), function, arguments)
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, value, error = results.get(timeout=2 * _PATIENCE.total_seconds())
            if error is not None:
                raise AssertionError(_all_told(processes, {rank: error}, results, folder))
            found[rank] = value
    except Empty:
        raise AssertionError(_all_told(processes, {}, results, folder)) from None
    finally:
        for process in processes:
            process.join(0 if len(found) < count else None)
            process.kill()
    return [found[rank] for rank in range(count)]


def _all_told(processes: list[Any], errors: dict[int, str], results: Any, folder: Path) -> str:
    """The errors of all processes, and how the others ended, or where their threads are now."""
    # The one that lost another may tell of it before that one tells why.
    with suppress(Empty):
        while len(errors) < len(processes):
            rank, _, error = results.get(timeout=_MOMENT)
            if error is not None:
                errors[rank] = error
    told = [f"process {rank}: {error}" for rank, error in errors.items()]
    for rank, process in enumerate(processes):
        if rank in errors:
            continue
        process.join(_MOMENT)
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            process.join(_MOMENT)
        code = "is alive" if process.exitcode is None else f"ended with {process.exitcode}"
        stacks = folder / f"{_STACKS}{rank}"  # none where it ended before it began
        told.append(f"process {rank} {code}\n{stacks.read_text() if stacks.exists() else ''}")
    return "\n".join(told)


def _member(results, rank, count, folder, function, arguments):
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Read where another process tells of an error: this one may have died, or wait.
    with open(f"{folder}/{_STACKS}{rank}", "w") as stacks:
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/{_MEETING}",
                rank=rank,
                world_size=count,
                timeout=_PATIENCE,
            )
            results.put((rank, function(*arguments), None))
            dist.destroy_process_group()
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
