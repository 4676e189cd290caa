"""What the planner chose, as settings of lemo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lemo.planner.plan import Plan
    from lemo.planner.request import Request

__all__ = ["longest_plan", "settings_of"]

GRAIN = 16


def settings_of(plan: Plan) -> dict[str, Any]:
    """Fields of `LemoConfig` by which a step does what a plan says, all of it."""
    return {
        "recompute": plan.modes,
        "head_groups": plan.head_groups,
        "offload": plan.shares if plan.host else 0.0,
        "host_memory": plan.host / 2**30,
    }


def longest_plan(
    request: Request, usable: int, seconds: float = float("inf")
) -> tuple[int, Plan | None]:
    """The longest window that the planner fits, and its plan; 0 and None where none fits.

    Args:
        request: of any length.
        usable: bytes of the device.
        seconds: that a step may take, by the plan.
    """
    tokens = request.longest(usable)
    while tokens:
        plan = request.planner(tokens).plan(usable)
        if plan is not None and plan.seconds <= seconds:
            return tokens, plan
        # Time grows by the square of the length, or less. What fits by its bytes alone is planned
        # with a granularity that may rule out the last few tokens.
        shorter = 1.0 if plan is None else (seconds / plan.seconds) ** 0.5
        tokens = min(int(shorter * tokens), tokens - 1) // GRAIN * GRAIN
    return 0, None
