"""What the host does behind a GPU, which meanwhile works on: numbers read, and files written.

A number is copied to the host by the GPU itself, behind the work that makes it, and read when the
next work is under way. Files are made of such copies, in a thread of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

__all__ = ["Copy", "Writer"]


class Copy:
    """Tensors as they are when the work that is under way is done.

    Args:
        value: a tensor, or nested dicts and lists of tensors and other values.
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        self._found = list(_tensors(value))
        # All of a dtype by one copy: they are hundreds of small ones.
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for x in self._found:
            groups.setdefault((x.device, x.dtype), []).append(x.detach().reshape(-1))
        self._flat = {key: _to_host(torch.cat(parts)) for key, parts in groups.items()}
        self._done: torch.cuda.Event | None = None
        if any(device.type == "cuda" for device, _ in groups):
            self._done = torch.cuda.Event()
            self._done.record()

    def value(self) -> Any:
        """The same with tensors of their own on the host; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        sizes: dict[tuple[torch.device, torch.dtype], list[int]] = {key: [] for key in self._flat}
        for x in self._found:
            sizes[x.device, x.dtype].append(x.numel())
        parts = {key: iter(flat.split(sizes[key])) for key, flat in self._flat.items()}

        def own(x: Tensor) -> Tensor:
            return next(parts[x.device, x.dtype]).clone().view(x.shape)

        return _replaced(self._value, own)


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list):
        for item in value:
            yield from _tensors(item)


def _replaced(value: Any, own: Callable[[Tensor], Tensor]) -> Any:
    """`value` with own(tensor) for each tensor, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return own(value)
    if isinstance(value, dict):
        return {name: _replaced(item, own) for name, item in value.items()}
    return [_replaced(item, own) for item in value] if isinstance(value, list) else value


class Writer:
    """Writes files in a thread of its own, one after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Begins to write; waits for what was begun before, and raises its error."""
        self.wait()
        self._last = self._pool.submit(write)

    def wait(self) -> None:
        """Waits until everything is written, and raises the error that prevented it."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Waits for what is under way, whatever comes of it."""
        self._pool.shutdown()
