"""Rows of benchmarks/results keep the names that settings had when they were measured."""

from typing import Any

from lemo.settings.elimination import LayerwiseConfig

_RENAMED = {"schedule": "keep_schedule", "loss_segment": "loss_chunk"}


def current_elimination(recorded: dict[str, Any]) -> dict[str, Any]:
    """The elimination of a row in the names and groups of today's `LemoConfig`.

    Until 2026-11-28 all fields were in one group, and the scorer "exact" was called "label".
    """
    values = {_RENAMED.get(name, name): value for name, value in recorded.items()}
    names = {*LayerwiseConfig.model_fields} - {"keep"}
    layerwise = dict(values.pop("layerwise", {}))
    layerwise |= {name: values.pop(name) for name in names & {*values}}
    if isinstance(values.get("keep"), list):
        layerwise["keep"] = values.pop("keep")
    if values.get("scorer") == "label":
        values["scorer"] = "exact"
    return values | ({"layerwise": layerwise} if layerwise else {})
