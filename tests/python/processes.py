"""Functions run in several processes of one gloo group, for tests of training on several GPUs.

The processes are forked from a server that has imported what takes seconds, so that each of them
costs little.
"""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

_SECONDS = 120


def in_processes(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """What function(*arguments) returns in each of `count` processes, in order of rank.

    Args:
        function: of a module that is no test.
        count: processes; torch.distributed is set up in each, on the CPU.
        arguments: the same for all; they and the results can be pickled.

    Raises:
        AssertionError: one of them raised, or they did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, function.__module__])
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        started = [
            context.Process(target=_run, args=(function, rank, count, store, arguments, results))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        try:
            found = _collect(started, results)
        finally:
            for process in started:
                process.kill()
                process.join()
    return [found[rank] for rank in range(count)]


def _collect(started: list[Any], results: Any) -> dict[int, Any]:
    found: dict[int, Any] = {}
    while len(found) < len(started):
        assert results._reader.poll(_SECONDS), "the processes did not end in time"
        rank, error, result = results.get()
        assert error is None, f"process {rank}: {error}"
        found[rank] = result
    return found


def _run(
    function: Callable[..., Any],
    rank: int,
    count: int,
    store: str,
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, count),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=_SECONDS),
    )
    try:
        results.put((rank, None, function(*arguments)))
        torch.distributed.barrier()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        torch.distributed.destroy_process_group()
