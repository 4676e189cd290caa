"""Shorter windows: some blocks of a window in their old positions, for a model without lemo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemo import ops
from lemo.packing.blocks import block_tokens, kept_blocks
from lemo.relevance.answers import Answers

__all__ = ["Chunks", "targets_of"]


def targets_of(labels: Tensor) -> Tensor:
    """What each row [B, S] predicts: labels, shifted."""
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    return targets


class Chosen(NamedTuple):
    """Blocks of a window.

    Attributes:
        kept: all of them, ascending.
        random: those of them that were drawn.
        stands_for: of how many blocks each of these is one: itself, and left-out ones.
    """

    kept: list[int]
    random: set[int]
    stands_for: float


class Chunks:
    """Takes the last block, those with labels, and others up to a share.

    Args:
        settings: {"keep", "block_size"}; "words": the share of the others that are chosen by the
            words that they share with answers (0; the rest is random); "weights": whether a key in
            a random block counts as often in the softmax as there are blocks that the block stands
            for, but for queries of its own block. Of queries outside of random blocks the sum over
            all keys is then estimated without a bias.
        seed: of the random blocks.
    """

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        self._settings = {"words": 0.0, "weights": False, **settings}
        self._generator = torch.Generator().manual_seed(seed)
        self.kept: list[list[int]] = []

    def block_size(self, tokens: int) -> int:
        """Tokens of a block of a window of so many."""
        return block_tokens(self._settings["block_size"], tokens)

    def of(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The rows of windows [B, S]: {"ids", "targets", "positions"} [B, K], and with weights
        "blocks" and "bias" [B, K]: the block of a key, and the logarithm of what the key counts."""
        size, targets = self.block_size(ids.shape[1]), targets_of(labels)
        chosen = [self._choose(*window, size) for window in zip(ids, targets)]
        self.kept = [each.kept for each in chosen]
        places = [
            torch.cat([torch.arange(ids.shape[1])[x * size : (x + 1) * size] for x in each.kept])
            for each in chosen
        ]
        rows = torch.stack(places)
        result = {
            "ids": ids.gather(1, rows),
            "targets": targets.gather(1, rows),
            "positions": rows,
        }
        if self._settings["weights"]:
            counts = torch.ones(len(chosen), math.ceil(ids.shape[1] / size))
            for row, each in zip(counts, chosen):
                row[list(each.random)] = each.stands_for
            result["blocks"] = rows // size
            result["bias"] = counts.log().gather(1, result["blocks"])
        return result

    def _choose(self, ids: Tensor, targets: Tensor, size: int) -> Chosen:
        count = math.ceil(len(ids) / size)
        labelled = targets != -100
        always = {count - 1, *(labelled.nonzero()[:, 0] // size).tolist()}
        free = max(kept_blocks(self._settings["keep"], count) - len(always), 0)
        by_words: list[int] = []
        answers = Answers.of(labelled) if self._settings["words"] else None
        if answers is not None:
            scores = ops.word_relevance(ids, answers.firsts, answers.ends, size).amax(0)
            order = scores.argsort(descending=True, stable=True).tolist()
            by_words = [block for block in order if block not in always]
            by_words = by_words[: round(self._settings["words"] * free)]
        taken = always.union(by_words)
        order = torch.randperm(count, generator=self._generator).tolist()
        others = [block for block in order if block not in taken]
        random = others[: free - len(by_words)]
        stands_for = len(others) / len(random) if random else 1.0
        return Chosen(sorted([*taken, *random]), set(random), stands_for)

    @staticmethod
    def mask(bias: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 1, K, K], added to logits: later rows are not seen, keys count as `bias` [B, K] says,
        and those of the query's own block once."""
        batch, rows = bias.shape
        mask = torch.empty(batch, 1, rows, rows, dtype=dtype, device=bias.device)
        later = torch.ones(rows, rows, dtype=torch.bool, device=bias.device).triu(1)
        for window, of_keys, block in zip(mask[:, 0], bias, blocks):
            window.copy_(of_keys.expand(rows, rows))
            window.masked_fill_(block[:, None] == block, 0.0).masked_fill_(later, -torch.inf)
        return mask
