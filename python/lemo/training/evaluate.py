"""Perplexity of a dense model on the first tokens of documents."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lemo.data import Document, first_windows, read_documents
from lemo.data.examples import of_copies
from lemo.models.calls.eval_mode import evaluating
from lemo.models.layers.architectures import ARCHITECTURES
from lemo.models.layers.loss import loss_chunk_rows
from lemo.settings.base import MOST
from lemo.training import quantised
from lemo.training.adapter import find_adapter, load_adapter, trained_config
from lemo.training.model import (
    extend_context,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    reach,
)

__all__ = [
    "check_context",
    "check_sizes",
    "evaluate",
    "load_for_evaluation",
    "logits_of_rows",
    "vocabulary_of",
    "window_losses",
]

_log = logging.getLogger("lemo")


def check_sizes(lengths: Sequence[int], limit: int | None) -> None:
    """Raises ValueError unless there are lengths, and each and the limit are in range."""
    if not lengths:
        raise ValueError("lengths: expected at least one, got none")
    for name, value, least in (*(("lengths", each, 2) for each in lengths), ("limit", limit, 1)):
        if value is not None and not (isinstance(value, int) and least <= value <= MOST):
            raise ValueError(f"{name}: expected an integer in [{least}, {MOST}], got {value!r}")


def evaluate(
    model: str | Path | PreTrainedModel | PeftModel,
    documents: str | Path | Iterable[Document],
    lengths: Sequence[int],
    adapter: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rope_scaling: str = "none",
    dtype: str = "auto",
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Perplexity, without elimination, of the first ``length`` tokens of each document.

    Args:
        model: folder or hub name, or a model (then `adapter`, `rope_scaling`, `dtype` and `device`
            do not apply, and elimination does not act because the model is put in eval mode).
        documents: a path (see :func:`lemo.data.read_documents`) or the documents themselves.
        lengths: window lengths in tokens; shorter documents are left out.
        adapter: a PEFT adapter, or the folder of a run that has one; the context extension that
            it was trained with is applied.
        tokenizer: the model's tokenizer; needed with a model object.
        rope_scaling: how a bare `model` is extended where a length exceeds its context.
        dtype: of weights and products; see :class:`lemo.settings.finetune.FinetuneConfig`.
        limit: at most this many documents of each kind, the first ones that are long enough.
        progress: called with (windows done, windows in all).
        device: "cpu", "cuda", or "auto": a CUDA GPU where there is one.

    Returns:
        For every length and kind of document {"kind", "length", "documents" (number of windows),
        "perplexity", "tail_perplexity" (of the last quarter of the window)}.

    Raises:
        ValueError, FileNotFoundError: what was given cannot be read or does not fit together, or
            no document is long enough; the message names it.
        FloatingPointError: a loss is not a number.
    """
    lengths = list(lengths)
    check_sizes(lengths, limit)
    if isinstance(documents, str | Path):
        documents = read_documents(documents)
    tokenizer, vocab_size = vocabulary_of(model, tokenizer)
    # Before the model is loaded, which takes longer.
    groups, total = _windows(documents, tokenizer, lengths, limit, vocab_size)
    if isinstance(model, str | Path):
        model = load_for_evaluation(
            str(model),
            max(lengths),
            adapter=adapter,
            rope_scaling=rope_scaling,
            dtype=dtype,
            device=device,
        )
    check_context(model, max(groups))
    results, done = [], 0
    with evaluating(model):
        for length, kinds in groups.items():
            for kind, windows in kinds.items():
                losses = []
                for ids in windows:
                    losses.append(window_losses(model, ids))
                    if losses[-1].isnan().any():
                        raise FloatingPointError(
                            f"model: the loss of a window of {length} tokens (kind '{kind}') is "
                            "nan; expected weights and activations that are finite in the dtype"
                        )
                    done += 1
                    if progress is not None:
                        progress(done, total)
                results.append(_summary(kind, length, torch.stack(losses)))
    return results


def vocabulary_of(
    model: str | Path | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedTokenizerBase, int]:
    """(tokenizer, rows of the embedding); arguments and errors are those of :func:`evaluate`."""
    if isinstance(model, str | Path):
        config = load_config(str(model))
        return tokenizer or load_tokenizer(str(model)), config.get_text_config().vocab_size
    if tokenizer is None:
        raise ValueError("tokenizer: expected the model's tokenizer with a model, got None")
    return tokenizer, model.get_input_embeddings().weight.shape[0]


def load_for_evaluation(
    model: str,
    length: int,
    adapter: str | Path | None = None,
    rope_scaling: str = "none",
    dtype: str = "auto",
    device: str = "auto",
) -> PreTrainedModel | PeftModel:
    """A dense model on its device, with the adapter and the context it was trained with.

    Args:
        model: folder or hub name.
        length: the longest window to come, in tokens.
        adapter, rope_scaling, dtype, device: see :func:`evaluate`.
    """
    place = pick_device(device, elimination=False)
    config = load_config(model)
    folder = None if adapter is None else find_adapter(adapter)
    if folder is not None:
        # The adapter may have been trained on weights that are stored in another way.
        config = quantised.stored_like(trained_config(folder, config, model), config)
    extend_context(config, length, rope_scaling, "lengths")
    quantize = None if quantised.is_quantised(config) else quantised.recorded(config)
    if quantize is not None:
        _log.info("the model is quantised as it was for the adapter's training: %s", quantize)
    loaded: PreTrainedModel | PeftModel = load_model(
        model, config, pick_dtype(dtype, place), quantize, place
    )
    is_placed = quantised.is_quantised(loaded.config)
    if folder is not None:
        loaded = load_adapter(loaded, folder, model)
    return loaded if is_placed and folder is None else loaded.to(place)


def check_context(model: PreTrainedModel | PeftModel, longest: int) -> None:
    """Warns where the longest window, in tokens, is beyond the positions of the model."""
    limit = reach(causal_lm_of(model).config)
    if limit is not None and longest > limit:
        _log.warning(
            "lengths: windows of up to %d tokens are longer than the model's context of %d; their "
            "figures may say little unless rope_scaling extends it",
            longest,
            limit,
        )


def causal_lm_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal LM, without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_plain_head(causal_lm: PreTrainedModel) -> bool:
    """Whether logits are known to be the output embedding's product with the last hidden state;
    other models may scale or cap theirs."""
    return any(kind.__name__ in ARCHITECTURES for kind in type(causal_lm).__mro__)


@torch.no_grad()
def logits_of_rows(
    model: PreTrainedModel | PeftModel, ids: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Logits of some rows of a sequence, [R, vocabulary] float32; those of others are made only
    where a model of another kind than lemo's own has no `logits_to_keep`.

    Args:
        model: a causal LM in eval mode.
        ids: [T].
        rows: [R] int64.
    """
    causal_lm = causal_lm_of(model)
    ids, rows = ids.to(causal_lm.device)[None], rows.to(causal_lm.device)
    if has_plain_head(causal_lm):
        hidden = causal_lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, rows]
        return causal_lm.get_output_embeddings()(hidden).float()
    if "logits_to_keep" in inspect.signature(causal_lm.forward).parameters:
        return causal_lm(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0].float()
    return causal_lm(input_ids=ids, use_cache=False).logits[0, rows].float()


@torch.no_grad()
def window_losses(model: PreTrainedModel | PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropies of the tokens after the first: ids [length] -> float32 [length - 1], in nats.

    The head runs on chunks of rows, so logits of the whole window never exist; of models of other
    kinds than lemo's own they do.
    """
    causal_lm = causal_lm_of(model)
    ids = ids.to(causal_lm.device)
    rows = loss_chunk_rows(causal_lm.config.get_text_config().vocab_size)
    if has_plain_head(causal_lm):
        states = causal_lm.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
        head = causal_lm.get_output_embeddings()
    else:
        states, head = causal_lm(input_ids=ids[None], use_cache=False).logits, torch.nn.Identity()
    parts = zip(states[0, :-1].split(rows), ids[1:].split(rows), strict=True)
    return torch.cat([cross_entropy(head(x).float(), y, reduction="none") for x, y in parts])


def _windows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    limit: int | None,
    vocab_size: int,
) -> tuple[dict[int, dict[str, list[torch.Tensor]]], int]:
    """Windows by length and kind, and how many there are.

    Ids are compared with ``vocab_size``, the rows of the embedding.
    """
    documents = list(documents)
    groups: dict[int, dict[str, list[torch.Tensor]]] = {}
    total = 0
    for length in lengths:
        windows, short = first_windows(documents, tokenizer, length, vocab_size)
        if short:
            _log.info(
                "%d of %d documents are shorter than %d tokens and are left out",
                short,
                len(documents),
                length,
            )
        kinds = groups[length] = {}
        for document, ids in windows:
            kinds.setdefault(document.kind, []).append(ids)
        for kind in kinds:
            kinds[kind] = kinds[kind][:limit]
            total += len(kinds[kind])
        used = ([ids] for of_kind in kinds.values() for ids in of_kind)
        for line in of_copies(f"windows of {length} tokens", used):
            _log.info("%s", line)
    return groups, total


def _summary(kind: str, length: int, losses: torch.Tensor) -> dict[str, Any]:
    """One row of the result; ``losses`` is [windows, length - 1]."""
    # Prediction number i is of token i + 1; the tail is the tokens from 3/4 of the length on.
    tail = losses[:, length - 1 - length // 4 :] if length >= 4 else losses
    return {
        "kind": kind,
        "length": length,
        "documents": losses.shape[0],
        "perplexity": _perplexity(losses),
        "tail_perplexity": _perplexity(tail),
    }


def _perplexity(losses: torch.Tensor) -> float:
    mean = losses.double().mean().item()
    return math.exp(mean) if mean < 700 else math.inf
