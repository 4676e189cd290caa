"""In what a model's products of frozen weights are computed, where that is not its own dtype."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lemo.models.calls.interception import kind_of
from lemo.models.layers.architectures import Architecture
from lemo.models.memory.sharded import is_sharded
from lemo.models.projections.adapters import adapted
from lemo.models.projections.fp8 import Fp8Linear, check_gpu, setting_of, why_unquantised
from lemo.models.projections.torchao_weights import is_torchao, is_torchao_float8

__all__ = ["Fp8Products"]

# The linear layers of an MLP that somebody has changed.
_MLP = ("gate_proj", "up_proj", "down_proj")
_LAST = "the last layer's MLP, whose error reaches the loss most directly"
_QUERIES_KEYS = "queries and keys, whose error changes what attention looks at"


class Fp8Products:
    """Products in 8 bits of the layers of a decoder.

    Those of queries, keys, the last MLP and the head stay as they are.

    A weight's copy in 8 bits is made again where PEFT has merged adapters into the weight or
    unloaded them, where it was written to as a tensor, and where it was trained for some passes.
    Other writes through `weight.data` are not seen (a look at the values would wait for the GPU):
    enable again after them.

    Args:
        architecture: access to the model.
        fast: as of `lemo.ops.fp8_product`.
    """

    def __init__(self, architecture: Architecture, fast: bool = False) -> None:
        self._architecture, self._fast = architecture, fast
        self._step = 0
        self._attention: list[Fp8Linear] | None = None
        # By layer; none where the MLP runs as the module that it is.
        self._mlps: dict[int, list[Fp8Linear]] = {}

    def install(self) -> None:
        """Makes the layers compute so, until `remove`.

        Raises:
            NotImplementedError: a GPU without such products.
            ValueError: the weights are quantised in another way, or sharded.
        """
        causal_lm = self._architecture.causal_lm
        self.check()
        check_gpu(next(causal_lm.parameters()).device, self._fast)
        names = self._names()
        for module, _ in self._projections():
            base = _base_of(module)
            _check_base(base, names[base], self._fast)
        architecture = self._architecture
        self._attention = []
        for index in range(architecture.num_layers):
            _, _, *others = architecture.attention_projections(index)
            self._attention += self._put_on(others, names, index)
        self._follow_mlps()

    def remove(self) -> None:
        """Undoes `install`."""
        for layer in self._layers():
            layer.remove()
        self._attention, self._mlps = None, {}

    def begin_step(self, step: int) -> None:
        """Tells that optimizer step `step`, from 0, begins; see `Fp8Linear.begin_step`."""
        self._step = step
        for layer in self._layers():
            layer.begin_step(step)

    def check(self) -> None:
        """Follows what the model has become; refuses weights that are sharded, by now.

        Raises:
            ValueError: they are.
        """
        layers: Any = self._architecture.decoder.layers
        for layer in layers:
            if is_sharded(layer):
                raise ValueError(
                    "products: expected 'dtype' where weights are sharded (fully_shard), whose "
                    f"copy in 8 bits would not be, got '{setting_of(self._fast)}'"
                )
        for layer in self._layers():
            layer.follow_training()
        self._follow_mlps()

    def unquantised(self) -> dict[str, str]:
        """See `lemo.Handle.unquantised_products`."""
        if self._attention is None:
            return {}
        self._follow_mlps()
        names, reasons = self._names(), {}
        for module, reason in self._projections():
            reason = reason or why_unquantised(module)
            if reason is not None:
                reasons[names[_base_of(module)]] = reason
        return reasons

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Products are the model's own inside."""
        layers = self._layers()
        for layer in layers:
            layer.paused = True
        try:
            yield
        finally:
            for layer in layers:
                layer.paused = False

    def _layers(self) -> list[Fp8Linear]:
        return [*(self._attention or ()), *(x for layers in self._mlps.values() for x in layers)]

    def _names(self) -> dict[nn.Module, str]:
        return {module: name for name, module in self._architecture.causal_lm.named_modules()}

    def _projections(self) -> Iterator[tuple[nn.Module, str | None]]:
        """The linear layers with their adapters, and what is around them that runs them itself.

        An MLP of another kind, in which they are not found, stands for them.
        """
        architecture = self._architecture
        for index in range(architecture.num_layers):
            queries, keys, *others = architecture.attention_projections(index)
            yield from ((module, _QUERIES_KEYS) for module in (queries, keys))
            yield from ((module, None) for module in others)
            projections = architecture.mlp_projections(index)
            if projections is not None:
                for module in projections:
                    yield module, _LAST if index == architecture.num_layers - 1 else None
                continue
            mlp: Any = architecture.layer(index).mlp
            known = {*mlp.modules()}
            found = [x for x in (getattr(mlp, name, None) for name in _MLP) if x in known]
            inside: list[Any] = found or [mlp]
            for module in inside:
                yield module, f"{kind_of(mlp)} or a hook in place of the model's own MLP"

    def _follow_mlps(self) -> None:
        """Takes 8 bits from MLPs that run as the module that they are, and gives them to others."""
        if self._attention is None:
            return
        names: dict[nn.Module, str] = {}
        for index in range(self._architecture.num_layers - 1):
            projections = self._architecture.mlp_projections(index)
            if projections is None:
                for layer in self._mlps.pop(index, ()):
                    layer.remove()
            elif index not in self._mlps:
                names = names or self._names()
                self._mlps[index] = self._put_on(projections, names, index)

    def _put_on(
        self, projections: Iterable[nn.Module], names: dict[nn.Module, str], index: int
    ) -> list[Fp8Linear]:
        bases = map(_base_of, projections)
        return [
            Fp8Linear(base, names[base], self._fast, index, self._step)
            for base in bases
            if hasattr(base, "in_features")
        ]


def _base_of(module: nn.Module) -> nn.Module:
    """The layer without adapters."""
    layer = adapted(module)
    return getattr(module, "base_layer", module) if isinstance(layer, str) else layer.base


def _check_base(module: Any, name: str, fast: bool) -> None:
    quantised = None
    if type(module).__module__.startswith("bitsandbytes."):
        quantised = module
    elif is_torchao(module) and not is_torchao_float8(module):
        quantised = module.weight
    if quantised is not None:
        raise ValueError(
            "products: expected 'dtype' over weights that are quantised in another way than "
            f"float8, got '{setting_of(fast)}' and {kind_of(quantised)} as {name}"
        )
