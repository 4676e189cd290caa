"""Errors that say that memory ran out."""

from __future__ import annotations

__all__ = ["is_out_of_memory"]

# What a RuntimeError says then: torch on the CPU; CUDA, where pages of the host are pinned or a
# kernel is loaded, and NCCL; cuBLAS and cuDNN.
_SAYINGS = ("can't allocate memory", "out of memory", "_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host. Torch is not imported for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(saying in text for saying in _SAYINGS)
