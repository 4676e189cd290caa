"""The same with other numbers of threads."""

from collections.abc import Iterator

import torch


def each_number_of_threads(*counts: int) -> Iterator[int]:
    """Each of the numbers, of which torch and lemo have as many threads meanwhile."""
    threads = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(threads)
