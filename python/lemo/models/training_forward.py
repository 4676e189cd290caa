"""The training forward pass with elimination: losses, and logits and hidden states when asked for.

For a loss alone, left-out rows are not computed. For logits or hidden states a second decoder also
computes the left-out rows, without a graph, so that each row is what the dense model gives.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lemo.distributed.context import ContextParallel
from lemo.models import labels as named_labels
from lemo.models.architectures import Architecture
from lemo.models.arguments import ForwardArguments
from lemo.models.batch import Batch
from lemo.models.decoder import Decoded, Decoder
from lemo.models.elimination import Elimination
from lemo.models.labelled_rows import LabelledStates
from lemo.models.loss import causal_lm_loss, next_labels, rows_among
from lemo.models.offload import Offload
from lemo.models.out_of_memory import explained
from lemo.models.outputs import DeferredLogits, EliminatedOutput
from lemo.models.sharing import needs_all_rows
from lemo.models.training import LABELS_UNKNOWN, Training
from lemo.settings.elimination import LemoConfig

__all__ = ["TrainingForward"]


class TrainingForward(Training[Elimination]):
    """What the model computes in place of its own forward, in the native path.

    Attributes:
        offload: moves what layers save to the host.

    Args:
        architecture: access to the model.
        config: the settings.
        context: processes that share out the rows; None: this one has them all.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: LemoConfig,
        context: ContextParallel | None = None,
    ) -> None:
        self.offload = Offload(config.host_bytes)
        parts = architecture, context, self.offload
        super().__init__(config, partial(Elimination, *parts), context)
        self._architecture = architecture
        self._loss_chunk = config.loss_chunk

    def loss(self, arguments: ForwardArguments) -> EliminatedOutput:
        architecture, ignored = self._architecture, arguments.ignored_label
        asked = arguments.wants_hidden_states(architecture.config)
        context = self.context
        if context is not None:
            if asked:
                raise needs_all_rows("output_hidden_states")
            context.begin(architecture.causal_lm, arguments.given)
        batch, residual = self._embed(arguments)
        targets, lost = next_labels(batch.packed, arguments.labels, arguments.shift_labels, ignored)
        decoder = self.elimination.dense_decoder if asked else self.elimination.decoder
        decoded, entries = self._decode(decoder, batch, residual, targets != ignored, asked, True)
        del residual
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
        if counted:
            self.has_trained = True
        elif torch.is_grad_enabled() and bool((targets != ignored).any()):
            self._nothing_trained()
        output = EliminatedOutput(loss=loss)
        rows = arguments.labelled_rows()

        def logits() -> Tensor:
            with named_labels.named(self, rows):
                computed = self.logits(arguments).logits
            assert computed is not None
            return computed

        output["logits"] = DeferredLogits(logits, architecture.causal_lm.parameters())
        if entries is not None:
            entries.append(batch.packed.unpack(architecture.final_norm(decoded.residual)[1]))
            output["hidden_states"] = tuple(entries)
        return output

    def labelled_states(self, arguments: ForwardArguments) -> LabelledStates:
        """What `loss` gives to the head, for a call with labels whose head is somebody else's."""
        if self.context is not None:
            raise needs_all_rows("a loss of TRL's head")
        ignored = arguments.ignored_label
        batch, residual = self._embed(arguments)
        targets, lost = next_labels(batch.packed, arguments.labels, arguments.shift_labels, ignored)
        labelled = targets != ignored
        (residual, computed), _ = self._decode(
            self.elimination.decoder, batch, residual, labelled, False, True
        )
        masked = self.selector.masked_rows()
        rows = (labelled if masked is None else labelled & ~masked).nonzero()[:, 0]
        index = rows_among(rows, residual, computed)
        hidden = self._architecture.final_norm(residual, index)[1]
        count = labelled.sum() if lost is None else labelled.sum() + lost
        if rows.numel():
            self.has_trained = True
        elif bool(labelled.any()):
            self._nothing_trained()
        return LabelledStates(
            hidden[None], targets[rows][None], count.float() / max(rows.numel(), 1)
        )

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
        """The decoder's output: in each row what the dense model gives."""
        if self.context is not None:
            raise needs_all_rows("logits or hidden states")
        batch, residual = self._embed(arguments)
        labelled = self._pack_labels(batch.packed, arguments.inputs_embeds is not None)
        asked = arguments.wants_hidden_states(self._architecture.config)
        (residual, _), entries = self._decode(
            self.elimination.dense_decoder, batch, residual, labelled, asked
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

    def _embed(self, arguments: ForwardArguments) -> tuple[Batch, Tensor]:
        arguments.check(self._architecture.config)
        self._architecture.check_parts()
        self.elimination = self._chosen(arguments)
        batch, residual = self._architecture.embed(arguments, self.elimination.block_size)
        scores = self._pack_scores(batch.packed, arguments.inputs_embeds is not None)
        return replace(batch, scores=scores), residual

    def _decode(
        self,
        decoder: Decoder,
        batch: Batch,
        residual: Tensor,
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
            decoded = decoder.run(batch, residual, labelled, visits, drop)
        if torch.is_grad_enabled():
            self.selector.check_kept()
        return decoded, entries if with_entries else None
