"""Whether the processes of a group have the same batch and the same weights.

Each checks a few numbers of its own against the others', so that all of them raise the same error,
and none goes on alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

__all__ = ["check_batch", "check_weights"]

# An odd number by which a token's number counts differently at every place.
_STRIDE = 0x9E3779B97F4A7C15 - 2**64


def check_batch(given: Mapping[str, Any], device: torch.device, group: ProcessGroup) -> None:
    """Raises ValueError where the tensors of a call differ between the processes.

    Args:
        given: the arguments of the call, by name.
        device: where the numbers are compared.
        group: the processes.
    """
    tensors = {name: x for name, x in sorted(given.items()) if torch.is_tensor(x)}
    # One number for each argument that a model may have; fewer processes know of another.
    numbers = {name: _of_values(tensor).to(device) for name, tensor in tensors.items()}
    names = torch.tensor(hash_of(",".join(numbers)), device=device)
    total = torch.stack([names, *numbers.values()]).sum()
    if not _agree(total[None], group).item():
        raise ValueError(
            f"batch: expected the same in all processes of context_parallel, got others "
            f"({', '.join(tensors)}); give each group of processes the same windows"
        )


def check_weights(
    parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device, group: ProcessGroup
) -> None:
    """Raises ValueError where weights differ between the processes, as their sums tell.

    Args:
        parameters: of the model, by name; those that are sharded are not compared.
        device: where the numbers are compared.
        group: the processes.
    """
    compared = {
        name: _numbers(parameter).sum(dtype=torch.float64).to(device)
        for name, parameter in parameters
        if not (isinstance(parameter, DTensor) or parameter.is_meta)
    }
    if not compared:
        return
    same = _agree(torch.stack([*compared.values()]).view(torch.int64), group).tolist()
    different = [name for name, agrees in zip(compared, same) if not agrees]
    if different:
        raise ValueError(
            f"model: expected the same weights in all processes of context_parallel, got others in "
            f"{', '.join(different[:3])}{', ...' if len(different) > 3 else ''}; seed before "
            "weights are made, or load the same"
        )


def _numbers(parameter: nn.Parameter) -> Tensor:
    """What a parameter holds; of packed weights of 4 bits the bytes, not the floats they may be."""
    values = parameter.detach()
    return values.view(torch.uint8) if hasattr(parameter, "quant_state") else values


def hash_of(text: str) -> int:
    """A number below 2^32 of a text, the same in all processes."""
    number = 0
    for byte in text.encode():
        number = (number * 31 + byte) % 2**32
    return number


def _of_values(tensor: Tensor) -> Tensor:
    """An int64 scalar that other values or another shape change."""
    values = tensor.detach().flatten()
    if values.is_floating_point():
        values = values.double().view(torch.int64)
    places = torch.arange(1, values.numel() + 1, device=values.device) * _STRIDE
    mixed = (values.long() + hash_of(str(list(tensor.shape)))) * places
    return (mixed ^ (mixed >> 29)).sum()


def _agree(numbers: Tensor, group: ProcessGroup) -> Tensor:
    """[n] bool: which of the numbers [n] int64 are the same in all processes."""
    # The largest of x and that of ~x are x and ~x where all are the same.
    both = torch.stack((numbers, ~numbers))
    largest = both.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest[0] == ~largest[1]
