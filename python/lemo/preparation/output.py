"""The output folder of a preparation: it appears complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lemo.predictors.storage import DESCRIPTION_FILE, WEIGHTS_FILE

__all__ = ["check_output", "publish", "work_folder"]


def check_output(output: Path, overwrite: bool) -> None:
    """Raises FileExistsError where a new folder must not take the place of what is at `output`.

    Args:
        output: where the folder of `lemo prepare` is to appear.
        overwrite: an earlier one, or an empty folder, may be replaced; anything else never.
    """
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"output: '{output}' exists; choose another folder, or overwrite it")
    ours = {WEIGHTS_FILE, DESCRIPTION_FILE}
    if not output.is_dir() or not {entry.name for entry in output.iterdir()} <= ours:
        raise FileExistsError(
            f"output: expected a folder with nothing but {DESCRIPTION_FILE} and {WEIGHTS_FILE} to "
            f"overwrite, got '{output}'; nothing is replaced"
        )


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, removed with all that is in it at the end."""
    # A fixed name: what a killed run left behind, maybe gigabytes, goes with the next run.
    work = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(result: Path, output: Path, overwrite: bool) -> None:
    """Moves the finished folder `result` to `output`.

    An old folder is moved away first, next to `result`, and moved back if this fails.

    Args:
        result: in a folder of `work_folder`.
        output: where it is to appear.
        overwrite: as for `check_output`.

    Raises:
        FileExistsError: see `check_output`; something may have appeared since it was called first.
        OSError: the system cannot move a folder.
    """
    check_output(output, overwrite)
    if not output.exists():
        result.rename(output)
        return
    old = result.with_name("old")
    output.rename(old)
    try:
        result.rename(output)
    except OSError:
        old.rename(output)
        raise
