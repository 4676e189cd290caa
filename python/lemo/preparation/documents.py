"""From a model and documents to the folder of predictors: what `lemo prepare` runs."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch

from lemo.data.documents import Document, read_documents
from lemo.data.windows import first_windows, token_windows
from lemo.files import lock
from lemo.predictors.storage import check_output
from lemo.preparation.pipeline import Report, Window, prepare
from lemo.settings.preparation import PrepareConfig
from lemo.training.model import (
    extend_context,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)

__all__ = ["prepare_from_documents"]

# Share of the documents of each kind that is held out, where no other documents are given for it.
_HELD_OUT_SHARE = 0.1


def prepare_from_documents(
    config: PrepareConfig, report: Report = lambda stage, done, total, message: None
) -> dict[str, Any]:
    """Loads the model, cuts the documents into windows, trains predictors, writes the folder.

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
    # A link stays, the folder that it leads to is written.
    output = Path(os.path.realpath(config.output))
    with lock(output.with_name(f".{output.name}.lock"), f"output: '{config.output}'"):
        return _prepare(config, output, report)


def _prepare(config: PrepareConfig, output: Path, report: Report) -> dict[str, Any]:
    check_output(output, config.overwrite)
    device = pick_device(config.device, elimination=True)
    dtype = pick_dtype(config.dtype, device, elimination=True)
    model_config = load_config(config.model)
    extend_context(model_config, max(config.lengths), config.rope_scaling)
    tokenizer = load_tokenizer(config.model)
    vocab_size = model_config.vocab_size
    report("documents", 0, 1, "")
    training, held_out = _split(config, tokenizer, vocab_size)
    windows = [
        Window("training", ids)
        for length in config.lengths
        for ids in _cut(training, tokenizer, length, config.windows, config.seed, vocab_size)
    ]
    kinds = sorted({document.kind for document in held_out})
    tests = [
        Window(kind, ids)
        for length in config.lengths
        for kind in kinds
        for ids in _cut(
            [document for document in held_out if document.kind == kind],
            tokenizer,
            length,
            math.ceil(config.held_out_windows / len(kinds)),
            config.seed,
            vocab_size,
        )
    ]
    report("documents", 1, 1, f"{len(windows)} training windows, {len(tests)} held out")
    torch.manual_seed(config.seed)
    model = load_model(config.model, model_config, dtype).to(device)
    return prepare(model, windows, tests, output, config, config.overwrite, report)


def _split(
    config: PrepareConfig, tokenizer: Any, vocab_size: int
) -> tuple[list[Document], list[Document]]:
    """(documents to learn from, documents to test on), all long enough for the longest window."""
    length = max(config.lengths)

    def long_enough(documents: Any) -> list[Document]:
        found, _ = first_windows(documents, tokenizer, length, vocab_size)
        return [document for document, _ in found]

    documents = long_enough(read_documents(config.documents))
    if config.held_out_documents is not None:
        return documents, long_enough(read_documents(config.held_out_documents))
    if len(documents) == 1:
        [document] = documents
        cut = int(len(document.text) * (1 - 2 * _HELD_OUT_SHARE))
        parts = document.text[:cut], document.text[cut:]
        halves = [dataclasses.replace(document, text=part) for part in parts]
        try:
            return long_enough(halves[:1]), long_enough(halves[1:])
        except ValueError:
            raise ValueError(
                f"documents: expected two of {length} tokens or more, one to hold out, or a longer "
                "one, got one; give shorter --lengths or --held-out-documents"
            ) from None
    order = torch.randperm(
        len(documents), generator=torch.Generator("cpu").manual_seed(config.seed), device="cpu"
    ).tolist()
    held_out: set[int] = set()
    for kind in sorted({document.kind for document in documents}):
        of_kind = [index for index in order if documents[index].kind == kind]
        # A kind with a single document stays in the training.
        held_out.update(of_kind[: min(math.ceil(_HELD_OUT_SHARE * len(of_kind)), len(of_kind) - 1)])
    if not held_out:
        held_out = {order[0]}
    return (
        [document for index, document in enumerate(documents) if index not in held_out],
        [documents[index] for index in sorted(held_out)],
    )


def _cut(
    documents: list[Document],
    tokenizer: Any,
    length: int,
    count: int,
    seed: int,
    vocab_size: int,
) -> list[torch.Tensor]:
    return list(token_windows(documents, tokenizer, length, seed, vocab_size).batch(0, count))
