"""Quantised base models: frozen weights of linear layers in 4 or 8 bits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, get_args

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, TorchAoConfig

from lemo.settings.finetune import Quantize

__all__ = ["is_in_4_bits", "is_quantised", "quantization_config", "recorded", "remember"]

# Which package stores weights in each way.
_PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "float8": "torchao"}
# What an adapter's copy of the model's configuration says of it.
_FIELD = "lemo_quantize"


def quantization_config(quantize: str, dtype: torch.dtype) -> Any:
    """What Transformers' `from_pretrained` quantises a model by while it loads.

    Args:
        quantize: "nf4" (QLoRA, arXiv 2305.14314: 4 bits in blocks of 64, double quantised), "int8"
            (LLM.int8) or "float8" (e4m3, a scale for each row).
        dtype: in which products are computed.

    Raises:
        ValueError: not one of these names.
        ModuleNotFoundError: the package that it needs is not installed.
    """
    known = get_args(Quantize)
    if quantize not in known:
        raise ValueError(f"quantize: expected one of {', '.join(known)}, got {quantize!r}")
    package = _PACKAGES[quantize]
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"quantize: '{quantize}' needs the package {package}, which is not installed; "
            f"pip install {package}"
        )
    if quantize == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Float8WeightOnlyConfig

    return TorchAoConfig(Float8WeightOnlyConfig())


def is_quantised(config: PreTrainedConfig) -> bool:
    """Whether the weights of a model are stored quantised, as its configuration says."""
    return getattr(config, "quantization_config", None) is not None


def is_in_4_bits(config: PreTrainedConfig) -> bool:
    """Whether the weights of a model are stored in 4 bits of bitsandbytes."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return False
    return bool(dict(found if isinstance(found, dict) else found.to_dict()).get("load_in_4bit"))


def remember(config: dict[str, Any], quantize: str) -> dict[str, Any]:
    """A model's configuration, as it was before it was quantised, that says how it was trained."""
    return {k: v for k, v in config.items() if k != "quantization_config"} | {_FIELD: quantize}


def recorded(config: PreTrainedConfig) -> str | None:
    """How the model of an adapter was quantised when the adapter was trained; None: not at all."""
    found: str | None = getattr(config, _FIELD, None)
    return found
