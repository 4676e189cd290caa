"""What users do between steps gives the same bits with CUDA graphs as without them.

On the CPU a stand-in takes the place of graphs (graph_stand_in.py).
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

import devices
import graph_memory
from graph_cases import SCENARIOS
from graph_runs import Run, difference
from graph_stand_in import take_the_place_of_graphs

if devices.on_gpu():
    # Read when a process calls cuBLAS for the first time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.usefixtures("script_defaults", "graphs"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection"),
]

DEVICE = "cuda" if devices.on_gpu() else "cpu"

# The stand-in computes a pass again in backward, outside of the autocast of forward, and does not
# know another parameter in the same memory.
NOT_ON_THE_CPU = {"autocast_switched", "parameter_replaced"}


@pytest.fixture
def graphs(monkeypatch):
    """Graphs of a GPU, with deterministic kernels beside them, or their stand-in."""
    if not devices.on_gpu():
        take_the_place_of_graphs(monkeypatch)
        # A divisor is read where it is on the CPU; here it stands for one on a GPU.
        loss = sys.modules["lemo.ops.linear_cross_entropy"]
        monkeypatch.setattr(loss, "float", lambda x: 1.0, raising=False)
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cases():
    for name in SCENARIOS:
        yield pytest.param(name, marks=[pytest.mark.gpu_only] if name in NOT_ON_THE_CPU else [])


@pytest.mark.parametrize("name", cases())
def test_the_bits_are_those_of_passes_without_graphs(name):
    scenario, least, settings = SCENARIOS[name]
    found = {}
    for setting in ("off", "auto" if devices.on_gpu() else "on"):
        run = Run(setting, DEVICE, **settings)
        scenario(run)
        found[setting] = run.found
        if setting == "off":
            assert run.handle.graphs is None
    without, with_graphs = found.values()
    assert len(without) > 0
    assert difference(with_graphs, without) == ""
    assert run.handle.graphs.replays >= least
    run.handle.graphs.clear()


@pytest.fixture
def alone():
    """Runs a function in a process of its own, and gives what it returns.

    What other tests left on the GPU holds memory of torch's allocator open, in which a pass finds
    place beyond a limit.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        yield lambda function: pool.submit(function).result()


@pytest.mark.gpu_only
def test_graphs_are_given_up_where_memory_runs_out_beside_them(alone):
    captured, left, finite = alone(graph_memory.beside_a_long_pass)
    assert captured == 1
    assert left == (0, 0)
    assert finite


@pytest.mark.gpu_only
def test_auto_captures_nothing_that_would_leave_too_little_memory(alone):
    assert alone(graph_memory.captured_with_little_memory) == 0
