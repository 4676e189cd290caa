"""The report in a run folder: which files are of one, and how it goes when the run does.

`lemo.report` writes it, and stands above run folders, which have to know it to be overwritten.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

__all__ = ["MARK", "PAGE_NAME", "REPORT_NAME", "has_mark", "is_of_report", "remove_report"]

# Where `lemo report` writes unless it is told.
REPORT_NAME = "report"
PAGE_NAME = "index.html"
# Stands in every file of a report.
MARK = "lemo report"
# Of several runs the names of plots have numbers.
_NAMES = re.compile(
    rf"{re.escape(PAGE_NAME)}|(loss|resources|(kept_share|kept_map|relevance)(_\d+)?)\.png"
)


def has_mark(path: Path) -> bool:
    """Whether a report has written this file, or the one that a link leads to."""
    return path.is_file() and MARK.encode() in path.read_bytes()


def is_of_report(path: Path) -> bool:
    """Whether a report has written a file of a report's names here; a link is never one."""
    return bool(_NAMES.fullmatch(path.name)) and not path.is_symlink() and has_mark(path)


def remove_report(folder: Path) -> None:
    """Removes the files of a report, and their folder where nothing else is in it.

    Files of others stay, as they do when a report is written, and so does what links lead to.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if is_of_report(path):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
