"""The host's memory: how much of it is free, and which pages of a pool are pinned."""

import gc
from types import SimpleNamespace

import pytest
import torch

from lemo.models.memory import host_pool
from lemo.models.memory.host_pool import HostPool, check_free, free_host_bytes

pytestmark = pytest.mark.cpu_only

SYSTEM = {"proc/meminfo": "MemTotal: 8192 kB\nMemAvailable:    2048 kB\nSwapFree: 1 kB\n"}


def group(limit, used="600000\n", stat="file 7\ninactive_file 100000\nactive_file 9\n"):
    files = {"memory.max": limit, "memory.current": used, "memory.stat": stat}
    return {f"sys/fs/cgroup/{name}": text for name, text in files.items()}


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a system, which are read in place of this one's."""
    monkeypatch.setattr(host_pool, "Path", lambda path: tmp_path / path.removeprefix("/"))

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 8192 kB\n"}, None),
        (SYSTEM, 2048 * 1024),
        (SYSTEM | group("max\n"), 2048 * 1024),
        # Of a group what it uses is taken, but for files that are only cached.
        (SYSTEM | group("1000000\n"), 1000000 - 600000 + 100000),
        (SYSTEM | group("1000000\n", stat=""), 1000000 - 600000),
        (SYSTEM | group("5000000\n"), 2048 * 1024),
        (SYSTEM | group("400000\n"), 0),
        (SYSTEM | group("1000000\n", used="unknown\n"), 2048 * 1024),
    ],
)
def test_bytes_that_are_free(files, free, system):
    system(files)
    assert free_host_bytes() == free


def test_all_that_is_free_may_be_asked_for(system):
    check_free(2**60)  # nothing is known
    system(SYSTEM)
    check_free(2**21)
    with pytest.raises(ValueError, match=r"expected at most the 2 MiB that are free .*, got 2 MiB"):
        check_free(2**21 + 1)
    with pytest.raises(ValueError, match="expected at most the 2 MiB that are free"):
        HostPool(2**21 + 1, pinned=False)


def test_the_lowest_free_bytes_are_taken_first():
    page = host_pool.HOST_ALIGNMENT
    pool = HostPool(4 * page, pinned=False)
    first, second = pool.take(2 * page), pool.take(page)
    pool.free(first)
    assert [pool.take(page).runs for _ in range(3)] == [
        ((page * place, page * (place + 1)),) for place in (0, 1, 3)
    ]
    assert second.runs == ((2 * page, 3 * page),)


def test_the_most_that_was_taken_stays_known():
    pool = HostPool(4 * host_pool.HOST_ALIGNMENT, pinned=False)
    pool.free(pool.take(pool.capacity - 1))
    pool.take(1)
    assert (pool.taken, pool.most) == (host_pool.HOST_ALIGNMENT, pool.capacity)


def test_pages_are_pinned_once_when_they_are_taken(monkeypatch):
    """By segments, of which the last one is shorter, until the pool is gone."""
    pinned, status = {}, 0

    def register(address, size, flags):
        assert flags == 0
        assert address not in pinned
        if not status:
            pinned[address] = size
        return status

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(host_pool, "_SEGMENT", 8192)
    pool = HostPool(5 * 4096, pinned=True)
    assert (pool.pinned_bytes, pinned) == (0, {})
    slot = pool.take(4096)
    address = slot.pieces[0].data_ptr()
    assert pinned == {address: 8192}
    pool.take(4096)
    assert pool.pinned_bytes == 8192
    pool.take(1)
    assert pinned == {address: 8192, address + 8192: 8192}
    status = 2
    with pytest.raises(MemoryError, match=r"host_memory: 16384 bytes of it are .*CUDA error 2"):
        pool.pin()
    status = 0
    pool.pin()
    assert pinned == {address: 8192, address + 8192: 8192, address + 16384: 4096}
    assert pool.pinned_bytes == 5 * 4096
    del pool
    gc.collect()
    assert pinned == {}
