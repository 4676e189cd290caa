"""The folder of `lemo prepare` (docs/design/preparation.md)."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lemo.files import digest_of, read_json, write_file
from lemo.predictors.model import check_embedding, model_description, model_shape
from lemo.predictors.modules import KINDS, Predictor
from lemo.predictors.position import PositionProfile
from lemo.predictors.predictor_set import MATRICES, NETS, PROFILE, PredictorSet
from lemo.predictors.relevance import REACH, RelevancePredictor

__all__ = [
    "DESCRIPTION_FILE",
    "RELEVANCE",
    "WEIGHTS_FILE",
    "content_digest",
    "load",
    "load_relevance",
    "tensors_of",
    "tensors_of_relevance",
    "write_folder",
]

FORMAT = "lemo-predictor"
VERSION = 2
WEIGHTS_FILE = "predictor.safetensors"
DESCRIPTION_FILE = "predictor.json"
# The target of predictors of what answers need; the other ones are of the scores of sub-blocks.
RELEVANCE = "relevance"
_MIXES = ("key_mix", "query_mix")


def tensors_of(
    layer: int,
    kind: str,
    module: Predictor,
    profile: PositionProfile,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The stored tensors of one predictor: weights in `dtype`, its profile in fp32."""
    stem = f"layers.{layer}.{kind}"
    weights = {
        f"{stem}.{name}.{matrix}": weight.detach().to(dtype).contiguous()
        for name, net in module.nets()
        for matrix, weight in zip(MATRICES, net.weights)
    }
    return weights | {
        f"{stem}.profile.{name}": getattr(profile, name).float().contiguous() for name in PROFILE
    }


def tensors_of_relevance(
    module: RelevancePredictor, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """The stored tensors of a predictor of relevance: its scale in fp32, the others in `dtype`."""
    tensors = {
        f"{RELEVANCE}.{name}.{matrix}": weight
        for name, net in module.nets()
        for matrix, weight in zip(MATRICES, net.weights)
    }
    tensors |= {f"{RELEVANCE}.{name}": getattr(module, name) for name in _MIXES}
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}
    return tensors | {f"{RELEVANCE}.scale": module.scale.detach().float().contiguous()}


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Writes both files into an existing folder, which nobody reads yet.

    Args:
        folder: where to; the caller renames it to its final name when all is done.
        tensors: as from `tensors_of`, for all layers and kinds.
        description: the fields of predictor.json; format, version and checksums are added.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    # Written by Python, not by safetensors, whose errors of the disk are no OSErrors.
    weights = to_safetensors(dict(tensors), metadata={"format": "pt"})
    write_file(folder / WEIGHTS_FILE, weights)
    fields = {"format": FORMAT, "version": VERSION, "sha256": _digest(weights), **description}
    fields["digest"] = _digest_of_content(fields)
    text = json.dumps(fields, indent=2, allow_nan=False)
    write_file(folder / DESCRIPTION_FILE, text + "\n")


def load(
    folder: str | Path, model_config: Any = None, embedding: Tensor | None = None
) -> PredictorSet:
    """Reads what `lemo prepare` wrote, but for a predictor of relevance.

    Args:
        folder: the output of `lemo prepare`.
        model_config: Transformers config of the model that will be scored; None skips the
            comparison.
        embedding: the weight of its token embedding, [V, H]. Where it is another one than that of
            the model that they were made for, a warning says so.

    Raises:
        FileNotFoundError: the folder or one of its files is absent.
        ValueError: a file is damaged, of another format or version, or made for another model.
    """
    description, tensors = _read(Path(folder), model_config, embedding)
    if description.get("target") == RELEVANCE:
        raise ValueError(
            f"predictor: expected scores of sub-blocks, but {folder} was prepared with target "
            f"'{RELEVANCE}'"
        )
    return PredictorSet(tensors, description)


def load_relevance(
    folder: str | Path, model_config: Any = None, embedding: Tensor | None = None
) -> RelevancePredictor:
    """Reads what `lemo prepare --target relevance` wrote; arguments and errors as of `load`."""
    description, tensors = _read(Path(folder), model_config, embedding)
    if description.get("target") != RELEVANCE:
        raise ValueError(
            f"predictor: expected a folder with target '{RELEVANCE}', but {folder} was prepared "
            f"with target {description.get('target')!r}"
        )
    key, query = (
        [tensors[f"{RELEVANCE}.{name}.{matrix}"] for matrix in MATRICES]
        for name in NETS["attention"]
    )
    key_mix, query_mix, scale = (tensors[f"{RELEVANCE}.{name}"] for name in (*_MIXES, "scale"))
    return RelevancePredictor.of_weights(key, query, key_mix, query_mix, scale)


def _found(folder: Path) -> Path:
    """The folder; FileNotFoundError where it or one of its files is absent."""
    for file in (folder / DESCRIPTION_FILE, folder / WEIGHTS_FILE):
        if not file.is_file():
            raise FileNotFoundError(
                f"predictor: expected a folder written by 'lemo prepare', but {file} does not exist"
            )
    return folder


def _read(
    folder: Path, model_config: Any = None, embedding: Tensor | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a folder, checked."""
    description = _read_description(_found(folder) / DESCRIPTION_FILE)
    weights = folder / WEIGHTS_FILE
    if _digest(weights.read_bytes()) != description["sha256"]:
        raise ValueError(
            f"predictor: {weights} does not match its checksum in {DESCRIPTION_FILE}: it is "
            "damaged or comes from another run; run 'lemo prepare' again"
        )
    try:
        tensors = load_file(str(weights))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"predictor: {weights} is not a safetensors file: {error}") from None
    if description.get("target") == RELEVANCE:
        _check_relevance(weights, tensors, description["hidden_size"])
    else:
        _check_tensors(weights, tensors, description)
    if model_config is not None:
        _check_model(folder, description["model"], model_shape(model_config))
        model = model_description(model_config, embedding)
        check_embedding(f"predictor: {folder}", description["model"], model, "lemo prepare")
    return description, tensors


def content_digest(folder: str | Path) -> str:
    """Hexadecimal digest of what decides the scores and thresholds of a folder of `lemo prepare`.

    Raises:
        ValueError, FileNotFoundError: see `load`.
    """
    description, _ = _read(Path(folder))
    return _digest_of_content(description)


def _digest_of_content(description: Mapping[str, Any]) -> str:
    return digest_of([description[name] for name in ("sha256", "block_size", "thresholds")])


def _read_description(file: Path) -> dict[str, Any]:
    description = read_json(file, f"predictor: {file}")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"predictor: {file} was not written by 'lemo prepare'")
    if description.get("version") != VERSION:
        raise ValueError(
            f"predictor: {file}: expected format version {VERSION}, "
            f"got {description.get('version')!r}; run 'lemo prepare' again with this lemo"
        )
    if description.get("target") == "label":
        description["target"] = "exact"  # as earlier folders call it
    expected = {
        "sha256": str, "block_size": int, "num_layers": int, "hidden_size": int,
        "thresholds": dict, "model": dict,
    }  # fmt: skip
    for name, expected_type in expected.items():
        value = description.get(name)
        if type(value) is not expected_type:
            raise ValueError(
                f"predictor: {file}: field '{name}': expected {expected_type.__name__}, "
                f"got {value!r}"
            )
        if isinstance(value, int) and value < 1:
            raise ValueError(
                f"predictor: {file}: field '{name}': expected at least 1, got {value!r}"
            )
    for kind in () if description.get("target") == RELEVANCE else KINDS:
        values = description["thresholds"].get(kind)
        if not _is_numbers(values, description["num_layers"]):
            raise ValueError(
                f"predictor: {file}: field 'thresholds.{kind}': expected "
                f"{description['num_layers']} numbers, got {values!r}"
            )
    # Earlier folders have none.
    if description.get("digest") not in (None, _digest_of_content(description)):
        raise ValueError(
            f"predictor: {file}: checksum, block_size or thresholds are not those that were "
            "written; run 'lemo prepare' again"
        )
    return description


def _is_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    )


def _check_tensors(
    file: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    hidden = description["hidden_size"]
    for layer in range(description["num_layers"]):
        for kind, nets in NETS.items():
            stem = f"layers.{layer}.{kind}"
            _check_floats(file, tensors, [f"{stem}.profile.{name}" for name in PROFILE])
            for net in nets:
                _check_net(file, tensors, f"{stem}.{net}", hidden)
            lengths = {tensors[f"{stem}.profile.{name}"].shape for name in PROFILE}
            if len(lengths) != 1 or len(lengths.pop()) != 1:
                raise ValueError(
                    f"predictor: {file}: tensors '{stem}.profile': expected vectors of one length"
                )


def _check_relevance(file: Path, tensors: Mapping[str, Tensor], hidden: int) -> None:
    features = [
        _check_net(file, tensors, f"{RELEVANCE}.{name}", hidden) for name in NETS["attention"]
    ]
    shapes = {"scale": [hidden], **{mix: [2 * REACH + 1, features[0]] for mix in _MIXES}}
    if len(set(features)) != 1:
        raise ValueError(
            f"predictor: {file}: expected keys and queries of as many features, got {features}"
        )
    _check_floats(file, tensors, [f"{RELEVANCE}.{name}" for name in shapes])
    for name, shape in shapes.items():
        found = list(tensors[f"{RELEVANCE}.{name}"].shape)
        if found != shape:
            raise ValueError(
                f"predictor: {file}: tensor '{RELEVANCE}.{name}': expected {shape}, got {found}"
            )


def _check_floats(file: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for name in names:
        if name not in tensors:
            raise ValueError(f"predictor: {file} lacks the tensor '{name}'")
        tensor = tensors[name]
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"predictor: {file}: tensor '{name}' is not finite floats")


def _check_net(file: Path, tensors: Mapping[str, Tensor], stem: str, inputs: int) -> int:
    """Raises ValueError where a net's matrices do not fit each other; the features it gives."""
    names = [f"{stem}.{matrix}" for matrix in MATRICES]
    _check_floats(file, tensors, names)
    for name in names:
        shape = tensors[name].shape
        if len(shape) != 2 or shape[1] != inputs:
            raise ValueError(
                f"predictor: {file}: tensor '{name}': expected [rank, {inputs}], got {list(shape)}"
            )
        inputs = shape[0]
    return inputs


def _check_model(folder: Path, trained: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if trained.get(name) != value:
            raise ValueError(
                f"predictor: {folder} was prepared for a model with {name} {trained.get(name)!r}, "
                f"got one with {name} {value!r}; run 'lemo prepare' for this model"
            )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
