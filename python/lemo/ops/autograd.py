"""What the backward passes of the ops share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def first_order_only(op: str) -> Callable[[Callable], Callable]:
    """A backward pass that raises NotImplementedError where it would be differentiated itself.

    Autocast is off in it: its operands have the dtypes of forward.

    torch's `once_differentiable` does not suffice: its result has no edge to the op's inputs, so
    `torch.autograd.grad` takes the second derivative for zero.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def run(ctx: Any, *gradients: Tensor | None) -> Any:
            # On in a backward pass only if its own graph is wanted.
            if torch.is_grad_enabled():
                raise NotImplementedError(
                    f"{op}: second derivatives are not supported: expected a backward pass without "
                    "create_graph, got create_graph=True"
                )
            device = next((x.device.type for x in gradients if x is not None), "cpu")
            if not torch.is_autocast_enabled(device):
                return backward(ctx, *gradients)
            with torch.autocast(device, enabled=False):
                return backward(ctx, *gradients)

        return run

    return decorate


# The attribute that names the node a gradient was made for.
_RECEIVER = "_lemo_receiver"


def is_owned(ctx: Any, gradient: Tensor) -> bool:
    """Whether only this node reads the memory of a gradient, which `hand_on` passed to it."""
    return getattr(gradient, _RECEIVER, None) is ctx


def overwritable(ctx: Any, gradient: Tensor) -> Tensor:
    """`gradient`, contiguous, in memory that nobody else reads: itself, or a copy of it.

    Autograd hands one tensor to every input of a sum, and to the first node the caller's own: those
    are copied.

    Args:
        ctx: the node whose backward pass runs.
        gradient: [T, H], as it got it.
    """
    if is_owned(ctx, gradient) and gradient.is_contiguous():
        return gradient
    return gradient.clone(memory_format=torch.contiguous_format)


def hand_on(ctx: Any, gradient: Tensor) -> Tensor:
    """Passes the gradient of the first input on to the node that made it, which may overwrite it.

    Args:
        ctx: the node whose backward pass runs.
        gradient: in memory that nobody else reads.
    """
    setattr(gradient, _RECEIVER, ctx.next_functions[0][0])
    return gradient
