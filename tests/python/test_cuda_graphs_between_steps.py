"""What users do between steps gives the same bits with CUDA graphs as without them.

On the CPU a stand-in takes the place of graphs (graph_stand_in.py).
"""

import gc
import os
import sys

import pytest
import torch

import devices
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
    torch.cuda.set_per_process_memory_fraction(1.0)


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


def limit_memory(byte_count):
    """Gives torch so many bytes beside what it has reserved."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + byte_count) / total)


@pytest.mark.gpu_only
def test_graphs_are_given_up_where_memory_runs_out_beside_them():
    run = Run("on", DEVICE)
    run.steps(3, tokens=32768)
    graphs = run.handle.graphs
    assert graphs.captured == 1
    # Beside the memory of a long pass another long one has no place.
    limit_memory(graphs.bytes // 4)
    run.step(tokens=30720)
    assert (graphs.captured, graphs.bytes) == (0, 0)
    run.step(tokens=32768)
    assert all(loss.isfinite() for loss, _ in run.found)


@pytest.mark.gpu_only
def test_auto_captures_nothing_that_would_leave_too_little_memory():
    run = Run("auto", DEVICE)
    torch.cuda.reset_peak_memory_stats()
    run.step(tokens=32768)
    used = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    limit_memory(int(1.6 * used))
    run.steps(3, tokens=32768)
    assert run.handle.graphs.captured == 0
