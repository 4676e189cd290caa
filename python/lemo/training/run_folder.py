"""The folder of a run: what lies in it, who works in it, what may be removed, where to go on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, deserialize

from lemo.files import LOCK_NAME, foreign, lock, read_json, remove_folder, write_file
from lemo.settings.base import read_yaml
from lemo.settings.finetune import FinetuneConfig, compared, differences
from lemo.training.checkpoint import (
    CHECKPOINT_FILES,
    Checkpoint,
    checkpoint_folders,
    newest_checkpoint,
)
from lemo.training.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lemo.training.run_log import LOG_NAME, TENSORBOARD_NAME
from lemo.training.run_report import REPORT_NAME, remove_report

CONFIG_NAME = "config.yaml"
ELIMINATION_NAME = "elimination.json"  # the settings of config.yaml with what is open filled in
KEPT_MAP_NAME = "kept_map.json"
METRICS_NAME = "metrics.json"
PLAN_NAME = "plan.json"
RELEVANCE_NAME = "relevance.json"  # why blocks of one prompt are kept; only the demo writes it
CHECKPOINTS_NAME = "checkpoints"
ADAPTER_NAME = "adapter"
RUN_FILES = (
    *(CONFIG_NAME, LOG_NAME, KEPT_MAP_NAME, METRICS_NAME, PLAN_NAME, ELIMINATION_NAME),
    RELEVANCE_NAME,
)

# Every file that lemo writes into the folders of a run.
_CONTENTS = {
    ADAPTER_NAME: re.compile(r"adapter_config\.json|adapter_model\.safetensors|model_config\.json"),
    TENSORBOARD_NAME: re.compile(r"events\.out\.tfevents\..+"),
}
# Settings that every config.yaml of a run has had, and those that none has.
_ALWAYS = {"model", "documents", "output", "steps", "save_every", "lora_rank", "elimination"}
_NEVER = {"resume", "overwrite"}
# Settings of elimination that are paths.
_FILES = ("predictor", "heads", "scores")
_log = logging.getLogger("lemo")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run folder; see :func:`lemo.files.lock`.

    Raises:
        FileExistsError: ``folder`` is a file.
        BlockingIOError: another process works in it, or evaluates its adapter.
        OSError: it cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output: expected a folder, but '{folder}' is a file")
    with lock(folder / LOCK_NAME, f"output: '{folder}'"):
        yield


@contextlib.contextmanager
def reading(folder: Path | None) -> Iterator[bool]:
    """Keep a training from taking the adapter of a run away; yields whether it can be written.

    Several processes may evaluate the adapter at once. None stands for no run.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            yield False
            return
        writable = os.access(folder, os.W_OK)
        if not writable:
            _log.warning(
                "adapter: '%s' cannot be written, so it does not get %s", folder, METRICS_NAME
            )
        else:
            place = Path(os.path.realpath(folder))
            stack.enter_context(lock(place / LOCK_NAME, f"adapter: '{folder}'", shared=True))
        yield writable


def check_folder(folder: Path, config: FinetuneConfig) -> Checkpoint | None:
    """What to resume from, after checking that ``folder`` is what the settings say it is.

    Raises:
        FileNotFoundError: nothing to resume; model or documents are not where they were.
        FileExistsError: there is a run and neither resume nor overwrite is set, or there is
            something else that overwriting would destroy.
        PermissionError: what overwriting would remove cannot be removed.
        ValueError: the run, or its checkpoint, has other settings.
    """
    if not config.resume:
        if _present(folder):
            if not config.overwrite:
                raise FileExistsError(
                    f"output: there is a run in '{folder}' already; --resume goes on with it, "
                    "--overwrite deletes it"
                )
            _check_own(folder)
        return None
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"output: there is no run in '{folder}' to resume")
    check_config(folder / CONFIG_NAME)
    saved = FinetuneConfig.from_yaml(folder / CONFIG_NAME)
    changed = differences(compared(saved), config)
    checkpoint = None
    # Gradient accumulation is compared with the number of processes, by `check_passes`.
    if all(map(_is_of_passes, changed)):
        _check_inputs(folder, saved, config)
        checkpoints = folder / CHECKPOINTS_NAME
        checkpoint = newest_checkpoint(checkpoints, saved.gradient_accumulation)
    if changed and checkpoint is None:
        raise ValueError(f"resume: the run in '{folder}' has other settings: {'; '.join(changed)}")
    if checkpoint is None:
        _log.info("%s has no checkpoint to go on from: starting with the first step", folder)
        return None
    if checkpoint.step > config.steps:
        raise ValueError(
            f"resume: expected a checkpoint of this run of {config.steps} steps, but "
            f"'{checkpoint.folder}' is of another run; move it away"
        )
    # Somebody may have edited the configuration, or put a checkpoint of another run here.
    changed = [line for line in differences(checkpoint.settings, config) if not _is_of_passes(line)]
    if changed:
        raise ValueError(
            f"resume: expected the settings that {checkpoint.folder} was trained with, but these "
            f"differ: {'; '.join(changed)}"
        )
    return checkpoint


def is_done(folder: Path, checkpoint: Checkpoint, config: FinetuneConfig) -> bool:
    """Whether nothing is left to do after ``checkpoint``: the adapter in ``folder`` is its own.

    Where there is another adapter, or a damaged one, a warning says so.
    """
    adapter = folder / ADAPTER_NAME
    if checkpoint.step < config.steps or not adapter.is_dir():
        return False
    same = _adapter_in(adapter) == _adapter_in(checkpoint.folder)
    if not same:
        _log.warning("%s is not the one of %s: it is written again", adapter, checkpoint.folder)
    return same


def start_folder(folder: Path, config: FinetuneConfig) -> None:
    """A run folder with the configuration only; files and report of an earlier run are removed.

    Anything else stays.

    Raises:
        FileExistsError: lemo did not write all of what would be removed; nothing is removed.
        PermissionError: a part of it cannot be removed; nothing is.
    """
    if _present(folder):
        _check_own(folder)
        remove_report(folder / REPORT_NAME)
    checkpoints = folder / CHECKPOINTS_NAME
    if checkpoints.is_dir():
        for entry in checkpoints.iterdir():
            remove_folder(entry, CHECKPOINT_FILES)
        checkpoints.rmdir()
    for name, own in _CONTENTS.items():
        for path in _versions(folder, name):
            remove_folder(path, own)
    for name in reversed(RUN_FILES):
        (folder / name).unlink(missing_ok=True)
    write_config(folder, config)


def write_config(folder: Path, config: FinetuneConfig) -> None:
    """Write the settings of a run, with absolute paths."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _NEVER}
    settings["output"] = os.path.abspath(settings["output"])
    for name in ("model", "documents"):
        settings[name] = absolute(settings[name])
    elimination = settings["elimination"]
    if elimination is not None:
        given = {name: elimination[name] for name in _FILES if elimination[name] is not None}
        paths = {name: absolute(path) for name, path in given.items()}
        settings["elimination"] = elimination | paths
    write_file(folder / CONFIG_NAME, yaml.safe_dump(settings, sort_keys=False))


def recorded_model(folder: Path) -> str | None:
    """The folder of the model that a run was started with; None where it is not there any more."""
    config = folder / CONFIG_NAME
    model = read_yaml(config).get("model") if config.is_file() else None
    return model if isinstance(model, str) and os.path.exists(model) else None


def absolute(name: str) -> str:
    """A path as an absolute one; what is no path, such as a name of the hub, as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _present(folder: Path) -> list[Path]:
    """What lies in ``folder`` under the names of a run."""
    names = (*RUN_FILES, CHECKPOINTS_NAME, *_CONTENTS)
    return [folder / name for name in names if os.path.lexists(folder / name)]


def _check_own(folder: Path) -> None:
    """Raise FileExistsError, naming it, for what lemo did not write and overwriting would remove.

    A link is never lemo's, so that nothing outside of ``folder`` is ever removed. Where something
    could not be removed, a PermissionError names the folder that it is in.
    """
    strangers = _present(folder) if not _is_run(folder / CONFIG_NAME) else []
    emptied = [folder, folder / REPORT_NAME]
    for name in RUN_FILES:
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            strangers.append(path)
    checkpoints = folder / CHECKPOINTS_NAME
    if checkpoints.is_symlink() or checkpoints.is_file():
        strangers.append(checkpoints)
    elif checkpoints.is_dir():
        known = checkpoint_folders(checkpoints, torn=True)
        emptied += [checkpoints, *known]
        strangers += [entry for entry in checkpoints.iterdir() if entry not in known]
        for entry in known:
            strangers += foreign(entry, CHECKPOINT_FILES)
    for name, own in _CONTENTS.items():
        for path in _versions(folder, name):
            strangers += foreign(path, own)
            emptied.append(path)
    if strangers:
        outermost = [p for p in sorted(set(strangers)) if not set(p.parents) & set(strangers)]
        names = ", ".join(f"'{path.relative_to(folder)}'" for path in outermost[:5])
        raise FileExistsError(
            f"overwrite: lemo did not write {names} in '{folder}' and deletes nothing there; move "
            "that away, or choose another output"
        )
    for path in emptied:
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(
                f"overwrite: '{path}' cannot be changed by this user; nothing was deleted"
            )


def _versions(folder: Path, name: str) -> list[Path]:
    """The folder ``name``, and what a killed process left beside it."""
    names = (name, f".{name}.tmp", f".{name}.old")
    return [folder / each for each in names if os.path.lexists(folder / each)]


def check_config(path: Path) -> None:
    """Raises ValueError, naming the file, where it lacks a setting that every run has written."""
    lacking = sorted(_ALWAYS - set(read_yaml(path)))
    if lacking:
        raise ValueError(
            f"{path}: expected the settings of a run, but it lacks {', '.join(lacking)}; it is "
            "damaged: put back what the run wrote, or start another run"
        )


def _is_run(path: Path) -> bool:
    """Whether ``path`` is the configuration of a run, and not one of somebody else's."""
    try:
        names = set(read_yaml(path))
    except (OSError, ValueError):
        return False
    return names >= _ALWAYS and not names & _NEVER


def _adapter_in(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Configuration and weights of an adapter, to be compared; None where it is not whole."""
    try:
        weights = dict(deserialize((folder / ADAPTER_WEIGHTS).read_bytes()))
        content = dict(read_json(folder / ADAPTER_CONFIG))
    except (OSError, SafetensorError, ValueError, TypeError):
        return None
    config = {
        # PEFT writes sets of names in any order.
        name: sorted(value, key=str) if isinstance(value, list) else value
        for name, value in content.items()
        if name not in ("base_model_name_or_path", "peft_version")
    }
    return config, weights


def _is_of_passes(difference: str) -> bool:
    """Whether it is of the setting that may change with the number of processes."""
    return difference.startswith("gradient_accumulation ")


def _check_inputs(folder: Path, saved: FinetuneConfig, config: FinetuneConfig) -> None:
    """Name a path of the recorded settings that leads nowhere any more."""
    for name, value, recorded in _inputs(config, saved):
        gone = value == recorded and value is not None and not os.path.exists(value)
        # Where a name is no path it may be one of the hub.
        if gone and (os.path.isabs(value) or name != "model"):
            option = name.removeprefix("elimination.")
            raise FileNotFoundError(
                f"{name}: the run in '{folder}' was started with '{value}', which does not exist "
                f"here any more; say with --{option} where it is now"
            )


def _inputs(config: FinetuneConfig, saved: FinetuneConfig) -> list[tuple[str, Any, Any]]:
    pairs = [(name, getattr(config, name), getattr(saved, name)) for name in ("model", "documents")]
    if config.elimination is not None and saved.elimination is not None:
        groups = config.elimination, saved.elimination
        for name in _FILES:
            pairs.append((f"elimination.{name}", *(getattr(group, name) for group in groups)))
    return pairs
