"""Seconds of a training step: products, attention, and the bytes that everything else moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from operator import add, mul
from typing import Any

from lemo.planner.shape import IN_DTYPE, LINEAR, Adapters, LayerRows, ModelShape, Step, layer_bytes

__all__ = ["Operations", "Rates", "StepTime", "operations"]

# A replayed pass: the same of the host for each adapter, which reads it and updates it; and the
# seconds that a GPU takes from a kernel of a graph to the next one, where both are short. Fitted to
# the two steps of the 135M shape in h200_finetune.jsonl.
_REPLAYED, _BETWEEN = 2, 4.5e-6
# Recomputing makes the host's operations more by this share.
_AGAIN = 0.36
# A host and a GPU work at the same time; where neither waits for the other all the time, a step
# takes a little longer than the longer of both.
_OVERLAP = 4
# Linear layers that read the same rows.
_TOGETHER = (LINEAR[:3], LINEAR[3:4], LINEAR[4:6], LINEAR[6:])


@dataclass(frozen=True)
class Operations:
    """What the host starts for a layer in both passes, as torch's dispatcher counts it
    (tests/python/test_planner_timing.py).

    Adapters of layers that read the same rows are a stack (`lemo.models.projections.low_rank`);
    with dropout each is its own.

    Attributes:
        base: without adapters.
        adapter: for each adapter, for each stack, and more for a stack of several.
        cast: more of them under autocast to another dtype.
        apart: the same as `adapter` in a dtype of their own.
        split: the same as sums of two numbers in the dtype of the rows.
        masked: more for each adapter with dropout, where rows are one slice; and for each that is
            computed again.
        norms: for norms that run as modules.
        selecting: for a sub-block that selects rows of its own.
        moving: for a layer of which something goes to the host.
        part: for each tensor that goes there and comes back.
    """

    base: int = 31
    adapter: tuple[int, ...] = (3, 3, 3)
    cast: tuple[int, ...] = (2, 2, 0)
    apart: tuple[int, ...] = (5, 6, 3)
    split: tuple[int, ...] = (4, 8, 0)
    masked: tuple[int, int] = (18, 10)
    norms: int = 56
    selecting: int = 16
    moving: int = 4
    part: int = 3


OPERATIONS = Operations()


def operations(adapted: Collection[str]) -> int:
    """What the host starts for a layer in both passes where nothing is recomputed.

    Args:
        adapted: names of linear layers with adapters, in the model's dtype.
    """
    return OPERATIONS.base + _of_adapters(OPERATIONS.adapter, _stacks(adapted))


def _stacks(adapted: Collection[str]) -> list[int]:
    """How many adapters each stack has."""
    counts = (sum(name in adapted for name in names) for names in _TOGETHER)
    return [count for count in counts if count]


def _of_adapters(kind: tuple[int, ...], stacks: list[int]) -> int:
    counts = sum(stacks), len(stacks), sum(count > 1 for count in stacks)
    return sum(map(mul, kind, counts))


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second; from `lemo.training.calibration`.

    Attributes:
        products: floating point operations of large matrix products.
        attention: those of attention's forward pass, of its visible half.
        attention_backward: the same of its backward pass.
        bytes: bytes that element-wise operations read or write.
        launch: seconds of the host for an operation.
        link: bytes that are copied to pinned memory of the host, or back.
        fp8: floating point operations of products in 8 bits; 0: not measured.
        between: bytes that a GPU receives from the others of a group.
    """

    products: float
    attention: float
    attention_backward: float
    bytes: float
    launch: float
    link: float = 5e10
    fp8: float = 0.0
    between: float = 3e11


@dataclass(frozen=True)
class _Work:
    """Operations of products, in the model's dtype and in 8 bits, and bytes that are moved, for
    each row."""

    products: float = 0
    moved: float = 0
    fp8: float = 0

    def __add__(self, other: _Work) -> _Work:
        return _Work(self.products + other.products, self.moved + other.moved, self.fp8 + other.fp8)

    def __sub__(self, other: _Work) -> _Work:
        return _Work(self.products - other.products, self.moved - other.moved, self.fp8 - other.fp8)


class StepTime:
    """The seconds of a step.

    Args:
        shape: the model.
        adapters: LoRA on it.
        step: lengths and kept rows.
        rates: of the machine.
        window: tokens that attention sees back; 0: all.
        group_size: tokens of a shifted attention group; 0: no groups.
        fp8: whether frozen weights multiply in 8 bits, but for `IN_DTYPE` and the last MLP.
        quantize: how weights are stored, which are sent so where processes have shares of them.
        started: what the host starts.
    """

    def __init__(
        self,
        shape: ModelShape,
        adapters: Adapters,
        step: Step,
        rates: Rates,
        window: int = 0,
        group_size: int = 0,
        fp8: bool = False,
        quantize: str | None = None,
        started: Operations = OPERATIONS,
    ) -> None:
        self._fp8, self._started = fp8, started
        self._shape, self._adapters, self._step, self._rates = shape, adapters, step, rates
        self._window, self._group_size = window, group_size
        self._norms_apart = adapters.norms and adapters.size != step.size
        self._split = adapters.are_split(step)
        self._quantize = quantize

    def with_head_groups(self, groups: int) -> StepTime:
        """The same step with groups of heads."""
        return self._with(head_groups=groups)

    def with_graphs(self) -> StepTime:
        """The same step, replayed as CUDA graphs."""
        return self._with(graphs=True)

    def _with(self, **settings: Any) -> StepTime:
        step = replace(self._step, **settings)
        if step == self._step:
            return self
        more = self._window, self._group_size, self._fp8, self._quantize, self._started
        return StepTime(self._shape, self._adapters, step, self._rates, *more)

    def seconds(
        self, modes: Iterable[str], moved: Iterable[int] = (), parts: Iterable[int] = ()
    ) -> float:
        """Of an optimizer step.

        Args:
            modes: of each layer.
            moved: bytes of each layer that go to the host; empty: none.
            parts: tensors of each layer that go there, the part of one included.
        """
        modes = list(modes)
        alike = Counter(zip(self._step.rows, modes))
        device = self.loss + sum(n * self._layer(*each) for each, n in alike.items())
        device += self._last_mlp(self._step.rows[-1], modes[-1])
        waiting = sum(self.waiting(index, size) for index, size in enumerate(moved))
        host = sum(n * self.host(mode) for (_, mode), n in alike.items())
        number, each = self._started, self._rates.launch
        host += each * number.selecting * self._step.selections
        host += each * sum(number.moving + number.part * count for count in parts if count)
        if self._step.graphs:
            device += host / self._rates.launch * _BETWEEN
            host = self._rates.launch * _REPLAYED * self._adapted * len(self._step.rows)
        if not self._step.cuda:
            return self._step.passes * (device + host + waiting)
        return self._step.passes * (_both(device, host) + waiting)

    def host(self, mode: str) -> float:
        """Of the host, for a layer in both passes."""
        adapters, number = self._adapters, self._started
        kind = number.apart if adapters.apart else number.adapter
        kind = number.split if self._split else kind
        if self._step.autocast and adapters.size != self._step.size:
            kind = tuple(map(add, kind, number.cast))
        stacks = _stacks(adapters.targets)
        masked = again = 0
        if adapters.dropout:
            stacks = [1] * sum(stacks)
            masked, again = (each * len(stacks) for each in number.masked)
        started = number.base + _of_adapters(kind, stacks)
        started += number.norms if self._norms_apart else 0
        if mode == "none":
            return self._rates.launch * (started + masked)
        return self._rates.launch * (started * (1 + _AGAIN) + masked + again)

    @property
    def _adapted(self) -> int:
        """Linear layers of a layer with adapters."""
        return sum(linear.name in self._adapters.targets for linear in self._shape.linears())

    @property
    def loss(self) -> float:
        """Of the head and the loss in both passes: logits, and the gradient of what they are of."""
        shape, step = self._shape, self._step
        products = 2 * 2 * step.labels * shape.vocabulary * shape.hidden
        moved = 6 * step.labels * shape.vocabulary * step.size
        seconds = products / self._rates.products + moved / self._rates.bytes
        # The embedding and the head, which come at once.
        ends = 2 * shape.vocabulary * shape.hidden * step.size
        return seconds + self._sent(ends) / self._rates.between

    def layer(self, index: int, mode: str) -> float:
        """Of the device, for a layer in both passes, with what it computes a second time.

        Args:
            index: the layer.
            mode: one of `lemo.planner.memory.MODES`.
        """
        rows = self._step.rows[index]
        last = index + 1 == len(self._step.rows)
        return self._layer(rows, mode) + (self._last_mlp(rows, mode) if last else 0.0)

    def waiting(self, index: int, size: int) -> float:
        """Seconds for which the device waits because bytes of a layer go to the host and back.

        The copies run beside the next layer, in both passes.

        Args:
            index: the layer.
            size: its bytes that are copied.
        """
        copying = size / self._rates.link
        if not self._step.cuda:
            return 2 * copying
        return sum(max(0.0, copying - hidden) for hidden in self._beside(index))

    def hidden(self, index: int) -> int:
        """Bytes of a layer whose copies the device does not wait for."""
        return int(min(self._beside(index)) * self._rates.link) if self._step.cuda else 0

    def _beside(self, index: int) -> tuple[float, float]:
        """Seconds of the next layer, forward and (at least) backward.

        Copies run on while the device waits for the host.
        """
        if index + 1 == len(self._step.rows):
            return 0.0, 0.0
        rows, host = self._step.rows[index + 1], self.host("none") / 2
        return _both(self._forward(rows), host), _both(self._backward(rows), host)

    def _layer(self, rows: LayerRows, mode: str) -> float:
        total = self._forward(rows) + self._backward(rows)
        if mode != "none":
            # The last product's values are not needed, but what A makes of its rows.
            again = self._mlp_forward() - self._down() + self._lower("down_proj")
            total += self._seconds(rows, self._attention_forward(), again)
        if mode == "layer":
            total += self._attending(rows.attention, 4, self._rates.attention)
        if mode != "none" and (self._step.head_groups or 1) > 1:
            total += self._seconds(rows, self._grouped(mode), _Work())
        if self._step.processes > 1:
            total += self._exchanging(rows.attention, mode)
        if self._step.shards > 1:
            coming = self._sent(layer_bytes(self._shape, self._step.size, self._quantize))
            coming /= self._rates.between
            # While the layer before runs, forward and backward.
            forward = self._forward(rows)
            total += max(0.0, coming - forward) + max(0.0, coming - (total - forward))
        return total

    def _last_mlp(self, rows: LayerRows, mode: str) -> float:
        """What the last layer's MLP takes more than others', whose products are in 8 bits."""
        if not self._fp8:
            return 0.0
        more = self._window, self._group_size, False, self._quantize, self._started
        plain = StepTime(self._shape, self._adapters, self._step, self._rates, *more)
        return self._seconds(rows, _Work(), plain._mlp(mode) - self._mlp(mode))

    def _mlp(self, mode: str) -> _Work:
        """An MLP in both passes, with what it computes a second time."""
        work = self._mlp_forward() + self._mlp_gradient()
        return work if mode == "none" else work + self._mlp_forward() - self._down()

    def _sent(self, size: int) -> float:
        """What a process receives of weights of so many bytes."""
        return size * (self._step.shards - 1) / self._step.shards

    def exchanged(self, rows: int, mode: str) -> int:
        """Bytes that a process receives in a layer from those that share out rows with it.

        Keys and values are gathered in forward, in backward, and where attention is computed again;
        their gradients are summed.

        Args:
            rows: of this process.
            mode: of the layer.
        """
        shape, step = self._shape, self._step
        each = (step.processes - 1) * rows * 2 * shape.keys * step.size
        return (4 if mode == "layer" else 3) * each

    def _exchanging(self, rows: int, mode: str) -> float:
        """Seconds for which a layer waits for the others' rows.

        The first part of a gather and the last one of a sum have nothing to hide behind.
        """
        parts = max(min(self._step.key_parts, self._shape.key_heads), 1)
        seconds = self.exchanged(rows, mode) / self._rates.between
        attending = self._attending(rows, 4, self._rates.attention)
        attending *= 2 if mode == "layer" else 1
        attending += self._attending(rows, 10, self._rates.attention_backward)
        return seconds / parts + max(0.0, seconds * (1 - 1 / parts) - attending)

    def _forward(self, rows: LayerRows) -> float:
        work = self._seconds(rows, self._attention_forward(), self._mlp_forward())
        return work + self._attending(rows.attention, 4, self._rates.attention)

    def _backward(self, rows: LayerRows) -> float:
        work = self._seconds(rows, self._attention_gradient(), self._mlp_gradient())
        return work + self._attending(rows.attention, 10, self._rates.attention_backward)

    def _seconds(self, rows: LayerRows, attention: _Work, mlp: _Work) -> float:
        products = rows.attention * attention.products + rows.mlp * mlp.products
        moved = rows.attention * attention.moved + rows.mlp * mlp.moved
        eights = rows.attention * attention.fp8 + rows.mlp * mlp.fp8
        return (
            products / self._rates.products
            + moved / self._rates.bytes
            + (eights / self._rates.fp8 if eights else 0)
        )

    def _attending(self, rows: int, operations: int, rate: float) -> float:
        """Seconds of attention from a process's rows to the kept rows of each sequence."""
        step, pairs = self._step, 0.0
        share = rows * step.processes / step.tokens  # that all processes keep together
        for length in step.lengths:
            seen = share * length
            if self._window:
                seen = min(seen, 2 * self._window * share)
            if self._group_size:
                seen = min(seen, self._group_size * share)
            pairs += share * length * seen / 2 / step.processes
        return operations * self._shape.queries * pairs / rate

    # Work of a row

    def _frozen(self, name: str, read: int, written: int) -> _Work:
        """A product with the frozen weight of a linear layer, of rows of so many numbers."""
        operations, size = 2 * read * written, self._step.size
        if not self._fp8 or name in IN_DTYPE:
            return _Work(operations, size * (read + written))
        # Rows are rounded, which reads and writes them, and then read in 8 bits.
        return _Work(0, read * (size + 2) + size * written, operations)

    def _linear(self, name: str) -> _Work:
        """A linear layer, forward."""
        linear = next(each for each in self._shape.linears() if each.name == name)
        inputs, outputs = linear.inputs, linear.outputs
        size, rank = self._step.size, self._adapters.rank_of(name)
        work = self._frozen(name, inputs, outputs)
        if name not in self._adapters.targets:
            return work
        work += _Work(0, inputs * self._masking()[0])
        pair = 2 * rank * (inputs + outputs)
        if self._split:
            # In three blocks, of which a product, its parts, and they again are moved.
            return work + _Work(3 * pair, size * (inputs + 2 * outputs) + rank * 3 * (4 + 3 * size))
        if self._adapters.apart:
            return work + _Work(pair, self._widened(inputs, outputs)[0])
        return work + _Work(pair, size * (inputs + 2 * outputs))

    def _lower(self, name: str) -> _Work:
        """What a pair's A makes of the rows, of that."""
        inputs = next(each.inputs for each in self._shape.linears() if each.name == name)
        adapters, size = self._adapters, self._step.size
        if name not in adapters.targets:
            return _Work()
        products = 2 * adapters.rank_of(name) * inputs * (3 if self._split else 1)
        widened = 2 * adapters.size if adapters.apart and not self._split else 0
        return _Work(products, inputs * (size + widened + self._masking()[0]))

    def _linear_gradient(self, name: str) -> _Work:
        """The same, backward: the weight is frozen."""
        linear = next(each for each in self._shape.linears() if each.name == name)
        inputs, outputs = linear.inputs, linear.outputs
        size, rank = self._step.size, self._adapters.rank_of(name)
        work = self._frozen(name, outputs, inputs)
        if name not in self._adapters.targets:
            return work
        work += _Work(0, inputs * self._masking()[1])
        pair = 4 * rank * (inputs + outputs)
        if self._split:
            moved = size * (2 * outputs + 3 * inputs) + rank * 3 * (8 + 4 * size)
            return work + _Work(3 * pair, moved)
        if self._adapters.apart:
            return work + _Work(pair, self._widened(inputs, outputs)[1])
        return work + _Work(pair, size * (2 * outputs + 3 * inputs))

    def _masking(self) -> tuple[float, float]:
        """Bytes that dropout moves for a number of the input, forward and backward
        (lemo.models.projections.dropout)."""
        if not self._adapters.dropout:
            return 0, 0
        apart = self._adapters.apart
        size, number = self._step.size, self._adapters.size if apart else self._step.size

        def multiplied(size: int) -> int:
            return 1 + 4 * size  # a byte made a number; this, what is multiplied, and the product

        # Bits are packed and unpacked by three operators on bytes.
        drawn, unpacked = 1 + 5 + 1 / 8, 1 / 8 + 7
        # Of the input's gradient the product is a tensor of its own, as it is if `apart`.
        gradient = multiplied(number) + (0 if apart and not self._split else 2 * number)
        return drawn + multiplied(size), unpacked + multiplied(size) + gradient

    def _widened(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Bytes that a pair moves in a dtype of its own, forward and backward."""
        size, wide = self._step.size, self._adapters.size
        added = 2 * wide + 2 * size  # made wide and read; read and written as a sum
        # Rows are widened, and read so: the result's gradient by two products.
        forward = inputs * (size + 2 * wide) + outputs * added
        return forward, outputs * (size + 3 * wide) + inputs * (size + 2 * wide + added)

    def _norm(self, readers: int) -> _Work:
        """A norm on gathered rows, and its result for so many adapted layers, forward."""
        size, hidden = self._step.size, self._shape.hidden
        if self._norms_apart:
            # Gathered, widened, squared, averaged, scaled, narrowed, weighted; narrowed by readers.
            moved = 2 * size + (size + 4) + 8 + 4 + 8 + (4 + size) + (size + 4)
            return _Work(0, hidden * (moved + readers * (4 + size)))
        return _Work(0, 3 * size * hidden)

    def _norm_gradient(self, readers: int) -> _Work:
        size, hidden = self._step.size, self._shape.hidden
        if self._norms_apart:
            moved = 2 * (size + 4) + 12 + (4 + size) + 3 * 12 + (4 + size) + 3 * size
            return _Work(0, hidden * (moved + readers * (4 + size) + (readers - 1) * 12))
        return _Work(0, (4 + 3 * (readers - 1)) * size * hidden)

    def _attention_forward(self) -> _Work:
        shape, size = self._shape, self._step.size
        work = self._norm(3) + _Work(0, 2 * size * (shape.queries + shape.keys))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            work += self._linear(name)
        return work + _Work(0, 3 * size * shape.hidden)

    def _grouped(self, mode: str) -> _Work:
        """What groups of heads take beside all heads at once: copies of their parts, and where
        attention's result was not stored queries, keys and values once more."""
        shape, size = self._shape, self._step.size
        copies = _Work(0, 8 * size * (shape.queries + shape.keys))
        for _ in range(1, self._step.head_groups or 1):
            # Each group has the products of As for itself.
            for name in ("q_proj", "k_proj", "v_proj"):
                copies += self._lower(name)
        if mode == "selective":
            return copies
        work = self._norm(3) + _Work(0, 2 * size * (shape.queries + shape.keys))
        for name in ("q_proj", "k_proj", "v_proj"):
            work += self._linear(name)
        return copies + work

    def _attention_gradient(self) -> _Work:
        shape, size = self._shape, self._step.size
        work = self._norm_gradient(3) + _Work(0, 2 * size * (shape.queries + shape.keys))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            work += self._linear_gradient(name)
        return work + _Work(0, 2 * size * shape.hidden)

    def _down(self) -> _Work:
        return self._linear("down_proj") + _Work(0, 3 * self._step.size * self._shape.hidden)

    def _mlp_forward(self) -> _Work:
        work = self._norm(2) + _Work(0, 3 * self._step.size * self._shape.width)
        return work + self._linear("gate_proj") + self._linear("up_proj") + self._down()

    def _mlp_gradient(self) -> _Work:
        size, shape = self._step.size, self._shape
        work = self._norm_gradient(2) + _Work(0, 5 * size * shape.width)
        for name in ("gate_proj", "up_proj", "down_proj"):
            work += self._linear_gradient(name)
        return work + _Work(0, 2 * size * shape.hidden)


def _both(device: float, host: float) -> float:
    """Seconds of work that a host starts and a device does."""
    return (device**_OVERLAP + host**_OVERLAP) ** (1 / _OVERLAP)
