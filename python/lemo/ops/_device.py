"""Which devices the ops run on."""

# The device types on which every op of a training step has a kernel. residual_scatter and
# select_norm have CUDA kernels already, but the method needs all ops on one device.
_DEVICE_TYPES = frozenset({"cpu"})


def supports_device(device_type: str) -> bool:
    """Whether all ops that elimination needs run on a device type ("cpu", "cuda").

    The one place that knows. "cuda" is not in it yet: single ops take CUDA tensors where the
    library is built with CUDA, but the scores, the selection, the attention and the loss have no
    CUDA kernels and raise NotImplementedError there.
    """
    return device_type in _DEVICE_TYPES
