"""Cutting documents into windows of a fixed number of tokens, without tokenizing whole corpora.

A training window is a pure function of (documents, tokenizer, length, seed, index): a run that was
interrupted needs only its step to go on with the same data, and every process of a distributed run
can take its own indices.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from lemo.data.documents import Document
from lemo.data.vocabulary import Vocabulary

_log = logging.getLogger("lemo")

# Guess of how long a token is, in characters, for a text of which nothing is known.
_CHARACTERS_PER_TOKEN = 5
# Of a document the mean is known; most pieces of it are no longer than this share more.
_SPREAD = 0.15
# Tokens beyond the wanted ones: cutting a text in the middle of a word changes only the last ones.
_SPARE_TOKENS = 16
# A text is taken to be long enough when it has this many times the characters that a window needs,
# judged by this many tokens from its beginning.
_SURE_FACTOR, _SAMPLE_TOKENS = 4, 512
# The additive recurrence of the golden ratio: any prefix of it covers the corpus evenly.
_GOLDEN_RATIO = (5**0.5 - 1) / 2
# The same of the plastic number: from a place without a window to the next one to try.
_PLASTIC_NUMBER = 0.7548776662466927


class _Encoder:
    """Turns text into ids and knows the ids that the tokenizer puts in front (BOS or none)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)  # of `tokenizers`
        bare, full = self.encode("a"), tokenizer("a")["input_ids"]
        places = range(len(full) - len(bare) + 1)
        start = next((i for i in places if full[i : i + len(bare)] == bare), 0)
        self.prefix = list(full[:start])
        self._begin = getattr(tokenizer, "bos_token", None) or "" if self.prefix else ""

    def begun(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Documents without the begin that `prefix` puts in front, where texts have it already."""
        for document in documents:
            text = document.text.removeprefix(self._begin)
            yield document if text == document.text else replace(document, text=text)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without added tokens."""
        backend = self._backend
        if backend is not None and backend.truncation is None and backend.padding is None:
            # The same without offsets: three quarters of the time, and Python's lock is not held
            # while they are freed.
            return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        # verbose=False: a window longer than the model's original context is what lemo is for.
        return self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def head(
        self, text: str, count: int, characters_per_token: float = _CHARACTERS_PER_TOKEN
    ) -> tuple[list[int], float]:
        """The first ``count`` ids of ``text``, fewer where it ends; its characters a token.

        Pieces of text that turn out too small, by ``characters_per_token``, are half as long again.
        """
        size = int(count * characters_per_token)
        while True:
            piece = text[:size]
            ids = self.encode(piece)
            if size >= len(text) or len(ids) >= count + _SPARE_TOKENS:
                return ids[:count], len(piece) / max(len(ids), 1)
            size += size // 2 + 1

    def window(self, text: str, start: int, count: int, characters_per_token: float) -> list[int]:
        """``count`` ids from character ``start`` on, or the last ``count`` where fewer follow."""
        ids, _ = self.head(text[start:], count, characters_per_token * (1 + _SPREAD))
        back = max(int(count * characters_per_token / 8), 1)
        while len(ids) < count and start > 0:
            start = max(start - back, 0)
            ids = self.encode(text[start:])[-count:]
            back *= 2
        return ids


def _surely_short(text: str, count: int) -> bool:
    # Tokenizers make no more tokens than bytes (and a few): the shortest need no tokenizing.
    return len(text.encode()) + _SPARE_TOKENS < count


def _characters_per_token(text: str, encoder: _Encoder, count: int) -> float | None:
    """Mean length of a token of ``text`` in characters; None if it has fewer than ``count``."""
    if _surely_short(text, count):
        return None
    _, characters = encoder.head(text, min(count, _SAMPLE_TOKENS))
    # A text so long by its first tokens need not be tokenized as far as a window reaches.
    if len(text) >= _SURE_FACTOR * count * characters:
        return characters
    ids, characters = encoder.head(text, count)
    return characters if len(ids) == count else None


def _tensor(ids: list[int]) -> torch.Tensor:
    # torch.tensor keeps Python's lock seven times as long, and with it the thread that trains.
    return torch.frombuffer(array("q", ids), dtype=torch.int64)


def _none_found(short: int, length: int) -> ValueError:
    return ValueError(
        f"documents: expected at least one of {length} tokens or more, "
        f"but all {short} documents are shorter"
    )


def _check_length(length: int) -> None:
    if not isinstance(length, int) or length < 2:
        raise ValueError(f"length: expected an integer >= 2, got {length!r}")


def first_windows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    vocab_size: int | None = None,
) -> tuple[list[tuple[Document, torch.Tensor]], int]:
    """The first ``length`` tokens of each document that has as many.

    Args:
        documents: the texts.
        tokenizer: the model's tokenizer.
        length: tokens of a window.
        vocab_size: rows of the model's embedding; None: ids are not compared with it.

    Returns:
        Pairs of document and int64 ids [length], in the order of ``documents``; the number of
        documents that are shorter.

    Raises:
        ValueError: no document is long enough, or an id has no embedding.
    """
    _check_length(length)
    encoder = _Encoder(tokenizer)
    vocabulary = Vocabulary(tokenizer, encoder.prefix, vocab_size)
    count = length - len(encoder.prefix)
    found, short = [], 0
    for document in encoder.begun(documents):
        ids = [] if _surely_short(document.text, count) else encoder.head(document.text, count)[0]
        if len(ids) == count:
            vocabulary.check_ids(ids, document.id)
            found.append((document, _tensor(encoder.prefix + ids)))
        else:
            short += 1
    if not found:
        raise _none_found(short, length)
    return found, short


class TokenWindows:
    """An endless sequence of windows of ``length`` tokens from random places of the documents.

    Documents are drawn in proportion to their characters, places evenly within a document. A window
    starts between two words where there is space, and with the tokens that the tokenizer puts in
    front of a text. Documents shorter than a window are left out.

    Of a document that is long by its first tokens no more is tokenized before a window of it is
    asked for. Where it turns out to be too short then, which a warning says once, its windows are
    taken from other places instead, the same ones for the same index, in every process.

    Args:
        documents: the texts; kept in memory.
        tokenizer: the model's tokenizer.
        length: tokens of a window.
        seed: moves all places.
        vocab_size: rows of the model's embedding; None: ids are not compared with it.

    Attributes:
        length: tokens of a window.
        used: number of documents that are long enough, by their first tokens.
        too_short: number of documents left out.
        fingerprint: hexadecimal digest of the documents in use and of ``length``.

    Raises:
        ValueError: ``length`` is below 2, no document is long enough, or tokens have no embedding;
            the last two also from :meth:`window`, where only the tokens themselves show it.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int = 0,
        vocab_size: int | None = None,
    ):
        _check_length(length)
        self.length = length
        self._encoder = _Encoder(tokenizer)
        self._vocabulary = Vocabulary(tokenizer, self._encoder.prefix, vocab_size)
        # Numbers of the documents that proved to be too short.
        self._misjudged: set[int] = set()
        count = length - len(self._encoder.prefix)
        self._documents: list[Document] = []
        self._characters_per_token: list[float] = []
        self.too_short = 0
        for document in self._encoder.begun(documents):
            characters = _characters_per_token(document.text, self._encoder, count)
            if characters is None:
                self.too_short += 1
            else:
                self._vocabulary.check_text(document.text, document.id)
                self._documents.append(document)
                self._characters_per_token.append(characters)
        self.used = len(self._documents)
        if not self.used:
            raise _none_found(self.too_short, length)
        self._ends = list(itertools.accumulate(len(document.text) for document in self._documents))
        self._offset = random.Random(seed).random()
        digest = hashlib.sha256(str(length).encode())
        for document in self._documents:
            digest.update(hashlib.sha256(document.text.encode()).digest())
        self.fingerprint = digest.hexdigest()

    def window(self, index: int) -> torch.Tensor:
        """Window number ``index`` (from 0): int64 ids [length]."""
        place = (self._offset + index * _GOLDEN_RATIO) % 1.0
        ids = self._at(place)
        while ids is None:
            if len(self._misjudged) == self.used:
                raise _none_found(self.used + self.too_short, self.length)
            # What comes next does not depend on which documents are known to be too short.
            place = (place + _PLASTIC_NUMBER) % 1.0
            ids = self._at(place)
        return ids

    def _at(self, share: float) -> torch.Tensor | None:
        """The window at this share of all characters; None where its document has too few."""
        place = share * self._ends[-1]
        number = min(bisect.bisect_right(self._ends, place), self.used - 1)
        if number in self._misjudged:
            return None
        document = self._documents[number]
        text = document.text
        characters_per_token = self._characters_per_token[number]
        # The place in the document is stretched over the starts that leave room for a window.
        share = 1.0 - (self._ends[number] - place) / len(text)
        room = len(text) - int(self.length * characters_per_token)
        start = self._word_start(text, int(share * max(room, 0)))
        count = self.length - len(self._encoder.prefix)
        ids = self._encoder.window(text, start, count, characters_per_token)
        if len(ids) < count:
            self._leave_out(number, len(ids))
            return None
        self._vocabulary.check_ids(ids, document.id)
        return _tensor(self._encoder.prefix + ids)

    def _leave_out(self, number: int, tokens: int) -> None:
        if number not in self._misjudged:
            self._misjudged.add(number)
            _log.warning(
                "documents: '%s' has %d tokens, fewer than %d, although its beginning promised "
                "more; it is left out",
                self._documents[number].id,
                tokens,
                self.length,
            )

    def remarks(self) -> list[str]:
        """What a user should know of the documents, a line for each thing."""
        if not self.too_short:
            return []
        return [
            f"{self.too_short} of {self.too_short + self.used} documents are shorter than "
            f"{self.length} tokens and are left out"
        ]

    def batch(self, first: int, count: int) -> torch.Tensor:
        """Windows ``first`` to ``first + count - 1``: int64 ids [count, length]."""
        return torch.stack([self.window(index) for index in range(first, first + count)])

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(self.window, itertools.count())

    @staticmethod
    def _word_start(text: str, start: int) -> int:
        """The next white space within 200 characters; many tokenizers join it with its word."""
        if start == 0:
            return 0
        stop = min(start + 200, len(text))
        return next((i for i in range(start, stop) if text[i].isspace()), start)


def token_windows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int = 0,
    vocab_size: int | None = None,
) -> TokenWindows:
    """Deterministic windows of ``length`` token ids; see :class:`TokenWindows`."""
    return TokenWindows(documents, tokenizer, length, seed, vocab_size)
