"""swiglu: silu(gate) * up, whose backward pass works in the storage of its inputs."""

import torch
from torch import Tensor

from lemo.ops.autograd import first_order_only
from lemo.ops.call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::swiglu")
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("lemo::swiglu_fp8")
def _(gate, up):
    values = gate.new_empty(gate.shape, dtype=torch.float8_e4m3fn)
    scales = gate.new_empty((gate.shape[0], 1), dtype=torch.float32)
    return gate.new_empty(gate.shape), values, scales


@torch.library.register_fake("lemo::swiglu_backward")
def _(dout, gate, up):
    return None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, fp8):
        ctx.save_for_backward(gate, up)
        if not fp8:
            return call(_ops.swiglu, gate, up)
        # No zeros for what has no gradient.
        ctx.set_materialize_grads(False)
        y, values, scales = call(_ops.swiglu_fp8, gate, up)
        ctx.mark_non_differentiable(values, scales)
        return y, values, scales

    @staticmethod
    @first_order_only("swiglu")
    def backward(ctx, dout, *_):
        gate, up = ctx.saved_tensors
        if torch._C._autograd._get_current_graph_task_keep_graph():
            # A second backward pass wants the values.
            dgate, dup = gate.clone(), up.clone()
            call(_ops.swiglu_backward, dout, dgate, dup)
        else:
            call(_ops.swiglu_backward, dout, gate, up)
            # Whoever still wants the values gets autograd's error.
            torch.autograd.graph.increment_version((gate, up))
            dgate, dup = gate.detach(), up.detach()
        return (
            dgate if ctx.needs_input_grad[0] else None,
            dup if ctx.needs_input_grad[1] else None,
            None,
        )


def _consumable(x: Tensor) -> Tensor:
    """`x` if backward may overwrite it: contiguous, and in no leaf's storage; else a copy."""
    owner = x if x._base is None else x._base
    return x.clone(memory_format=torch.contiguous_format) if owner.is_leaf else x.contiguous()


def _consumables(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = _consumable(gate), _consumable(up)
    # Backward would write the one's gradient over the other, where they overlap.
    return gate, up.clone() if _share_storage(gate, up) else up


def _share_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, in fp32 and rounded once (arXiv 2002.05202).

    Backward keeps `gate` and `up` alone and overwrites them with their gradients, so it allocates
    nothing. Other references to them see the changed values; autograd raises where somebody else's
    backward pass needs their values again. Leaves, and views of them, are copied first and stay as
    they are. With `retain_graph=True` the gradients are tensors of their own.

    Args:
        gate: [R, F] float.
        up: [R, F] of gate's dtype.

    Returns:
        [R, F] of gate's dtype. Differentiable once.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Swiglu.apply(*_consumables(gate, up), False)
    return call(_ops.swiglu, gate, up)


def swiglu_fp8(gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(y, rows): `swiglu`, and what `fp8_rows` makes of its result, in one pass over memory.

    Args:
        gate, up: as for `swiglu`.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y, *rows = _Swiglu.apply(*_consumables(gate, up), True)
    else:
        y, *rows = call(_ops.swiglu_fp8, gate, up)
    return y, (rows[0], rows[1])
