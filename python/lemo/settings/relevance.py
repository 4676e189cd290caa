"""HeadsConfig and ScoresConfig: how relevance is found, and computed for a data set."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lemo.settings.base import Context, Flag, Place, Positive, Seed, Settings, Tokens, Windows
from lemo.settings.finetune import Device, Dtype, RopeScaling

__all__ = ["HeadsConfig", "ScoresConfig"]


class HeadsConfig(Settings):
    """Settings of one run of `lemo relevance heads`."""

    model: Place = Field(description="Folder or hub name of the causal language model.")
    documents: Place = Field(
        description="Texts to plant facts in: a .jsonl, .jsonl.xz, .jsonl.gz, .json, .csv, "
        ".parquet or .txt file, a folder written by datasets.save_to_disk, or one of shards. "
        "The first 4000 "
        "characters of each are not used."
    )
    output: Place = Field(description="File to write.")
    context_length: Annotated[Tokens, Field(ge=1024)] = Field(
        8192,
        description="Tokens of a window. Beyond the model's own context its rotary embedding is "
        "scaled.",
    )
    windows: Windows = Field(24, description="Windows, each with 16 facts and 4 questions.")
    block_size: Tokens = Field(128, description="Tokens of a block.")
    count: Positive = Field(
        4,
        description="Heads to choose at most; none that finds less than half of what the best one "
        "finds.",
    )
    layers: Positive | None = Field(
        None,
        description="Heads are looked for in so many of the first layers; null: in as few as have "
        "one that finds 95% of what the best of all layers finds.",
    )
    rope_scaling: RopeScaling = Field(
        "linear", description="As for `lemo finetune`, where context_length exceeds the model's."
    )
    dtype: Dtype = Field(
        "auto", description="Of weights and matrix products: float32, bfloat16, float16 or auto."
    )
    device: Device = Field("auto", description="cpu, cuda, or auto.")
    seed: Seed = Field(0, description="Of the facts and their places.")
    overwrite: Flag = Field(False, description="Replace the file that is there already.")


class ScoresConfig(Settings):
    """Settings of one run of `lemo relevance scores`."""

    model: Place = Field(
        description="Folder or hub name of the model that will be trained. Its tokenizer and chat "
        "template are used, and it computes the scores where no scout is named."
    )
    scout: Place | None = Field(
        None,
        description="A smaller model with an equal tokenizer, which computes the scores in its "
        "place.",
    )
    documents: Place = Field(
        description="Conversations, or prompts with completions, as for `lemo finetune`."
    )
    output: Place = Field(description="Folder to write, for `elimination.scores`.")
    scorer: Literal["lexical", "attention"] = Field(
        "lexical",
        description="Where block scores come from, lexical or attention, see `elimination.scorer`. "
        "lexical reads the tokenizer alone, no weights.",
    )
    heads: Place | None = Field(
        None,
        description="File written by `lemo relevance heads` for the model that computes the "
        "scores, for scorer attention.",
    )
    context_length: Context = Field(
        8192, description="Tokens of a training window, as the run will have it."
    )
    block_size: Tokens = Field(
        64,
        description="Tokens of a block that gets a score. A run's blocks should be as long, or "
        "longer: then each has the largest score of the blocks in it.",
    )
    rope_scaling: RopeScaling = Field(
        "linear",
        description="As for `lemo finetune`, where context_length exceeds that of the model that "
        "computes the scores.",
    )
    dtype: Dtype = Field(
        "auto", description="Of weights and matrix products: float32, bfloat16, float16 or auto."
    )
    device: Device = Field("auto", description="cpu, cuda, or auto.")
    resume: Flag = Field(False, description="Go on with scores whose computation was interrupted.")
    overwrite: Flag = Field(False, description="Replace the scores that are in output already.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected at most one of the two, got both")
        if self.scorer == "attention" and self.heads is None:
            raise ValueError(
                "heads: scorer 'attention' needs the file written by 'lemo relevance heads', got "
                "null"
            )
        for name in ("scout", "heads"):
            if self.scorer == "lexical" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: expected null beside scorer 'lexical', which asks no model, got "
                    f"{getattr(self, name)!r}"
                )
        return self
