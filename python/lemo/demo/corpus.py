"""Documents and a tokenizer for the demo: the Python sources of the running interpreter."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lemo.data import read_documents
from lemo.demo.facts import CHAT_TEMPLATE, practice
from lemo.files import write_file

# Packages that are not source code to read: tests, generated tables, what pip installed.
_LEFT_OUT = {"test", "tests", "encodings", "idlelib", "lib2to3", "site-packages", "dist-packages"}
END_OF_TEXT = "<|end|>"
# Characters of a source for each line of practice: enough for all words to become tokens.
_CHARACTERS_A_LINE = 40


def python_sources() -> Iterator[Path]:
    """The standard library's source files, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _LEFT_OUT & set(path.relative_to(root).parts):
            yield path


def write_corpus(
    folder: Path, held_out: int, held_out_characters: int, limit: int | None = None
) -> tuple[Path, Path]:
    """Write the sources as documents: what to train on, and what is held out from it.

    The held-out documents are spread evenly over the files that are long enough, so every run on
    one interpreter holds out the same ones.

    Args:
        folder: where ``train.jsonl`` and ``heldout.jsonl`` go.
        held_out: number of documents to hold out.
        held_out_characters: least size of a held-out document, so that it fills a window.
        limit: characters of all documents together, None for all of them.

    Returns:
        The two paths.

    Raises:
        FileNotFoundError: this Python has too few sources (an embedded or zipped library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents, total = [], 0
    for path in python_sources():
        text = path.read_text(encoding="utf-8", errors="replace")
        if limit is not None and total + len(text) > limit:
            continue
        documents.append((path.relative_to(root).as_posix(), text))
        total += len(text)
    long = [name for name, text in documents if len(text) >= held_out_characters]
    if len(long) < 2 * held_out:
        raise FileNotFoundError(
            f"demo: expected {2 * held_out} Python sources of {held_out_characters} characters in "
            f"'{root}', found {len(long)}; run it with a Python that has its standard library"
        )
    chosen = set(long[:: len(long) // held_out][:held_out])
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, wanted in zip(paths, (False, True), strict=True):
        lines = [
            json.dumps({"id": name, "kind": "python", "text": text}) + "\n"
            for name, text in documents
            if (name in chosen) == wanted
        ]
        write_file(path, "".join(lines))
    return paths


def train_tokenizer(documents: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocabulary`` entries, with a chat template.

    It is trained on the documents of a file, and on lines of facts and questions behind each, so
    that their words are tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = random.Random(0)

    def texts() -> Iterator[str]:
        for document in read_documents(documents):
            yield document.text
            yield practice(generator, len(document.text) // _CHARACTERS_A_LINE)

    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
