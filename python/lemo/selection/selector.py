"""Which blocks every sub-block keeps in a forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import pad

from lemo import ops
from lemo.packing.blocks import BlockLayout, Selection
from lemo.relevance.answers import are_answers
from lemo.selection.budget import counts_on_host, first_by_rank, within_budget
from lemo.selection.finite import FiniteScores
from lemo.selection.loss_mask import masked_rows
from lemo.selection.policies import Policies, Rule
from lemo.selection.priority import always_kept, ranks
from lemo.selection.statistics import LayerStatistics
from lemo.settings.elimination import LemoConfig

__all__ = ["Selector"]


class Selector:
    """Turns a config, block scores and the training progress into the selection of every sub-block.

    A forward pass calls `begin` once, then `select` for "attention" and "mlp" of each layer, in
    order.

    Attributes:
        config: the settings.
        progress: share of the training that is done, in [0, 1].
        finite: looks whether scores are numbers.
    """

    def __init__(self, config: LemoConfig, num_layers: int) -> None:
        """Resolves the settings for the layers of a model.

        Args:
            config: the settings.
            num_layers: layers of the model.

        Raises:
            ValueError: the settings do not fit the model, see `Policies`.
        """
        self.config = config
        self.progress = 0.0
        self.finite = FiniteScores()
        self._policies = Policies(config, num_layers)
        self._keeps_everything = False
        self._reached_threshold = False
        # Until the first forward pass: one over no tokens.
        self._repeats = False
        self._pass = Pass(BlockLayout.from_seqlens([], 1, "cpu"), None)

    @property
    def mlp_shares(self) -> bool:
        """Whether the MLP of every layer keeps what its attention keeps."""
        return self._policies.mlp_shares

    @property
    def has_one_set(self) -> bool:
        """Whether all sub-blocks keep the same rows at this progress of the training."""
        return self._keeps_everything or self._policies.has_one_set(self.progress)

    @property
    def always_has_one_set(self) -> bool:
        """Whether all sub-blocks keep the same rows at every progress of the training."""
        return self._policies.always_has_one_set

    @property
    def masks_loss(self) -> bool:
        """Whether the loss of rows that no sub-block keeps does not count."""
        return self.config.mask_loss is not False

    @property
    def is_overruled(self) -> bool:
        """Whether everything is kept, whatever the settings say."""
        return self._keeps_everything

    @contextmanager
    def keeping_everything(self) -> Iterator[None]:
        """Every sub-block keeps everything inside, whatever the settings say."""
        self._keeps_everything = True
        try:
            yield
        finally:
            self._keeps_everything = False

    def set_progress(self, progress: float) -> None:
        """Share of the training that is done, in [0, 1]; for `keep_schedule`.

        Raises:
            TypeError, ValueError: no number, or none of this range.
        """
        if isinstance(progress, bool) or not isinstance(progress, Real):
            raise TypeError(f"progress: expected a number, got {progress!r}")
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress: expected a share between 0 and 1, got {progress}")
        self.progress = float(progress)

    # A forward pass

    @property
    def latest(self) -> "Pass":
        """The forward pass that runs, or the one before."""
        return self._pass

    @contextmanager
    def repeating(self, earlier: "Pass") -> Iterator[None]:
        """Passes inside, over the batch of an earlier one, keep what that one kept.

        Nothing is scored, and `statistics` are those of the latest pass again afterwards.
        """
        latest, self._pass, self._repeats = self._pass, earlier, True
        try:
            yield
        finally:
            self._pass, self._repeats = latest, False

    def begin(
        self, layout: BlockLayout, labelled: Tensor | None = None, on_host: Tensor | None = None
    ) -> None:
        """Starts a forward pass over these tokens; forgets the previous one.

        Args:
            layout: how they are cut into blocks.
            labelled: [T] bool, rows that have a label; None: nothing is known of labels.
            on_host: the same on the CPU; None: it is not known there.
        """
        if not self._repeats:
            self._pass = Pass(layout, labelled, on_host)
            self.finite.begin()

    def select(self, layer: int, kind: str, score: Callable[[], Tensor]) -> Selection:
        """The rows that sub-block `kind` of `layer` keeps.

        Args:
            layer: index; layers come in ascending order.
            kind: "attention" or "mlp", in this order.
            score: gives this sub-block's block scores [B]; called without gradients, and only if
                some layer uses them.
        """
        now = self._pass
        if self._repeats:
            return now.selected[kind][layer]
        if kind == "mlp" and self.mlp_shares:
            selection = now.selected["attention"][layer]
        else:
            if self._needs_scores_of(layer, kind):
                with torch.no_grad():
                    now.take_scores(kind, score().float())
            selection = self._choose(kind, self._rule(layer, kind))
        now.selected[kind].append(selection)
        return selection

    def selected(self, layer: int, kind: str) -> Selection:
        """What `select` gave to a sub-block in this pass."""
        return self._pass.selected[kind][layer]

    def keep_everywhere(self, selection: Selection) -> None:
        """Says that all sub-blocks of this pass keep the same, without asking for each of them."""
        for of_kind in self._pass.selected.values():
            of_kind[:] = [selection] * len(self._policies.sources)

    def _rule(self, layer: int, kind: str) -> Rule | None:
        if self._keeps_everything:
            return None
        return self._policies.rule(layer, kind, self.progress)

    def _needs_scores_of(self, layer: int, kind: str) -> bool:
        return not self._keeps_everything and self._policies.needs_scores_of(
            layer, kind, self.progress
        )

    def _choose(self, kind: str, rule: Rule | None) -> Selection:
        """The blocks that a rule keeps by the latest scores; the same object for the same set."""
        now = self._pass
        if rule is None:
            return now.everything
        key = kind, rule
        if key not in now.chosen:
            scores, ends = now.scores[kind], (self.config.keep_first, self.config.keep_last)
            if rule.policy == "ratio":
                leave_room = self.config.scorer == "random"
                first, crowded = always_kept(now.layout, rule.value, *ends, leave_room)
                if now.labelled is not None or crowded:
                    # The order of the ranks holds all of it.
                    scores, ends = ranks(scores, now.labelled, first), (0, 0)
            if rule.policy == "ratio" and self._has_budget:
                selection = self._within_budget(kind, scores, rule.value)
            else:
                selection = ops.token_select(scores, now.layout, *rule, *ends)
            # All rows kept is the dense case, which needs no row index.
            complete = selection.num_rows == now.layout.num_tokens
            now.chosen[key] = now.everything if complete else selection
        return now.chosen[key]

    @property
    def _has_budget(self) -> bool:
        """Whether blocks with labels are kept beside the share: answers say what is needed."""
        return self.config.finds_answers and self._pass.labelled is not None

    def _within_budget(self, kind: str, ranks: Tensor, most: float) -> Selection:
        """The blocks of the budget."""
        now, config = self._pass, self.config
        assert now.labelled is not None
        assert now.answers is not None
        layout, tokens = now.layout, config.keep_tokens or 0
        if config.keep_relevance is None and now.on_host is not None:
            ends = config.keep_first, config.keep_last
            counts = counts_on_host(now.on_host, layout, most, tokens, *ends)
            if counts.rows is not None:
                kept = first_by_rank(ranks, counts, layout)
                return ops.marked_blocks(kept, layout, sum(counts.blocks), counts.rows)
        share = 1.0 if config.keep_relevance is None else config.keep_relevance
        relevance, least = now.scores[kind], config.keep_least
        kept = within_budget(
            ranks, relevance, now.labelled, now.answers, layout, share, least, most, tokens
        )
        # The numbers are read back.
        return ops.token_select(kept, layout, "threshold", 1.0, 0, 0)

    def left_out(self, selection: Selection) -> Selection:
        """The rows that a selection of this pass, not of everything, leaves out."""
        left_out = self._pass.left_out
        if id(selection) not in left_out:
            left_out[id(selection)] = ops.left_out(selection)
        return left_out[id(selection)]

    # After a forward pass

    def check_kept(self) -> None:
        """Raises ValueError if a pass kept nothing, or the first pass only what is always kept."""
        now, config = self._pass, self.config
        if not any(selection.num_rows for selection in now.selections):
            raise ValueError(
                "keep: expected some block to be kept, got none in any layer, so nothing is trained"
            )
        if config.layerwise.policy != "threshold" or self._reached_threshold:
            return
        counts, everything = now.layout.block_counts, now.layout.num_blocks
        fixed = sum(min(config.keep_first + config.keep_last, count) for count in counts)
        dense = self._policies.dense_layers
        kept = max(
            everything if selection.kept_blocks is None else selection.kept_blocks.numel()
            for of_kind in now.selected.values()
            for layer, selection in enumerate(of_kind)
            if layer not in dense or len(dense) == len(of_kind)
        )
        self._reached_threshold = kept > fixed or fixed == everything
        if not self._reached_threshold:
            raise ValueError(
                f"layerwise.thresholds: expected some block to reach one, got none of {everything} "
                "in the first batch; only the blocks that are always kept would be trained"
            )

    def masked_rows(self, complete: bool = False) -> Tensor | None:
        """[T] bool: rows whose loss does not count after this pass; None: all count.

        Args:
            complete: whether nothing was missing in this pass, so that nothing is burnt in.
        """
        config = self.config
        complete = complete or config.visible_keys == "computed"
        burn_in = 0 if complete else config.burn_in
        return masked_rows(self._pass.layout, self._pass.selections, config.mask_loss, burn_in)

    def statistics(self) -> list[LayerStatistics]:
        """One entry for each layer of the last forward pass; empty before the first."""
        pairs = zip(self._pass.selected["attention"], self._pass.selected["mlp"])
        return [LayerStatistics.of(layer, *pair) for layer, pair in enumerate(pairs)]


class Pass:
    """What is known in one forward pass.

    Attributes:
        layout: how its tokens are cut into blocks.
        on_host: [T] bool on the CPU, rows that have a label; None: they are not known there.
        labelled: [B] bool, blocks that have labels; None: nothing is known of labels.
        answers: [N] bool, sequences where answers alone have labels; None: the same.
        everything: the selection of all rows, one object: equal sets are recognized by identity.
        scores: the latest of each kind.
        chosen: what a rule chose by the latest scores of a kind.
        selected: what the sub-blocks of each kind kept, layer by layer.
        left_out: what a selection, by its id, leaves out.
    """

    def __init__(
        self, layout: BlockLayout, labelled: Tensor | None, on_host: Tensor | None = None
    ) -> None:
        self.layout, self.on_host = layout, on_host
        self.labelled = self.answers = None
        if labelled is not None:
            self.labelled = layout.blocks_with(labelled)
            before = pad(labelled.cumsum(0), (1, 0))[layout.cu_seqlens.long()]
            self.answers = are_answers(before.diff(), layout.cu_seqlens.diff())
        self.everything = Selection.everything(layout)
        self.scores: dict[str, Tensor] = {}
        self.chosen: dict[tuple[str, Rule], Selection] = {}
        self.selected: dict[str, list[Selection]] = {"attention": [], "mlp": []}
        self.left_out: dict[int, Selection] = {}

    @property
    def selections(self) -> list[Selection]:
        """What all sub-blocks kept."""
        return [selection for of_kind in self.selected.values() for selection in of_kind]

    def take_scores(self, kind: str, scores: Tensor) -> None:
        """New scores of a kind; what was chosen by older ones is forgotten."""
        self.scores[kind] = scores
        self.chosen = {key: choice for key, choice in self.chosen.items() if key[0] != kind}
