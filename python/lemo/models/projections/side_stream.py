"""A second stream for gradients of adapters, while a CUDA graph is captured.

Products of a low rank are short and occupy few of a GPU's multiprocessors. The gradients of rows do
not depend on those of adapters, so a graph may run both at once. Without a graph the host would
have more to issue than the GPU gains.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["SideStream", "beside"]

# By the handle of the stream beside which they run.
_sides: dict[int, torch.cuda.Stream] = {}
_IN_ORDER = nullcontext()


@contextmanager
def beside(stream: torch.cuda.Stream, side: torch.cuda.Stream) -> Iterator[None]:
    """Inside, what a `SideStream` on `stream` is given runs on `side`."""
    _sides[stream.cuda_stream] = side
    try:
        yield
    finally:
        del _sides[stream.cuda_stream]


class SideStream:
    """Runs what the current stream needs only after `join`, if it has a stream beside it."""

    def __init__(self, device: torch.device | None = None) -> None:
        """
        Args:
            device: of the current stream; None: everything runs in order.
        """
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._operands: list[Tensor] = []
        if _sides and device is not None and device.type == "cuda":
            current = torch.cuda.current_stream(device)
            side = _sides.get(current.cuda_stream)
            self._streams = None if side is None else (current, side)

    def behind(self, *operands: Tensor) -> AbstractContextManager[object]:
        """Operators inside run behind those that the current stream has so far.

        Args:
            operands: what they read. It stays in memory until `join`: what is freed may be written
                by operators of the current stream.
        """
        if self._streams is None:
            return _IN_ORDER
        current, side = self._streams
        self._operands += operands
        side.wait_stream(current)
        return torch.cuda.stream(side)

    def join(self) -> None:
        """The current stream goes on behind what ran here."""
        if self._streams is not None and self._operands:
            current, side = self._streams
            current.wait_stream(side)
            self._operands.clear()
