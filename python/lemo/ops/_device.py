"""Which devices the ops run on."""

import torch

from lemo import _C

# What the kernels are written for: mma.sync with bf16 and cp.async (sm_80).
_LEAST_CAPABILITY = (8, 0)


def supports_device(device_type: str) -> bool:
    """Whether all ops that elimination needs run on a device type ("cpu", "cuda") of this machine.

    The one place that knows. "cuda" needs a build with CUDA kernels and a current GPU of compute
    capability 8.0 or higher.
    """
    if device_type == "cpu":
        return True
    return (
        device_type == "cuda"
        and _C.build_info()["cuda"]
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= _LEAST_CAPABILITY
    )
