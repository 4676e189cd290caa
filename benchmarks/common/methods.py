"""Named methods in a YAML file, whose sizes may be written as "context/4" or "batch*2"."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["in_numbers", "read_methods"]


def read_methods(
    path: Path, names: list[str] | None, sizes: Mapping[str, int], option: str
) -> dict[str, dict[str, Any]]:
    """The methods of these names (None: all) with their entries as numbers.

    Raises:
        argparse.ArgumentTypeError: the file has no method of a name that `option` gave.
    """
    known = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in names or ():
        if name not in known:
            raise argparse.ArgumentTypeError(f"{option}: expected names of {path}, got '{name}'")
    return {name: in_numbers(known[name] or {}, sizes) for name in names or known}


def in_numbers(value: Any, sizes: Mapping[str, int]) -> Any:
    """What "context", "context/4" (rounded up) or "context*2" means, also inside of lists and
    mappings; other values as they are."""
    if isinstance(value, dict):
        return {key: in_numbers(entry, sizes) for key, entry in value.items()}
    if isinstance(value, list):
        return [in_numbers(entry, sizes) for entry in value]
    words = re.fullmatch(r"(\w+)(?:([*/])(\d+))?", value) if isinstance(value, str) else None
    if words is None or words[1] not in sizes:
        return value
    size, factor = sizes[words[1]], int(words[3] or 1)
    return size * factor if words[2] == "*" else math.ceil(size / factor)
