"""Loading a causal language model, extending its context, and adding and saving LoRA."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from lemo.data.reading import first_of, naming
from lemo.files import naming_file, write_file
from lemo.ops import supports_device
from lemo.settings.finetune import Device, FinetuneConfig
from lemo.training.quantised import check_stored, is_quantised, put_in, quantization_config
from lemo.training.sharding import whole

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "model_config.json"

# What quantised weights are not stored in.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger("lemo")

_NO_KERNELS = (
    "elimination needs a lemo that was built with CUDA, and a GPU of compute capability 8.0 or "
    "higher"
)


def load_config(model: str, supported: Iterable[str] | None = None) -> PreTrainedConfig:
    """Configuration of a model folder or hub name.

    Args:
        model: folder or hub name.
        supported: names of the classes that will do; None: every causal language model.

    Raises:
        FileNotFoundError: neither a folder with a config.json nor a model that can be reached.
        ValueError: Transformers does not know the model's type, it is not `supported`, or the
            configuration makes no model.
    """
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"model: '{model}' is not a model folder: it has no config.json")
    if (Path(model) / ADAPTER_CONFIG).is_file():
        raise _is_adapter(model)
    try:
        with naming(f"model: the config.json of '{model}' cannot be used", OSError):
            config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise _not_found(model, error) from error
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is None or (supported is not None and name not in supported):
        wanted = (
            "a causal language model" if supported is None else "one of " + ", ".join(supported)
        )
        raise ValueError(
            f"model: expected {wanted}, got '{model}' of type {name or config.model_type}"
        )
    # A model without memory shows what does not fit before anything else takes time.
    with naming(f"model: the config.json of '{model}' makes no model"), torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder or hub name; ValueError where the model has none."""
    with naming(f"model: '{model}' has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        # Without files Transformers makes an empty tokenizer for some types of models.
        found = set(tokenizer("a", add_special_tokens=False)["input_ids"])
        if found <= set(tokenizer.all_special_ids):
            raise ValueError("its files are missing")
    return tokenizer


def load_model(
    model: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    quantize: str | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The causal language model with frozen weights of ``dtype``, on the CPU.

    Args:
        model: folder or hub name.
        config: its configuration.
        dtype: of weights that are not quantised, and of all products.
        quantize: how those of linear layers are, see `lemo.training.quantised`; None: as they are
            stored.
        device: where a quantised model goes, at once and layer by layer, so that it never is whole
            in ``dtype``; others stay on the CPU.

    Raises:
        ModuleNotFoundError: quantising needs a package that is not there.
        ValueError: the weights are damaged, or not those of a model of ``config``: some are
            missing, have other shapes, have no place in it, or are no finite numbers in ``dtype``.
        OSError: they cannot be read.
    """
    stored = is_quantised(config)
    check_stored(config, quantize, model)
    more: dict[str, Any] = {}
    if quantize is not None:
        more["quantization_config"] = quantization_config(quantize, dtype)
    if quantize is not None or stored:
        more["device_map"] = {"": device or torch.device("cpu")}
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # By themselves older Transformers take PyTorch's attention, which leaves the softcap out.
        more["attn_implementation"] = "eager"
    try:
        with naming(f"model: the weights of '{model}' are damaged or cannot be used", OSError):
            loaded, report = AutoModelForCausalLM.from_pretrained(
                # Adapters name it, which may be used from another folder.
                os.path.abspath(model) if os.path.isdir(model) else model,
                config=config,
                dtype=dtype,
                # lemo does not generate, so the model's settings for it need not be read.
                generation_config=GenerationConfig(),
                output_loading_info=True,
                # Reported below, in one line.
                ignore_mismatched_sizes=True,
                **more,
            )
    except OSError as error:
        raise _not_found(model, error) from error
    _check_weights(model, loaded, report)
    _check_finite(model, loaded)
    if stored:
        put_in(loaded, dtype)
    return loaded.requires_grad_(False)


def _check_weights(model: str, loaded: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raises ValueError unless every weight came from the checkpoint, and all of those were used.

    Args:
        model: folder or hub name, for the message.
        loaded: the model.
        report: Transformers' names of what it did not find, could not use, or found in another
            shape. Tied weights and buffers that the model computes are not among them.
    """
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise _is_adapter(model)
    fault = f"model: the weights of '{model}' do not fit its config.json"
    if report["mismatched_keys"]:
        shapes = [
            f"{name} is {list(found)}, expected {list(expected)}"
            for name, found, expected in report["mismatched_keys"]
        ]
        raise ValueError(f"{fault}: {first_of(shapes)}")
    missing = report["missing_keys"]
    if missing:
        raise ValueError(f"{fault}: the checkpoint lacks {first_of(missing)}")
    prefix = f"{loaded.base_model_prefix}."
    modules = {name for part in (loaded, loaded.base_model) for name, _ in part.named_children()}
    unused = report["unexpected_keys"]
    wrong = [name for name in unused if name.removeprefix(prefix).partition(".")[0] in modules]
    if wrong:
        raise ValueError(f"{fault}: the model has no place for {first_of(wrong)}")
    if unused:
        _log.warning(
            "model: %d weights of '%s' are no part of a causal language model and are not used: %s",
            len(unused),
            model,
            first_of(unused),
        )


def _check_finite(model: str, loaded: PreTrainedModel) -> None:
    """Raises ValueError where a weight is nan or infinite; those in 8 or 4 bits are not read."""
    wrong = [
        name
        for name, weight in loaded.named_parameters()
        if weight.dtype in _PLAIN
        and weight.numel()
        and not is_traceable_wrapper_subclass(weight)
        # Packed weights, whose bytes are called numbers of a floating dtype.
        and not hasattr(weight, "quant_state")
        # The least and the greatest are nan where any weight is.
        and not all(bound.isfinite() for bound in weight.detach().aminmax())
    ]
    if wrong:
        raise ValueError(
            f"model: the weights of '{model}' hold nan or infinity: {first_of(wrong)}; expected "
            f"finite numbers in {str(loaded.dtype).removeprefix('torch.')}"
        )


def _is_adapter(model: str) -> ValueError:
    return ValueError(
        f"model: '{model}' holds an adapter ({ADAPTER_CONFIG}); expected a model: merge the "
        "adapter into its base model first, or move it into a folder of its own"
    )


def _not_found(model: str, error: OSError) -> OSError:
    if Path(model).exists():
        return OSError(f"model: '{model}' cannot be read: {error}")
    return FileNotFoundError(
        f"model: '{model}' is neither a folder nor a model of the Hugging Face hub that can be "
        "reached from here"
    )


def pick_device(name: str, elimination: bool) -> torch.device:
    """The kind of device for a `device` setting.

    Args:
        name: "cpu", "cuda" or "auto": a CUDA GPU where there is one that will do.
        elimination: whether lemo's ops are needed.

    Raises:
        ValueError: not one of these names, or "cuda" where it cannot be had.
    """
    known = get_args(Device)
    if name not in known:
        raise ValueError(f"device: expected one of {', '.join(known)}, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    found = torch.cuda.is_available()
    supported = found and (not elimination or supports_device("cuda"))
    if name == "cuda" and not found:
        raise ValueError(
            "device: expected 'auto' or 'cpu', because torch finds no CUDA GPU, got 'cuda'"
        )
    if name == "cuda" and not supported:
        raise ValueError(f"device: expected 'auto' or 'cpu', because {_NO_KERNELS}, got 'cuda'")
    if found and not supported:
        _log.info("on the CPU: %s", _NO_KERNELS)
    return torch.device("cuda" if supported else "cpu")


def pick_dtype(name: str, device: torch.device, elimination: bool = False) -> torch.dtype:
    """The torch dtype for a `dtype` setting; "auto" is bfloat16 on a GPU that has it.

    Args:
        name: "float32", "bfloat16", "float16" or "auto".
        device: as from `pick_device`.
        elimination: whether lemo's ops are needed.

    Raises:
        ValueError: the device, or lemo on it, does not compute in this dtype.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if name == "float16" and device.type != "cuda":
        raise ValueError(
            f"dtype: float16 needs a GPU, got the device '{device.type}'; use float32 or bfloat16"
        )
    if name == "float32" and device.type == "cuda" and elimination:
        raise ValueError(
            "dtype: elimination on a GPU computes in bfloat16 or float16, got float32; use "
            "bfloat16, or the device 'cpu'"
        )
    return getattr(torch, name)


def extend_context(
    config: PreTrainedConfig, length: int, rope_scaling: str, name: str = "context_length"
) -> None:
    """Scale the rotary embedding of ``config`` (in place) so that it reaches ``length`` tokens.

    Nothing changes where the model reaches as far already, has no limit, or with ``rope_scaling``
    "none". Of models with a rotation for each kind of layer that of sliding windows stays.

    Args:
        length: tokens of a window.
        rope_scaling: "linear" (position interpolation), "yarn", "dynamic" (NTK-aware) or "none".
        name: of the setting that says the length, for errors.

    Raises:
        ValueError: the model has learned positions, or its rotary embedding is scaled already.
    """
    config = config.get_text_config()
    original = getattr(config, "max_position_embeddings", None)
    if original is None or length <= original:
        return
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise ValueError(
            f"{name}: expected at most {original}, got {length}: a model of type "
            f"{config.model_type} has learned positions, which cannot be extended"
        )
    if rope_scaling == "none":
        return
    by_kind = isinstance(rope.get("full_attention"), dict)
    scaled = dict(rope["full_attention"] if by_kind else rope)
    if scaled.get("rope_type") != "default":
        raise ValueError(
            f"rope_scaling: the model's rotary embedding is of type '{scaled.get('rope_type')}' "
            f"for {original} tokens, so it cannot be scaled to {length} by '{rope_scaling}'; "
            f"use rope_scaling none, or {name} within the model's"
        )
    scaled |= {"rope_type": rope_scaling, "factor": length / original}
    if rope_scaling == "yarn":
        scaled["original_max_position_embeddings"] = original
    # The dynamic kind compares each length with the original one, so that must stay.
    if rope_scaling != "dynamic":
        config.max_position_embeddings = length
    config.rope_parameters = {**rope, "full_attention": scaled} if by_kind else scaled


def reach(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest sequence that the positions of a model are made for; None: no limit."""
    config = config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if limit is None or rope.get("rope_type") != "dynamic":
        return limit
    # The configuration has the original length, and how much further it goes.
    return round(limit * rope.get("factor", 1.0))


def add_lora(model: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """Wrap ``model`` with trainable float32 LoRA pairs (and norms), as `config` says.

    Raises:
        ValueError: one of the targets names no module, or one that cannot have a LoRA pair.
    """
    _check_targets(model, config.lora_targets)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if config.lora_targets is None else list(config.lora_targets),
        modules_to_save=_norm_names(model) if config.train_norms else None,
    )
    with naming("lora_targets"):
        wrapped = get_peft_model(model, lora)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def leave_casts_to_autocast(model: PeftModel) -> None:
    """Prevents PEFT from casting every adapter input to fp32."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def _check_targets(model: PreTrainedModel, targets: Sequence[str] | None) -> None:
    """Raises ValueError unless each target is, as PEFT reads it, the end of a module's name.

    None stands for linear layers, of which there have to be some.
    """
    if targets is None:
        inside: Any = model.base_model
        if not any(isinstance(m, (torch.nn.Linear, Conv1D)) for m in inside.modules()):
            raise ValueError(
                "lora_targets: expected names of modules, such as q_proj and v_proj, because null "
                "stands for linear layers of torch and the model has none (those of GPTQ and the "
                "like are modules of their own), got null"
            )
        return
    modules = dict(model.named_modules())
    linear = sorted(
        {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, torch.nn.Linear)}
    )
    for target in targets:
        found = [m for n, m in modules.items() if n == target or n.endswith(f".{target}")]
        if not found:
            raise ValueError(
                f"lora_targets: '{target}' is no module of the model; expected some of "
                f"{', '.join(linear)}, or nothing for every linear layer but the head"
            )
        groups = [m for m in found if next(m.children(), None) is not None]
        if groups:
            raise ValueError(
                f"lora_targets: '{target}' is a {type(groups[0]).__name__}, which holds other "
                f"modules; expected some of {', '.join(linear)}"
            )


def _norm_names(model: PreTrainedModel) -> list[str]:
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    }
    return sorted(names)


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's weights as PEFT names them, whole; every process of a run has to call it."""
    found: dict[str, Tensor] = whole(get_peft_model_state_dict(model, save_embedding_layers=False))
    return found


def write_adapter(model: PeftModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter's weights and configuration into ``folder``, in PEFT's own format.

    The bytes are made here and written by Python, so that a full disk arrives as an OSError.

    Args:
        model: whose configuration is written.
        weights: from `adapter_weights`.
        folder: exists.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
    """
    # All at once: the thread that trains has to wait for Python's lock while each is looked at.
    if not bool(torch.cat([x.reshape(-1) for x in weights.values()]).isfinite().all()):
        wrong = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
        raise FloatingPointError(
            f"the trained weights are not finite: {first_of(wrong)}; earlier checkpoints stay as "
            "they are; a lower learning_rate or weight_decay may help"
        )
    weights = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
    write_file(folder / ADAPTER_WEIGHTS, to_safetensors(weights, metadata={"format": "pt"}))
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    with naming_file(folder / ADAPTER_CONFIG):
        config.save_pretrained(str(folder))
