"""A plan in words."""

from __future__ import annotations

from lemo.planner.plan import Plan, bytes_text

__all__ = ["ACTIONS", "layers_text", "plan_lines"]

ACTIONS = {
    "none": "store everything",
    "selective": "recompute all but attention",
    "layer": "recompute all",
}
"""What happens to a layer in each mode."""


def layers_text(layers: range) -> str:
    """ "layer 3", or "layers 3-7"."""
    if len(layers) == 1:
        return f"layer {layers.start}"
    return f"layers {layers.start}-{layers.stop - 1}"


def plan_lines(plan: Plan) -> list[str]:
    """One line for each run of layers that are alike: what happens, and the bytes that each of
    them stores."""
    lines = [
        f"{layers_text(layers)}: {ACTIONS[mode]}, {bytes_text(one.kept)} each"
        for layers, mode, one in plan.runs()
    ]
    if plan.head_groups > 1 and set(plan.modes) != {"none"}:
        lines.append(f"attention's backward: by {plan.head_groups} groups of heads")
    return lines
