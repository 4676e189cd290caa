"""The output folder of a preparation: it appears complete or not at all."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lemo.files import put_folder, restore_folder
from lemo.predictors.storage import DESCRIPTION_FILE, WEIGHTS_FILE
from lemo.settings.preparation import PredictorSettings

__all__ = ["check_output", "description_of", "publish", "work_folder"]


def check_output(output: Path, overwrite: bool) -> None:
    """Raises FileExistsError where a new folder must not take the place of what is at `output`.

    What a preparation that was killed had moved away from there is put back before.

    Args:
        output: where the folder of `lemo prepare` is to appear.
        overwrite: an earlier one, or an empty folder, may be replaced; anything else never.
    """
    restore_folder(output)
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"output: '{output}' exists; choose another folder, or overwrite it")
    ours = {WEIGHTS_FILE, DESCRIPTION_FILE}
    if not output.is_dir() or not {entry.name for entry in output.iterdir()} <= ours:
        raise FileExistsError(
            f"output: expected a folder with nothing but {DESCRIPTION_FILE} and {WEIGHTS_FILE} to "
            f"overwrite, got '{output}'; nothing is replaced"
        )


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, removed with all that is in it at the end."""
    # A fixed name: what a killed run left behind, maybe gigabytes, goes with the next run.
    work = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(result: Path, output: Path, overwrite: bool) -> None:
    """Moves the finished folder `result` to `output`; where this fails the old one stays.

    Args:
        result: in a folder of `work_folder`.
        output: where it is to appear.
        overwrite: as for `check_output`.

    Raises:
        FileExistsError: see `check_output`; something may have appeared since it was called first.
        OSError: the system cannot move a folder.
    """
    check_output(output, overwrite)
    put_folder(result, output)


def description_of(
    model: nn.Module,
    shape: dict[str, Any],
    settings: PredictorSettings,
    parameters: int,
    lengths: Collection[int],
    held_out: int,
) -> dict[str, Any]:
    """What predictor.json says of predictors of every kind.

    Args:
        model: that they are for.
        shape: of the model, as `lemo.predictors.model.model_description` gives it.
        settings: of the preparation.
        parameters: numbers of the predictors.
        lengths: tokens of each training window.
        held_out: windows that were tested on.
    """
    size = torch.bfloat16.itemsize * parameters
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    used = settings.to_dict()
    return {
        "model": shape,
        "block_size": settings.block_size,
        "num_layers": shape["num_layers"],
        "hidden_size": shape["hidden_size"],
        "target": settings.target,
        "lengths": sorted(set(lengths)),
        "windows": {"training": len(lengths), "held_out": held_out},
        "parameters": parameters,
        "bytes": size,
        "model_bytes": model_bytes,
        "share_of_model": size / model_bytes,
        # Those of the command hold paths, too.
        "settings": {name: used[name] for name in PredictorSettings.model_fields},
    }
