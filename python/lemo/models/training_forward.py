"""The training forward pass with elimination: losses, and logits and hidden states when asked for.

For a loss alone, left-out rows are not computed. For logits or hidden states a second decoder also
computes the left-out rows, without a graph, so that each row is what the dense model gives.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lemo.distributed.context import ContextParallel
from lemo.models.calls import labels as named_labels
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.context_checks import needs_all_rows
from lemo.models.calls.interception import check_adapters
from lemo.models.calls.labelled_rows import LabelledStates
from lemo.models.calls.outputs import DeferredLogits, EliminatedOutput
from lemo.models.elimination import Elimination
from lemo.models.labelled_call import LabelledCall, PassLoss
from lemo.models.layers.architectures import Architecture
from lemo.models.layers.batch import Batch
from lemo.models.layers.decoder import Decoded, Decoder, Embed
from lemo.models.layers.loss import (
    causal_lm_loss,
    counted_labels,
    labels_per_counted,
    next_labels,
    rows_among,
)
from lemo.models.layers.own_modules import check_own_modules
from lemo.models.memory.offload import Offload
from lemo.models.memory.out_of_memory import explained
from lemo.models.one_set_passes import OneSetPasses
from lemo.models.projections.as_in_forward import AsInForward
from lemo.models.training import LABELS_UNKNOWN, Training
from lemo.settings.elimination import LemoConfig

__all__ = ["TrainingForward"]


class TrainingForward(Training[Elimination]):
    """What the model computes in place of its own forward, in the native path.

    Args:
        architecture: access to the model.
        config: the settings.
        context: processes that share out the rows; None: this one has them all.

    Attributes:
        offload: moves what layers save to the host.
        graphs: of passes in which all layers keep the same; None: they are switched off.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: LemoConfig,
        context: ContextParallel | None = None,
    ) -> None:
        self.offload = Offload(config.host_bytes)
        self._one_set = OneSetPasses(architecture, config)
        self.graphs = self._one_set.graphs
        parts = architecture, context, self.offload, self.graphs
        super().__init__(config, partial(Elimination, *parts), context)
        self._architecture = architecture
        self._loss_chunk = config.loss_chunk
        self._has_checked_modules = False
        self._has_shifted_groups = config.layerwise.group_size is not None

    def loss(self, arguments: ForwardArguments) -> EliminatedOutput:
        try:
            return self._loss(arguments)
        except torch.OutOfMemoryError:
            if self.graphs is None or not self.graphs.bytes:
                raise
        # Once more with the memory that graphs hold between passes.
        self.graphs.give_up("beside them memory ran out")
        return self._loss(arguments)

    def _loss(self, arguments: ForwardArguments) -> EliminatedOutput:
        asked = arguments.wants_hidden_states(self._architecture.config)
        if asked and self.context is not None:
            raise needs_all_rows("output_hidden_states")
        call = self._begin_labelled(arguments)
        states: tuple[Tensor, ...] | None = None
        if not asked and self._one_set.takes(self.selector, self.context, call.targets.device):
            found = self._one_set.loss(self.elimination, call, self.has_trained)
        else:
            found, states = self._loss_by_layers(call, asked)
        loss = self.selector.finite.marked(found.value)
        self._note_trained(found.counted, call.labelled)
        output = EliminatedOutput(loss=loss)
        output["logits"] = self._deferred_logits(arguments, found.difference, loss.device)
        if states is not None:
            output["hidden_states"] = states
        return output

    def _loss_by_layers(
        self, call: LabelledCall, asked: bool
    ) -> tuple[PassLoss, tuple[Tensor, ...] | None]:
        """The loss of a pass whose layers may keep sets of their own; hidden states if `asked`."""
        architecture, decoder = self._architecture, self.elimination.decoder
        if asked:
            decoder = self.elimination.dense_decoder
            self._leave_groups_out()
        decoded, entries = self._decode(
            decoder, call.batch, call.embed, call.labelled, asked, drop=not asked
        )
        with explained(decoder.describe):
            loss, counted = causal_lm_loss(
                architecture,
                decoded.residual,
                call.targets,
                self.selector.masked_rows(complete=asked),
                self._loss_chunk,
                call.arguments.num_items_in_batch,
                call.arguments.ignored_label,
                call.lost,
                decoded.rows,
                self.context,
            )
        found = PassLoss(loss, counted, AsInForward(architecture.causal_lm).difference)
        if entries is None:
            return found, None
        last = call.batch.packed.unpack(architecture.final_norm(decoded.residual)[1])
        return found, (*entries, last)

    def _deferred_logits(
        self,
        arguments: ForwardArguments,
        difference: Callable[[], str | None],
        device: torch.device,
    ) -> DeferredLogits:
        """The logits beside the loss of the latest pass.

        Args:
            arguments: those of its call.
            difference, device: as of `DeferredLogits`.
        """
        rows, elimination, kept = arguments.labelled_rows(), self.elimination, self.selector.latest

        def logits() -> Tensor:
            # The same rows as for the loss, though other passes may have come in between.
            latest = self.elimination
            try:
                with named_labels.named(self, rows), elimination.selector.repeating(kept):
                    computed = self.logits(arguments).logits
            finally:
                self.elimination = latest
            assert computed is not None
            return computed

        return DeferredLogits(logits, difference, device)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        with self._one_set.unchanged():
            yield

    def labelled_states(self, arguments: ForwardArguments) -> LabelledStates:
        """What `loss` gives to the head, for a call with labels whose head is somebody else's."""
        self.check_call(arguments)
        call = self._begin_labelled(arguments)
        (residual, computed), _ = self._decode(
            self.elimination.decoder, call.batch, call.embed, call.labelled, False, drop=True
        )
        masked = self.selector.masked_rows()
        counted = counted_labels(call.targets, masked, None, arguments.ignored_label, call.lost)
        number = counted.rows.numel()
        weight = labels_per_counted(call.labelled, call.lost, number)
        weight = self.selector.finite.marked(weight)
        self._note_trained(number, call.labelled)
        if self.context is not None:
            assert computed is not None
            counted = counted.among(computed, call.targets.numel())
        index = rows_among(counted.rows, residual, computed)
        hidden = self._architecture.final_norm(residual, index)[1]
        return LabelledStates(hidden[None], counted.targets[None], weight)

    def logits(self, arguments: ForwardArguments) -> CausalLMOutputWithPast:
        """The output for a call without labels."""
        states = self.states(arguments)
        keep = arguments.logits_to_keep
        columns = slice(-keep, None) if isinstance(keep, int) else keep  # -0: all
        logits = self._architecture.lm_head(states.last_hidden_state[:, columns])
        return CausalLMOutputWithPast(logits=logits, hidden_states=states.hidden_states)

    def states(self, arguments: ForwardArguments) -> BaseModelOutputWithPast:
        """The decoder's output [B, S, H]: in each row what the dense model gives.

        Raises:
            NotImplementedError: processes share out the rows.
        """
        if self.context is not None:
            raise needs_all_rows("logits or hidden states")
        batch, embed = self._begin(arguments)
        labelled = self._pack_labels(batch.packed, arguments.inputs_embeds is not None)
        asked = arguments.wants_hidden_states(self._architecture.config)
        self._leave_groups_out()
        (residual, _), entries = self._decode(
            self.elimination.dense_decoder, batch, embed, labelled, asked
        )
        self.has_trained = True
        hidden = self._architecture.final_norm(residual)[1]
        masked = self.selector.masked_rows(complete=True)
        if masked is not None:
            self.say(
                "logits or hidden states were asked for: every row of them is what the dense model "
                "gives, and gradients come from the rows that are kept"
                + ("" if labelled is not None else LABELS_UNKNOWN)
            )
            # Rows without a graph in the layers have none behind them either.
            hidden = torch.where(masked[:, None], hidden.detach(), hidden)
        hidden = batch.packed.unpack(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if entries is None else (*entries, hidden),
        )

    def _leave_groups_out(self) -> None:
        if self._has_shifted_groups:
            self.say(
                "layerwise.group_size: without effect where logits or hidden states are asked for, "
                "since attention has no groups in the dense model"
            )

    def _begin(self, arguments: ForwardArguments) -> tuple[Batch, Embed]:
        """The batch of a call, and what embeds its rows."""
        arguments.check(self._architecture.config)
        self._architecture.check_parts()
        check_adapters(self._architecture.causal_lm)
        if not self._has_checked_modules:
            check_own_modules(self._architecture)
            self._has_checked_modules = True
        self.elimination = self._chosen(arguments)
        batch = self._architecture.batch_of(arguments, self.elimination.block_size)
        scores = self._pack_scores(batch.packed, arguments.inputs_embeds is not None)
        embed = partial(self._architecture.embed_rows, arguments)
        return replace(batch, scores=scores), embed

    def _begin_labelled(self, arguments: ForwardArguments) -> LabelledCall:
        """The same of a call with labels, and what each row is to predict."""
        if self.context is not None:
            self.context.begin(self._architecture.causal_lm, arguments.given)
        batch, embed = self._begin(arguments)
        ignored = arguments.ignored_label
        targets, lost = next_labels(batch.packed, arguments.labels, arguments.shift_labels, ignored)
        batch = replace(batch, host=self._on_host(batch, arguments))
        return LabelledCall(arguments, batch, embed, targets, targets != ignored, lost)

    def _on_host(self, batch: Batch, arguments: ForwardArguments) -> tuple[Tensor, Tensor] | None:
        """(ids, rows that predict a label) on the CPU, [T] each, where both are known there."""
        ids, rows = self.host_ids, arguments.labelled_rows()
        if ids is None or rows is None or rows.is_cuda or batch.ids is None:
            return None
        if tuple(ids.shape) != tuple(batch.packed.shape):
            raise ValueError(
                "input_ids: expected those of handle.on_host, [batch, tokens] = "
                f"{list(ids.shape)}, got {list(batch.packed.shape)}"
            )
        # Padding would have to be found on the CPU, too.
        return None if batch.packed.is_padded else (ids.reshape(-1), rows.reshape(-1))

    def _decode(
        self,
        decoder: Decoder,
        batch: Batch,
        embed: Embed,
        labelled: Tensor | None,
        with_entries: bool,
        drop: bool = False,
    ) -> tuple[Decoded, list[Tensor] | None]:
        """(what the layers made of it, unpacked residual at each layer's entry if asked).

        With `drop` a loss alone is wanted: rows that no sub-block keeps, which do not contribute to
        it, need not be in the result.
        """
        entries: list[Tensor] = []

        def visit(entry: Tensor) -> None:
            entries.append(batch.packed.unpack(entry))

        drop = drop and self.selector.masks_loss
        visits = visit if with_entries else None
        with explained(decoder.describe):
            decoded = decoder.run(batch, embed, labelled, visits, drop)
        if torch.is_grad_enabled():
            self.selector.check_kept()
        return decoded, entries if with_entries else None
