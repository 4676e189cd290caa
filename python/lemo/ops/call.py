"""Calls ops and turns the core's errors into the Python exceptions users expect."""

import re
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

_MESSAGE = re.compile(r"\[lemo:(value|type|unsupported)\] ([^\n]*)")
_EXCEPTIONS = {"value": ValueError, "type": TypeError, "unsupported": NotImplementedError}


def call(op: Any, *args: Any) -> Any:
    """Runs `op(*args)`; a failed check raises ValueError, TypeError or NotImplementedError.

    Forward-mode tangents raise as well, since the op would ignore them.
    """
    if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
        raise NotImplementedError(
            f"{op.__name__}: forward-mode differentiation is not supported: expected tensors "
            "without tangents"
        )
    try:
        return op(*args)
    except RuntimeError as error:
        match = _MESSAGE.search(str(error))
        if match is None:
            raise
        raise _EXCEPTIONS[match[1]](match[2]) from None


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
