"""From documents to the windows that predictors learn from: what `lemo prepare` runs first."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from lemo.data import ExampleWindows, open_training_data
from lemo.data.documents import Document, read_documents
from lemo.data.reading import called
from lemo.data.windows import first_windows, token_windows
from lemo.files import locked_output
from lemo.models.calls.labels import IGNORE_INDEX, of_tokens
from lemo.models.layers.architectures import ARCHITECTURES
from lemo.predictors.model import model_shape
from lemo.preparation.output import check_output
from lemo.preparation.pipeline import prepare
from lemo.preparation.relevance import RelevanceWindow, prepare_relevance
from lemo.preparation.reports import Report
from lemo.preparation.windows import Window, check_length
from lemo.relevance.heads import RetrievalHeads
from lemo.settings.preparation import PrepareConfig
from lemo.training.model import (
    extend_context,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)

__all__ = ["prepare_from_documents", "prepare_from_examples"]

T = TypeVar("T")

_log = logging.getLogger("lemo")

# Share of the documents of each kind that is held out, where no other documents are given for it.
_HELD_OUT_SHARE = 0.1


def prepare_from_documents(
    config: PrepareConfig, report: Report = lambda stage, done, total, message: None
) -> dict[str, Any]:
    """Loads the model, cuts the documents into windows, and trains the predictors.

    Args:
        config: the settings.
        report: called as report(stage, done, total, message) for every unit of work.

    Returns:
        The contents of predictor.json.

    Raises:
        FileNotFoundError: the model or the documents do not exist.
        FileExistsError: `config.output` exists and `config.overwrite` is not set, or holds
            anything else than an earlier preparation.
        BlockingIOError: another process prepares `config.output`.
        ValueError: documents, model or settings do not fit.
        OSError: the disk is full or cannot be written.
    """
    with locked_output(config.output) as output:
        check_output(output, config.overwrite)
        check_length("lengths", min(config.lengths), config)
        device = pick_device(config.device, elimination=True)
        dtype = pick_dtype(config.dtype, device, elimination=True)
        model_config = load_config(config.model)
        extend_context(model_config, max(config.lengths), config.rope_scaling, "lengths")
        windows = _Windows(config, load_tokenizer(config.model), model_config.vocab_size)
        report("documents", 0, 1, "")
        training, held_out = windows.cut()
        report("documents", 1, 1, f"{len(training)} training windows, {len(held_out)} held out")
        torch.manual_seed(config.seed)
        model = load_model(config.model, model_config, dtype).to(device)
        return prepare(model, training, held_out, output, config, config.overwrite, report)


def prepare_from_examples(
    config: PrepareConfig, report: Report = lambda stage, done, total, message: None
) -> dict[str, Any]:
    """Loads the model and trains a predictor of what the answers of conversations need.

    Args, result and errors are those of `prepare_from_documents`; `config.target` is "relevance".
    """
    with locked_output(config.output) as output:
        check_output(output, config.overwrite)
        device = pick_device(config.device, elimination=True)
        dtype = pick_dtype(config.dtype, device, elimination=True)
        model_config = load_config(config.model, ARCHITECTURES)
        assert config.heads is not None
        heads = RetrievalHeads.load(config.heads, model_shape(model_config))
        extend_context(model_config, max(config.lengths), config.rope_scaling, "lengths")
        report("documents", 0, 1, "")
        training, held_out = _examples(config, model_config.get_text_config().vocab_size)
        report("documents", 1, 1, f"{len(training)} training windows, {len(held_out)} held out")
        model = load_model(config.model, model_config, dtype).to(device)
        return prepare_relevance(
            model, training, held_out, output, config, heads, config.overwrite, report
        )


def _examples(
    config: PrepareConfig, vocab_size: int
) -> tuple[list[RelevanceWindow], list[RelevanceWindow]]:
    """(examples to learn from, examples to test on) whose answers alone have labels."""
    tokenizer = load_tokenizer(config.model)

    def read(name: str, path: str) -> list[RelevanceWindow]:
        opened = open_training_data(path, tokenizer, max(config.lengths), vocab_size=vocab_size)
        if not isinstance(opened, ExampleWindows):
            raise ValueError(
                f"{name}: expected conversations, or prompts with completions, because target "
                f"'relevance' learns from answers, but '{path}' holds texts"
            )
        for line in opened.remarks():
            _log.info("%s: %s", name, line)
        return [
            RelevanceWindow(
                "examples",
                torch.tensor(list(each.ids)),
                of_tokens(torch.tensor(each.labels) != IGNORE_INDEX),
            )
            for each in opened.examples
        ]

    found = _shuffled(read("documents", config.documents), config.seed)
    if config.held_out_documents is not None:
        with called("held_out_documents", "documents"):
            held_out = read("held_out_documents", config.held_out_documents)
    else:
        # Copies of an example are one.
        different = list({_content(each): each for each in reversed(found)}.values())[::-1]
        if len(different) < 2:
            raise ValueError(
                "documents: expected two different examples or more, one to hold out, got one"
            )
        count = math.ceil(_HELD_OUT_SHARE * len(different))
        held_out = different[: min(count, config.held_out_windows)]
    held_out = held_out[: config.held_out_windows]
    return _others(found, held_out, _content)[: config.windows], held_out


def _content(window: RelevanceWindow) -> bytes:
    """What examples that are copies of each other have in common."""
    return torch.stack((window.ids, window.labelled.long())).numpy().tobytes()


def _others(training: list[T], held_out: list[T], content: Callable[[T], Any]) -> list[T]:
    """The windows or documents to train on without copies of those that are held out.

    Raises:
        ValueError: nothing is left to train on.
    """
    tested = {content(each) for each in held_out}
    others = [each for each in training if content(each) not in tested]
    if not others:
        raise ValueError(
            "held_out_documents: expected others than those to train on, got copies of all of them"
        )
    if len(others) < len(training):
        copies = len(training) - len(others)
        _log.info("documents: %d left out of the training, since they are held out", copies)
    return others


def _shuffled(items: list[T], seed: int) -> list[T]:
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(items), generator=generator, device="cpu").tolist()
    return [items[index] for index in order]


class _Windows:
    """Cuts the documents of a preparation into windows."""

    def __init__(
        self, config: PrepareConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def cut(self) -> tuple[list[Window], list[Window]]:
        """(windows to train on, windows to test on), of each length.

        Those to test on come from all kinds of documents alike.
        """
        config = self._config
        training, held_out = self._split()
        kinds = sorted({document.kind for document in held_out})
        of_kind = {
            kind: [document for document in held_out if document.kind == kind] for kind in kinds
        }
        count = math.ceil(config.held_out_windows / len(kinds))
        return (
            [
                Window("training", ids)
                for length in config.lengths
                for ids in self._windows(training, length, config.windows)
            ],
            [
                Window(kind, ids)
                for length in config.lengths
                for kind in kinds
                for ids in self._windows(of_kind[kind], length, count)
            ],
        )

    def _windows(self, documents: list[Document], length: int, count: int) -> list[torch.Tensor]:
        seed, vocab_size = self._config.seed, self._vocab_size
        windows = token_windows(documents, self._tokenizer, length, seed, vocab_size)
        return list(windows.batch(0, count))

    def _split(self) -> tuple[list[Document], list[Document]]:
        """(documents to train on, documents to test on), long enough for the longest window."""
        config = self._config
        documents = self._long_enough(read_documents(config.documents))
        if config.held_out_documents is not None:
            with called("held_out_documents", "documents"):
                held_out = self._long_enough(read_documents(config.held_out_documents))
        else:
            # Copies of a document are one.
            different = list({each.text: each for each in reversed(documents)}.values())[::-1]
            if len(different) == 1:
                return self._split_one(different[0])
            held_out = _hold_out(different, config.seed)
        return _others(documents, held_out, lambda document: document.text), held_out

    def _split_one(self, document: Document) -> tuple[list[Document], list[Document]]:
        """Beginning and end of the only document."""
        cut = int(len(document.text) * (1 - 2 * _HELD_OUT_SHARE))
        parts = document.text[:cut], document.text[cut:]
        first, last = (dataclasses.replace(document, text=part) for part in parts)
        try:
            return self._long_enough([first]), self._long_enough([last])
        except ValueError:
            raise ValueError(
                f"documents: expected two of {max(self._config.lengths)} tokens or more, one to "
                "hold out, or a longer one, got one; give shorter --lengths or --held-out-documents"
            ) from None

    def _long_enough(self, documents: Iterable[Document]) -> list[Document]:
        length = max(self._config.lengths)
        found, _ = first_windows(documents, self._tokenizer, length, self._vocab_size)
        return [document for document, _ in found]


def _hold_out(documents: list[Document], seed: int) -> list[Document]:
    """A random share of different documents of each kind, and one document at least.

    Args:
        documents: no two of the same text.
        seed: of the order in which they are taken.
    """
    shuffled = _shuffled(documents, seed)
    held_out: set[str] = set()
    for kind in sorted({document.kind for document in documents}):
        of_kind = [document.text for document in shuffled if document.kind == kind]
        # A kind with a single document stays in the training.
        count = min(math.ceil(_HELD_OUT_SHARE * len(of_kind)), len(of_kind) - 1)
        held_out.update(of_kind[:count])
    if not held_out:
        held_out = {shuffled[0].text}
    return [document for document in documents if document.text in held_out]
