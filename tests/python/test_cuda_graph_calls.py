"""Calls that are replayed as graphs, by a stand-in on the CPU: what they refuse, and which stay."""

import copy
import pickle

import pytest
import torch

from graph_stand_in import take_the_place_of_graphs
from lemo.models.layers import cuda_graphs
from lemo.models.layers.cuda_graphs import CudaGraphs

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    take_the_place_of_graphs(monkeypatch)


class Calls:
    """Of the product of a weight and an input of some size."""

    def __init__(self, **more):
        self.graphs, self.module = CudaGraphs(), torch.nn.Linear(1, 1, bias=False)
        self._more = more

    def run(self, size=1):
        module, inputs = self.module, [torch.ones(size)]

        def product(x):
            return (x[0] * module.weight).sum()

        return self.graphs.run("key", product, inputs, [module.weight], module, **self._more)


@pytest.mark.parametrize("change", ["nothing", "a frozen weight", "merged adapters"])
def test_backward_refuses_what_was_changed_since_forward(change):
    frozen, merged = torch.ones(1), []
    calls = Calls(weights=[frozen], merged=[merged])
    for _ in range(2):
        loss = calls.run()
    assert calls.graphs.replays == 1
    if change == "a frozen weight":
        frozen.add_(1)
    elif change == "merged adapters":
        merged.append("default")
    if change == "nothing":
        loss.backward()
        assert calls.module.weight.grad == 1
        return
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


def test_graphs_that_are_replayed_stay(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_IDLE_PASSES", 20)
    calls = Calls()
    with torch.no_grad():
        for size in [*range(1, 9), *range(1, 9)]:
            calls.run(size)
        for _ in range(5):
            for size in (1, 3, 4, 5, 6, 7, 8):
                calls.run(size)
        calls.run(9)
        calls.run(9)  # in the place of 2, which was not replayed for longest
        replays = calls.graphs.replays
        for size in (1, 3, 4, 5, 6, 7, 8, 9):
            calls.run(size)
        assert calls.graphs.replays == replays + 8
        calls.run(2)
        assert calls.graphs.replays == replays + 8


@pytest.mark.parametrize("spares", [False, True])
def test_copies_spare_as_much_memory(spares):
    graphs = CudaGraphs(spares)
    for copied in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert copied._spares == spares
