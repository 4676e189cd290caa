"""What lemo computes in models of many kinds, beside what PyTorch computes in the same dtype.

    python benchmarks/models.py [--device cuda --dtype bf16] [--models phi3 gemma2 ...]

Measured: relative errors of the loss and of all gradients together, of a training step with every
token kept and with half of them. Against: the model's own eager forward in a wider dtype, where
left-out tokens are masked; and the error of that forward in the dtype itself (0 where "oracle" is
that dtype). Random weights of
tiny models: right for arithmetic, meaningless for quality. Takes a few seconds a model.

A line is appended for each model, path and share: bench, model_type, path, keep, loss_error,
gradient_error, plain_gradient_error, device, dtype, versions, commit, date.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import lemo
from common import records
from lemo import LemoConfig

VOCABULARY, TOKENS, BLOCK, WINDOW = 512, 256, 32, 64
IMAGE = VOCABULARY - 1  # stands for a part of an image
KEEPS = (1.0, 0.5)
NATIVE = ("llama", "mistral", "qwen2", "qwen3", "opt")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "initializer_range": 0.08,
}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}
_GEMMA = {"head_dim": 64, "sliding_window": WINDOW, "query_pre_attn_scalar": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 64},
    "opt": {"ffn_dim": 384, "word_embed_proj_dim": 256, "dropout": 0.0, "init_std": 0.08},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {},
    "mixtral": {"num_local_experts": 4, **_EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 96, "head_dim": 64, **_EXPERTS},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 64,
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **_EXPERTS,
    },
    "gpt_neox": {},
    "smollm3": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "glm4": {"head_dim": 64},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "cohere2": {"sliding_window": WINDOW},
    "olmo2": {},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,  # keys are of 64
        "moe_intermediate_size": 96,
        "first_k_dense_replace": 1,
    },
}
_ROPE = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}
_VISION = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_heads": 2}
_VISION |= {"image_size": 8, "patch_size": 2, "num_hidden_layers": 2, "depth": 2}
_PATCHES = {"in_channels": 3, "in_chans": 3, "temporal_patch_size": 1, "out_hidden_size": 256}
_PATCHES |= {"window_size": 8, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
_PATCHES |= {"num_position_embeddings": 64}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION}
# Models of text and images: settings, and those of the text.
IMAGE_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": (
        {
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": 64},
            "vision_feature_layer": -1,
        },
        {"model_type": "llama"},
    ),
    "qwen2_5_vl": ({"vision_config": {**_VISION, **_PATCHES}}, {"rope_parameters": _ROPE}),
    "qwen3_vl": (
        {"vision_config": {**_VISION, **_PATCHES}},
        {"rope_parameters": _ROPE, "head_dim": 64},
    ),
    "gemma3": ({"vision_config": _SIGLIP, "mm_tokens_per_image": 16}, _GEMMA),
    "paligemma": (
        {"vision_config": _SIGLIP, "projection_dim": 256},
        {"model_type": "gemma", "head_dim": 64},
    ),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """(a random model in fp32, a batch), equal at every call."""
    torch.manual_seed(0)
    ids = torch.randint(3, IMAGE - 2, (2, TOKENS))
    more: dict[str, Tensor] = {}
    if name in IMAGE_SETTINGS:
        settings, text = IMAGE_SETTINGS[name]
        settings |= {"image_token_id": IMAGE, "image_token_index": IMAGE}
        settings |= {"vision_start_token_id": IMAGE - 1, "video_token_id": IMAGE - 2}
        kind = type(AutoConfig.for_model(name))
        config = kind(**settings, text_config={**_COMMON, **text})
        model = AutoModelForImageTextToText.from_config(config)
        more = {"pixel_values": torch.randn(2, 3, 8, 8)}
        if name.startswith("qwen"):
            more = {"pixel_values": torch.randn(2 * 16 * 4, 3 * 2 * 2)}
            more["image_grid_thw"] = torch.tensor([[1, 8, 8]] * 2)
    else:
        config = AutoConfig.for_model(name)
        config = type(config)(**{**_COMMON, **SETTINGS[name]})
        model = AutoModelForCausalLM.from_config(config)
    if more:
        ids[:, 4], ids[:, 5:21] = IMAGE - 1, IMAGE
    labels = ids.where(ids < IMAGE - 2, torch.tensor(-100))
    batch = {"input_ids": ids, "labels": labels, **more}
    if name.startswith("qwen") and more:
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    elif name == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    elif name == "paligemma":  # a prompt whose tokens see each other both ways, and an answer
        batch["token_type_ids"] = (torch.arange(TOKENS) >= 64).long().expand(ids.shape)
        batch["labels"] = labels.where(batch["token_type_ids"] > 0, torch.tensor(-100))
    return model.train(), batch


def measure(name: str, path: str, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """The errors of one model in one path, for each share that is kept."""
    model, batch = build(name)
    model = model.to(device, dtype)
    batch = {key: value.to(device) for key, value in batch.items()}
    model.set_attn_implementation("eager")
    settings = SETTINGS[name] if name in SETTINGS else IMAGE_SETTINGS[name][1]
    if "num_experts_per_tok" in settings:
        model.set_experts_implementation("eager")  # others know no fp64
    plain = copy.deepcopy(model)
    # In fp64 rows that see nothing, as under a window, become nan: softmax is in fp32 nevertheless.
    wider = torch.float32 if dtype.itemsize == 2 or "sliding_window" in settings else None
    wide = copy.deepcopy(model).to(wider or torch.float64)
    for keep in KEEPS:
        handle = lemo.enable(model, LemoConfig(keep=keep, block_size=BLOCK, path=path))
        found = step(model, batch)
        oracle = masked(plain, batch, handle)
        handle.remove()
        expected, rounded = step(wide, oracle), step(plain, oracle)
        yield {
            "path": path,
            "keep": keep,
            "loss_error": error(found[0], expected[0]),
            "gradient_error": error(found[1], expected[1]),
            "plain_loss_error": error(rounded[0], expected[0]),
            "plain_gradient_error": error(rounded[1], expected[1]),
            "oracle": str(wider or torch.float64).removeprefix("torch."),
        }


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, all gradients), fp64."""
    dtype = next(model.parameters()).dtype
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach().double(), torch.cat(grads)


def masked(model: nn.Module, batch: dict[str, Tensor], handle: lemo.Handle) -> dict[str, Tensor]:
    """The batch with left-out tokens masked, at their positions in the whole of it."""
    statistics, ids = handle.statistics()[0], batch["input_ids"]
    kept = torch.ones(statistics.layout.num_blocks, dtype=torch.bool, device=ids.device)
    if statistics.attention_blocks is not None:
        kept = torch.zeros_like(kept).index_fill(0, statistics.attention_blocks.long(), True)
    kept = kept.repeat_interleave(BLOCK).reshape(ids.shape)
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = batch["labels"][:, 1:].where(kept[:, :-1], -100)
    positions = torch.arange(TOKENS, device=ids.device).expand(ids.shape)
    if "mm_token_type_ids" in batch:
        names = ("input_ids", "image_grid_thw", "mm_token_type_ids")
        positions = model.model.get_rope_index(**{name: batch[name] for name in names})[0]
    elif "token_type_ids" in batch and bool((batch["token_type_ids"] > 0)[:, -1].any()):
        positions = positions + 1  # PaliGemma's count from 1
    return {**batch, "labels": labels, "position_ids": positions, "attention_mask": kept.long()}


def error(value: Tensor, oracle: Tensor) -> float:
    """Relative error of a vector, to three digits."""
    return float(f"{((value - oracle).norm() / oracle.norm()).item():.3g}")


def main() -> None:
    """Measures and appends."""
    parser = records.parser(__doc__, records.RESULTS / "models.jsonl")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="(%(default)s)")
    names = [*SETTINGS, *IMAGE_SETTINGS]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.models:
        for path in ("native", "generic") if name in NATIVE else ("generic",):
            for found in measure(name, path, DTYPES[options.dtype], options.device):
                record = {"bench": "models", "model_type": name, **found}
                record |= {"device": options.device, "dtype": options.dtype}
                record |= {"transformers": transformers.__version__}
                record |= records.provenance(options.commit, options.device)
                records.append(options.output, [record])
                errors = f"{found['gradient_error']:.1e}, plain {found['plain_gradient_error']:.1e}"
                print(f"{name:<12} {path:<8} keep {found['keep']}: gradients {errors}", flush=True)


if __name__ == "__main__":
    main()
