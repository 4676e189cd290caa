"""Lexical scores: the words that a block shares with the answers. No model is asked."""

import torch
from torch import Tensor

from lemo.selection.scorers.base import BlockedBatch, Scorer
from lemo.selection.scorers.random import RandomScorer

__all__ = ["LexicalScorer", "lexical_scores"]

# Tokens in front of an answer whose words count as the answer's own: the end of its question.
_TOKENS_BEFORE = 8

# Where more rows than this share have labels, the sequence is text, not a prompt with answers.
_MOST_LABELLED = 0.5


class LexicalScorer(Scorer):
    """Scores a block by the rare words that it shares with an answer.

    An answer is a run of tokens with labels, and its words are its tokens and the 8 tokens before
    it. A word counts log(blocks / blocks that have it). Every answer's scores are divided by their
    sum over the blocks without labels, and a block has the largest of them, so that each answer
    finds its own blocks. All layers get the same scores.

    It costs no forward pass: sorting the tokens of a batch. It fails where the text says with other
    words what the answer and its question say, and where an answer needs facts that only another
    fact leads to (docs/LOG.md, 2026-11-28).

    Sequences without labels, or with labels on more than half of their rows, get random scores.

    Args:
        seed: of the random scores.
    """

    def __init__(self, seed: int) -> None:
        self._random = RandomScorer(seed)

    def begin_step(self, step: int) -> None:
        self._random.begin_step(step)

    def __call__(self, layer: int, kind: str, x: Tensor, batch: BlockedBatch) -> Tensor:
        if batch.ids is None or batch.labelled is None:
            missing = "input_ids" if batch.ids is None else "labels"
            raise ValueError(
                f"scorer: 'lexical' needs the batch's {missing}, which are not known; pass them to "
                "the model (labels also by handle.labelled or handle.attach), or use scorer "
                "'random'"
            )
        scores = self._random(layer, kind, x, batch)
        layout = batch.layout
        row = block = 0
        for seqlen, blocks in zip(layout.seqlens, layout.block_counts):
            rows = slice(row, row + seqlen)
            found = _scores_of_answers(batch.ids[rows], batch.labelled[rows], layout.block_size)
            if found is not None:
                scores[block : block + blocks] = found
            row, block = row + seqlen, block + blocks
        return scores


def _scores_of_answers(ids: Tensor, labelled: Tensor, block_size: int) -> Tensor | None:
    """Scores of one sequence; None: it is no prompt with answers."""
    count = int(labelled.sum())
    if not 0 < count <= _MOST_LABELLED * ids.numel():
        return None
    return lexical_scores(ids, labelled, block_size)


def lexical_scores(ids: Tensor, labelled: Tensor, block_size: int) -> Tensor:
    """Scores [B] fp32 of the blocks of one sequence; see `LexicalScorer`.

    Args:
        ids: [S] int64, the tokens.
        labelled: [S] bool, rows that predict a token of an answer: the row before it. At least one.
        block_size: tokens of a block; the last one may be shorter.
    """
    blocks = torch.arange(ids.numel(), device=ids.device) // block_size
    num_blocks = -(-ids.numel() // block_size)
    starts = labelled.clone()
    starts[1:] &= ~labelled[:-1]
    answers = (starts.cumsum(0) - 1)[labelled]
    first = starts.nonzero()[:, 0]
    before = first[:, None] - torch.arange(_TOKENS_BEFORE, device=ids.device)
    asked = torch.arange(first.numel(), device=ids.device)[:, None].expand_as(before)
    inside = before >= 0
    rows = torch.cat((labelled.nonzero()[:, 0] + 1, before[inside]))
    # The last row predicts nothing.
    valid = rows < ids.numel()
    words, word = torch.unique(ids[rows[valid]], return_inverse=True)
    queries = ids.new_zeros((first.numel(), words.numel()), dtype=torch.float32)
    queries[torch.cat((answers, asked[inside]))[valid], word] = 1.0

    place = torch.searchsorted(words, ids).clamp(max=words.numel() - 1)
    hit = words[place] == ids
    present = queries.new_zeros((words.numel(), num_blocks))
    present[place[hit], blocks[hit]] = 1.0
    weights = (num_blocks / present.sum(1)).log()
    scores = (queries * weights) @ present
    free = torch.ones_like(scores[0]).index_fill_(0, blocks[labelled], 0.0)
    totals = (scores * free).sum(1, keepdim=True)
    return (scores / totals.clamp(min=torch.finfo(torch.float32).tiny)).amax(0)
