"""Which modules of a model lemo does not run in its own code, and why.

Such a module runs as the module it is, with its own autograd nodes. What it stores for backward is
its own affair; mostly it is more than lemo's nodes store.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lemo.models.calls.interception import is_intercepted, kind_of
from lemo.models.layers.architectures import Architecture, active_module
from lemo.models.memory.sharded import as_if_whole
from lemo.models.projections.adapters import adapted
from lemo.models.projections.weights import is_plain, matrix_of

__all__ = ["by_reason", "general_modules"]


def general_modules(architecture: Architecture) -> dict[str, str]:
    """See `lemo.Handle.general_modules`."""
    causal_lm = architecture.causal_lm
    weight = causal_lm.get_input_embeddings().weight
    # Names of `causal_lm` itself: those that messages and configurations of PEFT use.
    names = {module: name for name, module in causal_lm.named_modules()}
    with as_if_whole(causal_lm):
        reasons = list(_reasons(architecture, weight.dtype, weight.device))
    return {names[module]: reason for module, reason in reasons}


def by_reason(found: Mapping[str, str]) -> list[str]:
    """A line for each reason of `general_modules`, with the number of modules and the first one."""
    modules: dict[str, list[str]] = {}
    for name, reason in found.items():
        modules.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
        for reason, names in modules.items()
    ]


def _reasons(
    architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[nn.Module, str]]:
    for index in range(architecture.num_layers):
        yield from _of_norm(architecture, architecture.attention_norm(index), dtype)
        for module in architecture.attention_projections(index):
            yield from _of_linear(module, dtype, device)
        yield from _of_norm(architecture, architecture.mlp_norm(index), dtype)
        projections = architecture.mlp_projections(index)
        if projections is None:
            mlp: Any = architecture.layer(index).mlp
            yield mlp, f"{kind_of(mlp)} or a hook in place of the model's own MLP"
        for module in projections or ():
            yield from _of_linear(module, dtype, device)
    if architecture.last_norm is not None:
        yield from _of_norm(architecture, architecture.last_norm, dtype)
    head = architecture.lm_head
    if not is_plain(active_module(head)):
        yield head, f"{kind_of(active_module(head))} or hooks in place of a plain head"


def _of_norm(
    architecture: Architecture, norm: nn.Module, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, str]]:
    if architecture.runs_norm(norm, dtype):
        return
    active = active_module(norm)
    weight = getattr(active, "weight", None)
    if weight is not None and weight.dtype != dtype and not is_intercepted(active):
        yield norm, f"its weight is {_name(weight.dtype)} and the rows are {_name(dtype)}"
    else:
        yield norm, f"{kind_of(active)} or hooks in place of the model's own norm"


def _of_linear(
    module: nn.Module, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[nn.Module, str]]:
    layer = adapted(module)
    if isinstance(layer, str):
        yield module, layer
        return
    autocast = torch.is_autocast_enabled(device.type)
    if autocast:
        dtype = torch.get_autocast_dtype(device.type)
    if matrix_of(layer.base, dtype, autocast) is not None:
        return
    reason = _of_base(layer.base, dtype)
    if layer.pairs and layer.pairs[0].magnitude is not None:
        yield module, f"DoRA over a layer that has no plain frozen matrix: {reason}"
    else:
        yield layer.base, reason


def _of_base(base: nn.Module, dtype: torch.dtype) -> str:
    """Why `matrix_of` gives none."""
    if is_intercepted(base):
        return "a hook or a replaced forward"
    computes = getattr(base, "compute_dtype", None)
    if computes not in (None, dtype):
        return f"{kind_of(base)} computes in {_name(computes)} and the rows are {_name(dtype)}"
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    packed = getattr(state, "packing_format_for_cpu", False)
    if state is not None and not packed and state.dtype not in (dtype, torch.float32):
        return f"{kind_of(base)} stands for {_name(state.dtype)} and the rows are {_name(dtype)}"
    if type(base) is not nn.Linear:
        return f"{kind_of(base)}, whose product is its own"
    weight = base.weight
    if weight.requires_grad:
        return "its weight is trained"
    if not is_plain(base):
        kind = f"its weight is {kind_of(weight)}"
        if weight.dtype == dtype:
            return kind
        return f"{kind} of {_name(weight.dtype)} and the rows are {_name(dtype)}"
    return f"its weight is {_name(weight.dtype)} and the rows are {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
