"""Peak memory of a run, with what torch does not count."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lemo.training import memory

pytestmark = pytest.mark.cpu_only


def test_what_graphs_hold_counts_from_their_capture_on(monkeypatch):
    """Before, they are among what is allocated."""
    allocated, resets = [0], []
    monkeypatch.setattr(memory, "peak_bytes", lambda device: allocated[0])
    monkeypatch.setattr(memory, "reset_peak", lambda device: resets.append(device))
    handle = SimpleNamespace(graphs=SimpleNamespace(bytes=0))
    peak = memory.Peak(torch.device("cpu"), handle)
    allocated[0] = 100
    assert peak.bytes() == 100
    # A capture of 60, while 70 are allocated at most.
    handle.graphs.bytes, allocated[0] = 60, 100
    assert peak.bytes() == 100
    assert len(resets) == 2
    allocated[0] = 30  # an evaluation beside them
    assert peak.bytes() == 100
    allocated[0] = 55
    assert peak.bytes() == 115
    handle.graphs.bytes, allocated[0] = 0, 80
    assert peak.bytes() == 140  # at most: when they were given back is not known
    allocated[0] = 90
    assert peak.bytes() == 140


def resident_bytes():
    """Of this process, without what is on disk."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_freed_memory_goes_back():
    """Every second one of many blocks of 1 MiB, where a larger one has been freed before."""
    torch.ones(2**22)  # glibc maps smaller blocks no more by themselves
    blocks = [torch.ones(2**18) for _ in range(256)]
    del blocks[::2]
    before = resident_bytes()
    memory.release_freed(torch.device("cuda"), 16)
    memory.release_freed(torch.device("cpu"), 15)
    assert resident_bytes() > before - 2**25
    memory.release_freed(torch.device("cpu"), 16)
    assert resident_bytes() < before - 100 * 2**20
    assert all(torch.equal(x, torch.ones(2**18)) for x in blocks)


def test_without_graphs(monkeypatch):
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 7)
    for handle in (None, SimpleNamespace(graphs=None)):
        assert memory.Peak(torch.device("cpu"), handle).bytes() == 7
