"""The parts of a model that the generic path asks for, found by Transformers' own conventions."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo.models.calls.interception import check_attention
from lemo.models.generic.attention import own_attention

__all__ = ["Parts"]

# Kinds of layers of a configuration that are attention over the tokens before.
_ATTENTION = {"full_attention", "sliding_attention"}
_DENSE = "train without lemo"


@dataclass(frozen=True)
class Parts:
    """A causal LM, and what it calls.

    Attributes:
        causal_lm: gives logits.
        base: what its own forward calls; of a model with images, what puts these into the text.
        decoder: the layers of the text with their embedding; may be `base`.
        num_layers: layers of the decoder; each calls attention.
        vocabulary: V, of the head.
        configs: the configurations in which the decoder's attention looks up what to call.
    """

    causal_lm: PreTrainedModel
    base: nn.Module
    decoder: PreTrainedModel
    num_layers: int
    vocabulary: int
    configs: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Parts":
        """The parts of the causal LM inside `model`, which PEFT and others may have wrapped.

        Raises:
            TypeError: there is none.
            ValueError: dropping rows is not defined for it, or it lacks what the path needs. The
                message names the class.
        """
        causal_lm = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        if causal_lm is None:
            raise TypeError(
                f"model: expected a causal LM of Transformers, got {type(model).__name__}"
            )
        name, config = type(causal_lm).__name__, causal_lm.config
        head = causal_lm.get_output_embeddings()
        if head is None or config.is_encoder_decoder or not causal_lm.can_generate():
            raise TypeError(
                f"model: expected a causal LM with a head over its vocabulary, got {name}"
            )
        decoder = causal_lm.get_decoder()
        if decoder is causal_lm or not isinstance(decoder, PreTrainedModel):
            # As of classes whose base has another name than they say.
            decoder = getattr(causal_lm, "model", causal_lm)
        if decoder is causal_lm or not isinstance(decoder, PreTrainedModel):
            raise TypeError(f"model: expected a causal LM around a decoder, got {name}")
        base = decoder if causal_lm.base_model is causal_lm else causal_lm.base_model
        text = decoder.config
        if not hasattr(text, "num_hidden_layers"):
            raise TypeError(f"model: expected a causal LM around one decoder, got {name}")
        parts = cls(
            causal_lm, base, decoder, text.num_hidden_layers, text.vocab_size, _configs(decoder)
        )
        parts._check()
        return parts

    @property
    def name(self) -> str:
        """The class of the causal LM, for errors."""
        return type(self.causal_lm).__name__

    @property
    def config(self) -> Any:
        """The configuration of the causal LM."""
        return self.causal_lm.config

    @property
    def takes_images(self) -> bool:
        """Whether something stands between the causal LM and its decoder that reads more than text.

        The same of models whose base passes a call on as it is (OPT).
        """
        return self.base is not self.decoder

    @property
    def has_learned_positions(self) -> bool:
        """Whether positions are embedded as tokens are (OPT, GPT-2)."""
        # Adapters of the embedding are in it, beside a copy of it.
        of_tokens = set(self.decoder.get_input_embeddings().modules())
        return any(
            m not in of_tokens and isinstance(m, nn.Embedding) for m in self.decoder.modules()
        )

    @property
    def skips_positions(self) -> bool:
        """Whether learned positions begin behind that of padding (RoBERTa), not with 0."""
        return any(
            isinstance(m, nn.Embedding) and m.padding_idx is not None and "position" in name
            for name, m in self.decoder.named_modules()
        )

    @property
    def checkpoints(self) -> bool:
        """Whether layers checkpoint themselves: backward computes them again."""
        modules = self.decoder.modules()
        return any(getattr(m, "gradient_checkpointing", False) for m in modules)

    @property
    def compiles_checkpoints(self) -> bool:
        """Whether layers that checkpoint themselves are compiled, checkpoint and all."""
        return self.checkpoints and any(
            m._compiled_call_impl is not None or "_orig_mod" in m._modules
            for m in self.decoder.modules()
        )

    @property
    def routes(self) -> bool:
        """Whether the causal LM may be asked for what its routers say (mixtures of experts)."""
        forward = type(self.causal_lm).forward
        return "output_router_logits" in inspect.signature(forward).parameters

    def _check(self) -> None:
        name, text = self.name, self.decoder.config
        foreign = {*(getattr(text, "layer_types", None) or ())} - _ATTENTION
        convolutions = [m for m in self.decoder.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
        # A class for hybrids may have layers of attention alone (Granite 4).
        stateful = self.causal_lm._is_stateful and not getattr(text, "layer_types", None)
        if stateful or foreign or convolutions:
            kinds = ", ".join(sorted(foreign)) or "state-space or convolution"
            raise ValueError(
                f"model: {name} has layers ({kinds}) other than full and sliding attention, for "
                f"which leaving rows out is not defined; {_DENSE}"
            )
        if getattr(text, "cross_attention_layers", None):
            raise ValueError(
                f"model: {name} has layers that attend to images instead of the text "
                f"(cross_attention_layers), which lemo does not know; {_DENSE}"
            )
        if not getattr(text, "is_causal", True):
            raise ValueError(f"model: expected a causal model, got {name} with is_causal=False")
        if not self.decoder._supports_attention_backend:
            raise ValueError(
                f"model: {name} does not call Transformers' attention interface, in which lemo "
                f"takes the place of attention; {_DENSE}"
            )
        parameters = inspect.signature(type(self.decoder).forward).parameters
        # Whether one that passes all on hands them on, too, is seen in the first pass.
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "position_ids" not in parameters and not passes_on:
            raise ValueError(
                f"model: {name} takes no position_ids, so kept rows would lose their positions; "
                f"{_DENSE}"
            )
        parameters = inspect.signature(type(self.causal_lm).forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(
                f"model: {name} does not pass arguments on to its loss (**kwargs); {_DENSE}"
            )
        self._check_attention()

    def _check_attention(self) -> None:
        """Refuses attention in whose place lemo's would be wrong silently.

        What the user wrote, and what counts rows itself, as for temperatures by position (Llama 4).
        """
        for attention in {type(m) for m in self.decoder.modules() if hasattr(m, "is_causal")}:
            if "arange(" in _source(attention):
                raise ValueError(
                    f"model: {attention.__name__} of {self.name} counts rows (torch.arange) "
                    f"instead of reading their positions; {_DENSE}"
                )
        for name in {config._attn_implementation for config in self.configs}:
            if name == "eager":
                homes = {type(m) for m in self.decoder.modules() if hasattr(m, "is_causal")}
                functions = [own_attention(name, cls) for cls in homes]
            else:
                # Attention of the hub ("owner/name") computes what Transformers' own computes.
                known = "/" in name and name not in ALL_ATTENTION_FUNCTIONS
                functions = [] if known else [ALL_ATTENTION_FUNCTIONS[name]]
            for function in functions:
                check_attention(function, name)


def _source(module: type[nn.Module]) -> str:
    """The code of a module's forward, as far as it is known."""
    try:
        return inspect.getsource(module.forward)
    except (OSError, TypeError):
        return ""


def _configs(decoder: PreTrainedModel) -> tuple[Any, ...]:
    found: dict[int, Any] = {}
    for module in decoder.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return tuple(found.values())
