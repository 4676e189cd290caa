"""Files and folders that are written whole or not at all, locked, and removed only where lemo's.

And the JSON in them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK_NAME = ".lock"

# A file that a killed process was writing: ".NAME.", eight digits, ".tmp" (once without digits).
_TEMPORARY = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?\.tmp")
# What the system answers where a file system has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_log = logging.getLogger("lemo")


def write_file(path: Path, content: bytes | str) -> None:
    """Replace the content of ``path`` in one move, after it has reached the disk.

    A link stays, its target is replaced. A device, a pipe or one of this process's own descriptors
    (``/dev/stdout``, ``/dev/fd/3``) gets the content written to it.
    """
    with naming_file(path):
        _write(path, content.encode() if isinstance(content, str) else content)


def json_text(value: Any, **layout: Any) -> str:
    """Plain values as JSON, and an end of line.

    JSON knows no numbers that are not finite, such as the perplexity of a model that has diverged:
    they are null.

    Args:
        value: what is written.
        layout: further arguments of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **layout) + "\n"


def read_json(path: Path, place: str | None = None) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        place: how the message begins; None: with ``path``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8, or none that Python can hold.
    """
    place = str(path) if place is None else place
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # Python bounds depth and digits.
        raise ValueError(f"{place}: expected JSON, got {error}") from None


def digest_of(value: Any) -> str:
    """Hexadecimal SHA-256 of a value that JSON has, whatever the order of names in it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Names ``path`` in an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        elif isinstance(error.filename, bytes):  # as TensorBoard has it
            error.filename = os.fsdecode(error.filename)
        raise


def _write(path: Path, data: bytes) -> None:
    if writes_through(path):
        descriptor = _own_descriptor(path)
        target = path if descriptor is None else os.dup(descriptor)
        with open(target, "wb") as file:
            file.write(data)
        return
    path = Path(os.path.realpath(path))
    # A name of its own: two processes that write one file do not meet.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            # Nobody knows the temporary file, which is gone.
            error.filename, error.filename2 = str(path), None
        raise
    _sync_folder(path.parent)


def writes_through(path: Path) -> bool:
    """Whether ``path`` is a device, a pipe or a descriptor, which nothing can take the place of."""
    if _own_descriptor(path) is not None:
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that takes its place when the block ends without an error.

    A folder that is at ``path`` already stays until the new one is complete; what it holds besides
    the files of the new one moves over. A link stays, the folder that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    restore_folder(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        _sync_folder(temporary)
        put_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_folder(new: Path, path: Path) -> None:
    """Move the folder ``new`` to ``path``, in the place of a folder that may be there.

    What the old folder holds besides the files of the new one moves over. Where this fails the old
    one is back in its place; where the process is killed, `restore_folder` puts it back.
    """
    try:
        # A folder that is not empty cannot be replaced in one move: the old one steps aside first.
        if path.exists():
            os.replace(path, _aside(path))
        os.replace(new, path)
    except BaseException:
        restore_folder(path)
        raise
    _sync_folder(path.parent)
    restore_folder(path)


def restore_folder(path: Path) -> None:
    """Put back what `put_folder` moved away from ``path``, or what of it the new one lacks."""
    aside = _aside(path)
    if aside.is_dir():
        _merge(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def foreign(folder: Path, own: re.Pattern[str]) -> list[Path]:
    """What in ``folder`` is no plain file of a name that ``own`` matches, or ``folder`` itself.

    Links are foreign, wherever they lead. Temporary files of names that ``own`` matches are not.
    """
    if folder.is_symlink() or not folder.is_dir():
        return [folder]
    return sorted(
        entry
        for entry in folder.iterdir()
        if not own.fullmatch(_TEMPORARY.sub(r"\g<name>", entry.name))
        or not stat.S_ISREG(entry.lstat().st_mode)
    )


def remove_folder(folder: Path, own: re.Pattern[str]) -> None:
    """Remove ``folder`` and its files, all of them of names that ``own`` matches.

    Raises:
        FileExistsError: there is something else in it; nothing is removed.
    """
    strangers = foreign(folder, own)
    if strangers:
        raise FileExistsError(f"'{strangers[0]}' was not written by lemo and is not removed")
    for entry in folder.iterdir():
        if own.fullmatch(_TEMPORARY.sub(r"\g<name>", entry.name)):
            entry.unlink()
    # Fails, and rightly, where something came in between.
    folder.rmdir()


def check_above(path: Path, subject: str) -> None:
    """Raise NotADirectoryError, beginning with ``subject``, if a file is where folders of ``path``
    have to be."""
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{subject}: expected folders above it, but '{above}' is a file")


@contextlib.contextmanager
def lock(file: Path, subject: str, shared: bool = False, waiting: bool = False) -> Iterator[None]:
    """Keep other processes from taking the same lock until the block ends.

    The lock is the system's, on ``file``: it vanishes with the process, however that ends. Folders
    of ``file`` that are absent are made; those that are still empty at the end go with the file.
    Where the file system has no locks a warning says so and the block runs without one.

    Args:
        file: holds process, host and time while the lock is held.
        subject: what is locked, for messages: "output: 'runs/a'".
        shared: several may hold it in this way at once, and nobody the other way meanwhile.
        waiting: until others have given it back; for what takes them a moment.

    Raises:
        BlockingIOError: another process has the lock, and it is not waited for; the message says
            which.
        OSError: ``file`` cannot be written, such as behind another file.
    """
    check_above(file, subject)
    made = [folder for folder in file.parents if not folder.exists()]
    descriptor = -1
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        descriptor = _take(file, subject, kind if waiting else kind | fcntl.LOCK_NB)
        yield
    finally:
        if descriptor >= 0:
            _release(file, descriptor)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def locked_output(folder: str | Path) -> Iterator[Path]:
    """The real path of an output folder, which no other process writes until the block ends.

    The lock lies beside the folder, so that all of it may be replaced. Where ``folder`` is a link,
    the folder that it leads to is written, and the link stays.

    Raises:
        BlockingIOError, OSError: see :func:`lock`.
    """
    path = Path(os.path.realpath(folder))
    with lock(path.with_name(f".{path.name}.lock"), f"output: '{folder}'"):
        yield path


@contextlib.contextmanager
def updating(path: Path) -> Iterator[None]:
    """Wait for those who update ``path``, and make others wait until the block ends.

    For files that several processes read, change and replace: without it one that reads before the
    other one has written loses what that one adds. The lock is on a file beside it.

    Raises:
        OSError: the folder of ``path`` cannot be written.
    """
    # A link stays, the file that it leads to is updated.
    place = Path(os.path.realpath(path))
    with lock(place.with_name(f".{place.name}.lock"), f"'{path}'", waiting=True):
        yield


def _take(file: Path, subject: str, kind: int) -> int:
    """Descriptor of ``file`` with the lock on it, or without one where there are no locks.

    Args:
        file, subject: as for `lock`.
        kind: of the lock, as `fcntl.flock` takes it.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # Another process has just removed the folder that it had made.
        try:
            fcntl.flock(descriptor, kind)
        except OSError as error:
            holder = os.pread(descriptor, 500, 0).decode(errors="replace").strip()
            if error.errno in _NO_LOCKS:
                _log.warning(
                    "%s: its file system has no locks (%s), so nothing keeps a second process out",
                    subject,
                    error.strerror,
                )
                return descriptor
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise BlockingIOError(
                f"{subject} is in use by {holder or 'another process'}; wait until it has ended, "
                "or take another folder"
            ) from None
        if _is_file_of(file, descriptor):
            break
        os.close(descriptor)  # Its last holder has removed it: the next one is another file.
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
    with contextlib.suppress(OSError):  # The lock holds on a full disk, too.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
    return descriptor


def _release(file: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        # The last one that shares it can have it alone, and removes the file.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_file_of(file, descriptor):
            file.unlink()
    os.close(descriptor)


def _is_file_of(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _own_descriptor(path: Path) -> int | None:
    """The descriptor of this process that ``path`` stands for, as /dev/stdout stands for 1."""
    folder = f"/proc/{os.getpid()}/fd"
    for _ in range(40):  # as many links as the system follows
        if path.name.isdecimal() and os.path.realpath(path.parent) == folder:
            return int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return None


def _merge(old: Path, new: Path) -> None:
    """Remove ``old``, whose place ``new`` has taken or takes; what only ``old`` has moves over."""
    if not new.exists():
        os.replace(old, new)
        return
    try:
        for entry in old.iterdir():
            if (new / entry.name).exists():
                entry.unlink()
            else:
                os.replace(entry, new / entry.name)
        old.rmdir()
    except OSError as error:
        _log.warning("%s: what an earlier '%s' held stays there: %s", old, new.name, error)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
