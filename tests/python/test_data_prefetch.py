"""Windows tokenized ahead by threads: the same ids in the same order, and nothing left running."""

import threading
import time

import pytest
import torch

from lemo.data import prefetched, token_windows, tokenizing_threads
from lemo.data.documents import Document
from tiny import sample_text, tiny_tokenizer

pytestmark = pytest.mark.cpu_only

BATCHES = [range(0, 3), range(3, 4), range(4, 9), range(9, 10)] * 5


class Recorded:
    """Windows that are their own number, later ones sooner; knows what was asked for."""

    def __init__(self, fail_at=None):
        self.asked, self.fail_at = [], fail_at

    def window(self, index):
        self.asked.append(index)
        time.sleep(0.002 * (index % 3 == 0))
        if index == self.fail_at:
            raise ValueError(f"documents: {index}")
        return torch.tensor([index])


@pytest.mark.parametrize("threads", [1, 2, 8, 64])
def test_batches_come_whole_and_in_order(threads):
    batches = list(prefetched(Recorded(), BATCHES, threads))
    assert [batch.input_ids[:, 0].tolist() for batch in batches] == list(map(list, BATCHES))


def test_many_threads_share_a_tokenizer():
    texts = [Document(f"{i}", "a", sample_text(3000, i)) for i in range(3)]
    windows = token_windows(texts, tiny_tokenizer(), 128)
    alone = [windows.window(index) for index in range(200)]
    together = prefetched(windows, ([index] for index in range(200)), 16)
    assert all(torch.equal(a, b.input_ids[0]) for a, b in zip(alone, together, strict=True))


def test_threads_have_two_windows_each_beyond_the_next_batch():
    windows = Recorded()
    batches = prefetched(windows, (range(i, i + 1) for i in range(100)), threads=3)
    next(batches)
    time.sleep(0.1)
    assert sorted(windows.asked) == list(range(7))
    batches.close()


def test_a_large_batch_in_front_asks_for_no_more():
    windows = Recorded()
    sizes = [range(8), *(range(i, i + 1) for i in range(8, 100))]
    batches = prefetched(windows, iter(sizes), threads=2)
    for asked in (12, 13, 14):
        next(batches)
        time.sleep(0.1)
        assert sorted(windows.asked) == list(range(asked))
    batches.close()


def test_an_error_comes_with_its_batch_and_ends_the_threads():
    batches = prefetched(Recorded(fail_at=5), BATCHES, threads=2)
    assert [len(next(batches).input_ids) for _ in range(2)] == [3, 1]
    with pytest.raises(ValueError, match="documents: 5"):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("tokenize")]


def test_closing_ends_the_threads():
    windows = Recorded()
    batches = prefetched(windows, ([index] for index in range(10**6)), threads=2)
    next(batches)
    batches.close()
    assert len(windows.asked) < 10
    assert not [t for t in threading.enumerate() if t.name.startswith("tokenize")]


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, 1), (2, 1, 1), (16, 1, 8), (64, 1, 8), (16, 4, 2)]
)
def test_half_of_the_cores_of_a_process_tokenize(monkeypatch, cores, processes, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert tokenizing_threads(processes) == threads
