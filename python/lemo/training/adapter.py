"""Adapters in PEFT's format: finding one, and loading all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lemo.data.reading import first_of, naming
from lemo.files import read_json
from lemo.predictors.model import check_embedding, embedding_digest, model_shape
from lemo.training.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG
from lemo.training.run_folder import ADAPTER_NAME, CHECKPOINTS_NAME, absolute

_log = logging.getLogger("lemo")

# What model_config.json says besides the configuration of the base model: digests of its embedding,
# and of the adapter's weights.
_EMBEDDING, _WEIGHTS = "lemo_embedding", "lemo_adapter"

# What PEFT called the file before safetensors.
_OLD_WEIGHTS = "adapter_model.bin"


def find_adapter(path: str | Path) -> Path:
    """The adapter folder at ``path`` itself or in the run folder ``path``.

    Raises:
        FileNotFoundError: there is none in either place.
    """
    path = Path(path)
    for folder in (path, path / ADAPTER_NAME):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    if (path / CHECKPOINTS_NAME).is_dir():
        raise FileNotFoundError(
            f"adapter: the run in '{path}' is not done, so it has no adapter yet; lemo finetune "
            "--output with its folder and --resume goes on with it"
        )
    raise FileNotFoundError(
        f"adapter: expected a PEFT adapter or a run folder, but '{path}' has no {ADAPTER_CONFIG}"
    )


def base_model_name(adapter: str | Path) -> str:
    """The base model that an adapter names in its configuration.

    Raises:
        FileNotFoundError: see `find_adapter`.
        ValueError: the configuration cannot be read, or names none.
    """
    path = find_adapter(adapter) / ADAPTER_CONFIG
    with naming(f"adapter: {path} cannot be used"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    name = content.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ValueError(f"model: expected a name, because {path} names no base model")
    return name


def trained_config(folder: Path, config: PreTrainedConfig, model: str) -> PreTrainedConfig:
    """The configuration that the adapter in ``folder`` was trained with; ``config`` if it has none.

    Args:
        folder: as from :func:`find_adapter`.
        config: of the model that the adapter is loaded into.
        model: folder or hub name of that model, for the message.

    Raises:
        ValueError: it cannot be read, or is that of a model of another shape.
    """
    path = folder / MODEL_CONFIG
    if not path.is_file():
        return config
    with naming(f"adapter: {path} cannot be used"):
        trained = AutoConfig.from_pretrained(path)
        shape = model_shape(trained)
    for name, value in model_shape(config).items():
        if shape[name] != value:
            raise ValueError(
                f"adapter: {folder} was trained on a model with {name} {shape[name]!r}, but "
                f"'{model}' has {value!r}"
            )
    return trained


def embedding_of(model: PreTrainedModel) -> str | None:
    """The digest by which the base model of an adapter is known; see `lemo.predictors.model`."""
    return embedding_digest(getattr(model.get_input_embeddings(), "weight", None))


def origin_of(folder: Path, embedding: str | None) -> dict[str, str | None]:
    """What `load_adapter` compares, for the model_config.json of an adapter.

    Args:
        folder: has the adapter's weights.
        embedding: of the base model, from `embedding_of`.
    """
    return {_EMBEDDING: embedding, _WEIGHTS: _digest_of_file(folder / ADAPTER_WEIGHTS)}


def load_adapter(model: PreTrainedModel, folder: Path, name: str) -> PeftModel:
    """``model`` with the adapter in ``folder``, frozen.

    Where a run wrote the adapter, a warning says if the weights were changed since, or if it was
    trained on another model of this shape. Both may be meant.

    Args:
        model: the base model.
        folder: as from :func:`find_adapter`.
        name: folder or hub name of the base model, for messages.

    Raises:
        FileNotFoundError: the adapter has no weights.
        ValueError: a file is damaged, or the weights are not exactly those that the adapter needs.
    """
    with naming(f"adapter: {folder / ADAPTER_CONFIG} cannot be used"):
        config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter: expected one that changes the model's modules, such as LoRA, but {folder} "
            f"is of the kind {config.peft_type.value}, which puts tokens in front of the text"
        )
    if not any((folder / file).is_file() for file in (ADAPTER_WEIGHTS, _OLD_WEIGHTS)):
        raise FileNotFoundError(f"adapter: {folder} has no {ADAPTER_WEIGHTS}")
    _check_origin(folder, model)
    trained_on = config.base_model_name_or_path
    if trained_on and absolute(trained_on) != absolute(name):
        _log.info("adapter: %s was trained on '%s', and is put into '%s'", folder, trained_on, name)
    # PEFT would say the same, as a Python warning.
    config.base_model_name_or_path = None
    config.inference_mode = True
    with naming(f"adapter: {folder} does not fit '{name}'"):
        wrapped = get_peft_model(model, config)
    fault = f"adapter: {folder} is damaged, or does not fit '{name}'"
    with naming(fault):
        outcome = wrapped.load_adapter(str(folder), "default")
    if outcome.missing_keys:
        raise ValueError(f"{fault}: it lacks {first_of(outcome.missing_keys)}")
    if outcome.unexpected_keys:
        raise ValueError(f"{fault}: no place for {first_of(outcome.unexpected_keys)}")
    return wrapped


def _check_origin(folder: Path, model: PreTrainedModel) -> None:
    file, weights = folder / MODEL_CONFIG, folder / ADAPTER_WEIGHTS
    if not (file.is_file() and weights.is_file()):
        return
    with naming(f"adapter: {file} cannot be used"):
        known = dict(read_json(file))
    digest = known.get(_WEIGHTS)
    if digest is not None and digest != _digest_of_file(weights):
        _log.warning(
            "adapter: %s is not what the run wrote: it was changed since, or is damaged", weights
        )
    made_for, here = {"embedding": known.get(_EMBEDDING)}, {"embedding": embedding_of(model)}
    check_embedding(f"adapter: {folder}", made_for, here, "lemo finetune")


def _digest_of_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
