"""Quantised base models: frozen weights of linear layers in 4 or 8 bits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, get_args

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from lemo.models.projections.torchao_weights import is_torchao
from lemo.planner.shape import LINEAR, ModelShape
from lemo.settings.finetune import Quantize

__all__ = [
    "check_stored",
    "is_in_4_bits",
    "is_quantised",
    "plain_parameters",
    "put_in",
    "quantization_config",
    "recorded",
    "remember",
    "scale_bytes",
    "stored_as",
    "stored_like",
]

# Which package stores weights in each way.
_PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "float8": "torchao"}
# How weights are stored that are made plain from a byte each, by the name of torchao's settings.
_OF_TORCHAO = {
    "Float8WeightOnlyConfig": "float8",
    "Int8WeightOnlyConfig": "torchao_int",
    "IntxWeightOnlyConfig": "torchao_int",
}
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
    return bool(_settings_of(config).get("load_in_4bit"))


def check_stored(config: PreTrainedConfig, quantize: str | None, model: str) -> None:
    """Raises ValueError where weights that are stored quantised are to be quantised once more."""
    if quantize is not None and is_quantised(config):
        method = _settings_of(config).get("quant_method")
        raise ValueError(
            f"quantize: expected null, because '{model}' is stored quantised already ({method}), "
            f"got '{quantize}'"
        )


def stored_as(config: PreTrainedConfig) -> str | None:
    """How the weights of a model are stored, as `lemo.planner.shape.weight_bytes` has it.

    Raises:
        ValueError: in a way whose memory lemo does not predict.
    """
    found = _settings_of(config)
    if not found:
        return None
    kind = found.get("quant_method")
    if kind == "bitsandbytes":
        return "nf4" if is_in_4_bits(config) else "int8"
    if kind == "torchao":
        how = _torchao_settings(found)
        kind = str(how.get("_type") if isinstance(how, dict) else type(how).__name__)
        if kind in _OF_TORCHAO:
            return _OF_TORCHAO[kind]
    known = ", ".join(_OF_TORCHAO)
    raise ValueError(
        f"model: expected weights that are plain, of bitsandbytes, or quantised by {known}, whose "
        f"memory can be predicted, got {kind}"
    )


def scale_bytes(config: PreTrainedConfig, size: int) -> float | None:
    """Bytes of scales for each number of weights that are stored quantised.

    Args:
        config: of a model whose weights are stored in a way that `stored_as` knows.
        size: bytes of a number of the dtype that they stand for.

    Returns:
        None: they are not stored quantised. 0: a scale for each row, or for a whole weight.
    """
    found = _settings_of(config)
    if not found:
        return None
    if is_in_4_bits(config):
        # In fp32 for each 64 numbers; double quantised a byte, and one in fp32 for each 256.
        return (1 + 4 / 256 if found.get("bnb_4bit_use_double_quant") else 4) / 64
    how = _torchao_settings(found)
    if not isinstance(how, dict):
        return 0.0
    granularity = how["_data"].get("granularity") or {}
    group = granularity.get("_data", {}).get("group_size") or how["_data"].get("group_size")
    if group is None:
        return 0.0
    # Beside the scale there is a place for 0, a byte.
    of_scale = 4 if how["_type"] == "Int8WeightOnlyConfig" else size
    return (of_scale + 1) / group


def plain_parameters(config: PreTrainedConfig, shape: ModelShape) -> tuple[int, ...]:
    """Parameters of the linear layers that stay as they are in a model that is stored quantised.

    Args:
        config: of the model, whose weights are stored in a way that `stored_as` knows.
        shape: its sizes.

    Returns:
        For each decoder layer; empty: none stay.
    """
    found = _settings_of(config)
    of_torchao = found.get("quant_method") == "torchao"
    skipped = found.get("modules_to_not_convert" if of_torchao else "llm_int8_skip_modules")
    if not skipped:
        return ()
    # Transformers looks for names of parameters of the one, of modules of the other.
    end = ".weight" if of_torchao else ""

    def stays(layer: int, name: str) -> bool:
        part = "self_attn" if name in LINEAR[:4] else "mlp"
        return not should_convert_module(f"model.layers.{layer}.{part}.{name}{end}", skipped)

    return tuple(
        shape.layer_parameters([name for name in LINEAR if stays(layer, name)])
        for layer in range(shape.layers)
    )


def _torchao_settings(found: dict[str, Any]) -> Any:
    """What torchao quantised a model's layers by, of what `_settings_of` gives."""
    how = found.get("quant_type")
    return how.get("default", how) if isinstance(how, dict) else how


def _settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says of quantised weights; empty: nothing."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    return dict(found if isinstance(found, dict) else found.to_dict())


def put_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Has a model that was stored quantised compute in `dtype`.

    Transformers leaves what bitsandbytes and torchao have quantised, and with the first all that is
    beside it, in the dtype in which it was stored. Values in few bits stay as they are.

    Raises:
        ValueError: weights that are made plain in another dtype alone.
    """
    if getattr(model, "quantization_method", None) == QuantizationMethod.BITS_AND_BYTES:
        _put_rest_in(model, dtype)
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            # Gradients are multiplied in that of the state.
            module.compute_dtype = state.dtype = dtype
        if is_torchao(module):
            weight = _torchao_in(module.weight, dtype)
            if weight.dtype != dtype:
                stored = str(weight.dtype).removeprefix("torch.")
                raise ValueError(
                    f"dtype: expected {stored}, in which the quantised weight of {name} is stored, "
                    f"got {str(dtype).removeprefix('torch.')}"
                )
            module.weight = torch.nn.Parameter(weight, requires_grad=False)


def _put_rest_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    # What Transformers keeps in fp32 whatever it is asked for.
    wide = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, weight in model.named_parameters():
        packed = hasattr(weight, "quant_state") or not weight.is_floating_point()
        if not packed and not any(part in name for part in wide):
            weight.data = weight.data.to(dtype)


def _torchao_in(weight: Any, dtype: torch.dtype) -> Any:
    """The same values, which stand for numbers of `dtype`."""
    if weight.dtype == dtype:
        return weight
    moved = weight.detach().to(dtype)
    if moved.dtype == dtype:
        return moved
    # Most kinds say of what dtype they are, and do not change it.
    names, said = weight.__tensor_flatten__()
    if not isinstance(said, dict) or "dtype" not in said:
        return weight
    tensors = {name: getattr(weight, name) for name in names}
    sizes = weight.shape, weight.stride()
    return type(weight).__tensor_unflatten__(tensors, {**said, "dtype": dtype}, *sizes)


def remember(config: dict[str, Any], quantize: str) -> dict[str, Any]:
    """A model's configuration, as it was before it was quantised, that says how it was trained."""
    return {k: v for k, v in config.items() if k != "quantization_config"} | {_FIELD: quantize}


def stored_like(config: PreTrainedConfig, model: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration, changed in place, that says of stored weights what that of `model` says."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if is_quantised(model):
        config.quantization_config = model.quantization_config
    return config


def recorded(config: PreTrainedConfig) -> str | None:
    """How the model of an adapter was quantised when the adapter was trained; None: not at all."""
    found: str | None = getattr(config, _FIELD, None)
    return found
