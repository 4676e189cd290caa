"""Finds the heads of a model that look at what an answer is copied from (`lemo relevance heads`).

Facts are planted in text and asked for behind it. A head retrieves if the rows that predict an
answer look most at the block of its fact.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lemo.data.documents import Document, read_documents
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.layers.architectures import Architecture, architecture_of
from lemo.models.layers.scout import Scout
from lemo.predictors.model import model_description
from lemo.preparation.reports import CountReport
from lemo.relevance.answers import Answers
from lemo.relevance.attention import head_relevance
from lemo.relevance.heads import RetrievalHeads
from lemo.relevance.needles import NeedleWindow, needle_window
from lemo.settings.relevance import HeadsConfig
from lemo.training.model import (
    extend_context,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)

__all__ = ["chosen_heads", "find_heads", "find_heads_in_documents", "needle_windows"]

# Of what the best head of all layers finds, the best of the first layers has to find this share: a
# layer more is a layer more in every scoring pass.
_ENOUGH = 0.95
# Of what the best chosen head finds, others have to find this share: the mean over weak ones finds
# less than the best one alone (docs/LOG.md, 2026-11-30).
_WEAKEST = 0.5

# Characters of a document's beginning that are not used: title pages, tables of contents.
_SKIPPED = 4000
# Characters that are tokenized for a token that is needed.
_CHARACTERS_PER_TOKEN = 8


def find_heads_in_documents(
    config: HeadsConfig, report: CountReport = lambda done, total: None
) -> RetrievalHeads:
    """Loads the model, plants facts in the documents, and writes the heads that find them.

    Args:
        config: the settings.
        report: called as report(done, total) after every window.

    Raises:
        FileNotFoundError: the model or the documents do not exist.
        FileExistsError: `config.output` exists and `config.overwrite` is not set.
        ValueError: documents, model or settings do not fit.
        OSError: the file cannot be written.
    """
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise FileExistsError(
            f"output: '{output}' exists already; choose another file, or give --overwrite"
        )
    device = pick_device(config.device, elimination=True)
    model_config = load_config(config.model)
    layers = model_config.get_text_config().num_hidden_layers
    if config.layers is not None and config.layers > layers:
        raise ValueError(f"layers: expected at most the model's {layers}, got {config.layers}")
    extend_context(model_config, config.context_length, config.rope_scaling)
    tokenizer = load_tokenizer(config.model)
    windows = needle_windows(
        read_documents(config.documents),
        tokenizer,
        config.context_length,
        config.windows,
        config.seed,
    )
    dtype = pick_dtype(config.dtype, device, elimination=True)
    model = load_model(config.model, model_config, dtype).to(device)
    heads = find_heads(model, windows, config.block_size, config.count, config.layers, report)
    heads.save(output)
    return heads


def needle_windows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int = 0,
) -> list[NeedleWindow]:
    """Windows with facts, each in a document of its own as far as there are so many.

    Args:
        documents: their beginnings are not used.
        tokenizer: of the model.
        length: tokens of a window.
        count: how many windows.
        seed: of facts and places.

    Raises:
        ValueError: no document is long enough.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    texts: list[list[int]] = []
    for document in documents:
        text = document.text[_SKIPPED:] or document.text
        ids = encode(text[: _CHARACTERS_PER_TOKEN * length])
        if len(ids) >= length:
            texts.append(ids)
        if len(texts) == count:
            break
    if not texts:
        raise ValueError(
            f"documents: expected one of {length} tokens or more behind its first {_SKIPPED} "
            "characters, got none"
        )
    draw = random.Random(seed)
    return [needle_window(texts[i % len(texts)], length, encode, draw) for i in range(count)]


@torch.no_grad()
def find_heads(
    model: nn.Module,
    windows: Sequence[NeedleWindow],
    block_size: int = 128,
    count: int = 4,
    layers: int | None = None,
    report: CountReport = lambda done, total: None,
) -> RetrievalHeads:
    """The heads that look most at the facts which answers need.

    A head is as good as the mean, over all answers, of the share of its looks that falls on the
    blocks of the fact (`lemo.relevance.attention.head_relevance`). The best heads are chosen, but
    none that is less than half as good as the best one.

    Args:
        model: a supported causal LM, possibly wrapped.
        windows: with facts.
        block_size: tokens of a block.
        count: how many heads are chosen at most.
        layers: only the first so many layers are looked at; None: the fewest whose best head
            reaches 0.95 of the best one of all layers.
        report: called as report(done, total) after every window.

    Raises:
        TypeError: an unsupported model.
        ValueError: what a head looks at is nan.
    """
    architecture = architecture_of(model)
    architecture.check_parts()
    depth = architecture.num_layers if layers is None else layers
    total = torch.zeros(())
    for done, window in enumerate(windows):
        total = total + _found(architecture, window, block_size, depth)
        report(done + 1, len(windows))
    mean = total / len(windows)
    if not bool(mean.isfinite().all()):
        raise ValueError(
            "model: what its heads look at is not finite; expected activations that are finite in "
            "the dtype"
        )
    heads = chosen_heads(mean, count, layers)
    found_by = {
        "windows": len(windows),
        "tokens": windows[0].ids.numel(),
        "block_size": block_size,
        "share_of_looks": {
            f"{layer}.{head}": round(mean[layer, head].item(), 4) for layer, head in heads
        },
    }
    description = model_description(architecture.config, architecture.embedding)
    return RetrievalHeads(description, heads, found_by)


def chosen_heads(
    mean: Tensor, count: int, layers: int | None = None
) -> tuple[tuple[int, int], ...]:
    """(layer, head) pairs, ascending.

    Args:
        mean: [layers, heads], how good each head is.
        count: how many are chosen at most.
        layers: as `find_heads` has it.
    """
    best = mean.amax(1).cummax(0).values  # of the layers up to each
    if layers is None:
        layers = int((best < _ENOUGH * best[-1]).sum()) + 1
    found = mean[:layers].flatten()
    order = found.argsort(descending=True, stable=True)[:count].tolist()
    good = [index for index in order if found[index] >= _WEAKEST * best[layers - 1]]
    return tuple(sorted(divmod(index, mean.shape[1]) for index in good))


def _found(architecture: Architecture, window: NeedleWindow, block_size: int, depth: int) -> Tensor:
    """[depth, Hq] on the CPU: the mean share of each head's looks at the needed blocks."""
    device = next(architecture.causal_lm.parameters()).device
    arguments = ForwardArguments(input_ids=window.ids[None].to(device))
    batch, residual = architecture.embed(arguments, block_size)
    answers = Answers.of(window.labelled)
    assert answers is not None
    needed = torch.zeros(len(answers), 1, batch.layout.num_blocks, device=device)
    for answer, (first, end) in enumerate(window.needed):
        needed[answer, 0, first // block_size : (end - 1) // block_size + 1] = 1.0
    shares = []
    for index, q, k in Scout(architecture)(batch, residual, 0, range(depth)):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        [relevance] = head_relevance(q, keys, batch.layout, [answers], architecture.scale(index))
        assert relevance is not None
        shares.append((relevance * needed).sum(-1).mean(0))
    return torch.stack(shares).cpu()
