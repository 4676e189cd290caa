"""Rows of evaluations in files: `metrics.json` of a run, and what `lemo eval --json` writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lemo.files import json_text, read_json, updating, write_file

__all__ = ["add_metrics", "read_metrics", "write_metrics"]

# What a row is of.
_SUBJECT = ("source", "kind", "length")
# Numbers, where a row has them.
_FIGURES = ("perplexity", "tail_perplexity", "documents", "answers", "exact", "right_tokens")


def write_metrics(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows, in one move; a perplexity of infinity is null in the file."""
    write_file(path, json_text(list(rows), indent=2))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows in a file; none where there is no file.

    Raises:
        ValueError: it holds something else; the message names it.
    """
    if not path.exists():
        return []
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        _check_row(row, f"{path}: row {number}")
        row |= {n: math.inf for n in ("perplexity", "tail_perplexity") if row.get(n, n) is None}
    return rows


def add_metrics(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows; those of the same documents, kind and length take the place of earlier ones.

    Several processes may add rows to one file at the same time: each of them waits for its turn.

    Raises:
        ValueError: the file holds something else; see `read_metrics`.
        OSError: it cannot be written.
    """
    new = [_subject(row) for row in rows]
    with updating(path):
        kept = [row for row in read_metrics(path) if _subject(row) not in new]
        write_metrics(path, [*kept, *rows])


def _check_row(row: dict[str, Any], place: str) -> None:
    """Raises ValueError where a row is of no kind or length, or one of its figures is no number."""
    figures = [name for name in _FIGURES if row.get(name) is not None]
    expected: dict[str, tuple[str, tuple[type, ...]]] = {
        "kind": ("a text", (str,)),
        "length": ("an integer", (int,)),
        **dict.fromkeys(figures, ("a number", (int, float))),
    }
    for name, (words, kinds) in expected.items():
        if type(row.get(name)) not in kinds:
            raise ValueError(f"{place}: field '{name}': expected {words}, got {row.get(name)!r}")


def _subject(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _SUBJECT)
