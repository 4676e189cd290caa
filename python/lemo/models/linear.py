"""Linear layers of a model, plain or with LoRA, as one autograd node each.

PEFT's LoRA layer makes several tensors of the size of its result and, where adapters are fp32 and
the model is not, a copy of its input in fp32 that is stored; dropout stores a copy, too. The node
here adds the low-rank products to the result in place and saves the input once, as it came,
whichever of its consumers saves it too. Copies of the input are made again in backward, a chunk of
rows at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lemo.models.adapters import adapted
from lemo.models.dora import apply_dora
from lemo.models.fp8 import Fp8Linear, drop, fp8_of, obstacle
from lemo.models.low_rank import LowRank
from lemo.models.weights import is_plain, matrix_of
from lemo.ops.autograd import first_order_only

__all__ = ["apply_linear", "reads_fp8"]

T = TypeVar("T")


def apply_linear(module: nn.Module, x: Tensor, values: bool = True) -> Tensor:
    """module(x) of a linear layer.

    A frozen linear layer whose matrix is known (`matrix_of`), alone or inside a LoRA layer of PEFT
    (`lemo.models.adapters`), runs as one node. Another layer inside of a LoRA layer runs by its own
    forward, and the pairs as one node behind it. Everything else runs as the module it is;
    `lemo.models.general` says why.

    Args:
        module: any module that maps [R, in] to [R, out].
        x: [R, in].
        values: False where only the gradients of the result count: its values are arbitrary then,
            and the large product is left out where it can be.
    """
    layer = adapted(module)
    if isinstance(layer, str):
        return module(x)
    base, pairs, _ = layer
    dtype, autocast = x.dtype, torch.is_autocast_enabled(x.device.type)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif not layer.casts and any(pair.a.dtype != dtype for pair in pairs):
        return module(x)  # which refuses it
    matrix = matrix_of(base, dtype, autocast)
    # The weight of merged adapters is another one.
    merged = getattr(module, "merged", False)
    if merged:
        drop(base)
    fp8 = None if matrix is None or merged else fp8_of(base, module)
    own = matrix is None or (values and is_plain(base) and base.weight.dtype == dtype)
    if not pairs and own and fp8 is None:
        return base(x)
    if pairs and pairs[0].magnitude is not None:
        if matrix is None:
            return module(x)
        product_dtype = dtype if autocast else pairs[0].a.dtype
        norm_dtype = pairs[0].a.dtype if layer.casts else x.dtype
        bias = base.bias
        return apply_dora(x, matrix, bias, pairs[0], dtype, product_dtype, norm_dtype, values)
    products = tuple(LowRank.of(pair, dtype if autocast else pair.a.dtype) for pair in pairs)
    tensors = [tensor for pair in pairs for tensor in (pair.a, pair.b, pair.bias)]
    width = None if values or matrix is None else base.out_features
    plan = _Plan(matrix, products, dtype, width, fp8)
    if matrix is None:
        return _Linear.apply(x, base(x), None, plan, *tensors)
    return _Linear.apply(x, None, base.bias, plan, *tensors)


def reads_fp8(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `apply_linear` multiplies rows of `dtype` in 8 bits, as far as is known before."""
    layer = adapted(module)
    if isinstance(layer, str) or obstacle(module, layer) is not None:
        return False
    fp8 = fp8_of(layer.base)
    return fp8 is not None and fp8.reads_rows() and matrix_of(layer.base, dtype) is not None


class _Plan(NamedTuple):
    """What a node computes.

    Attributes:
        matrix: gives the weight; None: the base layer has run already.
        products: of the pairs.
        dtype: of the product with the weight.
        width: of the result where its values do not count; None: they do.
        fp8: multiplies with the weight in 8 bits; None: that is done in `dtype`.
    """

    matrix: Callable[[], Tensor] | None
    products: tuple[LowRank, ...]
    dtype: torch.dtype
    width: int | None
    fp8: Fp8Linear | None


class _Linear(torch.autograd.Function):
    """The base layer's product, or its given result, and pairs (three tensors each).

    All operands are in the dtype of autocast before they are multiplied, so it casts nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor | None,
        bias: Tensor | None,
        plan: _Plan,
        *tensors: Tensor | None,
    ) -> Tensor:
        matrix, products, dtype, width, fp8 = plan
        cast, wanted = x.to(dtype), _triples(ctx.needs_input_grad[4:])
        if width is not None:
            y = cast.new_empty(1, 1).expand(x.shape[0], width)
        elif matrix is not None:
            bias_cast = None if bias is None else bias.to(dtype)
            found = None if fp8 is None else fp8.forward(x, cast, matrix, bias_cast)
            y = linear(cast, matrix(), bias_cast) if found is None else found
        else:
            y = result.clone(memory_format=torch.contiguous_format)
        lows, masks = [], []
        saved: list[Tensor | None] = []
        for product, (a, b, b_bias), (_, wants_b, _) in zip(products, _triples(tensors), wanted):
            # Cast once for both passes.
            a, b = a.to(product.dtype), b.to(product.dtype)
            saved += (a, b, b_bias)
            low, bits = product.lower(cast, a)
            if width is None:
                product.add_upper(y, low, b, b_bias)
            lows.append(low if wants_b else None)
            masks.append(bits)
        # The weight is frozen, and one that was made of another kind is made again.
        ctx.plan = plan
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        stored = x if any(wants_a for wants_a, _, _ in wanted) else None
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.save_for_backward(stored, *lows, *masks, *saved)
        return y

    @staticmethod
    @first_order_only("linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        matrix, products, dtype, _, fp8 = ctx.plan
        count = len(products)
        lows, masks, pairs = saved[:count], saved[count : 2 * count], _triples(saved[2 * count :])
        wants_x, wants_result, wants_bias, _, *others = ctx.needs_input_grad
        wanted = _triples(others)
        cast = None if x is None else x.to(dtype)
        dx = None
        if wants_x:
            if matrix is not None:
                found = None if fp8 is None else fp8.input_gradient(dy, matrix)
                dx = dy @ matrix() if found is None else found
            else:  # its own node has given the base layer's
                dx = dy.new_zeros(dy.shape[0], pairs[0][0].shape[1], dtype=dtype)
        gradients: list[Tensor | None] = []
        for product, low, bits, pair, wants in zip(products, lows, masks, pairs, wanted):
            gradients += product.backward(dy, cast, low, bits, pair, wants, dx)
        gradients = [x if x is None else x.to(to) for x, to in zip(gradients, ctx.dtypes)]
        return (
            None if dx is None else dx.to(ctx.x_dtype),
            dy if wants_result else None,
            dy.sum(0).to(ctx.bias_dtype) if wants_bias else None,
            None,
            *gradients,
        )


def _triples(values: Sequence[T]) -> list[tuple[T, T, T]]:
    return list(zip(values[::3], values[1::3], values[2::3]))
