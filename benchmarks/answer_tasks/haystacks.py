"""Haystacks: tokens of real documents, and sentences of theirs that can be asked for."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lemo.data import Document, read_documents

__all__ = ["Haystack", "Haystacks", "load_haystacks", "make_haystacks"]

# Title pages and tables of contents.
_SKIPPED_CHARACTERS = 4000
# Texts are tokenized in pieces, several at a time.
_PIECE_CHARACTERS = 50_000
# Of sentences that are asked for.
_SHORTEST, _LONGEST = 32, 80
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“‘])")


@dataclass(frozen=True)
class Haystack:
    """One document.

    Attributes:
        ids: int32 [tokens].
        sentences: int64 [sentences, 2], first token and the one behind the last; in order.
        rarity: float32 [sentences], mean surprise of a sentence's tokens, in nats, by how often
            they occur in all documents.
    """

    ids: np.ndarray
    sentences: np.ndarray
    rarity: np.ndarray


class Haystacks:
    """Documents that windows are cut from.

    Args:
        documents: at least one.
    """

    def __init__(self, documents: Sequence[Haystack]) -> None:
        if not documents:
            raise ValueError("documents: expected at least one, got none")
        self.documents = list(documents)
        self._lengths = np.array([len(document.ids) for document in documents])

    def cut(self, generator: random.Random, tokens: int) -> tuple[Haystack, int]:
        """A document that is long enough, and where in it a text of so many tokens begins.

        Raises:
            ValueError: no document has so many tokens.
        """
        enough = np.flatnonzero(self._lengths >= tokens)
        if not len(enough):
            raise ValueError(
                f"documents: expected one of at least {tokens} tokens, got {self._lengths.max()} "
                "in the longest"
            )
        document = self.documents[generator.choice(enough.tolist())]
        return document, generator.randrange(len(document.ids) - tokens + 1)


def load_haystacks(
    path: Path, tokenizer: PreTrainedTokenizerBase, characters: int, cache: Path | None = None
) -> Haystacks:
    """The documents of a file, tokenized.

    Args:
        path: what `lemo.data.read_documents` reads.
        tokenizer: the model's.
        characters: of each document, at most.
        cache: folder that keeps the tokens of a file for the next time; None: they are not kept.
    """
    if cache is None or path.is_dir():
        return make_haystacks(read_documents(path), tokenizer, characters)
    key = hashlib.sha256(path.read_bytes())
    key.update(repr((sorted(tokenizer.get_vocab().items()), characters)).encode())
    kept = cache / f"haystacks-{key.hexdigest()[:16]}.npz"
    if not kept.exists():
        made = make_haystacks(read_documents(path), tokenizer, characters)
        cache.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"{name}_{i}": getattr(document, name)
            for i, document in enumerate(made.documents)
            for name in Haystack.__dataclass_fields__
        }
        unfinished = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(unfinished, **arrays)
        unfinished.rename(kept)
        return made
    with np.load(kept) as arrays:
        count = len(arrays.files) // len(Haystack.__dataclass_fields__)
        return Haystacks(
            [
                Haystack(*(arrays[f"{name}_{i}"] for name in Haystack.__dataclass_fields__))
                for i in range(count)
            ]
        )


def make_haystacks(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, characters: int
) -> Haystacks:
    """Tokenizes the first `characters` of each document, behind its title page."""
    found = []
    for document in documents:
        start = min(_SKIPPED_CHARACTERS, len(document.text) // 4)
        found.append(_tokenized(document.text[start : start + characters], tokenizer))
    size = 1 + max((int(ids.max()) for ids, _ in found if len(ids)), default=0)
    counts = sum((np.bincount(ids, minlength=size) for ids, _ in found), np.ones(size))
    surprise = -np.log(counts / counts.sum())
    return Haystacks(
        [Haystack(ids, spans, _means(surprise[ids], spans)) for ids, spans in found if len(ids)]
    )


def _tokenized(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens of a text, and [first, end) of the sentences that can be asked for."""
    pieces = [text[i : i + _PIECE_CHARACTERS] for i in range(0, len(text), _PIECE_CHARACTERS)]
    if not pieces:
        return np.zeros(0, np.int32), np.zeros((0, 2), np.int64)
    encoded = tokenizer(
        pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids, spans, before = [], [], 0
    for piece, tokens, offsets in zip(pieces, encoded["input_ids"], encoded["offset_mapping"]):
        starts = np.array([start for start, _ in offsets], dtype=np.int64)
        cuts = [match.end() for match in _SENTENCE.finditer(piece)]
        # A token that begins with the space before a sentence belongs to the sentence.
        places = np.searchsorted(starts, np.array(cuts, dtype=np.int64), side="right") - 1
        pairs = np.stack((places[:-1], places[1:]), 1) if len(cuts) > 1 else np.zeros((0, 2), int)
        lengths = pairs[:, 1] - pairs[:, 0]
        spans.append(before + pairs[(lengths >= _SHORTEST) & (lengths <= _LONGEST)])
        ids.append(np.array(tokens, dtype=np.int32))
        before += len(tokens)
    return np.concatenate(ids), np.concatenate(spans)


def _means(values: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """float32 mean of the values in each span."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    lengths = np.maximum(spans[:, 1] - spans[:, 0], 1)
    return ((sums[spans[:, 1]] - sums[spans[:, 0]]) / lengths).astype(np.float32)
