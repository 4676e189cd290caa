"""CUDA graphs of a function of tensors: its forward and its backward pass, replayed as one node.

A graph is a list of kernels with fixed shapes and addresses, which the GPU runs without the host's
issuing them one by one. So a function is captured once for each key (shapes, and what else it
depends on); a later call copies its inputs to where the graph reads them, and replays.

All graphs of one object share a pool of memory, so whatever one of them holds between forward and
backward is lost when another one is replayed. A call in between runs without a graph.
"""

import gc
import logging
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lemo.models.layers.captured_graph import Function, Graph, Place
from lemo.models.memory.free_memory import free_bytes
from lemo.models.projections.weights import place_of
from lemo.ops.autograd import first_order_only

__all__ = ["CudaGraphs", "supports_graphs"]

_log = logging.getLogger("lemo")

# Graphs of one model. Each takes seconds to capture and some memory of its own.
_MOST_GRAPHS = 8
# Passes after which a graph that none of them replayed makes place for another one.
_IDLE_PASSES = 1000
# Keys that are remembered as seen once: a batch of a shape that does not come again is no reason
# to capture.
_MOST_SEEN = 256
# Captures that fail before none is tried any more.
_MOST_FAILURES = 3


def supports_graphs(device: torch.device) -> bool:
    """Whether work on a device can be captured."""
    return device.type == "cuda"


class CudaGraphs:
    """Runs functions, by graphs where a key comes again.

    Attributes:
        bytes: device memory that the graphs hold beyond what torch counts as allocated.
        captured: how many graphs there are.
        replays: how many calls were replays.
    """

    def __init__(self, spares: bool = False) -> None:
        """Has no graphs yet.

        Args:
            spares: whether only graphs are kept beside which as much memory stays free as a call
                takes: calls without a graph find place then.
        """
        self.replays = self._calls = 0
        self._spares = spares
        self._said: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """Forgets all graphs and gives their memory back."""
        self._failures = 0
        self._drop()

    def give_up(self, reason: str) -> None:
        """Forgets all graphs, gives their memory back, and captures none any more."""
        self._drop()
        self._failures = _MOST_FAILURES
        self.say(f"CUDA graphs: passes run without one from now on: {reason}")
        gc.collect()
        torch.cuda.empty_cache()

    def _drop(self) -> None:
        self.bytes = self.captured = 0
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._refused: OrderedDict[Hashable, None] = OrderedDict()
        self._graphs: dict[Hashable, Graph] = {}
        self._place: Place | None = None
        self._pending: weakref.ref[_Call] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Graphs are neither copied nor pickled; a copy captures its own.
        return {"spares": self._spares}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def run(
        self,
        key: Hashable,
        function: Function,
        inputs: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        module: nn.Module,
        obstacle: Callable[[], str | None] = lambda: None,
        weights: Sequence[Tensor] = (),
        merged: Sequence[Sequence[str]] = (),
    ) -> Tensor:
        """function(inputs), a scalar that is differentiable in the inputs and in the parameters.

        The first call with a key runs without a graph, the second one captures.

        Args:
            key: equal where the function does the same with tensors of the same shapes, and with
                the same parameters.
            function: reads nothing that changes from call to call but its inputs, the values of the
                parameters and torch's generator of random numbers; does not wait for the device.
                It may overwrite the first of its inputs, and no others.
            inputs: on one CUDA device.
            parameters: of which it needs gradients.
            module: has them, and the function finds them there.
            obstacle: asked before the capture, what stands against it; None: nothing.
            weights: what else it reads, and backward, which refuses what was changed since.
            merged: names of the adapters that are merged into weights, by layer: lists that change
                when adapters are merged, which is no change that weights count.
        """
        self._calls += 1
        key = key, tuple(map(_form, inputs))
        if self.has_given_up or key in self._refused:
            return function(inputs)
        reason = self._hindrance(parameters[0].device if parameters else None)
        if reason is not None:
            self.say(f"CUDA graphs: {reason}")
            return function(inputs)
        if key not in self._graphs:
            made = self._made(key, function, inputs, parameters, module, obstacle)
            if made is None:
                return function(inputs)
            self._graphs[key] = made
        graph = self._graphs[key]
        self.replays += 1
        graph.last_call = self._calls
        call = _Call(self, graph, [*parameters, *weights], merged)
        graph.load(inputs)
        graph.loaded = weakref.ref(call)
        leaves = [x for x in inputs if x is not None and x.requires_grad]
        loss: Tensor = _Replayed.apply(call, *leaves, *parameters)
        self._pending = weakref.ref(call) if loss.requires_grad else None
        return loss

    def _hindrance(self, device: torch.device | None) -> str | None:
        """Why no call runs by a graph now, as the log says it; None: one may."""
        watched = _watched(device)
        if watched is not None:
            return f"passes under {watched} run without one"
        if device is not None and device.type == "cuda":
            current = torch.cuda.current_device()
            if device.index != current:
                return (
                    f"passes on {device} run without one, since the current device is "
                    f"cuda:{current}; call torch.cuda.set_device"
                )
        if self.is_pending():
            return "a pass before the backward of another one runs without a graph"
        if self._place is not None and not self._place.is_current():
            return "passes on other streams than the first one run without a graph"
        return None

    def _made(
        self,
        key: Hashable,
        function: Function,
        inputs: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        module: nn.Module,
        obstacle: Callable[[], str | None],
    ) -> Graph | None:
        """The graph of a key that has none; None: this call runs without."""
        if key not in self._seen:
            _remember(self._seen, key)
            return None
        if self.captured >= _MOST_GRAPHS and not self._make_place():
            self.say(f"CUDA graphs: {_MOST_GRAPHS} shapes are captured, others run without a graph")
            return None
        reason = obstacle()
        if reason is not None:
            self.say(f"CUDA graphs: passes run without one: {reason}")
        made = self._capture(function, inputs, parameters, module) if reason is None else None
        if made is None:
            _remember(self._refused, key)
        return made

    @property
    def has_given_up(self) -> bool:
        """Whether none is captured any more, until `clear`."""
        return self._failures >= _MOST_FAILURES

    def is_pending(self) -> bool:
        """Whether backward of a replay is still to come."""
        call = None if self._pending is None else self._pending()
        return call is not None and not call.is_done

    def say(self, message: str) -> None:
        """A line of the log, once."""
        if message not in self._said:
            self._said.add(message)
            _log.info("%s", message)

    def _make_place(self) -> bool:
        """Forgets the graph that was not replayed for longest, if that is long."""
        key, graph = min(self._graphs.items(), key=lambda item: item[1].last_call)
        if self._calls - graph.last_call < _IDLE_PASSES:
            return False
        # Its memory stays in the pool, where other graphs take it.
        del self._graphs[key]
        self.captured -= 1
        return True

    def _capture(
        self,
        function: Function,
        inputs: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        module: nn.Module,
    ) -> Graph | None:
        if self._place is None:
            self._place = Place()
        check = self._check_room if self._spares else lambda need: None
        try:
            graph = Graph(function, inputs, parameters, module, self._place, check)
        except _NoRoomError as error:
            self.say(f"CUDA graphs: passes run without one: {error}")
            return None
        except Exception as error:
            self._failures += 1
            # They would draw random numbers of a generator that is not torch's any more.
            self._drop()
            if isinstance(error, torch.OutOfMemoryError):
                gc.collect()
                torch.cuda.empty_cache()
            self.say(
                f"CUDA graphs: a pass could not be captured and runs without: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            )
            _log.debug("%s", traceback.format_exc())
            return None
        self.captured += 1
        self.bytes += graph.bytes
        _log.info("CUDA graphs: captured a pass of %s", _described(inputs))
        return graph

    def _check_room(self, need: int) -> None:
        """Raises `_NoRoomError` where a graph of so many bytes leaves less than that free."""
        device = torch.device("cuda", torch.cuda.current_device())
        free = free_bytes(device, self.bytes)
        if free is not None and free - max(0, need - self.bytes) < need:
            raise _NoRoomError(
                f"a graph keeps {need / 2**30:.2f} GiB, and less than that would stay free for "
                "other passes"
            )


class _NoRoomError(Exception):
    """A graph would leave too little memory."""


class _Call:
    """One replay of a graph, and its backward.

    Attributes:
        graph: that is replayed.
        is_done: whether backward has run.
    """

    def __init__(
        self,
        graphs: CudaGraphs,
        graph: Graph,
        weights: Sequence[Tensor],
        merged: Sequence[Sequence[str]],
    ) -> None:
        self.graph, self._weights, self._merged = graph, weights, merged
        self.is_done = False
        self._graphs = graphs
        self._read = self._reads()

    def backward(self, dloss: Tensor) -> list[Tensor | None]:
        """The gradients; the first backward overwrites activations, a second one makes them anew.

        Raises:
            RuntimeError: a weight has another value than in forward, or a second backward comes
                when the inputs are not there any more, or forward has drawn random numbers.
        """
        self._check()
        if self.is_done:
            here = self.graph.loaded is not None and self.graph.loaded() is self
            if not here or self.graph.draws or self._graphs.is_pending():
                raise RuntimeError(
                    "lemo: backward of a pass that was replayed by a CUDA graph is run a second "
                    "time, after another pass or with dropout, but its activations are gone; "
                    "switch cuda_graphs off"
                )
            self.graph.forward()
        self.is_done = True
        return self.graph.backward(dloss)

    def _check(self) -> None:
        if self._read != self._reads():
            raise RuntimeError(
                "lemo: a weight was changed in place or replaced between forward and backward of a "
                "pass; step the optimizer, and merge adapters, after backward"
            )

    def _reads(self) -> list[Hashable]:
        """What tells whether weights are those of another time."""
        weights = ((x._version, place_of(x)) for x in self._weights)
        return [*weights, *map(tuple, self._merged)]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *wanted: Tensor) -> Tensor:
        ctx.call = call
        return call.graph.forward()

    @staticmethod
    @first_order_only("CUDA graph")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.call.backward(dloss)


def _watched(device: torch.device | None) -> str | None:
    """What looks at each operator or at stored tensors, and would see nothing of a replay."""
    if torch.is_anomaly_enabled():
        return "torch.autograd's anomaly detection"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a torch dispatch mode"
    if device is not None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a capture of somebody else"
    return None


def _remember(keys: OrderedDict[Hashable, None], key: Hashable) -> None:
    keys[key] = None
    if len(keys) > _MOST_SEEN:
        keys.popitem(last=False)


def _form(x: Tensor | None) -> Hashable:
    return None if x is None else (tuple(x.shape), x.dtype, x.requires_grad)


def _described(inputs: Sequence[Tensor | None]) -> str:
    return ", ".join(str(list(x.shape)) for x in inputs if x is not None)
