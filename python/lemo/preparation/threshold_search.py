"""The thresholds of all layers of a model: within the budget, and searched along its loss."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lemo.predictors.modules import KINDS
from lemo.predictors.storage import write_folder
from lemo.preparation.evaluation import elimination_loss
from lemo.preparation.thresholds import (
    LayerScores,
    SearchResult,
    mean_thresholds,
    search,
    thresholds_for_budget,
)
from lemo.preparation.windows import Window
from lemo.settings.elimination import LayerwiseConfig, LemoConfig
from lemo.settings.preparation import PredictorSettings

__all__ = ["add_thresholds", "eliminating_layers"]

Thresholds = dict[str, list[float]]


def eliminating_layers(num_layers: int, dense_layers: Sequence[int]) -> list[int]:
    """The layers that are not dense, ascending.

    Raises:
        ValueError: a dense layer that the model does not have.
    """
    for layer in dense_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"dense_layers: expected layers of a model with {num_layers}, got {layer}"
            )
    dense = {layer % num_layers for layer in dense_layers}
    return [layer for layer in range(num_layers) if layer not in dense]


def add_thresholds(
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    scores: dict[str, list[LayerScores]],
    model: nn.Module,
    held_out: Sequence[Window],
    settings: PredictorSettings,
    folder: Path,
    on_evaluation: Callable[[int, int, float | None], None],
) -> None:
    """Adds "thresholds" and "threshold_search" to a description.

    Args:
        description: of the predictors.
        tensors: of the predictors.
        scores: by kind, what the predictor of each layer gives held-out blocks.
        model: the model whose loss the search lowers.
        held_out: windows; the first of them are for the loss.
        settings: budget and extent of the search.
        folder: an empty folder; for the search it gets the predictors with their first thresholds.
        on_evaluation: called as on_evaluation(done, total, loss); the loss is None at the end.
    """
    counted = eliminating_layers(len(scores[KINDS[0]]), settings.dense_layers)

    def at(offsets: list[float]) -> Thresholds:
        return _within_budget(scores, settings.keep, counted, offsets)

    start = [0.0] * (len(KINDS) * len(counted))
    description["thresholds"] = at(start)
    result = SearchResult(start, [], 0)
    if settings.search_rounds and counted:
        write_folder(folder, tensors, description)
        # Two differences a threshold and at most four moves each round, and the start.
        total, done = 1 + settings.search_rounds * (2 * len(start) + 4), 0

        def evaluate(offsets: list[float]) -> float:
            nonlocal done
            config = _config(at(offsets), settings, folder)
            loss = elimination_loss(model, held_out[: settings.search_windows], config)
            done += 1
            on_evaluation(done, total, loss)
            return loss

        result = search(evaluate, start, settings.search_rounds)
        on_evaluation(total, total, None)
        description["thresholds"] = at(result.offsets)
    description["threshold_search"] = {
        "mean_scores": {kind: mean_thresholds(scores[kind]) for kind in KINDS},
        "kept_share": {
            kind: [s.kept_share(t) for s, t in zip(scores[kind], description["thresholds"][kind])]
            for kind in KINDS
        },
        "losses": result.losses,
        "evaluations": result.evaluations,
    }


def _within_budget(
    scores: dict[str, list[LayerScores]], keep: float, counted: list[int], offsets: list[float]
) -> Thresholds:
    """Thresholds that keep the share `keep`; offsets are for attention, then for the MLP."""
    thresholds = {}
    for index, kind in enumerate(KINDS):
        of_layer = [0.0] * len(scores[kind])
        for place, layer in enumerate(counted):
            of_layer[layer] = offsets[index * len(counted) + place]
        thresholds[kind] = thresholds_for_budget(scores[kind], keep, of_layer, counted or None)
    return thresholds


def _config(thresholds: Thresholds, settings: PredictorSettings, folder: Path) -> LemoConfig:
    return LemoConfig(
        block_size=settings.block_size,
        scorer="predictor",
        predictor=str(folder),
        keep_first=settings.keep_first,
        keep_last=settings.keep_last,
        # Every threshold is judged by the same tokens.
        mask_loss=False,
        layerwise=LayerwiseConfig(
            policy="threshold",
            thresholds=tuple(thresholds["attention"]),
            mlp_thresholds=tuple(thresholds["mlp"]),
            dense_layers=settings.dense_layers,
            select_at="all",
        ),
    )
