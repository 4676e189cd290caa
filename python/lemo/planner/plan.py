"""The mode of each layer that takes the least time within the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from lemo import _C
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
    """

    modes: tuple[str, ...]
    layers: tuple[LayerBytes, ...]
    peak: int
    seconds: float
    limit: int

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
        """The fastest plan within a limit in bytes, less the margin where that leaves one."""
        if limit <= 0:
            return None
        for usable in (round((1 - MARGIN) * limit), limit):
            grain = max(1, usable >> _PARTS)
            found, *_ = _C.plan_memory(self._options(), usable, 0, self._fixed, grain)
            if len(found) > 0:
                return self.of([MODES[option] for option in found[: self._num_layers]], limit)
        return None

    def of(self, modes: Sequence[str], limit: int) -> Plan:
        """The plan with these modes, whether it is within the limit or not."""
        layers = tuple(self._memory.layer(index, mode) for index, mode in enumerate(modes))
        peak = self._memory.peak(modes) - self._memory.fixed + self._fixed
        return Plan(tuple(modes), layers, peak, self._time.seconds(modes), limit)

    def least(self) -> int:
        """The fewest bytes that the step needs, whatever is recomputed."""
        most = self.of([MODES[0]] * self._num_layers, 0).peak
        return _C.least_memory(self._options(), 0, self._fixed, max(1, most >> _PARTS))

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
