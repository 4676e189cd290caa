"""Peak memory of this process: device memory on a GPU, resident memory on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_LIBC = ctypes.CDLL(None)
# Between two times when freed memory goes back.
_STEPS = 16


def reset_peak(device: torch.device) -> None:
    """Forget earlier peaks, where the system can: on a GPU, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        # "5" sets the high-water mark (VmHWM) back to the memory that is resident now.
        # Where the system forbids it, the earlier peak still counts.
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Highest memory since :func:`reset_peak`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_freed(device: torch.device, step: int) -> None:
    """Gives memory that this process has freed back to the system, every 16 steps on the CPU.

    glibc keeps freed blocks of up to 32 MiB for later ones, but takes new places for many of them,
    so that resident memory grows from step to step. Pages that are used again have to be made anew.

    Args:
        device: where steps run.
        step: the number of the one that has run.
    """
    if device.type == "cpu" and step % _STEPS == 0 and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


class Peak:
    """The highest memory of a run, with what CUDA graphs hold, which torch does not count."""

    def __init__(self, device: torch.device, handle: Any) -> None:
        """Begins now.

        Args:
            device: whose memory.
            handle: `lemo.Handle`, whose graphs; None: there are none.
        """
        self._device, self._handle = device, handle
        self._before, self._beside = 0, self._held()
        reset_peak(device)

    def bytes(self) -> int:
        """The highest memory so far."""
        highest = max(self._before, peak_bytes(self._device) + self._beside)
        if self._held() != self._beside:
            # What a capture takes counts as allocated while it goes on, and from then on is held.
            self._before, self._beside = highest, self._held()
            reset_peak(self._device)
        return highest

    def _held(self) -> int:
        graphs = None if self._handle is None else self._handle.graphs
        return 0 if graphs is None else graphs.bytes
