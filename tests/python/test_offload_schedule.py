"""When copies of saved activations run: by clocks in place of a GPU's streams.

Layers and copies take chosen seconds. What the streams wait for is the implementation's; what a
pass then takes has to be what the planner predicts.
"""

import random
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from lemo.models.memory import host_pool, offload
from lemo.planner.shape import Adapters, LayerRows, ModelShape, step_of
from lemo.planner.timing import Rates, StepTime

pytestmark = pytest.mark.cpu_only

LINK = 1e9
UNIT = 4096
Streams = offload._Streams


class Clocks:
    """When the stream that computes, and those of the copies, have done all that they were given.

    In place of `_Streams`: copies happen at once, and an event is the second at which they end.
    """

    now = 0.0

    def __init__(self, _device):
        self.to, self.back = 0.0, 0.0

    def to_host(self, copies):
        self.to = max(self.to, Clocks.now) + self.seconds(copies)
        return self.to

    def from_host(self, copies):
        self.back = max(self.back, Clocks.now) + self.seconds(copies)
        return self.back

    def seconds(self, copies):
        size = 0
        for target, source in copies:
            target.copy_(source)
            size += target.nbytes
        return size / LINK

    def wait(self, event):
        Clocks.now = max(Clocks.now, event)

    def wait_for(self, other):
        self.to = max(self.to, other.back)


class Layer(torch.autograd.Function):
    """Doubles, and takes so long in both passes."""

    @staticmethod
    def forward(ctx, x, size, forward, backward):
        Clocks.now += forward
        ctx.save_for_backward(torch.zeros(size, dtype=torch.uint8))
        ctx.seconds = backward
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        (saved,) = ctx.saved_tensors
        Clocks.now += ctx.seconds
        assert not saved.any()
        return 2 * gradient, None, None, None


@pytest.fixture(autouse=True)
def clocks(monkeypatch):
    monkeypatch.setattr(offload, "_Streams", Clocks)
    monkeypatch.setattr(offload, "SMALLEST", 256)
    monkeypatch.setattr(host_pool, "HOST_ALIGNMENT", 512)
    monkeypatch.setattr(Clocks, "now", 0.0)


def seconds_of(layers, sizes, shares):
    """(of a pass through layers of (forward, backward) seconds, bytes that moved)."""
    Clocks.now, module = 0.0, torch.nn.Linear(1, 1)
    made = offload.Offload(2**28)
    moved, moves = made.begin(shares, torch.device("cpu")), []
    x = torch.ones(1, requires_grad=True)
    y = x
    for index, (pair, size) in enumerate(zip(layers, sizes)):
        before = 0 if made.pool is None else made.pool.taken
        with moved.layer(index, module):
            y = Layer.apply(y, size, *pair)
        moves.append((0 if made.pool is None else made.pool.taken) - before)
    moved.finish()
    y.backward()
    assert x.grad == 2.0 ** len(layers)
    assert made.pool is None or made.pool.taken == 0
    return Clocks.now, moves


def timing(rows):
    """Seconds of layers as the planner has them."""
    shape = ModelShape(len(rows), 256, 512, 4, 2, 64, 1024)
    step = step_of(shape, [4096], [LayerRows(count, count) for count in rows])
    return StepTime(shape, Adapters(8), step, Rates(1e12, 1e12, 1e12, 1e12, 1e-12, LINK))


def of_layers(time, rows):
    return [(time._forward(each), time._backward(each)) for each in time._step.rows[: len(rows)]]


@pytest.mark.parametrize("seed", range(20))
def test_a_pass_takes_what_is_predicted(seed):
    draw = random.Random(seed)
    rows = [draw.choice([256, 512, 1024, 4096]) for _ in range(draw.randint(2, 9))]
    time = timing(rows)
    layers = of_layers(time, rows)
    # Copies from much shorter to much longer than layers.
    longest = LINK * max(forward for forward, _ in layers)
    sizes = [UNIT * draw.randint(1, max(2, int(2 * longest / UNIT))) for _ in rows]
    shares = [draw.choice([0.0, 0.25, 0.5, 1.0]) for _ in rows]
    alone, nothing = seconds_of(layers, sizes, [0.0] * len(rows))
    assert nothing == [0] * len(rows)
    assert alone == pytest.approx(sum(map(sum, layers)))
    found, moved = seconds_of(layers, sizes, shares)
    assert moved == [int(share * size) for share, size in zip(shares, sizes)]
    waited = sum(time.waiting(index, size) for index, size in enumerate(moved))
    assert found == pytest.approx(alone + waited)


def test_copies_of_few_rows_hide_behind_many_and_not_the_other_way_round():
    """Layers of many rows and of few take turns; as many bytes go there by either way."""
    rows = [4096, 1024] * 4
    time = timing(rows)
    layers = of_layers(time, rows)
    forward = layers[0][0]
    size = int(LINK * forward / UNIT) * UNIT
    sizes = [2 * size, size] * 4
    alone, _ = seconds_of(layers, sizes, [0.0] * 8)
    sensitive, moved = seconds_of(layers, sizes, [0.0, 1.0] * 3 + [0.0, 0.0])
    uniform, other = seconds_of(layers, sizes, [0.25] * 8)
    assert sum(moved) == 3 * size == sum(other)
    assert sensitive == pytest.approx(alone)
    assert uniform > 1.05 * alone


class Stream:
    """Remembers events that it waits for; those that it records are numbers."""

    events = count()

    def __init__(self, _device):
        self.waited = []

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        self.waited.append(event)

    def record_event(self):
        return next(Stream.events)


def test_slots_that_were_given_back_are_waited_for_once(monkeypatch):
    """A copy to the host may take what another copy, of any device, still reads or writes."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    made = offload.Offload(0)
    monkeypatch.setattr(offload, "_Streams", Streams)
    mine, other = (made.streams(torch.device("cuda", index)) for index in range(2))

    def waited():
        del mine._to_host.waited[:]
        made.wait_for_slots(mine)
        return mine._to_host.waited

    assert waited() == []
    mine.to_host([])  # on the stream that would wait
    back, there = mine.from_host([]), other.to_host([])
    assert waited() == [back, there]
    assert waited() == []
    again = other.from_host([])
    assert waited() == [again]
    assert waited() == []
    assert other._to_host.waited == []


def test_memory_on_the_device_is_not_freed_while_a_copy_is_on_its_way_to_it():
    """The graph is dropped when the last layer's backward pass has run, and another comes back."""
    module, x = torch.nn.Linear(1, 1), torch.ones(1, requires_grad=True)
    made = offload.Offload(2**20)
    moved = made.begin([1.0, 1.0], torch.device("cpu"))
    with moved.layer(0, module):
        y = Layer.apply(x, 100 * UNIT, 0.0, 0.0)
    with moved.layer(1, module):
        z = Layer.apply(y, UNIT, 0.0, 0.0)
    moved.finish()
    torch.autograd.grad(z, y, retain_graph=True)
    (clocks,) = made._streams.values()
    assert Clocks.now < clocks.back
    del y, z
    assert made.pool.taken == 0
    assert Clocks.now == clocks.back


def test_the_smallest_tensor_that_holds_what_is_left_is_cut(monkeypatch):
    storages = [SimpleNamespace(size=size) for size in (1000, 3000, 2048, 4096)]
    small, large, middle, largest = storages
    total = 1000 + 3000 + 2048 + 4096

    def parts(size):
        return offload._parts(storages, size / total)

    assert parts(total) == [(each, each.size) for each in (largest, large, middle, small)]
    assert parts(4096 + 1600) == [(largest, 4096), (middle, 3 * 512)]
    assert parts(4096 + 2500) == [(largest, 4096), (large, 4 * 512)]
    assert parts(700) == [(small, 512)]
    assert parts(100) == []
    # Fewer bytes are not worth a copy.
    monkeypatch.setattr(offload, "SMALLEST", 2**20)
    assert parts(700) == []
    assert parts(4096 + 1600) == [(largest, 4096), (middle, 3 * 512)]
