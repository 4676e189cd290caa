"""Reading documents: JSON lines (plain, xz, gzip), plain text, or a datasets folder."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lemo.data.reading import naming
from lemo.data.xz import open_xz

SUPPORTED = ".jsonl, .jsonl.xz, .jsonl.gz, .txt or a folder written by datasets.save_to_disk"


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

    A JSON line is an object with a string ``text`` and optional ``id`` and ``kind``; a text file is
    one document.

    Args:
        path: a .jsonl, .jsonl.xz, .jsonl.gz or .txt file, or a folder written by
            ``datasets.save_to_disk``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: unsupported kind of file; a broken line (the message names file and line); no
            document at all.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"documents: expected {SUPPORTED}, but '{path}' does not exist")
    return _never_empty(path, _reader(path)(path))


def _reader(path: Path) -> Callable[[Path], Iterator[Document]]:
    if path.is_dir():
        return _read_dataset
    if path.name.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz")):
        return _read_json_lines
    if path.name.endswith(".txt"):
        return _read_text
    raise ValueError(f"documents: expected {SUPPORTED}, got '{path}'")


def _never_empty(path: Path, documents: Iterator[Document]) -> Iterator[Document]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise ValueError(f"documents: '{path}' holds no document")


def _read_text(path: Path) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    yield Document(id=path.name, kind="text", text=text)


def _open_binary(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return open_xz(path)
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _read_json_lines(path: Path) -> Iterator[Document]:
    number = 0
    with _open_binary(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}:{number}", f"{path.name}:{number}")
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: damaged after line {number}: {error}") from None


def _parse_line(line: bytes, place: str, default_id: str) -> Document:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON that Python can read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{place}: expected a JSON object with a string 'text', got {type(record).__name__}"
        )
    return _document(record, place, default_id)


def _read_dataset(folder: Path) -> Iterator[Document]:
    # The datasets library takes a second to import; only folders need it.
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = sorted(str(p) for p in folder.iterdir() if (p / "state.json").is_file())
        raise ValueError(
            f"documents: '{folder}' holds several splits, name one of them: "
            + (", ".join(splits) or "none is there")
        )
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"documents: expected {SUPPORTED}, got the folder '{folder}' without a state.json"
        )
    damaged = f"documents: '{folder}' cannot be read as a dataset"
    with naming(damaged):
        # Of no rows the library writes no file, which it cannot load.
        if not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            return
        dataset = datasets.load_from_disk(str(folder))
    if "text" not in dataset.column_names:
        raise ValueError(
            f"documents: '{folder}' needs a column 'text', it has {', '.join(dataset.column_names)}"
        )
    rows = iter(dataset)
    for number in range(len(dataset)):
        with naming(damaged):
            record = next(rows)
        yield _document(record, f"{folder}: row {number}", f"{folder.name}:{number}")


def _document(record: dict[str, Any], place: str, default_id: str) -> Document:
    text = record.get("text")
    if not isinstance(text, str):
        got = "none" if "text" not in record else type(text).__name__
        raise ValueError(f"{place}: expected a string 'text', got {got}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{place}: 'text' holds half of a surrogate pair") from None
    name, kind = record.get("id"), record.get("kind")
    return Document(
        id=default_id if name is None else str(name),
        kind="text" if kind is None else str(kind),
        text=text,
    )
