"""In what a model's products of frozen weights are computed, where that is not its own dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lemo.models.adapters import adapted
from lemo.models.architectures import Architecture
from lemo.models.fp8 import Fp8Linear, check_gpu
from lemo.models.sharded import is_sharded
from lemo.models.weights import is_torchao_float8

__all__ = ["Fp8Products"]


class Fp8Products:
    """Products in 8 bits of all layers of a decoder; the head stays as it is.

    Args:
        architecture: access to the model.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._layers: list[Fp8Linear] = []

    def install(self) -> None:
        """Makes the layers compute so, until `remove`.

        Raises:
            NotImplementedError: a GPU without such products.
            ValueError: the weights are quantised in another way, or sharded.
        """
        causal_lm = self._architecture.causal_lm
        self.check()
        check_gpu(next(causal_lm.parameters()).device)
        names = {module: name for name, module in causal_lm.named_modules()}
        found = [(module, names[module]) for module in self._modules()]
        for module, name in found:
            _check_base(module, name)
        self._layers = [
            Fp8Linear(module, name) for module, name in found if hasattr(module, "in_features")
        ]

    def remove(self) -> None:
        """Undoes `install`."""
        for layer in self._layers:
            layer.remove()
        self._layers = []

    def check(self) -> None:
        """Refuses weights that are sharded, by now.

        Raises:
            ValueError: they are.
        """
        layers: Any = self._architecture.decoder.layers
        for layer in layers:
            if is_sharded(layer):
                raise ValueError(
                    "products: expected 'dtype' where weights are sharded (fully_shard), whose "
                    "copy in 8 bits would not be, got 'fp8'"
                )

    def left(self) -> dict[str, str]:
        """See `lemo.Handle.unquantised_products`."""
        reasons = {layer.name: _reason(layer) for layer in self._layers}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Products are the model's own inside."""
        for layer in self._layers:
            layer.paused = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.paused = False

    def _modules(self) -> Iterator[nn.Module]:
        """The linear layers, without adapters."""
        architecture = self._architecture
        for index in range(architecture.num_layers):
            projections = architecture.attention_projections(index)
            projections += architecture.mlp_projections(index) or ()
            for module in projections:
                layer = adapted(module)
                yield getattr(module, "base_layer", module) if isinstance(layer, str) else layer[0]


def _reason(layer: Fp8Linear) -> str | None:
    return layer.unfit() or "; ".join(layer.reasons.values()) or None


def _check_base(module: Any, name: str) -> None:
    kind = None
    weight = getattr(module, "weight", None)
    if type(module).__module__.startswith("bitsandbytes."):
        kind = type(module)
    elif type(weight).__module__.startswith("torchao.") and not is_torchao_float8(module):
        kind = type(weight)
    if kind is not None:
        raise ValueError(
            "products: expected 'dtype' over weights that are quantised in another way than "
            f"float8, got 'fp8' and a {kind.__module__}.{kind.__name__} as {name}"
        )
