"""The model that predictors and retrieval heads are made for."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["check_embedding", "embedding_digest", "model_description", "model_shape", "sampled"]

# Values of a tensor that are read for a digest.
_SAMPLE = 1 << 16

_log = logging.getLogger("lemo")


def model_shape(config: Any) -> dict[str, Any]:
    """The shape of the model that predictors are made for, from its Transformers config."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        # OPT has a name of its own for it.
        "intermediate_size": getattr(config, "intermediate_size", None) or config.ffn_dim,
    }


def model_description(config: Any, embedding: Tensor | None) -> dict[str, Any]:
    """The shape of a model, with what tells it from others of the same shape.

    Args:
        config: its Transformers config.
        embedding: the weight of its token embedding, [V, H]; None: it has none.

    Returns:
        `model_shape`, and as "embedding" what `embedding_digest` gives.
    """
    return model_shape(config) | {"embedding": embedding_digest(embedding)}


@torch.no_grad()
def embedding_digest(weight: Tensor | None) -> str | None:
    """Hexadecimal digest of the weight of an embedding; None where it is not in plain floats.

    It tells models apart that were trained apart. Adapters leave embeddings as they are; so does
    quantising linear layers.

    Args:
        weight: [V, H], in any dtype that the model may be loaded in; weights that are stored in
            fp32 have another digest in fp16. Where it is sharded all processes have to call this.
    """
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    if weight is None or weight.is_meta or type(weight) not in (Tensor, nn.Parameter):
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    # As all of the three dtypes have them.
    values = sampled(weight).to(torch.bfloat16).to(torch.float16)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def sampled(tensor: Tensor) -> Tensor:
    """65536 values of a tensor at most, from even places, on the CPU: all of a small one."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(-(-flat.numel() // _SAMPLE), 1)].contiguous().cpu()


def check_embedding(
    place: str, made_for: Mapping[str, Any], model: Mapping[str, Any], command: str
) -> None:
    """Warns where something was made for another model of the same shape.

    It is no error: what was made for the model that this one was trained from may serve it, too.

    Args:
        place: what was made, for the message.
        made_for, model: descriptions, as from `model_description`; where one of them has no digest
            nothing is compared.
        command: what makes one for this model.
    """
    there, here = made_for.get("embedding"), model.get("embedding")
    if there is not None and here is not None and there != here:
        _log.warning(
            "%s: made for another model of this shape, or for this one before it was trained "
            "further: their embeddings differ; `%s` makes one for this model",
            place,
            command,
        )
