"""From a model and documents to the folder of predictors: what `lemo prepare` runs."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lemo.data.documents import Document, read_documents
from lemo.data.windows import first_windows, token_windows
from lemo.files import lock
from lemo.predictors.storage import check_output
from lemo.preparation.pipeline import PrepareSettings, Report, Window, prepare
from lemo.preparation.training import TrainingSettings
from lemo.settings.finetune import DEVICES, DTYPES, ROPE_SCALINGS, check_keys
from lemo.training.model import (
    extend_context,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)

__all__ = ["PrepareConfig", "prepare_from_documents"]

# Share of the documents of each kind that is held out, where no other documents are given for it.
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of `lemo prepare`, flat, as in its YAML file and options.

    Attributes:
        model: folder or hub name of the causal language model.
        documents: what to learn from; see `lemo.data.read_documents`.
        output: the folder to write.
        held_out_documents: documents to test on; None: a tenth of `documents`, at least one.
        lengths: tokens of the windows; each length gets `windows` of them.
        windows, held_out_windows: windows of each length.
        keep: share of blocks that the predictors' ranking serves, and budget of the thresholds.
        block_size, rank, target, dense_layers, search_rounds, search_windows, seed: see
            `PrepareSettings`.
        steps, windows_per_step, learning_rate, rank_weight, prune_every, prune_to, prune_mlp_to:
            see `TrainingSettings`.
        rope_scaling: how a model is extended whose context is shorter than the longest window:
            "linear", "yarn", "dynamic" or "none"; give what fine-tuning will use.
        dtype: of the model: "float32", "bfloat16", "float16" or "auto".
        device: "cpu", "cuda", or "auto": a CUDA GPU where there is one and lemo's ops run on it.
        disk_gib: limit of what lies on disk while it runs, in GiB.
        overwrite: replace the folder of an earlier preparation, or an empty one, at `output`.

    Raises:
        ValueError, TypeError: a field does not fit; the message names it.
    """

    model: str
    documents: str
    output: str
    held_out_documents: str | None = None
    lengths: tuple[int, ...] = (4096,)
    windows: int = 64
    held_out_windows: int = 8
    keep: float = 0.5
    block_size: int = 1024
    rank: int | None = None
    target: str = "label"
    steps: int = 300
    windows_per_step: int = 4
    learning_rate: float = 3e-3
    rank_weight: float = 0.2
    prune_every: int = 50
    prune_to: float | None = None
    prune_mlp_to: float | None = None
    dense_layers: tuple[int, ...] = ()
    search_rounds: int = 1
    search_windows: int = 2
    rope_scaling: str = "linear"
    dtype: str = "auto"
    device: str = "auto"
    disk_gib: float = 16.0
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in _SEQUENCES:
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(type(v) is int for v in value):
                raise TypeError(f"{name}: expected a list of integers, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths: expected integers >= 2, got {list(self.lengths)}")
        for name in ("windows", "held_out_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, choices in (
            ("rope_scaling", ROPE_SCALINGS),
            ("dtype", DTYPES),
            ("device", DEVICES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        self.settings()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrepareConfig:
        """The settings of a YAML file; unknown and missing ones raise ValueError."""
        check_keys(values, [field.name for field in dataclasses.fields(cls)])
        for name in ("model", "documents", "output"):
            if values.get(name) is None:
                raise ValueError(f"{name}: expected a value, got none")
        return cls(**values)

    def settings(self) -> PrepareSettings:
        """The part that `lemo.preparation.pipeline` takes."""
        training = {f.name for f in dataclasses.fields(TrainingSettings)} & set(vars(self))
        own = {f.name for f in dataclasses.fields(PrepareSettings)} & set(vars(self))
        return PrepareSettings(
            training=TrainingSettings(**{name: getattr(self, name) for name in training}),
            store_bytes=int(self.disk_gib * 2**30),
            **{name: getattr(self, name) for name in own},
        )


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
    return prepare(model, windows, tests, output, config.settings(), config.overwrite, report)


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


_SEQUENCES = ("lengths", "dense_layers")
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a string", lambda v: isinstance(v, str)),
    "int": ("an integer", lambda v: type(v) is int),
    "float": ("a number", lambda v: type(v) in (int, float) and math.isfinite(v)),
    "bool": ("true or false", lambda v: type(v) is bool),
}


def _check_type(name: str, value: Any, declared: str) -> None:
    kind, _, optional = declared.partition(" | ")
    if kind not in _TYPES or (optional and value is None):
        return
    expected, valid = _TYPES[kind]
    if not valid(value):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
