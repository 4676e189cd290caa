"""What the backward passes of the ops share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def first_order_only(op: str) -> Callable[[Callable], Callable]:
    """A backward pass that raises NotImplementedError where it would be differentiated itself.

    torch's `once_differentiable` does not do: its result has no edge to the op's inputs, so
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
            return backward(ctx, *gradients)

        return run

    return decorate


def overwritable(gradient: Tensor, *others: Tensor) -> Tensor:
    """`gradient`, contiguous, in memory that nobody else reads: itself, or a copy of it.

    Autograd hands one tensor to every input of a sum, and to the first node the caller's own.

    Args:
        gradient: [T, H], as backward got it.
        others: the other gradients of the same node.
    """
    storage = gradient.untyped_storage()
    owned = gradient.is_contiguous() and gradient._use_count() == 1
    # One reference is the tensor's, the other one `storage`.
    owned = owned and torch._C._storage_Use_Count(storage._cdata) == 2
    owned = owned and all(storage._cdata != other.untyped_storage()._cdata for other in others)
    return gradient if owned else gradient.clone(memory_format=torch.contiguous_format)
