"""Losses of trainers that read nothing but the rows with labels, by the trainer's own arithmetic.

TRL gives a causal LM another head: called with `fused_lm_head=True` and labels, the model runs its
decoder and returns the log-probability of each label, from which the trainer makes the loss. Where
that loss is a sum over the labels, as SFTTrainer's is, what holds for a loss inside the model holds
for it, too: left-out rows need not be computed, and their labels do not count. So the head gets the
hidden states and labels of the rows that count, and the sum is scaled as lemo's own loss is.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers
from torch import Tensor

from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.interception import origin

__all__ = ["LabelledStates", "call_head", "fused_call", "sums_over_labels", "with_head"]

_SWITCH = "fused_lm_head"


@dataclass(frozen=True)
class LabelledStates:
    """The N rows of a training pass whose prediction counts in the loss.

    Attributes:
        hidden: [1, N, H], what the head gets, with a graph.
        labels: [1, N] int64, what each of them predicts.
        weight: fp32 scalar; labels of the batch for each label that counts.
    """

    hidden: Tensor
    labels: Tensor
    weight: Tensor


def sums_over_labels(trainer: transformers.Trainer) -> bool:
    """Whether a trainer's loss is a sum over labels of what TRL's head returns for each of them.

    It is SFTTrainer's, losses "nll" and "dft". One whose `compute_loss` is another's, of a subclass
    or put into the instance, is not known.
    """
    trl = sys.modules.get("trl")  # who has a trainer of TRL has imported it
    if trl is None or not isinstance(trainer, trl.SFTTrainer):
        return False
    own: bool = type(trainer).compute_loss is trl.SFTTrainer.compute_loss
    # Lemo's own wrappers are there where it is attached already.
    put = vars(trainer).get("compute_loss")
    while own and put is not None:
        own = origin(put).startswith(("lemo.", "trl."))
        put = getattr(put, "__wrapped__", None)
    return own


def fused_call(call: Mapping[str, Any]) -> ForwardArguments | None:
    """The arguments of a call of TRL's head with labels; None: it is another call."""
    if not call.get(_SWITCH):
        return None
    arguments = ForwardArguments.of({name: call[name] for name in call if name != _SWITCH})
    has_labels = arguments.labels is not None or arguments.shift_labels is not None
    return arguments if has_labels else None


def call_head(forward: Callable[..., Any], call: Mapping[str, Any], labels: Tensor) -> Any:
    """What a forward with TRL's head returns for the labels [1, N] of the rows that count.

    Args:
        forward: its decoder answers with the hidden states [1, N, H] of these rows.
        call: the arguments of the call for the whole batch.
        labels: shifted already.
    """
    return forward(**{**call, "labels": None, "shift_labels": labels})


def with_head(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with TRL's head, told to use it."""
    return partial(forward, **{_SWITCH: True})
