"""What is said of block sizes that leave little to choose, or that do not fit stored scores."""

from __future__ import annotations

import logging
import math

from lemo.packing.blocks import block_tokens
from lemo.relevance.store import ScoreStore
from lemo.settings.elimination import LemoConfig

__all__ = ["check_blocks", "check_stored_blocks"]

_log = logging.getLogger("lemo")


def check_blocks(length: int, block_size: int | float, elimination: LemoConfig) -> None:
    """Warns of windows with few blocks, and of shares that are rounded up by much."""
    block_size = block_tokens(block_size, length)
    blocks = -(-length // block_size)
    if blocks < 4:
        _log.warning(
            "elimination.block_size: a window of %d tokens has %d blocks of %d, which leaves "
            "little to choose; a quarter of the window, %d, is a good size",
            length,
            blocks,
            block_size,
            -(-length // 4),
        )
    layerwise = elimination.layerwise
    for name, keep in (("keep", elimination.keep), ("layerwise.keep_mlp", layerwise.keep_mlp)):
        if layerwise.policy == "ratio" and isinstance(keep, float):
            kept = math.ceil(keep * blocks - 1e-9) / blocks
            if kept - keep > 0.05:
                _log.warning(
                    "elimination.%s: %g of %d blocks is rounded up to %g of the tokens; smaller "
                    "blocks come nearer",
                    name,
                    keep,
                    blocks,
                    kept,
                )


def check_stored_blocks(length: int, block_size: int | float, scores: ScoreStore) -> None:
    """Warns of blocks that are shorter than those of stored scores."""
    tokens = block_tokens(block_size, length)
    if tokens < scores.block_size:
        _log.warning(
            "elimination.block_size: blocks of %d tokens are shorter than the %d that the stored "
            "scores are of, so several of them have the same score",
            tokens,
            scores.block_size,
        )
