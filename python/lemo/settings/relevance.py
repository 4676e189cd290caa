"""HeadsConfig: how the retrieval heads of a model are found."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lemo.settings.base import Flag, Integer, Settings, Text
from lemo.settings.finetune import Device, Dtype, NotNegative, Positive, RopeScaling

__all__ = ["HeadsConfig"]


class HeadsConfig(Settings):
    """Settings of one run of `lemo relevance heads`."""

    model: Text = Field(description="Folder or hub name of the causal language model.")
    documents: Text = Field(
        description="Texts to plant facts in: a .jsonl, .jsonl.xz, .jsonl.gz or .txt file, or a "
        "folder written by datasets.save_to_disk."
    )
    output: Text = Field(description="File to write.")
    context_length: Annotated[Integer, Field(ge=1024)] = Field(
        8192,
        description="Tokens of a window. Beyond the model's own context its rotary embedding is "
        "scaled.",
    )
    windows: Positive = Field(24, description="Windows, each with 16 facts and 4 questions.")
    block_size: Positive = Field(128, description="Tokens of a block.")
    count: Positive = Field(4, description="Heads to choose at most.")
    layers: Positive | None = Field(
        None,
        description="Heads are looked for in so many of the first layers; null: in as few as find "
        "95% of what all layers find.",
    )
    rope_scaling: RopeScaling = Field(
        "linear", description="As for `lemo finetune`, where context_length exceeds the model's."
    )
    dtype: Dtype = Field("auto", description="Of weights and matrix products.")
    device: Device = Field("auto", description="cpu, cuda, or auto.")
    seed: NotNegative = Field(0, description="Of the facts and their places.")
    overwrite: Flag = Field(False, description="Replace the file that is there already.")
