"""Options of the command line that are made of settings: names, types, help and defaults."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lemo.cli.options import collect_settings, parse_integers
from lemo.settings.base import Settings, fields_of, read_yaml

__all__ = ["Given", "with_settings"]

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Given:
    """What the command line says of settings.

    Attributes:
        config: YAML file of settings, or None.
        options: values of options by the settings' names, those that were given.
        assignments: "name=value" strings of --set.
    """

    config: Path | None
    options: dict[str, Any]
    assignments: list[str]

    def collected(self) -> dict[str, Any]:
        """Settings from --set, over the other options, over the file."""
        return collect_settings(self.config, self.options, self.assignments)

    def settings(self, cls: type[S]) -> S:
        """The same, checked.

        Raises:
            ValueError: as of the constructor; what is wrong with the file itself names it.
        """
        values = self.collected()
        try:
            return cls.from_dict(values)
        except ValueError as error:
            if self.config is not None and str(error) in cls.faults(read_yaml(self.config)):
                raise ValueError(f"{self.config}: {error}") from None
            raise


def with_settings(
    cls: type[Settings], names: Iterable[str], example: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command options for settings, beside its own ones.

    The command is called with a `Given` and its own options. It also gets --config and --set.

    Args:
        cls: the settings.
        names: those that get an option; of nested ones the last part is the option's name.
        example: of --set.
    """
    fields = dict(fields_of(cls))
    chosen = {name.rpartition(".")[2]: (name, fields[name]) for name in names}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @functools.wraps(command)
        def run(
            config: Path | None = None, assignments: list[str] | None = None, **values: Any
        ) -> None:
            given = {}
            for option, (name, field) in chosen.items():
                value = values.pop(option)
                if value is not None:
                    given[name] = _parsed(f"--{option.replace('_', '-')}", value, field)
            command(Given(config, given, assignments or []), **values)

        parameters = [
            _parameter("config", Path, typer.Option(help="YAML file of settings.")),
            *(_of_field(option, name, field) for option, (name, field) in chosen.items()),
            *own,
            _parameter(
                "assignments",
                list[str],
                typer.Option(
                    "--set",
                    metavar="NAME=VALUE",
                    help=f"Any setting, over options and file: {example}.",
                ),
            ),
        ]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _of_field(option: str, name: str, field: FieldInfo) -> inspect.Parameter:
    default = field.get_default(call_default_factory=True)
    kind = _kind(field.annotation)
    shown = ""
    # A flag is off without it.
    if kind is not bool and default not in (PydanticUndefined, None, ()):
        text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = f"  [default: {text}]"
    where = f" ({name})" if "." in name else ""
    flags = [f"--{option.replace('_', '-')}"] if kind is bool else []
    return _parameter(
        option,
        kind,
        typer.Option(
            *flags,
            help=f"{str(field.description).rstrip('.')}{where}.{shown}",
            show_default=False,
        ),
    )


def _kind(annotation: Any) -> type:
    """int, float, bool, or str for everything that is read from a text."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _kind(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        members = [m for m in typing.get_args(annotation) if m is not type(None)]
        return _kind(members[0]) if len(members) == 1 else str
    return annotation if annotation in (int, float, bool) else str


def _parsed(option: str, value: Any, field: FieldInfo) -> Any:
    return parse_integers(value, option) if _is_integers(field.annotation) else value


def _is_integers(annotation: Any) -> bool:
    """Whether a setting is a list of integers."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _is_integers(members[0])
    return origin is tuple and _is_integer(members[0])


def _is_integer(annotation: Any) -> bool:
    if typing.get_origin(annotation) is Annotated:
        return _is_integer(typing.get_args(annotation)[0])
    return annotation is int
