"""What was understood of a file of training data, for people to look at."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lemo.data.chat import Encoded
from lemo.data.conversations import parse_example
from lemo.data.documents import document_of
from lemo.data.examples import ExampleWindows, of_copies
from lemo.data.rows import read_rows
from lemo.data.training_data import encode_examples
from lemo.data.vocabulary import Vocabulary
from lemo.models.calls.labels import IGNORE_INDEX

__all__ = ["Understood", "check_file"]


@dataclass(frozen=True)
class Understood:
    """What a file holds.

    Attributes:
        rows: names and values of a table.
        remarks: what a user should know, a line for each thing.
        name: of the example that is shown.
        pieces: the texts of that example, each with whether its tokens have labels.
    """

    rows: list[tuple[str, str]]
    remarks: list[str]
    name: str
    pieces: list[tuple[str, bool]]


def check_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    vocab_size: int | None = None,
    labels: str = "answers",
    shown: int = 0,
) -> Understood:
    """Reads all of a file, as fine-tuning does.

    Args:
        path: see :data:`lemo.data.rows.SUPPORTED`.
        tokenizer: the model's tokenizer.
        length: tokens of a training window.
        vocab_size: rows of the model's embedding; None: ids are not compared with it.
        labels: "answers" or "all".
        shown: number of the example to show, from 0.

    Raises:
        FileNotFoundError, ValueError: as :func:`lemo.data.training_data.open_training_data`, and
            where there is no example of this number.
    """
    rows = read_rows(path)
    first = next(rows)
    rows = itertools.chain([first], rows)
    if parse_example(first) is not None:
        encoded = list(encode_examples(rows, tokenizer, vocab_size, labels))
        kind, remarks = "conversations", ExampleWindows(encoded, length).remarks()
    else:
        kind, encoded = "documents", []
        vocabulary = Vocabulary(tokenizer, [], vocab_size)
        for document in map(document_of, rows):
            begun = tokenizer.bos_token and document.text.startswith(tokenizer.bos_token)
            ids = tokenizer(document.text, add_special_tokens=not begun, verbose=False)["input_ids"]
            vocabulary.check_ids(ids, document.id)
            encoded.append(Encoded.of(ids, ids, document.id))
        short = sum(len(each.ids) < length for each in encoded)
        remarks = [
            f"{short} of {len(encoded)} documents are shorter than {length} tokens",
            *of_copies("documents", ([each.ids] for each in encoded)),
        ]
    if not 0 <= shown < len(encoded):
        raise ValueError(f"example: expected a number from 0 to {len(encoded) - 1}, got {shown}")
    tokens = [len(each.ids) for each in encoded]
    labelled = [each.num_labels for each in encoded]
    table = [
        (kind, f"{len(encoded):,}"),
        ("tokens", f"{sum(tokens):,}"),
        ("tokens of one", _spread(tokens)),
        # Texts may all be empty.
        ("tokens with a label", f"{sum(labelled):,} ({sum(labelled) / max(sum(tokens), 1):.1%})"),
        ("labels of one", _spread(labelled)),
    ]
    example = encoded[shown]
    return Understood(table, remarks, example.name, _pieces(example, tokenizer))


def _spread(values: Sequence[int]) -> str:
    return f"{min(values):,} to {max(values):,}, median {statistics.median(values):,.0f}"


def _pieces(example: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    pairs = zip(example.ids, (label != IGNORE_INDEX for label in example.labels))
    return [
        (tokenizer.decode([token for token, _ in group]), labelled)
        for labelled, group in itertools.groupby(pairs, key=lambda pair: pair[1])
    ]
