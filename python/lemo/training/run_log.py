"""The two logs of a run: ``log.jsonl`` with one object a step, and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lemo.files import write_file

LOG_NAME = "log.jsonl"
TENSORBOARD_NAME = "tensorboard"
_SCALARS = ("loss", "learning_rate", "tokens_per_second", "peak_memory_bytes", "kept_share")


def read_log(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records of ``log.jsonl`` up to ``last_step``; a torn last line is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if last_step is None or record["step"] <= last_step:
                records.append(record)
    return records


class RunLog:
    """Appends the record of each step to both logs of a run folder.

    Args:
        folder: the run folder.
        step: steps that are done; later records, left by a run that was killed, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / LOG_NAME
        records = read_log(path, last_step=step)
        write_file(path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = path.open("ab", buffering=0)
        self._board = SummaryWriter(str(folder / TENSORBOARD_NAME), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one step; when this fails (a full disk) no part of a line stays."""
        line = (json.dumps(record) + "\n").encode()
        end = self._file.tell()
        try:
            written = self._file.write(line)
            if written != len(line):
                # The kernel took a part: trying the rest brings the reason as an exception.
                self._file.write(line[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise
        for name in _SCALARS:
            self._board.add_scalar(name, record[name], record["step"])
        for layer, kept in enumerate(record["kept"]):
            for sub_block, share in kept.items():
                self._board.add_scalar(f"kept/{sub_block}/{layer:03d}", share, record["step"])
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()
