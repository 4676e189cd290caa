"""Thresholds of the layers: under a budget, moved along the loss (LeMo, Algorithm 1).

A threshold is `mean + deviation * (z + offset)` of the layer's predicted scores. The paper's start
is z = 0 and offset 0, the mean block score. A budget fixes the one z of all layers, so that they
keep the wanted share on average: a layer whose scores have a long upper tail then keeps fewer
blocks than one with a long lower tail. The search moves the offsets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LayerScores", "SearchResult", "mean_thresholds", "search", "thresholds_for_budget"]

# A move that does not lower the loss is halved this often before the search stops.
_HALVINGS = 3


@dataclass(frozen=True)
class LayerScores:
    """Predicted scores of one layer over a profiling run.

    Attributes:
        free: [n] fp32, scores of the blocks that are up for selection.
        fixed: number of blocks that are kept in any case.
    """

    free: Tensor
    fixed: int

    def __post_init__(self) -> None:
        if self.free.numel() == 0 or not torch.isfinite(self.free).all():
            raise ValueError(
                "scores: expected at least one block up for selection and finite scores, got "
                f"{self.free.numel()} blocks; give longer documents or smaller blocks"
            )

    @property
    def mean(self) -> float:
        return self.free.double().mean().item()

    @property
    def deviation(self) -> float:
        """Standard deviation, 1 where all scores are equal."""
        return self.free.double().std(unbiased=False).item() or 1.0

    def kept_share(self, threshold: float) -> float:
        """Share of all blocks, fixed ones included, that `score >= threshold` keeps."""
        kept = int((self.free >= threshold).sum()) + self.fixed
        return kept / (self.free.numel() + self.fixed)


def mean_thresholds(layers: Sequence[LayerScores]) -> list[float]:
    """The mean block score of every layer: where Algorithm 1 of the paper starts."""
    return [layer.mean for layer in layers]


def thresholds_for_budget(
    layers: Sequence[LayerScores],
    keep: float,
    offsets: Sequence[float] | None = None,
    counted: Sequence[int] | None = None,
) -> list[float]:
    """Thresholds that keep the share `keep` on average; each layer's share follows its scores.

    Args:
        layers: scores of all layers, over the same blocks.
        keep: share of all blocks in [0, 1], fixed ones included.
        offsets: for each layer, in deviations of its scores; a higher one leaves the layer fewer
            blocks.
        counted: layers over which the average is taken (those that eliminate); None: all.

    Returns:
        One threshold for each layer; the average share is exact to one block, ties of scores aside.

    Raises:
        ValueError: `keep` is no share.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: expected a share in [0, 1], got {keep!r}")
    offsets = [0.0] * len(layers) if offsets is None else list(offsets)
    counted = range(len(layers)) if counted is None else counted
    pooled = torch.cat(
        [
            (layers[i].free.double() - layers[i].mean) / layers[i].deviation - offsets[i]
            for i in counted
        ]
    )
    fixed = sum(layers[i].fixed for i in counted)
    budget = round(keep * (pooled.numel() + fixed)) - fixed
    z = _cut(pooled.sort(descending=True).values, min(max(budget, 0), pooled.numel()))
    return [layer.mean + layer.deviation * (z + o) for layer, o in zip(layers, offsets)]


def _cut(descending: Tensor, count: int) -> float:
    """A value that exactly `count` entries reach, halfway between two: rounding moves none."""
    if count == 0:
        return descending[0].item() + 1.0
    if count == descending.numel():
        return descending[-1].item() - 1.0
    return (descending[count - 1].item() + descending[count].item()) / 2


@dataclass(frozen=True)
class SearchResult:
    """Where the search ended.

    Attributes:
        offsets: the best ones.
        losses: of the start and after every accepted move; never rises.
        evaluations: how often the loss was evaluated.
    """

    offsets: list[float]
    losses: list[float]
    evaluations: int


def search(
    evaluate: Callable[[list[float]], float],
    start: Sequence[float],
    rounds: int,
    step: float = 0.25,
    rate: float = 0.5,
) -> SearchResult:
    """Algorithm 1 of the paper: moves thresholds against central differences of the loss.

    The loss is piecewise constant in the thresholds, so slopes are measured over finite steps. A
    round measures every slope over `2 * step`, moves all offsets together with the steepest moving
    by `rate`, and keeps the move only if the loss falls; otherwise the move is halved, and a round
    without success ends the search.

    Args:
        evaluate: loss at these offsets (in deviations of each layer's scores); deterministic.
        start: offsets to start from.
        rounds: rounds at most; each costs two evaluations a threshold and a few for the move.
        step: half the width of the finite difference, in deviations.
        rate: move of the steepest threshold, in deviations.

    Raises:
        ValueError: the loss is not finite.
    """
    evaluations = 0

    def loss_at(offsets: list[float]) -> float:
        nonlocal evaluations
        evaluations += 1
        loss = float(evaluate(offsets))
        if not math.isfinite(loss):
            raise ValueError(f"evaluate: expected a finite loss, got {loss} at offsets {offsets}")
        return loss

    def moved(offsets: list[float], index: int, by: float) -> list[float]:
        return [o + by if i == index else o for i, o in enumerate(offsets)]

    offsets = [float(o) for o in start]
    losses = [loss_at(offsets)]
    for _ in range(rounds):
        slopes = [
            (loss_at(moved(offsets, i, step)) - loss_at(moved(offsets, i, -step))) / (2 * step)
            for i in range(len(offsets))
        ]
        steepest = max((abs(slope) for slope in slopes), default=0.0)
        if steepest == 0.0:
            break
        for halving in range(_HALVINGS + 1):
            scale = rate / steepest / 2**halving
            candidate = [o - scale * slope for o, slope in zip(offsets, slopes)]
            loss = loss_at(candidate)
            if loss < losses[-1]:
                offsets = candidate
                losses.append(loss)
                break
        else:
            break
    return SearchResult(offsets, losses, evaluations)
