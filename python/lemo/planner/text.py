"""Plans and sizes in words."""

from __future__ import annotations

import math

from lemo.planner.plan import Plan

__all__ = ["ACTIONS", "action_text", "bytes_text", "layers_text", "needed_text", "plan_lines"]

ACTIONS = {
    "none": "store everything",
    "selective": "recompute all but attention",
    "layer": "recompute all",
}
"""What happens to a layer in each mode."""

_GIB = 2**30


def layers_text(layers: range) -> str:
    """ "layer 3", or "layers 3-7"."""
    if len(layers) == 1:
        return f"layer {layers.start}"
    return f"layers {layers.start}-{layers.stop - 1}"


def plan_lines(plan: Plan) -> list[str]:
    """One line for each run of layers that are alike: what happens, and the bytes that each of
    them stores."""
    lines = [
        f"{layers_text(layers)}: {action_text(mode, one.host)}, {bytes_text(one.kept)} each"
        for layers, mode, one in plan.runs()
    ]
    if plan.head_groups > 1 and set(plan.modes) != {"none"}:
        lines.append(f"attention's backward: by {plan.head_groups} groups of heads")
    return lines


def action_text(mode: str, host: int) -> str:
    """What happens to a layer, and how many of its bytes go to the host."""
    return ACTIONS[mode] + (f", {bytes_text(host)} to the host" if host else "")


def bytes_text(size: int) -> str:
    """Bytes as a text in GiB, below a tenth of one in MiB, below a tenth of that in bytes."""
    if size < 2**20 / 10:
        return f"{size} bytes"
    if size < _GIB / 10:
        return f"{size / 2**20:.3g} MiB"
    return f"{size / _GIB:.{1 if size >= 10 * _GIB else 2}f} GiB"


def needed_text(size: int) -> str:
    """The same of a size that is needed: what the text says is so many bytes, or more."""
    if size < 2**20 / 10:
        return bytes_text(size)
    step = 2**20 if size < _GIB / 10 else _GIB / (10 if size >= 10 * _GIB else 100)
    return bytes_text(math.ceil(math.ceil(size / step) * step))
