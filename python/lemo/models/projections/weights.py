"""Frozen weights of linear layers as matrices: plain ones, and others made plain.

A quantised layer computes with its weight in the dtype of its input, which it makes anew at every
call, as autocast does with weights of another dtype. lemo calls a layer several times where it
works in chunks of rows; inside `kept_matrices` the matrix is made once.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lemo.models.calls.interception import has_own_forward, is_intercepted
from lemo.models.projections.torchao_weights import dequantiser_of, is_torchao_float8, multiplies

__all__ = [
    "held",
    "is_computed",
    "is_plain",
    "kept_matrices",
    "matrix_of",
    "once",
    "parameters_of",
    "place_of",
    "stored_as",
    "version_of",
]

# What `kept_matrices` keeps: by its owner's id, the owner (so that the id stays its own) and its
# matrix. Backward runs in another thread than forward.
_kept: dict[int, tuple[object, Tensor]] = {}
_depth = 0


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module and of those inside, each once, in whatever order."""
    # Walked by hand: every pass asks for them, and torch's own walk takes milliseconds.
    found: dict[int, nn.Parameter] = {}
    waiting = [module]
    while waiting:
        each = waiting.pop()
        for parameter in each._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
        waiting += [child for child in each._modules.values() if child is not None]
    return list(found.values())


def held(module: nn.Module, name: str) -> Any:
    """A parameter of a module, or the tensor that somebody has put in its place; None: neither.

    A hypernetwork may make a weight anew in every step, which is no parameter then.
    """
    # A module's own getattr is slow, and this is asked for every layer of every pass.
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def is_computed(module: nn.Module) -> bool:
    """Whether a module's weight or bias is a tensor that is no parameter."""
    of = module.__dict__
    return isinstance(of.get("weight"), Tensor) or isinstance(of.get("bias"), Tensor)


def version_of(weight: Tensor) -> int | None:
    """How often a weight was changed in place, by other ways than `.data`; None: not counted."""
    return None if weight.is_inference() else weight._version


def place_of(weight: Tensor) -> Hashable:
    """Where the parts of a weight are in memory: elsewhere once `weight.data` has been set, which
    does not count as a change in place."""
    if type(weight) in (nn.Parameter, Tensor):
        return weight.data_ptr()
    # Quantised weights: what is read is not the tensor's own memory, or not that alone.
    if hasattr(weight, "__tensor_flatten__"):
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        return type(weight), *(place_of(part) for part in parts if isinstance(part, Tensor))
    state = getattr(weight, "quant_state", None)
    scales = [getattr(state, name, None) for name in ("absmax", "offset")]
    scales.append(getattr(getattr(state, "state2", None), "absmax", None))
    addresses = [None if part is None else part.data_ptr() for part in scales]
    return type(weight), weight.data_ptr(), *addresses


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` is the product of `nn.Linear` with a plain weight, nothing else.

    torchao puts a tensor of its own kind into an `nn.Linear`.
    """
    if type(module) is not nn.Linear:
        return False
    return (
        type(held(module, "weight")) in (nn.Parameter, Tensor)
        and has_own_forward(nn.Linear)
        and not is_intercepted(module)
    )


def matrix_of(
    module: nn.Module, dtype: torch.dtype, cast: bool = False
) -> Callable[[], Tensor] | None:
    """What gives the weight [out, in] of a linear layer with a frozen one, in `dtype`.

    None where the layer's product is not known to be one with such a matrix: its own forward has to
    run then. Known are `nn.Linear` with a weight of this dtype (with `cast` of any, as under
    autocast), plain or of the kinds of torchao that `torchao_weights` knows, and
    `bitsandbytes.nn.Linear4bit` that computes in this dtype (QLoRA, arXiv 2305.14314).

    It is called in forward and in backward, and both times it is the matrix of the weight that the
    module has now: another one may take its place in between, as PEFT's merging puts it there. It
    raises RuntimeError where this weight was changed in place, as autograd does for what it saves.
    """
    if is_plain(module):
        weight = module.weight
        if weight.requires_grad:
            return None
        kept = weight.detach()  # the same memory, also where `weight.data` becomes another one
        if kept.dtype == dtype:
            return _unchanged(weight, lambda: kept)
        return _unchanged(weight, lambda: once(module, dtype, kept.to)) if cast else None
    dequantise = dequantiser_of(module)
    if dequantise is not None:
        quantised: Any = module.weight
        if quantised.requires_grad or not (cast or multiplies(quantised, dtype)):
            return None
        return _unchanged(quantised, partial(once, module, dtype, dequantise))
    # The layer computes in a dtype of its own where it has one. Forward it rounds to that of the
    # rows, backward to that which was quantised before.
    rounds_once = (dtype, torch.float32)
    if (
        _is_bitsandbytes_4bit(module)
        and module.compute_dtype in (None, dtype)
        and module.weight.quant_state.dtype in rounds_once
    ):
        dequantise = partial(_dequantised, module.weight.data, module.weight.quant_state)
        return _unchanged(module.weight, partial(once, module, dtype, dequantise))
    return None


def stored_as(module: nn.Module) -> str | None:
    """What the planner calls the way in which a weight is stored that is made plain; None: it is
    plain, or its layer computes with it."""
    if is_torchao_float8(module):
        return "float8"
    if dequantiser_of(module) is not None:
        return "torchao_int"
    return "nf4" if _is_bitsandbytes_4bit(module) else None


def _unchanged(weight: Tensor, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`make`, which raises RuntimeError once `weight` has been changed in place."""
    version = version_of(weight)

    def checked() -> Tensor:
        if version_of(weight) != version:
            raise RuntimeError(
                f"weight: expected that of a frozen layer, {list(weight.shape)}, to have the same "
                "values in backward as in forward, got one that was changed in place since"
            )
        return make()

    return checked


@contextmanager
def kept_matrices() -> Iterator[None]:
    """Matrices that are made of weights of another kind inside are kept until the end."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _kept.clear()


def once(owner: object, dtype: torch.dtype, make: Callable[[torch.dtype], Tensor]) -> Tensor:
    """make(dtype), or what it gave before inside the same `kept_matrices`.

    Args:
        owner: whose matrix it is.
        dtype: of the matrix.
        make: makes it.
    """
    found = _kept.get(id(owner))
    if found is not None and found[1].dtype == dtype:
        return found[1]
    matrix = make(dtype)
    if _depth:
        _kept[id(owner)] = owner, matrix
    return matrix


def _is_bitsandbytes_4bit(module: nn.Module) -> bool:
    cls = type(module)
    if cls.__name__ not in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return False
    if cls.__module__ != "bitsandbytes.nn.modules" or is_intercepted(module):
        return False
    state = getattr(module.weight, "quant_state", None)
    # Not quantised yet, or packed for evaluation on the CPU: left to the layer.
    return state is not None and not getattr(state, "packing_format_for_cpu", False)


@torch.no_grad()
def _dequantised(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The matrix of bitsandbytes' weight in 4 bits, whose scales are in its state."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state).to(dtype)
