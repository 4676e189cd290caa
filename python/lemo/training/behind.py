"""What the host does behind a GPU, which meanwhile works on: numbers read, and files written.

A number is copied to the host by the GPU itself, behind the work that makes it, and read when the
next work is under way. Files are made of such copies, in a thread of their own.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Copy", "HostMemory", "Joined", "Moment", "Writer", "short_turns"]

# Bytes on the device that one copy to the host may take.
_PIECE = 64 << 20
# Bytes: tensors of any dtype may begin at a multiple.
_ALIGNMENT = 16
# Seconds that a thread of Python waits for another one, at most.
_TURN = 1e-4

_log = logging.getLogger("lemo")

_Group = tuple[torch.device, torch.dtype]


class HostMemory:
    """Memory on the host for copies, which is allocated once for as many as there are at a time.

    A GPU copies to pinned pages, which take the system milliseconds to provide.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int, pinned: bool) -> Tensor:
        """uint8, at least `size` of them; given back with `give`."""
        while self._free:
            # One that is too small goes.
            memory = self._free.pop()
            if memory.numel() >= size and memory.is_pinned() == pinned:
                return memory
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)

    def give(self, memory: Tensor) -> None:
        """Takes back what nothing reads or writes any more."""
        self._free.append(memory)


class Joined(list[Tensor]):
    """Tensors of one device and dtype, at least one, of which a copy is one: all their elements."""


class _Place(NamedTuple):
    """Where a tensor was in a value: the next one of its group, of this shape."""

    group: _Group
    shape: torch.Size


class Moment:
    """When the work is done that a device has been given so far.

    Args:
        device: its current stream is meant; on the CPU all work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Waits until it has come; any thread may, at any time."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier one of the same device, whenever they are asked for; waits."""
        self.wait()
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1e3


class Copy:
    """Tensors as they are when the work that is under way is done.

    The device holds no more for it than one piece at a time, of at most 64 MiB.

    Args:
        value: a tensor, or nested dicts and lists of tensors, `Joined` ones and other values.
        memory: where it is until its value has been read.

    Attributes:
        done: when that is.
    """

    def __init__(self, value: Any, memory: HostMemory) -> None:
        groups: dict[_Group, list[Tensor]] = {}
        self._counts: dict[_Group, list[int]] = {}

        def place(x: Tensor | Joined) -> _Place:
            tensors = x if isinstance(x, Joined) else [x]
            group = tensors[0].device, tensors[0].dtype
            groups.setdefault(group, []).extend(tensors)
            count = sum(each.numel() for each in tensors)
            self._counts.setdefault(group, []).append(count)
            return _Place(group, torch.Size([count]) if isinstance(x, Joined) else x.shape)

        # Only what is on the host: tensors gathered for this may go.
        self._held = _replaced(value, (Tensor, Joined), place)
        sizes = [_aligned(sum(x.nbytes for x in found)) for found in groups.values()]
        on_gpu = any(device.type == "cuda" for device, _ in groups)
        self._memory = memory
        self._host: Tensor | None = memory.take(sum(sizes), on_gpu)
        self._parts = dict(zip(groups, self._host[: sum(sizes)].split(sizes)))
        with torch.no_grad():
            for group, found in groups.items():
                _to_host(found, self._parts[group].view(group[1]))
        self.done = Moment(torch.device("cuda" if on_gpu else "cpu"))

    def wait(self) -> None:
        """Waits until the tensors are on the host; any thread may, at any time."""
        self.done.wait()

    def value(self) -> Any:
        """The same with tensors on the host, in memory of their own; waits until they are there.

        Those of one device and dtype share that memory.
        """
        host = self._host
        if host is not None:
            self.wait()
            # Few tensors are copied: each takes Python's lock from the thread that trains.
            tensors = {}
            for group, counts in self._counts.items():
                own = self._parts[group].clone().view(group[1])
                tensors[group] = iter(own[: sum(counts)].split(counts))
            # An interrupt may come anywhere, and `value` be called again.
            self._held = _replaced(
                self._held, _Place, lambda place: next(tensors[place.group]).view(place.shape)
            )
            self._host = None
            self._parts.clear()
            self._memory.give(host)
        return self._held


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _to_host(found: list[Tensor], host: Tensor) -> None:
    """Begins to copy the elements of tensors to the host, one after the other."""
    at = 0
    for batch in _batches(found):
        # Small ones by one copy: they are hundreds.
        pieces = [x.reshape(-1) for x in batch]
        piece = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        host[at : at + piece.numel()].copy_(piece, non_blocking=True)
        at += piece.numel()


def _batches(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors, in order and large ones in pieces, by lists of at most `_PIECE` bytes."""
    batch: list[Tensor] = []
    size = 0
    for x in tensors:
        nbytes = x.nbytes
        if batch and size + nbytes > _PIECE:
            yield batch
            batch, size = [], 0
        if nbytes > _PIECE:
            yield from ([piece] for piece in _pieces(x))
        else:
            batch.append(x)
            size += nbytes
    if batch:
        yield batch


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """The elements of `x` in order, in pieces of at most `_PIECE` bytes."""
    if x.nbytes <= _PIECE:
        yield x
    elif x.is_contiguous():
        yield from x.view(-1).split(_PIECE // x.element_size())
    else:
        # Flat it would be a copy.
        for part in x.tensor_split(2) if len(x) > 1 else x.unbind():
            yield from _pieces(part)


def _replaced(value: Any, kind: type | tuple[type, ...], own: Callable[[Any], Any]) -> Any:
    """`value`, of nested dicts and lists, with own(x) for each x of a kind in it, in order."""
    if isinstance(value, kind):
        return own(value)
    if isinstance(value, dict):
        return {name: _replaced(item, kind, own) for name, item in value.items()}
    return [_replaced(item, kind, own) for item in value] if isinstance(value, list) else value


@contextmanager
def short_turns() -> Iterator[None]:
    """Inside, threads of Python take turns more often than every 5 ms, Python's default.

    The thread that issues work for a GPU gives its turn away in many operators of torch, and would
    wait so long for the next one wherever another thread writes or tokenizes.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Writer:
    """Writes files in a thread of its own, one after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._last: Future[None] | None = None
        # The pool forgets a thread that it starts while an interrupt comes: none starts later.
        self._pool.submit(lambda: None).result()

    def submit(self, write: Callable[[], None]) -> None:
        """Begins to write; waits for what was begun before, and raises its error."""
        self.wait()
        self._last = self._pool.submit(write)

    def check(self) -> None:
        """Raises the error of what was begun, if it has failed by now; does not wait."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written, and raises the error that prevented it."""
        if self._last is not None:
            # An interrupt leaves what is under way to `close`.
            wait([self._last])
            last, self._last = self._last, None
            last.result()

    def close(self) -> None:
        """Waits for what is under way; logs its error, which nobody waits for any more."""
        self._pool.shutdown()
        last, self._last = self._last, None
        error = None if last is None else last.exception()
        if error is not None:
            _log.error("a file could not be written: %s", error)
