"""Saved activations of a model's own layers, moved to the host layer by layer."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lemo.models.calls.per_thread import in_this_thread
from lemo.models.memory.offload import LayerOffload, OffloadedPass, unpack

__all__ = ["layers_of", "moving_by_layer"]


def layers_of(decoder: nn.Module, num_layers: int) -> list[nn.Module]:
    """The layers of a decoder, in order.

    Raises:
        ValueError: they are in no list of modules.
    """
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ValueError(
        f"host_memory: expected 0, since {type(decoder).__name__} has no list of {num_layers} "
        "layers, by which activations would go to the host"
    )


@contextmanager
def moving_by_layer(offload: OffloadedPass, layers: list[nn.Module]) -> Iterator[None]:
    """Inside, the decoder runs once; what its layers save goes to the host.

    A layer's part begins when the layer is called. A checkpoint function saves the layer's input
    before that: it is of the part before.

    Args:
        offload: of the pass.
        layers: of the decoder.
    """
    if not offload.is_needed or not torch.is_grad_enabled():
        yield
        return
    now: list[LayerOffload] = [offload.begin(0, layers[0])]

    def enter(index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if index:
            offload.end(now[0])
            now[0] = offload.begin(index, module)
        # All of a call but the hidden states belongs to all layers.
        now[0].leave_out(args[1:], kwargs)

    def pack(tensor: Tensor) -> Any:
        return now[0].pack(tensor)

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            hook = in_this_thread(partial(enter, index))
            stack.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        stack.enter_context(saved_tensors_hooks(pack, unpack))
        yield
    offload.end(now[0])
    offload.finish()
