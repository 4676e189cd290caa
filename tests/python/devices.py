"""Where the tests' tensors live, and which dtypes the kernels there know."""

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)


def on_gpu() -> bool:
    """Whether the suite runs with `--device cuda`."""
    return torch.get_default_device().type == "cuda"


def low_precision_dtypes() -> tuple[torch.dtype, ...]:
    """The storage types that every kernel knows, on every device."""
    return LOW_PRECISION


def kernel_dtypes() -> tuple[torch.dtype, ...]:
    """The storage types of an op whose CUDA kernel multiplies on tensor cores: there no fp32."""
    return LOW_PRECISION if on_gpu() else (torch.float32, *LOW_PRECISION)


def working_dtype() -> torch.dtype:
    """The first of `kernel_dtypes`: fp32 on the CPU, bf16 on a GPU."""
    return kernel_dtypes()[0]
