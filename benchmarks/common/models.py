"""Models that are measured: random weights of a known shape, and LoRA as users put it on."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

__all__ = ["LLAMA_3_8B", "llama_config", "random_llama", "with_lora"]

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


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


def random_llama(config: LlamaConfig, device: str) -> PreTrainedModel:
    """A model with random bf16 weights, made on the device, with PyTorch's own attention."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def with_lora(model: PreTrainedModel, rank: int, targets: str | list[str]) -> PeftModel:
    """LoRA of this rank on these linear layers, in the dtype of the weights."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    # PEFT's default keeps fp32 adapters and casts every projection's input to fp32: slower for
    # every method.
    return get_peft_model(model, config, autocast_adapter_dtype=False)
