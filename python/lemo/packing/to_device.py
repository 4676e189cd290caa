"""Copies to a device that the host does not wait for."""

import torch
from torch import Tensor

__all__ = ["index_tensors", "to_device"]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, by a copy from the host that the host does not wait for."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=not x.is_cuda)


def index_tensors(device: torch.device | str | None, *values: list[int]) -> list[Tensor]:
    """int32 tensors of some numbers, by one copy for which the host does not wait.

    Args:
        device: where they go; None: torch's default device.
        values: the numbers of each tensor.
    """
    joined = torch.tensor([n for part in values for n in part], dtype=torch.int32, device="cpu")
    place = torch.empty(0, device=device).device
    parts = to_device(joined, place).split([len(part) for part in values])
    # Tensors of their own: kernels may load them in wider units than their place in `joined`.
    return [part.clone() for part in parts]
