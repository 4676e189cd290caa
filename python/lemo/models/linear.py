"""Linear layers of a model, plain or with LoRA, as one autograd node each.

PEFT's LoRA layer makes three tensors of the size of its result and, where adapters are fp32 and
the model is not, a copy of its input in fp32. The node here adds the low-rank product to the
result in place, computes in the dtype of the input and saves the input once, whichever of its
consumers saves it too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lemo.models.interception import has_own_forward, is_intercepted
from lemo.ops._autograd import first_order_only

__all__ = ["apply_linear", "is_plain"]


def apply_linear(module: nn.Module, x: Tensor, values: bool = True) -> Tensor:
    """module(x) of a linear layer.

    A frozen `nn.Linear`, alone or inside a plain LoRA layer of PEFT (one active adapter, no active
    dropout), runs as one node. Everything else runs as the module it is.

    Args:
        module: any module that maps [R, in] to [R, out].
        x: [R, in].
        values: False where only the gradients of the result count: its values are arbitrary then,
            and the large product is left out where it can be.
    """
    base, adapter = _parts(module)
    if base is None:
        return module(x)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    elif adapter is not None and adapter[0].dtype != dtype:
        # Without autocast PEFT computes in the adapter's dtype, and so it stays.
        return module(x)
    if base.weight.dtype != dtype or (adapter is None and values):
        return module(x)
    a, b, scaling = adapter or (None, None, 0.0)
    return _Linear.apply(x, base.weight, base.bias, a, b, scaling, values, dtype)


def _parts(module: nn.Module) -> tuple[nn.Linear | None, tuple[Tensor, Tensor, float] | None]:
    """(frozen linear layer, (A, B, scaling) of its LoRA pair or None); (None, None): no such."""
    if is_plain(module) and _is_frozen(module):
        return module, None
    cls = type(module)
    if cls.__module__ != "peft.tuners.lora.layer" or cls.__name__ != "Linear":
        return None, None
    active = [name for name in module.active_adapters if name in module.lora_A]
    base = module.base_layer
    if (
        module.disable_adapters
        or module.merged
        or len(active) != 1
        or active[0] in getattr(module, "lora_variant", active)
        or is_intercepted(module)
        or not has_own_forward(cls)
        or not (is_plain(base) and _is_frozen(base))
    ):
        return None, None
    pair = module.lora_A[active[0]], module.lora_B[active[0]]
    drop = module.lora_dropout[active[0]]
    without_dropout = isinstance(drop, nn.Identity) or not drop.training or drop.p == 0
    if not without_dropout or not all(is_plain(part) and part.bias is None for part in pair):
        return None, None
    return base, (pair[0].weight, pair[1].weight, module.scaling[active[0]])


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` is the product of `nn.Linear` and nothing else."""
    return type(module) is nn.Linear and has_own_forward(nn.Linear) and not is_intercepted(module)


def _is_frozen(module: nn.Linear) -> bool:
    return not any(p.requires_grad for p in module.parameters())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        values: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.x_dtype, ctx.scaling = x.dtype, scaling
        # All operands are in the dtype of autocast from here on, so it finds nothing to cast.
        x = x.to(dtype)
        low = None if a is None else x @ a.to(dtype).T
        if values:
            y = linear(x, weight, bias)
            if low is not None:
                y.addmm_(low, b.to(dtype).T, alpha=scaling)
        else:
            y = x.new_empty(1, 1).expand(x.shape[0], weight.shape[0])
        ctx.save_for_backward(None if a is None else x, low, weight, a, b)
        return y

    @staticmethod
    @first_order_only("linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b = ctx.needs_input_grad[:5]
        dx = (dy @ weight) if needs_x else None
        da = db = None
        if a is not None:
            d_low = dy @ b.to(dy.dtype)
            if needs_x:
                dx.addmm_(d_low, a.to(dy.dtype), alpha=ctx.scaling)
            if needs_a:
                da = (d_low.T @ x).mul_(ctx.scaling).to(a.dtype)
            if needs_b:
                db = (dy.T @ low).mul_(ctx.scaling).to(b.dtype)
        return None if dx is None else dx.to(ctx.x_dtype), None, None, da, db, None, None, None
