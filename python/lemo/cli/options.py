"""Settings from a YAML file and from the command line, and messages on the screen."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import typer
from rich.console import Console

from lemo.cli.streams import printable
from lemo.files import writes_through


def show_help(context: typer.Context) -> None:
    """Callback of a group of commands: print its help where none of them is named."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def console(quiet: bool = False) -> Console:
    """Where progress and messages go: standard error, so that results can be piped."""
    return _plain_console(sys.stderr, soft_wrap=True, quiet=quiet)


def result_console() -> Console:
    """Where results go: standard output."""
    return _plain_console(sys.stdout)


def _plain_console(file: Any, **settings: Any) -> Console:
    # Names are names, whatever brackets and colons they hold. With the file Rich knows which
    # characters it can write.
    return Console(file=file, markup=False, emoji=False, highlight=False, **settings)


def show_own_messages(screen: Console) -> None:
    """Print lemo's messages on ``screen``."""
    logger = logging.getLogger("lemo")
    logger.handlers = [_ScreenHandler(screen)]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def show_messages(screen: Console) -> None:
    """Print lemo's messages on ``screen`` and silence messages of other libraries."""
    import transformers

    show_own_messages(screen)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Its layers in 8 bits say at every call that they cast their input.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


class _ScreenHandler(logging.Handler):
    """Prints above the live progress, where there is one."""

    def __init__(self, screen: Console):
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        self._screen.print(printable(mark + record.getMessage()))


def collect_settings(
    config: Path | None, given: Mapping[str, Any], assignments: Iterable[str]
) -> dict[str, Any]:
    """Settings from a file, then the options, then ``--set``; what comes later wins.

    Args:
        config: YAML file of settings, or None.
        given: settings by name, as options gave them; a name may have dots ("elimination.keep").
        assignments: "name=value" strings.

    Raises:
        ValueError, FileNotFoundError: see :func:`lemo.settings.base.read_yaml` and
            :func:`apply_assignments`.
    """
    from lemo.settings.base import read_yaml

    settings = {} if config is None else read_yaml(config)
    for name, value in given.items():
        _assign(settings, name.split("."), value)
    apply_assignments(settings, assignments)
    return settings


def apply_assignments(settings: dict[str, Any], assignments: Iterable[str]) -> None:
    """Apply ``--set`` options to ``settings`` in place, in their order.

    An assignment is "name=value" or "group.name=value" with a YAML value: "elimination.keep=0.5".

    Raises:
        ValueError: not an assignment, or its group is no mapping.
    """
    import yaml

    from lemo.settings.base import parse_yaml

    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise ValueError(f"--set: expected name=value, got '{assignment}'")
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = getattr(error, "problem", error)
            raise ValueError(
                f"--set: expected a YAML value, got '{assignment}': {reason}"
            ) from None
        _assign(settings, names, value)


def _assign(settings: dict[str, Any], names: Sequence[str], value: Any) -> None:
    group = settings
    for depth, name in enumerate(names[:-1], start=1):
        if group.get(name) is None:
            group[name] = {}
        group = group[name]
        if not isinstance(group, dict):
            path, inner = ".".join(names), ".".join(names[:depth])
            raise ValueError(f"{path}: '{inner}' is {group!r}, it has no '{names[depth]}'")
    group[names[-1]] = value


def parse_integers(text: str, option: str) -> list[int]:
    """ "4096,8K,-1" -> [4096, 8192, -1]; "K" counts 1024s, "M" 1024 of these.

    Raises:
        ValueError: something is not an integer; the message names ``option``.
    """
    numbers = []
    for part in text.split(","):
        word = part.strip().lower()
        unit = {"k": 2**10, "m": 2**20}.get(word[-1:], 1)
        try:
            numbers.append(int(word[:-1] if unit > 1 else word) * unit)
        except ValueError:
            raise ValueError(
                f"{option}: expected integers with commas, such as 4096,8K, got '{text}'"
            ) from None
    return numbers


def check_output_file(option: str, path: Path) -> None:
    """Raise an OSError, naming ``option``, unless a file can be put at ``path``.

    A device, a pipe or a link is as good as a file (see :func:`lemo.files.write_file`).
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option}: expected a file, but '{path}' is a folder")
    special = writes_through(path)
    folder = Path(os.path.realpath(path)).parent
    if not special and not folder.is_dir():
        raise FileNotFoundError(
            f"{option}: expected a file in a folder that exists, but '{folder}' is none"
        )
    if not os.access(path if special else folder, os.W_OK):
        raise PermissionError(f"{option}: '{path}' cannot be written here")


def check_choice(option: str, value: str, kind: Any) -> None:
    """Raise ValueError, naming ``option``, unless ``value`` is one of a Literal's."""
    choices = get_args(kind)
    if value not in choices:
        raise ValueError(f"{option}: expected one of {', '.join(choices)}, got '{value}'")
