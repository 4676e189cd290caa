"""What is said of the settings of elimination when a run begins."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from lemo.data import ExampleWindows, TokenWindows
from lemo.files import json_text, write_file
from lemo.models.enable import Handle
from lemo.models.layers.general import by_reason
from lemo.packing.blocks import block_tokens, kept_blocks
from lemo.relevance.store import ScoreStore
from lemo.settings.elimination import LemoConfig
from lemo.settings.finetune import FinetuneConfig
from lemo.training.run_folder import ELIMINATION_NAME

_log = logging.getLogger("lemo")


def say(lines: Iterable[str]) -> None:
    """Logs lines, such as those of a plan."""
    for line in lines:
        _log.info("%s", line)


def check_warmup(config: FinetuneConfig) -> None:
    """Warns where the run ends before the learning rate is the one of the settings."""
    if config.warmup_steps > config.steps:
        _log.warning(
            "warmup_steps: expected at most the steps of the run, %d, got %d; it ends before the "
            "learning rate of %g is reached",
            config.steps,
            config.warmup_steps,
            config.learning_rate,
        )


def say_what_is_kept(elimination: LemoConfig, answers: bool) -> None:
    """Logs what was left open and follows from the data.

    Args:
        elimination: the settings, none left open.
        answers: whether answers alone have labels.
    """
    size, least = elimination.block_size, answers and elimination.keep_tokens
    _log.info(
        "elimination: %s: keep %s of the blocks of %s%s%s, scorer %s",
        "answers alone have labels" if answers else "text, most tokens have labels",
        elimination.keep,
        size,
        " of a window" if isinstance(size, float) else " tokens",
        f", at least {elimination.keep_tokens} tokens of each prompt" if least else "",
        elimination.scorer,
    )


def check_examples(elimination: LemoConfig, windows: TokenWindows | ExampleWindows) -> None:
    """Names what settings, resolved ones, ask for in vain where most tokens have a label."""
    if isinstance(windows, ExampleWindows) and windows.with_answers:
        others = len(windows.examples) - windows.with_answers
        if others and elimination.finds_answers and elimination.scorer != "given":
            _log.info(
                "elimination: %d of %d examples have labels on more than half of their tokens; "
                "what is kept of them, labels included, is drawn at random in each step",
                others,
                len(windows.examples),
            )
        return
    finds = elimination.finds_answers and elimination.scorer != "given"
    vain = [f"scorer '{elimination.scorer}'"] if finds else []
    if elimination.keep_relevance is not None:
        vain.append(f"keep_relevance {elimination.keep_relevance:g}")
    if elimination.keep_tokens:
        vain.append(f"keep_tokens {elimination.keep_tokens}")
    if vain:
        _log.warning(
            "elimination: %s: of no use here, where most tokens have a label, so that no answer "
            "needs anything; blocks are chosen as without it",
            " and ".join(vain),
        )


def say_what_runs_otherwise(handle: Handle) -> None:
    """Names modules that are not computed by lemo, and products that are not in 8 bits."""
    for line in by_reason(handle.general_modules()):
        _log.info("runs as the module it is, not in lemo's code: %s", line)
    for line in by_reason(handle.unquantised_products()):
        _log.info("multiplies in the model's dtype, not in 8 bits: %s", line)


def write_elimination(folder: Path, elimination: LemoConfig) -> None:
    """Writes the settings that a run has, what was left open filled in, for its report."""
    write_file(folder / ELIMINATION_NAME, json_text(elimination.to_dict(), indent=2))


def check_blocks(length: int, block_size: int | float, elimination: LemoConfig) -> None:
    """Warns where blocks leave little to choose, or more is kept than is asked for.

    Args:
        length: tokens of a window.
        block_size: tokens of a block, or a share of the window.
        elimination: the settings, none left open.
    """
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
            kept = kept_blocks(keep, blocks) / blocks
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
    """Warns where blocks are shorter than those of stored scores.

    Args:
        length: tokens of a window.
        block_size: tokens of a block, or a share of the window.
        scores: they.
    """
    tokens = block_tokens(block_size, length)
    if tokens < scores.block_size:
        _log.warning(
            "elimination.block_size: blocks of %d tokens are shorter than the %d that the stored "
            "scores are of, so several of them have the same score",
            tokens,
            scores.block_size,
        )
