"""Scores the blocks of a data set's examples once, for all epochs (`lemo relevance scores`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lemo.data import ExampleWindows, open_training_data
from lemo.data.reading import called
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.labels import IGNORE_INDEX, of_tokens
from lemo.models.layers.architectures import ARCHITECTURES, architecture_of
from lemo.models.layers.batch import Batch
from lemo.models.layers.scout import Scout
from lemo.packing.batch import PackedBatch
from lemo.preparation.reports import CountReport
from lemo.relevance.answers import Answers
from lemo.relevance.store import Example, check_output, write_scores
from lemo.selection.scorers import AttentionScorer, LexicalScorer
from lemo.settings.relevance import ScoresConfig
from lemo.training import fingerprint
from lemo.training.model import (
    extend_context,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)

__all__ = ["score_examples"]

# Gives an example's scores [blocks], or None where it has no answers.
Score = Callable[[Example], Tensor | None]

_log = logging.getLogger("lemo")


def score_examples(
    config: ScoresConfig, report: CountReport = lambda done, total: None
) -> ExampleWindows:
    """Reads the examples as `lemo finetune` does, scores their blocks, and writes the scores.

    Args:
        config: the settings.
        report: called as report(done, total) after every example.

    Returns:
        The examples.

    Raises:
        FileNotFoundError: model, documents or heads do not exist; nothing to resume.
        FileExistsError: `config.output` exists and neither resume nor overwrite is set.
        BlockingIOError: another process writes to `config.output`.
        ValueError: documents, model, heads and settings do not fit; the documents are texts; what
            is resumed was made with other settings.
        OSError: the disk is full or cannot be written.
    """
    # Before anything takes time; write_scores looks again when it holds the lock.
    check_output(Path(config.output), config.resume, config.overwrite)
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.model)
    sizes = [model_config.get_text_config().vocab_size]
    about = {
        "scorer": config.scorer,
        "context_length": config.context_length,
        "labels": "answers",
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
    }
    if config.scorer == "attention":
        score, vocab_size, more = _by_attention(config, tokenizer)
        sizes.append(vocab_size)
        about |= more
    else:
        score = _by_words(config)
    windows = open_training_data(
        config.documents, tokenizer, config.context_length, vocab_size=min(sizes)
    )
    if not isinstance(windows, ExampleWindows):
        raise ValueError(
            "documents: expected conversations, or prompts with completions, whose answers have "
            f"labels, but '{config.documents}' holds texts"
        )
    for line in windows.remarks():
        _log.info("%s", line)
    without = sum(_answers(example) is None for example in windows.examples)
    if without:
        _log.warning(
            "documents: %d of %d examples have labels on more than half of their tokens; they get "
            "no scores, and what is kept of them is drawn at random in every epoch",
            without,
            len(windows.examples),
        )
    write_scores(
        config.output,
        windows.examples,
        score,
        block_size=config.block_size,
        about=about,
        resume=config.resume,
        overwrite=config.overwrite,
        report=report,
    )
    return windows


def _by_words(config: ScoresConfig) -> Score:
    scorer = LexicalScorer(seed=0)

    def score(example: Example) -> Tensor | None:
        ids = torch.tensor([list(example.ids)])
        packed = PackedBatch((1, ids.shape[1]), None, None, ids.device)
        batch = Batch.of(packed, config.block_size, ids.device)
        # It reads no residual.
        [relevance] = scorer.relevance(0, torch.empty(0), batch, [ids[0]], [_answers(example)])
        return None if relevance is None else relevance.amax(0)

    return score


def _by_attention(
    config: ScoresConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Score, int, dict[str, Any]]:
    """How an example is scored, rows of the model's embedding, and what decides the scores."""
    assert config.heads is not None
    name = config.scout or config.model
    device = pick_device(config.device, elimination=True)
    dtype = pick_dtype(config.dtype, device, elimination=True)
    with called("scout" if config.scout else "model", "model"):
        model_config = load_config(name, ARCHITECTURES)
        extend_context(model_config, config.context_length, config.rope_scaling)
        digest = fingerprint.of_tokenizer(tokenizer)
        if config.scout is not None:
            _check_scout(config.scout, digest)
        weights = load_model(name, model_config, dtype)
    about = {
        "scorer's config.json": fingerprint.of_config(name),
        "scorer's weights": fingerprint.of_weights(weights),
        "heads": fingerprint.of_heads(config.heads, model_config),
        "rope_scaling": config.rope_scaling,
        "dtype": str(dtype).removeprefix("torch."),
    }
    model = weights.to(device).eval()
    architecture = architecture_of(model)
    architecture.check_supported()
    scorer = AttentionScorer.from_file(config.heads, architecture, Scout(architecture), seed=0)

    @torch.no_grad()
    def score(example: Example) -> Tensor | None:
        ids = torch.tensor([list(example.ids)])
        arguments = ForwardArguments(input_ids=ids.to(device))
        batch, residual = architecture.embed(arguments, config.block_size)
        [relevance] = scorer.relevance(0, residual, batch, [ids[0]], [_answers(example)])
        return None if relevance is None else relevance.amax(0).cpu()

    return score, model_config.get_text_config().vocab_size, about


def _check_scout(scout: str, tokenizer: str) -> None:
    if fingerprint.of_tokenizer(load_tokenizer(scout)) != tokenizer:
        raise ValueError(
            f"scout: expected a model with the tokenizer of the model that is trained, but that of "
            f"'{scout}' is another one"
        )


def _answers(example: Example) -> Answers | None:
    return Answers.of(of_tokens(torch.tensor(list(example.labels)) != IGNORE_INDEX))
