"""A training pass on the kept rows, by the model's own code."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import ModelOutput

from lemo.distributed.context import ContextParallel
from lemo.models.calls import context_checks
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.interception import check_adapters
from lemo.models.calls.labels import IGNORE_INDEX
from lemo.models.calls.outputs import DeferredLogits, EliminatedOutput
from lemo.models.calls.per_thread import PerThread
from lemo.models.elimination import Choice
from lemo.models.generic.attention import KeptRows, RowsMask, making_masks
from lemo.models.generic.attention_names import AttentionNames
from lemo.models.generic.head import Head, has_head_alone, rules_of_loss
from lemo.models.generic.kept import KeptBatch
from lemo.models.generic.layout import LayoutCheck, not_attending, states_of
from lemo.models.generic.offload import layers_of, moving_by_layer
from lemo.models.generic.parts import Parts
from lemo.models.generic.row_by_row import check_row_by_row
from lemo.models.generic.settings_checks import check_settings
from lemo.models.generic.whole import seeing_the_batch
from lemo.models.layers.architectures import is_known
from lemo.models.layers.batch import Batch
from lemo.models.layers.loss import (
    CountedLabels,
    counted_labels,
    labels_per_counted,
    next_labels,
    rows_among,
)
from lemo.models.memory.offload import Offload
from lemo.models.memory.sharded import (
    check_inner_modules,
    check_unflattened,
    check_whole,
    is_sharded,
)
from lemo.models.projections.as_in_forward import AsInForward
from lemo.models.projections.torchao_weights import check_gradient, lacks_backward
from lemo.models.training import Training
from lemo.packing.batch import PackedBatch, shape_of
from lemo.packing.blocks import BlockLayout, Selection
from lemo.selection.loss_mask import masked_rows
from lemo.selection.scorers import GivenScorer, LexicalScorer, RandomScorer, Scorer
from lemo.settings.elimination import LemoConfig

__all__ = ["GenericForward"]

# Arguments of a call that lemo answers itself, or that say what positions and mask say.
_OURS = {
    "attention_mask",
    "cache",
    "cache_params",
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "ignore_index",
    "labels",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "return_dict",
    "seq_idx",
    "shift_labels",
    "use_cache",
}
# Fields of a decoder's output from which no model makes a loss.
_STATES = {"last_hidden_state", "past_key_values", "cache", "hidden_states", "attentions"}
# Types whose `token_type_ids` tell images (1) from text (0). Those of PaliGemma tell answers from
# prompts, whose tokens see each other both ways.
_KINDS_OF_IMAGES = ("gemma3",)


@dataclass
class _Pass:
    """A pass that runs.

    Attributes:
        kept: the rows.
        rows: the same, for attention.
        tail: what the causal LM's own code gets of the decoder's hidden states [1, R, H].
        mask: [B, S], what the base alone is to know of padding; None: nothing.
        hidden: [1, R, H], once the decoder has run.
        has_more: whether the decoder has put out more than states, from which a loss may be made.
        base: the type of what the causal LM's base put out.
    """

    kept: KeptBatch
    rows: KeptRows
    tail: Callable[[Tensor], Tensor]
    mask: Tensor | None = None
    hidden: Tensor | None = None
    has_more: bool = False
    base: type[ModelOutput] | None = None


class GenericForward(Training[Choice]):
    """What the model computes in place of its own forward, in the generic path.

    Attributes:
        offload: moves what layers save to the host.
        names: of the attention that layers call.
        is_dense: whether a call runs as without lemo, in this thread.
    """

    is_dense = PerThread(False)
    _pass = PerThread[_Pass | None](None)
    _prepared = PerThread[ModelOutput | None](None)
    _forced = PerThread[tuple[Callable[[BlockLayout], Selection], int] | None](None)

    def __init__(
        self, parts: Parts, config: LemoConfig, context: ContextParallel | None = None
    ) -> None:
        check_settings(parts.name, config)
        super().__init__(config, partial(_choice, parts.num_layers), context)
        if context is not None:
            context_checks.check_settings(config, self.selector)
        self._group_size = config.layerwise.group_size or 0
        self._parts = parts
        self.offload = Offload(config.host_bytes)
        self._shares = config.offload_shares(parts.num_layers) or ()
        self._before = vars(parts.causal_lm).get("forward")
        self.names = AttentionNames(parts.configs)
        self._guards: list[RemovableHandle] = []
        self._loss_chunk = config.loss_chunk
        head = parts.causal_lm.get_output_embeddings
        rules, is_alone = partial(rules_of_loss, parts), partial(has_head_alone, parts)
        self._head = Head(parts.name, head, self._own_sum, rules, is_alone, IGNORE_INDEX)
        self._base: type[ModelOutput] | None = None
        self._has_checked_layout = False
        self._calls = parts.num_layers  # of attention in a pass
        self._has_checked_rows = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.names.register()  # which another process does not know yet

    @property
    def own(self) -> Callable[..., Any]:
        """The causal LM's own forward."""
        causal_lm = self._parts.causal_lm
        return self._before or partial(type(causal_lm).forward, causal_lm)

    # The model's own attention

    def install(self) -> None:
        """Puts lemo's attention beside the model's own."""
        self.names.install()
        causal_lm = self._parts.causal_lm
        ways = "use LemoConfig(path='native'), or " if is_known(causal_lm) else ""
        remedy = (
            f"{ways}quantise in another way, such as nf4 of bitsandbytes or torchao's "
            "IntxWeightOnlyConfig"
        )
        self._guards = [
            module.register_forward_pre_hook(partial(check_gradient, name=name, remedy=remedy))
            for name, module in causal_lm.named_modules()
            if lacks_backward(module)
        ]

    def uninstall(self) -> None:
        """The model has its own attention alone again."""
        self.names.uninstall()
        for guard in self._guards:
            guard.remove()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, calls run as without lemo."""
        with ExitStack() as stack:
            stack.enter_context(self.names.own())
            stack.enter_context(making_masks(None))
            before = self._pass, self.is_dense
            self._pass, self.is_dense = None, True
            try:
                yield
            finally:
                self._pass, self.is_dense = before

    @contextmanager
    def keeping(
        self, choose: Callable[[BlockLayout], Selection], block_size: int
    ) -> Iterator[None]:
        """Inside, rows are kept by a rule, whatever the settings say.

        Args:
            choose: what of a layout is kept.
            block_size: tokens of its blocks.
        """
        before, self._forced = self._forced, (choose, block_size)
        try:
            yield
        finally:
            self._forced = before

    # What calls of the modules get

    def loss(self, arguments: ForwardArguments) -> EliminatedOutput:
        parts, ignored = self._parts, arguments.ignored_label
        kept, targets, lost = self._keep(arguments)
        counted, count = self._counted(arguments, kept, targets, lost)
        # The own code sees two rows without labels: what is left of its loss does not come from
        # labels, but from routers and the like.
        call, mask = self._own_arguments(arguments, kept)
        call["labels"] = torch.full((1, 2), IGNORE_INDEX, device=targets.device)
        call["num_items_in_batch"] = 1
        now, own = self._run(kept, partial(self.own, **call), _two_rows, mask)
        assert now.hidden is not None
        if not torch.is_tensor(getattr(own, "loss", None)):
            raise ValueError(
                f"model: expected {parts.name} to return an output with a loss, as for "
                f"return_dict=True, got {type(own).__name__}; train without lemo"
            )
        hidden = self._index(now.hidden[0], kept, counted)
        adds = now.has_more or self._head.adds(now.hidden[0])
        if adds and self.context is not None:
            raise NotImplementedError(
                f"context_parallel: {parts.name} adds a loss of its routers, which would be that "
                "of each process's rows; set output_router_logits=False, or train without"
            )
        if count:
            loss = self._head.loss(
                hidden,
                counted.targets,
                parts.vocabulary,
                self._loss_chunk,
                counted.divisor,
                ignored,
            )
            loss = loss if self.context is None else self.context.total(loss)
        else:
            loss = hidden.sum(dtype=torch.float32)
        assert kept.batch.labelled is not None
        self._note_trained(count, kept.batch.labelled)
        output = EliminatedOutput(loss=loss)
        if adds:
            output["loss"] = loss + own.loss.to(loss.device)
            if getattr(own, "aux_loss", None) is not None:
                output["aux_loss"] = own.aux_loss

        def logits() -> Tensor:
            given = {name: value for name, value in arguments.given.items() if name not in _LABELS}
            embedding = parts.causal_lm.get_input_embeddings()
            if not is_sharded(embedding):
                check_whole(embedding, "the embedding")
            with self.dense():
                return self.own(**{**given, "return_dict": True}).logits

        difference = AsInForward(parts.causal_lm).difference
        output["logits"] = DeferredLogits(logits, difference, loss.device)
        return output

    def labelled(
        self, arguments: ForwardArguments, forward: Callable[..., Any]
    ) -> tuple[Any, Tensor]:
        """What another forward of the causal LM, with TRL's head, makes of the rows that count.

        Args:
            arguments: of the call, without the switch of that head.
            forward: called with the labels of these rows, shifted already.

        Returns:
            Its result, and the labels of the batch for each label that counts, fp32 scalar.
        """
        self.check_call(arguments)
        kept, targets, lost = self._keep(arguments)
        counted, count = self._counted(arguments, kept, targets, lost)
        call, mask = self._own_arguments(arguments, kept)
        call["shift_labels"] = counted.targets[None]
        if arguments.num_items_in_batch is not None:
            call["num_items_in_batch"] = arguments.num_items_in_batch

        def tail(hidden: Tensor) -> Tensor:
            return self._index(hidden[0], kept, counted)[None]

        _, result = self._run(kept, partial(forward, **call), tail, mask)
        labelled = kept.batch.labelled
        assert labelled is not None
        self._note_trained(count, labelled)
        return result, labels_per_counted(labelled, lost, count)

    def base_output(self, original: Callable[..., Any], call: dict[str, Any] | None = None) -> Any:
        """What a call of the causal LM's base gives.

        Args:
            original: the module's own forward.
            call: its arguments by name; None: `original` has them.
        """
        if self._prepared is not None:
            return self._prepared
        if call is not None and self._pass is not None and self._pass.mask is not None:
            call = {**call, "attention_mask": self._pass.mask}
        output = original(**(call or {}))
        if self._pass is not None:
            self._pass.base = type(output)
        return output

    @property
    def is_passing(self) -> bool:
        """Whether a pass on kept rows runs."""
        return self._pass is not None

    def decode(self, call: dict[str, Any], original: Callable[..., Any]) -> Any:
        """The decoder's output for the kept rows of a call.

        Args:
            call: its arguments by name, for all rows of the batch.
            original: the decoder's own forward.

        Raises:
            ValueError: the decoder is called twice in a pass, or not every layer attends, as
                often as in the first one.
            NotImplementedError: it computes with its attention mask.
        """
        now, parts = self._pass, self._parts
        assert now is not None
        if now.hidden is not None:
            raise ValueError(f"model: {parts.name} calls its decoder twice; train without lemo")
        given = now.kept.arguments(call)
        if "use_cache" in given:
            given["use_cache"] = False
        if not self._has_checked_rows:
            # Before the pass: modules may keep what they computed last, for the loss.
            check_row_by_row(parts.decoder, now.kept, call, original)
            self._has_checked_rows = True
        now.rows.counts = not parts.compiles_checkpoints
        check = None
        with ExitStack() as stack:
            stack.enter_context(making_masks(now.rows))
            if not self._has_checked_layout:
                check = LayoutCheck(parts.decoder, now.rows, given, call)
                stack.enter_context(check.watching())
            stack.enter_context(seeing_the_batch(parts.decoder, now.kept, call))
            if any(self._shares):
                layers = layers_of(parts.decoder, parts.num_layers)
                moved = self.offload.begin(self._shares, next(layers[0].parameters()).device)
                stack.enter_context(moving_by_layer(moved, layers))
            output = self._decoded(original, given)
        self._has_checked_layout |= now.kept.selection.rows is not None
        if check is not None and check.runs >= parts.num_layers:
            self._calls = now.rows.calls  # some layers may attend or run more than once
            if any(self._shares):
                check.check_one_run_each(parts.num_layers)
        if now.rows.counts and now.rows.calls != self._calls:
            raise not_attending(parts.name, self._calls, now.rows.calls)
        if now.rows.by_rule:
            self.say(
                f"{parts.name} masks attention by a rule of its own, such as images that see each "
                "other both ways: there PyTorch attends, with a mask of all pairs of kept rows"
            )
        now.hidden = hidden = states_of(output, parts.name)
        if parts.checkpoints and hidden.requires_grad:
            behind_forward = AsInForward(parts.decoder)

            def check_behind(_: Tensor) -> None:
                self.names.check_behind()
                behind_forward.check()

            hidden.register_hook(check_behind)
        now.has_more = any(v is not None for k, v in output.items() if k not in _STATES)
        output["last_hidden_state"] = now.tail(now.hidden)
        return output

    def _decoded(self, original: Callable[..., Any], call: dict[str, Any]) -> Any:
        try:
            return original(**call)
        except TypeError as error:
            if RowsMask.__name__ not in str(error):
                raise
            raise NotImplementedError(
                f"model: {self._parts.name} computes with its attention mask, which lemo has no "
                f"tensor for ({error}); train without lemo"
            ) from error

    # A pass

    def _keep(self, arguments: ForwardArguments) -> tuple[KeptBatch, Tensor, Tensor | None]:
        """(kept rows, next labels of all rows [T], labels that padding predicts)."""
        if self.context is not None:
            self.context.begin(self._parts.causal_lm, arguments.given)
        self._check(arguments)
        self.elimination = self._chosen(arguments)
        ids, embedded = arguments.input_ids, arguments.inputs_embeds
        shape = shape_of(ids, embedded)
        device = next(x.device for x in (ids, embedded) if x is not None)
        mask, positions = arguments.attention_mask, arguments.position_ids
        # Where a row has several positions (images), the first of four counts the tokens.
        if positions is not None and positions.ndim == 3:
            positions = positions[0] if positions.shape[0] == 4 else None
        packed = PackedBatch(shape, mask, positions, device)
        size = self.elimination.block_size if self._forced is None else self._forced[1]
        batch = Batch.of(packed, size, device)
        targets, lost = next_labels(
            packed, arguments.labels, arguments.shift_labels, arguments.ignored_label
        )
        batch = replace(
            batch,
            ids=None if ids is None else packed.pack(ids),
            labelled=targets != arguments.ignored_label,
            scores=self._pack_scores(packed, embedded is not None),
        )
        whole = self._select(batch)
        kept = KeptBatch.of_group(batch, whole, self._parts.name, self.context)
        return kept, targets, lost

    def _select(self, batch: Batch) -> Selection:
        if self._forced is not None:
            return self._forced[0](batch.layout)
        selector, scorer = self.selector, self.elimination.scorer
        selector.begin(batch.layout, batch.labelled)
        nowhere = torch.empty(0, device=batch.layout.block_starts.device)
        selections = [
            selector.select(layer, kind, partial(scorer, layer, kind, nowhere, batch))
            for layer in range(self._parts.num_layers)
            for kind in ("attention", "mlp")
        ]
        assert all(selection is selections[0] for selection in selections)
        if torch.is_grad_enabled():
            selector.check_kept()
        return selections[0]

    def _check(self, arguments: ForwardArguments) -> None:
        parts = self._parts
        check_unflattened(parts.causal_lm)
        check_inner_modules(parts.causal_lm, parts.base, parts.decoder)
        check_adapters(parts.causal_lm)
        self.names.check()
        replace(arguments, unknown={}).check(self._parts.config)
        if arguments.wants_hidden_states(self._parts.config):
            raise ValueError(
                "output_hidden_states: not available with labels in the generic path, where rows "
                "that are left out have none"
            )

    def _counted(
        self, arguments: ForwardArguments, kept: KeptBatch, targets: Tensor, lost: Tensor | None
    ) -> tuple[CountedLabels, int]:
        """(the labels that count and that this process predicts, how many all predict)."""
        config = self.elimination.config
        masked = masked_rows(kept.batch.layout, [kept.whole], True, config.burn_in)
        items, ignored = arguments.num_items_in_batch, arguments.ignored_label
        counted = counted_labels(targets, masked, items, ignored, lost)
        number = counted.rows.numel()
        if self.context is None:
            return counted, number
        assert kept.selection.rows is not None
        return counted.among(kept.selection.rows, targets.numel()), number

    def _own_arguments(
        self, arguments: ForwardArguments, kept: KeptBatch
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The arguments by which the causal LM's own code runs on the whole batch.

        Also the mask of its padding, where the causal LM would lay that over what its routers say
        of kept rows, so that its base alone may have it.
        """
        parts, packed = self._parts, kept.batch.packed
        call = {name: value for name, value in arguments.given.items() if name not in _OURS}
        call["use_cache"] = False
        call["return_dict"] = True
        kinds = call.get("token_type_ids")
        of_images = parts.config.model_type in _KINDS_OF_IMAGES
        if of_images and torch.is_tensor(kinds) and not bool(kinds.any()):
            # All tokens are text, as without them; with them there would be masks for images.
            del call["token_type_ids"]
        if arguments.position_ids is None and parts.skips_positions:
            raise ValueError(
                f"position_ids: expected, since {parts.name} does not count its learned positions "
                "from 0, got None"
            )
        if packed.is_padded:
            mask = arguments.attention_mask
            assert mask is not None
            counts = arguments.position_ids is None and parts.has_learned_positions
            if counts and bool(((mask[:, 0] == 0) & (mask != 0).any(1)).any()):
                raise ValueError(
                    f"position_ids: expected for padding on the left, since {parts.name} has "
                    "learned positions, got None"
                )
            if parts.takes_images:
                if parts.routes:
                    return call, mask
                call["attention_mask"] = mask
        return call, None

    def _run(
        self,
        kept: KeptBatch,
        own: Callable[[], Any],
        tail: Callable[[Tensor], Tensor],
        mask: Tensor | None,
    ) -> tuple[_Pass, Any]:
        """Runs the causal LM's own code, its decoder on the kept rows."""
        # A rule stands for the model itself.
        rows = kept.attention(0 if self._forced is not None else self._group_size)
        before, self._pass = self._pass, _Pass(kept, rows, tail, mask)
        now = self._pass
        try:
            with making_masks(rows, knows_batch=True):
                output = own()
        except Exception as error:
            # What the model does after its decoder, with two rows.
            if now.hidden is None or type(error) not in _OF_TENSORS:
                raise
            raise ValueError(
                f"model: {self._parts.name} makes its loss of more than hidden states and labels, "
                "of which lemo gives it those that count; train without lemo "
                f"({type(error).__name__}: {error})"
            ) from error
        finally:
            self._pass = before
        if now.hidden is None:
            raise ValueError(
                f"model: {self._parts.name} does not call its decoder; train without lemo"
            )
        self._base = now.base or self._base
        return now, output

    def _index(self, hidden: Tensor, kept: KeptBatch, counted: CountedLabels) -> Tensor:
        """[N, H], of the kept rows' hidden states [R, H] those whose labels count."""
        rows = rows_among(counted.rows, hidden, kept.selection.rows)
        return hidden if rows is None else hidden.index_select(0, rows.to(hidden.device))

    def _own_sum(self, hidden: Tensor, labels: Tensor, divisor: int) -> Tensor:
        """The causal LM's own loss of hidden states [N, H] with labels [N], by a divisor."""
        assert self._base is not None
        # Row i predicts label i + 1, so one more row.
        padded = torch.cat((hidden, hidden[-1:].detach()))[None]
        shifted = torch.cat((labels.new_full((1,), IGNORE_INDEX), labels))[None]
        call: dict[str, Any] = {"labels": shifted, "num_items_in_batch": divisor}
        call |= {"input_ids": torch.zeros_like(shifted), "use_cache": False, "return_dict": True}
        if self._parts.routes:
            call["output_router_logits"] = False
        before, self._prepared = self._prepared, self._base(last_hidden_state=padded)
        try:
            loss: Tensor = self.own(**call).loss
        finally:
            self._prepared = before
        return loss


# What code raises whose tensors do not fit each other.
_OF_TENSORS = (AttributeError, IndexError, RuntimeError, TypeError)
_LABELS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "return_dict")


def _two_rows(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(1, 2, hidden.shape[-1])


def _choice(num_layers: int, config: LemoConfig) -> Choice:
    scorers: dict[str, Callable[[], Scorer]] = {
        "random": partial(RandomScorer, config.seed),
        "lexical": partial(LexicalScorer, config.seed),
        "given": GivenScorer,
    }
    return Choice(config, num_layers, scorers[config.scorer]())
