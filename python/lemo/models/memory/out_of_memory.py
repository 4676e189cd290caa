"""What lemo adds to an error of torch that memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lemo.memory_errors import is_out_of_memory

__all__ = ["explained"]

_ADVICE = (
    "less memory is needed with recompute='layer', a smaller keep, shorter sequences or fewer of "
    "them at a time, or weights in 4 bits; `lemo plan` tells what fits"
)


@contextmanager
def explained(describe: Callable[[], str]) -> Iterator[None]:
    """An error inside that memory ran out is raised anew, of the same type, and says what was done.

    Args:
        describe: what each layer stores and how many rows there are; called after an error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        kinds = MemoryError, torch.OutOfMemoryError, RuntimeError
        kind = next(each for each in kinds if isinstance(error, each))
        raise kind(f"{error}\nlemo: {describe()}; {_ADVICE}".lstrip()) from error
