"""What a training pass knows of its batch and of the training, in either path."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lemo.distributed.context import ContextParallel
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.context_checks import check_call
from lemo.models.calls.outputs import EliminatedOutput
from lemo.models.calls.per_thread import PerThread
from lemo.models.elimination import Choice
from lemo.models.layers.cuda_graphs import CudaGraphs
from lemo.models.trainer_groups import check_alone
from lemo.packing.batch import PackedBatch
from lemo.packing.to_device import to_device
from lemo.relevance.answers import are_answers
from lemo.selection.selector import Selector
from lemo.settings.elimination import LemoConfig

__all__ = ["LABELS_UNKNOWN", "Training"]

LABELS_UNKNOWN = (
    ", chosen without regard to labels, because nobody named them: pass `labels` to the model, or "
    "use handle.labelled(mask) or handle.attach(trainer)"
)

C = TypeVar("C", bound=Choice)


class Training(ABC, Generic[C]):
    """The part of a path's training forward that does not depend on how layers run.

    Attributes:
        row_labels: [B, S] bool, rows that predict a label, in the pass that runs; None: nothing is
            known.
        token_scores: [B, S] fp32, scores of the tokens for scorer "given", in the pass that runs;
            None: none are given.
        host_ids: [B, S] int64 on the CPU, the tokens of the pass that runs; None: they are not
            given.
        has_trained: whether a pass has trained something.
        elimination: that of the latest pass.
        context: processes that share out the rows; None: this one has them all.
        graphs: CUDA graphs of its passes; None: it has none.
    """

    graphs: CudaGraphs | None = None
    row_labels = PerThread[Tensor | None](None)
    token_scores = PerThread[Tensor | None](None)
    host_ids = PerThread[Tensor | None](None)

    def __init__(
        self,
        config: LemoConfig,
        choose: Callable[[LemoConfig], C],
        context: ContextParallel | None = None,
    ) -> None:
        """Resolves the settings.

        Args:
            config: the settings.
            choose: what settings, none left open, ask for.
            context: processes that share out the rows; None: this one has them all.
        """
        if context is not None and config.host_memory:
            raise NotImplementedError(
                "host_memory: expected 0 with context_parallel, whose processes exchange keys and "
                f"values while layers run, got {config.host_memory:g}"
            )
        self.context = context
        self.has_trained = False
        of_text, of_answers = config.resolved(answers=False), config.resolved(answers=True)
        self._of_text = self._of_answers = choose(of_text)
        if of_answers != of_text:
            self._of_answers = choose(of_answers)
        self.elimination = self._of_text
        self._said: set[str] = set()
        if context is not None:
            for elimination in {self._of_text, self._of_answers}:
                elimination.scorer.begin_replica(context.replica)

    @abstractmethod
    def loss(self, arguments: ForwardArguments) -> EliminatedOutput:
        """The output for a call with labels: nothing of the size of all logits is made."""

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

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """See `lemo.Handle.unchanged`; a path that reads nothing anew has nothing to do."""
        yield

    def set_progress(self, progress: float) -> None:
        """Share of the training that is done, in [0, 1]."""
        for elimination in (self._of_text, self._of_answers):
            elimination.selector.set_progress(progress)

    def begin_step(self, step: int) -> None:
        """Tells that optimizer step `step`, from 0, begins."""
        for elimination in {self._of_text, self._of_answers}:
            elimination.scorer.begin_step(step)

    def reason_of_nan(self) -> str | None:
        """See `lemo.Handle.reason_of_nan`; in the latest pass or another one."""
        eliminations = (self.elimination, self._of_text, self._of_answers)
        reasons = (each.selector.finite.reason() for each in eliminations)
        return next((reason for reason in reasons if reason is not None), None)

    def check_call(self, arguments: ForwardArguments) -> None:
        """Refuses a call with labels that is not defined here, or for processes that share rows."""
        arguments.check_labels()
        if self.context is not None:
            check_call(arguments)
        else:
            check_alone()

    def whole(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by name, of all rows, from those that this process has."""
        if self.context is None:
            return gradients
        return {name: self.context.average(gradient) for name, gradient in gradients.items()}

    def begin_pass(self, index: int) -> None:
        """Tells that forward pass `index` of the step, of all processes' passes, begins."""
        for elimination in {self._of_text, self._of_answers}:
            elimination.scorer.begin_pass(index)

    def say(self, message: str) -> None:
        """A warning, once for each model."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"lemo: {message}", stacklevel=2)

    def _chosen(self, arguments: ForwardArguments) -> C:
        """By whether answers alone have labels, where the settings leave that open."""
        # -1: no backward pass runs in this thread.
        if torch._C._current_graph_task_id() != -1:
            raise NotImplementedError(
                "torch.utils.checkpoint: expected it around layers of a model with lemo at most, "
                "got it around the model's forward pass, which would choose other tokens when it "
                "is computed again: use LemoConfig(recompute=...) or "
                "model.gradient_checkpointing_enable()"
            )
        if torch._C._functorch.maybe_current_level() is not None:
            raise NotImplementedError(
                "torch.func: expected loss.backward() or torch.autograd.grad, got a transform "
                "(grad, vmap, jvp and the like) around the model's forward pass, for which lemo's "
                "operators have no rules; functional_call by itself may be used"
            )
        rows = arguments.labelled_rows()
        rows = self.row_labels if rows is None else rows
        if self._of_answers is self._of_text or rows is None:
            return self._of_text
        mask = arguments.attention_mask
        tokens = rows.numel() if mask is None else (mask != 0).sum().item()
        labelled = rows.sum().item()
        return self._of_answers if are_answers(int(labelled), int(tokens)) else self._of_text

    def _pack_labels(self, packed: PackedBatch, embedded: bool) -> Tensor | None:
        """[T] bool: rows that predict a label, as far as they are named."""
        if self.row_labels is None:
            return None
        return _of_tokens("mask", self.row_labels, packed, embedded)

    def _pack_scores(self, packed: PackedBatch, embedded: bool) -> Tensor | None:
        """[T] fp32: scores of the tokens, where the caller gave some."""
        if self.token_scores is None:
            return None
        return _of_tokens("scores", self.token_scores, packed, embedded)

    def _note_trained(self, counted: int, labelled: Tensor) -> None:
        """Takes note of whether a pass trains something.

        Args:
            counted: how many of its labels count.
            labelled: [T] bool, rows that predict a label.

        Raises:
            ValueError, FloatingPointError: it has labels, but none that counts, and neither had
                any pass before.
        """
        if counted:
            self.has_trained = True
        elif torch.is_grad_enabled() and bool(labelled.any()):
            self._nothing_trained()

    def _nothing_trained(self) -> None:
        message = (
            "labels: expected one or more of the batch's to be predicted from a row that counts, "
            "got none, so nothing is trained{}; more rows have to be kept (keep, thresholds), or "
            "fewer masked (burn_in)"
        )
        if not self.has_trained:
            reason = self.reason_of_nan()
            if reason is not None:
                raise FloatingPointError(reason)
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
    values = to_device(values, packed.cu_seqlens.device)
    missing = packed.shape[1] - values.shape[1]
    if embedded and missing > 0:
        values = pad(values, (missing, 0))  # PEFT's virtual tokens come before the others
    if tuple(values.shape) != tuple(packed.shape):
        raise ValueError(
            f"{name}: expected one for each token, [batch, tokens] = {list(packed.shape)}, got "
            f"{list(values.shape)}"
        )
    return packed.pack(values)
