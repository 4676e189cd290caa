"""Whether a module is still what it was in forward, where it is computed once more later.

Autograd raises where a tensor that it has saved was changed since. What is computed again, by
lemo's recomputation or for logits that are read later, saves less and reads the rest from the
module.
"""

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lemo.models.memory.sharded import is_sharded
from lemo.models.projections.weights import parameters_of, place_of, version_of

__all__ = ["AsInForward"]

# By which PEFT's layers say what they add.
_OF_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
# What draws anew at every call, beside torch's generators of random numbers, whose state is
# restored: where PEFT's layers have it, by the names of adapters.
_DRAWN_FROM = {
    "lora_monteclora_sampler": "MonteCLoRA",
    "pvera_generator": "PVeRA with a generator_seed",
}


class AsInForward:
    """What a module is when this is made.

    Args:
        module: is computed again later.
        parameters: its `parameters_of`; None: they are looked for.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor] | None = None) -> None:
        self._module = module
        self._parameters = parameters_of(module) if parameters is None else parameters
        self._versions = _versions(self._parameters)
        self._places = [*map(place_of, self._parameters)]
        self._switches, self._drawing = _read(module)

    def difference(self) -> str | None:
        """What is another now, in words; None: nothing."""
        now = parameters_of(self._module)
        same = len(now) == len(self._parameters) and all(map(_are_same, now, self._parameters))
        same = same and [*map(place_of, self._parameters)] == self._places
        if not same and not self._is_sharded():
            return "other weights"
        if _versions(self._parameters) != self._versions:
            return "weights that were changed in place since"
        if _read(self._module)[0] != self._switches:
            return "other active, merged, disabled or scaled adapters, or other dropout"
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a call of the module: checks it, and notes what the call itself changes.

        PEFT's LoRA of parameters (`target_parameters`) puts its weight aside and back in each call,
        which counts as a change in place.

        Raises:
            RuntimeError, ValueError: as of `check`.
        """
        self.check()
        try:
            yield
        finally:
            self._versions = _versions(self._parameters)

    def _is_sharded(self) -> bool:
        """Whether FSDP2 puts other tensors into it for forward; those of now are checked there."""
        return any(map(is_sharded, self._module.modules()))

    def check(self) -> None:
        """Refuses to compute the module again in backward.

        Raises:
            RuntimeError: it is another than in forward.
            ValueError: adapters inside draw noise that they cannot draw again.
        """
        if self._drawing is not None:
            raise ValueError(
                "recompute: expected 'none' and no gradient checkpointing for layers with "
                f"{self._drawing}, which draws other noise at every call, got a "
                f"{type(self._module).__name__} that backward computes again; the head, whose "
                "logits always are, cannot have it"
            )
        difference = self.difference()
        if difference is not None:
            raise RuntimeError(
                f"model: expected {type(self._module).__name__} to have the same weights, adapters "
                "and dropout in backward, which computes it again, as in forward, got "
                f"{difference}; run backward while those of forward are in place "
                "(torch.func.functional_call puts the model's own back when it returns)"
            )


def _are_same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    # Weights that hooks bring from the host are on the meta device between two calls.
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    # On the CPU PEFT's DoRA puts a new parameter of the same memory into layers of bitsandbytes. In
    # others it would hide later changes, which are counted for each parameter.
    if a.requires_grad or b.requires_grad or not type(a).__module__.startswith("bitsandbytes."):
        return False
    found = ((x.data_ptr(), x.shape, x.stride(), x.dtype, type(x)) for x in (a, b))
    return next(found) == next(found)


def _versions(parameters: Sequence[Tensor]) -> list[int | None]:
    return [None if parameter.is_meta else version_of(parameter) for parameter in parameters]


def _read(module: nn.Module) -> tuple[list[Any], str | None]:
    """What the modules inside say of adapters, and of dropout where there is any; and which kind of
    adapter draws noise of its own, None: none does."""
    found: list[Any] = []
    drawing = None
    # Walked by hand, as in `parameters_of`.
    waiting = [module]
    while waiting:
        each = waiting.pop()
        said = each.__dict__
        if "_active_adapter" in said:
            found += (copy.copy(said.get(name)) for name in _OF_ADAPTERS)
            drawing = drawing or _drawing(each)
        share: Hashable = said.get("p", said.get("dropout"))
        if share:
            found.append(share if said["training"] else None)
        waiting += [child for child in each._modules.values() if child is not None]
    return found, drawing


def _drawing(layer: Any) -> str | None:
    """The kind of an adapter of a layer of PEFT that draws noise of its own; None: none does."""
    said = layer.__dict__
    for name, kind in _DRAWN_FROM.items():
        held = said.get(name) or layer._modules.get(name)
        if not held or not layer.training or layer.disable_adapters or layer.merged:
            continue
        if any(each in held and held[each] is not None for each in layer.active_adapters):
            return kind
    return None
