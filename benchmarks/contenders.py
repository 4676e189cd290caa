"""What `comparison.py` measures: ways to fine-tune one model with LoRA, each at its best settings.

A contender is imported (`Contender.load`, which computes nothing on a GPU) and then built: random
weights on the device, LoRA on q, k, v and o, and a function of token ids that returns the mean loss
of all next tokens. Packages that a contender needs are imported where it is loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

from gpu_finetune import RANK, TARGETS, checkpointed_loss

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["CONTENDERS", "POSE_WINDOW", "Built", "Contender"]

# Tokens of a window of PoSE, Llama-3's own context.
POSE_WINDOW = 8192
# Pieces of a prompt that an answer repeats.
PASSAGES = 8
CHECKPOINTING = {"use_reentrant": False}


@dataclass(frozen=True)
class Built:
    """A model that is ready for steps.

    Attributes:
        loss: mean loss of a window's next tokens; takes token ids, int64[1, T].
        around: context of forward and backward.
    """

    model: PeftModel
    loss: Callable[[Tensor], Tensor]
    around: Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contender:
    """One way to fine-tune.

    Attributes:
        title: what tables call it.
        build: takes the model's configuration, device and tokens of a window.
        packages: distributions whose versions are recorded, and imported first of all.
        settings: what it was run with, for the record.
        keep: share of tokens that layers work on.
        exact: whether it computes what dense LoRA computes.
        why_not: why it cannot be measured here; None where it can.
    """

    title: str
    build: Callable[[PretrainedConfig, str, int], Built] | None = None
    packages: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep: float = 1.0
    exact: bool = True
    why_not: str | None = None

    def load(self) -> None:
        """Imports all that its steps need, and computes nothing on a GPU.

        Raises:
            ImportError: a package is missing.
        """
        for package in (*self.packages, "transformers", "peft", "common.models"):
            importlib.import_module(MODULES.get(package, package))


# What a distribution is imported as.
MODULES = {
    "cut-cross-entropy": "cut_cross_entropy",
    "liger-kernel": "liger_kernel.transformers",
    "flash-attn-4": "flash_attn.cute.interface",
    # Its trainer is loaded lazily.
    "trl": "trl.trainer.utils",
}


# --- parts that contenders share


def fast_attention() -> contextlib.AbstractContextManager[Any]:
    """The fastest attention of PyTorch on Hopper first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def random_model(config: PretrainedConfig, device: str) -> PreTrainedModel:
    """The model with random weights: bf16, or linear layers in 4 bits where the configuration has
    `quantize`."""
    from common.models import random_llama, random_llama_in_4_bits

    in_4_bits = getattr(config, "quantize", None) == "nf4"
    return (random_llama_in_4_bits if in_4_bits else random_llama)(config, device)


def adapted(config: PretrainedConfig, device: str, attention: str = "sdpa") -> PeftModel:
    """The model with random weights and LoRA in bf16."""
    from common.models import with_lora

    base = random_model(config, device)
    base.config._attn_implementation = attention
    return with_lora(base, RANK, TARGETS).train()


def attention_operators() -> set[Any]:
    """Attention of PyTorch, in the names of its dispatcher."""
    import torch

    names = ("cudnn_attention", "flash_attention", "flash_attention_for_cpu", "efficient_attention")
    return {getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names}


def storing(operators: set[Any]) -> dict[str, Any]:
    """Keywords of gradient checkpointing that store what these operators compute."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(_context: object, operator: object, *_: object, **__: object) -> CheckpointPolicy:
        is_stored = operator in operators
        return CheckpointPolicy.MUST_SAVE if is_stored else CheckpointPolicy.PREFER_RECOMPUTE

    return CHECKPOINTING | {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}


def labelled(model: PeftModel) -> Callable[[Tensor], Tensor]:
    """The loss that the model itself computes."""
    return lambda ids: model(input_ids=ids, labels=ids).loss


# --- Transformers and PEFT


def plain(config: PretrainedConfig, device: str, _tokens: int) -> Built:
    model = adapted(config, device)
    return Built(model, checkpointed_loss(model.get_base_model()), fast_attention)


def checkpointing(config: PretrainedConfig, device: str, tokens: int) -> Built:
    built = plain(config, device, tokens)
    built.model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING)
    return built


def selective(config: PretrainedConfig, device: str, tokens: int) -> Built:
    built = plain(config, device, tokens)
    base = built.model.get_base_model()
    base.gradient_checkpointing_enable(storing(attention_operators()))
    return built


def offload(config: PretrainedConfig, device: str, tokens: int) -> Built:
    built = plain(config, device, tokens)
    built.model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING, offload=True)
    return built


def cut_cross_entropy(config: PretrainedConfig, device: str, tokens: int) -> Built:
    from cut_cross_entropy import linear_cross_entropy

    built = checkpointing(config, device, tokens)
    base = built.model.get_base_model()

    def loss(ids: Tensor) -> Tensor:
        hidden = base.model(input_ids=ids).last_hidden_state
        return linear_cross_entropy(hidden, base.lm_head.weight, ids, shift=True)

    return Built(built.model, loss, fast_attention)


# --- Liger


def liger(
    config: PretrainedConfig,
    device: str,
    _tokens: int = 0,
    tiled: bool = False,
    stored: bool = False,
) -> Built:
    from liger_kernel.transformers import LigerTiledSwiGLUMLP, monkey_patch

    kind = config.model_type
    getattr(monkey_patch, f"apply_liger_kernel_to_{kind}")(swiglu=not tiled)
    if tiled:
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        names = [name for name in vars(module) if name.endswith("MLP") and name[0].isupper()]
        setattr(module, next(name for name in names if "Liger" not in name), LigerTiledSwiGLUMLP)
    model = adapted(config, device)
    kept = storing(attention_operators()) if stored else CHECKPOINTING
    model.get_base_model().gradient_checkpointing_enable(kept)
    return Built(model, labelled(model), fast_attention)


# --- TRL


def trl(config: PretrainedConfig, device: str, _tokens: int = 0, offloading: bool = False) -> Built:
    """What `SFTTrainer` does with `gradient_checkpointing_kwargs={"selective": True}`, or with
    `activation_offloading=True`, apart from its metrics that need no gradient."""
    from trl.models import activation_offloading, selective_activation_checkpointing
    from trl.trainer.utils import add_fused_lm_head

    from common.models import with_lora

    base = random_model(config, device)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    if not offloading:
        selective_activation_checkpointing.enable_selective_activation_checkpointing(base)
    base.gradient_checkpointing_enable(CHECKPOINTING)
    model = with_lora(base, RANK, TARGETS).train()

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(fast_attention())
            if offloading:
                stack.enter_context(moved)
            yield

    if offloading:
        moved = activation_offloading.get_act_offloading_ctx_manager(model=model)
    return Built(
        model, lambda ids: model(input_ids=ids, labels=ids, fused_lm_head=True).loss, around
    )


# --- Unsloth


def unsloth(config: PretrainedConfig, device: str, tokens: int, tiled: bool = False) -> Built:
    """Its own loader and adapters; only the weights come from here, not from a file."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from unsloth import FastLanguageModel

    in_4_bits = getattr(config, "quantize", None) == "nf4"

    def made(*_: object, **options: Any) -> Any:
        if in_4_bits:
            return random_model(config, device)
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                options.get("config") or config,
                dtype=torch.bfloat16,
                attn_implementation=options.get("attn_implementation") or "sdpa",
            )

    with tempfile.TemporaryDirectory() as folder:
        config.architectures = [f"{config.model_type.capitalize()}ForCausalLM"]
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        words = models.WordLevel({"<unk>": 0, "<pad>": 1, "<s>": 2, "</s>": 3}, unk_token="<unk>")
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words),
            unk_token="<unk>",
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
        ).save_pretrained(folder)
        with mock.patch.object(AutoModelForCausalLM, "from_pretrained", made):
            model, _ = FastLanguageModel.from_pretrained(
                folder,
                max_seq_length=tokens,
                dtype=torch.bfloat16,
                load_in_4bit=in_4_bits,
                unsloth_tiled_mlp=tiled,
            )
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=2 * RANK,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing="unsloth",
            max_seq_length=tokens,
        )

    def loss(ids: Tensor) -> Tensor:
        # Its adapters are in fp32, and its trainer runs in autocast.
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    return Built(model.train(), loss, fast_attention)


# --- others' attention


def shifted_groups(q: Tensor, k: Tensor, v: Tensor, groups: int, scale: float | None) -> Tensor:
    """S2-Attn of LongLoRA (arXiv 2309.12307): a half of the heads attends within groups, the other
    half within groups that begin half a group earlier, so that the first and the last of them have
    half the size.

    Args:
        q: bf16[1, H, T, D].
        k, v: bf16[1, G, T, D].
        groups: number of groups; T is a multiple of twice as many.
        scale: of the scores.

    Returns:
        [1, H, T, D].
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    size = q.shape[2] // groups

    def within(parts: tuple[Tensor, ...], size: int) -> Tensor:
        """Attention of all groups of one size, as a batch."""
        _, _, tokens, width = parts[0].shape
        folded = [
            part.reshape(part.shape[1], tokens // size, size, width).transpose(0, 1)
            for part in parts
        ]
        out = scaled_dot_product_attention(
            *folded, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(0, 1).reshape(1, parts[0].shape[1], tokens, width)

    straight, shifted = zip(*(part.chunk(2, 1) for part in (q, k, v)))
    edge = size // 2
    pieces = [
        within(tuple(part[:, :, start:stop] for part in shifted), length)
        for start, stop, length in (
            (0, edge, edge),
            (edge, q.shape[2] - edge, size),
            (q.shape[2] - edge, q.shape[2], edge),
        )
    ]
    return torch.cat((within(straight, size), torch.cat(pieces, 2)), 1)


def s2(config: PretrainedConfig, device: str, _tokens: int = 0, recompute: bool = True) -> Built:
    from transformers import AttentionInterface

    def attend(_module, q, k, v, _mask=None, scaling=None, **_):  # type: ignore[no-untyped-def]
        return shifted_groups(q, k, v, 4, scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register("s2", attend)
    model = adapted(config, device, "s2")
    base = model.get_base_model()
    if recompute:
        base.gradient_checkpointing_enable(CHECKPOINTING)
    return Built(model, checkpointed_loss(base), fast_attention)


def pose(config: PretrainedConfig, device: str, tokens: int) -> Built:
    """Windows of PoSE (arXiv 2309.10400): a short window whose second half stands at the end of the
    long context. All of the window's tokens and no others are trained."""
    built = plain(config, device, tokens)
    rotary = built.model.get_base_model().model.rotary_emb
    rotate = rotary.forward

    def skipped(_self: object, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        half = position_ids.shape[1] // 2
        gap = max(tokens - position_ids.shape[1], 0)
        moved = position_ids.clone()
        moved[:, half:] += gap
        return rotate(x, moved)

    # Position ids of the model itself would make it take the two halves for two documents.
    rotary.forward = types.MethodType(skipped, rotary)
    return built


def flash_attention_4(config: PretrainedConfig, device: str, _tokens: int = 0) -> Built:
    import torch
    from transformers import AttentionInterface

    from common.flash_attention import attend

    AttentionInterface.register("cute", attend)
    model = adapted(config, device, "cute")
    base = model.get_base_model()
    operators = {torch.ops.comparison.flash_attention_4.default}
    base.gradient_checkpointing_enable(storing(operators))
    return Built(model, checkpointed_loss(base), contextlib.nullcontext)


# --- lemo


def lemo(config: PretrainedConfig, device: str, tokens: int, **settings: Any) -> Built:
    import lemo as package

    groups = settings.pop("groups", None)
    if groups is not None:
        settings["layerwise"] = {"group_size": tokens // groups}
    model = adapted(config, device)
    package.enable(model, package.LemoConfig(**settings))
    return Built(model, labelled(model), contextlib.nullcontext)


def ours(title: str, **settings: Any) -> Contender:
    """lemo with these fields of `LemoConfig`; `groups` is the window's length over `group_size`."""

    def build(config: PretrainedConfig, device: str, tokens: int) -> Built:
        return lemo(config, device, tokens, **settings)

    keep = settings["keep"]
    return Contender(f"lemo, {title}", build, ("lemo",), settings, keep, exact=keep == 1)


def answered(model: PeftModel) -> Callable[[Tensor], Tensor]:
    """The loss of a window whose last hundredth repeats parts of the rest, and alone has labels."""

    import torch

    def loss(ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        length = max(tokens // 100 // PASSAGES, 1)
        begin = tokens - PASSAGES * length
        passages = [ids[:, at : at + length] for at in range(0, begin, begin // PASSAGES)]
        asked = torch.cat((ids[:, :begin], *passages[:PASSAGES]), 1)
        labels = asked.clone()
        labels[:, :begin] = -100
        return model(input_ids=asked, labels=labels).loss

    return loss


def ours_answering(title: str, **settings: Any) -> Contender:
    """lemo where only the last hundredth has labels, planned, with the scorer of answers."""

    def build(config: PretrainedConfig, device: str, tokens: int) -> Built:
        model = lemo(config, device, tokens, recompute="auto", **settings).model
        return Built(model, answered(model), contextlib.nullcontext)

    about = {"labelled": 0.01, "recompute": "auto", **settings}
    return Contender(f"lemo, {title}", build, ("lemo",), about, settings["keep"], exact=False)


def with_settings(build: Callable[..., Built], **settings: Any) -> Callable[..., Built]:
    return lambda config, device, tokens: build(config, device, tokens, **settings)


COMPUTED = {"visible_keys": "computed", "scorer": "random", "block_size": 64}
LAYER = {"recompute": "layer"}
CONTENDERS: dict[str, Contender] = {
    "plain": Contender("Transformers + PEFT, nothing recomputed", plain),
    "checkpointing": Contender(
        "Transformers + PEFT, checkpointing", checkpointing, (), {"recompute": "layers"}
    ),
    "selective": Contender(
        "Transformers + PEFT, selective checkpointing",
        selective,
        (),
        {"recompute": "all but attention"},
    ),
    "offload": Contender(
        "Transformers + PEFT, checkpointing with offload", offload, (), {"offload": True}
    ),
    "liger": Contender(
        "Liger kernels, checkpointing", liger, ("liger-kernel",), {"recompute": "layers"}
    ),
    "liger-selective": Contender(
        "Liger kernels, selective checkpointing",
        with_settings(liger, stored=True),
        ("liger-kernel",),
        {"recompute": "all but attention"},
    ),
    "liger-tiled": Contender(
        "Liger kernels, tiled MLP, checkpointing",
        with_settings(liger, tiled=True),
        ("liger-kernel",),
        {"recompute": "layers", "mlp": "LigerTiledSwiGLUMLP"},
    ),
    "unsloth": Contender(
        "Unsloth",
        unsloth,
        ("unsloth", "unsloth_zoo"),
        {"use_gradient_checkpointing": "unsloth", "adapters": "fp32, autocast"},
    ),
    "unsloth-tiled": Contender(
        "Unsloth, tiled MLP",
        with_settings(unsloth, tiled=True),
        ("unsloth", "unsloth_zoo"),
        {
            "use_gradient_checkpointing": "unsloth",
            "unsloth_tiled_mlp": True,
            "adapters": "fp32, autocast",
        },
    ),
    "trl": Contender(
        "TRL, selective checkpointing, fused head",
        trl,
        ("trl",),
        {"gradient_checkpointing_kwargs": {"selective": True}},
    ),
    "trl-offload": Contender(
        "TRL, checkpointing, activations offloaded, fused head",
        with_settings(trl, offloading=True),
        ("trl",),
        {"gradient_checkpointing": True, "activation_offloading": True},
    ),
    "cce": Contender(
        "Cut Cross-Entropy, checkpointing",
        cut_cross_entropy,
        ("cut-cross-entropy",),
        {"recompute": "layers"},
    ),
    "fa4": Contender(
        "FlashAttention-4, selective checkpointing",
        flash_attention_4,
        ("flash-attn-4",),
        {"recompute": "all but attention"},
    ),
    "s2": Contender(
        "LongLoRA's S2-Attn, checkpointing",
        s2,
        (),
        {"groups": 4, "recompute": "layers"},
        exact=False,
    ),
    "s2-plain": Contender(
        "LongLoRA's S2-Attn, nothing recomputed",
        with_settings(s2, recompute=False),
        (),
        {"groups": 4},
        exact=False,
    ),
    "pose": Contender(
        f"PoSE-like windows of {POSE_WINDOW} tokens",
        pose,
        (),
        {"window": POSE_WINDOW},
        exact=False,
    ),
    "sparselora": Contender(
        "SparseLoRA",
        exact=False,
        why_not="is in no package index; it needs predictors made from a model's trained weights, "
        "published for three models; and it computes tokens that have labels densely, so that on "
        "text, where all tokens have one, it leaves nothing out",
    ),
    "lemo-1": ours("keep 1, layers recomputed", keep=1.0, **LAYER),
    "lemo-1-selective": ours(
        "keep 1, all but attention recomputed", keep=1.0, recompute="selective"
    ),
    "lemo-0.5": ours("keep 0.5, layers recomputed", keep=0.5, **LAYER),
    "lemo-0.25": ours("keep 0.25, layers recomputed", keep=0.25, **LAYER),
    "lemo-0.5-computed": ours(
        "keep 0.5, the other tokens computed forward", keep=0.5, **COMPUTED, **LAYER
    ),
    "lemo-0.25-computed": ours(
        "keep 0.25, the other tokens computed forward", keep=0.25, **COMPUTED, **LAYER
    ),
    "lemo-0.5-2d": ours("keep 0.5, shifted groups", keep=0.5, groups=4, **LAYER),
    "lemo-0.25-2d": ours("keep 0.25, shifted groups", keep=0.25, groups=4, **LAYER),
    "lemo-1-planned": ours("keep 1, planned", keep=1.0, recompute="auto"),
    "lemo-0.5-planned": ours("keep 0.5, planned", keep=0.5, recompute="auto"),
    "lemo-0.25-planned": ours("keep 0.25, planned", keep=0.25, recompute="auto"),
    "lemo-0.25-answers": ours_answering("answers, keep 0.25, planned", keep=0.25),
    "lemo-0.25-answers-adaptive": ours_answering(
        "answers, keep 0.25 or half of the relevance, planned", keep=0.25, keep_relevance=0.5
    ),
}
