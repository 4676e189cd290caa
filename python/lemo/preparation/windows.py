"""The windows of tokens that predictors learn from and are tested on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lemo.preparation.exact_scores import FeatureStore
from lemo.settings.preparation import PredictorSettings

__all__ = ["Window", "check_length", "check_windows"]


@dataclass(frozen=True)
class Window:
    """Tokens to learn from or to test on.

    Attributes:
        kind: group by which recall is reported.
        ids: [T] int64 token ids.
    """

    kind: str
    ids: Tensor


def check_windows(
    training: Sequence[Window],
    held_out: Sequence[Window],
    shape: dict[str, Any],
    settings: PredictorSettings,
) -> None:
    """Raises ValueError where windows do not fit the model, the settings, or the disk.

    Args:
        training, held_out: the windows.
        shape: of the model, as `lemo.predictors.model.model_shape` gives it.
        settings: of the preparation.
    """
    for name, windows in (("training", training), ("held_out", held_out)):
        if not windows:
            raise ValueError(f"{name}: expected at least one window, got none")
        for window in windows:
            _check_window(name, window, shape["vocab_size"], settings)
    tokens = sum(window.ids.numel() for window in (*training, *held_out))
    needed = tokens * FeatureStore.bytes_of_token(shape["num_layers"], shape["hidden_size"])
    if needed > int(settings.disk_gib * 2**30):
        raise ValueError(
            f"disk_gib: {tokens} tokens of this model take {needed / 2**30:.3g} GiB on disk while "
            f"lemo prepares, the limit is {settings.disk_gib:.3g} GiB; give fewer or shorter "
            "windows, or a higher limit"
        )


def _check_window(name: str, window: Window, vocab_size: int, settings: PredictorSettings) -> None:
    if not 0 <= window.ids.min() <= window.ids.max() < vocab_size:
        raise ValueError(
            f"{name}: expected ids from 0 to {vocab_size - 1}, for which the model has an "
            f"embedding, got {window.ids.min()} to {window.ids.max()}"
        )
    check_length(name, window.ids.numel(), settings)


def check_length(name: str, tokens: int, settings: PredictorSettings) -> None:
    """Raises ValueError where a window of so many tokens leaves no choice between blocks.

    Args:
        name: of the setting or argument that gives it, for the error.
        tokens: of the window.
        settings: of the preparation.
    """
    needed = settings.keep_first + settings.keep_last + 2
    if -(-tokens // settings.block_size) < needed:
        raise ValueError(
            f"{name}: expected windows of at least {needed} blocks of {settings.block_size} "
            f"tokens, so that there is a choice, got {tokens} tokens"
        )
