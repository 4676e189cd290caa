"""Modules whose weights FSDP2 shards over processes (`torch.distributed.fsdp.fully_shard`).

FSDP gathers the weights of a module in hooks around its forward, gathers them again in hooks on the
gradients of its outputs, and reduces the gradients of the weights in a node in front of its inputs.
lemo computes layers itself, so it does that inside the forward of the module: what FSDP does then,
prefetching and mixed precision included, is what it does for the model's own code.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lemo.ops._autograd import first_order_only, hand_on, is_owned

__all__ = ["gathered", "is_sharded", "own_class", "run_inside", "sharded_modules"]

T = TypeVar("T")


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module."""
    return isinstance(module, FSDPModule)


def sharded_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of everything in a model that `fully_shard` was called on."""
    return [(name, module) for name, module in model.named_modules() if is_sharded(module)]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of a sharded one that which it had before."""
    cls = type(module)
    return cls.__bases__[-1] if is_sharded(module) else cls


def run_inside(module: nn.Module, function: Callable[..., T], *tensors: Tensor) -> T:
    """function(*tensors), as the forward of `module` where that is sharded.

    The hooks of the module run, so its weights are whole inside, and in the backward pass of what
    happened inside.

    Args:
        module: any.
        function: returns tensors, or what PyTorch knows to hold tensors. It may overwrite those
            that it gets.
        tensors: what the module computes from: FSDP reduces the gradients of the weights when
            theirs are there.
    """
    if not is_sharded(module):
        return function(*tensors)

    def forward(*given: Tensor) -> T:
        return function(*(_Overwritable.apply(x) if x.requires_grad else x for x in given))

    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        # Past the checkpointing of Transformers' layers, which lemo has its own for.
        return nn.Module.__call__(module, *tensors)
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """The weights of sharded modules are whole inside, for what needs no gradients."""
    with ExitStack() as stack:
        for module in modules:
            if is_sharded(module) and any(isinstance(p, DTensor) for p in module.parameters()):
                stack.callback(module.reshard)
                module.unshard()
        yield


class _Overwritable(torch.autograd.Function):
    """The same memory, as a tensor that may be changed in place.

    FSDP's node in front of a module returns its inputs, and autograd refuses changes of those.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    @first_order_only("sharded layer")
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return hand_on(ctx, dx) if is_owned(ctx, dx) else dx
