"""The arguments of a model's forward, as a training pass with elimination understands them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lemo.models.calls.labels import IGNORE_INDEX, of_labels

__all__ = ["ForwardArguments"]

# Names of key-value caches in the versions of Transformers.
_CACHES = ("past_key_values", "cache", "cache_params")

# What says again what position_ids say, or what these models do not read either.
_NOT_READ = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "cache_position",
    "token_type_ids",
)

# Arguments that are tensors, and their shapes.
_TENSORS = dict.fromkeys(
    ("input_ids", "attention_mask", "position_ids", "labels", "shift_labels"), "[batch, tokens]"
) | {"inputs_embeds": "[batch, tokens, hidden size]"}


@dataclass(frozen=True)
class ForwardArguments:
    """A call of a causal LM or of its decoder.

    Attributes:
        input_ids: [B, S] int64; None where `inputs_embeds` are given.
        inputs_embeds: [B, S, H] float.
        attention_mask: [B, S] of 0/1, or None.
        position_ids: [B or 1, S], or None.
        labels: [B, S] int64, not shifted.
        shift_labels: [B, S] int64, shifted already; `labels` are not read then.
        ignore_index: the label that does not count; None: IGNORE_INDEX.
        num_items_in_batch: labels of all micro-batches of a step; None: those of this call.
        logits_to_keep: the last columns whose logits are wanted, or their indices; 0: all.
        output_hidden_states, output_attentions, return_dict: None: as the model's config says.
        use_cache: whether a key-value cache is asked for.
        cached: whether a key-value cache is given.
        cu_seqlens: whether lengths of packed sequences are given.
        unknown: what else was given, without what is known to say nothing new.
        given: the arguments as they were.
    """

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    shift_labels: Tensor | None = None
    ignore_index: int | None = None
    num_items_in_batch: Tensor | int | None = None
    logits_to_keep: Tensor | int = 0
    output_hidden_states: bool | None = None
    output_attentions: bool | None = None
    return_dict: bool | None = None
    use_cache: bool | None = None
    cached: bool = False
    cu_seqlens: bool = False
    unknown: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "ForwardArguments":
        """Takes the arguments of a call by name."""
        read = {f.name for f in fields(cls)} - {"cached", "cu_seqlens", "unknown", "given"}
        said = read | {*_CACHES, *_NOT_READ}
        return cls(
            **{name: value for name, value in arguments.items() if name in read},
            cached=any(arguments.get(name) is not None for name in _CACHES),
            cu_seqlens=arguments.get("cu_seq_lens_q") is not None,
            unknown={name: value for name, value in arguments.items() if name not in said},
            given=arguments,
        )

    @property
    def ignored_label(self) -> int:
        """The label that does not count."""
        return IGNORE_INDEX if self.ignore_index is None else self.ignore_index

    @property
    def generates(self) -> bool:
        """Whether a key-value cache is given or asked for."""
        return self.cached or bool(self.use_cache)

    def labelled_rows(self) -> Tensor | None:
        """[B, S] bool, rows that predict a label; None: there are no labels."""
        return of_labels(self.labels, self.shift_labels, self.ignored_label)

    def wants_hidden_states(self, config: Any) -> bool:
        """Whether the call, or the model's configuration, asks for hidden states."""
        asked = self.output_hidden_states
        return bool(getattr(config, "output_hidden_states", False) if asked is None else asked)

    def check_labels(self) -> None:
        """Refuses logits of a part of the tokens beside labels, whose loss is made without logits.

        The model itself fails there, or compares the logits with labels of as many columns.

        Raises:
            ValueError: `logits_to_keep` leaves tokens out, or is a tensor.
        """
        keep, given = self.logits_to_keep, self.inputs_embeds
        given = self.input_ids if given is None else given
        if isinstance(keep, int) and (keep == 0 or (given is not None and keep >= given.shape[1])):
            return
        got = f"a tensor {list(keep.shape)}" if torch.is_tensor(keep) else repr(keep)
        raise ValueError(
            "logits_to_keep: expected 0 beside labels, whose loss lemo makes without logits, got "
            f"{got}; leave it out, and give all labels, {IGNORE_INDEX} where one is not to count"
        )

    def check(self, config: Any) -> None:
        """Refuses what would change the model's own forward pass and is unknown here.

        Args:
            config: the model's configuration.

        Raises:
            ValueError, TypeError: the message names the argument.
        """
        attentions = self.output_attentions
        if getattr(config, "output_attentions", False) if attentions is None else attentions:
            raise ValueError(
                "output_attentions: not available while lemo eliminates tokens; its attention "
                "never holds the weights. Use model.eval(), or handle.remove()"
            )
        asked = self.output_hidden_states
        if asked is not None and not isinstance(asked, bool):
            raise ValueError(f"output_hidden_states: expected true or false, got {asked!r}")
        if self.cu_seqlens and self.position_ids is None:
            raise ValueError(
                "position_ids: expected for packed sequences, got None; cu_seq_lens_q is not read"
            )
        for name, shape in _TENSORS.items():
            value = getattr(self, name)
            if value is not None and not torch.is_tensor(value):
                raise TypeError(f"{name}: expected a {shape} tensor, got {type(value).__name__}")
        for name, value in self.unknown.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"{name}: not known to lemo, but the model may read it; leave it out of the "
                    "batch, or train without lemo"
                )
