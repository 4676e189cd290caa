"""One predictor: its profile, its training, and how well it ranks held-out blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import Predictor, default_rank, make_predictor
from lemo.predictors.position import PositionProfile, contested_blocks, query_blocks
from lemo.predictors.storage import tensors_of
from lemo.preparation.exact_scores import SubBlockData
from lemo.preparation.ranking import Budget, kept_set_recall
from lemo.preparation.thresholds import LayerScores
from lemo.preparation.training import fit
from lemo.settings.preparation import PredictorSettings

__all__ = ["TrainedPredictor", "train_predictor"]


@dataclass(frozen=True)
class TrainedPredictor:
    """A predictor as it is stored.

    Attributes:
        tensors: by their stored names.
        figures: its sizes and its recall, for predictor.json.
        held_out_scores: what it predicts for the held-out windows.
    """

    tensors: dict[str, Tensor]
    figures: dict[str, Any]
    held_out_scores: LayerScores


def train_predictor(
    layer: int,
    kind: str,
    training: SubBlockData,
    held_out: SubBlockData,
    groups: Sequence[str],
    settings: PredictorSettings,
    generator: torch.Generator,
    device: torch.device,
    on_step: Callable[[float], None] = lambda loss: None,
) -> TrainedPredictor:
    """Trains the predictor of a sub-block and tests it.

    Args:
        layer, kind: the sub-block.
        training, held_out: its inputs and exact scores.
        groups: for each held-out window, the group by which recall is reported.
        settings: how it is trained.
        generator: of the initial weights and the order of windows.
        device: where it is trained.
        on_step: called with the loss after every step.
    """
    profile = _fit_profile(training, settings, flat=kind == "mlp")
    if settings.target == "content":
        training, held_out = (_standardised(data, profile) for data in (training, held_out))
        profile = _fit_profile(training, settings, flat=True)
    hidden_size = training.x[0].shape[1]
    rank = settings.rank or default_rank(hidden_size)
    predictor = make_predictor(kind, hidden_size, rank, generator).to(device)
    result = fit(predictor, training, profile, settings, generator, on_step)
    tensors = tensors_of(layer, kind, predictor, profile)
    predicted = _predict(predictor, profile, held_out, device)
    figures = {
        "parameters": sum(p.numel() for p in predictor.parameters()),
        "hidden_units": {
            name: [net.down.shape[0], net.mid.shape[0]] for name, net in predictor.nets()
        },
        "hidden_units_before_pruning": result.hidden_units[0],
        **_recalls(predicted, profile, held_out, groups, Budget.of(settings)),
    }
    return TrainedPredictor(tensors, figures, _layer_scores(predicted, held_out, settings))


def _fit_profile(data: SubBlockData, settings: PredictorSettings, flat: bool) -> PositionProfile:
    free = [
        contested_blocks(layout, settings.keep_first, settings.keep_last) for layout in data.layouts
    ]
    return PositionProfile.fit(
        torch.cat([scores[chosen] for scores, chosen in zip(data.scores, free)]),
        torch.cat([query_blocks(layout)[chosen] for layout, chosen in zip(data.layouts, free)]),
        flat,
    )


def _standardised(data: SubBlockData, profile: PositionProfile) -> SubBlockData:
    """The data with scores of what the content adds to the place."""

    def all_of(scores: list[Tensor], layouts: list[BlockLayout]) -> list[Tensor]:
        return [profile.standardise(values, layout) for values, layout in zip(scores, layouts)]

    # Of an MLP the profile is the same in all places.
    tokens = [BlockLayout.from_seqlens(layout.seqlens, 1, "cpu") for layout in data.layouts]
    return SubBlockData(
        data.x,
        all_of(data.scores, data.layouts),
        data.layouts,
        all_of(data.token_scores, tokens),
    )


@torch.no_grad()
def _predict(
    predictor: Predictor, profile: PositionProfile, data: SubBlockData, device: torch.device
) -> list[Tensor]:
    """Scores [B] of each window, on the CPU; the predictor's weights are rounded to bf16."""
    # What is measured is what is stored.
    for parameter in predictor.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    predicted = []
    for x, layout in zip(data.x, data.layouts):
        there = BlockLayout.from_seqlens(layout.seqlens, layout.block_size, device)
        content = predictor(x.to(device, torch.float32), there)
        predicted.append(profile.restore(content.cpu(), layout))
    return predicted


def _recalls(
    predicted: list[Tensor],
    profile: PositionProfile,
    data: SubBlockData,
    groups: Sequence[str],
    budget: Budget,
) -> dict[str, Any]:
    """Mean recall over windows: of all, of each group, and of what the place alone predicts."""
    of_window = _window_recalls(predicted, data, budget)
    place_alone = [
        profile.restore(torch.zeros(layout.num_blocks, device="cpu"), layout)
        for layout in data.layouts
    ]
    return {
        "recall": _mean(of_window),
        "recall_by_kind": {
            group: _mean([recalls for recalls, g in zip(of_window, groups) if g == group])
            for group in sorted(set(groups))
        },
        "recall_of_place_alone": _mean(_window_recalls(place_alone, data, budget)),
    }


def _window_recalls(
    predicted: list[Tensor], data: SubBlockData, budget: Budget
) -> list[list[float]]:
    return [
        kept_set_recall(guess, exact, layout, budget)
        for guess, exact, layout in zip(predicted, data.scores, data.layouts)
    ]


def _mean(of_window: list[list[float]]) -> float:
    recalls = [recall for recalls in of_window for recall in recalls]
    # Without a choice (everything or nothing beyond the fixed blocks is kept) the sets agree.
    return sum(recalls) / len(recalls) if recalls else 1.0


def _layer_scores(
    predicted: list[Tensor], data: SubBlockData, settings: PredictorSettings
) -> LayerScores:
    free = torch.cat(
        [
            scores[contested_blocks(layout, settings.keep_first, settings.keep_last)]
            for scores, layout in zip(predicted, data.layouts)
        ]
    )
    return LayerScores(free, sum(scores.numel() for scores in predicted) - free.numel())
