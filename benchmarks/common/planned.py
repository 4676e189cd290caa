"""What the planner chose, as settings of lemo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lemo.planner.plan import Plan

__all__ = ["settings_of"]


def settings_of(plan: Plan) -> dict[str, Any]:
    """Fields of `LemoConfig` by which a step does what a plan says, all of it."""
    return {
        "recompute": plan.modes,
        "head_groups": plan.head_groups,
        "offload": plan.shares if plan.host else 0.0,
        "host_memory": plan.host / 2**30,
    }
