"""LemoConfig: what is eliminated, where, when, and by which scores."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

POLICIES = ("ratio", "threshold")
SCORERS = ("pooled", "predictor", "random", "label")
VISIBLE_KEYS = ("kept", "all", "computed")
RECOMPUTE = ("auto", "none", "layer", "selective")


@dataclass(frozen=True)
class LemoConfig:
    """Settings of token elimination; validated when constructed.

    The defaults are what kept the quality of dense LoRA best where the other tokens are left out
    (docs/QUALITY.md): half of the tokens take part, in every layer the same ones, in long spans
    drawn anew for each sequence and step.

    Lists may be given for the tuple fields. Fields with one entry for each layer are checked
    against the model by `lemo.enable`.

    Attributes:
        block_size: the unit that is kept or eliminated: a number of tokens, or a share of the
            longest sequence of a batch, rounded up; with scorer "predictor" a share means the
            blocks that the predictors were trained for. A quarter of the sequence did best; small
            blocks tear texts apart.
        policy: "ratio" keeps the best share of the blocks of each sequence, those that have a label
            before those that have none (prompts, say); "threshold" the blocks that score at least
            the layer's threshold (LeMo, section 5.1).
        keep: share of blocks that attention keeps, in [0, 1], rounded up to whole blocks: of
            quarters 0.3 keeps half, and 0.8 all. A list has one entry for each layer. 0 everywhere
            is refused by `lemo.enable`.
        keep_mlp: the same for the MLP; None: the MLP uses attention's kept set of its layer. Both
            are for the policy "ratio".
        thresholds: one for each layer, for attention. None with policy "threshold" and scorer
            "predictor": the ones in the predictor folder.
        mlp_thresholds: one for each layer, for the MLP. None: the predictor folder's where
            `thresholds` come from there too, otherwise the MLP uses attention's kept set of its
            layer.
        dense_layers: layers that keep everything; negative ones count from the end.
        select_at: layers that score blocks; the others use the scores of the nearest earlier one.
            "first": the first layer that is not dense; "all": every layer.
        scorer: where block scores come from: "random" (every block is trained in turn), "pooled"
            (queries and keys of block means), "predictor" (trained by `lemo prepare`), or "label"
            (exact scores; slow, for experiments).
        predictor: folder written by `lemo prepare`; needed by scorer "predictor".
        keep_first: blocks always kept at the start of a sequence. By ratio, blocks that have labels
            come before them if they have none, and with scorer "random" they are kept only where
            the share leaves room for another block.
        keep_last: the same at the end of a sequence.
        visible_keys: what kept rows attend to. "kept": kept rows. "all": also rows that are not
            kept, as they are in the residual stream. "computed": also rows that are not kept, which
            all layers compute, without gradients and storing keys and values only: the forward pass
            is that of keep 1, backward is for kept rows.
        group_size: tokens of a shifted attention group (two-dimensional sparsity); None: no
            groups.
        schedule: (progress, keep) pairs: from that share of the training on, this keep replaces
            `keep` and `keep_mlp` in all layers that are not dense, cut by ratio. 1.0 is a dense
            finish.
        mask_loss: which tokens do not count in the loss. True: those that no sub-block kept; a
            share in (0, 1]: those that fewer than this share of all sub-blocks kept (dense layers
            keep every token); False: all count.
        burn_in: tokens at the start of a kept span whose loss does not count either, because the
            text right before them is missing: a number, less than a block, or a share of a block
            below 1, rounded up. Nothing with `visible_keys` "computed", where no text is missing,
            nor where `mask_loss` masks nothing: False, or True beside dense layers, which keep
            every token.
        loss_chunk: rows of a loss segment; None: chosen so that its logits take at most 256 MiB
            (fp32) on the CPU, 768 MiB (in the model's dtype) on a GPU.
        recompute: what backward computes a second time instead of storing it: "none"; "layer": all
            of every layer but its gathered rows, the MLP a chunk of rows at a time; "selective":
            the same, but attention's output is stored and its forward not repeated; "auto":
            "layer" where the model's gradient checkpointing is on, nothing elsewhere.
        seed: for scorer "random".

    Raises:
        ValueError, TypeError: a field does not fit; the message names it.
    """

    block_size: int | float = 0.25
    policy: str = "ratio"
    keep: float | tuple[float, ...] = 0.5
    keep_mlp: float | tuple[float, ...] | None = None
    thresholds: tuple[float, ...] | None = None
    mlp_thresholds: tuple[float, ...] | None = None
    dense_layers: tuple[int, ...] = ()
    select_at: str | tuple[int, ...] = "first"
    scorer: str = "random"
    predictor: str | None = None
    keep_first: int = 0
    keep_last: int = 1
    visible_keys: str = "kept"
    group_size: int | None = None
    schedule: tuple[tuple[float, float], ...] = ()
    mask_loss: bool | float = True
    burn_in: int | float = 0.0
    loss_chunk: int | None = None
    recompute: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("policy", self.policy, POLICIES)
        _check_choice("scorer", self.scorer, SCORERS)
        _check_choice("visible_keys", self.visible_keys, VISIBLE_KEYS)
        _check_choice("recompute", self.recompute, RECOMPUTE)
        if isinstance(self.block_size, float):
            if not 0.0 < self.block_size <= 1.0:
                raise ValueError(
                    "block_size: expected a number of tokens or a share in (0, 1], "
                    f"got {self.block_size!r}"
                )
        else:
            _check_int("block_size", self.block_size, minimum=1)
        if isinstance(self.burn_in, float):
            if not 0.0 <= self.burn_in < 1.0:
                raise ValueError(
                    "burn_in: expected a number of tokens or a share in [0, 1), "
                    f"got {self.burn_in!r}"
                )
        else:
            _check_int("burn_in", self.burn_in, minimum=0)
            if isinstance(self.block_size, int) and self.burn_in >= self.block_size > 1:
                raise ValueError(
                    f"burn_in: expected fewer tokens than a block of {self.block_size}, got "
                    f"{self.burn_in}"
                )
        _check_int("keep_first", self.keep_first, minimum=0)
        _check_int("keep_last", self.keep_last, minimum=0)
        _check_int("seed", self.seed, minimum=0)
        if self.group_size is not None:
            _check_int("group_size", self.group_size, minimum=2)
        if self.loss_chunk is not None:
            _check_int("loss_chunk", self.loss_chunk, minimum=1)
        if not isinstance(self.mask_loss, bool):
            if not _is_number(self.mask_loss):
                raise TypeError(f"mask_loss: expected a bool or a share, got {self.mask_loss!r}")
            if not 0.0 < self.mask_loss <= 1.0:
                raise ValueError(
                    f"mask_loss: expected a bool or a share in (0, 1], got {self.mask_loss!r}"
                )
            self._set("mask_loss", float(self.mask_loss))

        self._set("keep", _shares("keep", self.keep))
        if self.keep_mlp is not None:
            self._set("keep_mlp", _shares("keep_mlp", self.keep_mlp))
        for name in ("thresholds", "mlp_thresholds"):
            if getattr(self, name) is not None:
                self._set(name, _numbers(name, getattr(self, name)))
        self._set("dense_layers", _layers("dense_layers", self.dense_layers))
        if isinstance(self.select_at, str):
            if self.select_at not in ("first", "all"):
                raise ValueError(
                    "select_at: expected 'first', 'all' or a list of layers, "
                    f"got {self.select_at!r}"
                )
        else:
            self._set("select_at", _layers("select_at", self.select_at))
            if not self.select_at:
                raise ValueError("select_at: expected at least one layer, got an empty list")
        self._set("schedule", _schedule(self.schedule))

        if self.predictor is not None:
            if not isinstance(self.predictor, str | Path):
                raise TypeError(f"predictor: expected a path, got {self.predictor!r}")
            self._set("predictor", str(self.predictor))
        if self.scorer == "predictor" and self.predictor is None:
            raise ValueError(
                "predictor: scorer 'predictor' needs the folder written by 'lemo prepare', got None"
            )
        if self.policy == "threshold" and self.thresholds is None and self.scorer != "predictor":
            raise ValueError(
                "thresholds: policy 'threshold' needs one for each layer, got None "
                f"(scorer '{self.scorer}' brings none of its own)"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the only writes to a frozen instance: normal forms

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values (lists, numbers, strings), fit for JSON and YAML."""
        return {
            field.name: _to_plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LemoConfig":
        """The inverse of `to_dict`: absent fields take defaults, unknown ones raise ValueError."""
        if not isinstance(values, Mapping):
            raise TypeError(f"values: expected a mapping of LemoConfig fields, got {values!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
                raise ValueError(f"LemoConfig has no field '{name}'; {hint}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "LemoConfig":
        """Reads a YAML mapping; raises FileNotFoundError, or ValueError naming the file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: expected a YAML file of LemoConfig fields, got {path}")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of LemoConfig fields, got {values!r}")
        try:
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_int(name: str, value: Any, minimum: int) -> None:
    if not _is_int(value):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not _is_list(value) or not all(_is_number(entry) for entry in value):
        raise TypeError(f"{name}: expected a list of finite numbers, got {value!r}")
    return tuple(float(entry) for entry in value)


def _shares(name: str, value: Any) -> float | tuple[float, ...]:
    shares = _numbers(name, value) if _is_list(value) else value
    for share in shares if _is_list(shares) else (shares,):
        if not _is_number(share):
            raise TypeError(f"{name}: expected a number or a list of numbers, got {value!r}")
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name}: expected shares between 0 and 1, got {value!r}")
    return shares if _is_list(shares) else float(shares)


def _layers(name: str, value: Any) -> tuple[int, ...]:
    if not _is_list(value) or not all(_is_int(layer) for layer in value):
        raise TypeError(f"{name}: expected a list of layer indices, got {value!r}")
    return tuple(value)


def _schedule(value: Any) -> tuple[tuple[float, float], ...]:
    if not _is_list(value) or not all(_is_list(entry) and len(entry) == 2 for entry in value):
        raise TypeError(f"schedule: expected a list of [progress, keep] pairs, got {value!r}")
    entries = tuple(_numbers("schedule", entry) for entry in value)
    for progress, keep in entries:
        if not (0.0 <= progress <= 1.0 and 0.0 <= keep <= 1.0):
            raise ValueError(
                f"schedule: expected progress and keep between 0 and 1, got {[progress, keep]}"
            )
    if any(later[0] <= earlier[0] for earlier, later in pairwise(entries)):
        raise ValueError(f"schedule: expected ascending progress, got {value!r}")
    return entries


def _to_plain(value: Any) -> Any:
    return [_to_plain(entry) for entry in value] if isinstance(value, tuple) else value
