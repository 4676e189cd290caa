"""Standard output and standard error that may be closed, full, or unable to encode a character.

A training of days does not end because nobody reads its progress any more.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class TolerantStream:
    """A text stream that keeps the first error instead of raising it, and goes on.

    Args:
        stream: where the text goes; None (a descriptor that was closed at the start): nowhere.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self.error: Exception | None = None

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self._stream is not None:
            with self._tolerated():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    escaped = text.encode(self.encoding, "backslashreplace")
                    self._stream.write(escaped.decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._tolerated():
                self._stream.flush()

    def isatty(self) -> bool:
        return not getattr(self._stream, "closed", True) and self._stream.isatty()

    def let_go(self) -> None:
        """What cannot be written will never be: the interpreter does not try again at its end."""
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream is closed.
            self.error = self.error or error


@contextlib.contextmanager
def tolerant_streams() -> Iterator[tuple[TolerantStream, TolerantStream]]:
    """Standard output and standard error as tolerant streams, in ``sys`` too, while it lasts."""
    _open_descriptors()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err = TolerantStream(streams[0]), TolerantStream(streams[1])
    try:
        yield out, err
    finally:
        out.let_go()
        err.let_go()
        sys.stdout, sys.stderr = streams


def _open_descriptors() -> None:
    """Reserve the numbers of standard streams that the caller closed: no file of a run gets one.

    Libraries write messages to descriptor 2, whatever is open there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def printable(text: str) -> str:
    """``text`` with control characters and the like escaped, for names that may hold anything."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
