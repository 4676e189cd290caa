"""How rows are dealt out to processes: each once, in order, and with the same work for all."""

import random

import pytest
import torch

from lemo.distributed.dealing import Deal, deal, zigzag

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")


def counts_of(seed):
    draw = random.Random(seed)
    return [draw.choice([0, 1, 2, 3, 7, 40, 100]) for _ in range(draw.randint(1, 6))] + [5]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_every_row_is_of_one_process(processes):
    for seed in range(8):
        counts = counts_of(seed)
        sequence_of = [s for s, count in enumerate(counts) for _ in range(count)]
        seen, sizes = [], []
        for process in range(processes):
            dealt, cu_rows = deal(counts, processes, process, CPU)
            mine = dealt.of(process).tolist()
            assert mine == sorted(mine)
            assert len(mine) == dealt.sizes[process]
            # Where each sequence's begin.
            ends = [sum(sequence_of[row] < s for row in mine) for s in range(len(counts) + 1)]
            assert cu_rows.tolist() == ends
            assert [row for row, owner in enumerate(dealt.owners()) if owner == process] == mine
            seen += mine
            sizes.append(len(mine))
        assert sorted(seen) == [*range(sum(counts))]
        assert dealt.largest == max(sizes)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_rows_go_to_their_slots_and_back(processes):
    dealt, _ = deal(counts_of(3), processes, 0, CPU)
    slot_of, row_of = dealt.slots()
    assert row_of.numel() == processes * dealt.largest
    for process in range(processes):
        for place, row in enumerate(dealt.of(process).tolist()):
            slot = process * dealt.largest + place
            assert slot_of[row] == slot
            assert row_of[slot] == row
    # Nobody's slots are of row 0, which is there.
    free = set(range(row_of.numel())) - set(slot_of.tolist())
    assert all(row_of[slot] == 0 for slot in free)


def test_a_deal_by_owner_is_in_order():
    owners = torch.randint(3, (500,), generator=torch.Generator().manual_seed(0))
    sizes = owners.bincount(minlength=3).tolist()
    dealt = Deal.by_owner(owners, sizes)
    for process in range(3):
        assert torch.equal(dealt.of(process), (owners == process).nonzero().flatten())
    assert torch.equal(dealt.owners(), owners)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_work_of_causal_attention_is_even(processes):
    """A row looks at those before it."""
    count = 4096
    work = [
        sum(first + row + 1 for first, rows in spans for row in range(rows))
        for spans in zigzag([count], processes)
    ]
    assert max(work) - min(work) <= count


@pytest.mark.parametrize("count", [1, 3, 5])
def test_what_does_not_divide_evens_out_over_sequences(count):
    sizes = [sum(rows for _, rows in spans) for spans in zigzag([count] * 8, 4)]
    assert sizes == [2 * count] * 4
