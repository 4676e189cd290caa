"""FinetuneConfig: all that decides what a run computes and where it leaves it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lemo.settings.elimination import LemoConfig

ROPE_SCALINGS = ("linear", "yarn", "dynamic", "none")
SCHEDULES = ("cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

# Fields that say how to start or how to watch a run; they may differ when it is resumed. So may
# the paths of its inputs: what lies there is compared, by fingerprints in the checkpoints.
NOT_COMPARED = (
    *("output", "resume", "overwrite", "log_every", "save_every", "keep_checkpoints"),
    *("model", "documents", "elimination.predictor"),
)


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one run; validated when constructed.

    Attributes:
        model: folder or hub name of the causal language model.
        documents: what to train on; see :func:`lemo.data.read_documents`.
        output: the run folder.
        context_length: tokens of a training window. Beyond the model's own context its rotary
            embedding is scaled.
        steps: optimizer steps of the run.
        batch_size: windows of a forward pass, in each process.
        gradient_accumulation: forward passes of an optimizer step.
        learning_rate: the highest one, after the warm-up.
        schedule: "cosine" (down to 0 after the last step) or "constant".
        warmup_steps: steps over which the learning rate rises linearly.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        lora_rank, lora_alpha, lora_dropout: of every LoRA pair.
        lora_targets: names of the adapted modules; None: every linear layer except the head.
        train_norms: train the normalisation weights too (they are saved in the adapter).
        rope_scaling: "linear", "yarn" or "dynamic" scaling of the rotary embedding where
            `context_length` exceeds the model's context; "none" trains it as it is.
        dtype: of the frozen weights and of matrix products: "float32", "bfloat16", "float16" or
            "auto" (bfloat16 on a GPU that has it, otherwise float32). Adapter weights and
            optimizer are float32 in any case; the adapter's products are in this dtype.
        device: "cpu", "cuda", or "auto": a CUDA GPU where there is one and everything that the run
            needs runs on it, otherwise the CPU. See :func:`lemo.training.model.pick_device`.
        gradient_checkpointing: recompute layers in backward. With elimination `recompute` of
            `elimination` says more; its default follows this field.
        deterministic: bit-equal losses from run to run and across a resumption on a GPU, too (on
            the CPU they are so anyway); torch's switch of that name, which warns where an op has
            no such form. Backward is slower.
        verify: check before the first step that lemo, with every token kept, computes what the
            model's own forward computes, on the beginning of the first window.
        seed: of the data order, LoRA's start and dropout.
        save_every: steps between checkpoints (one is always written at the end).
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: steps between lines on the screen; the log files get every step.
        resume: go on from the newest checkpoint in `output`.
        overwrite: delete a run that is in `output` already.
        elimination: what lemo eliminates; None: dense LoRA.

    Raises:
        ValueError: a field does not fit; the message names it, what was expected and what came.
    """

    model: str
    documents: str
    output: str
    context_length: int = 8192
    steps: int = 100
    batch_size: int = 1
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] | None = None
    train_norms: bool = False
    rope_scaling: str = "linear"
    dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    deterministic: bool = False
    verify: bool = True
    seed: int = 0
    save_every: int = 50
    keep_checkpoints: int = 2
    log_every: int = 1
    resume: bool = False
    overwrite: bool = False
    elimination: LemoConfig | None = field(default_factory=LemoConfig)

    def __post_init__(self) -> None:
        for name, (expected, convert) in _FIELDS.items():
            value = getattr(self, name)
            try:
                converted = convert(value)
            except (TypeError, ValueError):
                raise ValueError(f"{name}: expected {expected}, got {value!r}") from None
            object.__setattr__(self, name, converted)
        object.__setattr__(self, "elimination", _elimination(self.elimination))
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected at most one of the two, got both")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, fit for YAML."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["lora_targets"] = None if self.lora_targets is None else list(self.lora_targets)
        values["elimination"] = None if self.elimination is None else self.elimination.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """The inverse of `to_dict`. Absent fields take their defaults.

        Raises:
            ValueError: an unknown field (the message lists close ones), a missing one, a bad value.
        """
        check_keys(values, [f.name for f in dataclasses.fields(cls)])
        missing = [name for name in ("model", "documents", "output") if values.get(name) is None]
        if missing:
            raise ValueError(f"{missing[0]}: expected a value, got none")
        return cls(**values)


def check_keys(values: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> None:
    """Raise ValueError for the first key that is not known, with the close ones."""
    known = list(known)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"unknown setting '{prefix}{key}'; {hint}")


def differences(saved: FinetuneConfig, wanted: FinetuneConfig) -> list[str]:
    """What of two configurations cannot both be true of one run: "name: saved, wanted" lines."""
    pairs = zip(_flat(saved).items(), _flat(wanted).values(), strict=True)
    return [
        f"{name} was {old!r}, now {new!r}"
        for (name, old), new in pairs
        if name not in NOT_COMPARED and old != new
    ]


def _flat(config: FinetuneConfig) -> dict[str, Any]:
    values = config.to_dict()
    elimination = values.pop("elimination") or {}
    names = [f.name for f in dataclasses.fields(LemoConfig)]
    return values | {
        "elimination": "on" if elimination else "off",
        **{f"elimination.{name}": elimination.get(name) for name in names},
    }


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML (the message names the line), or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: expected a YAML file, but '{path}' does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: not YAML: {getattr(error, 'problem', error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def _integer(minimum: int) -> tuple[str, Callable[[Any], int]]:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError
        return value

    return f"an integer >= {minimum}", convert


def _number(minimum: float, below: float = float("inf")) -> tuple[str, Callable[[Any], float]]:
    def convert(value: Any) -> float:
        # YAML 1.1 reads 2e-4 as a string: it wants a dot in every float.
        if isinstance(value, bool) or not minimum <= float(value) < below:
            raise ValueError
        return float(value)

    limit = "" if below == float("inf") else f" and < {below:g}"
    return f"a number >= {minimum:g}{limit}", convert


def _choice(options: tuple[str, ...]) -> tuple[str, Callable[[Any], str]]:
    def convert(value: Any) -> str:
        if value not in options:
            raise ValueError
        return value

    return "one of " + ", ".join(options), convert


def _text(value: Any) -> str:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError
    str(value).encode()  # Libraries underneath write names as UTF-8; not every file name is.
    return str(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    names = tuple(_text(name) for name in value)
    if not names:
        raise ValueError
    return names


def _elimination(value: Any) -> LemoConfig | None:
    if value is None or isinstance(value, LemoConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"elimination: expected a mapping of LemoConfig fields, or null for dense LoRA, "
            f"got {value!r}"
        )
    try:
        return LemoConfig.from_dict(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"elimination: {error}") from None


_TEXT, _FLAG = ("a name or path in UTF-8", _text), ("true or false", _flag)

# What each field takes: in words, and as a function that converts a value or raises.
_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model": _TEXT,
    "documents": _TEXT,
    "output": _TEXT,
    "context_length": _integer(2),
    "steps": _integer(1),
    "batch_size": _integer(1),
    "gradient_accumulation": _integer(1),
    "learning_rate": _number(0.0),
    "schedule": _choice(SCHEDULES),
    "warmup_steps": _integer(0),
    "weight_decay": _number(0.0),
    "max_grad_norm": _number(0.0),
    "lora_rank": _integer(1),
    "lora_alpha": _number(0.0),
    "lora_dropout": _number(0.0, below=1.0),
    "lora_targets": ("a list of module names", _names),
    "train_norms": _FLAG,
    "rope_scaling": _choice(ROPE_SCALINGS),
    "dtype": _choice(DTYPES),
    "device": _choice(DEVICES),
    "gradient_checkpointing": _FLAG,
    "deterministic": _FLAG,
    "verify": _FLAG,
    "seed": _integer(0),
    "save_every": _integer(1),
    "keep_checkpoints": _integer(1),
    "log_every": _integer(1),
    "resume": _FLAG,
    "overwrite": _FLAG,
}
