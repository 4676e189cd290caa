"""Training data of either kind: windows of documents, or examples with labels on their answers."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lemo.data.chat import ChatEncoder, Encoded
from lemo.data.conversations import FORMS, Conversation, Prompted, parse_example
from lemo.data.documents import document_of
from lemo.data.examples import ExampleWindows
from lemo.data.rows import Row, read_rows
from lemo.data.vocabulary import Vocabulary
from lemo.data.windows import TokenWindows
from lemo.relevance.store import ScoreStore

__all__ = ["encode_examples", "open_training_data"]

# Between two lines that say how far it is.
_SECONDS = 10.0

_log = logging.getLogger("lemo")


def open_training_data(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int = 0,
    vocab_size: int | None = None,
    labels: str = "answers",
    scores: ScoreStore | None = None,
) -> TokenWindows | ExampleWindows:
    """Windows of the documents or examples in a file or folder; its first row says which.

    Args:
        path: see :data:`lemo.data.rows.SUPPORTED`.
        tokenizer: the model's tokenizer.
        length: tokens of a window.
        seed: of places in documents, or of the order of examples.
        vocab_size: rows of the model's embedding; None: ids are not compared with it.
        labels: "answers", or "all": every token of an example gets a label.
        scores: stored scores of the examples, which windows then have.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a row that cannot be used (the message names file and line); no window; scores
            for texts, or none of an example.
    """
    rows = read_rows(path)
    first = next(rows)
    rows = itertools.chain([first], rows)
    if parse_example(first) is None:
        if scores is not None:
            raise ValueError(
                "scores: expected conversations, or prompts with completions, whose scores are "
                f"stored, but '{path}' holds texts"
            )
        documents = map(document_of, rows)
        return TokenWindows(documents, tokenizer, length, seed, vocab_size)
    examples = encode_examples(rows, tokenizer, vocab_size, labels)
    return ExampleWindows(examples, length, seed, scores)


def encode_examples(
    rows: Iterator[Row],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None = None,
    labels: str = "answers",
) -> Iterator[Encoded]:
    """Ids and labels of the examples in rows; see `open_training_data`.

    Some hundred rows are read ahead. What takes long is logged.
    """
    encoder = ChatEncoder(tokenizer, everything=labels == "all")
    vocabulary = Vocabulary(tokenizer, [], vocab_size)
    tokens, last = 0, time.monotonic()
    for number, encoded in enumerate(encoder.encode_all(map(_example, rows)), start=1):
        vocabulary.check_ids(encoded.ids, encoded.name)
        tokens += len(encoded.ids)
        if time.monotonic() - last >= _SECONDS:
            _log.info("tokenizing: %s examples so far, %s tokens", f"{number:,}", f"{tokens:,}")
            last = time.monotonic()
        yield encoded


def _example(row: Row) -> Conversation | Prompted:
    example = parse_example(row)
    if example is None:
        raise ValueError(
            f"{row.place}: expected {FORMS.rpartition(', or')[0]}, as in the first row, got a text"
        )
    return example
