"""Frozen weights that torchao has quantised, made plain.

torchao puts a tensor of its own kind into an `nn.Linear`. Known are those whose product is that of
the rows as they come with the dequantised weight: float8 and integers of one value a byte (two
kinds of them) for weights alone, and int4 in the tiles of torch's own kernel ("tinygemm"), for
which torch has no backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lemo.models.calls.interception import has_own_forward, is_intercepted

__all__ = [
    "check_gradient",
    "dequantiser_of",
    "is_torchao",
    "is_torchao_float8",
    "lacks_backward",
    "multiplies",
]

# Rows and columns of a tile of int4 values, and the value that stands for 0.
_TILE, _MIDDLE = (8, 128), 8


def is_torchao(module: nn.Module) -> bool:
    """Whether its weight is a tensor of torchao."""
    return type(getattr(module, "weight", None)).__module__.startswith("torchao.")


def is_torchao_float8(module: nn.Module) -> bool:
    """Whether its weight is e4m3 of torchao, and its input is not quantised."""
    return dequantiser_of(module) is not None and type(module.weight).__name__ == "Float8Tensor"


def dequantiser_of(module: nn.Module) -> Callable[[torch.dtype], Tensor] | None:
    """What makes the matrix [out, in] of a layer with a weight of torchao, in a dtype.

    None where the product is not known to be one with that matrix: the weight is of another kind,
    its input is quantised or scaled, or the layer has hooks or a forward of its own.
    """
    if not is_torchao(module) or type(module) is not nn.Linear:
        return None
    if is_intercepted(module) or not has_own_forward(nn.Linear):
        return None
    weight: Any = module.weight
    kind = _KINDS.get(type(weight).__name__)
    if kind is None or any(getattr(weight, name, True) is not None for name in kind.of_input):
        return None
    return functools.partial(kind.make, weight)


def lacks_backward(module: nn.Module) -> bool:
    """Whether torch has no backward pass of the layer's own product."""
    # Adapters show the weight of the layer inside of them.
    if not isinstance(module, nn.Linear) or not is_torchao(module):
        return False
    kind = _KINDS.get(type(module.weight).__name__)
    return kind is not None and not kind.has_backward


def check_gradient(module: nn.Module, inputs: tuple[Tensor, ...], name: str, remedy: str) -> None:
    """Refuses to run a layer by its own product where a gradient would have to go through it.

    Args:
        module: the layer.
        inputs: its arguments.
        name: of the layer, for the error.
        remedy: what to do, for the error.

    Raises:
        ValueError: it trains, its rows need a gradient, and its product has no backward pass.
    """
    needed = module.training and torch.is_grad_enabled() and inputs[0].requires_grad
    if needed and lacks_backward(module):
        kind = type(module.weight).__name__
        raise ValueError(
            f"model: {name} is int4 of torchao in tiles ({kind}), of whose product torch has no "
            f"backward pass, so that nothing in front of it can be trained; {remedy}"
        )


def multiplies(weight: Any, dtype: torch.dtype) -> bool:
    """Whether a layer with this weight, of a known kind, takes rows of `dtype` without autocast."""
    return weight.dtype == dtype or _KINDS[type(weight).__name__].any_rows


@torch.no_grad()
def _plain(weight: Any, dtype: torch.dtype) -> Tensor:
    return weight.dequantize().to(dtype)


@torch.no_grad()
def _of_int8(weight: Any, dtype: torch.dtype) -> Tensor:
    """[out, in] of values in int8, rounded where torchao's product rounds."""
    if weight.block_size[-1] < weight.shape[-1]:
        return _plain(weight, dtype)
    return weight.qdata.to(dtype).mul_(weight.scale.to(dtype))


@torch.no_grad()
def _of_tiles(weight: Any, dtype: torch.dtype) -> Tensor:
    """[out, in] of int4 values in tiles, those of bf16; both sizes are padded there."""
    codes = _codes(weight.qdata)
    scales, zeros = weight.scale_and_zero.transpose(0, 1).contiguous().unbind(-1)
    groups = (codes.bfloat16() - _MIDDLE).view(*scales.shape, weight.block_size[-1])
    # [N, K / group, group]. Sums of a product are rounded to bf16 once, as in the kernel.
    matrix = torch.addcmul(zeros[..., None], groups, scales[..., None]).view(codes.shape)
    return matrix[: weight.shape[0], : weight.shape[1]].contiguous().to(dtype)


def _codes(tiles: Tensor) -> Tensor:
    """[N, K] uint8 of int4 values in tiles, int32 [N / 8, K / 128, 32, 4]."""
    values = _halves(tiles).index_select(1, _order(tiles.device))
    rows, columns = tiles.shape[:2]
    split = values.view(rows, columns, *_TILE).transpose(1, 2)
    return split.reshape(rows * _TILE[0], columns * _TILE[1])


def _halves(tiles: Tensor) -> Tensor:
    """[tiles, 1024] uint8: the halves of bytes as they are stored."""
    stored = tiles.view(torch.uint8)
    return torch.stack([stored & 15, stored >> 4], -1).view(-1, _TILE[0] * _TILE[1])


@functools.cache
def _order(device: torch.device) -> Tensor:
    """[1024]: where the values of a tile, row by row, are stored in it.

    Found by storing the places themselves, four bits at a time: torch does not say how its kernel
    orders a tile.
    """
    places = torch.arange(_TILE[0] * _TILE[1], device=device).view(_TILE)
    stored = torch.zeros(_TILE[0] * _TILE[1], dtype=torch.int64, device=device)
    for shift in (0, 4, 8):
        bits = places >> shift & 15
        packed = (bits[:, ::2] << 4 | bits[:, 1::2]).to(torch.uint8)
        tiles = torch.ops.aten._convert_weight_to_int4pack(packed, _TILE[1] // 16)
        stored |= _halves(tiles)[0].long() << shift
    return stored.argsort()


class _Kind(NamedTuple):
    """A kind of weight.

    Attributes:
        of_input: what of the weight says that the input is quantised or scaled.
        make: makes the matrix in a dtype.
        any_rows: whether torchao multiplies rows of any dtype with it; else of the weight's alone.
        has_backward: whether torchao's own product has a backward pass.
    """

    of_input: tuple[str, ...]
    make: Callable[[Any, torch.dtype], Tensor]
    any_rows: bool = False
    has_backward: bool = True


_KINDS = {
    "Float8Tensor": _Kind(("act_quant_kwargs",), _plain),
    "Int8Tensor": _Kind(("act_quant_kwargs", "act_pre_scale"), _of_int8, any_rows=True),
    "IntxUnpackedToInt8Tensor": _Kind(("activation_quantization",), _plain),
    "Int4TilePackedTo4dTensor": _Kind(("act_pre_scale",), _of_tiles, has_backward=False),
}
