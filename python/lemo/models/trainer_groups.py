"""Trainers whose processes share out the kept rows of a batch (`lemo.ContextParallel`).

Accelerate's ParallelismConfig with a `cp_size` already gives the processes of a group the same
batches, counts steps by groups, and shards the weights over all processes by FSDP2, without which
it has no `cp_size`. What it does to a batch afterwards, cutting its tokens and replacing the
model's attention, lemo does instead, by kept rows.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
import transformers
from torch import nn

from lemo.distributed.context import ContextParallel

__all__ = ["check_alone", "cp_size_of", "share_out"]

_HOW = (
    "lemo.enable(model, config, context_parallel=mesh) with mesh = "
    "args.parallelism_config.get_device_mesh(args.device.type), then handle.attach(trainer)"
)


def cp_size_of(parallelism: Any) -> int:
    """Processes of a group by accelerate's ParallelismConfig; 1 where there is none."""
    return int(getattr(parallelism, "cp_size", None) or 1)


def check_alone() -> None:
    """Refuses a training pass of a process that has all rows where accelerate cuts sequences.

    Raises:
        ValueError: accelerate was told to share out the tokens of each sequence.
    """
    accelerate = sys.modules.get("accelerate")  # who has told it anything has imported it
    if accelerate is None:
        return
    state = accelerate.state.AcceleratorState._shared_state
    size = cp_size_of(state.get("parallelism_config"))
    if size > 1:
        raise ValueError(
            f"parallelism_config: expected cp_size 1, got {size}: accelerate would give each of "
            f"{size} processes a part of the tokens, of which lemo chooses on its own; to share "
            f"out the kept rows instead: {_HOW}"
        )


def share_out(trainer: transformers.Trainer, context: ContextParallel | None) -> Callable[[], None]:
    """Makes a trainer leave its batches whole for the processes of a group.

    Args:
        trainer: before it trains.
        context: the group; None: lemo was told of none.

    Returns:
        What undoes it.

    Raises:
        ValueError: trainer and lemo have other groups, or labels are counted in each process alone.
    """
    accelerator = trainer.accelerator
    size = cp_size_of(getattr(accelerator, "parallelism_config", None))
    if context is None:
        if size > 1:
            check_alone()
        return _nothing
    if size == 1 and context.size == 1:
        return _nothing
    _check_group(trainer, size, context)
    # FSDP takes the mean over all processes, those of a group among them.
    before = context.averages_gradients
    context.averages_gradients = False
    context.stop_averaging()
    accelerator._prepare_cp = _leave_modules
    trainer._prepare_context_parallel_inputs = _leave_batch
    # By which TRL divides the tokens that it counts, of processes that have the same batch.
    repeated = getattr(trainer, "_tp_size", None)
    if repeated is not None:
        trainer._tp_size = repeated * size

    def undo() -> None:
        context.averages_gradients = before
        if repeated is not None:
            trainer._tp_size = repeated
        for holder, name, ours in (
            (accelerator, "_prepare_cp", _leave_modules),
            (trainer, "_prepare_context_parallel_inputs", _leave_batch),
        ):
            if vars(holder).get(name) is ours:
                delattr(holder, name)

    return undo


def _check_group(trainer: transformers.Trainer, size: int, context: ContextParallel) -> None:
    """Refuses a trainer whose groups of `size` processes are not that of lemo; see `share_out`."""
    if size != context.size:
        raise ValueError(
            f"trainer: expected one that gives {context.size} processes the same batch, got "
            f"cp_size {size}; set parallelism_config=ParallelismConfig(cp_size={context.size}, "
            "dp_shard_size=the number of groups) of its arguments, and FSDP2 (fsdp_version 2)"
        )
    theirs = trainer.accelerator.torch_device_mesh["cp"].get_group()
    ranks = (dist.get_process_group_ranks(group) for group in (theirs, context.group))
    both = tuple(sorted(each) for each in ranks)
    if both[0] != both[1]:
        raise ValueError(
            f"trainer: expected the group of processes that lemo.enable was given, {both[1]}, got "
            f"{both[0]}; {_HOW}"
        )
    if not trainer.args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices: expected true with context_parallel, where a step has "
            "one loss over the labels of all groups, got false"
        )


def _nothing() -> None:
    pass


def _leave_modules(*prepared: Any) -> tuple[Any, ...]:
    """In place of hooks that take the attention mask from the model."""
    return prepared


def _leave_batch(
    model: nn.Module, inputs: dict[str, Any]
) -> tuple[Callable[[], AbstractContextManager[None]], dict[str, Any]]:
    """In place of cutting the tokens of a batch."""
    return nullcontext, inputs
