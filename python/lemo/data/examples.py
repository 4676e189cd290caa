"""Examples with labels on their answers, cut to a context and packed into windows."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from lemo.data.chat import Encoded
from lemo.data.reading import first_of
from lemo.models.calls.labels import IGNORE_INDEX
from lemo.relevance.answers import are_answers
from lemo.relevance.store import ScoreStore

__all__ = ["ExampleWindows", "Shortened", "Window", "of_copies", "remarks_of", "shorten"]

# Tokens at either end of a prompt that stay where its middle is cut: what it is about, and what is
# asked.
_KEPT_AT_ENDS = 64


@dataclass(frozen=True)
class Window:
    """What one sequence of examples gives the model.

    Attributes:
        ids: [T] int64.
        labels: [T] int64, not shifted; IGNORE_INDEX on the first token of each example.
        seqlens: tokens of each example.
        scores: [T] fp32 of the tokens, where scores are stored.
    """

    ids: Tensor
    labels: Tensor
    seqlens: tuple[int, ...]
    scores: Tensor | None = None

    @property
    def position_ids(self) -> Tensor:
        """[T] int64, which begin again with each example."""
        return torch.cat([torch.arange(length) for length in self.seqlens])

    @property
    def num_labels(self) -> int:
        """Labels that some token of the same example comes before."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True)
class Shortened:
    """An example that fits, and how many tokens of its prompts were cut."""

    example: Encoded
    cut: int


def shorten(example: Encoded, length: int) -> Shortened | None:
    """Cuts the middle of prompts until an example has at most `length` tokens.

    No label is lost. The longest run of tokens without a label is cut first, in its middle; its
    first and last 64 tokens stay as long as another run can be cut.

    Returns:
        None where its answers alone are too long.
    """
    excess = len(example.ids) - length
    if excess <= 0:
        return Shortened(example, 0)
    removed: list[tuple[int, int]] = []
    for spared in (2 * _KEPT_AT_ENDS, 0):
        runs = sorted(_unlabelled(example.labels, removed), key=lambda run: run[0] - run[1])
        for first, end in runs:
            count = min(excess, end - first - spared)
            if count <= 0:
                continue
            start = first + (end - first - count) // 2
            removed.append((start, start + count))
            excess -= count
            if excess == 0:
                return Shortened(_without(example, removed), len(example.ids) - length)
    return None


def _unlabelled(labels: Sequence[int], removed: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of tokens without a label, but for the first token and what is removed already."""
    inside = numpy.asarray(labels) == IGNORE_INDEX
    # The first token begins the text for the tokenizer and the model.
    inside[0] = False
    for start, end in removed:
        inside[start:end] = False
    borders = numpy.flatnonzero(numpy.diff(inside, prepend=False, append=False)).tolist()
    return list(zip(borders[::2], borders[1::2]))


def _without(example: Encoded, removed: list[tuple[int, int]]) -> Encoded:
    left = numpy.ones(len(example.ids), dtype=bool)
    for start, end in removed:
        left[start:end] = False
    ids, labels = (numpy.asarray(part)[left] for part in (example.ids, example.labels))
    return Encoded.of(ids, labels, example.name)


def remarks_of(
    used: int, length: int, shortened: int, cut_tokens: int, left_out: Sequence[str]
) -> list[str]:
    """What was done to examples so that they fit into `length` tokens, a line for each thing.

    Args:
        used: examples that are left.
        length: tokens of an example at most.
        shortened: examples whose prompts were cut.
        cut_tokens: tokens that this took away.
        left_out: names of the examples that are not used.
    """
    lines, total = [], used + len(left_out)
    if shortened:
        lines.append(
            f"the middle of the prompt is cut out of {shortened} of {total} examples, "
            f"{cut_tokens} tokens in all, so that they fit into {length}"
        )
    if left_out:
        lines.append(
            f"{len(left_out)} of {total} examples are left out, because their answers are too long "
            f"or none has a label: {first_of(left_out)}"
        )
    return lines


def of_copies(what: str, items: Iterable[Sequence[Sequence[int] | Tensor]]) -> list[str]:
    """A line where some items are copies of others, which count as often as they are there.

    Args:
        what: their name, in the plural.
        items: the numbers that make each of them, in one or more parts.
    """
    number, found = 0, set()
    for item in items:
        number += 1
        digest = hashlib.sha256()
        for part in item:
            digest.update(numpy.asarray(part, dtype=numpy.int64).tobytes())
        found.add(digest.digest())
    copies = number - len(found)
    return [f"{copies} of {number} {what} are copies of others"] if copies else []


class ExampleWindows:
    """An endless sequence of windows of at most `length` tokens, each of one or several examples.

    Examples are packed once, in a random order, each into the window that is open; where it does
    not fit another one is opened. The windows of every epoch come in an order of their own. So a
    window is a pure function of examples, length, seed and index.

    Args:
        examples: encoded ones; kept in memory.
        length: tokens of a window at most.
        seed: of both orders.
        scores: of the blocks of every example; None: no scores are wanted.

    Attributes:
        length: tokens of a window at most.
        examples: those in use, shortened, in the order of the file.
        shortened: examples whose prompts were cut.
        cut_tokens: tokens that this took away.
        left_out: names of examples whose answers alone exceed a window, or that have no label.
        fingerprint: hexadecimal digest of the examples in use and of `length`.

    Raises:
        ValueError: no example is left, or one has no stored scores.
    """

    def __init__(
        self,
        examples: Iterable[Encoded],
        length: int,
        seed: int = 0,
        scores: ScoreStore | None = None,
    ) -> None:
        self.length = length
        self.shortened = self.cut_tokens = 0
        self.left_out: list[str] = []
        fitting: list[Encoded] = []
        digest = hashlib.sha256(str(length).encode())
        for example in examples:
            made = shorten(example, length) if example.num_labels else None
            if made is None:
                self.left_out.append(example.name)
                continue
            self.shortened += made.cut > 0
            self.cut_tokens += made.cut
            fitting.append(made.example)
            for part in (made.example.ids, made.example.labels):
                digest.update(numpy.asarray(part, dtype=numpy.int64).tobytes())
        self.examples = fitting
        if not fitting:
            raise ValueError(
                f"documents: expected an example with answers of fewer than {length} tokens, but "
                f"all {len(self.left_out)} have longer ones or none"
            )
        self.fingerprint = digest.hexdigest()
        if scores is not None:
            scores.check(fitting)
        self._seed, self._scores = seed, scores
        self._windows = _packed(fitting, length, random.Random(seed))

    @property
    def packed(self) -> bool:
        """Whether some window has several examples."""
        return any(len(window) > 1 for window in self._windows)

    @property
    def has_answers(self) -> bool:
        """Whether answers alone have labels: on half of the tokens of all examples at most."""
        tokens = sum(len(each.ids) for each in self.examples)
        return bool(are_answers(sum(each.num_labels for each in self.examples), tokens))

    @property
    def with_answers(self) -> int:
        """Examples of which the same holds."""
        return sum(are_answers(each.num_labels, len(each.ids)) for each in self.examples)

    def remarks(self) -> list[str]:
        """What a user should know of the examples, a line for each thing."""
        used = len(self.examples)
        return [
            f"{used} examples in {len(self)} windows of at most {self.length} tokens",
            *remarks_of(used, self.length, self.shortened, self.cut_tokens, self.left_out),
            *of_copies("examples", ((each.ids, each.labels) for each in self.examples)),
        ]

    def __len__(self) -> int:
        """Windows of an epoch."""
        return len(self._windows)

    def window(self, index: int) -> Window:
        """Window number `index` (from 0)."""
        epoch, place = divmod(index, len(self._windows))
        chosen = self._windows[_shuffled(len(self._windows), f"{self._seed} {epoch}")[place]]
        seqlens = tuple(len(example.ids) for example in chosen)
        labels = _joined(example.labels for example in chosen)
        labels[[0, *itertools.accumulate(seqlens[:-1])]] = IGNORE_INDEX
        return Window(
            _joined(example.ids for example in chosen),
            labels,
            seqlens,
            None if self._scores is None else self._token_scores(self._scores, chosen, index),
        )

    def _token_scores(self, scores: ScoreStore, chosen: list[Encoded], index: int) -> Tensor:
        """[T]: each token has the score of its block; random ones where an example has none."""
        draw = random.Random(f"{self._seed} scores {index}")
        parts = []
        for example in chosen:
            tokens, size = len(example.ids), scores.block_size
            blocks = scores.of(example)
            if blocks is None:
                blocks = torch.tensor([draw.random() for _ in range(-(-tokens // size))])
            parts.append(blocks.repeat_interleave(min(size, tokens))[:tokens])
        return torch.cat(parts)


def _joined(parts: Iterable[Sequence[int]]) -> Tensor:
    """One int64 tensor of all."""
    return torch.from_numpy(numpy.concatenate([numpy.asarray(p, dtype=numpy.int64) for p in parts]))


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _packed(examples: list[Encoded], length: int, generator: random.Random) -> list[list[Encoded]]:
    order = list(examples)
    generator.shuffle(order)
    windows: list[list[Encoded]] = []
    room = 0
    for example in order:
        if len(example.ids) > room:
            windows.append([])
            room = length
        windows[-1].append(example)
        room -= len(example.ids)
    return windows
