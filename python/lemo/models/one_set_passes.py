"""Losses of passes in which all layers keep the same rows, by CUDA graphs where these pay.

On a GPU such a pass is `OneSet`, a function that reads nothing back, whether it runs as it is or is
replayed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lemo.distributed.context import ContextParallel
from lemo.models.elimination import Elimination
from lemo.models.labelled_call import LabelledCall, PassLoss
from lemo.models.layers.architectures import Architecture
from lemo.models.layers.cuda_graphs import CudaGraphs, supports_graphs
from lemo.models.layers.decoder import Pass
from lemo.models.layers.loss import divisor_of
from lemo.models.layers.one_set import (
    Labels,
    OneSet,
    State,
    labels_of_rows,
    state_of,
    uses_plain_head,
)
from lemo.models.memory.out_of_memory import explained
from lemo.models.memory.sharded import is_sharded
from lemo.models.projections.as_in_forward import AsInForward
from lemo.selection.selector import Selector
from lemo.settings.elimination import LemoConfig

__all__ = ["OneSetPasses"]


class OneSetPasses:
    """Computes the losses of such passes.

    Args:
        architecture: access to the model.
        config: the settings.

    Attributes:
        graphs: of the passes; None: they are switched off.
    """

    def __init__(self, architecture: Architecture, config: LemoConfig) -> None:
        self._architecture = architecture
        self._loss_chunk = config.loss_chunk
        self._leaves_out_long = config.cuda_graphs == "auto"
        self.graphs: CudaGraphs | None = None
        if config.cuda_graphs != "off":
            self.graphs = CudaGraphs(spares=config.cuda_graphs == "auto")
        self._mostly_labelled = False
        self._keeps_state = False
        self._kept_state: State | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Nobody said it of a copied or pickled model, whose weights are elsewhere.
        return vars(self) | {"_keeps_state": False, "_kept_state": None}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """See `lemo.Handle.unchanged`."""
        self._keeps_state, self._kept_state = True, None
        try:
            yield
        finally:
            self._keeps_state, self._kept_state = False, None

    def takes(
        self, selector: Selector, context: ContextParallel | None, device: torch.device
    ) -> bool:
        """Whether all is known before the layers run, which a GPU need not wait for then.

        Args:
            selector: what each sub-block keeps.
            context: processes that share out the rows; None: this one has them all.
            device: where the pass runs.
        """
        if not (supports_graphs(device) and torch.is_grad_enabled()):
            return False
        reason = None
        if context is not None:
            reason = "processes share out the rows"
        elif not selector.has_one_set:
            reason = "layers keep rows of their own"
        elif any(map(is_sharded, (self._architecture.layer(0), self._architecture.lm_head))):
            reason = "weights are sharded"
        elif not uses_plain_head(self._architecture):
            reason = "the head is no plain product"
        if reason is not None and self.graphs is not None:
            self.graphs.say(f"CUDA graphs: passes run without one: {reason}")
        return reason is None

    def loss(self, elimination: Elimination, call: LabelledCall, has_trained: bool) -> PassLoss:
        """The loss of a pass that `takes` is true of.

        Args:
            elimination: the settings at work.
            call: what is known of the pass.
            has_trained: whether a pass has trained something. Until one has, the host waits for
                the number of labels that count.
        """
        decoder, selector = elimination.decoder, elimination.selector
        with explained(decoder.describe):
            now, residual = decoder.begin(
                call.batch, call.embed, call.labelled, selector.masks_loss
            )
            captures = self.graphs is not None and not self.graphs.has_given_up
            residual = decoder.enter(now, residual, captures)
        selector.check_kept()
        labels, most = self._labels(selector, call, now, has_trained)
        ignored = call.arguments.ignored_label
        step = OneSet(self._architecture, decoder, now, labels, ignored, self._loss_chunk)
        inputs, graphs = step.inputs(residual), self._graphs_for(step)
        module = self._architecture.causal_lm
        if graphs is None:
            return PassLoss(step(inputs), most, AsInForward(module).difference)
        state = self._state()
        key, parameters, read = step.captured(state)
        obstacle = partial(step.obstacle, parameters)
        difference = partial(self._difference, state, read, [x._version for x in read])
        more = state.frozen, state.merged
        loss = graphs.run(key, step, inputs, parameters, module, obstacle, *more)
        return PassLoss(loss, most, difference)

    def _labels(
        self, selector: Selector, call: LabelledCall, now: Pass, has_trained: bool
    ) -> tuple[Labels, int]:
        """What the head sees of the rows of a pass, and how many labels count at most."""
        arguments, labelled = call.arguments, call.labelled
        masked = selector.masked_rows()
        counted = labelled if masked is None else labelled & ~masked
        divisor = divisor_of(labelled, counted, arguments.num_items_in_batch, call.lost)
        if divisor is not None and not torch.is_tensor(divisor):
            divisor = torch.full((), divisor, dtype=torch.float32, device=labelled.device)
        targets = call.targets.masked_fill(~counted, arguments.ignored_label)
        if now.place.rows is not None:
            targets = targets.index_select(0, now.place.rows)
        most = self._most_labels(call, targets, has_trained)
        rows, targets = labels_of_rows(targets, arguments.ignored_label, most)
        return Labels(rows, targets, None if divisor is None else divisor.float()), most

    def _most_labels(self, call: LabelledCall, targets: Tensor, has_trained: bool) -> int:
        """Labels of `targets` [R] that count at most; until something has been trained exactly."""
        arguments = call.arguments
        ignored, rows = arguments.ignored_label, targets.numel()
        given = arguments.labels if arguments.shift_labels is None else arguments.shift_labels
        if has_trained and given is not None and given.device.type == "cpu":
            return min(int((given != ignored).sum()), rows)
        if has_trained and self._mostly_labelled:
            return rows
        # Waits for the device, in the first passes and where few rows have labels.
        count = int((targets != ignored).sum())
        self._mostly_labelled = 8 * count >= 7 * rows
        return count

    def _graphs_for(self, step: OneSet) -> CudaGraphs | None:
        """What may replay a pass; None: it runs without graphs, and the log says why."""
        graphs = self.graphs
        if graphs is None:
            return None
        assert step.now.offload is not None
        reason = None
        if step.now.offload.is_needed:
            reason = "CUDA graphs: passes run without one: activations go to the host"
        elif self._leaves_out_long and step.is_long():
            reason = (
                "CUDA graphs: passes whose kernels take longer than the host takes to issue them "
                "run without one"
            )
        if reason is None:
            return graphs
        graphs.say(reason)
        return None

    def _state(self) -> State:
        """The modules as they are in this pass."""
        state = self._kept_state
        if state is None:
            state = state_of(self._architecture)
        if self._keeps_state:
            self._kept_state = state
        return state

    def _difference(
        self, state: State, read: Sequence[Tensor], versions: Sequence[int]
    ) -> str | None:
        """What is another than when the modules and the versions of all weights were these."""
        if [x._version for x in read] != versions:
            return "weights that were changed in place since"
        if state_of(self._architecture).said != state.said:
            return "other modules, adapters, dropout or weights"
        return None
