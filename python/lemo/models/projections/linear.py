"""Linear layers of a model, plain or with LoRA, as one autograd node for those of the same rows.

PEFT's LoRA layer makes several tensors of the size of its result and, where adapters are fp32 and
the model is not, a copy of its input in fp32 that is stored; dropout stores a copy, too. The node
here adds the low-rank products to the result in place and saves the input once, as it came,
whichever of its consumers saves it too. Copies of the input are made again in backward, a chunk of
rows at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lemo.models.projections.adapters import Pair, adapted
from lemo.models.projections.dora import apply_dora
from lemo.models.projections.fp8 import Fp8Linear, drop, fp8_of, obstacle
from lemo.models.projections.low_rank import LowRank, below_each_other, shares, stacks
from lemo.models.projections.side_stream import SideStream
from lemo.models.projections.split_low_rank import SplitLowRank, takes_split
from lemo.models.projections.torchao_weights import check_gradient, lacks_backward
from lemo.models.projections.weights import is_plain, matrix_of
from lemo.ops.autograd import first_order_only

__all__ = ["apply_linear", "apply_linears", "reads_fp8"]

_REMEDY = "handle.general_modules() names it, and why lemo does not multiply in place of torch"


def apply_linear(module: nn.Module, x: Tensor, values: bool = True) -> Tensor:
    """module(x) of a linear layer; see `apply_linears`."""
    return apply_linears((module,), x, values)[0]


def apply_linears(
    modules: Sequence[nn.Module], x: Tensor, values: bool = True
) -> tuple[Tensor, ...]:
    """module(x) of each of some linear layers.

    A frozen linear layer whose matrix is known (`matrix_of`), alone or inside a LoRA layer of PEFT
    (`lemo.models.projections.adapters`), runs as a node. Another layer inside of a LoRA layer runs
    by its own forward, and the pairs as a node behind it. Several layers are one node if all of
    them can be: then the gradients of `x` are summed by the products that make them. Everything
    else runs as the module it is; `lemo.models.layers.general` says why.

    Args:
        modules: any modules that map [R, in] to [R, out].
        x: [R, in].
        values: False where only the gradients of the results count: their values are arbitrary
            then, and the large products are left out where they can be.
    """
    several = len(modules) > 1
    parts = [_part_of(module, x, values, several) for module in modules]
    nodes = [part for part in parts if isinstance(part, _Part)]
    if several and len(nodes) < len(parts):
        # One after another: masks of dropout are drawn in the order of the modules.
        return tuple(apply_linear(module, x, values) for module in modules)
    if not nodes:
        return tuple(part(x) for part in parts if not isinstance(part, _Part))
    # A base layer that runs by its own forward has added its bias.
    own = [
        _OfLayer(base(x), None) if plan.matrix is None else _OfLayer(None, base.bias)
        for plan, base, _ in nodes
    ]
    pairs = [_OfPair(pair.a, pair.b, pair.bias) for part in nodes for pair in part.pairs]
    plans = tuple(part.plan for part in nodes)
    return _Linear.apply(x, plans, *chain.from_iterable(own), *chain.from_iterable(pairs))


def _part_of(
    module: nn.Module, x: Tensor, values: bool, several: bool
) -> "_Part | Callable[[Tensor], Tensor]":
    """A layer's part of a node, or what else gives its result.

    Args:
        module, x, values: as of `apply_linears`.
        several: whether the node is to have other layers; alone, a plain layer needs no node.
    """
    layer = adapted(module)
    if isinstance(layer, str):
        _check_own(module, x)
        return module
    base, pairs, _ = layer
    dtype, autocast = x.dtype, torch.is_autocast_enabled(x.device.type)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif not layer.casts and any(pair.a.dtype != dtype for pair in pairs):
        return module  # which refuses it
    matrix = matrix_of(base, dtype, autocast)
    if matrix is None:
        _check_own(base, x)
    # The weight of merged adapters is another one.
    merged = getattr(module, "merged", False)
    if merged:
        drop(base)
    fp8 = None if matrix is None or merged else fp8_of(base, module)
    stored = matrix is not None and is_plain(base) and base.weight.dtype == dtype
    plain = values and fp8 is None and stored
    if not pairs and (matrix is None or (plain and not several)):
        return base
    if pairs and pairs[0].magnitude is not None:
        if matrix is None:
            return module
        product_dtype = dtype if autocast else pairs[0].a.dtype
        norm_dtype = pairs[0].a.dtype if layer.casts else x.dtype
        return partial(
            apply_dora,
            matrix=matrix,
            bias=base.bias,
            pair=pairs[0],
            dtype=dtype,
            product_dtype=product_dtype,
            norm_dtype=norm_dtype,
            values=values,
        )
    products = tuple(_product_of(pair, x, dtype if autocast else pair.a.dtype) for pair in pairs)
    width = None if values or matrix is None else base.out_features
    return _Part(_Plan(matrix, stored, products, dtype, width, fp8), base, pairs)


def _check_own(module: nn.Module, x: Tensor) -> None:
    """Refuses to run a module as it is on rows whose gradients it cannot give."""
    for layer in filter(lacks_backward, module.modules()):
        check_gradient(layer, (x,), f"a linear layer of {list(layer.weight.shape)}", _REMEDY)


def _product_of(pair: Pair, x: Tensor, dtype: torch.dtype) -> LowRank | SplitLowRank:
    """How a pair multiplies rows such as `x`, with products in `dtype`."""
    split = takes_split(pair, x, dtype)
    return SplitLowRank.of(pair) if split else LowRank.of(pair, dtype)


def reads_fp8(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `apply_linear` multiplies rows of `dtype` in 8 bits, as far as is known before."""
    layer = adapted(module)
    if isinstance(layer, str) or obstacle(module, layer) is not None:
        return False
    fp8 = fp8_of(layer.base)
    return fp8 is not None and fp8.reads_rows() and matrix_of(layer.base, dtype) is not None


class _Plan(NamedTuple):
    """What a node computes for a layer.

    Attributes:
        matrix: gives the weight; None: the base layer has run already.
        stored: whether that is the weight itself, and not made of it for a moment.
        products: of the pairs.
        dtype: of the product with the weight.
        width: of the result where its values do not count; None: they do.
        fp8: multiplies with the weight in 8 bits; None: that is done in `dtype`.
    """

    matrix: Callable[[], Tensor] | None
    stored: bool
    products: tuple[LowRank | SplitLowRank, ...]
    dtype: torch.dtype
    width: int | None
    fp8: Fp8Linear | None

    def begins_with_pair(self) -> bool:
        """Whether products with the weight are added to those of a pair, not the other way round.

        A pair's product is bound by what it reads and writes, the base layer's is not: there the
        sum so far is read beside the arithmetic. Either order rounds as often. But a weight that is
        made for the product had to find place beside the sum.
        """
        return self.stored and self.fp8 is None

    def result(
        self,
        x: Tensor,
        cast: Tensor,
        given: Tensor | None,
        bias: Tensor | None,
        begun: Tensor | None,
    ) -> Tensor:
        """[R, out], a tensor of its own, without the pairs but for what is begun.

        Args:
            x: [R, in].
            cast: the same in `dtype`.
            given: the result, where the base layer has run already.
            bias: the base layer's.
            begun: what the base layer's product is added to, in place; None: nothing.
        """
        if begun is not None:
            assert self.matrix is not None
            return begun.addmm_(cast, self.matrix().T)
        if self.width is not None:
            return cast.new_empty(1, 1).expand(x.shape[0], self.width)
        if self.matrix is None:
            assert given is not None
            return given.clone(memory_format=torch.contiguous_format)
        bias = None if bias is None else bias.to(self.dtype)
        found = None if self.fp8 is None else self.fp8.forward(x, cast, self.matrix, bias)
        return linear(cast, self.matrix(), bias) if found is None else found


class _Part(NamedTuple):
    """A layer's part of a node: its plan, the layer without its pairs, and the pairs."""

    plan: _Plan
    base: nn.Module
    pairs: tuple[Pair, ...]


class _OfLayer(NamedTuple):
    """What there is of a layer's operands: the tensors, their dtypes, or whether their gradients
    are wanted.

    Attributes:
        given: the result of a base layer that has run already, [R, out].
        bias: of a base layer that has not, [out].
    """

    given: Any
    bias: Any


class _OfPair(NamedTuple):
    """The same of a pair: A [r, in], B [out, r] and its bias [out]."""

    a: Any
    b: Any
    bias: Any


class _Saved(NamedTuple):
    """What backward needs of a stack of pairs besides the rows; see `LowRank` for the shapes.

    Attributes:
        low: what the As made of the rows; None: no gradient of a B is wanted.
        bits: of the mask.
        weights: for each pair, what to make the products' `a` of.
        bs: for each pair.
    """

    low: Tensor | None
    bits: Tensor | None
    weights: Sequence[Tensor | None]
    bs: Sequence[Tensor]

    def tensors(self) -> list[Tensor | None]:
        return [self.low, self.bits, *self.weights, *self.bs]

    @classmethod
    def taken(cls, tensors: Iterator[Any], pairs: int) -> "_Saved":
        """That of a stack of so many pairs, from the next of what `tensors` gave."""
        low, bits = islice(tensors, 2)
        return cls(low, bits, *(list(islice(tensors, pairs)) for _ in range(2)))


class _Linear(torch.autograd.Function):
    """Base layers' products, or their given results, and pairs.

    All operands are in the dtype of autocast before they are multiplied, so it casts nothing. They
    come as an `_OfLayer` for each layer, and then an `_OfPair` for each pair, in one row.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plans: tuple[_Plan, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        cast = x.to(plans[0].dtype)
        own, pairs = _grouped(tensors, len(plans))
        _, wanted = _grouped(ctx.needs_input_grad[2:], len(plans))
        products = [product for plan in plans for product in plan.products]
        # The layer of each pair.
        layers = [i for i, plan in enumerate(plans) for _ in plan.products]
        ctx.stacks = stacks(products, [(wants.a, wants.b) for wants in wanted])
        saved: list[Tensor | None] = []
        # What each layer's pairs add to its result.
        uppers: list[list[_Upper]] = [[] for _ in plans]
        for places in ctx.stacks:
            product, of_stack = products[places[0]], [pairs[i] for i in places]
            a, weights, bs = product.operands(
                [pair.a for pair in of_stack], [pair.b for pair in of_stack]
            )
            low, bits = product.lower(cast, a)
            for i, b, part in zip(places, bs, shares(low, bs, 1)):
                uppers[layers[i]].append(_Upper(product, part, b, pairs[i].bias))
            low = low if wanted[places[0]].b else None
            saved += _Saved(low, bits, weights, bs).tensors()
        ys = [_result(*each, x, cast) for each in zip(plans, own, uppers)]
        # The weights are frozen, and those that were made of another kind are made again.
        stored = x if any(wants.a for wants in wanted) else None
        ctx.plans, ctx.products, ctx.layers, ctx.shape = plans, products, layers, x.shape
        ctx.save_for_backward(stored, *saved)
        return tuple(ys)

    @staticmethod
    @first_order_only("linear")
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        plans, products, layers = ctx.plans, ctx.products, ctx.layers
        x, *rest = ctx.saved_tensors
        saved = iter(rest)
        wants_x, _, *others = ctx.needs_input_grad
        wanted_own, wanted = _grouped(others, len(plans))
        cast = None if x is None else x.to(plans[0].dtype)
        side = SideStream(dys[0].device)
        dx, begins = None, _begins_with_pairs(plans, products, layers)
        if wants_x and not begins:
            dx = _input_gradient(plans, dys, ctx.shape)
        of_own = [
            _OfLayer(dy if wants.given else None, dy.sum(0) if wants.bias else None)
            for dy, wants in zip(dys, wanted_own)
        ]
        das: list[Tensor | None] = [None] * len(products)
        dbs, dbiases = das.copy(), das.copy()
        for places in ctx.stacks:
            low, bits, weights, bs = _Saved.taken(saved, len(places))
            a = below_each_other([weight for weight in weights if weight is not None])
            product, dys_of_pairs = products[places[0]], [dys[layers[i]] for i in places]
            rows = cast if wanted[places[0]].a else None
            of_as, of_bs, dx = product.backward(
                dys_of_pairs, rows, low, bits, a, bs, dx, wants_x, side
            )
            for i, da in zip(places, of_as):
                das[i] = da
            for i, db in zip(places, of_bs):
                dbs[i] = db
            for i, dy in zip(places, dys_of_pairs):
                if wanted[i].bias:
                    dbiases[i] = product.bias_gradient(dy)
        if wants_x and begins:
            dx = _input_gradient(plans, dys, ctx.shape, dx)
        side.join()
        of_pairs = map(_OfPair, das, dbs, dbiases)
        # Autograd casts gradients to the dtypes of what they are of.
        return dx, None, *chain.from_iterable(of_own), *chain.from_iterable(of_pairs)


def _begins_with_pairs(
    plans: Sequence[_Plan], products: Sequence[LowRank | SplitLowRank], layers: Sequence[int]
) -> bool:
    """Whether the input's gradient begins with that of pairs; see `_Plan.begins_with_pair`."""
    if not products or not all(plan.begins_with_pair() for plan in plans):
        return False
    return products[0].begins_gradient(plans[layers[0]].dtype)


class _Upper(NamedTuple):
    """What a pair adds to a layer's result; see `LowRank.add_upper`."""

    product: LowRank | SplitLowRank
    low: Tensor
    b: Tensor
    bias: Tensor | None


def _result(
    plan: _Plan, own: _OfLayer, uppers: Sequence[_Upper], x: Tensor, cast: Tensor
) -> Tensor:
    """[R, out] of a layer with its pairs."""
    begun = None
    wanted = plan.width is None and plan.begins_with_pair()
    if wanted and uppers and uppers[0].bias is None and own.bias is None:
        begun = uppers[0].product.upper(uppers[0].low, uppers[0].b, plan.dtype)
    y = plan.result(x, cast, own.given, own.bias, begun)
    if plan.width is None:
        for product, *operands in uppers if begun is None else uppers[1:]:
            product.add_upper(y, *operands)
    return y


def _input_gradient(
    plans: Sequence[_Plan], dys: Sequence[Tensor], shape: torch.Size, dx: Tensor | None = None
) -> Tensor:
    """What comes from the base layers whose products are a node's own, added to `dx` in place."""
    for plan, dy in zip(plans, dys):
        if plan.matrix is None:
            continue
        found = None if plan.fp8 is None else plan.fp8.input_gradient(dy, plan.matrix)
        if dx is None:
            dx = dy @ plan.matrix() if found is None else found
        elif found is None:
            dx.addmm_(dy, plan.matrix())
        else:
            dx += found
    return dys[0].new_zeros(shape, dtype=plans[0].dtype) if dx is None else dx


def _grouped(values: Sequence[Any], layers: int) -> tuple[list[_OfLayer], list[_OfPair]]:
    """What a node with so many layers has in one row, by layers and by pairs."""
    first = layers * len(_OfLayer._fields)
    own = zip(*[iter(values[:first])] * len(_OfLayer._fields))
    pairs = zip(*[iter(values[first:])] * len(_OfPair._fields))
    return list(map(_OfLayer._make, own)), list(map(_OfPair._make, pairs))
