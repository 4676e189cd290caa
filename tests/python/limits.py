"""Limits of the system, to make it refuse what a full disk would."""

import contextlib
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


@contextlib.contextmanager
def address_space(more: int):
    """The process can take ``more`` bytes of memory and then gets no more.

    Ask for pieces above 32 MiB: smaller ones malloc may have kept from earlier.
    """
    sizes = Path("/proc/self/statm").read_text().split()
    now = int(sizes[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
