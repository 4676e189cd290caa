"""The arguments of a model's forward that a training pass with elimination understands."""

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["CACHES", "check_arguments", "wants_hidden_states"]

# Names of key-value caches in the versions of Transformers.
CACHES = ("past_key_values", "cache", "cache_params")

# What lemo reads.
_READ = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "labels",
    "shift_labels",
    "ignore_index",
    "num_items_in_batch",
    "logits_to_keep",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "use_cache",
    *CACHES,
)
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


def wants_hidden_states(arguments: Mapping[str, Any], config: Any) -> bool:
    """Whether a call, or the model's configuration, asks for hidden states."""
    asked = arguments.get("output_hidden_states")
    return bool(getattr(config, "output_hidden_states", False) if asked is None else asked)


def check_arguments(arguments: Mapping[str, Any], config: Any) -> None:
    """Refuses what would change the model's own forward pass and is unknown here.

    Args:
        arguments: those of the call, by name.
        config: the model's configuration.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    attentions = arguments.get("output_attentions")
    if getattr(config, "output_attentions", False) if attentions is None else attentions:
        raise ValueError(
            "output_attentions: not available while lemo eliminates tokens; its attention "
            "never holds the weights. Use model.eval(), or handle.remove()"
        )
    asked = arguments.get("output_hidden_states")
    if asked is not None and not isinstance(asked, bool):
        raise ValueError(f"output_hidden_states: expected true or false, got {asked!r}")
    if arguments.get("cu_seq_lens_q") is not None and arguments.get("position_ids") is None:
        raise ValueError(
            "position_ids: expected for packed sequences, got None; cu_seq_lens_q is not read"
        )
    mask = arguments.get("attention_mask")
    if mask is not None and not torch.is_tensor(mask):
        raise TypeError(
            f"attention_mask: expected a [batch, tokens] tensor, got {type(mask).__name__}"
        )
    for name, value in arguments.items():
        if name not in _READ + _NOT_READ and value is not None and value is not False:
            raise ValueError(
                f"{name}: not known to lemo, but the model may read it; leave it out of the "
                "batch, or train without lemo"
            )
