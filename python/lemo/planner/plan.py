"""The mode of each layer that takes the least time within the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from lemo import _C
from lemo.packing.chunks import split_heads
from lemo.planner.memory import MODES, LayerBytes, StepMemory
from lemo.planner.timing import Rates, StepTime

__all__ = [
    "MARGIN",
    "NOMINAL",
    "DoesNotFitError",
    "Plan",
    "Planner",
    "bytes_text",
    "longest_that_fits",
]

MARGIN = 0.05
"""Share of the memory that a plan leaves free: what predictions may be wrong by."""

NOMINAL = Rates(7.35e14, 6.3e14, 5.9e14, 2.9e12, 4.3e-5, fp8=1.3e15)
"""Rates of an H200, fitted to recorded steps. They order the modes where nothing was measured."""

_GIB = 2**30
# Kept bytes of a layer are rounded up to a 2^-16th of the memory: the planner then tells few sums
# apart.
_PARTS = 16
# Groups of heads that are tried, besides one for each key head.
_HEAD_GROUPS = (1, 2, 4, 8, 16, 32)
# Lengths that are tried are multiples of it.
_TOKENS = 16
_MOST_TOKENS = 2**27


class DoesNotFitError(ValueError):
    """A step needs more memory than there is, whatever is recomputed."""


@dataclass(frozen=True)
class Plan:
    """What each layer of a step does, and what is predicted of the step.

    Attributes:
        modes: "none", "selective" or "layer" for each layer.
        layers: bytes of each.
        peak: highest bytes of the step on the device.
        seconds: of the step.
        limit: bytes that it may take.
        head_groups: by which attention's backward runs in layers that are recomputed, at most.
    """

    modes: tuple[str, ...]
    layers: tuple[LayerBytes, ...]
    peak: int
    seconds: float
    limit: int
    head_groups: int = 1

    def runs(self) -> Iterator[tuple[range, str, LayerBytes]]:
        """(layers, mode, bytes of one of them) of neighbours that are alike."""
        first = 0
        for (mode, layer), group in groupby(zip(self.modes, self.layers)):
            end = first + len(list(group))
            yield range(first, end), mode, layer
            first = end


class Planner:
    """Plans of one step.

    Args:
        memory: its bytes.
        time: its seconds.
        fixed: bytes that no mode changes; None: those that are predicted.
    """

    def __init__(self, memory: StepMemory, time: StepTime, fixed: int | None = None) -> None:
        self._memory, self._time = memory, time
        self._fixed = memory.fixed if fixed is None else fixed
        self._num_layers = len(memory.step.rows)

    @property
    def rows(self) -> list[int]:
        """The rows that sub-blocks keep, of all layers."""
        return [rows for layer in self._memory.step.rows for rows in layer]

    @property
    def weights(self) -> int:
        """Bytes of weights, adapters and the optimizer's state."""
        return self._memory.weights

    def plan(self, limit: int) -> Plan | None:
        """The fastest plan within a limit in bytes, less the margin where that leaves one.

        Heads are worked on in groups where that gives a faster plan than all at once.
        """
        if limit <= 0:
            return None
        for usable in (round((1 - MARGIN) * limit), limit):
            plans = [
                plan
                for groups in self._choices()
                if (plan := self._within(usable, groups, limit)) is not None
            ]
            if plans:
                return min(plans, key=lambda plan: plan.seconds)
        return None

    def _within(self, usable: int, groups: int, limit: int) -> Plan | None:
        grain = max(1, usable >> _PARTS)
        options = self._with(groups)._options()
        found, *_ = _C.plan_memory(options, usable, 0, self._fixed, grain)
        if len(found) == 0:
            return None
        return self.of([MODES[option] for option in found[: self._num_layers]], limit, groups)

    def smallest(self, limit: int) -> Plan:
        """The plan that takes the least memory, whether it is within the limit or not."""
        return self.of([MODES[-1]] * self._num_layers, limit, self._choices()[-1])

    def _choices(self) -> list[int]:
        """The numbers of groups of heads that there are to choose from, ascending."""
        step, key_heads = self._memory.step, self._memory.key_heads
        if step.head_groups is not None:
            return [step.head_groups]
        if self._memory.has_head_norms:
            return [1]  # the backward passes of the norms take as much
        most = len(split_heads(key_heads, key_heads, step.shifted))
        return [groups for groups in _HEAD_GROUPS if groups < most] + [most]

    def _with(self, groups: int) -> Planner:
        """The same with groups of heads."""
        return Planner(
            self._memory.with_head_groups(groups), self._time.with_head_groups(groups), self._fixed
        )

    def of(self, modes: Sequence[str], limit: int, head_groups: int | None = None) -> Plan:
        """The plan with these modes, whether it is within the limit or not.

        Args:
            modes: of each layer.
            limit: in bytes.
            head_groups: of the plan; None: those of the step, or where they are open all heads at
                once if that is within the limit, else the fewest groups that are.
        """
        if head_groups is None:
            plans = [self.of(modes, limit, groups) for groups in self._choices()]
            return next((plan for plan in plans if plan.peak <= limit), plans[-1])
        memory, time = self._memory, self._time
        memory, time = memory.with_head_groups(head_groups), time.with_head_groups(head_groups)
        layers = tuple(memory.layer(index, mode) for index, mode in enumerate(modes))
        peak = memory.peak(modes) - memory.fixed + self._fixed
        return Plan(tuple(modes), layers, peak, time.seconds(modes), limit, head_groups)

    def least(self) -> int:
        """The fewest bytes that the step needs, whatever is recomputed."""
        most = self.of([MODES[0]] * self._num_layers, 0).peak
        options = self._with(self._choices()[-1])._options()
        return _C.least_memory(options, 0, self._fixed, max(1, most >> _PARTS))

    def _options(self) -> list[list[tuple[int, int, int, int, float]]]:
        """The modes of each layer, and the loss as one more layer, which has no choice."""
        made: dict[tuple[int, int], list[tuple[int, int, int, int, float]]] = {}
        for index, rows in enumerate(self._memory.step.rows):
            if rows in made:
                continue
            made[rows] = []
            for mode in MODES:
                layer = self._memory.layer(index, mode)
                # Whole nanoseconds, so that sums of the same numbers are equal in any order.
                time = round(1e9 * self._time.layer(index, mode))
                made[rows].append((layer.kept, layer.forward, layer.backward, 0, float(time)))
        loss = [(0, 0, self._memory.loss, 0, 0.0)]
        return [*(made[rows] for rows in self._memory.step.rows), loss]


def longest_that_fits(planner_of: Callable[[int], Planner], limit: int) -> int:
    """The most tokens of a sequence, in steps of 16, of which a plan is within a limit.

    Args:
        planner_of: plans steps of so many tokens.
        limit: in bytes.

    Returns:
        0 where not even 16 tokens fit.
    """
    fits, too_long = 0, _TOKENS
    while too_long <= _MOST_TOKENS and planner_of(too_long).plan(limit) is not None:
        fits, too_long = too_long, 2 * too_long
    while too_long - fits > _TOKENS:
        middle = (fits + too_long) // 2 // _TOKENS * _TOKENS
        if planner_of(middle).plan(limit) is None:
            too_long = middle
        else:
            fits = middle
    return fits


def bytes_text(size: int) -> str:
    """Bytes as a text in GiB, below a tenth of one in MiB."""
    if size < _GIB / 10:
        return f"{size / 2**20:.3g} MiB"
    return f"{size / _GIB:.{1 if size >= 10 * _GIB else 2}f} GiB"
