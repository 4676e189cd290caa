"""Relevance by shared words: what an answer repeats, and what stands around it. No model is asked.

A word is a token id, so any tokenizer will do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from lemo.relevance.answers import Answers, shares

__all__ = ["word_relevance"]

# Tokens in front of an answer whose words count as the answer's own: the end of its question.
_BEFORE = 8

# Tokens of the window in which most of an answer's words stand close together: its place.
_PLACE = 16

# Tokens before and after the end of the place whose words are looked for in the second step, and
# tokens of the window in which they have to stand close together.
_AROUND = (24, 8)
_NEAR = 32


def word_relevance(ids: Tensor, answers: Answers, block_size: int) -> Tensor:
    """How much each answer needs each block, [A, B] fp32; see `LexicalScorer`.

    Rows sum to one over the blocks without labels at most; a block counts for the answers after it.

    Args:
        ids: [S] int64, the tokens of one sequence.
        answers: its answers.
        block_size: tokens of a block; the last one may be shorter.
    """
    text = _Text(ids, answers, block_size)
    rows, of_rows = answers.rows(), answers.of_rows()
    tokens = [row + 1 for row in rows]
    before = [max(first + 1 - _BEFORE, 0) for first in answers.firsts]
    asked = [range(start, first + 1) for start, first in zip(before, answers.firsts)]

    words = text.queries(tokens, of_rows)
    own = text.queries(
        tokens + [row for part in asked for row in part],
        of_rows + [answer for answer, part in enumerate(asked) for _ in part],
    )
    shared = text.shared(own)

    place = text.closeness(words, _PLACE)
    found, end = place.max(1)
    around = end[:, None] + torch.arange(-_AROUND[0] + 1, _AROUND[1] + 1, device=ids.device)
    near = text.queries_at(around.clamp(0, ids.numel() - 1)) * (found > 0)[:, None]
    second = text.block_maxima(text.closeness(near, _NEAR).square())
    return torch.maximum(shares(shared), shares(second))


class _Text:
    """The words of a sequence, and where each stood before.

    Queries are [A, W] of 0 or 1: which of the W different words each answer looks for. A token
    counts for an answer if it stands in a block without labels, before the answer.
    """

    def __init__(self, ids: Tensor, answers: Answers, block_size: int) -> None:
        device, count = ids.device, ids.numel()
        self._block_size, self._answers = block_size, len(answers)
        self._num_blocks = -(-count // block_size)
        words, self._word = torch.unique(ids, return_inverse=True)
        self._num_words = words.numel()
        places = torch.arange(count, device=device)
        # The place where the same word stood before; -count where it did not.
        order = self._word.argsort(stable=True)
        previous = torch.full_like(places, -count)
        same = self._word[order[1:]] == self._word[order[:-1]]
        previous[order[1:]] = torch.where(same, order[:-1], previous[order[1:]])
        self._since = places - previous
        self._new_in_block = self._since > places % block_size
        free = answers.free_blocks(block_size, torch.empty(self._num_blocks, device=device))
        firsts = torch.tensor(answers.firsts).to(device)
        before = places <= firsts[:, None]
        self._counts = before * free.repeat_interleave(block_size)[:count]

    def queries(self, rows: Sequence[int], answers: Sequence[int]) -> Tensor:
        """The words at some rows for some answers, pair by pair; rows behind the end are left out."""
        pairs = [pair for pair in zip(answers, rows) if pair[1] < self._word.numel()]
        index = torch.tensor(pairs).to(self._word.device)
        queries = torch.zeros(self._answers, self._num_words, device=self._word.device)
        queries[index[:, 0], self._word[index[:, 1]]] = 1.0
        return queries

    def queries_at(self, rows: Tensor) -> Tensor:
        """The words at rows [A, n] for each answer."""
        queries = torch.zeros(self._answers, self._num_words, device=self._word.device)
        return queries.scatter_(1, self._word[rows], 1.0)

    def shared(self, queries: Tensor) -> Tensor:
        """[A, B]: log(blocks / blocks that have it), summed over the words of the query in a block."""
        new = self._new_in_block.float()
        frequency = new.new_zeros(self._num_words).index_add_(0, self._word, new)
        weights = queries * (self._num_blocks / frequency).log()
        return self._blocks(weights[:, self._word] * (new * self._counts)).sum(-1)

    def closeness(self, queries: Tensor, window: int) -> Tensor:
        """[A, S]: log(tokens / tokens of that word), summed over the words of the query among the
        `window` tokens that end at each place."""
        ones = torch.ones_like(self._word, dtype=torch.float32)
        frequency = ones.new_zeros(self._num_words).index_add_(0, self._word, ones)
        weights = queries * (self._word.numel() / frequency).log()
        # A word counts once in a window.
        hits = weights[:, self._word] * ((self._since >= window) * self._counts)
        return avg_pool1d(pad(hits, (window - 1, 0))[:, None], window, stride=1)[:, 0] * window

    def block_maxima(self, values: Tensor) -> Tensor:
        """[A, B]: the largest of the values [A, S] of a block's tokens that count."""
        return self._blocks(values * self._counts).amax(-1)

    def _blocks(self, values: Tensor) -> Tensor:
        """[A, S] -> [A, B, block size], zeros behind the end."""
        missing = self._num_blocks * self._block_size - values.shape[-1]
        return pad(values, (0, missing)).unflatten(-1, (self._num_blocks, self._block_size))
