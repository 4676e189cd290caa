"""Models that are measured: random weights of a known shape, and LoRA as users put it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

__all__ = [
    "LLAMA_3_8B",
    "SHAPES",
    "config_of_shape",
    "llama_config",
    "random_llama",
    "random_llama_in_4_bits",
    "training_step",
    "with_lora",
    "write_random_predictors",
]

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

QWEN_3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Name of a shape -> its configuration's class, sizes, layers and base of the rotary embedding.
SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, int], int, float]] = {
    "llama-3-8b": (LlamaConfig, LLAMA_3_8B, 32, 500000.0),
    "qwen3-8b": (Qwen3Config, QWEN_3_8B, 36, 1000000.0),
    "tiny": (LlamaConfig, TINY, 2, 500000.0),
}


def config_of_shape(
    name: str, tokens: int, layers: int | None = None, shrink: int = 1
) -> PretrainedConfig:
    """A shape of `SHAPES` for `tokens` positions, its sizes divided by `shrink`.

    With its own number of layers where that is None.
    """
    made, sizes, own_layers, theta = SHAPES[name]
    return made(
        **{key: max(size // shrink, 1) for key, size in sizes.items()},
        num_hidden_layers=layers or own_layers,
        max_position_embeddings=tokens,
        rms_norm_eps=1e-5 if made is LlamaConfig else 1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
        use_cache=False,
    )


def llama_config(tokens: int, layers: int, shrink: int = 1) -> LlamaConfig:
    """Llama-3-8B's shape for `tokens` positions, its sizes divided by `shrink`."""
    return LlamaConfig(
        **{name: max(size // shrink, 1) for name, size in LLAMA_3_8B.items()},
        num_hidden_layers=layers,
        max_position_embeddings=tokens,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        use_cache=False,
    )


def random_llama(config: PretrainedConfig, device: str) -> PreTrainedModel:
    """A model with random bf16 weights, made on the device, with PyTorch's own attention."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def random_llama_in_4_bits(config: LlamaConfig, device: str) -> PreTrainedModel:
    """The same with linear layers of the decoder in nf4 (bitsandbytes), quantised one by one."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    for parent in list(model.model.layers.modules()):
        for name, linear in parent.named_children():
            if not isinstance(linear, torch.nn.Linear):
                continue
            new = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            weight = 0.02 * torch.randn(linear.weight.shape, dtype=torch.bfloat16, device=device)
            new.weight = Params4bit(weight, quant_type="nf4", module=new).to(device)
            setattr(parent, name, new)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made = made.normal_(0.0, 0.02) if parameter.ndim > 1 else made.fill_(1.0)
                setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    rotary = model.model.rotary_emb
    # Unsloth's own does not go by the device that is asked for, and is whole.
    if any(buffer.is_meta for buffer in rotary.buffers()):
        rotary = type(rotary)(config=config)
    model.model.rotary_emb = rotary.to(device)
    model.is_loaded_in_4bit = True
    return model


def with_lora(model: PreTrainedModel, rank: int, targets: str | list[str]) -> PeftModel:
    """LoRA of this rank on these linear layers, in the dtype of the weights."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    # PEFT's default keeps fp32 adapters and casts every projection's input to fp32: slower for
    # every method.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def training_step(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A step of AdamW on what a model trains: gets ids [1, S], all of them labels; gives the loss.

    Args:
        model: in training mode, on its device.
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)

    def step(ids: Tensor) -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        found = loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found

    return step


def write_random_predictors(folder: Path, config: LlamaConfig, block_size: int) -> str:
    """A new folder as `lemo prepare` writes it for such a model, with random predictors of the
    default size; its path."""
    from lemo.predictors import modules, storage
    from lemo.predictors.model import model_shape
    from lemo.predictors.position import PositionProfile

    hidden, layers = config.hidden_size, config.num_hidden_layers
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for kind, places in (("attention", 21), ("mlp", 1)):
            knots = torch.exp2(torch.arange(places) / 2)
            profile = PositionProfile(knots, torch.zeros(places), torch.ones(places))
            module = modules.make_predictor(kind, hidden, modules.default_rank(hidden), generator)
            tensors |= storage.tensors_of(layer, kind, module, profile)
    folder.mkdir()
    description = {
        "model": model_shape(config),
        "block_size": block_size,
        "num_layers": layers,
        "hidden_size": hidden,
        "thresholds": {kind: [0.0] * layers for kind in ("attention", "mlp")},
    }
    storage.write_folder(folder, tensors, description)
    return str(folder)
