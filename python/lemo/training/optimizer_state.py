"""The state of an optimizer in few tensors, for a file.

An adapter has hundreds of parameters. To write a tensor takes Python's lock for some 50
microseconds, and with it the thread that trains: of hundreds, longer than a step of a small model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.training.behind import Joined

__all__ = ["packed", "unpacked"]


def packed(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose tensors of one name, of all parameters, a copy makes one; see `unpacked`.

    What is no state dict of an optimizer that keeps the same for all parameters stays as it is.
    """
    entries: dict[int, dict[str, Any]] = state.get("state", {})
    by_name: dict[str, list[Any]] = {}
    for entry in entries.values():
        for name, value in entry.items():
            by_name.setdefault(name, []).append(value)
    if not entries or not all(_are_alike(found, len(entries)) for found in by_name.values()):
        return state
    rest = {name: value for name, value in state.items() if name != "state"}
    tensors = {name: _joined(found) for name, found in by_name.items()}
    return rest | {"packed": {"parameters": torch.tensor(list(entries)), "tensors": tensors}}


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of which `behind.Copy` copied what `packed` gave; any other stays as it is."""
    if "packed" not in state:
        return state
    rest = {name: value for name, value in state.items() if name != "packed"}
    parameters = state["packed"]["parameters"].tolist()
    split = {name: _split(joined) for name, joined in state["packed"]["tensors"].items()}
    entries = {
        parameter: {name: found[place] for name, found in split.items()}
        for place, parameter in enumerate(parameters)
    }
    return rest | {"state": entries}


def _are_alike(values: list[Any], count: int) -> bool:
    tensors = [value for value in values if isinstance(value, Tensor)]
    kinds = {(x.device, x.dtype) for x in tensors}
    return len(tensors) == len(values) == count and len(kinds) == 1


def _joined(tensors: list[Tensor]) -> dict[str, Any]:
    """Elements of all, shapes, and which of these each has."""
    shapes: dict[torch.Size, int] = {}
    of = [shapes.setdefault(x.shape, len(shapes)) for x in tensors]
    return {
        "elements": Joined(tensors),
        "shapes": [list(shape) for shape in shapes],
        "shape": torch.tensor(of),
    }


def _split(joined: dict[str, Any]) -> list[Tensor]:
    shapes = [torch.Size(joined["shapes"][index]) for index in joined["shape"].tolist()]
    parts = joined["elements"].split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]
