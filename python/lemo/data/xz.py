"""Reading .xz files whole: every stream, the padding between them, and nothing else behind them.

`lzma.open` treats what follows a stream and is no stream, padding included, as the end of the file.
"""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20
_MAGIC = b"\xfd7zXZ\x00"
_PADDING = b"\x00" * 4  # and any multiple of it


def open_xz(path: Path) -> BinaryIO:
    """The decompressed bytes of an .xz file.

    Raises:
        lzma.LZMAError: when reading: a stream is damaged or cut short, or what follows it is none.
    """
    return io.BufferedReader(_Streams(path), _CHUNK)


class _Streams(io.RawIOBase):
    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:
        data = b""
        while not data:
            source = b""
            if self._stream.eof:
                source = self._next_stream()
                if not source:
                    return 0
                self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            elif self._stream.needs_input:
                source = self._file.read(_CHUNK)
                if not source:
                    raise lzma.LZMAError("the file is cut short")
            data = self._stream.decompress(source, max_length=len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bytes:
        """The first bytes of the stream behind this one and its padding; none at the end."""
        rest = self._stream.unused_data
        while len(rest) < len(_MAGIC) or rest.startswith(_PADDING):
            zeros = len(rest) - len(rest.lstrip(b"\x00"))
            rest = rest[zeros - zeros % len(_PADDING) :]
            more = self._file.read(_CHUNK)
            if not more:
                break
            rest += more
        if not _MAGIC.startswith(rest[: len(_MAGIC)]):
            raise lzma.LZMAError("what follows an xz stream is neither another one nor padding")
        return rest
