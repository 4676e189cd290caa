"""Limits of the system, to make it refuse what a full disk would."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size: int):
    """Writes beyond ``size`` bytes of a file raise OSError: "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
