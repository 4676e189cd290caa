"""Runs of `lemo finetune` in groups of processes. Run by every rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from lemo.settings.finetune import FinetuneConfig
from lemo.training.finetune import finetune
from lemo.training.run_log import read_log


def losses(folder: str | Path) -> list[float]:
    return [record["loss"] for record in read_log(Path(folder) / "log.jsonl")]


def train(settings: dict[str, Any], dies_behind: int = 0) -> None:
    """A run in this process, one of a group; the last of them dies behind a step, if one is named.

    Args:
        settings: of the run.
        dies_behind: the step.
    """
    torch.set_num_threads(1)
    rank, count = dist.get_rank(), dist.get_world_size()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})  # where nobody looks
    if dies_behind and rank == count - 1:
        step = torch.optim.AdamW.step
        done = iter(range(1, dies_behind + 2))

        def stepped(*args: Any, **kwargs: Any) -> Any:
            if next(done) > dies_behind:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        torch.optim.AdamW.step = stepped
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune(FinetuneConfig.from_dict(settings))


def train_all(runs: list[dict[str, Any]]) -> None:
    for settings in runs:
        train(settings)
