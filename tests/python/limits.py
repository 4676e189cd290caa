"""Limits of the system, to make it refuse what a full disk would."""

import contextlib
import ctypes
import resource
from pathlib import Path


@contextlib.contextmanager
def largest_file(size: int):
    """Writes beyond ``size`` bytes of a file raise OSError: "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


_PIECE = 2**24


@contextlib.contextmanager
def address_space(more: int):
    """The process can take ``more`` bytes of memory and then gets no more.

    Ask for pieces above 32 MiB: smaller ones malloc may have kept from earlier.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    sizes = Path("/proc/self/statm").read_text().split()
    now = int(sizes[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    kept = []
    try:
        resource.setrlimit(resource.RLIMIT_AS, (now, hard))
        # What earlier calls have freed and malloc still holds is no room for more.
        while piece := libc.malloc(_PIECE):
            kept.append(piece)
        resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for piece in kept:
            libc.free(piece)
