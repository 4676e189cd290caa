"""Training of one predictor (LeMo, section 4.2)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import MlpPredictor, Predictor
from lemo.predictors.position import PositionProfile, contested_blocks
from lemo.preparation.elastic import ElasticSize
from lemo.preparation.exact_scores import SubBlockData
from lemo.preparation.ranking import Budget, ranking_loss
from lemo.settings.preparation import PredictorSettings

__all__ = ["FitResult", "fit", "schedule", "windows_of_steps"]

# The predictor of an MLP learns from tokens, which are many: it takes a step of the optimizer for
# so many of a window. Fewer, larger steps on blocks left its recall .1 lower after the same time.
_TOKENS_A_STEP = 2048

# Deviations of a token's score beyond which its error counts linearly: a few are far off.
_OUTLIER = 5.0

# Windows of a sub-block up to this size stay on the GPU while it trains: a step is shorter than
# their way there.
_RESIDENT_BYTES = 4 << 30


@dataclass(frozen=True)
class FitResult:
    """The result of training a predictor.

    Attributes:
        losses: the objective of every step.
        hidden_units: (before, after) elastic pruning, summed over nets and hidden layers.
    """

    losses: list[float]
    hidden_units: tuple[int, int]


def fit(
    predictor: Predictor,
    data: SubBlockData,
    profile: PositionProfile,
    settings: PredictorSettings,
    generator: torch.Generator,
    on_step: Callable[[float], None] = lambda loss: None,
) -> FitResult:
    """Trains one predictor to say what the content of a block adds to its profile.

    For attention the loss is a Huber regression of the standardised exact scores of blocks plus
    `rank_weight` times `ranking_loss` of the restored scores. The score of a block for the MLP is
    the mean of the scores of its tokens: there the loss is a regression of those, several steps of
    the optimizer for each step of the settings. Only the windows of one step are in memory in fp32.

    Args:
        predictor: module, fp32, on any device; trained in place, possibly shrunk.
        data: windows of one sub-block.
        profile: mean and deviation of the exact scores;
            `profile.restore(predictor(x, layout), layout)` are the predicted ones.
        settings: how it is trained.
        generator: order of the windows and tokens.
        on_step: called with the loss after every step.
    """
    device = predictor.key.down.device
    optimizer = torch.optim.AdamW(
        predictor.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    elastic = ElasticSize(
        predictor, optimizer, settings.prune_zero_share, _size_to_reach(predictor, settings)
    )
    windows, profile = _resident(data.x, device), profile.to(device)
    if data.token_scores:
        losses_of_step = _token_losses(predictor, data, profile, generator)
    else:
        losses_of_step = _block_losses(predictor, data, profile, settings)
    units, losses, prunings = elastic.hidden_units, [], settings.prunings
    chosen_windows = windows_of_steps(len(windows), settings.windows_per_step, generator)
    for step, chosen in zip(range(settings.steps), chosen_windows):
        x = torch.cat([windows[i].to(device) for i in chosen]).float()
        parts = []
        for done, loss in losses_of_step(chosen, x):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(step + done, settings.steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
            optimizer.step()
            parts.append(loss.detach())
        losses.append(torch.stack(parts).mean().item())
        on_step(losses[-1])
        elastic.count(x)
        if step + 1 in prunings:
            elastic.prune((prunings.index(step + 1) + 1) / len(prunings))
    return FitResult(losses, (units, elastic.hidden_units))


def _size_to_reach(predictor: Predictor, settings: PredictorSettings) -> float | None:
    """Share of the hidden units to shrink to; None: only dead units go."""
    if isinstance(predictor, MlpPredictor) and settings.prune_mlp_to is not None:
        return settings.prune_mlp_to
    return settings.prune_to


def windows_of_steps(count: int, per_step: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Indices of the windows of each step: every window once, in random order, then again."""
    order: list[int] = []
    while True:
        while len(order) < per_step:
            order += torch.randperm(count, generator=generator, device="cpu").tolist()
        yield order[:per_step]
        order = order[per_step:]


# (share of the step that is done, loss) for windows and their tokens.
Losses = Callable[[list[int], Tensor], Iterator[tuple[float, Tensor]]]


def _block_losses(
    predictor: Predictor,
    data: SubBlockData,
    profile: PositionProfile,
    settings: PredictorSettings,
) -> Losses:
    """One loss for each step, of the blocks of its windows."""
    device, budget = predictor.key.down.device, Budget.of(settings)
    unit = profile.deviation.mean()

    def losses(chosen: list[int], x: Tensor) -> Iterator[tuple[float, Tensor]]:
        exact = torch.cat([data.scores[i] for i in chosen]).to(device)
        seqlens = [n for i in chosen for n in data.layouts[i].seqlens]
        layout = BlockLayout.from_seqlens(seqlens, data.layouts[chosen[0]].block_size, device)
        free = contested_blocks(layout, settings.keep_first, settings.keep_last)
        content, target = predictor(x, layout), profile.standardise(exact, layout)
        regression = functional.smooth_l1_loss(content[free], target[free])
        predicted = profile.restore(content, layout)
        ranking = ranking_loss(predicted / unit, exact / unit, layout, budget)
        yield 0.0, regression + settings.rank_weight * ranking

    return losses


def _token_losses(
    predictor: Predictor,
    data: SubBlockData,
    profile: PositionProfile,
    generator: torch.Generator,
) -> Losses:
    """Several losses for each step, of some of the tokens of its windows each."""
    device = predictor.key.down.device
    # The same in all places, see PositionProfile.
    mean, deviation = profile.mean[0], profile.deviation[0]
    spread = torch.cat(data.token_scores).std(unbiased=False).to(device).maximum(deviation)
    layouts: dict[int, BlockLayout] = {}

    def losses(chosen: list[int], x: Tensor) -> Iterator[tuple[float, Tensor]]:
        exact = torch.cat([data.token_scores[i] for i in chosen]).to(device)
        target = (exact - mean) / spread
        order = torch.randperm(x.shape[0], generator=generator, device="cpu").to(device)
        parts = order.split(_TOKENS_A_STEP)
        for number, rows in enumerate(parts):
            tokens = rows.numel()
            if tokens not in layouts:
                layouts[tokens] = BlockLayout.from_seqlens([tokens], 1, device)
            guess = predictor(x[rows], layouts[tokens]) * (deviation / spread)
            yield number / len(parts), functional.huber_loss(guess, target[rows], delta=_OUTLIER)

    return losses


def _resident(windows: list[Tensor], device: torch.device) -> list[Tensor]:
    """The windows on a GPU that has room for them; otherwise where they are, mapped from disk."""
    size = sum(window.numel() * window.element_size() for window in windows)
    if device.type != "cuda" or size > _RESIDENT_BYTES:
        return windows
    return [window.to(device) for window in windows]


def schedule(step: float, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return min((step + 1) / warmup, 1.0)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
