"""The layers of a decoder on a packed batch: every sub-block works on the rows that it keeps.

The residual [T, H] is one buffer that is updated in place (docs/design/models.md), so the functions
below take it and hand it on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lemo import ops
from lemo.distributed.context import ContextParallel
from lemo.models.layers.architectures import Architecture, active_module
from lemo.models.layers.batch import Batch
from lemo.models.layers.execution import execution_of
from lemo.models.layers.left_out import LeftOutRows
from lemo.models.layers.modes import Modes
from lemo.models.layers.placement import Everywhere, KeptAlone, Placement, SharedOut
from lemo.models.layers.sub_blocks import MLP, Attention
from lemo.models.layers.unit import Unit
from lemo.models.memory.offload import LayerOffload, Offload, OffloadedPass
from lemo.models.memory.sharded import check_whole, run_inside
from lemo.packing.blocks import Selection
from lemo.planner.text import layers_text
from lemo.selection.scorers import Scorer
from lemo.selection.selector import Selector

__all__ = ["Decoded", "Decoder", "Embed", "Pass"]


class Decoded(NamedTuple):
    """What the layers made of a batch.

    Attributes:
        residual: [R, H] behind the last layer.
        rows: [R] int32, ascending, which of the batch's rows these are; None: all T.
    """

    residual: Tensor
    rows: Tensor | None


@dataclass
class Pass:
    """A pass through the layers.

    Attributes:
        batch: what the rows of the residual are.
        drop: whether rows that no sub-block keeps may be dropped.
        place: which rows the residual has.
        modes: what each layer stores; empty before the first layer is entered.
        head_groups: of attention's backward where it is recomputed, at most.
        chosen: what the first attention keeps, where it is known before tokens are embedded.
        kept: the rows of the residual that all sub-blocks keep; None: each chooses its own.
        left_out: those that all of them leave out, where these are computed.
        offload: moves what layers store to the host.
    """

    batch: Batch
    drop: bool
    place: Placement = field(default_factory=Everywhere)
    modes: Sequence[str] = ()
    head_groups: int = 1
    chosen: Selection | None = None
    kept: Selection | None = None
    left_out: Selection | None = None
    offload: OffloadedPass | None = None

    @property
    def is_entered(self) -> bool:
        """Whether it is known what the first layer keeps and what all of them store."""
        return bool(self.modes)


Embed = Callable[[Batch, Tensor | None], tuple[Batch, Tensor]]
"""Gives a batch with tables of rotations, and the embedded tokens of some of its rows or all."""


class Decoder:
    """Runs the layers of a model with token elimination.

    Attributes:
        visible_keys: what kept rows attend to.

    Args:
        architecture: access to the model.
        selector: decides what each sub-block keeps.
        scorer: where block scores come from.
        modes: what each layer stores.
        offload: moves it to the host.
        visible_keys: as in `LemoConfig`.
        group_size: tokens of a shifted attention group; 0: no groups.
        context: processes that share out the rows; None: this one has them all.
    """

    def __init__(
        self,
        architecture: Architecture,
        selector: Selector,
        scorer: Scorer,
        modes: Modes,
        offload: Offload,
        visible_keys: str = "kept",
        group_size: int = 0,
        context: ContextParallel | None = None,
    ) -> None:
        self._architecture = architecture
        self._selector = selector
        self._scorer = scorer
        self.visible_keys = visible_keys
        self._group_size = group_size
        self._modes = modes
        self._offload = offload
        self._context = context
        self._latest = ""

    @property
    def is_overruled(self) -> bool:
        """Whether everything is kept, whatever the settings say."""
        return self._selector.is_overruled

    def describe(self) -> str:
        """What the latest pass ran on, and what its layers stored, in words."""
        return self._latest

    def run(
        self,
        batch: Batch,
        embed: Embed,
        labelled: Tensor | None = None,
        visit_residual: Callable[[Tensor], None] | None = None,
        drop: bool = False,
    ) -> Decoded:
        """Adds all layers to the embedded tokens.

        Args:
            batch: what the rows are.
            embed: gives the batch with tables of rotations and the embedded tokens, [R, H], which
                are overwritten, of some of its rows or (None) all.
            labelled: [T] bool, rows that have a label; None: nothing is known of labels.
            visit_residual: gets a differentiable copy of the residual at the entry of every layer.
            drop: whether rows that no sub-block keeps may be dropped at once, if it can be known.
        """
        now, residual = self.begin(batch, embed, labelled, drop)
        residual = self.layers(now, residual, visit_residual)
        return Decoded(residual, now.place.rows)

    def begin(
        self, batch: Batch, embed: Embed, labelled: Tensor | None, drop: bool
    ) -> tuple[Pass, Tensor]:
        """Begins a pass and embeds its tokens; the arguments are those of `run`."""
        batch = replace(batch, labelled=labelled)
        on_host = None if batch.host is None else batch.host[1]
        self._selector.begin(batch.layout, labelled, on_host)
        drop = drop and self.visible_keys == "kept" and self._selector.has_one_set
        now = Pass(batch, drop)
        if self._scorer.reads_residual:
            now.batch, residual = embed(batch, None)
        else:
            # Before anything is embedded: rows that are dropped cost nothing then.
            nowhere = torch.empty(0, device=batch.layout.block_starts.device)
            now.chosen = self._select(0, "attention", now, nowhere)
            now.place = self._placement(batch, now.chosen, drop)
            now.batch, residual = embed(batch, now.place.rows)
        return now, residual

    def enter(self, now: Pass, residual: Tensor, captures: bool = False) -> Tensor:
        """Decides what the first layer keeps and what all of them store; the residual for them.

        Args:
            now: a pass that has begun.
            residual: [R, H], at the entry of the first layer; overwritten.
            captures: whether the pass may be replayed as CUDA graphs.
        """
        kept = now.chosen
        if kept is None:
            kept = self._select(0, "attention", now, residual)
        actions = self._modes.of(now.batch, residual, kept, now.drop, captures)
        now.modes, now.head_groups = actions.modes, actions.head_groups
        tokens = now.batch.layout.num_tokens
        self._latest = _described(tokens, kept.num_rows, actions.modes, actions.shares)
        if now.chosen is None:
            now.place = self._placement(now.batch, kept, now.drop)
            now.batch, residual = now.place.enter(now.batch, residual)
        if self._selector.has_one_set:
            self._selector.keep_everywhere(kept)
            now.kept = now.place.of(kept)
            if self.visible_keys == "computed":
                now.left_out = self._left_out(now.kept, now)
        now.offload = self._offload.begin(actions.shares, residual.device)
        if now.offload.is_needed:
            # The first layer would make them otherwise, after this.
            positions = None if self.visible_keys == "kept" else now.batch.positions
            now.offload.leave_out(now.batch, vars(now.batch.packed), positions)
        return residual

    def layers(
        self,
        now: Pass,
        residual: Tensor,
        visit_residual: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Adds all layers to the residual in place, entering the first where `enter` did not."""
        for index in range(self._architecture.num_layers):
            if visit_residual is not None:
                residual, entry = ops.residual_gather(residual)
                visit_residual(entry)
            layer = self._architecture.layer(index)
            residual = run_inside(layer, partial(self._layer, index, now), residual)
        if now.offload is not None:
            now.offload.finish()
        return residual

    def _placement(self, batch: Batch, kept: Selection, drop: bool) -> Placement:
        """Which rows the layers run on, from what the first of them keeps."""
        if self._context is not None:
            all_kept = drop or kept.rows is None
            left_out = None if all_kept else self._selector.left_out(kept)
            return SharedOut(self._context, batch, kept, left_out)
        return KeptAlone(kept.rows) if drop and kept.rows is not None else Everywhere()

    def _layer(self, index: int, now: Pass, residual: Tensor) -> Tensor:
        layer = self._architecture.layer(index)
        check_whole(layer, f"layer {index}")
        if index == 0:
            # Inside of the first layer, too: elsewhere FSDP2 may hold weights in another dtype.
            _check_dtype(residual, self._architecture.attention_norm(0))
        if not now.is_entered:
            # Inside of the first layer, whose weights may be whole only here.
            residual = self.enter(now, residual)
        kept = self._kept(index, "attention", now, residual)
        assert now.offload is not None
        with now.offload.layer(index, layer) as moved:
            return self._run(index, now, kept, residual, moved)

    def _run(
        self,
        index: int,
        now: Pass,
        kept: Selection,
        residual: Tensor,
        moved: LayerOffload | None,
    ) -> Tensor:
        execution = execution_of(self._architecture.layer(index), now.modes[index])
        attention = self._attention(index, now, kept)
        if moved is not None:
            # They belong to all layers, or to the selector.
            keys = None if attention.keys is kept else attention.keys
            moved.leave_out(residual, kept, keys, now.left_out)
        if execution.joins and self._selector.mlp_shares and attention.keys is kept:
            mlp = self._mlp(index, self._kept(index, "mlp", now, residual))
            return execution.run(residual, self._unit(index, now, attention, mlp))
        residual = execution.run(residual, self._unit(index, now, attention, None))
        mlp = self._mlp(index, self._kept(index, "mlp", now, residual))
        return execution.run(residual, self._unit(index, now, None, mlp))

    def _select(self, index: int, kind: str, now: Pass, residual: Tensor) -> Selection:
        def score() -> Tensor:
            scores = self._scorer(index, kind, residual.detach(), now.batch)
            if self._scorer.reads_residual:
                finite = self._selector.finite
                scores = finite.checked(index, kind, scores, residual.detach())
            # The others' may differ by rounding, and then the sets.
            return scores if self._context is None else self._context.from_first(scores)

        return self._selector.select(index, kind, score)

    def _kept(self, index: int, kind: str, now: Pass, residual: Tensor) -> Selection:
        """The rows of the residual that a sub-block keeps."""
        if now.kept is not None:
            return now.kept
        if (index, kind) == (0, "attention"):
            return now.place.of(self._selector.selected(index, kind))  # since `enter`
        return now.place.of(self._select(index, kind, now, residual))

    def _attention(self, index: int, now: Pass, kept: Selection) -> Attention:
        keys = kept
        if kept.rows is not None and self.visible_keys == "all":
            keys = Selection.everything(kept.layout)
        # Where everything is kept whatever the settings say, the pass is to be the model's own.
        size = 0 if self._selector.is_overruled else self._group_size
        return now.place.attention(self._architecture, index, now.batch, kept, keys, size)

    def _mlp(self, index: int, kept: Selection) -> MLP:
        return MLP(self._architecture, index, kept)

    def _unit(self, index: int, now: Pass, attention: Attention | None, mlp: MLP | None) -> Unit:
        left_out = LeftOutRows(None, None)
        if self.visible_keys == "computed":
            of_attention = None if attention is None else self._left_out(attention.kept, now)
            of_mlp = None if mlp is None else self._left_out(mlp.kept, now)
            left_out = LeftOutRows(
                None if of_attention is None else self._attention(index, now, of_attention),
                None if of_mlp is None else self._mlp(index, of_mlp),
            )
        return Unit(attention, mlp, left_out, now.head_groups)

    def _left_out(self, kept: Selection, now: Pass) -> Selection | None:
        if kept.rows is None:
            return None
        return now.left_out or now.place.left_out(kept, self._selector.left_out)


def _check_dtype(residual: Tensor, norm: nn.Module) -> None:
    """Refuses embedded tokens in a narrower dtype than the one that the model itself adds in.

    Without autocast a sub-block gives the wider dtype of its rows and its weights, so the model's
    residual has that dtype behind the first one. lemo's residual is one buffer.

    Args:
        residual: [R, H], at the entry of the first layer.
        norm: in front of its attention.
    """
    norm = active_module(norm)
    # torch's LayerNorm gives the dtype of its rows.
    if torch.is_autocast_enabled(residual.device.type) or isinstance(norm, nn.LayerNorm):
        return
    weight = getattr(norm, "weight", None)
    if weight is None or torch.promote_types(weight.dtype, residual.dtype) == residual.dtype:
        return
    expected, got = (str(x.dtype).removeprefix("torch.") for x in (weight, residual))
    raise ValueError(
        f"model: expected embedded tokens in {expected}, the dtype of the first norm, got {got}: "
        f"the model itself adds in {expected} then, and lemo's own layers would in {got}; convert "
        "the embedding, train under autocast, or use LemoConfig(path='generic')"
    )


def _described(tokens: int, rows: int, modes: Sequence[str], shares: Sequence[float]) -> str:
    runs, first = [], 0
    for (mode, share), group in groupby(zip(modes, shares)):
        end = first + len(list(group))
        host = f", {share:.0%} on the host" if share else ""
        runs.append(f"{layers_text(range(first, end))} recompute '{mode}'{host}")
        first = end
    return f"{tokens} tokens, of which the first layer keeps {rows}; {', '.join(runs)}"
