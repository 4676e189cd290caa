"""FinetuneConfig: what a run computes, and where it writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from lemo.settings.base import (
    MOST,
    Context,
    Flag,
    GiB,
    NotNegative,
    Number,
    Place,
    Positive,
    Rank,
    Seed,
    Settings,
    Text,
    Windows,
    fields_of,
    names_in,
    plain,
)
from lemo.settings.elimination import LemoConfig

__all__ = [
    "NOT_COMPARED",
    "Device",
    "Dtype",
    "FinetuneConfig",
    "Quantize",
    "RopeScaling",
    "compared",
    "differences",
]

RopeScaling = Literal["linear", "yarn", "dynamic", "none"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Quantize = Literal["nf4", "int8", "float8"]

# Fields that say how to start or how to watch a run; they may differ when it is resumed. So may
# the paths of its inputs: what lies there is compared, by fingerprints in the checkpoints.
NOT_COMPARED = (
    *("output", "resume", "overwrite", "log_every", "save_every", "keep_checkpoints", "shard"),
    *("model", "documents"),
    # What is stored and what is recomputed changes rounding alone; a run that ran out of memory
    # has to go on with less.
    *("memory_limit", "gradient_checkpointing", "elimination.recompute", "elimination.head_groups"),
    # The results are the same.
    "elimination.cuda_graphs",
    *("elimination.offload", "elimination.host_memory"),
    *("elimination.predictor", "elimination.heads", "elimination.scores"),
)


class FinetuneConfig(Settings):
    """Settings of one run of `lemo finetune`."""

    model: Place = Field(description="Folder or hub name of the causal language model.")
    documents: Place = Field(
        description="What to train on, documents or conversations: a .jsonl, .jsonl.xz, .jsonl.gz, "
        ".json, .csv, .parquet or .txt file, a folder written by datasets.save_to_disk, or one of "
        "shards."
    )
    labels: Literal["answers", "all"] = Field(
        "answers",
        description="Tokens of conversations, and of prompts with completions, that have a label: "
        "the answers, or all.",
    )
    output: Place = Field(description="Run folder.")
    context_length: Context = Field(
        8192,
        description="Tokens of a training window. Beyond the model's own context its rotary "
        "embedding is scaled.",
    )
    steps: Positive = Field(100, description="Optimizer steps of the run.")
    batch_size: Windows = Field(1, description="Windows of a forward pass, in each process.")
    gradient_accumulation: Windows = Field(1, description="Forward passes of an optimizer step.")
    context_parallel: Positive = Field(
        1,
        description="Processes that share out the kept rows of each window; the others of a run "
        "take windows of their own. Start them with torchrun.",
    )
    shard: Flag = Field(
        False,
        description="Cut the weights into a share for each process (FSDP2), and gather those of a "
        "layer while it runs: for models that do not fit one GPU. Start it with torchrun.",
    )
    learning_rate: Annotated[Number, Field(ge=0, le=1e30)] = Field(
        2e-4, description="Learning rate after the warm-up, the highest one."
    )
    lr_schedule: Literal["cosine", "constant"] = Field(
        "cosine",
        description="Learning rate after the warm-up: cosine (down to 0 after the last step) or "
        "constant.",
    )
    warmup_steps: NotNegative = Field(
        10, description="Steps over which the learning rate rises linearly."
    )
    weight_decay: Annotated[Number, Field(ge=0)] = Field(0.0, description="Of AdamW.")
    max_grad_norm: Annotated[Number, Field(ge=0)] = Field(
        1.0, description="Gradients are scaled down to this norm; 0 leaves them as they are."
    )
    lora_rank: Rank = Field(16, description="Rank of every LoRA pair.")
    lora_alpha: Annotated[Number, Field(ge=0, le=1e30)] = Field(
        32.0, description="Scale of every LoRA pair, divided by the rank."
    )
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout in front of every LoRA pair."
    )
    lora_targets: (
        Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(names_in)] | None
    ) = Field(
        None, description="Names of the adapted modules; null: every linear layer but the head."
    )
    train_norms: Flag = Field(
        False, description="Train the norms' weights, too; they are saved in the adapter."
    )
    rope_scaling: RopeScaling = Field(
        "linear",
        description="Scaling of the rotary embedding where context_length exceeds the model's "
        "context: linear, yarn or dynamic; none trains it as it is.",
    )
    dtype: Dtype = Field(
        "auto",
        description="Of frozen weights and matrix products: float32, bfloat16, float16, or auto "
        "(bfloat16 on a GPU that has it, else float32). Adapter and optimizer are float32.",
    )
    quantize: Quantize | None = Field(
        None,
        description="How frozen weights of linear layers are stored: nf4 (4 bits, as in QLoRA) or "
        "int8 by bitsandbytes, float8 by torchao; null: in dtype. A model that is stored quantised "
        "stays as it is.",
    )
    device: Device = Field(
        "auto",
        description="cpu, cuda, or auto: a GPU where all that the run needs works on it, else the "
        "CPU.",
    )
    gradient_checkpointing: Flag = Field(
        False,
        description="Recompute layers in backward. elimination.recompute says more; its default "
        "follows this.",
    )
    memory_limit: GiB | None = Field(
        None,
        description="GiB of device memory that a step may take, by which each layer stores or "
        "recomputes its activations (elimination.recompute auto); a run that cannot fit is "
        "refused. null: what is free on the GPU; on the CPU no limit.",
    )
    deterministic: Flag = Field(
        False,
        description="Bit-equal losses from run to run and across a resumption on a GPU, too (on "
        "the CPU they always are). Backward is slower.",
    )
    verify: Flag = Field(
        True,
        description="Check before the first step that lemo, with every token kept, computes what "
        "the model's own forward computes.",
    )
    seed: Seed = Field(0, description="Of the data order, LoRA's start and dropout.")
    save_every: Positive = Field(
        50, description="Steps between checkpoints; one is always written at the end."
    )
    keep_checkpoints: Positive = Field(2, description="How many of the newest checkpoints stay.")
    log_every: Positive = Field(
        1, description="Steps between lines on the screen; the log files get every step."
    )
    resume: Flag = Field(False, description="Go on from the newest checkpoint in output.")
    overwrite: Flag = Field(False, description="Delete the run that is in output already.")
    elimination: LemoConfig | None = Field(
        LemoConfig(), description="What lemo leaves out; null: dense LoRA."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected at most one of the two, got both")
        tokens = self.context_length
        for name in ("batch_size", "gradient_accumulation"):
            count = getattr(self, name)
            if count * tokens > MOST:
                raise ValueError(
                    f"{name}: expected at most {MOST // tokens} times {tokens} tokens, since a "
                    f"step has {MOST} at most, got {count}"
                )
            tokens *= count
        elimination = self.elimination
        if elimination is None and self.context_parallel > 1:
            raise ValueError(
                "context_parallel: expected 1 without elimination, since kept rows are what is "
                f"shared out, got {self.context_parallel}; elimination.keep=1 keeps all"
            )
        if elimination is None:
            return self
        for beside, name, known in _beside(elimination):
            value = getattr(self, name)
            if value not in known:
                expected = " or ".join("null" if each is None else str(each) for each in known)
                raise ValueError(
                    f"{name}: expected {expected.lower()} beside elimination.{beside}, got "
                    f"{str(value).lower()}"
                )
        if elimination.scorer == "given" and elimination.scores is None:
            raise ValueError(
                "elimination.scores: scorer 'given' needs the folder written by 'lemo relevance "
                "scores', got null"
            )
        if elimination.scores is not None and elimination.scorer != "given":
            raise ValueError(
                f"elimination.scores: expected scorer 'given' beside it, got '{elimination.scorer}'"
            )
        return self


def _beside(elimination: LemoConfig) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(a setting of elimination, a setting of a run, values of this that go with it)."""
    if elimination.in_8_bits:
        products = f"products {elimination.products}"
        yield products, "quantize", (None, "float8")
        yield products, "shard", (False,)
    if elimination.host_memory:
        yield "host_memory", "context_parallel", (1,)
        yield "host_memory", "shard", (False,)


def differences(saved: Mapping[str, Any], wanted: FinetuneConfig) -> list[str]:
    """What a resumed run may not change but does, as lines "name was saved, now wanted".

    Args:
        saved: settings of the run, as from `compared`; those that it lacks are not compared.
        wanted: the settings that it is resumed with.
    """
    now = compared(wanted)
    names = [name for name in saved if name in now and saved[name] != now[name]]
    if "elimination" in names:
        # Where there is none its settings are nothing to compare.
        names = [name for name in names if not name.startswith("elimination.")]
    return [f"{name} was {saved[name]!r}, now {now[name]!r}" for name in names]


def compared(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that a resumed run may not change, by name, as values that JSON has.

    Those of groups have dots in their names; of no elimination they are None.
    """
    flat: dict[str, Any] = {}
    for path, _ in fields_of(FinetuneConfig):
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name, None)
        if path not in NOT_COMPARED and not isinstance(value, Settings):
            flat[path] = plain(value)
    return flat | {"elimination": "off" if config.elimination is None else "on"}
