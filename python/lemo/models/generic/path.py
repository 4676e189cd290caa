"""The generic path: which calls of a model run on kept rows, and which as without lemo."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from lemo.distributed.context import ContextParallel
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.labelled_rows import fused_call, with_head
from lemo.models.calls.replaced_forward import Implementation, ReplacedForward
from lemo.models.generic.forward import GenericForward
from lemo.models.generic.parts import Parts
from lemo.models.generic.verify import verify
from lemo.models.path import Path, Steering, returned
from lemo.settings.elimination import LemoConfig

__all__ = ["GenericPath"]


class GenericPath(Path[GenericForward]):
    """Replaces the forward of a causal LM, of its base and of its decoder.

    Args:
        parts: the model.
        config: the settings.
        context: processes that share out the rows; None: this one has them all.

    Raises:
        ValueError: the settings need the inside of layers.
    """

    def __init__(
        self, parts: Parts, config: LemoConfig, context: ContextParallel | None = None
    ) -> None:
        self.causal_lm = parts.causal_lm
        self._forward = GenericForward(parts, config, context)
        self._parts = parts

    @property
    def forward(self) -> GenericForward:
        return self._forward

    @property
    def modules(self) -> dict[nn.Module, Implementation]:
        parts = self._parts
        return {
            parts.causal_lm: causal_lm_forward,
            parts.base: base_forward,
            parts.decoder: decoder_forward,
        }

    def install(self) -> None:
        self.forward.install()

    def uninstall(self) -> None:
        self.forward.uninstall()

    def verify(self, batch: Mapping[str, Any], tokens: int) -> None:
        verify(self._parts, self._forward, batch, tokens)

    def general_modules(self) -> dict[str, str]:
        decoder = self._parts.decoder
        name = next(name for name, m in self.causal_lm.named_modules() if m is decoder)
        return {name: "the generic path runs the model's own modules"}


def _forward_of(handle: Steering) -> GenericForward:
    path = handle.path
    assert isinstance(path, GenericPath)
    return path.forward


def causal_lm_forward(
    handle: Steering, call: dict[str, Any], replaced: ReplacedForward, original: Callable[[], Any]
) -> Any:
    """A call of the causal LM."""
    causal_lm, arguments = replaced.__self__, ForwardArguments.of(call)
    forward = _forward_of(handle)
    if not handle.acts_on(causal_lm, arguments):
        with forward.dense():
            return original()
    previous, weights = replaced.previous, handle.weights
    # A forward that Accelerate put there to move inputs does what the class's does.
    others = previous is not None and not hasattr(causal_lm, "_hf_hook")
    if previous is not None and weights is not None:
        fused = fused_call(call)
        if fused is not None:
            result, weight = forward.labelled(fused, with_head(previous))
            weights.append(weight)
            if handle.scales and getattr(result, "aux_loss", None) is not None:
                # What routers add is no sum over labels.
                result["aux_loss"] = result.aux_loss / weight
            return result
    if others or arguments.labels is None or causal_lm.loss_function is not ForCausalLMLoss:
        return _whole(forward, original)
    forward.check_call(arguments)
    return returned(forward.loss(arguments), arguments, causal_lm)


def base_forward(
    handle: Steering, call: dict[str, Any], replaced: ReplacedForward, original: Callable[[], Any]
) -> Any:
    """A call of what stands around the decoder."""
    forward = _forward_of(handle)
    if forward.is_passing:
        return forward.base_output(replaced.original, call)
    return forward.base_output(original)


def decoder_forward(
    handle: Steering, call: dict[str, Any], replaced: ReplacedForward, original: Callable[[], Any]
) -> Any:
    """A call of the decoder; it may be the base at the same time."""
    forward = _forward_of(handle)

    def decode() -> Any:
        if forward.is_passing:
            return forward.decode(call, replaced.original)
        # Of the user, or of a forward that somebody has put in place of the causal LM's since.
        if not forward.is_dense and handle.acts_on(replaced.__self__, ForwardArguments.of(call)):
            return _whole(forward, original)
        with forward.dense():
            return original()

    return forward.base_output(decode)


def _whole(forward: GenericForward, original: Callable[[], Any]) -> Any:
    """What a call gives in training that wants more than lemo's loss."""
    forward.say(
        "logits, hidden states or a loss of another kind were asked for: the whole model runs on "
        "every row, and nothing is eliminated"
    )
    with forward.dense():
        return original()
