"""Linear layers of a model, plain or with LoRA, as one autograd node each.

PEFT's LoRA layer makes three tensors of the size of its result and, where adapters are fp32 and
the model is not, a copy of its input in fp32. The node here adds the low-rank product to the
result in place, computes in the dtype of the input and saves the input once, whichever of its
consumers saves it too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lemo.models.interception import has_own_forward, is_intercepted
from lemo.models.weights import is_plain, matrix_of
from lemo.ops._autograd import first_order_only

__all__ = ["apply_linear", "lora_of"]

# PEFT's classes of LoRA around a linear layer, which differ in the layer that they expect.
_LORA = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
)


def apply_linear(module: nn.Module, x: Tensor, values: bool = True) -> Tensor:
    """module(x) of a linear layer.

    A frozen linear layer whose matrix is known (`matrix_of`), alone or inside a plain LoRA layer of
    PEFT (one active adapter, no active dropout), runs as one node. Everything else runs as the
    module it is.

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
    matrix = matrix_of(base, dtype)
    if matrix is None or (adapter is None and values and is_plain(base)):
        return module(x)
    bias = None if base.bias is None else base.bias.to(dtype)
    a, b, scaling = adapter or (None, None, 0.0)
    width = None if values else base.out_features
    return _Linear.apply(x, matrix, bias, a, b, scaling, width, dtype)


def lora_of(module: nn.Module) -> tuple[list[Tensor], bool]:
    """(both matrices of each active LoRA pair of PEFT, whether one has dropout)."""
    if not hasattr(module, "lora_A") or module.disable_adapters:
        return [], False
    active = [name for name in module.active_adapters if name in module.lora_A]
    pairs = [part[name].weight for name in active for part in (module.lora_A, module.lora_B)]
    drops = [module.lora_dropout[name] for name in active]
    return pairs, any(not isinstance(drop, nn.Identity) and drop.p > 0 for drop in drops)


def _parts(module: nn.Module) -> tuple[nn.Module | None, tuple[Tensor, Tensor, float] | None]:
    """(linear layer, (A, B, scaling) of its LoRA pair or None); (None, None): no such."""
    if isinstance(module, nn.Linear):
        return module, None
    cls = type(module)
    if (cls.__module__, cls.__name__) not in _LORA:
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
        or not isinstance(base, nn.Linear)
    ):
        return None, None
    pair = module.lora_A[active[0]], module.lora_B[active[0]]
    drop = module.lora_dropout[active[0]]
    without_dropout = isinstance(drop, nn.Identity) or not drop.training or drop.p == 0
    if not without_dropout or not all(is_plain(part) and part.bias is None for part in pair):
        return None, None
    return base, (pair[0].weight, pair[1].weight, module.scaling[active[0]])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Callable[[], Tensor],
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        width: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.x_dtype, ctx.scaling = x.dtype, scaling
        # All operands are in the dtype of autocast from here on, so it finds nothing to cast.
        x = x.to(dtype)
        low = None if a is None else x @ a.to(dtype).T
        if width is None:
            y = linear(x, matrix(), bias)
            if low is not None:
                y.addmm_(low, b.to(dtype).T, alpha=scaling)
        else:
            y = x.new_empty(1, 1).expand(x.shape[0], width)
        # The weight is frozen, and a quantised one is made again.
        ctx.matrix = matrix
        ctx.save_for_backward(None if a is None else x, low, a, b)
        return y

    @staticmethod
    @first_order_only("linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b = ctx.needs_input_grad[:5]
        dx = (dy @ ctx.matrix()) if needs_x else None
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
