"""Calls ops and turns the core's errors into the Python exceptions users expect."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_MESSAGE = re.compile(r"\[lemo:(\w+)\] ([^\n]*)")
_EXCEPTIONS = {
    "value": ValueError,
    "type": TypeError,
    "unsupported": NotImplementedError,
    "memory": MemoryError,
    "device_memory": torch.OutOfMemoryError,
}
# A failed allocation that ends so has no reason: before version 2.13 torch does not tell it.
_UNEXPLAINED = re.compile(r" on (cuda:\d+)$")


def call(op: Any, *args: Any) -> Any:
    """Runs `op(*args)`; a failed check raises ValueError, TypeError or NotImplementedError.

    Where there is no memory for results or scratch, torch.OutOfMemoryError is raised on a GPU, and
    MemoryError on the CPU. Forward-mode tangents raise as well, since the op would ignore them.
    """
    if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
        raise NotImplementedError(
            f"{op.__name__}: forward-mode differentiation is not supported: expected tensors "
            "without tangents"
        )
    try:
        return op(*args)
    except RuntimeError as error:
        translation = _translation(error)
        if translation is None:
            raise
        raise translation from None


@contextmanager
def translated() -> Iterator[None]:
    """Code that torch has compiled calls ops by itself: inside, its errors are those of `call`."""
    try:
        yield
    except RuntimeError as error:
        translation = _translation(error)
        if translation is None:
            raise
        raise translation from None


def _translation(error: RuntimeError) -> Exception | None:
    """What Python raises for an error of the core; None: it is not one."""
    match = _MESSAGE.search(str(error))
    if match is None:
        return None
    kind, message = match.groups()
    if unexplained := _UNEXPLAINED.search(message):
        # A GPU that failed before has no memory either. It then fails here, too, and says why.
        torch.cuda.mem_get_info(unexplained[1])
    return _EXCEPTIONS[kind](message)


def _has_tangent(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_tangent, value))
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
