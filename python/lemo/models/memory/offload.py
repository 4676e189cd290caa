"""What layers save for backward, moved to the host while other layers run, and back.

A layer's share of it is chosen when the layer's forward pass has ended. The copy runs on a stream
of its own beside the next layer, behind which the memory on the device is free. In backward, the
first node of a layer that reads what it saved starts the way back of the layer before. So at most
two layers' bytes are on their way, on the device, at a time.

It sits where autograd saves tensors (`torch.autograd.graph.saved_tensors_hooks`), so it knows
nothing of what layers compute, and bits are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lemo.models.memory.host_pool import HostPool, Slot, check_free
from lemo.models.memory.sharded import held_tensors, is_sharded
from lemo.planner.text import bytes_text

__all__ = ["LayerOffload", "Offload", "OffloadedPass", "unpack"]

SMALLEST = 2**20
"""Bytes of a tensor below which it stays on the device."""

# Where a tensor is cut of which a part is moved, in bytes.
_CUT = 512


class Offload:
    """The pool of one model, and the streams by which its devices copy.

    Args:
        capacity: bytes of the host.

    Raises:
        ValueError: the host does not have so many free.
    """

    def __init__(self, capacity: int) -> None:
        check_free(capacity)
        self._capacity = capacity
        self._pool: HostPool | None = None
        self._streams: dict[torch.device, _Streams] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a model have a pool of their own.
        return {"_capacity": self._capacity, "_pool": None, "_streams": {}}

    @property
    def pool(self) -> HostPool | None:
        """The pool, once a pass has begun."""
        return self._pool

    def begin(self, shares: Sequence[float], device: torch.device) -> OffloadedPass:
        """A pass begins.

        Args:
            shares: of each layer's bytes, what goes to the host.
            device: where the pass runs.

        Raises:
            ValueError: the host does not have the memory.
        """
        if not torch.is_grad_enabled():
            shares = [0.0] * len(shares)  # nothing is saved
        if any(shares):
            self._made(device)
        return OffloadedPass(self, shares)

    def pin(self, device: torch.device) -> None:
        """Pins all of the pool's pages now, instead of when they are taken."""
        self._made(device).pin()

    def _made(self, device: torch.device) -> HostPool:
        if self._pool is None:
            self._pool = HostPool(self._capacity, pinned=device.type == "cuda")
        return self._pool

    def streams(self, device: torch.device) -> _Streams:
        """The streams of a device."""
        if device not in self._streams:
            self._streams[device] = _Streams(device)
        return self._streams[device]

    def wait_for_slots(self, streams: _Streams) -> None:
        """Copies to the host wait for those that still read, or write, what was given back."""
        for other in self._streams.values():
            streams.wait_for(other)


class _Streams:
    """Two streams of a device, to the host and back; on the CPU none, copies are at once."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        # The last copies either way, and those of this and others that were waited for.
        self._latest: list[torch.cuda.Event | None] = [None, None]
        self._seen: dict[_Streams, list[torch.cuda.Event | None]] = {}
        if self._on_gpu:
            self._to_host, self._from_host = (torch.cuda.Stream(device) for _ in range(2))

    def to_host(self, copies: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Starts copies (target, source) behind what the current stream does now."""
        self._latest[0] = self._copy(copies, self._to_host if self._on_gpu else None)
        return self._latest[0]

    def from_host(self, copies: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """The same, the other way."""
        self._latest[1] = self._copy(copies, self._from_host if self._on_gpu else None)
        return self._latest[1]

    def _copy(
        self, copies: Iterable[tuple[Tensor, Tensor]], stream: torch.cuda.Stream | None
    ) -> torch.cuda.Event | None:
        if stream is None:
            for target, source in copies:
                target.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """The current stream waits for copies."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def wait_for(self, other: _Streams) -> None:
        """Copies to the host wait for what another device, or this one, has begun to copy."""
        if not self._on_gpu or not other._on_gpu:
            return
        # Mostly none came since: every call takes the host's time.
        seen = self._seen.setdefault(other, [None, None])
        for way, event in enumerate(other._latest):
            if event is not None and event is not seen[way] and (way or other is not self):
                self._to_host.wait_event(event)
            seen[way] = event


class OffloadedPass:
    """A pass through the layers.

    Attributes:
        is_needed: whether something of it goes to the host.

    Args:
        offload: the pool and the streams.
        shares: of each layer.
    """

    def __init__(self, offload: Offload, shares: Sequence[float]) -> None:
        self._offload, self._shares = offload, shares
        self._backward = _Backward()
        self._latest: LayerOffload | None = None
        self._left_out: set[int] = set()
        self.is_needed = any(shares)

    def leave_out(self, *held: Any) -> None:
        """As `LayerOffload.leave_out`, in all layers; the tensors live as long as the pass."""
        if self.is_needed:
            self._left_out |= _addresses(held)

    @contextmanager
    def layer(self, index: int, module: nn.Module) -> Iterator[LayerOffload | None]:
        """What is saved inside belongs to a layer.

        Args:
            index: the layer, in ascending order.
            module: its module, whose parameters and buffers stay where they are.
        """
        if not self.is_needed or not torch.is_grad_enabled():
            yield None
            return
        layer = self.begin(index, module)
        with saved_tensors_hooks(layer.pack, unpack):
            yield layer
        self.end(layer)

    def begin(self, index: int, module: nn.Module) -> LayerOffload:
        """A layer's forward pass begins; its `pack` is to be where autograd saves tensors.

        Args:
            index: the layer, in ascending order.
            module: its module, whose parameters and buffers stay where they are.

        Raises:
            NotImplementedError: the layer's weights are sharded.
        """
        if is_sharded(module):
            raise NotImplementedError(
                "host_memory: expected 0 with fully_shard, which frees weights that are saved, got "
                f"layer {index} with a share of its weights"
            )
        share = self._shares[index]
        parts = self._offload, index, share, self._latest, self._backward, module
        return LayerOffload(*parts, self._left_out)

    def end(self, layer: LayerOffload) -> None:
        """A layer's forward pass has ended: what the one before moved is gone, this one moves."""
        if self._latest is not None:
            self._latest.free()
        layer.move()
        self._latest = layer

    def finish(self) -> None:
        """All layers have run."""
        if self._latest is not None:
            self._latest.free()
            self._latest = None


class _Backward:
    """Which layers of a pass have their bytes back on the device."""

    def __init__(self) -> None:
        self._now: weakref.ref[LayerOffload] | None = None
        self._there: list[weakref.ref[LayerOffload]] = []

    def enter(self, layer: LayerOffload) -> None:
        """A node of a layer runs: its bytes are needed, and soon those of the layer before."""
        if self._now is not None and self._now() is layer and layer.is_there:
            return
        wanted = [each for each in (layer, layer.before) if each is not None]
        for reference in self._there:
            other = reference()
            if other is not None and other not in wanted:
                other.let_go()
        layer.arrive()
        if layer.before is not None:
            layer.before.fetch()
        self._there = [weakref.ref(each) for each in wanted]
        self._now = weakref.ref(layer)


class LayerOffload:
    """What one layer saves in one pass.

    Attributes:
        before: the layer before.
        is_there: whether all of it is on the device, and may be read.
    """

    def __init__(
        self,
        offload: Offload,
        index: int,
        share: float,
        before: LayerOffload | None,
        backward: _Backward,
        module: nn.Module,
        left_out: set[int],
    ) -> None:
        self.before = before
        self.is_there = True
        self._offload, self._index, self._share = offload, index, share
        self._backward = backward
        self._left_out = left_out  # of all layers
        self._storages: dict[int, _Storage] = {}
        self._moved: list[weakref.ref[_Storage]] = []
        self._streams: _Streams | None = None
        self._event: torch.cuda.Event | None = None
        self._is_moving = self._is_coming = False
        # Buffers may be elsewhere.
        weight = next(module.parameters(), None) if share else None
        self._device = None if weight is None else weight.device
        if share:
            self.leave_out(*held_tensors(module))

    # Forward

    def leave_out(self, *held: Any) -> None:
        """Tensors inside of these, and views of them, stay: others hold them anyway.

        Args:
            held: tensors, and tuples, lists, dicts and dataclasses of them.
        """
        if self._share:
            self._left_out = self._left_out | _addresses(held)

    def pack(self, tensor: Tensor) -> _Saved | _Stayed:
        """What autograd stores in place of a tensor that it saves."""
        if not self._share or not self._may_move(tensor):
            return _Stayed(self, tensor)
        address = tensor.untyped_storage().data_ptr()
        storage = self._storages.get(address)
        if storage is None and self.before is not None:  # which has some while it moves
            storage = self.before._storages.get(address)
        if storage is None:
            storage = self._storages[address] = _Storage(self, tensor)
        return _Saved(self, storage, tensor)

    def _may_move(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return False
        if tensor.device != self._device or tensor.is_conj() or tensor.is_neg():
            return False
        storage = tensor.untyped_storage()
        return storage.nbytes() >= SMALLEST and storage.data_ptr() not in self._left_out

    def move(self) -> None:
        """Starts to copy the layer's share.

        Raises:
            ValueError: the pool has no room for it.
        """
        if not self._storages:
            return
        parts = _parts(list(self._storages.values()), self._share)
        copies: list[tuple[Tensor, Tensor]] = []
        pool = self._offload.pool
        assert pool is not None
        for storage, size in parts:
            slot = pool.take(size)
            if slot is None:
                raise ValueError(
                    f"host_memory: expected room for {bytes_text(size)} more of layer "
                    f"{self._index}, got {bytes_text(pool.capacity)} of which "
                    f"{bytes_text(pool.taken)} are taken; raise host_memory, or lower offload"
                )
            copies += storage.leave(pool, slot, size)
            self._moved.append(weakref.ref(storage))
        if not copies:
            self._storages = {}
            return
        self._streams = self._offload.streams(parts[0][0].device)
        self._offload.wait_for_slots(self._streams)
        self._event = self._streams.to_host(copies)
        self._is_moving = True
        self.is_there = False

    def free(self) -> None:
        """Behind the copies, what was moved is free on the device."""
        if self._is_moving:
            assert self._streams is not None
            self._streams.wait(self._event)
            for storage in self._alive():
                storage.drop()
        self._is_moving = False
        self._storages, self._left_out = {}, set()

    # Backward

    def enter(self) -> None:
        """A node of the layer runs in backward."""
        self._backward.enter(self)

    def fetch(self) -> None:
        """Starts to bring back what is on the host."""
        if self.is_there or self._is_coming:
            return
        if self._is_moving:  # a backward pass before the forward pass of all layers has ended
            self.free()
        assert self._streams is not None
        copies = [copy for storage in self._alive() for copy in storage.come_back()]
        self._event = self._streams.from_host(copies)
        self._is_coming = True

    def arrive(self) -> None:
        """What is on the host is on the device for whatever the current stream does next."""
        self.fetch()
        if self._is_coming:
            assert self._streams is not None
            self._streams.wait(self._event)
            self._is_coming, self.is_there = False, True

    def let_go(self) -> None:
        """What is on the host need not be on the device any more."""
        if not self._moved:
            return
        self.arrive_in_flight()
        for storage in self._alive():
            storage.drop()
        self.is_there = False

    def arrive_in_flight(self) -> None:
        """Copies that nobody has waited for yet are waited for, before their targets are freed."""
        if self._is_coming:
            self.arrive()

    def _alive(self) -> Iterator[_Storage]:
        """The storages that nodes of the graph still hold."""
        for reference in self._moved:
            storage = reference()
            if storage is not None:
                yield storage


class _Storage:
    """The memory of one tensor, or of several that are views of it.

    Attributes:
        layer: by which it was moved.
        device: where it belongs.
    """

    def __init__(self, layer: LayerOffload, tensor: Tensor) -> None:
        self.layer, self.device = layer, tensor.device
        self.size = tensor.untyped_storage().nbytes()
        # Shares the tensor's version, not its graph; later, what came back.
        self._here: Tensor | None = tensor.detach()
        self._version: int | None = tensor._version
        self._is_modified = False
        # Then it comes back as this tensor, of which no view has to be made.
        self._is_whole = (
            tensor.is_contiguous() and not tensor.storage_offset() and tensor.nbytes == self.size
        )
        self._like = (tensor.shape, tensor.dtype) if self._is_whole else ((self.size,), torch.uint8)
        self._pool: HostPool | None = None
        self._slot: Slot | None = None
        self._moved = 0
        self._rest: Tensor | None = None

    def leave(self, pool: HostPool, slot: Slot, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The copies (target, source) by which the first bytes go to the host."""
        self._pool, self._slot, self._moved = pool, slot, size
        moving, rest = self._bytes()
        if rest is not None:
            self._rest = rest.clone()
        return zip(slot.pieces, _cut(moving, slot))

    def drop(self) -> None:
        """Frees the memory on the device of which the host has a copy."""
        self._see_version()
        self._here = self._version = None

    def come_back(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The copies (target, source) by which the bytes come back."""
        assert self._slot is not None
        shape, dtype = self._like
        self._here = torch.empty(shape, dtype=dtype, device=self.device)
        moving, rest = self._bytes()
        if rest is not None:
            assert self._rest is not None
            rest.copy_(self._rest)
        return zip(_cut(moving, self._slot), self._slot.pieces)

    def read(
        self, dtype: torch.dtype, offset: int, shape: Sequence[int], stride: Sequence[int]
    ) -> Tensor:
        """A tensor of this geometry in the memory on the device."""
        self.layer.arrive_in_flight()
        self._see_version()
        if self._is_modified:
            raise _modified()
        here = self._here
        assert here is not None
        # Of the whole there is a tensor already; making one costs the host as much as a kernel.
        if (here.dtype, here.storage_offset(), here.shape, here.stride()) == (
            dtype,
            offset,
            shape,
            stride,
        ):
            return here
        return _view(here.untyped_storage(), dtype, offset, shape, stride)

    def _bytes(self) -> tuple[Tensor, Tensor | None]:
        """The bytes on the device that move, and those that stay; None: all move."""
        here = self._here
        assert here is not None
        if self._is_whole:
            memory = here.view(-1).view(torch.uint8)
        else:
            memory = _view(here.untyped_storage(), torch.uint8, 0, (self.size,), (1,))
        if self._moved == self.size:
            return memory, None
        moving, rest = memory.split([self._moved, self.size - self._moved])
        return moving, rest

    def _see_version(self) -> None:
        if self._version is not None and self._here is not None:
            self._is_modified |= self._here._version != self._version

    def __del__(self) -> None:
        if self._slot is not None and self._pool is not None:
            # Nothing else may be put where a copy is still on its way to.
            self.layer.arrive_in_flight()
            self._pool.free(self._slot)


class _Saved:
    """A tensor in memory that may move."""

    def __init__(self, layer: LayerOffload, storage: _Storage, tensor: Tensor) -> None:
        self._layer, self._storage = layer, storage
        self._dtype, self._offset = tensor.dtype, int(tensor.storage_offset())
        self._geometry = tensor.shape, tensor.stride()

    def read(self) -> Tensor:
        self._layer.enter()
        return self._storage.read(self._dtype, self._offset, *self._geometry)


class _Stayed:
    """A tensor that stays as it is."""

    def __init__(self, layer: LayerOffload, tensor: Tensor) -> None:
        self._layer = layer
        # Of a result of the node itself the graph would hold the graph.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def read(self) -> Tensor:
        self._layer.enter()
        if self._tensor._version != self._version:
            raise _modified()
        return self._tensor


def unpack(saved: _Saved | _Stayed) -> Tensor:
    """The tensor for which `LayerOffload.pack` gave this."""
    return saved.read()


def _modified() -> RuntimeError:
    return RuntimeError(
        "a tensor that was saved for backward has been modified by an inplace operation since"
    )


def _parts(storages: Sequence[_Storage], share: float) -> list[tuple[_Storage, int]]:
    """(storage, its first bytes that move), which together are a share of all, in few parts.

    The largest move as a whole until one does not fit. Then, of those that would hold all that is
    left to move, the smallest is cut: what stays of it is copied. So at most one is cut.
    """
    left = round(share * sum(storage.size for storage in storages))
    parts: list[tuple[_Storage, int]] = []
    others = sorted(storages, key=lambda each: -each.size)
    while others and others[0].size <= left:
        left -= others[0].size
        parts.append((others[0], others.pop(0).size))
    cut = left // _CUT * _CUT
    if others and cut >= min(SMALLEST, _CUT * 2):
        parts.append((next(each for each in reversed(others) if each.size > cut), cut))
    return parts


def _cut(memory: Tensor, slot: Slot) -> Sequence[Tensor]:
    """As many bytes as a slot has, in pieces like its own."""
    if len(slot.pieces) == 1:
        return (memory,)
    return memory.split([len(piece) for piece in slot.pieces])


def _view(
    storage: Any, dtype: torch.dtype, offset: int, shape: Sequence[int], stride: Sequence[int]
) -> Tensor:
    made = torch.empty(0, dtype=dtype, device=storage.device)
    return made.set_(storage, offset, shape, stride)


def _addresses(held: Any) -> set[int]:
    """Where the memory of tensors inside of something is."""
    found = set()
    for tensor in _tensors(held):
        # Some tensors have no memory of their own.
        with suppress(RuntimeError, NotImplementedError):
            found.add(tensor.untyped_storage().data_ptr())
    return found


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
    elif is_dataclass(held):
        for field in fields(held):
            yield from _tensors(getattr(held, field.name))
