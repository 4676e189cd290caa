"""The one way in which settings are declared, checked, read and written.

A settings class names its fields with their types, limits, defaults and one description each. From
these come the checks, the messages, the options of the command line and the tables of the docs.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import annotated_types
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from typing_extensions import Self

__all__ = [
    "MOST",
    "Context",
    "Flag",
    "GiB",
    "Integer",
    "NotNegative",
    "Number",
    "Place",
    "Positive",
    "Rank",
    "Seed",
    "Settings",
    "Share",
    "Switch",
    "Text",
    "Tokens",
    "Windows",
    "expected",
    "fields_of",
    "group_of",
    "names_in",
    "parse_yaml",
    "plain",
    "read_yaml",
]


def _number(value: Any) -> Any:
    # YAML 1.1 reads 2e-4 as a string: it wants a dot in every float.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _text(value: Any) -> Any:
    value = str(value) if isinstance(value, Path) else value
    if isinstance(value, str):
        value.encode()  # Libraries underneath write names as UTF-8; not every file name is.
        if "\0" in value:
            raise ValueError("no name of the system's has a NUL")
    return value


def _switch(value: Any) -> Any:
    # YAML 1.1 reads on and off as booleans.
    return ("off", "on")[value] if isinstance(value, bool) else value


Integer = Annotated[int, Strict()]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False), BeforeValidator(_number)]
Share = Annotated[Number, Field(ge=0, le=1)]
GiB = Annotated[Number, Field(gt=0, le=2**30)]
# Whatever is counted fits 32 bits: the operators count tokens so, NumPy takes seeds so (each
# process adds its number), and nothing that runs to its end has more steps.
MOST = 2**31 - 1
Positive = Annotated[Integer, Field(ge=1, le=MOST)]
NotNegative = Annotated[Integer, Field(ge=0, le=MOST)]
Tokens = Positive
Seed = NotNegative
# More than any layer has features.
Rank = Annotated[Integer, Field(ge=1, le=2**16)]
# In memory at once: those of a step are, before its first pass.
Windows = Annotated[Integer, Field(ge=1, le=2**20)]
# Tokens of a sequence, of which one predicts another.
Context = Annotated[Integer, Field(ge=2, le=MOST)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1), BeforeValidator(_text)]
# In files no shell puts the home folder in the place of "~".
Place = Annotated[Text, AfterValidator(os.path.expanduser)]


class Settings(BaseModel):
    """Settings of one subject: frozen, validated when constructed, from keywords.

    Raises:
        ValueError: a value does not fit ("name: expected <what>, got <value>"), is missing, or has
            a name that is not known (the message lists close ones).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**_named_by_texts(values))
        except ValidationError as error:
            # What is missing may be there by a name that is not known.
            first = min(error.errors(), key=_is_missing)
            raise ValueError(_message(type(self), first, values)) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values (lists, numbers, strings), fit for JSON and YAML."""
        return {name: plain(getattr(self, name)) for name in type(self).model_fields}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Absent fields take their defaults.

        Raises:
            ValueError: no mapping, or a setting that is not known or has a bad value; the message
                names it.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"values: expected a mapping of settings, got {values!r}")
        return cls(**{str(name): value for name, value in values.items()})

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with these settings, a line each; that others are missing is not."""
        named = {str(name): value for name, value in values.items()}
        try:
            # Constructed by pydantic alone, which tells all errors.
            BaseModel.__init__(cls.__new__(cls), **_named_by_texts(named))
        except ValidationError as error:
            found = [each for each in error.errors() if not _is_missing(each)]
            return [_message(cls, each, named) for each in found]
        return []

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Reads a YAML file; FileNotFoundError, or ValueError naming the file."""
        values = read_yaml(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def replace(self, **changes: Any) -> Self:
        """These settings with some values changed, validated again."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**values | changes)


def fields_of(cls: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(name, field) of all fields; those of nested groups with dots in their names."""
    for name, field in cls.model_fields.items():
        yield f"{prefix}{name}", field
        group = group_of(field)
        if group is not None:
            yield from fields_of(group, f"{prefix}{name}.")


def group_of(field: FieldInfo) -> type[Settings] | None:
    """The settings class of a nested group; None: the field is a value."""
    for member in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(member, type) and issubclass(member, Settings):
            return member
    return None


def names_in(value: Any) -> Any:
    """The names in a text with commas, which options give in place of a list."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def expected(field: FieldInfo) -> str:
    """What a field takes, in words: "an integer >= 1", "one of kept, all", "a list of ..."."""
    return _words(field.annotation, field.metadata)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's own loader takes the last.

    And names the line of a value that Python cannot hold, or cannot write in a message.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # Python bounds the digits, of hexadecimal integers only here.
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name.value in seen:
                problem = f"the key '{name.value}' stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty files are empty mappings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML (the message names the line), or not a mapping.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"config: expected a YAML file, but '{path}' is a folder")
    if not path.exists():
        raise FileNotFoundError(f"config: expected a YAML file, but '{path}' does not exist")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: not YAML: {getattr(error, 'problem', error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def parse_yaml(text: str) -> Any:
    """The value that a text in YAML has.

    Raises:
        yaml.YAMLError: it is none, has a key twice in a mapping, or what Python cannot hold.
        ValueError, RecursionError: Python cannot read it.
    """
    return yaml.load(text, _Loader)


def plain(value: Any) -> Any:
    """The value of a field as JSON and YAML have it: groups as dicts, tuples as lists."""
    if isinstance(value, Settings):
        return value.to_dict()
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def _named_by_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values whose groups have texts as names, which keywords have to be: YAML also has numbers."""
    return {
        name: {str(inner): each for inner, each in value.items()}
        if isinstance(value, Mapping)
        else value
        for name, value in values.items()
    }


def _is_missing(error: ErrorDetails) -> bool:
    return error["type"] == "missing"


def _message(cls: type[Settings], error: ErrorDetails, values: Mapping[str, Any]) -> str:
    """One line for one thing that is wrong."""
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return _unknown(cls, name)
    if _is_missing(error):
        return f"{name}: expected a value, got none"
    field = cls.model_fields[name]
    group = group_of(field)
    value = values.get(name, field.default)
    if error["type"] == "value_error" and group is not None and isinstance(value, Mapping):
        inner = error["msg"].removeprefix("Value error, ")
        # What the group says of one of its fields gets the group's name in front.
        dot = inner.partition(":")[0].partition(",")[0] in dict(fields_of(group))
        return f"{name}.{inner}" if dot else f"{name}: {inner}"
    # The words say nothing of texts and lists that are empty.
    empty = ", not empty" if error["type"].endswith("too_short") else ""
    return f"{name}: expected {expected(field)}{empty}, got {value!r}"


def _unknown(cls: type[Settings], name: str) -> str:
    known = [path for path, _ in fields_of(cls)]
    last = {path.rpartition(".")[2]: path for path in reversed(known)}
    close = [name] if name in last else difflib.get_close_matches(name, last, n=3, cutoff=0.5)
    if close:
        return f"unknown setting '{name}'; did you mean {' or '.join(last[c] for c in close)}?"
    return f"unknown setting '{name}'; known: {', '.join(cls.model_fields)}"


def _words(annotation: Any, metadata: Any = ()) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        annotation, *inner = typing.get_args(annotation)
        return _words(annotation, [*inner, *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_words(member) for member in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    if origin is Literal:
        choices = typing.get_args(annotation)
        one = "one of " if len(choices) > 1 else ""
        return one + ", ".join(repr(c) if one == "" else str(c) for c in choices)
    if origin is tuple:
        members = typing.get_args(annotation)
        if members[-1] is Ellipsis:
            return f"a list of {_plural(_words(members[0]))}"
        return f"[{', '.join(_words(member) for member in members)}]"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "a group of settings"
    limits = _limits(metadata)
    if annotation is bool:
        return "true or false"
    if annotation is int:
        return "an integer" + limits
    if annotation is float:
        return "a number" + limits
    return "a text in UTF-8"


def _limits(metadata: Any) -> str:
    low: tuple[str, str, Any] | None = None
    high: tuple[str, str, Any] | None = None
    for entry in _flat(metadata):
        if isinstance(entry, annotated_types.Ge):
            low = (">=", "[", entry.ge)
        elif isinstance(entry, annotated_types.Gt):
            low = (">", "(", entry.gt)
        elif isinstance(entry, annotated_types.Le):
            high = ("<=", "]", entry.le)
        elif isinstance(entry, annotated_types.Lt):
            high = ("<", ")", entry.lt)
    if low and high:
        return f" in {low[1]}{_digits(low[2])}, {_digits(high[2])}{high[1]}"
    one_sided = low or high
    return f" {one_sided[0]} {_digits(one_sided[2])}" if one_sided else ""


def _digits(limit: Any) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _flat(metadata: Any) -> Iterator[Any]:
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            yield from entry.metadata
        else:
            yield entry


def _plural(words: str) -> str:
    for one, many in (("an integer", "integers"), ("a number", "numbers"), ("a text", "texts")):
        if words.startswith(one):
            return many + words.removeprefix(one)
    return words
