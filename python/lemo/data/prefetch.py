"""Windows tokenized ahead of the steps that need them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lemo.data.batches import TrainingBatch, collate
from lemo.data.examples import ExampleWindows
from lemo.data.windows import TokenWindows

# A window of 16384 tokens takes a core some 0.05 s (docs/LOG.md, 2026-11-28): a small model's step
# over eight of them is shorter than that.
_MOST_THREADS = 8


def tokenizing_threads(processes: int = 1) -> int:
    """Half of the cores that each of ``processes`` on this machine has, 1 to 8."""
    cores = len(os.sched_getaffinity(0)) // processes
    return min(max(cores // 2, 1), _MOST_THREADS)


def prefetched(
    windows: TokenWindows | ExampleWindows, batches: Iterable[Sequence[int]], threads: int
) -> Generator[TrainingBatch]:
    """Each batch of windows, in order, while threads tokenize the ones behind it.

    Tokenizers of Hugging Face's ``tokenizers`` let other threads run meanwhile. Two
    windows a thread are under way beyond the batch that is asked for.

    Args:
        windows: what is tokenized.
        batches: the numbers of the windows of each batch.
        threads: how many tokenize at a time.

    Raises:
        ValueError: from :meth:`TokenWindows.window`, at the batch that it concerns.
    """
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="tokenize")
    waiting: deque[list[Future[Any]]] = deque()
    behind = 0  # windows under way after those of the next batch
    try:
        for batch in batches:
            behind += len(batch) if waiting else 0
            waiting.append([pool.submit(windows.window, index) for index in batch])
            while behind >= 2 * threads:
                first = waiting.popleft()
                behind -= len(waiting[0])
                yield _collated(first)
        while waiting:
            yield _collated(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _collated(futures: list[Future[Any]]) -> TrainingBatch:
    return collate([future.result() for future in futures])
