"""Rows of data files: JSON lines (plain, xz, gzip), JSON, CSV, Parquet, text, datasets folders."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lemo.data.reading import naming
from lemo.data.xz import open_xz

SUPPORTED = (
    ".jsonl, .jsonl.xz, .jsonl.gz, .json, .csv, .parquet, .txt or a folder written by "
    "datasets.save_to_disk"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file.

    Attributes:
        record: values by name.
        place: file and line (or row, from 0), for messages.
        name: a short name of the row, unique in its file.
    """

    record: dict[str, Any]
    place: str
    name: str


def read_rows(path: str | Path, argument: str = "documents") -> Iterator[Row]:
    """Yields the rows of a file or of a datasets folder, in their order.

    A text file is one row whose `text` is the file. A cell of a table that is empty (null) is left
    out of its row.

    Args:
        path: see `SUPPORTED`.
        argument: what the path is called in messages.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: unsupported kind of file; a broken line (the message names file and line); no
            row at all.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{argument}: expected {SUPPORTED}, but '{path}' does not exist")
    return _never_empty(path, _reader(path, argument)(path), argument)


def _reader(path: Path, argument: str) -> Callable[[Path], Iterator[Row]]:
    if path.is_dir():
        return lambda folder: _read_folder(folder, argument)
    if path.name.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz")):
        return _read_json_lines
    if path.name.endswith(".txt"):
        return _read_text
    if path.suffix in _TABLES:
        return _read_table
    raise ValueError(f"{argument}: expected {SUPPORTED}, got '{path}'")


def _never_empty(path: Path, rows: Iterator[Row], argument: str) -> Iterator[Row]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"{argument}: '{path}' holds no row")


def _read_text(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    yield Row({"text": text}, str(path), path.name)


def _open_binary(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return open_xz(path)
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _read_json_lines(path: Path) -> Iterator[Row]:
    number = 0
    with _open_binary(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}:{number}", f"{path.name}:{number}")
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: damaged after line {number}: {error}") from None


def _parse_line(line: bytes, place: str, name: str) -> Row:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON that Python can read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(record).__name__}")
    return Row(record, place, name)


def _read_table(path: Path) -> Iterator[Row]:
    # The datasets library takes a second to import; only tables and folders need it.
    import datasets

    damaged = f"{path}: cannot be read as {path.suffix.removeprefix('.')}"
    with naming(damaged):
        # A stream: no copy of the file is left in the library's cache.
        rows = iter(
            datasets.load_dataset(
                _TABLES[path.suffix], data_files=str(path), split="train", streaming=True
            )
        )
    yield from _rows(rows, path, damaged)


def _rows(rows: Iterator[dict[str, Any]], path: Path, damaged: str) -> Iterator[Row]:
    number = 0
    while True:
        with naming(damaged, StopIteration):
            try:
                record = next(rows)
            except StopIteration:
                return
        present = {name: value for name, value in record.items() if value is not None}
        yield Row(present, f"{path}: row {number}", f"{path.name}:{number}")
        number += 1


def _read_folder(folder: Path, argument: str) -> Iterator[Row]:
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = sorted(str(p) for p in folder.iterdir() if (p / "state.json").is_file())
        raise ValueError(
            f"{argument}: '{folder}' holds several splits, name one of them: "
            + (", ".join(splits) or "none is there")
        )
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"{argument}: expected {SUPPORTED}, got the folder '{folder}' without a state.json"
        )
    damaged = f"{argument}: '{folder}' cannot be read as a dataset"
    with naming(damaged):
        # Of no rows the library writes no file, which it cannot load.
        if not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            return
        dataset = datasets.load_from_disk(str(folder))
    yield from _rows(iter(dataset), folder, damaged)


def keys_of(record: Mapping[str, Any]) -> str:
    """The names in a record, for messages."""
    names = [str(name) for name in record]
    return f"the keys {', '.join(names)}" if names else "no key at all"


# The readers of the datasets library, by the ending of a file.
_TABLES = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
