"""swiglu: silu(gate) * up, whose backward pass works in the storage of its inputs."""

import torch
from torch import Tensor

from lemo.ops._autograd import first_order_only
from lemo.ops._call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::swiglu")
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("lemo::swiglu_backward")
def _(dout, gate, up):
    return None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return call(_ops.swiglu, gate, up)

    @staticmethod
    @first_order_only("swiglu")
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        call(_ops.swiglu_backward, dout, gate, up)
        # Whoever still wants the values, a second backward pass included, gets autograd's error.
        torch.autograd.graph.increment_version((gate, up))
        dgate, dup = gate.detach(), up.detach()
        return (
            dgate if ctx.needs_input_grad[0] else None,
            dup if ctx.needs_input_grad[1] else None,
        )


def _consumable(x: Tensor) -> Tensor:
    """`x` if backward may overwrite it: contiguous, and in no leaf's storage; else a copy."""
    owner = x if x._base is None else x._base
    return x.clone(memory_format=torch.contiguous_format) if owner.is_leaf else x.contiguous()


def _share_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, in fp32 and rounded once (arXiv 2002.05202).

    Backward keeps `gate` and `up` alone and overwrites them with their gradients, so it allocates
    nothing. Other references to them see the changed values; autograd raises where somebody else's
    backward pass, or a second one through this op (`retain_graph`), needs their values again.
    Leaves, and views of them, are copied first and stay as they are.

    Args:
        gate: [R, F] float.
        up: [R, F] of gate's dtype.

    Returns:
        [R, F] of gate's dtype. Differentiable once.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        gate, up = _consumable(gate), _consumable(up)
        # Backward would write the one's gradient over the other, where they overlap.
        return _Swiglu.apply(gate, up.clone() if _share_storage(gate, up) else up)
    return call(_ops.swiglu, gate, up)
