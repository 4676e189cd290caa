"""How many blocks a sequence keeps where its answers decide: as many as hold their relevance."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lemo.packing.blocks import BlockLayout, kept_blocks
from lemo.packing.to_device import to_device
from lemo.relevance.answers import are_answers

__all__ = ["Counts", "counts_on_host", "first_by_rank", "within_budget"]


class Counts(NamedTuple):
    """What a batch keeps, as far as it is known on the host.

    Attributes:
        blocks: of each sequence.
        lasts: indices of the last blocks, among all, of which it is known that they are kept.
        rows: of all sequences; None: a shorter last block may or may not be kept.
    """

    blocks: Sequence[int]
    lasts: Sequence[int]
    rows: int | None


def within_budget(
    ranks: Tensor,
    relevance: Tensor,
    labelled: Tensor,
    answers: Tensor,
    layout: BlockLayout,
    share: float,
    least: float,
    most: float,
    tokens: int,
) -> Tensor:
    """[B] of 0 or 1 fp32: the blocks that each sequence keeps.

    The first blocks by rank are kept: all with labels, and then as many as hold a share of the
    relevance of the blocks without labels, between two shares of all blocks, and so many tokens.
    Labels never take all of the upper share: at least half of it is for the prompt. Of text, where
    most rows have labels, the upper share is kept.

    Args:
        ranks: [B], the order of the blocks, those that come first the highest.
        relevance: [B] fp32 of at least 0.
        labelled: [B] bool, blocks with labels.
        answers: [N] bool, sequences that are no text.
        layout: the blocks.
        share: of the relevance, in (0, 1]; 1: the upper share of the blocks is kept.
        least, most: shares of the blocks of a sequence.
        tokens: of a prompt that are kept at least.
    """
    kept = torch.zeros_like(relevance)
    free = relevance.masked_fill(labelled, 0.0)
    first = 0
    for is_answers, count in zip(answers, layout.block_counts):
        blocks = slice(first, first + count)
        first += count
        if count == 0:
            continue
        order = ranks[blocks].argsort(descending=True, stable=True)
        with_labels = labelled[blocks].sum()
        budget, room = _of_prompt(count, most, tokens, layout.block_size)
        needed = (with_labels + room).clamp(min=budget)
        if share < 1.0:
            held = free[blocks][order].cumsum(0)
            # Blocks in front of which less than the share is held; those with labels hold nothing.
            holding = (held - free[blocks][order] < share * held[-1]).sum()
            at_least = with_labels + -(-tokens // layout.block_size)
            lower = max(kept_blocks(least, count), 1)
            needed = torch.minimum(torch.maximum(holding, at_least).clamp(min=lower), needed)
        needed = torch.where(is_answers, needed, budget)
        keep = torch.arange(count, device=ranks.device) < needed
        kept[blocks] = torch.zeros_like(free[blocks]).index_copy_(0, order, keep.to(kept.dtype))
    return kept


def first_by_rank(ranks: Tensor, counts: Counts, layout: BlockLayout) -> Tensor:
    """The same [B] where the host knows how many blocks each sequence keeps.

    Args:
        ranks: [B], as above; those that are no numbers come last.
        counts: of `counts_on_host`. Of `lasts` all are kept, whatever their ranks.
        layout: the blocks.
    """
    ranks = ranks.nan_to_num(nan=-torch.inf)
    if counts.lasts:
        index = to_device(torch.tensor(counts.lasts, device="cpu"), ranks.device)
        ranks = ranks.index_fill(0, index, torch.inf)
    kept = torch.zeros_like(ranks)
    for of_sequence, own, count in zip(
        kept.split(layout.block_counts), ranks.split(layout.block_counts), counts.blocks
    ):
        if count:
            order = own.argsort(descending=True, stable=True)
            of_sequence.index_fill_(0, order[:count], 1.0)
    return kept


def counts_on_host(
    labelled: Tensor, layout: BlockLayout, most: float, tokens: int, keep_first: int, keep_last: int
) -> Counts:
    """What `within_budget` keeps of the upper share: a GPU need not be asked.

    Args:
        labelled: [T] bool on the CPU, rows that have a label.
        layout, most, tokens: as of `within_budget`.
        keep_first, keep_last: blocks at the two ends of a sequence that come before others in the
            ranks, among those with labels and among those without.
    """
    blocks, lasts = [], []
    rows: int | None = 0
    end = 0
    for own, count in zip(labelled.split(list(layout.seqlens)), layout.block_counts):
        end += count
        missing = count * layout.block_size - len(own)
        has_label = pad(own, (0, missing)).view(count, layout.block_size).any(1)
        with_labels, is_answers = int(has_label.sum()), are_answers(int(own.sum()), len(own))
        budget, room = _of_prompt(count, most, tokens, layout.block_size)
        needed = max(with_labels + room, budget) if is_answers else budget
        needed = min(needed, count)
        blocks.append(needed)
        if missing:
            last_has = bool(has_label[-1])
            before_others = keep_first + keep_last if keep_last else count
            free = needed if last_has else needed - with_labels
            if needed == count or (is_answers and last_has) or before_others <= free:
                lasts.append(end - 1)
            else:
                rows = None
        if rows is not None:
            rows += needed * layout.block_size - missing
    return Counts(blocks, lasts, rows)


def _of_prompt(count: int, most: float, tokens: int, block_size: int) -> tuple[int, int]:
    """(the upper share of so many blocks, how much of it is for blocks without labels)."""
    if count == 0:
        return 0, 0
    budget = max(kept_blocks(most, count), 1)
    return budget, max(-(-budget // 2), -(-tokens // block_size))
