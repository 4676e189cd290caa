"""How rows are dealt out to the processes of a group: zigzag, so that causal work is even."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lemo.packing.to_device import index_tensors

__all__ = ["Deal", "deal", "zigzag"]


@dataclass(frozen=True)
class Deal:
    """Which of R rows each of W processes holds.

    Attributes:
        rows: [R] int64, all rows in the order of the processes, ascending in each of them.
        sizes: rows of each process.
    """

    rows: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def by_owner(cls, owners: Tensor, sizes: Sequence[int]) -> "Deal":
        """From the process that holds each row, [R], and how many rows each holds."""
        return cls(owners.argsort(stable=True), tuple(sizes))

    @property
    def largest(self) -> int:
        """Rows of the process that holds the most."""
        return max(self.sizes)

    def of(self, process: int) -> Tensor:
        """[r] int64, ascending, the rows of one process."""
        first = sum(self.sizes[:process])
        return self.rows[first : first + self.sizes[process]]

    def owners(self) -> Tensor:
        """[R] int64, the process that holds each row."""
        device, count = self.rows.device, self.rows.numel()
        sizes = torch.tensor(self.sizes, device=device)
        processes = torch.arange(len(self.sizes), device=device)
        in_order = processes.repeat_interleave(sizes, output_size=count)
        return torch.empty_like(self.rows).index_copy_(0, self.rows, in_order)

    def slots(self) -> tuple[Tensor, Tensor]:
        """Where rows are when each process gives `largest` of them, and the way back.

        Returns:
            The slot of each row, [R] int64; the row of each slot, [W * largest] int64, 0 where a
            process has no row any more.
        """
        device = self.rows.device
        firsts = list(accumulate(self.sizes, initial=0))[:-1]
        gaps = [rank * self.largest - first for rank, first in enumerate(firsts)]
        [shifts, sizes] = index_tensors(device, gaps, list(self.sizes))
        count = self.rows.numel()
        in_order = torch.arange(count, device=device)
        in_order += shifts.repeat_interleave(sizes.long(), output_size=count)
        slot_of = torch.empty_like(self.rows).index_copy_(0, self.rows, in_order)
        row_of = torch.zeros(len(self.sizes) * self.largest, dtype=torch.int64, device=device)
        return slot_of, row_of.index_copy_(0, in_order, self.rows)


def zigzag(counts: Sequence[int], processes: int) -> list[list[tuple[int, int]]]:
    """The spans of rows of each process: of every sequence one from its front and one from its end.

    A sequence is cut into 2 W even spans; the pair (p, 2 W - 1 - p) belongs to one process. A query
    sees the keys before it, so the two have the work of two mean spans together. Which process has
    which pair goes round from sequence to sequence, so that what does not divide evens out.

    Args:
        counts: rows of each sequence.
        processes: W.

    Returns:
        For each process, (first row, rows) of two spans of every sequence, ascending; empty ones
        are there, too.
    """
    spans: list[list[tuple[int, int]]] = [[] for _ in range(processes)]
    first, parts = 0, 2 * processes
    for sequence, count in enumerate(counts):
        cuts = [first + count * part // parts for part in range(parts + 1)]
        for pair in range(processes):
            owner = spans[(pair + sequence) % processes]
            for part in (pair, parts - 1 - pair):
                owner.append((cuts[part], cuts[part + 1] - cuts[part]))
        first += count
    return spans


def deal(
    counts: Sequence[int], processes: int, process: int, device: torch.device
) -> tuple[Deal, Tensor]:
    """Deals out packed rows, zigzag in each sequence.

    Args:
        counts: rows of each of the N sequences.
        processes: how many there are.
        process: the one whose rows are counted.
        device: where the rows are.

    Returns:
        The deal, and [N+1] int32, where the rows of each sequence begin among those of `process`.
    """
    spans = zigzag(counts, processes)
    sizes = [sum(length for _, length in of_one) for of_one in spans]
    lengths = [length for of_one in spans for _, length in of_one]
    before = accumulate(lengths, initial=0)
    shifts = [first - seen for (first, _), seen in zip((s for o in spans for s in o), before)]
    mine = [length for _, length in spans[process]]
    by_sequence = [sum(pair) for pair in zip(mine[::2], mine[1::2])]
    [on_device, counted, cu_rows] = index_tensors(
        device, shifts, lengths, list(accumulate(by_sequence, initial=0))
    )
    total = sum(counts)
    rows = torch.arange(total, device=device)
    rows += on_device.repeat_interleave(counted.long(), output_size=total)
    return Deal(rows, tuple(sizes)), cu_rows
