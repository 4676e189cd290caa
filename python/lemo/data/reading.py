"""Errors about files: one kind where a library cannot read them, and the name the user knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST = 600  # characters of a message


@contextmanager
def naming(place: str, *passing: type[Exception]) -> Iterator[None]:
    """Turns what a library raises over a damaged file into one ValueError that begins with `place`.

    Over such files libraries raise KeyErrors, RuntimeErrors, errors of their own and bare
    Exceptions. What is not the file's fault passes: memory that is not there, something that is
    not installed, and errors that are `passing`.
    """
    passing = (MemoryError, ImportError, *passing)
    try:
        yield
    except passing:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            raise
        raise ValueError(f"{place}: {_reason(error)}") from error


@contextmanager
def called(argument: str, known_as: str) -> Iterator[None]:
    """Lets errors that begin with "`known_as`: " begin with `argument`, the name that a user knows.

    For functions that read what several arguments may name: `model` is what the loader of a model
    calls it, `scout` what the user gave.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        name, colon, text = str(error).partition(": ")
        if name != known_as or not colon or argument == known_as:
            raise
        raise type(error)(f"{argument}: {text}") from error


def first_of(names: Iterable[str], count: int = 3) -> str:
    """The first `count` of `names`, sorted, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    # A KeyError or an AttributeError says little without its type.
    said = isinstance(error, ValueError | OSError) and text
    return text if said else f"{type(error).__name__}: {text}"
