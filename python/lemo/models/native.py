"""The native path: layers that lemo computes itself, of the architectures that it knows."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from lemo.distributed.context import ContextParallel
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.interception import makes_another_loss
from lemo.models.calls.labelled_rows import LabelledStates, call_head, fused_call
from lemo.models.calls.per_thread import PerThread
from lemo.models.calls.replaced_forward import Implementation, ReplacedForward
from lemo.models.layers.architectures import Architecture
from lemo.models.layers.general import general_modules
from lemo.models.layers.products import Fp8Products
from lemo.models.memory.sharded import run_inside
from lemo.models.path import Path, Steering, returned
from lemo.models.training_forward import TrainingForward
from lemo.models.verify import verify
from lemo.settings.elimination import LemoConfig

__all__ = ["NativePath"]


class NativePath(Path[TrainingForward]):
    """Replaces the forward of a causal LM and of its decoder.

    Args:
        architecture: access to the model.
        config: the settings.
        context: processes that share out the rows; None: this one has them all.

    Raises:
        ValueError: layers or attention are not Transformers' own, the model uses attention dropout
            or another unsupported setting, or `config` does not fit the model.

    Attributes:
        is_dense: whether a call of the causal LM runs as without lemo, in this thread.
    """

    is_dense = PerThread(False)
    _states = PerThread[LabelledStates | None](None)

    def __init__(
        self,
        architecture: Architecture,
        config: LemoConfig,
        context: ContextParallel | None = None,
    ) -> None:
        architecture.check_supported()
        self.causal_lm = architecture.causal_lm
        self._architecture = architecture
        self._num_layers = architecture.num_layers
        self._forward = TrainingForward(architecture, config, context)
        self._products = None
        if config.in_8_bits:
            self._products = Fp8Products(architecture, fast=config.products == "fp8_fast")

    @property
    def forward(self) -> TrainingForward:
        return self._forward

    @property
    def decoder(self) -> nn.Module:
        """The stack of layers, whose forward is replaced, too."""
        return self._architecture.decoder

    @property
    def modules(self) -> dict[nn.Module, Implementation]:
        return {self.causal_lm: causal_lm_forward, self.decoder: decoder_forward}

    def verify(self, batch: Mapping[str, Any], tokens: int) -> None:
        # Rounding to 8 bits would hide what it looks for.
        with nullcontext() if self._products is None else self._products.paused():
            verify(self._architecture, self.forward, batch, tokens, self._other_loss() is None)

    def check_loss(self) -> None:
        found = self._other_loss()
        if found is not None:
            raise ValueError(
                f"model: expected {type(self.causal_lm).__name__} with the loss of Transformers, "
                f"got one from {found}, which is not lemo's to compute; call the model itself, in "
                "training mode"
            )

    def _other_loss(self) -> str | None:
        forward = vars(self.causal_lm).get("forward")
        return makes_another_loss(self.causal_lm, getattr(forward, "previous", None))

    def install(self) -> None:
        if self._products is not None:
            self._products.install()

    def uninstall(self) -> None:
        if self.forward.graphs is not None:
            self.forward.graphs.clear()
        if self._products is not None:
            self._products.remove()

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        if self._products is not None:
            self._products.begin_step(step)

    def check(self) -> None:
        """Raises ValueError where the model has changed so that the settings do not fit it."""
        layers = self._architecture.num_layers
        if layers > self._num_layers:
            raise ValueError(
                f"model: expected the {self._num_layers} layers that it had when lemo was enabled, "
                f"got {layers}; call handle.remove() and lemo.enable again"
            )
        if self._products is not None:
            self._products.check()

    def unquantised_products(self) -> dict[str, str]:
        return {} if self._products is None else self._products.unquantised()

    def general_modules(self) -> dict[str, str]:
        return general_modules(self._architecture)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, the decoder runs as without lemo, whatever mode it is in."""
        before, self.is_dense = self.is_dense, True
        try:
            yield
        finally:
            self.is_dense = before

    @property
    def labelled_states(self) -> LabelledStates | None:
        """What the decoder answers with while a head of somebody else runs."""
        return self._states

    def labelled_alone(
        self, arguments: ForwardArguments, call: dict[str, Any], forward: Callable[..., Any]
    ) -> tuple[Any, Tensor]:
        """What a head of somebody else returns for the rows whose loss counts, and their weight."""
        compute = partial(self.forward.labelled_states, arguments)
        self._states = run_inside(self.decoder, compute)
        try:
            return call_head(forward, call, self._states.labels), self._states.weight
        finally:
            self._states = None


def causal_lm_forward(
    handle: Steering, call: dict[str, Any], replaced: ReplacedForward, original: Callable[[], Any]
) -> Any:
    """A call of the causal LM."""
    causal_lm, arguments = replaced.__self__, ForwardArguments.of(call)
    path = handle.path
    assert isinstance(path, NativePath)
    if not handle.acts_on(causal_lm, arguments):
        with path.dense():
            return original()
    path.check()
    if replaced.previous is not None:
        weights = handle.weights
        fused = None if weights is None else fused_call(call)
        if fused is not None and weights is not None:
            result, weight = path.labelled_alone(fused, call, replaced.previous)
            weights.append(weight)
            return result
    if replaced.previous is not None or makes_another_loss(causal_lm) is not None:
        # It calls the decoder, and may make another loss of its states.
        with handle.naming(arguments.labelled_rows()):
            return original()
    compute = path.forward.logits
    if arguments.labels is not None:
        path.forward.check_call(arguments)
        compute = path.forward.loss
    output = run_inside(path.decoder, partial(compute, arguments))
    return returned(output, arguments, causal_lm)


def decoder_forward(
    handle: Steering, call: dict[str, Any], replaced: ReplacedForward, original: Callable[[], Any]
) -> Any:
    """A call of the decoder."""
    decoder, arguments = replaced.__self__, ForwardArguments.of(call)
    path = handle.path
    assert isinstance(path, NativePath)
    if path.is_dense or not handle.acts_on(decoder, arguments):
        return original()
    path.check()
    if path.labelled_states is not None:
        states = BaseModelOutputWithPast(last_hidden_state=path.labelled_states.hidden)
    else:
        states = path.forward.states(arguments)
    return returned(states, arguments, decoder)
