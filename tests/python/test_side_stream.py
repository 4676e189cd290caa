"""Gradients of adapters on a second stream, while a CUDA graph is captured."""

import gc
import os
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import devices
from graph_runs import Run, difference
from lemo.models.projections import linear, side_stream, split_low_rank
from lemo.models.projections.linear import apply_linears
from lemo.models.projections.side_stream import SideStream, beside
from linear_cases import draw_as_lemo_does, inputs, lora_layer

if devices.on_gpu():
    # Read when a process calls cuBLAS for the first time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CUDA = torch.device("cuda")


class Stream:
    """Stands in for one of CUDA's, and writes down who waited for whom."""

    def __init__(self, name, log):
        self.cuda_stream, self.name, self.log = id(self), name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def streams(monkeypatch):
    """(current stream, another one, their log)."""
    log = []
    current, side = Stream("current", log), Stream("side", log)

    @contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield
        log.append("off")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return current, side, log


def test_work_is_behind_what_came_before_and_before_what_comes_after_the_join(streams):
    current, side, log = streams
    with beside(current, side):
        stream = SideStream(CUDA)
        with stream.behind(torch.ones(1)):
            log.append("a gradient")
        log.append("a product")
        stream.join()
        stream.join()
    expected = ["side waits for current", "on side", "a gradient", "off", "a product"]
    assert log == [*expected, "current waits for side"]


def test_operands_stay_until_the_join(streams):
    current, side, _ = streams
    with beside(current, side):
        stream, x = SideStream(CUDA), torch.ones(1)
        with stream.behind(x):
            pass
        gone = weakref.ref(x)
        del x
        gc.collect()
        assert gone() is not None
        stream.join()
        assert gone() is None


@pytest.mark.parametrize("where", ["after", "on the CPU", "in order", "beside another"])
def test_elsewhere_everything_runs_in_order(where, streams):
    current, side, log = streams
    with beside(side if where == "beside another" else current, side):
        inside = SideStream({"in order": None, "on the CPU": torch.device("cpu")}.get(where, CUDA))
    stream = SideStream(CUDA) if where == "after" else inside
    with stream.behind(torch.ones(1)):
        pass
    stream.join()
    assert log == []
    assert side_stream._sides == {}


class Marked(SideStream):
    """Marks what is on the side."""

    is_inside, joined = False, 0

    def __init__(self, device=None):
        self.counts = device is not None

    @contextmanager
    def behind(self, *operands):
        Marked.is_inside = self.counts
        yield
        Marked.is_inside = False

    def join(self):
        Marked.joined += 1


class Products(TorchDispatchMode):
    """Shapes of the results of products: of those on the side, and of the others."""

    def __init__(self):
        super().__init__()
        self.side, self.others = [], []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            # After the join nothing is multiplied.
            assert Marked.joined == 0
            (self.side if Marked.is_inside else self.others).append(tuple(found.shape))
        return found


@pytest.mark.cpu_only
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_only_gradients_of_weights_are_on_the_side(split, drops, monkeypatch):
    draw_as_lemo_does(monkeypatch)
    monkeypatch.setattr(split_low_rank, "_has_fp32_sums", lambda device: True)
    monkeypatch.setattr(linear, "SideStream", Marked)
    adapters = {"adapter_dtype": torch.float32} if split else {}
    layers = [lora_layer(torch.bfloat16, r=8, lora_dropout=drops * 0.5, **adapters)]
    x, dy = inputs(torch.bfloat16)
    y = apply_linears(layers, x.requires_grad_())[0]
    Marked.joined = 0
    with Products() as products:
        y.backward(dy)
    assert Marked.joined == 1
    outs, ins, rank = dy.shape[1], x.shape[1], 24 if split else 8
    of_b, of_a = (outs, rank), (rank, ins)
    # A chunk's operands are gone behind it, so what is dropped in chunks stays in order.
    of_drops = [of_b] if split else []
    assert products.side == (of_drops if drops else [of_b, of_a])
    assert (of_a in products.others) == drops
    assert tuple(x.shape) in products.others


@pytest.mark.gpu_only
@pytest.mark.parametrize("slow", ["side", "current"])
@pytest.mark.parametrize("fp32", [False, True])
def test_graphs_give_the_same_bits_when_a_stream_is_slow(slow, fp32, monkeypatch):
    """What is read too early, or written over, differs then."""
    own = SideStream.behind

    @contextmanager
    def late(stream, *operands):
        with own(stream, *operands):
            if slow == "side" and stream._streams is not None:
                torch.cuda._sleep(300_000)
            yield
        if slow == "current" and stream._streams is not None:
            torch.cuda._sleep(300_000)

    monkeypatch.setattr(SideStream, "behind", late)
    torch.use_deterministic_algorithms(True)
    try:
        without, with_graphs = (Run(graphs, "cuda", fp32=fp32) for graphs in ("off", "auto"))
        without.steps(5)
        with_graphs.steps(5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert with_graphs.handle.graphs.replays >= 3
    assert difference(with_graphs.found, without.found) == ""
