"""The two logs of a run: ``log.jsonl`` with one object a step, and TensorBoard."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from lemo.files import json_text, naming_file, write_file

LOG_NAME = "log.jsonl"
TENSORBOARD_NAME = "tensorboard"
_SCALARS = ("loss", "learning_rate", "tokens_per_second", "peak_memory_bytes", "kept_share")


_log = logging.getLogger("lemo")


def read_log(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records of ``log.jsonl`` up to ``last_step``, ascending by step; none without a file.

    A step that stands twice counts with its last record. Lines that are no records are left out and
    a warning names them; an incomplete last line is ignored silently.
    """
    records, broken = parse_log(path) if path.exists() else ([], {})
    if broken:
        _log.warning("%s", describe_broken(path, broken))
    return [record for record in records if last_step is None or record["step"] <= last_step]


def parse_log(path: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """(records ascending by step, what is wrong with each line that is none, by its number)."""
    by_step: dict[int, dict[str, Any]] = {}
    broken: dict[int, str] = {}
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, last], start=1):
        if not line.strip():
            continue
        try:
            record = _record(line)
        except ValueError as error:
            # Without an end of line it is a step that is or was being written.
            if number <= len(lines):
                broken[number] = str(error)
        else:
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)], broken


def describe_broken(path: Path, broken: dict[int, str]) -> str:
    """One line about lines of a log that are left out."""
    places = [f"line {number} ({reason:.120})" for number, reason in list(broken.items())[:5]]
    count = f"{len(broken)} broken line{' is' if len(broken) == 1 else 's are'} left out"
    return f"{path}: {count}: {', '.join(places)}{', ...' if len(broken) > 5 else ''}"


def _record(line: str) -> dict[str, Any]:
    """The record in a line; ValueError says why there is none."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"broken JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    step, loss, kept = record.get("step"), record.get("loss"), record.get("kept") or []
    if type(step) is not int:
        raise ValueError(f"field 'step': expected an integer, got {step!r}")
    if type(loss) not in (int, float):
        raise ValueError(f"field 'loss': expected a number, got {loss!r}")
    if not isinstance(kept, list) or not all(isinstance(layer, dict) for layer in kept):
        raise ValueError(f"field 'kept': expected a list of objects, got {kept!r}")
    return record


class RunLog:
    """Appends the record of each step to both logs of a run folder.

    Args:
        folder: the run folder.
        step: steps that are done; later records, left by a run that was killed, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        # It takes a second to import, and a log can be read without it.
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / LOG_NAME
        records = read_log(self._path, last_step=step)
        write_file(self._path, "".join(map(json_text, records)))
        self._file = self._path.open("ab", buffering=0)
        self._last = step
        self._board_folder = folder / TENSORBOARD_NAME
        with naming_file(self._board_folder):
            self._board: Any = SummaryWriter(str(self._board_folder), purge_step=step + 1)
        self._summary = Summary

    def write(self, record: dict[str, Any]) -> None:
        """Append one step; when this fails (a full disk) no part of a line stays.

        It may be tried again: a step whose line was written gets no second one.
        """
        if record["step"] > self._last:
            self._append(json_text(record).encode())
            self._last = record["step"]
        scalars = {name: record[name] for name in _SCALARS}
        for layer, kept in enumerate(record["kept"]):
            for sub_block, share in kept.items():
                scalars[f"kept/{sub_block}/{layer:03d}"] = share
        # One event with all of them: `add_scalar` makes one each, two for each layer.
        values = [{"tag": name, "simple_value": value} for name, value in scalars.items()]
        with naming_file(self._board_folder):
            self._board.file_writer.add_summary(self._summary(value=values), record["step"])
            # A full disk arrives here, not when the run ends or in the writer's own thread.
            self._board.flush()

    def _append(self, line: bytes) -> None:
        # The file's own position stays behind its end where an earlier line was taken back.
        end = os.fstat(self._file.fileno()).st_size
        try:
            with naming_file(self._path):
                written = self._file.write(line)
                if written != len(line):
                    # The kernel took a part: trying the rest brings the reason as an exception.
                    self._file.write(line[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def close(self) -> None:
        self._file.close()
        with naming_file(self._board_folder):
            self._board.close()
