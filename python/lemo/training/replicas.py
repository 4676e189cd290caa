"""The processes of a run: which take windows of their own, and which share those of others."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

from lemo.distributed import ContextParallel
from lemo.settings.finetune import FinetuneConfig


@dataclass(frozen=True)
class Replicas:
    """Groups of processes, each of which trains on windows of its own.

    Attributes:
        count: how many groups there are.
        index: the group of this process, from 0.
        size: processes of a group.
        context: those of this one, which share out the rows of a window; None: it is alone.
    """

    count: int
    index: int
    size: int
    context: ContextParallel | None

    @classmethod
    def of(cls, config: FinetuneConfig, accelerator: Accelerator) -> Replicas:
        """The groups that a run asks for.

        Raises:
            ValueError: the number of processes is no multiple of those of a group.
        """
        processes, size = accelerator.num_processes, config.context_parallel
        if processes % size:
            raise ValueError(
                f"context_parallel: expected a divisor of the {processes} processes of this run, "
                f"got {size}; start them with torchrun --nproc_per_node {size} or a multiple"
            )
        if size == 1:
            return cls(processes, accelerator.process_index, 1, None)
        shape = processes // size, size
        mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp", "cp"))
        # Whoever takes the mean over the groups takes that over all of their processes.
        context = ContextParallel(mesh, averages_gradients=False)
        return cls(shape[0], context.replica, size, context)
