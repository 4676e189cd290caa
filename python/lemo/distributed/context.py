"""A group of processes that train on one batch together, each on its share of the kept rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lemo.distributed.agreement import check_batch, check_weights
from lemo.ops.autograd import first_order_only

__all__ = ["ContextParallel"]

_DIMENSION = "cp"
_OUTSIDE = "context_parallel: expected processes that include this one, got others alone"


class ContextParallel:
    """The processes that share out the kept rows of one batch (docs/MULTI_GPU.md).

    All of them call the model with the same batch, and the kept set is the same. Each computes the
    layers and the loss for its own rows. The loss is that of all rows in every process. What a
    process adds to the gradients is `size` times the part of its own rows, so that the mean over
    the group is the gradient of the loss, as it is of any other graph that all of them have.

    Attributes:
        group: the processes.
        rank: of this process in the group.
        size: how many they are.
        replica: which of the groups this is, counted from 0: each draws other random blocks.
        head_groups: in how many parts the heads of keys and values are gathered.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None = None,
        averages_gradients: bool = True,
        head_groups: int = 4,
    ) -> None:
        """Takes the processes.

        Args:
            group: they; or a mesh with a dimension "cp", or with one dimension alone; None: all.
            averages_gradients: whether the mean of the parameters' gradients over the group is
                taken, of each when backward is done with it, so that every process has the gradient
                of the loss. False: somebody else does, such as DDP or FSDP over this group, or over
                all processes of several groups.
            head_groups: parts of keys and values; while one is computed with, the next is gathered.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            TypeError, ValueError: `group` is none, does not hold this process, or has no dimension
                "cp"; `head_groups` is less than 1.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "context_parallel: expected torch.distributed to be initialised, got no process "
                "group; start with torchrun and call torch.distributed.init_process_group"
            )
        if isinstance(head_groups, bool) or not isinstance(head_groups, int) or head_groups < 1:
            raise ValueError(f"head_groups: expected a number of at least 1, got {head_groups!r}")
        self.group, replica = _resolved(group)
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        self.replica = dist.get_global_rank(self.group, 0) if replica is None else replica
        self.averages_gradients = averages_gradients
        self.head_groups = head_groups
        # Held, because a parameter itself does not hold its node, and the hook goes with it.
        self._nodes: dict[int, tuple[Node, RemovableHandle]] = {}
        self._has_begun = False

    @classmethod
    def of(cls, given: ContextParallel | ProcessGroup | DeviceMesh) -> ContextParallel:
        """What `lemo.enable` was given, as one of these for one model alone."""
        return given.copy() if isinstance(given, ContextParallel) else cls(given)

    def copy(self) -> ContextParallel:
        """The same processes, for another model."""
        copied = ContextParallel(self.group, self.averages_gradients, self.head_groups)
        copied.replica = self.replica
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        # Of a copied model: a group cannot be copied, and the hooks are those of its parameters.
        return self.copy()

    def __reduce__(self) -> Any:
        raise TypeError(
            "context_parallel: a group of processes cannot be pickled; call handle.remove() before "
            "the model is pickled"
        )

    def from_first(self, values: Tensor) -> Tensor:
        """`values` of the group's first process, in all of them."""
        values = values.clone(memory_format=torch.contiguous_format)
        dist.broadcast(values, dist.get_global_rank(self.group, 0), self.group)
        return values

    def total(self, part: Tensor) -> Tensor:
        """The sum over the group of a part that each process has.

        It has a graph to this process's part, whose gradient is multiplied by `size`.
        """
        return _Total.apply(part, self)

    def begin(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        """Begins a pass with a loss.

        From the first one on every backward pass adds the mean of the gradients over the group, if
        this is to take it.

        Args:
            model: whose parameters they are.
            given: the arguments of the call.

        Raises:
            ValueError: other processes of the group have another batch, or other weights.
            NotImplementedError: weights are sharded, and this is to take the mean.
        """
        first = next(model.parameters())
        check_batch(given, first.device, self.group)
        if not self._has_begun:
            check_weights(model.named_parameters(), first.device, self.group)
            if self.averages_gradients and any(isinstance(p, DTensor) for p in model.parameters()):
                raise NotImplementedError(
                    "context_parallel: expected whole weights where lemo takes the mean of their "
                    "gradients, got sharded ones; shard over a mesh that holds the group, and use "
                    "lemo.ContextParallel(..., averages_gradients=False)"
                )
            self._has_begun = True
        if not self.averages_gradients:
            return
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in self._nodes:
                # Before accumulation, so that gradients of earlier passes are not sent again, and
                # before whatever reads them, such as DDP's hooks. It does not run where gradients
                # are asked for by torch.autograd.grad, as recomputation does inside.
                node = get_gradient_edge(parameter).node
                self._nodes[id(parameter)] = node, node.register_prehook(self._averaged)

    def stop_averaging(self) -> None:
        """Ends what `begin` began."""
        for _, hook in self._nodes.values():
            hook.remove()
        self._nodes = {}

    def _averaged(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else self.average(g) for g in gradients)

    def average(self, values: Tensor) -> Tensor:
        """The mean over the group, without a graph."""
        mean = values.detach().clone(memory_format=torch.contiguous_format)
        # gloo knows no mean.
        dist.all_reduce(mean, group=self.group)
        return mean.div_(self.size)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, context: ContextParallel) -> Tensor:
        ctx.size = context.size
        total = part.clone()
        dist.all_reduce(total, group=context.group)
        return total

    @staticmethod
    @first_order_only("context_parallel")
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        return ctx.size * dtotal, None


def _resolved(group: ProcessGroup | DeviceMesh | None) -> tuple[ProcessGroup, int | None]:
    """(the processes, which of the groups they are or None if that is not known)."""
    group = dist.group.WORLD if group is None else group
    if isinstance(group, ProcessGroup):
        return group, None
    # What torch gives the processes that are in no group, in place of it.
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_OUTSIDE)
    if not isinstance(group, DeviceMesh):
        raise TypeError(
            "context_parallel: expected a process group, a device mesh or a lemo.ContextParallel, "
            f"got {type(group).__name__}"
        )
    coordinate = group.get_coordinate()
    if coordinate is None:
        raise ValueError(_OUTSIDE)
    if group.ndim == 1:
        return group.get_group(), None
    names = group.mesh_dim_names or ()
    if _DIMENSION not in names:
        raise ValueError(
            f"context_parallel: expected a mesh with a dimension '{_DIMENSION}', got "
            f"{list(names) or f'{group.ndim} dimensions without names'}"
        )
    replica = 0
    for name, place, size in zip(names, coordinate, group.mesh.shape):
        if name != _DIMENSION:
            replica = replica * size + place
    return group.get_group(_DIMENSION), replica
