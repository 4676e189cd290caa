"""Where the tests' tensors live, and which dtypes the kernels there know."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_suite = torch.device("cpu")

LOW_PRECISION = (torch.bfloat16, torch.float16)


def use(device: str) -> None:
    """Makes `device` the suite's; called once, before tests are collected."""
    global _suite
    _suite = torch.device(device)
    if device != "cpu":
        # Tensors that a test makes without naming a device, also while tests are collected.
        torch.set_default_device(device)


def on_gpu() -> bool:
    """Whether the suite runs with `--device cuda`."""
    return _suite.type == "cuda"


def kernel_dtypes() -> tuple[torch.dtype, ...]:
    """The storage types of an op whose CUDA kernel multiplies on tensor cores: there no fp32."""
    return LOW_PRECISION if on_gpu() else (torch.float32, *LOW_PRECISION)


def working_dtype() -> torch.dtype:
    """The first of `kernel_dtypes`: fp32 on the CPU, bf16 on a GPU."""
    return kernel_dtypes()[0]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raises where the host waits for the GPU; on the CPU there is nothing to wait for."""
    if not on_gpu():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
