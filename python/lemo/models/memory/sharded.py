"""Modules whose weights FSDP2 shards over processes (`torch.distributed.fsdp.fully_shard`).

FSDP gathers the weights of a module in hooks around its forward, gathers them again in hooks on the
gradients of its outputs, and reduces the gradients of the weights in a node in front of its inputs.
lemo computes layers itself, so it does that inside the forward of the module: what FSDP does then,
prefetching and mixed precision included, is what it does for the model's own code.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.tensor import DTensor

from lemo.ops.autograd import first_order_only, hand_on, is_owned

__all__ = [
    "as_if_whole",
    "check_inner_modules",
    "check_layers",
    "check_unflattened",
    "check_whole",
    "gathered",
    "held_tensors",
    "is_sharded",
    "own_class",
    "run_inside",
]

T = TypeVar("T")

# Looks at a module's children after which they are looked up again.
_AGAIN = 100

_PASSES_ON = "RegisterPostBackwardFunctionBackward"


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module."""
    return isinstance(module, FSDPModule)


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module and of those inside; not of modules that came lately."""
    return _Walk.through(module).tensors()


def check_unflattened(model: nn.Module) -> None:
    """Refuses weights that FSDP1 holds.

    Raises:
        ValueError: it does.
    """
    if not (_has_processes() and _has_flat_weights(model)):
        return
    raise ValueError(
        "model: expected weights that are whole, or sharded by FSDP2 "
        "(torch.distributed.fsdp.fully_shard; fsdp_version: 2 of Accelerate), got "
        "FullyShardedDataParallel (FSDP1), which hides the layers' parameters"
    )


def check_layers(layers: nn.ModuleList) -> None:
    """Refuses layers that lemo computes itself and of which parts are sharded by themselves.

    Raises:
        ValueError: there are such.
    """
    if not _has_processes():
        return
    for index, layer in enumerate(layers):
        if not _Walk.through(layer).finds_inside(FSDPModule):
            continue
        for name, module in layer.named_modules():
            if name and is_sharded(module):
                raise ValueError(
                    f"model: expected layers sharded as a whole, got fully_shard on {name} of "
                    f"layer {index}, whose parts lemo computes itself; shard the layer instead, or "
                    "set path to 'generic'"
                )


def check_inner_modules(causal_lm: nn.Module, *inner: nn.Module) -> None:
    """Refuses sharded modules out of which lemo takes more than they return.

    Raises:
        ValueError: one of `inner`, other than the causal LM, is sharded.
    """
    for module in inner:
        if module is not causal_lm and is_sharded(module):
            raise ValueError(
                f"model: expected fully_shard on layers and on {own_class(causal_lm).__name__} or "
                f"what is around it, got it on the {own_class(module).__name__} inside; shard that "
                "model instead"
            )


def check_whole(module: nn.Module, name: str) -> None:
    """Refuses a module whose weights are in parts where lemo computes with them.

    Parts of it that are sharded by themselves are whole when they run.

    Raises:
        ValueError: as by tensor parallelism, or outside of the forward of what FSDP2 shards.
    """
    if not _has_processes() or not _Walk.through(module).finds_parts():
        return
    waiting = [module]
    while waiting:
        each = waiting.pop()
        for of, parameter in each._parameters.items():
            if isinstance(parameter, DTensor):
                raise ValueError(
                    f"model: expected whole weights while {name} runs, got '{of}' as a DTensor on "
                    f"{parameter.device_mesh}; call the module that fully_shard was called on "
                    "last, and train without tensor parallelism"
                )
        children = (child for child in each._modules.values() if child is not None)
        waiting += [child for child in children if not is_sharded(child)]


def _has_processes() -> bool:
    """Whether weights can be sharded at all, which takes a group of processes."""
    return distributed.is_available() and distributed.is_initialized()


def _has_flat_weights(model: nn.Module) -> bool:
    """Whether FSDP1 holds the parameters: flat ones in their place, or views that it made."""
    if not getattr(model, "_is_fsdp_managed_module", False):
        if isinstance(model, FullyShardedDataParallel):
            return True
        return _Walk.through(model).finds_inside(FullyShardedDataParallel)
    parameters = list(model.parameters())
    flat = any(hasattr(p, "_fsdp_flattened") or isinstance(p, FlatParameter) for p in parameters)
    return flat or not parameters


class _Walk:
    """The modules inside of one, as they were found not long ago.

    Every pass asks for every layer, and PEFT's layers have dozens of modules, so that looking for
    them took 10 ms a pass. Weights that are cut, modules that are sharded and layers that are
    wrapped are seen at once; other modules that came later are within `_AGAIN` looks.

    Args:
        module: any; it and those inside are not kept alive.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._modules = [ref(each) for each in modules]
        self._lists = [ref(each) for each in modules if isinstance(each, nn.ModuleList)]
        self._holders = [ref(each) for each in modules if each._parameters or each._buffers]
        self._looks = 0

    @classmethod
    def through(cls, module: nn.Module) -> "_Walk":
        """That of a module."""
        found = _walks.get(module)
        if found is None or found._looks >= _AGAIN:
            found = _walks[module] = cls(module)
        found._looks += 1
        return found

    def finds_inside(self, wanted: type[Any]) -> bool:
        """Whether a module inside is of this class."""
        if any(isinstance(each(), wanted) for each in self._modules[1:]):
            return True
        # Layers are what FSDP1 and others wrap, putting something new into their list.
        lists = (each() for each in self._lists)
        return any(
            isinstance(layer, wanted) for each in lists if each is not None for layer in each
        )

    def tensors(self) -> Iterator[Tensor]:
        """The parameters and buffers that the modules have now."""
        for each in self._holders:
            module = each()
            if module is not None:
                for held in (module._parameters, module._buffers):
                    for tensor in held.values():
                        if tensor is not None:
                            yield tensor

    def finds_parts(self) -> bool:
        """Whether some weight is in parts."""
        for each in self._holders:
            module = each()
            if module is not None:
                for parameter in module._parameters.values():
                    if isinstance(parameter, DTensor):
                        return True
        return False


_walks: WeakKeyDictionary[nn.Module, _Walk] = WeakKeyDictionary()


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of a sharded one that which it had before."""
    cls = type(module)
    return cls.__bases__[-1] if is_sharded(module) else cls


def run_inside(module: nn.Module, function: Callable[..., T], *tensors: Tensor) -> T:
    """function(*tensors), as the forward of `module` where that is sharded.

    The hooks of the module run, so its weights are whole inside, and in the backward pass of what
    happened inside.

    Args:
        module: any.
        function: returns tensors, or what PyTorch knows to hold tensors. It may overwrite those
            that it gets.
        tensors: what the module computes from: FSDP reduces the gradients of the weights when
            theirs are there.
    """
    if not is_sharded(module):
        return function(*tensors)

    def forward(*given: Tensor) -> T:
        return function(*(_Overwritable.apply(x) if x.requires_grad else x for x in given))

    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        # Past the checkpointing of Transformers' layers, which lemo has its own for.
        return nn.Module.__call__(module, *tensors)
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """The weights of sharded modules are whole inside, for what needs no gradients."""
    with ExitStack() as stack:
        for module in modules:
            in_parts = any(isinstance(p, DTensor) for p in module.parameters())
            if isinstance(module, FSDPModule) and in_parts:
                module.unshard()
                stack.callback(module.reshard)
        yield


@contextmanager
def as_if_whole(model: nn.Module) -> Iterator[None]:
    """Weights in parts look whole inside, without values, for whoever asks what would run."""
    hidden: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for name, weight in module._parameters.items():
                if isinstance(weight, DTensor):
                    hidden.append((module._parameters, name, weight))
                    alike = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                    module._parameters[name] = nn.Parameter(alike, weight.requires_grad)
        yield
    finally:
        for parameters, name, weight in hidden:
            parameters[name] = weight


class _Overwritable(torch.autograd.Function):
    """The same memory, as a tensor that may be changed in place.

    FSDP's node in front of a module returns its inputs, and autograd refuses changes of those.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    @first_order_only("sharded layer")
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        if not is_owned(ctx, dx):
            return dx
        # FSDP's node passes on what it gets, so that the one in front of it may overwrite this.
        node = ctx.next_functions[0][0]
        return hand_on(node if node.name() == _PASSES_ON else ctx, dx)
