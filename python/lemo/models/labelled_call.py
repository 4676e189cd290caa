"""A training pass with labels: what is known before it runs, and what its loss is."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lemo.models.calls.arguments import ForwardArguments
from lemo.models.layers.batch import Batch
from lemo.models.layers.decoder import Embed

__all__ = ["LabelledCall", "PassLoss"]


class LabelledCall(NamedTuple):
    """A call with labels before anything is embedded.

    Attributes:
        arguments: those of the call.
        batch: what its T rows are.
        embed: embeds them.
        targets: [T] int64, the label that each row predicts, or the ignored one.
        labelled: [T] bool, rows that predict a label.
        lost: int64 scalar, labels that only padding predicts; None: nothing is padded.
    """

    arguments: ForwardArguments
    batch: Batch
    embed: Embed
    targets: Tensor
    labelled: Tensor
    lost: Tensor | None


class PassLoss(NamedTuple):
    """The loss of a pass.

    Attributes:
        value: fp32 scalar, with a graph.
        counted: how many labels count; an upper bound where that is known without a read-back.
        difference: what is another in the model than in the pass, in words; None: nothing.
    """

    value: Tensor
    counted: int
    difference: Callable[[], str | None]
