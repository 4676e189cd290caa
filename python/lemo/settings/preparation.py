"""PredictorSettings and PrepareConfig: how predictors of block scores are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lemo.settings.base import (
    Context,
    Flag,
    GiB,
    Integer,
    NotNegative,
    Number,
    Place,
    Positive,
    Rank,
    Seed,
    Settings,
    Tokens,
    Windows,
)
from lemo.settings.finetune import Device, Dtype, RopeScaling

__all__ = ["PredictorSettings", "PrepareConfig"]

PositiveShare = Annotated[Number, Field(gt=0, le=1)]

# Defaults of target relevance where they are others: what is trained has the blocks and the share
# of prompts with answers, see `LemoConfig`.
_RELEVANCE_DEFAULTS = {
    "block_size": 64,
    "keep": 0.25,
    "rank": 256,
    "steps": 1000,
    "windows": 1024,
    "learning_rate": 2e-3,
}


class PredictorSettings(Settings):
    """What `lemo.preparation.pipeline.prepare` does, with any model and any windows."""

    block_size: Tokens = Field(
        1024, description="Tokens of a block. With target relevance the default is 64."
    )
    rank: Rank | None = Field(
        None,
        description="Hidden units of a predictor's layers; null: a sixteenth of the hidden size, "
        "at least 8. With target relevance the default is 256.",
    )
    target: Literal["exact", "content", "relevance"] = Field(
        "exact",
        description="What scores predict. relevance: what the answers of a prompt need, one "
        "predictor for the model, on its embeddings; the default where heads are given. The "
        "paper's own, for each sub-block of each layer: exact: the exact scores, a block's place "
        "included; content: what a block's content adds to its place.",
    )
    keep: Annotated[Number, Field(gt=0, lt=1)] = Field(
        0.5,
        description="Share of blocks that the ranking serves, and budget of the thresholds. With "
        "target relevance the default is 0.25.",
    )
    keep_first: NotNegative = Field(
        0,
        description="Blocks at the start of a sequence that are always kept and take no part in "
        "the ranking.",
    )
    keep_last: NotNegative = Field(1, description="The same at the end of a sequence.")
    steps: Positive = Field(
        300,
        description="Training steps of each predictor. For attention a step of the optimizer; for "
        "the MLP one for every 2048 tokens. With target relevance the default is 1000.",
    )
    windows_per_step: Windows = Field(4, description="Windows packed into one step.")
    learning_rate: Annotated[Number, Field(gt=0, le=1e30)] = Field(
        3e-3,
        description="Peak rate of AdamW; linear warm-up over 5% of the steps, then a cosine to 0. "
        "With target relevance the default is 0.002.",
    )
    weight_decay: Annotated[Number, Field(ge=0)] = Field(0.01, description="Of AdamW.")
    rank_weight: Annotated[Number, Field(ge=0)] = Field(
        0.2, description="Weight of the ranking loss against the regression, for attention."
    )
    prune_every: NotNegative = Field(
        50, description="Steps between two prunings of hidden units; 0 never prunes."
    )
    prune_zero_share: PositiveShare = Field(
        0.99,
        description="A hidden unit that is zero for at least this share of the tokens is pruned.",
    )
    prune_to: PositiveShare | None = Field(
        None,
        description="Share of the hidden units to shrink to, those that are missed least first; "
        "null: only units that are always zero go.",
    )
    prune_mlp_to: PositiveShare | None = Field(
        None,
        description="The same for the MLP's predictors, which need their size more; null: as "
        "prune_to.",
    )
    dense_layers: tuple[Integer, ...] = Field(
        (),
        description="Layers that keep everything in the threshold search; negative ones count from "
        "the end.",
    )
    search_rounds: NotNegative = Field(
        1, description="Rounds of the threshold search; 0 leaves the thresholds of the budget."
    )
    search_windows: Windows = Field(
        2, description="Held-out windows of one evaluation of the loss in that search."
    )
    disk_gib: GiB = Field(
        16.0,
        description="Limit of what inputs of sub-blocks take on disk while it runs, in GiB.",
    )
    seed: Seed = Field(0, description="Of initial weights and orders.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_target(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("heads") is not None:
            # What learns from retrieval heads can learn nothing but relevance.
            values = {"target": "relevance"} | values
        if isinstance(values, dict) and values.get("target") == "relevance":
            defaults = _RELEVANCE_DEFAULTS.items()
            return {name: value for name, value in defaults if name in cls.model_fields} | values
        return values

    @property
    def prunings(self) -> list[int]:
        """Steps after which units are pruned; the last two thirds are for recovery."""
        if self.prune_every == 0:
            return []
        last = max(self.steps // 3, 1)
        prunings = list(range(self.prune_every, last + 1, self.prune_every))
        if not prunings and not (self.prune_to is None and self.prune_mlp_to is None):
            # Too short for an interval; the size that was asked for is reached all the same.
            prunings = [last]
        return prunings


class PrepareConfig(PredictorSettings):
    """Settings of one run of `lemo prepare`."""

    model: Place = Field(description="Folder or hub name of the causal language model.")
    documents: Place = Field(
        description="What to learn from: a .jsonl, .jsonl.xz, .jsonl.gz, .json, .csv, .parquet or "
        ".txt file, a folder written by datasets.save_to_disk, or one of shards. For target "
        "relevance: conversations, or prompts with completions."
    )
    output: Place = Field(description="Folder to write.")
    heads: Place | None = Field(
        None,
        description="File written by `lemo relevance heads`: what a predictor of relevance learns "
        "from.",
    )
    held_out_documents: Place | None = Field(
        None,
        description="Documents to test on; null: a tenth of documents, at least one. "
        "Copies of them are left out of the training.",
    )
    lengths: Annotated[tuple[Context, ...], Field(min_length=1)] = Field(
        (4096,),
        description="Tokens of the windows; each length gets as many windows. With target "
        "relevance the longest one counts: tokens of an example at most.",
    )
    windows: Windows = Field(
        64,
        description="Training windows of each length. With target relevance: examples at most, and "
        "the default is 1024.",
    )
    held_out_windows: Windows = Field(8, description="Test windows of each length.")
    rope_scaling: RopeScaling = Field(
        "linear",
        description="How a model is extended whose context is shorter than the longest window: "
        "linear, yarn, dynamic or none; give what fine-tuning will use.",
    )
    dtype: Dtype = Field("auto", description="Of the model: float32, bfloat16, float16 or auto.")
    device: Device = Field(
        "auto",
        description="cpu, cuda, or auto: a GPU where lemo's operators run on it, else the CPU.",
    )
    overwrite: Flag = Field(
        False,
        description="Replace the folder of an earlier preparation, or an empty one, at output.",
    )

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.target == "relevance" and self.heads is None:
            raise ValueError(
                "heads: target 'relevance' needs the file written by 'lemo relevance heads', got "
                "null"
            )
        if self.target != "relevance" and self.heads is not None:
            raise ValueError(f"heads: is for target 'relevance', got target '{self.target}'")
        return self
