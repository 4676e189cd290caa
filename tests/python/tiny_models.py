"""Tiny random models and batches of every supported architecture, shared by tests."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from devices import working_dtype
from lemo import LemoConfig
from lemo.settings.elimination import LayerwiseConfig

VOCABULARY = 61
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "opt")
WINDOW = 11  # of the sliding layers, smaller than any test sequence

HIDDEN = 32  # heads of 8
HEAD_DIM = 16  # where it is not hidden size / heads

# The linear layers of any architecture.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEAR += ["out_proj", "fc1", "fc2"]

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
_SETTINGS = {
    "llama": _ROTARY,
    "mistral": {**_ROTARY, "sliding_window": WINDOW},
    "qwen2": {
        **_ROTARY,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {
        **_ROTARY,
        "head_dim": HEAD_DIM,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.0, "init_std": 0.2},
}


def make_model(
    architecture: str,
    seed: int = 0,
    attn_implementation: str = "eager",
    dtype: torch.dtype | None = None,
    **overrides: object,
) -> PreTrainedModel:
    """A model in training mode; equal seeds give equal weights.

    Without a `dtype` it is fp32 on the CPU, and bf16 on a GPU, where attention knows no fp32.
    """
    config = AutoConfig.for_model(architecture, **{**_SETTINGS[architecture], **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        # Initial biases of 0 and norm weights of 1 would hide a forgotten one.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter += 0.2 * noise.to(parameter.device)
    return model.to(working_dtype() if dtype is None else dtype).train()


def config_of(**settings) -> LemoConfig:
    """A LemoConfig whose sets depend on the content: blocks chosen by their scores between two
    that are kept, dense layers at both ends. Settings that are given win."""
    fixed = {"block_size": 64, "dense_layers": (0, 1, -1), "scorer": "pooled", "keep_first": 1}
    return flat_config(**fixed | settings)


def flat_config(**settings) -> LemoConfig:
    """A LemoConfig from settings of both groups; a `keep` that is a list is the layers' own."""
    names = {*LayerwiseConfig.model_fields} - {"keep"}
    layerwise = {name: settings.pop(name) for name in names & {*settings}}
    if isinstance(settings.get("keep"), list | tuple):
        layerwise["keep"] = settings.pop("keep")
    return LemoConfig(**settings, layerwise=layerwise)


def lora(model: PreTrainedModel, **settings: object) -> PeftModel:
    """LoRA whose second matrix is not zero, the same for equal models."""
    torch.manual_seed(1)
    settings = {"target_modules": LINEAR, "r": 4, "init_lora_weights": False} | settings
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def make_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def padded_batch(lengths: list[int], side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels; padding and what it would predict have no label."""
    tokens = max(lengths)
    ids = make_ids(len(lengths), tokens, seed)
    columns = torch.arange(tokens)
    ends = torch.tensor(lengths)[:, None]
    mask = (columns < ends) if side == "right" else (columns >= tokens - ends)
    firsts = mask & (mask.cumsum(1) == 1)
    return {
        "input_ids": ids.where(mask, torch.tensor(0)),
        "attention_mask": mask.long(),
        "labels": ids.where(mask & ~firsts, torch.tensor(-100)),
    }


def packed_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """One row of several sequences: position_ids restart, their first tokens have no label."""
    ids = make_ids(1, sum(lengths), seed)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.where(positions > 0, torch.tensor(-100)),
    }


def as_padded(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sequences of a packed batch as the rows of a right-padded one."""
    firsts = (packed["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    lengths = [end - first for first, end in zip(firsts, [*firsts[1:], packed["labels"].numel()])]
    batch = padded_batch(lengths)
    for name in ("input_ids", "labels"):
        batch[name][batch["attention_mask"].bool()] = packed[name][0]
    return batch


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the parameters that have one, by name."""
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def all_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All values as one fp32 vector."""
    return torch.cat([tensor.flatten().float() for tensor in tensors.values()])
