"""CUDA graphs where a GPU's memory is short: each function for a fresh process."""

import gc

import torch

from graph_runs import Run

LONG = 32768


def beside_a_long_pass():
    """(graphs of a long pass, (graphs, their bytes) behind one of another length that finds no
    place beside them, whether all losses are finite)."""
    run = Run("on", "cuda")
    run.steps(3, tokens=LONG)
    graphs = run.handle.graphs
    captured = graphs.captured
    _limit(graphs.bytes // 4)
    run.step(tokens=30720)
    left = graphs.captured, graphs.bytes
    run.step(tokens=LONG)
    return captured, left, all(bool(loss.isfinite()) for loss, _ in run.found)


def captured_with_little_memory():
    """Graphs, with "auto", where less than the memory of two passes is free."""
    run = Run("auto", "cuda")
    torch.cuda.reset_peak_memory_stats()
    run.step(tokens=LONG)
    _limit(int(1.6 * (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())))
    run.steps(3, tokens=LONG)
    return run.handle.graphs.captured


def _limit(byte_count):
    """Gives torch so many bytes beside what it has reserved."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + byte_count) / total)
