"""Rows of data files: JSON lines (plain, xz, gzip), JSON, CSV, Parquet, text, datasets folders."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from lemo.data.reading import naming
from lemo.data.shards import shards_at
from lemo.data.xz import open_xz

SUPPORTED = (
    ".jsonl, .jsonl.xz, .jsonl.gz, .json, .csv, .parquet, .txt, a folder written by "
    "datasets.save_to_disk or one of shards (train-00000-of-00002.parquet and so on)"
)

_ROWS_AT_A_TIME = 256  # of Arrow's tables


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
    """Yields the rows of a file, of a datasets folder or of shards, in their order.

    A text file is one row whose `text` is the file. A JSON file is a list of objects, an object
    that holds one such list (as `data`), objects line by line, or one object. A cell of a table
    that is empty (null) is left out of its row, at any depth; cells of CSV are texts.

    Args:
        path: see `SUPPORTED`.
        argument: what the path is called in messages.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: unsupported kind of file; a broken line (the message names file and line); no
            row at all; as of `shards_at`.
    """
    path = Path(path)
    shards = shards_at(path, argument)
    if shards:
        readers = [(_reader(shard, argument), shard) for shard in shards]
        return _never_empty(path, chain.from_iterable(r(shard) for r, shard in readers), argument)
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
    if path.suffix == ".json":
        return _read_json
    if path.suffix == ".csv":
        return _read_csv
    if path.suffix == ".parquet":
        return _read_parquet
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
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    yield Row({"text": text}, str(path), path.name)


def _open_binary(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return open_xz(path)
    if path.suffix == ".gz":
        # gzip reads a file of no bytes, such as of a copy that failed, as one of no lines.
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: expected a gzip file, got one of no bytes")
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
        record = json.loads(line, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON that Python can read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(record).__name__}")
    return Row(record, place, name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = _twice([name for name, _ in pairs])
        raise ValueError(f"an object has the key '{twice}' twice")
    return made


def _twice(names: list[str]) -> str | None:
    """The first name that is there twice."""
    return next((name for name in names if names.count(name) > 1), None)


def _read_json(path: Path) -> Iterator[Row]:
    # Read here, not by the datasets library: it turns values whose types differ from row to row,
    # such as contents with and without parts, into JSON texts.
    damaged = f"{path}: cannot be read as json"
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            where = f"line {error.lineno}, column {error.colno}"
            raise ValueError(f"{damaged}: {error.msg} at {where}") from None
        yield from _read_json_lines(path)
        return
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damaged}: {error}") from None
    place = f"{path}: row "
    if isinstance(value, dict):
        lists = [name for name, inner in value.items() if _is_table(inner)]
        if len(lists) == 1 and not any(name in value for name in _NAMES_OF_A_ROW):
            place = f"{path}: {lists[0]}, row "
            value = value[lists[0]]
        else:
            value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{path}: expected a list of JSON objects, got {type(value).__name__}")
    for number, record in enumerate(value):
        if not isinstance(record, dict):
            got = type(record).__name__
            raise ValueError(f"{place}{number}: expected a JSON object, got {got}")
        yield Row(record, f"{place}{number}", f"{path.name}:{number}")


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _read_csv(path: Path) -> Iterator[Row]:
    # Read here, not by the datasets library: it reads some texts as numbers and as missing, and
    # takes the first cell away from rows that have one too many.
    csv.field_size_limit(sys.maxsize)
    damaged = f"{path}: cannot be read as csv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            names = next(filter(None, rows), [])
            if (twice := _twice(names)) is not None:
                raise ValueError(f"{path}: expected columns that differ, got '{twice}' twice")
            number = 0
            for cells in rows:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise ValueError(
                        f"{path}:{rows.line_num}: expected {len(names)} cells, as many as the "
                        f"first line has, got {len(cells)}"
                    )
                record = {name: cell for name, cell in zip(names, cells) if cell}
                yield Row(record, f"{path}: row {number}", f"{path.name}:{number}")
                number += 1
        except csv.Error as error:
            raise ValueError(f"{damaged}: {error} at line {rows.line_num}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{damaged}: not UTF-8: {error.reason}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    # Not by the datasets library: it refuses a file for any column whose type it does not know.
    from pyarrow import parquet

    damaged = f"{path}: cannot be read as parquet"
    with naming(damaged):
        file = parquet.ParquetFile(path)
    with file:
        yield from _rows(file.iter_batches(_ROWS_AT_A_TIME), path, damaged)


def _rows(tables: Iterator[Any], path: Path, damaged: str) -> Iterator[Row]:
    """Rows of tables of Arrow, one after the other."""
    number = 0
    while True:
        with naming(damaged, StopIteration):
            try:
                records = _records(next(tables))
            except StopIteration:
                return
        for record in records:
            yield Row(record, f"{path}: row {number}", f"{path.name}:{number}")
            number += 1


def _records(table: Any) -> list[dict[str, Any]]:
    """Rows without what is null, at any depth: tables give each object the keys of all others."""
    from pyarrow import DataType

    names = table.schema.names
    if (twice := _twice(names)) is not None:
        raise ValueError(f"expected columns that differ, got '{twice}' twice")
    made: list[dict[str, Any]] = [{} for _ in range(table.num_rows)]
    for name, column in zip(names, table.columns):
        reader = _value_reader(column.type)
        for record, value in zip(made, _values(column)):
            if value is not None:
                record[name] = value if isinstance(value, DataType) else reader(value)
    return made


# What pyarrow raises over values that Python does not have: late dates, unknown time zones.
_NOT_IN_PYTHON = (ValueError, OverflowError, KeyError)


def _values(column: Any) -> list[Any]:
    """Values of a column; the type of Arrow stands for one that Python does not have.

    So a column that nobody reads hinders nobody, and messages can name the type of one that is
    read.
    """
    try:
        return cast(list[Any], column.to_pylist())
    except _NOT_IN_PYTHON:
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except _NOT_IN_PYTHON:
        return cell.type


def _value_reader(kind: Any) -> Callable[[Any], Any]:
    """What takes nulls out of values of a type of Arrow, and reads those that are JSON."""
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return json.loads
    if types.is_struct(kind):
        fields = {kind.field(n).name: kind.field(n).type for n in range(kind.num_fields)}
        readers = {name: _value_reader(inner) for name, inner in fields.items()}
        return lambda value: {
            name: readers[name](inner) for name, inner in value.items() if inner is not None
        }
    if types.is_map(kind):
        reader = _value_reader(kind.item_type)
        return lambda value: {name: reader(inner) for name, inner in value if inner is not None}
    if types.is_nested(kind) and hasattr(kind, "value_type"):
        element = _value_reader(kind.value_type)
        return lambda value: [None if inner is None else element(inner) for inner in value]
    return lambda value: value


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
        # All columns, as they are stored: a format that was set stays in the folder, and by default
        # the library decodes images and sound, which nobody reads here.
        dataset = datasets.load_from_disk(str(folder)).with_format("arrow")
    yield from _rows(dataset.iter(_ROWS_AT_A_TIME), folder, damaged)


def keys_of(record: Mapping[str, Any]) -> str:
    """The names in a record, for messages."""
    names = [f"{name} (null)" if value is None else str(name) for name, value in record.items()]
    return f"the keys {', '.join(names)}" if names else "no key at all"


# An object that has one of these is a row, not what holds the list of rows.
_NAMES_OF_A_ROW = ("text", "messages", "conversations", "prompt", "instruction")
