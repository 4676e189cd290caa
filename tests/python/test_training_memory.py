"""Peak memory of a run, with what torch does not count."""

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


def test_without_graphs(monkeypatch):
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 7)
    for handle in (None, SimpleNamespace(graphs=None)):
        assert memory.Peak(torch.device("cpu"), handle).bytes() == 7
