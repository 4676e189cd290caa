"""Calls ops and turns the core's errors into the Python exceptions users expect."""

import re
from typing import Any

_MESSAGE = re.compile(r"\[lemo:(value|type|unsupported)\] ([^\n]*)")
_EXCEPTIONS = {"value": ValueError, "type": TypeError, "unsupported": NotImplementedError}


def call(op: Any, *args: Any) -> Any:
    """Runs `op(*args)`; a failed check raises ValueError, TypeError or NotImplementedError."""
    try:
        return op(*args)
    except RuntimeError as error:
        match = _MESSAGE.search(str(error))
        if match is None:
            raise
        raise _EXCEPTIONS[match[1]](match[2]) from None
