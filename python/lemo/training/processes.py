"""The processes of a run: how they begin together, how they end, and what a lost one leaves."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from lemo.settings.finetune import FinetuneConfig
from lemo.training.checkpoint import Checkpoint
from lemo.training.model import pick_device
from lemo.training.run_folder import writing

T = TypeVar("T")

_log = logging.getLogger("lemo")

# How gloo's errors begin, which are plain RuntimeErrors.
_GLOO = "gloo/transport"

# Seconds from one look at NCCL's errors to the next.
_PAUSE = 1.0


def process_state(config: FinetuneConfig) -> PartialState:
    """Rank and device of this process in a run.

    Raises:
        ValueError: the device of ``config`` cannot be had.
    """
    device = pick_device(config.device, config.elimination is not None)
    # Accelerate keeps the device of the first run for the whole process otherwise.
    if PartialState._shared_state != {} and PartialState().device.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    # Said outright, because without a GPU Accelerate does not look for the other processes.
    return PartialState(cpu=device.type == "cpu")


@contextmanager
def process_group() -> Iterator[None]:
    """Closes the process group that a run opens inside; one that was open before stays so.

    After an error it stays, too: the others may not come to the end that all have to reach.
    """
    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        yield
        return
    yield
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # Another run of this process opens a group of its own.
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def naming_lost_processes(folder: Path) -> Iterator[None]:
    """Says what it means where this process cannot reach another one any more.

    Gloo raises an error. NCCL raises none: this process waits for its GPU, and torch aborts it a
    minute after the timeout of the process group. So a thread asks NCCL, and ends this process.

    Args:
        folder: of the run.

    Raises:
        ConnectionError: in place of the errors of torch.distributed.
    """
    message = (
        "processes: another process of the run is gone, or has kept this one waiting for the "
        "timeout of their group, and its own message, if it had one, says why; the checkpoints in "
        f"'{folder}' are whole: start the run again with --resume"
    )
    over = Event()
    watch = Thread(target=_end_with_lost, args=(over, message), name="lemo-lost", daemon=True)
    watch.start()
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or _GLOO in str(error)
        if not lost:
            raise
        raise ConnectionError(message) from error
    finally:
        over.set()
        watch.join()


def _end_with_lost(over: Event, message: str) -> None:
    """Ends this process, with a message, where NCCL has given up another one."""
    while not over.wait(_PAUSE):
        if any(error().name != "SUCCESS" for error in _errors()):
            print(f"lemo: error: {message}", file=sys.stderr, flush=True)
            # Nothing else ends a thread that waits for its GPU, or what that computes from then on.
            os._exit(1)


def _errors() -> list[Callable[[], Any]]:
    """What tells the error of each process group of this process; gloo's have none to tell."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    backends = [group._get_backend(kind) for group in groups for kind in group._device_types]
    return [backend.get_error for backend in backends if hasattr(backend, "get_error")]


def enter_folder(folder: Path, accelerator: Accelerator, stack: ExitStack) -> None:
    """Lock the folder in the main process, for all of them; every process raises its error."""
    errors: list[OSError | None] = [None]
    if accelerator.is_main_process:
        try:
            stack.enter_context(writing(folder))
        except OSError as error:
            errors[0] = error
    broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]


def of_main(compute: Callable[[], T], accelerator: Accelerator) -> T:
    """What the main process computes, for all; every process raises its error."""
    if accelerator.num_processes == 1:
        return compute()
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = compute()
        except Exception as raised:
            found[1] = raised
    broadcast_object_list(found)
    result: T | None = found[0]
    error: Exception | None = found[1]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def check_passes(checkpoint: Checkpoint, config: FinetuneConfig, processes: int) -> None:
    """Refuses to resume with another number of windows in a step than the run began with.

    The number of processes may change where gradient accumulation makes up for it: forward pass
    by forward pass the step is the same then, whichever process does it.

    Raises:
        ValueError: it is another.
    """
    passes = checkpoint.num_processes * checkpoint.gradient_accumulation
    if processes * config.gradient_accumulation != passes:
        hint = f"expected a number of processes that divides {passes}"
        if passes % processes == 0:
            hint = f"expected gradient_accumulation {passes // processes}"
        raise ValueError(
            f"resume: {checkpoint.folder} was written by {checkpoint.num_processes} processes with "
            f"{checkpoint.gradient_accumulation} forward passes of each in a step, {passes} in "
            f"all; {hint}, got {processes} processes with {config.gradient_accumulation}"
        )
    if processes != checkpoint.num_processes and config.lora_dropout > 0:
        _log.warning(
            "resume: %d processes draw other dropout than the %d that wrote %s",
            processes,
            checkpoint.num_processes,
            checkpoint.folder,
        )
