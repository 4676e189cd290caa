"""What PEFT's LoRA layers compute, read from the layers: a base layer and pairs added to it.

Layers are read at every call, so adapters that are added, switched, merged or disabled later are
honoured.
"""

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from lemo.models.calls.interception import has_own_forward, is_intercepted, kind_of
from lemo.models.projections.weights import held, is_plain

__all__ = ["Adapted", "Pair", "adapted"]

# PEFT's classes of LoRA around a linear layer, which differ in the layer that they expect.
_LORA = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
)


class Pair(NamedTuple):
    """A LoRA pair: scaling * (B(A(dropout(x))) + bias) is added to the base layer's result.

    Attributes:
        a, b: [r, in] and [out, r], of one dtype.
        bias: [out], of B (`lora_bias`).
        magnitude: [out], of DoRA (arXiv 2402.09353): the columns' lengths.
        scaling: alpha / r, or what rank patterns and rsLoRA make of it.
        dropout: share of the input's elements that are 0 in this pass.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    scaling: float
    dropout: float


class Adapted(NamedTuple):
    """A linear layer and what is added to its result.

    Attributes:
        base: the layer without its pairs.
        pairs: of all active adapters, in their order; empty where they are merged or disabled.
        casts: whether the input is cast to the pairs' dtype where autocast does not do it.
    """

    base: nn.Module
    pairs: tuple[Pair, ...]
    casts: bool


def adapted(module: nn.Module) -> Adapted | str:
    """How `module` computes, or why that is not known and its own forward has to run.

    Modules that are not PEFT's are base layers without pairs.
    """
    cls, layer = type(module), cast(Any, module)
    if not cls.__module__.startswith("peft."):
        return Adapted(module, (), True)
    if (cls.__module__, cls.__name__) not in _LORA:
        return kind_of(module)
    if is_intercepted(module) or not has_own_forward(cls):
        return "a hook or a forward of somebody else on the LoRA layer"
    # A module's own getattr is slow, and this is asked for every layer of every pass.
    parts = layer._modules
    base = parts["base_layer"]
    if layer.disable_adapters:
        # Its own forward takes merged adapters out of the weight first.
        return "merged adapters that are disabled" if layer.merged else Adapted(base, (), True)
    if layer.merged:
        return Adapted(base, (), True)
    known = parts["lora_A"]._modules
    pairs = []
    for name in layer.active_adapters:
        if name in known:
            pair = _pair(layer, name)
            if isinstance(pair, str):
                return pair
            pairs.append(pair)
    if len(pairs) > 1 and any(pair.magnitude is not None for pair in pairs):
        return "DoRA beside other adapters"
    return Adapted(base, tuple(pairs), getattr(layer, "cast_input_dtype_enabled", True))


def _pair(layer: Any, name: str) -> Pair | str:
    parts = layer._modules
    a, b, drop = (parts[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout"))
    if not (is_plain(a) and is_plain(b)):
        return "a LoRA pair that is more than two products, or has hooks"
    weight_a, weight_b = held(a, "weight"), held(b, "weight")
    if held(a, "bias") is not None:
        return "a LoRA pair whose first product has a bias"
    if weight_a.dtype != weight_b.dtype:
        return "a LoRA pair of two dtypes"
    share = _dropout(drop)
    if share is None:
        return f"lora_dropout that is a {type(drop).__name__}, or has hooks"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):
        # Trained, or one that PEFT's hotswap changes in place, which no node would see.
        return "a scaling that is a tensor"
    variants = getattr(layer, "lora_variant", None)
    magnitude = None
    if variants and name in variants:
        variant = type(variants[name]).__name__
        if variant != "DoraLinearVariant":
            return f"a variant of LoRA, {variant}"
        magnitude = layer.lora_magnitude_vector[name]
        if is_intercepted(magnitude):
            return "hooks on DoRA's magnitude"
        magnitude = magnitude.weight
    return Pair(weight_a, weight_b, held(b, "bias"), magnitude, scaling, share)


def _dropout(module: nn.Module) -> float | None:
    """The share of elements that become 0; None: not known."""
    if is_intercepted(module):
        return None
    if type(module) is nn.Identity:
        return 0.0
    if type(module) is nn.Dropout and has_own_forward(nn.Dropout):
        return module.p if module.training else 0.0
    return None
