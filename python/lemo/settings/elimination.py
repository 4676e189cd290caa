"""LemoConfig: what is eliminated, when, and by which scores."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from lemo.settings.base import (
    Flag,
    Integer,
    NotNegative,
    Number,
    Place,
    Positive,
    Seed,
    Settings,
    Share,
    Switch,
    Tokens,
    names_in,
)

__all__ = ["LayerwiseConfig", "LemoConfig"]

T = TypeVar("T")

Layers = tuple[Integer, ...]

# What is kept where nothing is said, see `LemoConfig`.
_TEXT_BLOCK, _TEXT_KEEP = 0.25, 0.5
_ANSWER_BLOCK, _ANSWER_KEEP = 64, 0.25
# A short prompt is kept as a whole: there is little to win.
_PROMPT_TOKENS = 1024
# Scorers that find what answers need.
_OF_ANSWERS = ("lexical", "attention", "given")


class LayerwiseConfig(Settings):
    """The paper's own policies: kept sets that differ from layer to layer, or in time.

    LeMo, sections 4 and 5, and LongLoRA's groups. They are kept to compare with the papers. By our
    measurements one kept set for all layers is better (docs/QUALITY.md), so all of this is off by
    default. Lists with one entry for each layer are checked against the model by `lemo.enable`.
    """

    policy: Literal["ratio", "threshold"] = Field(
        "ratio",
        description="How scores become a kept set. ratio: the best share of the blocks of each "
        "sequence, those with a label before those without. threshold: the blocks that score at "
        "least the layer's threshold.",
    )
    keep: tuple[Share, ...] | None = Field(
        None, description="Share of blocks that attention keeps, for each layer, over `keep`."
    )
    keep_mlp: Share | tuple[Share, ...] | None = Field(
        None,
        description="Share of blocks that the MLP keeps, or one for each layer. Without it the MLP "
        "uses attention's kept set of its layer.",
    )
    thresholds: tuple[Number, ...] | None = Field(
        None,
        description="Thresholds of attention, one for each layer. Without them policy threshold "
        "takes those of the predictor folder.",
    )
    mlp_thresholds: tuple[Number, ...] | None = Field(
        None,
        description="Thresholds of the MLP. Without them: the predictor folder's where those of "
        "attention come from there, otherwise the MLP uses attention's kept set.",
    )
    dense_layers: Layers = Field(
        (), description="Layers that keep everything; negative ones count from the end."
    )
    select_at: Literal["first", "all"] | Layers = Field(
        "first",
        description="Layers that score blocks; the others use the scores of the nearest earlier "
        "one. first: the first layer that is not dense; all: every layer.",
    )
    keep_schedule: tuple[tuple[Share, Share], ...] = Field(
        (),
        description="[progress, keep] pairs, ascending: from that share of the training on, this "
        "keep replaces all others in layers that are not dense, cut by ratio. 1.0 is a dense "
        "finish.",
    )
    group_size: Annotated[Tokens, Field(ge=2)] | None = Field(
        None,
        description="Tokens of a shifted attention group (LongLoRA, arXiv 2309.12307), counted in "
        "positions of the sequence, kept or not: kept rows see those of their own group; null: no "
        "groups.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.select_at == ():
            raise ValueError("select_at: expected at least one layer, got an empty list")
        if any(later[0] <= earlier[0] for earlier, later in pairwise(self.keep_schedule)):
            pairs = [list(pair) for pair in self.keep_schedule]
            raise ValueError(f"keep_schedule: expected ascending progress, got {pairs}")
        return self


class LemoConfig(Settings):
    """Settings of token elimination.

    What is left open follows the batch, by what was measured (docs/QUALITY.md, docs/ANSWERS.md).
    Text, where most tokens have labels: half of the blocks, a quarter of the longest sequence each,
    drawn again in each step. Prompts, where answers alone have labels (on half of the tokens at
    most): a quarter of the blocks, 64 tokens each, those that the answers need. In either case the
    same blocks in every layer.
    """

    block_size: Tokens | Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None,
        union_mode="left_to_right",
        description="Tokens of a block, the unit that is kept or left out; or a share of the "
        "longest sequence of a batch, rounded up. null: 64 where a scorer finds what answers "
        "need, else 0.25. With predictors of sub-blocks, null or a share: the size that they "
        "were trained for.",
    )
    keep: Share | None = Field(
        None,
        description="Share of blocks that is kept, rounded up to whole blocks: of quarters 0.3 "
        "keeps half, and 0.8 all. With a scorer that finds what answers need, all blocks with "
        "labels are kept, and at least half of the share is kept of the prompt. null: 0.25 where "
        "a scorer finds what answers need, else 0.5.",
    )
    keep_relevance: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None,
        description="With a scorer that finds what answers need: only as many blocks are kept as "
        "hold this share of the relevance of those without labels, at most `keep`, at least "
        "keep_least and keep_tokens. null: `keep` of them.",
    )
    keep_least: Share = Field(
        0.0, description="Share of blocks that keep_relevance keeps at least, one block always."
    )
    keep_tokens: NotNegative | None = Field(
        None,
        description="With a scorer that finds what answers need: tokens of each prompt that are "
        "kept at least. null: 1024 where keep is null, too, else 0.",
    )
    scorer: Literal[
        "auto", "random", "lexical", "attention", "given", "pooled", "predictor", "exact"
    ] = Field(
        "auto",
        description="Where block scores come from. auto: lexical for prompts with answers, random "
        "for text. random: every block is trained in turn; lexical: words that a block shares "
        "with the answers and with what stands around them; attention: the same, and what "
        "retrieval heads look at from the answers; given: by the caller, see Handle.scored; "
        "predictor: networks trained by `lemo prepare` with target relevance, of what answers "
        "need. The paper's own, kept to compare with it: predictor, with another target, of what "
        "each sub-block computes; exact: that itself, slow; pooled: that of means of blocks.",
    )
    predictor: Place | None = Field(
        None, description="Folder written by `lemo prepare`, for scorer predictor."
    )
    heads: Place | None = Field(
        None, description="File written by `lemo relevance heads`, for scorer attention."
    )
    scores: Place | None = Field(
        None,
        description="Folder written by `lemo relevance scores`, for scorer given in `lemo "
        "finetune`.",
    )
    keep_first: NotNegative = Field(
        0,
        description="Blocks always kept at the start of a sequence. By ratio, blocks that have "
        "labels come before them; with scorer random they are kept only where the share leaves "
        "room for another block.",
    )
    keep_last: NotNegative = Field(1, description="The same at the end of a sequence.")
    visible_keys: Literal["kept", "all", "computed"] = Field(
        "kept",
        description="What kept rows attend to. kept: kept rows. all: also left-out rows, as they "
        "are in the residual. computed: also left-out rows, which all layers compute without "
        "gradients, storing their keys and values only.",
    )
    mask_loss: Flag | Annotated[Number, Field(gt=0, le=1)] = Field(
        True,
        union_mode="left_to_right",
        description="Tokens that do not count in the loss. true: those that no sub-block kept; a "
        "share: those that fewer than this share of all sub-blocks kept; false: all count.",
    )
    burn_in: NotNegative | Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0,
        union_mode="left_to_right",
        description="Tokens at the start of a kept span, fewer than a block, whose loss does not "
        "count, because the text right before them is left out; or a share of a block. Without "
        "effect where nothing is missing (visible_keys computed) or masked (mask_loss false, or "
        "true beside dense layers).",
    )
    loss_chunk: Tokens | None = Field(
        None,
        description="Rows of a loss chunk, whose logits exist at a time. null: as many as take 256 "
        "MiB (fp32) on the CPU, 768 MiB (in the model's dtype) on a GPU.",
    )
    recompute: (
        Literal["auto", "none", "layer", "selective"]
        | Annotated[tuple[Literal["none", "layer", "selective"], ...], BeforeValidator(names_in)]
    ) = Field(
        "auto",
        description="What backward computes a second time instead of storing it. none; layer: all "
        "of every layer but its gathered rows, the MLP a chunk of rows at a time; selective: the "
        "same, but attention's output is stored; a list: one of these for each layer; auto: layer "
        "where the model's gradient checkpointing is on; elsewhere, on a GPU, what is fastest for "
        "each layer within the free memory; else none.",
    )
    offload: Literal["auto"] | Share | tuple[Share, ...] = Field(
        "auto",
        description="Share of what each layer saves for backward that is on the host in between; a "
        "list: one for each layer. auto: none where host_memory is 0; else, on a GPU, what is "
        "fastest for each layer within the free memory.",
    )
    host_memory: Annotated[Number, Field(ge=0, le=2**30)] = Field(
        0.0,
        description="GiB of the host that saved activations may take, as one pool of pinned "
        "memory. 0: they stay on the device.",
    )
    cuda_graphs: Switch = Field(
        "auto",
        description="Whether a training pass on a GPU is captured as CUDA graphs, forward and "
        "backward, when its shapes come again, so that the host does not issue kernels one by one. "
        "The results are the same. auto: where a layer's kernels are shorter than that takes, and "
        "where as much memory stays free as the graphs hold; on: wherever it can be. It cannot "
        "where layers keep rows of their own, modules run as they are, or processes share out rows "
        "or weights; the log says so. The activations' memory stays with the graphs; "
        "Handle.graphs.clear() gives it back.",
    )
    head_groups: Positive | None = Field(
        None,
        description="Groups of key heads, with their query heads, by which attention's backward "
        "runs in layers that are recomputed: more of them take less memory at a time, and a little "
        "more time; at most one for each key head (for every two with group_size). null: as many "
        "as the memory asks for where the planner decides, else 1.",
    )
    path: Literal["auto", "native", "generic"] = Field(
        "auto",
        description="How the layers of a model run. native: lemo computes them, with every setting "
        "(Llama, Mistral, Qwen2, Qwen3, OPT); generic: the model's own layers run on the kept "
        "rows, with one kept set for all layers (any causal LM of Transformers); auto: native "
        "where the class is one of these, else generic.",
    )
    products: Literal["dtype", "fp8", "fp8_fast"] = Field(
        "dtype",
        description="In what products with the frozen weights of layers are computed, forward and "
        "for gradients of their inputs. dtype: that of the model; fp8: 8 bits (e4m3) with fp32 "
        "sums, on GPUs that have it (Ada, Hopper; on the CPU slowly, for tests): faster, and less "
        "exact; fp8_fast: the same with the tensor cores' own sums, which keep fewer bits. The "
        "products of queries and keys and of the last layer's MLP stay in dtype, as do layers that "
        "err too much; Handle.unquantised_products and the log name them. The rounding of weights "
        "changes from step to step (Handle.begin_step), so that adapters do not learn to mend it. "
        "The head, attention, norms and adapters are not changed. After weights were written "
        "through weight.data, enable again.",
    )
    seed: Seed = Field(0, description="Of scorer random.")
    layerwise: LayerwiseConfig = Field(
        LayerwiseConfig(),
        description="The paper's own policies, which differ from layer to layer or in time.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        size, burn_in = self.block_size, self.burn_in
        if isinstance(burn_in, int) and isinstance(size, int) and burn_in >= size > 1:
            raise ValueError(
                f"burn_in: expected fewer tokens than a block of {size}, got {burn_in}"
            )
        if self.scorer == "predictor" and self.predictor is None:
            raise ValueError(
                "predictor: scorer 'predictor' needs the folder written by 'lemo prepare', got null"
            )
        for name, scorer in (("predictor", "predictor"), ("heads", "attention")):
            if self.scorer != scorer and getattr(self, name) is not None:
                raise ValueError(f"{name}: is for scorer '{scorer}', got scorer '{self.scorer}'")
        if self.scorer == "attention" and self.heads is None:
            raise ValueError(
                "heads: scorer 'attention' needs the file written by 'lemo relevance heads', got "
                "null"
            )
        if self.host_memory == 0 and self.moves:
            raise ValueError(
                f"host_memory: expected GiB of the host for offload {self.offload}, got 0"
            )
        if (self.head_groups or 1) > 1 and self.visible_keys == "computed":
            raise ValueError(
                "head_groups: expected null or 1 with visible_keys 'computed', where keys of other "
                f"rows are put between, got {self.head_groups}"
            )
        layerwise = self.layerwise
        thresholds = layerwise.policy == "threshold" and layerwise.thresholds is None
        if thresholds and self.scorer != "predictor":
            raise ValueError(
                "layerwise.thresholds: policy 'threshold' needs one for each layer, got null "
                f"(scorer '{self.scorer}' brings none of its own)"
            )
        return self

    @property
    def moves(self) -> bool:
        """Whether `offload` itself says that something goes to the host."""
        if isinstance(self.offload, str):
            return False
        return any(self.offload) if isinstance(self.offload, tuple) else self.offload > 0

    @property
    def plans_host(self) -> bool:
        """Whether it is left to the planner what goes to the host."""
        return self.offload == "auto" and self.host_memory > 0

    @property
    def in_8_bits(self) -> bool:
        """Whether products with frozen weights are computed in 8 bits."""
        return self.products != "dtype"

    @property
    def host_bytes(self) -> int:
        """`host_memory` in bytes."""
        return round(self.host_memory * 2**30)

    def offload_shares(self, num_layers: int) -> tuple[float, ...] | None:
        """The share of each layer's bytes that goes to the host; None: what the planner chooses.

        Raises:
            ValueError: there is not one for each layer.
        """
        if self.plans_host:
            return None
        if self.offload == "auto":
            return (0.0,) * num_layers
        if not isinstance(self.offload, tuple):
            return (float(self.offload),) * num_layers
        return _for_each_layer("offload", self.offload, num_layers)

    def recompute_modes(self, num_layers: int) -> tuple[str, ...]:
        """The setting `recompute` of each layer: "auto" for all of them, or else none is "auto".

        Raises:
            ValueError: there is not one for each layer.
        """
        if isinstance(self.recompute, str):
            return (self.recompute,) * num_layers
        return _for_each_layer("recompute", self.recompute, num_layers)

    @property
    def finds_answers(self) -> bool:
        """Whether the scorer finds what answers need."""
        if self.scorer == "predictor" and self.predictor is not None:
            return _predicts_relevance(self.predictor)
        return self.scorer in _OF_ANSWERS

    def resolved(self, answers: bool) -> Self:
        """These settings with what is left open filled in.

        Args:
            answers: for prompts whose answers alone have labels; False: for text.
        """
        scorer = self.scorer
        if scorer == "auto":
            scorer = "lexical" if answers else "random"
        finds = answers and self.model_copy(update={"scorer": scorer}).finds_answers
        filled: dict[str, object] = {"scorer": scorer}
        if self.block_size is None:
            filled["block_size"] = _ANSWER_BLOCK if finds else _TEXT_BLOCK
        if self.keep_tokens is None:
            filled["keep_tokens"] = _PROMPT_TOKENS if finds and self.keep is None else 0
        if self.keep is None:
            filled["keep"] = _ANSWER_KEEP if finds else _TEXT_KEEP
        return self.model_copy(update=filled)

    def of_predictors(
        self, block_size: int | None, thresholds: Mapping[str, Sequence[float]] | None
    ) -> Self:
        """These settings with what predictors of sub-blocks say where it is left to them.

        Args:
            block_size: tokens of the blocks that they score; None: any number.
            thresholds: their own, of "attention" and "mlp", one for each layer; None: none.

        Raises:
            ValueError: they score blocks of another size than the one of the settings.
        """
        filled: dict[str, object] = {}
        if block_size is not None:
            if isinstance(self.block_size, int) and self.block_size != block_size:
                raise ValueError(
                    f"block_size: the predictors were trained for {block_size}, "
                    f"got {self.block_size}"
                )
            filled["block_size"] = block_size
        layerwise = self.layerwise
        if thresholds and layerwise.policy == "threshold" and layerwise.thresholds is None:
            mlp = layerwise.mlp_thresholds or thresholds.get("mlp")
            chosen = {
                "thresholds": tuple(thresholds["attention"]),
                "mlp_thresholds": None if mlp is None else tuple(mlp),
            }
            filled["layerwise"] = layerwise.model_copy(update=chosen)
        return self.model_copy(update=filled)


def _for_each_layer(name: str, values: tuple[T, ...], num_layers: int) -> tuple[T, ...]:
    if len(values) != num_layers:
        raise ValueError(
            f"{name}: expected {num_layers} entries, one for each layer, got {len(values)}"
        )
    return values


def _predicts_relevance(folder: str) -> bool:
    """Whether a folder of `lemo prepare` says what answers need, not what sub-blocks do.

    One that cannot be read says nothing here; `lemo.predictors.storage` says why when it is loaded.
    """
    file = Path(folder, "predictor.json")
    try:
        return _target(file, file.stat().st_mtime_ns) == "relevance"
    except (OSError, ValueError, RecursionError):
        return False


@functools.lru_cache(maxsize=16)
def _target(file: Path, changed: int) -> object:
    content = json.loads(file.read_text(encoding="utf-8"))
    return content.get("target") if isinstance(content, dict) else None
