"""Fingerprints of what a run is made from, so that it is never resumed with something else.

None depends on where the files lie.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lemo.files import digest_of
from lemo.predictors.model import model_shape, sampled
from lemo.predictors.storage import content_digest
from lemo.relevance.heads import RetrievalHeads
from lemo.settings.elimination import LemoConfig

# What config.json says of who wrote it, when and from where, and nothing of the model.
_NOT_OF_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version")

_log = logging.getLogger("lemo")


def of_inputs(
    model: str,
    weights: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    of_scorer: Mapping[str, str],
    scores: str | None = None,
) -> dict[str, str]:
    """Hexadecimal digests by name of the input.

    Args:
        model: folder or hub name.
        weights: the model that was loaded from there, before anything trains.
        tokenizer: the model's.
        of_scorer: what :func:`of_scorer` returned.
        scores: digest of stored scores, where there are some.
    """
    found = {
        "config.json of the model": of_config(model),
        "weights of the model": of_weights(weights),
        "tokenizer": of_tokenizer(tokenizer),
    }
    found |= of_scorer
    if scores is not None:
        found["scores"] = scores
    return found


def of_scorer(elimination: LemoConfig | None, model_config: PreTrainedConfig) -> dict[str, str]:
    """The same of the files that a scorer reads, which takes no time beside documents and weights.

    Args:
        elimination: its settings.
        model_config: of the model that they have to be made for.

    Raises:
        FileNotFoundError, ValueError: they are not there, damaged, or made for another model.
    """
    found = {}
    if elimination is not None and elimination.predictor is not None:
        found["predictor"] = content_digest(elimination.predictor)
    if elimination is not None and elimination.heads is not None:
        found["heads"] = of_heads(elimination.heads, model_config)
    return found


def check_inputs(saved: Mapping[str, str] | None, now: Mapping[str, str], place: Path) -> None:
    """Raises ValueError, naming what differs from what the checkpoint at ``place`` was made from.

    Args:
        saved: :func:`of_inputs` of the run that is resumed; None: it took none, which is said.
        now: the same of what there is now.
        place: the checkpoint, for the message.
    """
    if saved is None:
        _log.warning(
            "%s was written by a lemo that took no fingerprints: model, tokenizer and predictor "
            "are taken to be those that it was trained with",
            place,
        )
        return
    changed = [name for name in now if saved.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"resume: expected the inputs that {place} was trained with, but changed since: "
            f"{', '.join(changed)}; put back what was there, or start another run"
        )


def of_config(model: str) -> str:
    """Digest of a model's config.json, of its content only."""
    content, _ = PreTrainedConfig.get_config_dict(model)
    kept = {name: value for name, value in content.items() if name not in _NOT_OF_THE_MODEL}
    return _digest(json.dumps(kept, sort_keys=True, default=str))


def of_heads(file: str, model_config: Any) -> str:
    """Digest of the heads in a file of `lemo relevance heads`.

    Raises:
        FileNotFoundError, ValueError: see `lemo.relevance.heads.RetrievalHeads.load`.
    """
    return _digest(str(sorted(RetrievalHeads.load(file, model_shape(model_config)).heads)))


def of_weights(model: nn.Module) -> str:
    """Digest of the names, shapes, dtypes and 65536 values at most of each parameter and buffer.

    A change of a few values of a large tensor can lie between the ones that are read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_stored_tensors(model)):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(sampled(tensor).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a state dict; a tensor that is made of others (torchao) as those."""
    for name, value in model.state_dict().items():
        parts = getattr(value, "__tensor_flatten__", None)
        if parts is None:
            if isinstance(value, Tensor):
                yield name, value
        else:
            inner, _ = parts()
            for part in inner:
                yield f"{name}.{part}", getattr(value, part)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of how a tokenizer turns text into ids.

    That is all of a tokenizer of `tokenizers`; of another one its vocabulary and special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        known: Any = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
        return _digest(json.dumps(known, sort_keys=True, default=str))
    known = json.loads(backend.to_str())
    # How it was asked last, not what it is.
    del known["truncation"], known["padding"]
    return digest_of(known)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
