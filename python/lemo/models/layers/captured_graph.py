"""A function of tensors that is captured in two CUDA graphs, of forward and of backward."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lemo.models.projections.side_stream import beside

__all__ = ["Function", "Graph", "Place"]

# Maps inputs, some of which may be None, to a scalar.
Function = Callable[[Sequence[Tensor | None]], Tensor]

_WARM_UPS = 2


class Place:
    """Where graphs of one pool are captured and replayed.

    Attributes:
        stream: for captures.
        side: for what a capture runs beside its stream.
        pool: the graphs' memory.
    """

    def __init__(self) -> None:
        self._home = torch.cuda.current_stream()
        # What others wait for goes first where kernels of both have work left.
        self.stream, self.side = torch.cuda.Stream(priority=-1), torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def is_current(self) -> bool:
        """Whether the current stream is that of the first capture, where all replays run."""
        return torch.cuda.current_stream() == self._home


class Graph:
    """A captured function.

    Attributes:
        loss: scalar, where forward leaves its result.
        used: for each gradient that is wanted, whether there is one.
        bytes: device memory that a replay takes.
        draws: whether it draws random numbers.
        loaded: the call whose inputs are where the graph reads them.
        last_call: the number of the latest one.
    """

    loaded: weakref.ref[object] | None = None
    last_call = 0

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        module: nn.Module,
        place: Place,
        check_room: Callable[[int], None],
    ) -> None:
        self._inputs = [None if x is None else torch.empty_like(x) for x in inputs]
        self.load(inputs)
        for x, given in zip(self._inputs, inputs):
            if x is not None and given is not None:
                x.requires_grad_(given.requires_grad)
        leaves = [x for x in self._inputs if x is not None and x.requires_grad]
        device = parameters[0].device
        self._gradients, self._flat = _flat_buffers([*leaves, *parameters])
        self._dloss = torch.ones((), dtype=torch.float32, device=device)
        # They stay, and so do their addresses, while the graph does.
        self._function, self._parameters = function, parameters

        self._forward_graph, self._backward_graph = self._new_graphs()
        current = torch.cuda.current_stream(device)
        # The stream is the caller's again even where the end of a capture raises.
        with (
            _random_state_restored(device),
            torch.cuda.stream(current),
            _no_collection(),
            _aliased(module, parameters) as aliases,
        ):
            wanted = [*leaves, *aliases]
            # On a stream of its own: what libraries keep for the capturing one goes into the pool.
            # Memory of other streams is not taken there, so it takes as much as the graph will.
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(device)
            generator = torch.cuda.default_generators[device.index]
            state = generator.get_state()
            self._warm_up(wanted, torch.cuda.Stream(device), current, place.side)
            self.draws = not torch.equal(state, generator.get_state())
            torch.cuda.synchronize(device)
            need = torch.cuda.memory_reserved(device) - before
            torch.cuda.empty_cache()
            check_room(need)
            before = torch.cuda.memory_reserved(device)
            self.loss, self.used = self._capture(wanted, place)
            self.bytes = torch.cuda.memory_reserved(device) - before

    def _new_graphs(self) -> "tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]":
        return torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def _warm_up(
        self,
        wanted: list[Tensor],
        stream: "torch.cuda.Stream",
        after: "torch.cuda.Stream",
        side: "torch.cuda.Stream",
    ) -> None:
        """Kernels are loaded, and handles of libraries made, before they are captured."""
        stream.wait_stream(after)
        with torch.cuda.stream(stream), beside(stream, side):
            for _ in range(_WARM_UPS):
                self._backward(self._forward(), wanted)

    def _capture(self, wanted: list[Tensor], place: Place) -> tuple[Tensor, list[bool]]:
        capture: dict[str, Any] = {"pool": place.pool, "stream": place.stream}
        # Other threads may go on: those that tokenize or write, and those that watch processes.
        capture["capture_error_mode"] = "thread_local"
        with torch.cuda.graph(self._forward_graph, **capture):
            loss = self._forward()
        with (
            torch.cuda.graph(self._backward_graph, **capture),
            beside(place.stream, place.side),
        ):
            gradients = self._backward(loss, wanted)
            pairs = [(to, x) for to, x in zip(self._gradients, gradients) if x is not None]
            if pairs:
                targets, sources = zip(*pairs)
                torch._foreach_copy_(list(targets), list(sources))
        return loss.detach(), [gradient is not None for gradient in gradients]

    def _forward(self) -> Tensor:
        first, *others = self._inputs
        # It may be overwritten, which the next replay would not survive.
        copied = None if first is None else first.clone()
        device = self._dloss.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Without autocast's cache, which would hand memory of the graph to others.
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            return self._function([copied, *others])

    def _backward(self, loss: Tensor, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
        # Outside of autocast, as backward is to run.
        with torch.autocast(self._dloss.device.type, enabled=False):
            return torch.autograd.grad(loss, wanted, self._dloss, allow_unused=True)

    def load(self, inputs: Sequence[Tensor | None]) -> None:
        """Copies inputs to where the graph reads them."""
        with torch.no_grad():
            for to, x in zip(self._inputs, inputs):
                if to is not None and x is not None:
                    to.copy_(x, non_blocking=True)

    def forward(self) -> Tensor:
        """Replays forward on the inputs that are loaded."""
        self._forward_graph.replay()
        return self.loss.clone()

    def backward(self, dloss: Tensor) -> list[Tensor | None]:
        """Replays backward; the gradients are tensors of their own, views of a few."""
        self._dloss.copy_(dloss)
        self._backward_graph.replay()
        copies = [(x.clone(), parts) for x, parts in self._flat]
        gradients: list[Tensor | None] = [None] * len(self._gradients)
        for copied, parts in copies:
            pieces = copied.split([size for _, size, _ in parts])
            for (index, _, shape), piece in zip(parts, pieces):
                if self.used[index]:
                    gradients[index] = piece.view(shape)
        return gradients


def _flat_buffers(
    tensors: Sequence[Tensor],
) -> tuple[list[Tensor], list[tuple[Tensor, list[tuple[int, int, torch.Size]]]]]:
    """A buffer like each of the tensors, and the few that they are parts of.

    Returns:
        The buffers; and for each dtype (what holds them, [(index, elements, shape)] in order).
    """
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, x in enumerate(tensors):
        by_dtype.setdefault(x.dtype, []).append(index)
    views: list[Tensor] = [tensors[0]] * len(tensors)
    flat = []
    for dtype, indices in by_dtype.items():
        sizes = [tensors[index].numel() for index in indices]
        whole = torch.zeros(sum(sizes), dtype=dtype, device=tensors[indices[0]].device)
        for index, part in zip(indices, whole.split(sizes)):
            views[index] = part.view(tensors[index].shape)
        shapes = [tensors[index].shape for index in indices]
        flat.append((whole, list(zip(indices, sizes, shapes))))
    return views, flat


@contextmanager
def _aliased(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Other leaves of autograd in the place of parameters, in the same memory.

    A parameter that an earlier pass used is bound to the stream of that pass while somebody holds
    its loss, and backward would wait for that stream.
    """
    aliases = {id(x): nn.Parameter(x.detach()) for x in parameters}
    places = [
        (each._parameters, name, x)
        for each in module.modules()
        for name, x in each._parameters.items()
        if x is not None and id(x) in aliases
    ]
    try:
        for of_module, name, x in places:
            of_module[name] = aliases[id(x)]
        yield [aliases[id(x)] for x in parameters]
    finally:
        for of_module, name, x in places:
            of_module[name] = x


@contextmanager
def _random_state_restored(device: torch.device) -> Iterator[None]:
    """The generators' states are afterwards what they were, whatever happens inside."""
    with torch.random.fork_rng(devices=[], device_type=device.type):
        generator = torch.cuda.default_generators[device.index]
        state = generator.get_state()
        try:
            yield
        except BaseException:
            # A capture that was broken off leaves the generator believing that it goes on.
            fresh = torch.Generator(device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
            raise
        generator.set_state(state)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing is collected inside: what frees other graphs would end a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
