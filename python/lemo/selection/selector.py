"""Which blocks every sub-block keeps: scores, policies, sharing between layers, statistics."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import pad

from lemo import ops
from lemo.packing.blocks import BlockLayout, Selection, block_tokens, kept_blocks
from lemo.settings.elimination import LemoConfig

__all__ = ["LayerStatistics", "Selection", "Selector"]


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer kept in a forward pass.

    Attributes:
        layer: index of the layer.
        tokens: T, packed tokens of the batch.
        attention_rows, mlp_rows: rows that each sub-block kept.
        attention_blocks, mlp_blocks: int32 indices of the kept blocks, or None for all.
        layout: how the tokens were cut into blocks.
    """

    layer: int
    tokens: int
    attention_rows: int
    mlp_rows: int
    attention_blocks: Tensor | None
    mlp_blocks: Tensor | None
    layout: BlockLayout = field(repr=False)


class Selector:
    """Turns a config, block scores and the training progress into the selection of every sub-block.

    A forward pass calls `begin` once, then `select` for "attention" and "mlp" of each layer, in
    order.
    """

    def __init__(
        self,
        config: LemoConfig,
        num_layers: int,
        folder_thresholds: dict[str, list[float]] | None = None,
    ) -> None:
        """Resolves the per-layer settings.

        Args:
            config: the settings.
            num_layers: layers of the model.
            folder_thresholds: "attention" and "mlp" thresholds of a predictor folder.

        Raises:
            ValueError: a list without one entry for each layer, a layer that does not exist, or a
                layer that eliminates before any layer has chosen a set.
        """
        self.config = config
        self.num_layers = num_layers
        self.progress = 0.0
        self._dense = set(
            _resolve("layerwise.dense_layers", config.layerwise.dense_layers, num_layers)
        )
        layerwise = config.layerwise
        keep = config.keep if layerwise.keep is None else layerwise.keep
        self._keep = {"attention": _per_layer("layerwise.keep", keep, num_layers)}
        self._thresholds: dict[str, list[float]] = {}
        if layerwise.policy == "threshold":
            self._thresholds = self._resolve_thresholds(folder_thresholds or {})
            self.mlp_shares = "mlp" not in self._thresholds
        else:
            self.mlp_shares = layerwise.keep_mlp is None
        keep_mlp = keep if layerwise.keep_mlp is None else layerwise.keep_mlp
        self._keep["mlp"] = _per_layer("layerwise.keep_mlp", keep_mlp, num_layers)
        self._source = self._resolve_sources()
        self._keeps_everything = False
        self._layout: BlockLayout | None = None
        self._labelled: Tensor | None = None
        self._scores: dict[str, Tensor] = {}
        self._cuts: dict[tuple[str, str, float], Selection] = {}
        self._selected: dict[str, list[Selection]] = {"attention": [], "mlp": []}
        self._left_out: dict[int, Selection] = {}
        self._reached_threshold = False
        self._check_keeps_something()

    def _check_keeps_something(self) -> None:
        """By the settings; `check_kept` does by what a pass has kept."""
        shares = [share for kind in self._keep.values() for share in kind]
        shares += [keep for _, keep in self.config.layerwise.keep_schedule]
        if self.config.layerwise.policy == "ratio" and not self._dense and not any(shares):
            raise ValueError(
                "keep: expected more than 0 in some layer, got 0 everywhere, so nothing would be "
                "trained"
            )

    def _resolve_thresholds(self, folder: dict[str, list[float]]) -> dict[str, list[float]]:
        layerwise = self.config.layerwise
        attention, mlp = layerwise.thresholds, layerwise.mlp_thresholds
        if attention is None:
            attention = folder.get("attention")
            mlp = folder.get("mlp") if mlp is None else mlp
        if attention is None:
            raise ValueError(
                "layerwise.thresholds: policy 'threshold' needs one for each layer, got null, "
                "and the predictor folder has none either"
            )
        thresholds = {
            "attention": _per_layer("layerwise.thresholds", tuple(attention), self.num_layers)
        }
        if mlp is not None:
            thresholds["mlp"] = _per_layer("layerwise.mlp_thresholds", tuple(mlp), self.num_layers)
        return thresholds

    def _resolve_sources(self) -> list[int | None]:
        """For every layer, the layer whose scores it uses."""
        eliminating = [layer for layer in range(self.num_layers) if layer not in self._dense]
        match self.config.layerwise.select_at:
            case "first":
                choosing = eliminating[:1]
            case "all":
                choosing = eliminating
            case layers:
                choosing = sorted(set(_resolve("layerwise.select_at", layers, self.num_layers)))
        sources: list[int | None] = []
        for layer in range(self.num_layers):
            earlier = [source for source in choosing if source <= layer]
            sources.append(earlier[-1] if earlier else None)
        for layer in eliminating:
            if sources[layer] is None:
                raise ValueError(
                    f"layerwise.select_at: layer {layer} is not dense, so expected a layer <= "
                    f"{layer} that chooses a set, got {list(self.config.layerwise.select_at)}"
                )
        return sources

    @contextmanager
    def keeping_everything(self) -> Iterator[None]:
        """Every sub-block keeps everything inside, whatever the settings say."""
        self._keeps_everything = True
        try:
            yield
        finally:
            self._keeps_everything = False

    def set_progress(self, progress: float) -> None:
        """Share of the training that is done, in [0, 1]; drives the schedule."""
        if isinstance(progress, bool) or not isinstance(progress, Real):
            raise TypeError(f"progress: expected a number, got {progress!r}")
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress: expected a share between 0 and 1, got {progress}")
        self.progress = float(progress)

    def begin(self, layout: BlockLayout, labelled: Tensor | None = None) -> None:
        """Starts a forward pass over these tokens; forgets the previous one.

        Args:
            layout: how they are cut into blocks.
            labelled: [T] bool, rows that have a label; None: nothing is known of labels.
        """
        self._layout = layout
        self._labelled = None if labelled is None else layout.blocks_with(labelled)
        self._scores, self._cuts, self._left_out = {}, {}, {}
        self._selected = {"attention": [], "mlp": []}

    def select(self, layer: int, kind: str, score: Callable[[], Tensor]) -> Selection:
        """The rows that sub-block `kind` of `layer` keeps.

        Args:
            layer: index; layers come in ascending order.
            kind: "attention" or "mlp", in this order.
            score: gives this sub-block's block scores [B]; called without gradients, and only if
                some layer uses them.
        """
        if kind == "mlp" and self.mlp_shares:
            selection = self._selected["attention"][layer]
        else:
            if self._has_to_score(layer, kind):
                with torch.no_grad():
                    self._scores[kind] = score().float()
                self._cuts = {key: cut for key, cut in self._cuts.items() if key[0] != kind}
            selection = self._cut(layer, kind)
        self._selected[kind].append(selection)
        return selection

    def _scheduled_keep(self) -> float | None:
        due = [
            keep
            for progress, keep in self.config.layerwise.keep_schedule
            if self.progress >= progress
        ]
        return due[-1] if due else None

    def _rule(self, layer: int, kind: str) -> tuple[str, float] | None:
        """(policy, value) of a sub-block; None keeps everything."""
        if layer in self._dense or self._keeps_everything:
            return None
        keep = self._scheduled_keep()
        if keep is None and self.config.layerwise.policy == "threshold":
            # Scores of different layers are on different scales, so the layer that scored cuts.
            return "threshold", self._thresholds[kind][self._source[layer]]
        if keep is None:
            keep = self._keep[kind][layer]
        return None if keep == 1.0 else ("ratio", keep)

    def _has_to_score(self, layer: int, kind: str) -> bool:
        return self._source[layer] == layer and any(
            self._source[user] == layer and self._rule(user, kind) is not None
            for user in range(layer, self.num_layers)
        )

    def _cut(self, layer: int, kind: str) -> Selection:
        layout, rule = self._layout, self._rule(layer, kind)
        if rule is None:
            return self._everything()
        key = (kind, *rule)
        if key not in self._cuts:
            scores, always = self._scores[kind], (self.config.keep_first, self.config.keep_last)
            if rule[0] == "ratio" and (self._labelled is not None or self._crowded(rule[1])):
                scores, always = self._ranks(scores, rule[1]), (0, 0)
            cut = ops.token_select(scores, layout, *rule, *always)
            # All rows kept is the dense case, which needs no row index.
            self._cuts[key] = self._everything() if cut.num_rows == layout.num_tokens else cut
        return self._cuts[key]

    def _always_kept(self, keep: float) -> list[int]:
        """Blocks that come before others whatever their scores.

        Chance is there to train every block in turn: it gets the share where nothing of it would be
        left.
        """
        first = 0
        blocks: list[int] = []
        for count in self._layout.block_counts:
            ends = {*range(count)[: self.config.keep_first]}
            ends |= {*range(count)[count - min(self.config.keep_last, count) :]}
            if self.config.scorer != "random" or len(ends) < kept_blocks(keep, count):
                blocks += [first + block for block in sorted(ends)]
            first += count
        return blocks

    def _crowded(self, keep: float) -> bool:
        """Whether blocks that are always kept would leave nothing of some sequence to chance."""
        if self.config.scorer != "random":
            return False
        ends = self.config.keep_first + self.config.keep_last
        counts = [count for count in self._layout.block_counts if count]
        return any(min(ends, count) >= kept_blocks(keep, count) for count in counts)

    def _ranks(self, scores: Tensor, keep: float) -> Tensor:
        """Scores [B] that put blocks with a label before those without, and in either group the
        blocks that are always kept before the others; apart from that in the same order."""
        always = self._always_kept(keep)
        if self._labelled is None:
            priority = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
        else:
            priority = 2 * self._labelled.int()
        if always:
            index = torch.tensor(always, device="cpu")
            if scores.device.type == "cuda":
                # A copy that the host does not wait for.
                index = index.pin_memory()
            index = index.to(scores.device, non_blocking=True)
            priority = priority.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        # Ranks, exact whatever the scores are; among equal ones the earlier block stays first.
        order = scores.argsort(descending=True, stable=True)
        order = order[priority[order].argsort(descending=True, stable=True)]
        ranks = order.argsort().to(scores.dtype)
        return torch.where(scores.isnan(), scores, -ranks)

    def _everything(self) -> Selection:
        # One object for each pass: layers that keep the same rows are recognized by identity.
        key = ("", "everything", 1.0)
        if key not in self._cuts:
            self._cuts[key] = Selection.everything(self._layout)
        return self._cuts[key]

    def left_out(self, selection: Selection) -> Selection:
        """The rows that a selection of this pass, not of everything, leaves out."""
        if id(selection) not in self._left_out:
            self._left_out[id(selection)] = ops.left_out(selection)
        return self._left_out[id(selection)]

    def check_kept(self) -> None:
        """Raises ValueError after a pass that trains nothing, or, the first, only fixed blocks."""
        selections = [s for kind in self._selected.values() for s in kind]
        if not any(selection.num_rows for selection in selections):
            raise ValueError(
                "keep: expected some block to be kept, got none in any layer, so nothing is trained"
            )
        if self.config.layerwise.policy != "threshold" or self._reached_threshold:
            return
        ends, everything = self.config.keep_first + self.config.keep_last, self._layout.num_blocks
        fixed = sum(min(ends, count) for count in self._layout.block_counts)
        kept = max(
            everything if selection.kept_blocks is None else selection.kept_blocks.numel()
            for kind in self._selected.values()
            for layer, selection in enumerate(kind)
            if layer not in self._dense or len(self._dense) == self.num_layers
        )
        self._reached_threshold = kept > fixed or fixed == everything
        if not self._reached_threshold:
            raise ValueError(
                f"thresholds: expected some block to reach one, got none of {everything} in the "
                "first batch; only the blocks that are always kept would be trained"
            )

    def masked_rows(self, complete: bool = False) -> Tensor | None:
        """[T] bool: rows whose loss does not count after this pass; None: all count.

        Args:
            complete: whether nothing was missing in this pass, so that nothing is burnt in.
        """
        mask = self.config.mask_loss
        if mask is False:
            return None
        selections = [s for kind in self._selected.values() for s in kind]
        # How many sub-blocks have to keep a row; more than a rounding error of the share.
        needed = 1 if mask is True else max(math.ceil(mask * len(selections) - 1e-9), 1)
        everywhere = sum(selection.rows is None for selection in selections)
        if everywhere >= needed:
            return None
        # By blocks: every layer may have a set of its own, and one launch serves them all.
        layout = self._layout
        lengths = layout.block_starts.diff().long()
        kept = torch.cat([s.kept_blocks for s in selections if s.rows is not None])
        times = torch.zeros(layout.num_blocks, dtype=torch.int32, device=lengths.device)
        times.index_add_(0, kept, torch.ones_like(kept))
        masked = times < needed - everywhere
        rows = masked.repeat_interleave(lengths, output_size=layout.num_tokens)
        complete = complete or self.config.burn_in == 0 or self.config.visible_keys == "computed"
        return rows if complete else rows | self._burnt_in(masked, lengths)

    def _burnt_in(self, masked: Tensor, lengths: Tensor) -> Tensor:
        """[T] bool: the first rows of blocks that follow a masked one of their sequence.

        Args:
            masked: [B] bool.
            lengths: [B] int64, tokens of the blocks.
        """
        layout = self._layout
        # One entry more: where an empty last sequence would begin.
        behind = pad(masked, (1, 0))
        behind = behind.index_fill_(0, layout.cu_blocks.long(), False)[:-1]
        count = block_tokens(self.config.burn_in, layout.block_size)
        # Rows up to `ends` of their block; a block is no longer than its own rows.
        ends = torch.where(behind, layout.block_starts[:-1] + count, 0)
        rows = torch.arange(layout.num_tokens, dtype=ends.dtype, device=ends.device)
        return rows < ends.repeat_interleave(lengths, output_size=layout.num_tokens)

    def statistics(self) -> list[LayerStatistics]:
        """One entry for each layer of the last forward pass; empty before the first."""
        layout = self._layout
        return [
            LayerStatistics(
                layer=layer,
                tokens=layout.num_tokens,
                attention_rows=attention.num_rows,
                mlp_rows=mlp.num_rows,
                attention_blocks=attention.kept_blocks,
                mlp_blocks=mlp.kept_blocks,
                layout=layout,
            )
            for layer, (attention, mlp) in enumerate(
                zip(self._selected["attention"], self._selected["mlp"])
            )
        ]


def _per_layer(name: str, value: float | tuple[float, ...], num_layers: int) -> list[float]:
    values = list(value) if isinstance(value, tuple) else [value] * num_layers
    if len(values) != num_layers:
        raise ValueError(
            f"{name}: expected {num_layers} entries, one for each layer, got {len(values)}"
        )
    return values


def _resolve(name: str, layers: tuple[int, ...], num_layers: int) -> list[int]:
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"{name}: expected layers between {-num_layers} and {num_layers - 1}, got {layer}"
            )
    return [layer % num_layers for layer in layers]
