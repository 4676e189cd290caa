"""Memory of the host for activations: one pool, never larger than it was said to be."""

from __future__ import annotations

import mmap
import weakref
from bisect import insort
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lemo.planner.memory import HOST_ALIGNMENT
from lemo.planner.text import bytes_text

__all__ = ["HostPool", "Slot", "check_free", "free_host_bytes"]

# Pages are pinned so many bytes at a time, when the first of them are taken.
_SEGMENT = 2**30


class Slot(NamedTuple):
    """A part of the pool.

    Attributes:
        runs: (first byte, behind the last byte) of each piece.
        pieces: uint8, the same memory, in the order of the bytes that it holds.
    """

    runs: tuple[tuple[int, int], ...]
    pieces: tuple[Tensor, ...]


class HostPool:
    """Memory that is reserved once; its pages are pinned when they are first taken, and stay so.

    The lowest free bytes are taken first, so what is pinned is what was needed at a time.

    Attributes:
        capacity: bytes, at most what was asked for.
        most: bytes that were taken at a time.

    Args:
        capacity: bytes.
        pinned: whether a GPU copies to and from it.

    Raises:
        ValueError: the host does not have so much memory free.
    """

    def __init__(self, capacity: int, pinned: bool) -> None:
        check_free(capacity)
        self.capacity = capacity // HOST_ALIGNMENT * HOST_ALIGNMENT
        self._taken = self.most = 0
        self._returned: deque[Slot] = deque()
        self._is_pinned = pinned
        self._free = [(0, self.capacity)] if self.capacity else []
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        if self.capacity:
            # Of pages that exist once they are touched; the allocator of pinned memory that torch
            # has would round sizes up to a power of two.
            reserved = mmap.mmap(-1, self.capacity, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                reserved.madvise(mmap.MADV_HUGEPAGE)
            self._memory = torch.frombuffer(reserved, dtype=torch.uint8)
        self._pinned: dict[int, Tensor] = {}
        # At the end of the process the system frees it all.
        weakref.finalize(self, _unpin, self._pinned).atexit = False

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("a pool of the host's memory cannot be copied")

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are pinned, a multiple of the segments."""
        return sum(segment.nbytes for segment in self._pinned.values())

    @property
    def taken(self) -> int:
        """Bytes that are taken now."""
        while self._returned:
            self._join(self._returned.popleft())
        return self._taken

    def take(self, size: int) -> Slot | None:
        """Memory for so many bytes; None: there is not enough left."""
        missing = -(-size // HOST_ALIGNMENT) * HOST_ALIGNMENT
        if missing > self.capacity - self.taken:
            return None
        self._taken += missing
        self.most = max(self.most, self._taken)
        runs = []
        while missing:
            first, stop = self._free.pop(0)
            end = min(stop, first + missing)
            if end < stop:
                self._free.insert(0, (end, stop))
            missing -= end - first
            runs.append((first, end))
        pieces, left = [], size
        for first, end in runs:
            while first < end and left:
                # A copy does not go beyond what was pinned at once.
                stop = min(end, (first // _SEGMENT + 1) * _SEGMENT, first + left)
                self._pin(first // _SEGMENT)
                pieces.append(self._memory[first:stop])
                left -= stop - first
                first = stop
        return Slot(tuple(runs), tuple(pieces))

    def free(self, slot: Slot) -> None:
        """Frees what `take` gave, once more is taken.

        The garbage collector may call it at any time, in the middle of the methods here, too.
        """
        self._returned.append(slot)

    def _join(self, slot: Slot) -> None:
        for first, end in slot.runs:
            self._taken -= end - first
            insort(self._free, (first, end))
        joined: list[tuple[int, int]] = []
        for first, end in self._free:
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((first, end))
        self._free = joined

    def pin(self) -> None:
        """Pins all pages."""
        for segment in range(-(-self.capacity // _SEGMENT)):
            self._pin(segment)

    def _pin(self, segment: int) -> None:
        if not self._is_pinned or segment in self._pinned:
            return
        pages = self._memory[segment * _SEGMENT : (segment + 1) * _SEGMENT]
        pages.zero_()  # by all threads; the driver touches them by one
        status = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, 0))
        if status != 0:
            raise MemoryError(
                f"host_memory: {bytes_text(self.pinned_bytes)} of it are pinned, and the system "
                f"refuses to pin more (CUDA error {status}); ask for less"
            )
        self._pinned[segment] = pages


def _unpin(pinned: dict[int, Tensor]) -> None:
    for pages in pinned.values():
        torch.cuda.cudart().cudaHostUnregister(pages.data_ptr())


def check_free(capacity: int) -> None:
    """Raises ValueError where the host does not have so many bytes free."""
    free = free_host_bytes()
    if free is not None and capacity > free:
        raise ValueError(
            f"host_memory: expected at most the {bytes_text(free)} that are free on the host, "
            f"got {bytes_text(capacity)}"
        )


def free_host_bytes() -> int | None:
    """Memory of the host that is free for this process; None: the system does not say."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            cached = 0
            for line in (group / "memory.stat").read_text().splitlines():
                if line.startswith("inactive_file "):
                    cached = int(line.split()[1])
            found.append(max(int(limit) - used + cached, 0))
    except (OSError, ValueError):
        pass
    return min(found, default=None)
