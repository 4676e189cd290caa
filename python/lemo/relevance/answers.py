"""Answers of a sequence: runs of tokens with labels, and where they stand."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lemo.packing.to_device import to_device

Number = TypeVar("Number", int, Tensor)

__all__ = ["Answers", "are_answers", "shares"]

# Where more rows than this share have labels, the sequence is text, not a prompt with answers.
_MOST_LABELLED = 0.5

# Tokens of an answer at most. A longer run of labels is cut: its parts need different blocks.
_LONGEST = 64


def are_answers(labelled: Number, tokens: Number) -> Number:
    """Whether labels on so many of the tokens are on answers alone: on half of them at most.

    Numbers, or tensors of them.
    """
    return (labelled > 0) & (labelled <= _MOST_LABELLED * tokens)


@dataclass(frozen=True)
class Answers:
    """The A answers of one sequence of S tokens.

    An answer is a run of tokens with labels; a run of more than 64 tokens counts as several.

    Attributes:
        firsts: for each answer the row that predicts its first token, ascending.
        ends: one more than the row that predicts its last token.
    """

    firsts: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, labelled: Tensor) -> "Answers | None":
        """The answers of a sequence; None: it has no labels, or they are on more than half of it.

        Args:
            labelled: [S] bool, rows that predict a label. Best on the CPU: it is read there.
        """
        rows = labelled.cpu()
        if not are_answers(int(rows.sum()), rows.numel()):
            return None
        edges = pad(rows.int(), (1, 1)).diff()
        firsts: list[int] = []
        ends: list[int] = []
        runs = zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist())
        for start, end in runs:
            firsts += range(start, end, _LONGEST)
            ends += [min(first + _LONGEST, end) for first in range(start, end, _LONGEST)]
        return cls(tuple(firsts), tuple(ends))

    def __len__(self) -> int:
        """A, the number of answers."""
        return len(self.firsts)

    def rows(self) -> list[int]:
        """The rows that predict tokens of answers, answer after answer."""
        return [row for first, end in zip(self.firsts, self.ends) for row in range(first, end)]

    def of_rows(self) -> list[int]:
        """For each of `rows` the index of its answer."""
        spans = zip(self.firsts, self.ends)
        return [answer for answer, (first, end) in enumerate(spans) for _ in range(first, end)]

    def largest(self, values: Tensor) -> Tensor:
        """[A, ...]: the largest over an answer's rows of the values [R, ...] of `rows`."""
        index = to_device(torch.tensor(self.of_rows(), device="cpu"), values.device)
        index = index.reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
        largest = values.new_full((len(self), *values.shape[1:]), -torch.inf)
        return largest.scatter_reduce_(0, index, values, "amax")

    def free_blocks(self, block_size: int, like: Tensor) -> Tensor:
        """[B] of 0 or 1 in dtype and on the device of `like`, its last dimension: blocks of the
        sequence without labels."""
        free = torch.ones(like.shape[-1], dtype=like.dtype, device="cpu")
        free[[row // block_size for row in self.rows()]] = 0.0
        return to_device(free, like.device)

    def open_blocks(self, block_size: int, like: Tensor) -> Tensor:
        """[A, B] bool on the device of `like`, whose last dimension is B: the blocks without labels
        before each answer."""
        blocks = torch.arange(like.shape[-1])
        with_labels = torch.tensor(self.rows()) // block_size
        free = torch.ones_like(blocks, dtype=torch.bool).index_fill(0, with_labels, False)
        before = blocks < torch.tensor(self.firsts)[:, None] // block_size
        return to_device(before & free, like.device)


def shares(scores: Tensor) -> Tensor:
    """Scores [..., B] divided by their sum over the blocks; zeros stay."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
