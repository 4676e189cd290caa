"""How many blocks of a prompt are kept, against a count of one block after the other."""

from fractions import Fraction
from math import ceil

import pytest
import torch

from lemo.packing.blocks import BlockLayout
from lemo.relevance.answers import are_answers
from lemo.selection.budget import counts_on_host, first_by_rank, within_budget
from lemo.selection.priority import always_kept, ranks

BLOCK = 16
# Of no tokens, of less than a block, of whole blocks, and of a ragged last one.
SEQLENS = [0, 5, 32, 170, 0, 256, 300, 47]


def expected(order, relevance, labelled, is_answers, share, least, most, tokens):
    """The blocks that a sequence keeps, of its blocks in the order in which they are kept."""
    count = len(order)
    budget = max(ceil(Fraction(most) * count), 1)
    if not is_answers:
        return order[:budget]
    with_labels = sum(labelled[block] for block in order)
    upper = max(budget, with_labels + max(ceil(budget / 2), ceil(tokens / BLOCK)))
    if share == 1:
        return order[:upper]
    total = sum(relevance[block] for block in order if not labelled[block])
    held, needed = 0.0, 0
    while held < share * total:
        held += 0.0 if labelled[order[needed]] else relevance[order[needed]]
        needed += 1
    lower = max(ceil(Fraction(least) * count), with_labels + ceil(tokens / BLOCK), 1)
    return order[: min(max(needed, lower), upper)]


@pytest.mark.parametrize("draw", range(4))
@pytest.mark.parametrize("tokens", [0, 33])
@pytest.mark.parametrize("least", [0.0, 0.5])
@pytest.mark.parametrize("most", [0.0, 0.0625, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
def test_each_sequence_keeps_its_budget(share, most, least, tokens, draw):
    torch.manual_seed(draw)
    layout = BlockLayout.from_seqlens(SEQLENS, BLOCK)
    # Sixteenths, mostly none: every sum and these shares are exact.
    relevance = torch.randint(-9, 5, (layout.num_blocks,)).clamp(min=0) / 16
    labelled = torch.rand(layout.num_blocks) < 0.2
    answers = torch.tensor([False, True, False, True, True, True, True, False])
    ranks = torch.randperm(layout.num_blocks) + labelled * layout.num_blocks
    kept = within_budget(
        ranks.float(), relevance, labelled, answers, layout, share, least, most, tokens
    )
    wanted = torch.zeros(layout.num_blocks)
    cuts = layout.cu_blocks.tolist()
    for first, end, is_answers in zip(cuts, cuts[1:], answers.tolist()):
        order = sorted(range(first, end), key=lambda block: -ranks[block].item())
        values = relevance.tolist(), labelled.tolist()
        blocks = expected(order, *values, is_answers, share, least, most, tokens)
        wanted[blocks] = 1.0
    assert kept.tolist() == wanted.tolist()


def labelled_rows():
    """[T] bool: answers at the end of some sequences, in the midst of others, and text."""
    parts = []
    for length in SEQLENS:
        rows = torch.zeros(length, dtype=torch.bool)
        kind = torch.randint(4, ()).item()
        if kind == 0:
            rows[:] = True  # text
        elif kind == 1:
            rows[-1 - length // 4 :] = True
        elif kind == 2 and length:
            rows[torch.randint(length, (3,))] = True
        parts.append(rows)
    return torch.cat(parts)


@pytest.mark.parametrize("draw", range(8))
@pytest.mark.parametrize("ends", [(0, 0), (0, 1), (2, 3)])
@pytest.mark.parametrize("tokens", [0, 33])
@pytest.mark.parametrize("most", [0.0, 0.0625, 0.5, 1.0])
def test_the_host_counts_what_is_kept(most, tokens, ends, draw):
    torch.manual_seed(draw)
    layout, on_device = BlockLayout.from_seqlens(SEQLENS, BLOCK), labelled_rows()
    rows = on_device.cpu()
    labelled = layout.blocks_with(on_device)
    first, _ = always_kept(layout, most, *ends, False)
    order = ranks(torch.rand(layout.num_blocks), labelled, first)
    counts = counts_on_host(rows, layout, most, tokens, *ends)
    kept = first_by_rank(order, counts, layout)

    wanted, sizes, unknown = [], [], 0
    cuts, has = layout.cu_blocks.tolist(), labelled.tolist()
    for start, end, own in zip(cuts, cuts[1:], rows.split(SEQLENS)):
        by_rank = sorted(range(start, end), key=lambda block: -order[block].item())
        is_answers = bool(are_answers(own.sum(), len(own)))
        blocks = expected(by_rank, has, has, is_answers, 1, 0.0, most, tokens) if by_rank else []
        wanted += blocks
        ragged = len(own) % BLOCK
        unknown += bool(ragged) and end - 1 not in counts.lasts
        sizes.append(BLOCK * len(blocks) - (BLOCK - ragged) * (bool(ragged) and end - 1 in blocks))
    assert sorted(wanted) == kept.nonzero()[:, 0].tolist()
    assert set(counts.lasts) <= set(wanted)
    assert counts.rows == (None if unknown else sum(sizes))
    if ends == (0, 1) and most >= 0.5 and tokens:
        # What is usual: a last block that is kept, one of an answer or of the end.
        assert unknown <= sum(length % BLOCK > 0 for length in SEQLENS) // 2


def test_counts_hold_where_scores_are_no_numbers():
    """The sizes of what follows are those counts: another number of rows would read past them."""
    layout = BlockLayout.from_seqlens([90, 64], BLOCK)
    rows = torch.zeros(154, dtype=torch.bool, device="cpu")
    rows[80:90] = True
    counts = counts_on_host(rows, layout, 0.5, 0, 0, 0)
    assert counts == ([3, 2], [5], 42 + 32)
    order = torch.full((layout.num_blocks,), torch.nan)
    order[2] = 0.0
    kept = first_by_rank(order, counts, layout).tolist()
    assert (kept[2], kept[5]) == (1.0, 1.0)
    assert (sum(kept[:6]), sum(kept[6:])) == (3, 2)
