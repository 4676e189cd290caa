"""The rows that the settings of elimination keep in each layer, before any score is known."""

from __future__ import annotations

from collections.abc import Sequence

from lemo import _C
from lemo.packing.blocks import block_tokens
from lemo.planner.shape import LayerRows
from lemo.selection.policies import Policies
from lemo.settings.elimination import LemoConfig

__all__ = ["drops_rows", "embeds_all", "has_one_set", "kept_rows", "rows_of", "selections"]

# Scorers that read the residual, of all tokens.
_READ_RESIDUAL = ("attention", "pooled", "predictor", "exact")


def kept_rows(
    lengths: Sequence[int],
    keep: float,
    block_size: int | float,
    ends: tuple[int, int],
    tokens: int = 0,
) -> int:
    """Rows of all sequences that a share of their blocks holds, at most.

    Args:
        lengths: tokens of each sequence.
        keep: share of the blocks.
        block_size: tokens of a block, or their share of the longest sequence.
        ends: blocks always kept at the start and at the end of a sequence.
        tokens: of each prompt that are kept at least, in whole blocks, beside one with labels.
    """
    size = block_tokens(block_size, max(lengths))
    least = (-(-tokens // size) + 1) * size if tokens else 0
    total = 0
    for length in lengths:
        blocks, rows = _C.plan_selection([length], size, keep, *ends)
        # Below 0: the last block, which is shorter, may be kept or not.
        rows = blocks * size if rows < 0 else rows
        total += max(rows, min(length, least))
    return total


def rows_of(config: LemoConfig, num_layers: int, lengths: Sequence[int]) -> list[LayerRows]:
    """The most rows that each layer keeps at any time of the training.

    By a threshold, which scores decide about, a layer may keep all. Of answers whose labels fill
    more blocks than a share leaves them, more may be kept.

    Args:
        config: the settings, none left open (`LemoConfig.resolved`).
        num_layers: layers of the model.
        lengths: tokens of each sequence.

    Raises:
        ValueError: rows that are left out are computed or seen; settings that do not fit the model.
    """
    if config.visible_keys != "kept":
        raise ValueError(
            "visible_keys: expected kept, whose memory and time can be predicted, got "
            f"{config.visible_keys}"
        )
    everything = sum(lengths)
    if config.layerwise.policy == "threshold":
        return [LayerRows(everything, everything)] * num_layers
    policies = Policies(config, num_layers)
    block_size = config.block_size
    assert block_size is not None
    ends, tokens = (config.keep_first, config.keep_last), config.keep_tokens or 0

    def most(layer: int, kind: str) -> int:
        rows = 0
        for progress in policies.moments:
            rule = policies.rule(layer, kind, progress)
            keep = 1.0 if rule is None else rule.value
            rows = max(rows, kept_rows(lengths, keep, block_size, ends, tokens))
        return rows

    return [LayerRows(most(layer, "attention"), most(layer, "mlp")) for layer in range(num_layers)]


def embeds_all(config: LemoConfig) -> bool:
    """Whether all tokens are embedded, because scores follow from the residual."""
    return config.scorer in _READ_RESIDUAL


def drops_rows(config: LemoConfig, num_layers: int) -> bool:
    """Whether rows that no layer keeps are dropped before the layers, all the time."""
    return config.mask_loss is not False and has_one_set(config, num_layers)


def has_one_set(config: LemoConfig, num_layers: int) -> bool:
    """Whether all sub-blocks keep the same rows, all the time."""
    if config.layerwise.policy == "threshold":
        return False
    return Policies(config, num_layers).always_has_one_set


def selections(config: LemoConfig, num_layers: int) -> int:
    """How often a pass selects rows by new scores, beside the first time."""
    policies = Policies(config, num_layers)
    kinds = ("attention",) if policies.mlp_shares else ("attention", "mlp")
    count = sum(
        policies.needs_scores_of(layer, kind, 0.0) for layer in range(num_layers) for kind in kinds
    )
    return max(count - 1, 0)
