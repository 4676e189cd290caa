"""What belongs to the call that a thread runs: attributes with a value for each, and hooks.

So a model may be evaluated in one thread while another one trains it.
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

__all__ = ["PerThread", "in_this_thread"]

T = TypeVar("T")


class PerThread(Generic[T]):
    """An attribute that has its default in every thread until that sets it.

    Copies and pickles of the object begin with the default.

    Args:
        default: not mutable, since threads share it.
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value: T = getattr(_values_of(instance), self._name, self._default)
        return value

    def __set__(self, instance: Any, value: T) -> None:
        setattr(_values_of(instance), self._name, value)


class _Values(threading.local):
    """Those of an object, in this thread."""

    def __reduce__(self) -> tuple[type["_Values"], tuple[()]]:
        return _Values, ()


def _values_of(instance: Any) -> _Values:
    found: _Values | None = vars(instance).get("_per_thread")
    # Two threads may ask for the first time at once: `setdefault` gives both the same.
    return vars(instance).setdefault("_per_thread", _Values()) if found is None else found


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing where another thread calls the module; it is not compiled."""
    thread = threading.get_ident()

    @torch.compiler.disable
    def run(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return run
