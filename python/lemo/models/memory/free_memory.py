"""How much memory a pass may take."""

import torch

__all__ = ["free_bytes"]


def free_bytes(device: torch.device, held: int = 0) -> int | None:
    """Bytes that a pass may take on a GPU: those that are free, and those that torch's allocator
    holds without use; None: not a GPU, whose memory is not planned.

    Args:
        device: where it runs.
        held: of those that the allocator holds, what only CUDA graphs use.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(free + unused, round(allowed) - allocated) - held
