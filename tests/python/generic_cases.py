"""Tiny random models that lemo knows nothing of, and what elimination means for them.

The oracle is Transformers alone. A model's own forward knows kept rows: tokens in the middle that
its attention mask leaves out are seen by no other token, and the others keep their positions.
"""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lemo import LemoConfig
from tiny_models import VOCABULARY, WINDOW, gradients, make_ids
from tolerances import assert_close_fp32

BLOCK = 8
IMAGE = VOCABULARY - 1  # the token that stands for a part of an image
_IMAGE_TOKENS = slice(5, 21)

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}
_GEMMA = {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
SETTINGS = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.0, "init_std": 0.2},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {},
    "mixtral": {"num_local_experts": 4, **_EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, **_EXPERTS},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **_EXPERTS,
    },
    "gpt_neox": {},
    "gpt2": _NO_DROPOUT,
    "smollm3": {},
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "glm4": {"head_dim": 8},
    "cohere2": {"sliding_window": WINDOW},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,  # keys are of 16
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
}


class OwnLlama(LlamaForCausalLM):
    """A subclass of a model that lemo knows exactly."""


def settings(keep=0.5, **more):
    return LemoConfig(**{"keep": keep, "block_size": BLOCK, "path": "generic"} | more)


def batch_of(tokens=61):
    ids = make_ids(2, tokens)
    return {"input_ids": ids, "labels": ids}


def train(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return loss


def make(name, seed=0, **overrides):
    """A model in training mode, fp32, eager; biases and weights of norms are not 0 and 1."""
    config = AutoConfig.for_model("llama" if name == "own_llama" else name)
    settings = {**_COMMON, **SETTINGS.get(name, {}), **overrides}
    config = type(config)(**settings)
    torch.manual_seed(seed)
    if name == "own_llama":
        model = OwnLlama._from_config(config, attn_implementation="eager")
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return perturbed(model, seed)


def perturbed(model, seed=0):
    """Biases and weights of norms are not 0 and 1, which would hide a forgotten one."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter += 0.2 * noise.to(parameter.device)
    return model.train()


def make_llava(text="llama"):
    """(LLaVA, a batch with an image in each prompt)."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 2, "projection_dim": 16, "num_hidden_layers": 2}
    config = LlavaConfig(
        text_config={"model_type": text, **_COMMON, **SETTINGS[text]},
        vision_config={"model_type": "clip_vision_model", **vision},
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = perturbed(LlavaForConditionalGeneration(config))
    batch = _with_image(make_ids(2, 64))
    generator = torch.Generator("cpu").manual_seed(0)
    return model, {**batch, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}


def make_qwen_vl():
    """(Qwen2.5-VL, a batch with an image in each prompt); its positions are of three kinds."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    vision |= {"patch_size": 2, "out_hidden_size": 32, "window_size": 8, "temporal_patch_size": 1}
    config = Qwen2_5_VLConfig(
        text_config={"model_type": "qwen2_5_vl_text", **_COMMON, "rope_parameters": rope},
        vision_config={**vision, "fullatt_block_indexes": [1], "in_chans": 3},
        image_token_id=IMAGE,
        vision_start_token_id=IMAGE - 1,
        video_token_id=IMAGE - 2,
    )
    torch.manual_seed(0)
    model = perturbed(Qwen2_5_VLForConditionalGeneration(config))
    ids = make_ids(2, 64).clamp(max=IMAGE - 3)
    ids[:, _IMAGE_TOKENS.start - 1] = IMAGE - 1
    batch = _with_image(ids)
    generator = torch.Generator("cpu").manual_seed(0)
    patches = torch.randn(2 * 64, 3 * 2 * 2, generator=generator)
    grid = torch.tensor([[1, 8, 8]] * 2)
    kinds = (batch["input_ids"] == IMAGE).int()
    return model, {
        **batch,
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


def make_gemma3():
    """(Gemma 3, a batch with an image in each prompt, whose tokens see each other both ways)."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 2, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config={**_COMMON, **_GEMMA},
        vision_config=vision,
        mm_tokens_per_image=16,
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    model = perturbed(Gemma3ForConditionalGeneration(config))
    batch = _with_image(make_ids(2, 64))
    kinds = (batch["input_ids"] == IMAGE).long()
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    return model, {**batch, "pixel_values": images, "token_type_ids": kinds}


_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_heads": 2}
_VISION |= {"image_size": 8, "patch_size": 2, "num_hidden_layers": 1, "depth": 2}
_PATCHES = {"spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3}
_QWEN3_VISION = {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
_QWEN3_VISION |= {**_VISION, **_PATCHES, "out_hidden_size": 32}
_PINPOINTS = {"image_grid_pinpoints": [[8, 8]], "vision_feature_layer": -1}
_CLIP = {"model_type": "siglip_vision_model", **_VISION}
IMAGE_MODELS = {
    "paligemma": {
        "text_config": {"model_type": "gemma", "head_dim": 8},
        "vision_config": _CLIP,
        "projection_dim": 32,
    },
    "qwen3_vl": {
        "text_config": {"head_dim": 8, "rope_parameters": _ROPE},
        "vision_config": _QWEN3_VISION,
    },
    "qwen3_vl_moe": {
        "text_config": {
            **{"head_dim": 8, "rope_parameters": _ROPE, "moe_intermediate_size": 16},
            **{"num_experts": 4, **_EXPERTS},
        },
        "vision_config": _QWEN3_VISION,
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": _CLIP,
        "vision_feature_select_strategy": "full",
        **_PINPOINTS,
    },
    "idefics3": {
        "text_config": {"model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "idefics3_vision"},
        "scale_factor": 4,
    },
}


def make_image_model(name):
    """(a model of text and images, a batch with an image in each prompt)."""
    settings = dict(IMAGE_MODELS[name])
    settings["text_config"] = {**_COMMON, **settings["text_config"]}
    kind = type(AutoConfig.for_model(name))
    more = {"vision_start_token_id": IMAGE - 1, "video_token_id": IMAGE - 2}
    config = kind(**settings, image_token_id=IMAGE, image_token_index=IMAGE, **more)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    generator = torch.Generator("cpu").manual_seed(0)
    ids = make_ids(2, 64).clamp(max=IMAGE - 3)
    ids[:, _IMAGE_TOKENS.start - 1] = IMAGE - 1
    parts = {"idefics3": 1, "llava_onevision": 16 + 4 * (4 + 1)}.get(name, 16)
    span = slice(_IMAGE_TOKENS.start, _IMAGE_TOKENS.start + parts)
    batch = _with_image(ids, span)
    shape = {"llava_onevision": (2, 2, 3, 8, 8), "idefics3": (2, 1, 3, 8, 8)}.get(
        name, (2, 3, 8, 8)
    )
    if "qwen3" in name:
        shape, grid = (2 * 64, 3 * 2 * 2), torch.tensor([[1, 8, 8]] * 2)
        kinds = (batch["input_ids"] == IMAGE).int()
        batch |= {"image_grid_thw": grid, "mm_token_type_ids": kinds}
    elif name == "llava_onevision":
        batch["image_sizes"] = torch.tensor([[8, 8]] * 2)
    elif name == "paligemma":  # a prompt whose tokens see each other both ways, and an answer
        answer = (torch.arange(64) >= 40).expand(2, 64)
        batch["token_type_ids"] = answer.long()
        batch["labels"] = batch["labels"].where(answer, torch.tensor(-100))
    batch["pixel_values"] = torch.randn(shape, generator=generator)
    return perturbed(model), batch


def _with_image(ids, span=_IMAGE_TOKENS):
    ids[ids == IMAGE] = 3
    ids[:, span] = IMAGE
    return {"input_ids": ids, "labels": ids.where(ids != IMAGE, torch.tensor(-100))}


def kept_mask(handle, batch):
    """[B, S] bool, the tokens that are kept; the batch is not packed."""
    statistics = handle.statistics()[0]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    blocks = statistics.attention_blocks
    if blocks is None:
        return mask
    kept = torch.zeros(statistics.layout.num_blocks, dtype=torch.bool)
    kept[blocks.long()] = True
    rows = kept.repeat_interleave(statistics.layout.block_starts.diff().long())
    return torch.zeros_like(mask).masked_scatter(mask, rows)


def masked_batch(batch, kept):
    """The batch of the oracle: left-out tokens masked, and what they predict without a label."""
    labels = torch.full_like(batch["labels"], -100)
    labels[:, 1:] = batch["labels"][:, 1:].where(kept[:, :-1], torch.tensor(-100))
    columns = torch.arange(kept.shape[1]).expand(kept.shape)
    positions = {"position_ids": batch.get("position_ids", columns)}
    return {**batch, **positions, "labels": labels, "attention_mask": kept.long()}


def assert_same(model, dense, loss, oracle):
    """Equal losses and gradients of all parameters, after a backward pass of either."""
    assert_close_fp32(loss, oracle, "loss")
    mine, theirs = gradients(model), gradients(dense)
    assert theirs
    assert mine.keys() == theirs.keys()
    norm = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, expected in theirs.items():
        # Some have no gradient but rounding: a bias of keys without rotation shifts all scores.
        if max(mine[name].norm(), expected.norm()) > 1e-5 * norm:
            assert_close_fp32(mine[name], expected, name)
