"""Documents: long plain texts, from any file that `lemo.data.rows` reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lemo.data.rows import Row, keys_of, read_rows


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        id: name of the document, for messages.
        kind: group by which results are reported ("text" where the source names none).
        text: the text itself.
    """

    id: str
    kind: str
    text: str


def read_documents(path: str | Path) -> Iterator[Document]:
    """Yield the documents of a file or of a datasets folder, in their order.

    A row has a string ``text`` and optionally ``id`` and ``kind``; a text file is one document.

    Args:
        path: see :data:`lemo.data.rows.SUPPORTED`.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: unsupported kind of file; a broken line (the message names file and line); no
            document at all.
    """
    return map(document_of, read_rows(path))


def document_of(row: Row) -> Document:
    """The document that a row holds; ValueError, naming file and line, where it holds none."""
    text = row.record.get("text")
    if not isinstance(text, str):
        got = type(text).__name__ if "text" in row.record else keys_of(row.record)
        raise ValueError(f"{row.place}: expected a string 'text', got {got}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{row.place}: 'text' holds half of a surrogate pair") from None
    name, kind = row.record.get("id"), row.record.get("kind")
    return Document(
        id=row.name if name is None else str(name),
        kind="text" if kind is None else str(kind),
        text=text,
    )
