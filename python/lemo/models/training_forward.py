"""The training forward pass with elimination: losses, and logits and hidden states when asked for.

For a loss alone, left-out rows are not computed. For logits or hidden states a second decoder also
computes the left-out rows, without a graph, so that each row is what the dense model gives.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPast

from lemo.models import labels as named_labels
from lemo.models.architectures import Architecture
from lemo.models.arguments import ForwardArguments
from lemo.models.batch import Batch
from lemo.models.decoder import Decoded, Decoder
from lemo.models.elimination import Elimination
from lemo.models.labelled_rows import LabelledStates
from lemo.models.loss import causal_lm_loss, next_labels, rows_among
from lemo.models.outputs import DeferredLogits, EliminatedOutput
from lemo.packing.batch import PackedBatch
from lemo.relevance.answers import are_answers
from lemo.selection.selector import Selector
from lemo.settings.elimination import LemoConfig

__all__ = ["TrainingForward"]

_LABELS_UNKNOWN = (
    ", chosen without regard to labels, because nobody named them: pass `labels` to the model, or "
    "use handle.labelled(mask) or handle.attach(trainer)"
)


class TrainingForward:
    """What the model computes in place of its own forward.

    Attributes:
        row_labels: [B, S] bool, rows that predict a label, in the pass that runs; None: nothing is
            known.
        token_scores: [B, S] fp32, scores of the tokens for scorer "given", in the pass that runs;
            None: none are given.
        has_trained: whether a pass has trained something.
        elimination: that of the latest pass.
    """

    def __init__(self, architecture: Architecture, config: LemoConfig) -> None:
        self.row_labels: Tensor | None = None
        self.token_scores: Tensor | None = None
        self.has_trained = False
        self._architecture = architecture
        self._loss_chunk = config.loss_chunk
        of_text, of_answers = config.resolved(answers=False), config.resolved(answers=True)
        self._of_text = self._of_answers = Elimination(architecture, of_text)
        if of_answers != of_text:
            self._of_answers = Elimination(architecture, of_answers)
        self.elimination = self._of_text
        self._said: set[str] = set()

    @property
    def selector(self) -> Selector:
        """What each sub-block keeps, or kept in the latest pass."""
        return self.elimination.selector

    @contextmanager
    def keeping_everything(self) -> Iterator[None]:
        """Every sub-block keeps everything inside, whatever the settings say."""
        with (
            self._of_text.selector.keeping_everything(),
            self._of_answers.selector.keeping_everything(),
        ):
            yield

    def set_progress(self, progress: float) -> None:
        """Share of the training that is done, in [0, 1]."""
        for elimination in (self._of_text, self._of_answers):
            elimination.selector.set_progress(progress)

    def begin_step(self, step: int) -> None:
        """Tells that optimizer step `step`, from 0, begins."""
        for elimination in {self._of_text, self._of_answers}:
            elimination.scorer.begin_step(step)

    def loss(self, arguments: ForwardArguments) -> EliminatedOutput:
        """The output for a call with labels: nothing of the size of all logits is made."""
        architecture, ignored = self._architecture, arguments.ignored_label
        asked = arguments.wants_hidden_states(architecture.config)
        batch, residual = self._embed(arguments)
        targets, lost = next_labels(batch.packed, arguments.labels, arguments.shift_labels, ignored)
        decoder = self.elimination.dense_decoder if asked else self.elimination.decoder
        decoded, entries = self._decode(decoder, batch, residual, targets != ignored, asked, True)
        del residual
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

    def logits(self, arguments: ForwardArguments) -> EliminatedOutput:
        """The output for a call without labels."""
        states = self.states(arguments)
        keep = arguments.logits_to_keep
        columns = slice(-keep, None) if isinstance(keep, int) else keep  # -0: all
        logits = self._architecture.lm_head(states.last_hidden_state[:, columns])
        return EliminatedOutput(logits=logits, hidden_states=states.hidden_states)

    def custom_loss(self, arguments: ForwardArguments) -> EliminatedOutput:
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
        return EliminatedOutput(loss=loss, logits=output.logits, hidden_states=output.hidden_states)

    def states(self, arguments: ForwardArguments) -> BaseModelOutputWithPast:
        """The decoder's output: in each row what the dense model gives."""
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
                + ("" if labelled is not None else _LABELS_UNKNOWN)
            )
            # Rows without a graph in the layers have none behind them either.
            hidden = torch.where(masked[:, None], hidden.detach(), hidden)
        hidden = batch.packed.unpack(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if entries is None else (*entries, hidden),
        )

    def say(self, message: str) -> None:
        """A warning, once for each model."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"lemo: {message}", stacklevel=2)

    def _embed(self, arguments: ForwardArguments) -> tuple[Batch, Tensor]:
        arguments.check(self._architecture.config)
        self._architecture.check_parts()
        self.elimination = self._chosen(arguments)
        batch, residual = self._architecture.embed(arguments, self.elimination.block_size)
        if self.token_scores is not None:
            embedded = arguments.inputs_embeds is not None
            scores = _of_tokens("scores", self.token_scores, batch.packed, embedded)
            batch = replace(batch, scores=scores)
        return batch, residual

    def _chosen(self, arguments: ForwardArguments) -> Elimination:
        """By whether answers alone have labels, where the settings leave that open."""
        rows = arguments.labelled_rows()
        rows = self.row_labels if rows is None else rows
        if self._of_answers is self._of_text or rows is None:
            return self._of_text
        mask = arguments.attention_mask
        tokens = rows.numel() if mask is None else (mask != 0).sum().item()
        labelled = rows.sum().item()
        return self._of_answers if are_answers(int(labelled), int(tokens)) else self._of_text

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
        decoded = decoder.run(batch, residual, labelled, visits, drop)
        if torch.is_grad_enabled():
            self.selector.check_kept()
        return decoded, entries if with_entries else None

    def _pack_labels(self, packed: PackedBatch, embedded: bool) -> Tensor | None:
        """[T] bool: rows that predict a label, as far as they are named."""
        if self.row_labels is None:
            return None
        return _of_tokens("mask", self.row_labels, packed, embedded)

    def _nothing_trained(self) -> None:
        message = (
            "labels: expected one or more of the batch's to be predicted from a row that counts, "
            "got none, so nothing is trained{}; more rows have to be kept (keep, thresholds), or "
            "fewer masked (burn_in)"
        )
        if not self.has_trained:
            raise ValueError(message.format(""))
        self.say(message.format(" in this step"))


def _of_tokens(name: str, values: Tensor, packed: PackedBatch, embedded: bool) -> Tensor:
    """[T]: what the caller says of the tokens of a batch, [B, S].

    Args:
        name: of the argument, for errors.
        values: [B, S].
        packed: the batch.
        embedded: whether the model got embeddings, in which there may be more tokens.

    Raises:
        ValueError: not one for each token.
    """
    # From pinned memory the copy is not waited for.
    values = values.to(packed.cu_seqlens.device, non_blocking=values.device.type == "cpu")
    missing = packed.shape[1] - values.shape[1]
    if embedded and missing > 0:
        values = pad(values, (missing, 0))  # PEFT's virtual tokens come before the others
    if tuple(values.shape) != tuple(packed.shape):
        raise ValueError(
            f"{name}: expected one for each token, [batch, tokens] = {list(packed.shape)}, got "
            f"{list(values.shape)}"
        )
    return packed.pack(values)
