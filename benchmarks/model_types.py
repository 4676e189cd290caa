"""Every type of causal LM of Transformers, as a tiny random model: right with lemo, or refused?

    python benchmarks/model_types.py [--kind text image] [--types gemma3 mamba ...]

Measured: loss and gradients of a training step, with every token kept and with half of them, of a
plain batch and of one with padding. Against: the model's own eager forward, where left-out tokens
are masked. Prompts are text; images are the matter of benchmarks/models.py and of the tests. Takes
one to ten seconds a type on the CPU. Nothing is downloaded.

A line is appended for each type: bench, kind, model_type, class, outcome, said (what lemo or
Transformers said), loss_error and gradient_error (the largest), versions, commit, date. Outcomes:

- right: errors of rounding alone (loss 1e-4, gradients 1e-3, relative), and `handle.verify` passes.
- refused: `lemo.enable` or the first step raises an error that names the model.
- wrong: none of the two. There should be none.
- not built: no tiny model was made of the type, or its own training step fails.
"""

from __future__ import annotations

import copy
import signal
import warnings
from types import FrameType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

import lemo
from common import records
from lemo import LemoConfig
from models import error

VOCABULARY, TOKENS, BLOCK, WINDOW = 67, 64, 8, 17
LARGEST, SECONDS = 60_000_000, 60  # parameters of a model, and time for a type
_WITH_IMAGES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
KINDS = {
    "text": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image": (AutoModelForImageTextToText, _WITH_IMAGES),
}

# What makes a configuration small, by the names that it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "rotary_dim", "laurel_rank"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_key_value_heads", "index_n_heads", "encoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim", "swa_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("query_pre_attn_scalar", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "attention_chunk_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_k", "altup_num_inputs"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "moe_layer_freq"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_layer_start_index"), 1),
    **dict.fromkeys(("num_kv_shared_layers", "num_mtp_layers", "zero_expert_num"), 0),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("sliding_window", "window_size"), WINDOW),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"word_embed_proj_dim": 32, "output_router_logits": True},
}
SMALL_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "embed_dim"), 16),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_hidden_layers", "depth"), 2),
    **dict.fromkeys(("patch_size", "spatial_merge_size", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_channels", "in_channels", "in_chans"), 3),
    **dict.fromkeys(("image_size", "window_size", "head_dim"), 8),
    **{"out_hidden_size": 32, "fullatt_block_indexes": [1], "temporal_patch_size": 1},
    **{"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
}
# Settings that some types need beside these; those of a part by its name.
_EQUAL_HEADS = {"num_key_value_heads": 4}
_THREE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_TEXT_OF_THREE = {"text_config": {"rope_parameters": _THREE}}
_TOKENS = {"image_token_id": 66, "video_token_id": 65, "audio_token_id": 64, "boi_token_id": 63}
_TOKENS |= {"eoi_token_id": 62, "boa_token_id": 61, "eoa_token_index": 60, "eoa_token_id": 60}
_FULL = {"layer_types": ["full_attention"] * 4}
_DECODER = {"is_decoder": True}
_ROTATIONS = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4}
        for kind in ("full_attention", "sliding_attention")
    }
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _EQUAL_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "longcat_flash", "minicpm3", "sarvam_mla"), _EQUAL_HEADS),
    **dict.fromkeys(("youtu", "kimi_linear"), _EQUAL_HEADS),
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl"), _TEXT_OF_THREE),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), _TEXT_OF_THREE),
    **dict.fromkeys(("bert", "roberta", "bert-generation", "electra"), _DECODER),
    **dict.fromkeys(("camembert", "xlm-roberta", "ernie"), _DECODER),
    "glm4v_moe": {"text_config": {"rope_parameters": {**_THREE, "mrope_section": [1, 1, 0]}}},
    "kimi_k25": {"text_config": _EQUAL_HEADS},
    "mistral4": {"text_config": {**_EQUAL_HEADS, "head_dim": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "bamba": _MAMBA,
    "granitemoehybrid": {**_MAMBA, **_FULL, "position_embedding_type": "rope"},
    "llama4_text": {**_FULL, "no_rope_layers": [1, 1, 1, 0]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2},
    "mamba2": {"num_heads": 8},
    "zamba2": {"layer_types": ["hybrid", "mamba"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4": {**_TOKENS},
    "gemma4_unified": {**_TOKENS},
    "cohere_compass_text": _ROTATIONS,
    "cohere_compass": {"text_config": _ROTATIONS},
    "cosmos3_edge": _TEXT_OF_THREE,
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4},
    },
    "dory": {"use_cache": False},  # its cache has no window
    "hy_v4_vl": _TEXT_OF_THREE,
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "reformer": {**_DECODER, "axial_pos_embds": False},
    "step3p7": {"text_config": {"sliding_window": WINDOW}},
    "xmod": {**_DECODER, "default_language": "en_XX", "languages": ["en_XX"]},
}


def small(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The arguments by which a configuration's class makes a small one, without dropout."""
    known, other = config.to_dict(), getattr(type(config), "attribute_map", {})
    made = {}
    for name, value in sizes.items():
        own = other.get(name, name)
        absent = name == "sliding_window" and getattr(config, name, None) is None
        if own in known and not absent:
            made[own] = value
    for name, value in known.items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "jitter" in name):
            made[name] = 0.0
    return made


def configuration(model_type: str) -> Any:
    """A small configuration of a type, with small parts."""
    config = AutoConfig.for_model(model_type)
    more = copy.deepcopy(MORE.get(model_type, {}))
    made = small(config, SMALL)
    for name in getattr(type(config), "sub_configs", {}):
        part = getattr(config, name, None)
        if part is None:
            continue
        of_text = any(word in name for word in ("text", "decoder", "thinker"))
        sizes = small(part, SMALL if of_text else SMALL_VISION) | more.pop(name, {})
        made[name] = {"model_type": part.model_type, **sizes}
    return type(config)(**made | more)


def build(kind: str, model_type: str) -> nn.Module:
    """A random model in training mode; its biases and the weights of its norms are random, too."""
    auto, _ = KINDS[kind]
    config = configuration(model_type)
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f}M parameters, of which no setting here makes fewer")
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.train()


def batches() -> list[dict[str, Tensor]]:
    """Two sequences of text, plain and with padding behind the second."""
    ids = torch.randint(3, VOCABULARY - 8, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 45:] = 0
    labels = ids.where(mask.bool(), torch.tensor(-100))
    return [
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids, "labels": labels, "attention_mask": mask},
    ]


def judge(model: nn.Module) -> dict[str, Any]:
    """What comes of a model: outcome, said, errors."""
    dense = copy.deepcopy(model)
    try:
        lemo.enable(model, LemoConfig(path="generic")).remove()
    except (TypeError, ValueError) as found:
        return {"outcome": "refused", "said": said(found)}
    try:
        step(dense, batches()[0])
    except Exception as found:
        return {"outcome": "not built", "said": said(found)}
    worst = [0.0, 0.0]
    for batch in batches():
        for keep in (1.0, 0.5):
            try:
                handle = lemo.enable(model, LemoConfig(keep=keep, block_size=BLOCK, path="generic"))
                mine = step(model, batch)
            except (TypeError, ValueError, NotImplementedError) as found:
                return {"outcome": "refused", "said": said(found)}
            oracle = batch if keep == 1 else masked_padding(dense, batch, handle)
            handle.remove()
            theirs = step(dense, oracle)
            worst = [max(w, error(a, b)) for w, a, b in zip(worst, mine, theirs)]
    handle = lemo.enable(model, LemoConfig(keep=0.5, block_size=BLOCK, path="generic"))
    try:
        handle.verify(batches()[0])
        verified = True
    except ValueError:
        verified = False
    right = verified and worst[0] < 1e-4 and worst[1] < 1e-3
    errors = {"loss_error": worst[0], "gradient_error": worst[1]}
    return {"outcome": "right" if right else "wrong", "said": "", **errors}


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, all gradients)."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    parameters = list(model.parameters())
    grads = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    return loss.detach(), torch.cat([x.flatten() for x in grads])


def masked_padding(
    model: nn.Module, batch: dict[str, Tensor], handle: lemo.Handle
) -> dict[str, Tensor]:
    """See `models.masked`, of a batch that may be padded behind its sequences."""
    statistics, ids = handle.statistics()[0], batch["input_ids"]
    present = batch.get("attention_mask", torch.ones_like(ids)).bool()
    blocks = torch.zeros(statistics.layout.num_blocks, dtype=torch.bool)
    blocks[statistics.attention_blocks.long()] = True
    rows = blocks.repeat_interleave(statistics.layout.block_starts.diff().long())
    kept = torch.zeros_like(present).masked_scatter(present, rows)
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = batch["labels"][:, 1:].where(kept[:, :-1], -100)
    positions = torch.arange(TOKENS).expand(ids.shape)
    return {**batch, "labels": labels, "position_ids": positions, "attention_mask": kept.long()}


def said(found: Exception) -> str:
    """The first line of an error."""
    return f"{type(found).__name__}: {found}".splitlines()[0][:300]


def overtime(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def main() -> None:
    """Judges and appends."""
    parser = records.parser(__doc__, records.RESULTS / "model_types.jsonl")
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--types", nargs="+", help="(all)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, overtime)
    for kind in options.kind:
        for name in options.types or sorted(KINDS[kind][1]):
            record = {"bench": "model types", "kind": kind, "model_type": name, "class": ""}
            signal.alarm(SECONDS)
            try:
                model = build(kind, name)
                record |= {"class": type(model).__name__, **judge(model)}
            except Exception as found:
                record |= {"outcome": "not built", "said": said(found)}
            finally:
                signal.alarm(0)
            record |= {"transformers": transformers.__version__}
            record |= records.provenance(options.commit, "cpu")
            records.append(options.output, [record])
            print(f"{kind:<5} {name:<26} {record['outcome']:<9} {record['said'][:150]}", flush=True)


if __name__ == "__main__":
    main()
