"""Checkpoints: everything a run needs to go on with the same losses as if it had not stopped.

A checkpoint is a folder ``step-N`` that appears in one move. ``state.json`` in it is its table of
contents, with the size and the digest of every file and of itself, so that one that was damaged or
renamed later is noticed and never loaded.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load as from_safetensors
from torch import Tensor

from lemo.data.reading import naming
from lemo.files import digest_of, json_text, new_folder, read_json, remove_folder, write_file
from lemo.settings.finetune import FinetuneConfig, compared
from lemo.training.model import ADAPTER_WEIGHTS, write_adapter
from lemo.training.optimizer_state import unpacked
from lemo.training.sharding import cut

STATE_NAME = "state.json"
OPTIMIZER_NAME = "optimizer.pt"
# Every file of a checkpoint.
CHECKPOINT_FILES = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|optimizer\.pt|random-\d+\.pt|state\.json"
)
# Format 1 had no digest of state.json, formats 1 and 2 a tensor of each parameter's state.
_FORMAT = 3
# What reading a damaged checkpoint raises.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)

_log = logging.getLogger("lemo")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there and whole.

    Attributes:
        folder: where it lies.
        step: optimizer steps that are done.
        data: fingerprint of the training windows.
        inputs: fingerprints of model, tokenizer and predictor; None: written by a lemo that took
            none.
        settings: those that a resumed run may not change (`lemo.settings.finetune.compared`);
            empty: written by a lemo that took none.
        num_processes: processes of the run.
        gradient_accumulation: forward passes of each of them in a step.
    """

    folder: Path
    step: int
    data: str
    inputs: dict[str, str] | None
    settings: dict[str, Any]
    num_processes: int
    gradient_accumulation: int


def save_checkpoint(
    folder: Path,
    step: int,
    model: PeftModel,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    random_states: list[dict[str, Any]],
    data: str,
    inputs: dict[str, str],
    config: FinetuneConfig,
) -> None:
    """Write ``folder/step-N`` in one move, then remove all but the newest ones.

    What a process that was killed left half-written goes, too. A folder with anything in it that
    is no file of a checkpoint stays, and a warning names it.

    Args:
        folder: the checkpoints of the run.
        step: optimizer steps that are done; this is the position in the data, too.
        model: whose adapter is saved, in PEFT's format.
        weights: those of the adapter, from `adapter_weights`.
        optimizer: "optimizer", a copy of what `packed` makes of the optimizer's state dict, and
            state dicts of what else steps with it.
        random_states: :func:`random_state` of every process, in order of rank.
        data: fingerprint of the training windows.
        inputs: fingerprints of model, tokenizer and predictor.
        config: the settings of the run.
    """
    with new_folder(folder / f"step-{step}") as target:
        write_adapter(model, weights, target)
        write_file(target / OPTIMIZER_NAME, _to_bytes(optimizer))
        for rank, state in enumerate(random_states):
            write_file(target / _random_name(rank), _to_bytes(state))
        contents = {
            "format": _FORMAT,
            "step": step,
            "data": data,
            "inputs": inputs,
            "settings": compared(config),
            "num_processes": len(random_states),
            "gradient_accumulation": config.gradient_accumulation,
            "files": {file.name: _describe(file) for file in sorted(target.iterdir())},
        }
        contents["sha256"] = _own_digest(contents)
        write_file(target / STATE_NAME, json_text(contents, indent=2))
    steps = checkpoint_folders(folder)
    torn = [old for old in checkpoint_folders(folder, torn=True) if old not in steps]
    # Later steps can only be damaged ones that a resumed run passed over.
    whole = [old for old in steps if _step(old) <= step and _looks_whole(old)]
    whole = whole[: config.keep_checkpoints]
    for old in [*torn, *(old for old in steps if old not in whole)]:
        try:
            remove_folder(old, CHECKPOINT_FILES)
        except FileExistsError as error:
            _log.warning("checkpoint %s stays: %s", old, error)


def newest_checkpoint(folder: Path, gradient_accumulation: int = 1) -> Checkpoint | None:
    """The newest whole checkpoint; incomplete ones are named in a warning and skipped.

    Args:
        folder: the checkpoints of a run.
        gradient_accumulation: of the run, for checkpoints that do not say.
    """
    for candidate in checkpoint_folders(folder):
        try:
            return _verify(candidate, gradient_accumulation)
        except KeyError as error:
            reason = f"{STATE_NAME} has no {error}"
        except _DAMAGE as error:
            reason = str(error)
        _log.warning("checkpoint %s is not whole and is ignored: %s", candidate, reason)
    return None


def load_checkpoint(checkpoint: Checkpoint, model: PeftModel, rank: int | None) -> dict[str, Any]:
    """Put the adapter's weights and the random state of process ``rank`` back.

    Args:
        checkpoint: where they are.
        model: gets the weights, whole or cut as its own are.
        rank: None leaves the random state as it is.

    Returns:
        The optimizer state given to :func:`save_checkpoint`.
    """
    weights = from_safetensors((checkpoint.folder / ADAPTER_WEIGHTS).read_bytes())
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    with naming(f"checkpoint {checkpoint.folder}: expected the adapter of this run"):
        weights = {name: cut(w, own[name]) if name in own else w for name, w in weights.items()}
        outcome = set_peft_model_state_dict(model, weights)
    if outcome.unexpected_keys:
        raise ValueError(
            f"checkpoint {checkpoint.folder}: expected the adapter of this run, got weights it "
            f"does not have: {', '.join(outcome.unexpected_keys[:3])}"
        )
    if rank is not None:
        set_random_state(_from_file(checkpoint.folder / _random_name(rank)))
    state: dict[str, Any] = _from_file(checkpoint.folder / OPTIMIZER_NAME)
    return {**state, "optimizer": unpacked(state["optimizer"])}


def random_state() -> dict[str, Any]:
    """State of the generators of torch (CPU and current GPU), Python and numpy."""
    # The array of numbers is typed as a part of the name.
    state: Any = numpy.random.get_state()
    _, keys, position, has_gauss, cached = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype(numpy.int64)), position, has_gauss, cached),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state(
        ("MT19937", keys.numpy().astype(numpy.uint32), position, has_gauss, cached)
    )


def _random_name(rank: int) -> str:
    return f"random-{rank}.pt"


def checkpoint_folders(folder: Path, torn: bool = False) -> list[Path]:
    """Folders ``step-N``, the highest N first; with ``torn`` what a killed process left, too."""
    left = r"|\.step-[0-9]+\.(tmp|old)" if torn else ""
    found = [p for p in folder.glob("*step-*") if re.fullmatch(r"step-[0-9]+" + left, p.name)]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    number = re.search("[0-9]+", folder.name)
    assert number is not None
    return int(number[0])


def _own_digest(contents: dict[str, Any]) -> str:
    """Digest of the contents of state.json, but for the digest itself."""
    rest = {name: value for name, value in contents.items() if name != "sha256"}
    return digest_of(rest)


def _describe(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _verify(folder: Path, gradient_accumulation: int) -> Checkpoint:
    contents = _contents(folder)
    for name, expected in contents["files"].items():
        if _describe(folder / name) != expected:
            raise ValueError(f"{name} differs from what was written")
    return Checkpoint(
        folder,
        contents["step"],
        contents["data"],
        contents.get("inputs"),
        contents.get("settings", {}),
        contents["num_processes"],
        # Older ones were resumed with the same setting only.
        contents.get("gradient_accumulation", gradient_accumulation),
    )


def _contents(folder: Path) -> dict[str, Any]:
    """What state.json says, after checking that it is whole and belongs to this folder."""
    contents = read_json(folder / STATE_NAME, STATE_NAME)
    if contents["format"] not in (1, 2, _FORMAT):
        raise ValueError(f"{STATE_NAME}: expected format {_FORMAT}, got {contents['format']!r}")
    signed = "sha256" in contents or contents["format"] != 1
    if signed and contents["sha256"] != _own_digest(contents):
        raise ValueError(f"{STATE_NAME} differs from what was written")
    if folder.name != f"step-{contents['step']}":
        raise ValueError(f"expected step {_step(folder)}, as its name says, got {contents['step']}")
    needed = {ADAPTER_WEIGHTS, OPTIMIZER_NAME} | {
        _random_name(rank) for rank in range(contents["num_processes"])
    }
    for name in sorted(needed - contents["files"].keys()):
        raise ValueError(f"{STATE_NAME} does not name {name}")
    return contents


def _looks_whole(folder: Path) -> bool:
    """Whether contents and sizes are right; the digests of large files would take their time."""
    try:
        files = _contents(folder)["files"]
        return all((folder / name).stat().st_size == f["bytes"] for name, f in files.items())
    except _DAMAGE:
        return False


def _to_bytes(value: Any) -> bytes:
    # Python writes the bytes, so that a full disk arrives as an OSError.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_file(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
