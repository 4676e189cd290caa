"""The loss of a model that eliminates tokens."""

from collections.abc import Sequence

import torch
from torch import nn

from lemo.models.calls.eval_mode import evaluating
from lemo.models.enable import enable
from lemo.preparation.windows import Window
from lemo.settings.elimination import LemoConfig

__all__ = ["elimination_loss"]


@torch.no_grad()
def elimination_loss(model: nn.Module, windows: Sequence[Window], config: LemoConfig) -> float:
    """Mean loss of a token, in nats, while the model eliminates; no dropout, no gradient.

    Args:
        model: a causal LM, without lemo.
        windows: whose tokens are predicted.
        config: what is eliminated.
    """
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        handle = enable(model, config)
        try:
            for window in windows:
                ids = window.ids[None].to(device)
                total += handle.loss(input_ids=ids, labels=ids).item() * (ids.numel() - 1)
                tokens += ids.numel() - 1
        finally:
            handle.remove()
    return total / tokens
