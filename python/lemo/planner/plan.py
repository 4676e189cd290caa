"""The mode of each layer that takes the least time within the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from lemo import _C
from lemo.packing.chunks import split_heads
from lemo.planner.memory import MODES, LayerBytes, StepMemory
from lemo.planner.timing import Rates, StepTime

__all__ = [
    "MARGIN",
    "NOMINAL",
    "DoesNotFitError",
    "GraphRules",
    "HostRules",
    "Plan",
    "Planner",
    "longest_that_fits",
]

MARGIN = 0.05
"""Share of the memory that a plan leaves free: what predictions may be wrong by."""

NOMINAL = Rates(7.35e14, 6.3e14, 5.9e14, 2.9e12, 4.3e-5, fp8=1.3e15, link=5e10)
"""Rates of an H200, fitted to recorded steps. They order the modes where nothing was measured. That
of the link to the host is what its PCIe 5 gives."""

# Kept bytes of a layer are rounded up to a 2^-16th of the memory: the planner then tells few sums
# apart.
_PARTS = 16
# The same of bytes on the host.
_HOST_PARTS = 9
# Sets of options that are compared after each layer, where something may go to the host.
_STATES = 512
# Shares of a layer's bytes that are tried.
_SHARES = 4
# Groups of heads that are tried, besides one for each key head.
_HEAD_GROUPS = (1, 2, 4, 8, 16, 32)
# Lengths that are tried are multiples of it.
_TOKENS = 16


_Options = list[list[tuple[int, int, int, int, float, int]]]


class DoesNotFitError(ValueError):
    """A step needs more memory than there is, whatever is recomputed."""


@dataclass(frozen=True)
class HostRules:
    """What may go to the host.

    Attributes:
        limit: its bytes that a step may take.
        shares: of each layer's bytes, what goes there; None: what the planner chooses.
    """

    limit: int = 0
    shares: tuple[float, ...] | None = None

    def choices(self, mode_bytes: int, hidden: int, index: int) -> tuple[float, ...]:
        """The shares of a layer's bytes that a plan may move.

        Args:
            mode_bytes: what the layer keeps in some mode.
            hidden: bytes whose copies the device does not wait for.
            index: the layer.
        """
        if self.shares is not None:
            return (self.shares[index],)
        if not self.limit or not mode_bytes:
            return (0.0,)
        # Rounded down, to few numbers.
        most = min(1.0, hidden / mode_bytes) * _PARTS // 1 / _PARTS
        return tuple(sorted({most, *(part / _SHARES for part in range(_SHARES + 1))}))


@dataclass(frozen=True)
class GraphRules:
    """How passes are replayed as CUDA graphs, where all sub-blocks keep the same rows.

    Attributes:
        always: whether wherever it can be; else where kernels are short, and where as much memory
            stays free as the graphs hold, so that passes without a graph find place.
    """

    always: bool = False


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
        shares: of each layer's bytes, what goes to the host.
        graphs: bytes that CUDA graphs hold, also between steps; 0: passes are not replayed.
    """

    modes: tuple[str, ...]
    layers: tuple[LayerBytes, ...]
    peak: int
    seconds: float
    limit: int
    shares: tuple[float, ...] = ()
    head_groups: int = 1
    graphs: int = 0

    @property
    def host(self) -> int:
        """Bytes on the host."""
        return sum(layer.host for layer in self.layers)

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
        host: what may go to the host.
        graphs: how passes are replayed as CUDA graphs; None: they are not.
    """

    def __init__(
        self,
        memory: StepMemory,
        time: StepTime,
        fixed: int | None = None,
        host: HostRules = HostRules(),
        graphs: GraphRules | None = None,
    ) -> None:
        self._memory, self._time, self._host = memory, time, host
        self._graphs = graphs
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

    def plan(self, limit: int, modes: Sequence[str] | None = None) -> Plan | None:
        """The fastest plan within a limit in bytes, less the margin where that leaves one.

        Heads are worked on in groups where that gives a faster plan than all at once, and passes
        are replayed as CUDA graphs where that may be and is faster.

        Args:
            limit: of the device.
            modes: of each layer; None: what is fastest.
        """
        if limit <= 0:
            return None
        return self._better(self._plain(limit, modes), self._replayed(limit, modes))

    def given(self, modes: Sequence[str], limit: int) -> Plan:
        """The plan with these modes, replayed as CUDA graphs where that may be, fits and is faster;
        whether it is within the limit or not."""
        plan = self._better(self.of(modes, limit), self._replayed(limit, modes))
        assert plan is not None
        return plan

    def _better(self, plain: Plan | None, replayed: Plan | None) -> Plan | None:
        if plain is None or replayed is None:
            return replayed or plain
        always = self._graphs is not None and self._graphs.always
        return replayed if always or replayed.seconds <= plain.seconds else plain

    def _replayed(self, limit: int, modes: Sequence[str] | None) -> Plan | None:
        """The fastest plan within a limit whose passes are replayed as CUDA graphs."""
        if self._graphs is None or self._host.limit or any(self._host.shares or ()):
            return None
        allowed = self._memory.capturable(not self._graphs.always)
        if modes is None and allowed == MODES[:1]:
            modes = MODES[:1] * self._num_layers
        if not allowed or not {*(modes or ())} <= {*allowed}:
            return None
        memory, time = self._memory.with_graphs(), self._time.with_graphs()
        fixed = self._fixed + memory.fixed - self._memory.fixed
        room = limit
        if not self._graphs.always:
            # As much as graphs hold, for passes without one.
            room = fixed + (limit - fixed - memory.held(0)) // 2
        plan = Planner(memory, time, fixed)._plain(room, modes)
        if plan is None:
            return None
        return replace(plan, limit=limit, graphs=memory.held(plan.peak - fixed))

    def _plain(self, limit: int, modes: Sequence[str] | None) -> Plan | None:
        """The same without graphs."""
        if limit <= 0:
            return None
        if self._host.limit and self._host.shares is None:
            # Where nothing has to go there, nothing does.
            alone = Planner(self._memory, self._time, self._fixed)._plain(limit, modes)
            if alone is not None and set(alone.modes) <= {MODES[0], *(modes or ())}:
                return alone
        for usable in (round((1 - MARGIN) * limit), limit):
            plans = [
                plan
                for groups in self._choices()
                if (plan := self._within(usable, groups, limit, modes)) is not None
            ]
            if plans:
                return min(plans, key=lambda plan: plan.seconds)
        return None

    def _within(
        self, usable: int, groups: int, limit: int, modes: Sequence[str] | None
    ) -> Plan | None:
        choices, options = self._with(groups)._options(modes)
        grains = max(1, usable >> _PARTS), self._host_grain
        limits = usable, self._host.limit, self._fixed
        # Few of those that differ in what goes to the host are compared.
        states = [_STATES] if self._host.limit else []
        found, *_ = _C.plan_memory(options, *limits, *grains, *states)
        if states and not found:
            found, *_ = _C.plan_memory(_timeless(options), *limits, *grains)
        if len(found) == 0:
            return None
        chosen = [choices[index][option] for index, option in enumerate(found[1:-1])]
        shares = [share for _, share in chosen]
        plan = self.of([mode for mode, _ in chosen], limit, groups, shares)
        if self._host.shares is not None or not any(shares):
            return plan
        # The host's time is not a sum over layers, and copies of many tensors take more of it.
        alike = self.of(plan.modes, limit, groups, self._alike(plan.modes, plan.shares))
        fits = alike.peak <= usable and alike.host <= self._host.limit
        return alike if fits and alike.seconds < plan.seconds else plan

    def _alike(self, modes: Sequence[str], shares: Sequence[float]) -> tuple[float, ...]:
        """One share of all layers, by which as many bytes go to the host as by these."""
        kept = [self._memory.layer(index, mode).kept for index, mode in enumerate(modes)]
        moved = sum(share * size for share, size in zip(shares, kept))
        return (moved / max(sum(kept), 1),) * self._num_layers

    def smallest(self, limit: int, modes: Sequence[str] | None = None) -> Plan:
        """The plan that takes the least memory, whether it is within the limit or not.

        Args:
            limit: of the device.
            modes: of each layer; None: all are recomputed.
        """
        modes = [MODES[-1]] * self._num_layers if modes is None else modes
        shares = self._host.shares
        if shares is None and self._host.limit:
            layers = [self._memory.layer(index, mode, 1.0) for index, mode in enumerate(modes)]
            share = min(1.0, self._host.limit / max(sum(layer.host for layer in layers), 1))
            shares = (share,) * self._num_layers
        return self.of(modes, limit, self._choices()[-1], shares)

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
        memory, time = self._memory, self._time
        memory, time = memory.with_head_groups(groups), time.with_head_groups(groups)
        return Planner(memory, time, self._fixed, self._host)

    def of(
        self,
        modes: Sequence[str],
        limit: int,
        head_groups: int | None = None,
        shares: Sequence[float] | None = None,
    ) -> Plan:
        """The plan with these modes, whether it is within the limit or not.

        Args:
            modes: of each layer.
            limit: in bytes.
            head_groups: of the plan; None: those of the step, or where they are open all heads at
                once if that is within the limit, else the fewest groups that are.
            shares: of each layer's bytes, what goes to the host; None: as it was given, or nothing.
        """
        if shares is None:
            shares = self._host.shares or (0.0,) * self._num_layers
        if head_groups is None:
            plans = [self.of(modes, limit, groups, shares) for groups in self._choices()]
            return next((plan for plan in plans if plan.peak <= limit), plans[-1])
        memory, time = self._memory, self._time
        memory, time = memory.with_head_groups(head_groups), time.with_head_groups(head_groups)
        pairs = zip(modes, shares)
        layers = tuple(memory.layer(index, *pair) for index, pair in enumerate(pairs))
        peak = memory.peak(modes, shares) - memory.fixed + self._fixed
        moved = ([layer.host for layer in layers], [layer.parts for layer in layers])
        seconds = time.seconds(modes, *moved)
        return Plan(tuple(modes), layers, peak, seconds, limit, tuple(shares), head_groups)

    def sensitive_shares(self, mode: str, size: int) -> tuple[float, ...]:
        """Shares of the layers' bytes by which so many bytes, at most, go to the host.

        Those whose copies the device does not wait for come first; the others come from all layers
        alike, by what they have left. Where one share of all layers is predicted to be faster, as
        it takes the host less time, it is that.

        Args:
            mode: of all layers.
            size: bytes.
        """
        count = self._num_layers
        kept = [self._memory.layer(index, mode).kept for index in range(count)]
        hidden = [min(kept[index], self._time.hidden(index)) for index in range(count)]
        size = min(size, sum(kept))
        free, rest = sum(hidden), [k - h for k, h in zip(kept, hidden)]
        first = min(1.0, size / free) if free else 0.0
        more = max(0, size - free) / sum(rest) if sum(rest) else 0.0
        shares = tuple(
            min(1.0, (first * h + more * r) / k) if k else 0.0
            for h, r, k in zip(hidden, rest, kept)
        )
        modes = [mode] * count
        ways = shares, self._alike(modes, shares)
        return min(ways, key=lambda way: self.of(modes, 0, None, way).seconds)

    def fits(self, limit: int, modes: Sequence[str] | None = None) -> bool:
        """Whether a plan is within a limit in bytes.

        Args:
            limit: of the device.
            modes: of each layer; None: whatever is recomputed.
        """
        return self._fits(limit, self._smallest_options(modes))

    def least(self, modes: Sequence[str] | None = None) -> int:
        """The fewest bytes with which a plan fits, whatever goes to the host.

        -1 where the host is too small for what goes there anyway.

        Args:
            modes: of each layer; None: whatever is recomputed.
        """
        options = self._smallest_options(modes)
        least = self.of([MODES[0]] * self._num_layers, 0).peak
        # Kept bytes are rounded up by the size of the memory, which is known better afterwards.
        for _ in range(2):
            grains = max(1, least >> _PARTS), self._host_grain
            least = _C.least_memory(options, self._host.limit, self._fixed, *grains)
            if least < 0:
                return least
        while not self._fits(least, options):
            least += max(1, least >> _PARTS)
        return least

    def _fits(self, limit: int, options: _Options) -> bool:
        if limit <= self._fixed:
            return False
        grains = max(1, limit >> _PARTS), self._host_grain
        found, *_ = _C.plan_memory(options, limit, self._host.limit, self._fixed, *grains)
        return len(found) > 0

    def _smallest_options(self, modes: Sequence[str] | None) -> _Options:
        """The options that take the least memory at a time; their seconds do not count."""
        return _timeless(self._with(self._choices()[-1])._options(modes)[1])

    @property
    def _host_grain(self) -> int:
        return max(1, self._host.limit >> _HOST_PARTS)

    def _options(
        self, modes: Sequence[str] | None
    ) -> tuple[list[list[tuple[str, float]]], _Options]:
        """(mode and share of each option, the options) of each layer.

        The embedding and the loss are one more layer each, which have no choice.
        """
        memory, time, rows = self._memory, self._time, self._memory.step.rows
        known: dict[object, list[tuple[int, int, int, int, float, int]]] = {}
        choices, options = [], []
        for index in range(self._num_layers):
            allowed = MODES if modes is None else (modes[index],)
            hidden = time.hidden(index) if self._host.limit else 0
            pairs = [
                (mode, share)
                for mode in allowed
                for share in self._host.choices(memory.layer(index, mode).kept, hidden, index)
            ]
            choices.append(pairs)
            kind = memory.kind_of(index)
            key = rows[index], rows[index + 1 : index + 2], kind, *pairs
            if key not in known:
                known[key] = [self._option(index, *pair) for pair in pairs]
            options.append(known[key])
        embedding = [(0, memory.embedding, 0, 0, 0.0, 0)]
        return choices, [embedding, *options, [(0, 0, memory.loss, 0, 0.0, 0)]]

    def _option(self, index: int, mode: str, share: float) -> tuple[int, int, int, int, float, int]:
        layer = self._memory.layer(index, mode, share)
        seconds = self._time.layer(index, mode) + self._time.waiting(index, layer.host)
        # The loss comes when all of the last layer has left.
        moving = 0 if index + 1 == self._num_layers else layer.moving
        # Whole nanoseconds, so that sums of the same numbers are equal in any order.
        time = float(round(1e9 * seconds))
        return layer.kept, layer.forward, layer.backward, layer.host, time, moving


def _timeless(options: _Options) -> _Options:
    """Options of which only the bytes count: far fewer sets of them differ."""
    return [[(*each[:4], 0.0, each[5]) for each in layer] for layer in options]


def longest_that_fits(fits_with: Callable[[int], bool], most: int) -> int:
    """The most tokens of a sequence, in steps of 16, with which a step fits.

    Args:
        fits_with: whether a step fits whose sequences have so many tokens.
        most: tokens that are tried.

    Returns:
        0 where not even 16 tokens fit.
    """
    fits, too_long = 0, _TOKENS
    while too_long <= most and fits_with(too_long):
        fits, too_long = too_long, 2 * too_long
    too_long = min(too_long, most // _TOKENS * _TOKENS + _TOKENS)
    while too_long - fits > _TOKENS:
        middle = (fits + too_long) // 2 // _TOKENS * _TOKENS
        if fits_with(middle):
            fits = middle
        else:
            too_long = middle
    return fits
