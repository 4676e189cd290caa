"""How many blocks of a prompt are kept, against a count of one block after the other."""

from fractions import Fraction
from math import ceil

import pytest
import torch

from lemo.packing.blocks import BlockLayout
from lemo.selection.budget import within_budget

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
