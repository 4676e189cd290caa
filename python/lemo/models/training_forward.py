"""The training forward pass with elimination: losses, and logits and hidden states when asked for.

For a loss alone, left-out rows are not computed. For logits or hidden states a second decoder also
computes the left-out rows, without a graph, so that each row is what the dense model gives.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lemo.distributed.context import ContextParallel
from lemo.models import labels as named_labels
from lemo.models.architectures import Architecture
from lemo.models.arguments import ForwardArguments
from lemo.models.as_in_forward import AsInForward
from lemo.models.batch import Batch
from lemo.models.context_checks import needs_all_rows
from lemo.models.cuda_graphs import CudaGraphs, supports_graphs
from lemo.models.decoder import Decoded, Decoder, Embed
from lemo.models.elimination import Elimination
from lemo.models.interception import check_adapters
from lemo.models.labelled_rows import LabelledStates
from lemo.models.loss import causal_lm_loss, divisor_of, next_labels, rows_among
from lemo.models.offload import Offload
from lemo.models.one_set import (
    Labels,
    OneSet,
    State,
    labels_of_rows,
    state_of,
    uses_plain_head,
)
from lemo.models.out_of_memory import explained
from lemo.models.outputs import DeferredLogits, EliminatedOutput
from lemo.models.sharded import is_sharded
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
        if config.cuda_graphs != "off":
            self.graphs = CudaGraphs(spares=config.cuda_graphs == "auto")
        parts = architecture, context, self.offload, self.graphs
        super().__init__(config, partial(Elimination, *parts), context)
        self._architecture = architecture
        self._loss_chunk = config.loss_chunk
        self._mostly_labelled = False
        self._keeps_state = False
        self._kept_state: State | None = None
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
        architecture, ignored = self._architecture, arguments.ignored_label
        asked = arguments.wants_hidden_states(architecture.config)
        context = self.context
        if context is not None:
            if asked:
                raise needs_all_rows("output_hidden_states")
            context.begin(architecture.causal_lm, arguments.given)
        batch, embed = self._begin(arguments)
        targets, lost = next_labels(batch.packed, arguments.labels, arguments.shift_labels, ignored)
        batch = replace(batch, host=self._on_host(batch, arguments))
        entries: list[Tensor] | None = None
        difference: Callable[[], str | None] | None = None
        if not asked and self._has_one_set(targets.device):
            loss, counted, difference = self._loss_of_one_set(
                arguments, batch, embed, targets, lost
            )
        else:
            decoder = self.elimination.decoder
            if asked:
                decoder = self.elimination.dense_decoder
                self._leave_groups_out()
            labelled = targets != ignored
            decoded, entries = self._decode(decoder, batch, embed, labelled, asked, True)
            with explained(decoder.describe):
                loss, counted = causal_lm_loss(
                    architecture,
                    decoded.residual,
                    targets,
                    self.selector.masked_rows(complete=asked),
                    self._loss_chunk,
                    arguments.num_items_in_batch,
                    ignored,
                    lost,
                    decoded.rows,
                    context,
                )
        loss = self.selector.finite.marked(loss)
        if counted:
            self.has_trained = True
        elif torch.is_grad_enabled() and bool((targets != ignored).any()):
            self._nothing_trained()
        output = EliminatedOutput(loss=loss)
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

        difference = difference or AsInForward(architecture.causal_lm).difference
        output["logits"] = DeferredLogits(logits, difference, loss.device)
        if entries is not None:
            entries.append(batch.packed.unpack(architecture.final_norm(decoded.residual)[1]))
            output["hidden_states"] = tuple(entries)
        return output

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

    def _has_one_set(self, device: torch.device) -> bool:
        """Whether all is known before the layers run, which a GPU need not wait for then."""
        if not (supports_graphs(device) and torch.is_grad_enabled()):
            return False
        reason = None
        if self.context is not None:
            reason = "processes share out the rows"
        elif not self.selector.has_one_set:
            reason = "layers keep rows of their own"
        elif any(map(is_sharded, (self._architecture.layer(0), self._architecture.lm_head))):
            reason = "weights are sharded"
        elif not uses_plain_head(self._architecture):
            reason = "the head is no plain product"
        if reason is not None and self.graphs is not None:
            self.graphs.say(f"CUDA graphs: passes run without one: {reason}")
        return reason is None

    def _loss_of_one_set(
        self,
        arguments: ForwardArguments,
        batch: Batch,
        embed: Embed,
        targets: Tensor,
        lost: Tensor | None,
    ) -> tuple[Tensor, int, Callable[[], str | None] | None]:
        """The loss, how many labels count as far as it is known without a device's answer, and
        what tells in what the model differs from what it is now; None: nobody looked at it."""
        decoder, ignored = self.elimination.decoder, arguments.ignored_label
        labelled = targets != ignored
        with explained(decoder.describe):
            now, residual = decoder.begin(batch, embed, labelled, self.selector.masks_loss)
            captures = self.graphs is not None and not self.graphs.has_given_up
            residual = decoder.enter(now, residual, captures)
        self.selector.check_kept()
        masked = self.selector.masked_rows()
        counted = labelled if masked is None else labelled & ~masked
        divisor = divisor_of(labelled, counted, arguments.num_items_in_batch, lost)
        if divisor is not None and not torch.is_tensor(divisor):
            divisor = torch.full((), divisor, dtype=torch.float32, device=targets.device)
        targets = targets.masked_fill(~counted, ignored)
        if now.place.rows is not None:
            targets = targets.index_select(0, now.place.rows)
        most = self._most_labels(arguments, targets)
        index, targets = labels_of_rows(targets, ignored, most)
        labels = Labels(index, targets, None if divisor is None else divisor.float())
        step = OneSet(self._architecture, decoder, now, labels, ignored, self._loss_chunk)
        inputs, graphs = step.inputs(residual), self.graphs
        assert now.offload is not None
        if graphs is not None and now.offload.is_needed:
            graphs.say("CUDA graphs: passes run without one: activations go to the host")
            graphs = None
        if graphs is not None and self.elimination.config.cuda_graphs == "auto" and step.is_long():
            graphs.say(
                "CUDA graphs: passes whose kernels take longer than the host takes to issue them "
                "run without one"
            )
            graphs = None
        if graphs is None:
            return step(inputs), most, None
        state = self._state()
        key, parameters, read = step.captured(state)
        obstacle = partial(step.obstacle, parameters)
        module = self._architecture.causal_lm
        difference = partial(self._difference, state, read, [x._version for x in read])
        more = state.frozen, state.merged
        loss = graphs.run(key, step, inputs, parameters, module, obstacle, *more)
        return loss, most, difference

    def _difference(
        self, state: State, read: Sequence[Tensor], versions: Sequence[int]
    ) -> str | None:
        """What is another than when the modules and the versions of all weights were these."""
        if [x._version for x in read] != versions:
            return "weights that were changed in place since"
        if state_of(self._architecture).said != state.said:
            return "other modules, adapters, dropout or weights"
        return None

    def __getstate__(self) -> dict[str, Any]:
        # Nobody said it of a copied or pickled model, whose weights are elsewhere.
        return vars(self) | {"_keeps_state": False, "_kept_state": None}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        self._keeps_state, self._kept_state = True, None
        try:
            yield
        finally:
            self._keeps_state, self._kept_state = False, None

    def _state(self) -> State:
        """The modules as they are in this pass."""
        state = self._kept_state
        if state is None:
            state = state_of(self._architecture)
        if self._keeps_state:
            self._kept_state = state
        return state

    def _most_labels(self, arguments: ForwardArguments, targets: Tensor) -> int:
        """Labels of `targets` [R] that count at most; until something has been trained exactly."""
        ignored, rows = arguments.ignored_label, targets.numel()
        given = arguments.labels if arguments.shift_labels is None else arguments.shift_labels
        if self.has_trained and given is not None and given.device.type == "cpu":
            return min(int((given != ignored).sum()), rows)
        if self.has_trained and self._mostly_labelled:
            return rows
        # Waits for the device, in the first passes and where few rows have labels.
        count = int((targets != ignored).sum())
        self._mostly_labelled = 8 * count >= 7 * rows
        return count

    def labelled_states(self, arguments: ForwardArguments) -> LabelledStates:
        """What `loss` gives to the head, for a call with labels whose head is somebody else's."""
        ignored, context = arguments.ignored_label, self.context
        self.check_call(arguments)
        if context is not None:
            context.begin(self._architecture.causal_lm, arguments.given)
        batch, embed = self._begin(arguments)
        targets, lost = next_labels(batch.packed, arguments.labels, arguments.shift_labels, ignored)
        labelled = targets != ignored
        (residual, computed), _ = self._decode(
            self.elimination.decoder, batch, embed, labelled, False, True
        )
        masked = self.selector.masked_rows()
        rows = (labelled if masked is None else labelled & ~masked).nonzero()[:, 0]
        count = labelled.sum() if lost is None else labelled.sum() + lost
        weight = self.selector.finite.marked(count.float() / max(rows.numel(), 1))
        if rows.numel():
            self.has_trained = True
        elif bool(labelled.any()):
            self._nothing_trained()
        if context is not None:
            assert computed is not None
            rows = rows[torch.isin(rows.int(), computed)]  # this process's
        index = rows_among(rows, residual, computed)
        hidden = self._architecture.final_norm(residual, index)[1]
        return LabelledStates(hidden[None], targets[rows][None], weight)

    def logits(self, arguments: ForwardArguments) -> CausalLMOutputWithPast:
        """The output for a call without labels."""
        states = self.states(arguments)
        keep = arguments.logits_to_keep
        columns = slice(-keep, None) if isinstance(keep, int) else keep  # -0: all
        logits = self._architecture.lm_head(states.last_hidden_state[:, columns])
        return CausalLMOutputWithPast(logits=logits, hidden_states=states.hidden_states)

    def custom_loss(self, arguments: ForwardArguments) -> CausalLMOutputWithPast:
        """The output for a call with labels of a model that has a loss function of its own."""
        with named_labels.named(self, arguments.labelled_rows()):
            output = self.logits(arguments)
        extra = ("num_items_in_batch", "shift_labels", "ignore_index")
        given = {name: getattr(arguments, name) for name in extra}
        loss = self._architecture.causal_lm.loss_function(
            logits=output.logits,
            labels=arguments.labels,
            vocab_size=self._architecture.config.vocab_size,
            **{name: value for name, value in given.items() if value is not None},
        )
        return CausalLMOutputWithPast(
            loss=loss, logits=output.logits, hidden_states=output.hidden_states
        )

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
        self.elimination = self._chosen(arguments)
        batch = self._architecture.batch_of(arguments, self.elimination.block_size)
        scores = self._pack_scores(batch.packed, arguments.inputs_embeds is not None)
        embed = partial(self._architecture.embed_rows, arguments)
        return replace(batch, scores=scores), embed

    def _decode(
        self,
        decoder: Decoder,
        batch: Batch,
        embed: Embed,
        labelled: Tensor | None,
        with_entries: bool,
        loss_alone: bool = False,
    ) -> tuple[Decoded, list[Tensor] | None]:
        """(what the layers made of it, unpacked residual at each layer's entry if asked).

        Rows that no sub-block keeps are dropped where a loss alone is wanted, to which they do not
        contribute.
        """
        entries: list[Tensor] = []

        def visit(entry: Tensor) -> None:
            entries.append(batch.packed.unpack(entry))

        drop = loss_alone and not with_entries and self.selector.masks_loss
        visits = visit if with_entries else None
        with explained(decoder.describe):
            decoded = decoder.run(batch, embed, labelled, visits, drop)
        if torch.is_grad_enabled():
            self.selector.check_kept()
        return decoded, entries if with_entries else None
