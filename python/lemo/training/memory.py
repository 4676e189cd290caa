"""Peak memory of this process: device memory on a GPU, resident memory on the CPU."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        # What torch raises on the CPU.
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
