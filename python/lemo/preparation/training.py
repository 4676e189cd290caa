"""Training of one predictor: objective and elastic size (LeMo, section 4.2)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import AttentionPredictor, LowRankNet, MlpPredictor
from lemo.predictors.position import PositionProfile, free_blocks
from lemo.preparation.exact_scores import SubBlockData
from lemo.settings.preparation import PredictorSettings

__all__ = ["ElasticSize", "FitResult", "fit", "kept_set_recall", "ranking_loss"]

Predictor = AttentionPredictor | MlpPredictor

# Pairs of the ranking loss take this many blocks from each side of the boundary at most, so that a
# window of a million tokens (16384 blocks) costs no more than 2^18 pairs.
_MAX_BLOCKS_A_SIDE = 512

# Tokens whose hidden units are counted in one step: enough to see a unit that is active once in a
# hundred tokens.
_COUNTED_TOKENS = 1024

# The predictor of an MLP learns from tokens, which are many: it takes a step of the optimizer for
# so many of a window. Fewer, larger steps on blocks left its recall .1 lower after the same time.
_TOKENS_A_STEP = 2048

# Deviations of a token's label beyond which its error counts linearly: a few are far off.
_OUTLIER = 5.0

# Windows of a sub-block up to this size stay on the GPU while it trains: a step is shorter than
# their way there.
_RESIDENT_BYTES = 4 << 30


@dataclass(frozen=True)
class FitResult:
    """What became of a predictor.

    Attributes:
        losses: the objective of every step.
        hidden_units: (before, after) elastic pruning, summed over nets and hidden layers.
    """

    losses: list[float]
    hidden_units: tuple[int, int]


def _candidates(blocks: int, keep: float, keep_first: int, keep_last: int) -> tuple[slice, int]:
    """Blocks of a sequence up for selection, and how many of them the ratio policy keeps."""
    chosen = slice(keep_first, max(blocks - keep_last, keep_first))
    free = max(blocks - keep_first - keep_last, 0)
    budget = math.ceil(keep * blocks - 1e-9) - (blocks - free)
    return chosen, min(max(budget, 0), free)


def _sequences(values: Tensor, layout: BlockLayout) -> list[Tensor]:
    return list(values.split(layout.cu_blocks.diff().tolist()))


def kept_set_recall(
    predicted: Tensor,
    labels: Tensor,
    layout: BlockLayout,
    keep: float,
    keep_first: int = 1,
    keep_last: int = 1,
) -> list[float]:
    """Share of the blocks kept by the labels that the prediction keeps too, at the same budget.

    Blocks that are kept in any case do not count. A sequence whose budget leaves nothing to choose
    gives no entry.

    Args:
        predicted, labels: [B] scores of the same blocks.
        layout: the layout of these blocks.
        keep: share of a sequence's blocks that is kept, forced ones included.
        keep_first, keep_last: blocks kept in any case.

    Returns:
        one recall in [0, 1] for each sequence that has a choice.
    """
    recalls = []
    for guess, truth in zip(_sequences(predicted, layout), _sequences(labels, layout)):
        free, count = _candidates(guess.numel(), keep, keep_first, keep_last)
        guess, truth = guess[free], truth[free]
        if not 0 < count < guess.numel():
            continue
        order = [torch.argsort(v, descending=True, stable=True)[:count] for v in (guess, truth)]
        recalls.append(torch.isin(order[0], order[1]).float().mean().item())
    return recalls


def ranking_loss(
    predicted: Tensor,
    labels: Tensor,
    layout: BlockLayout,
    keep: float,
    keep_first: int = 1,
    keep_last: int = 1,
) -> Tensor:
    """Logistic loss over pairs of a kept and a dropped block, weighted towards the boundary.

    A pair far on both sides is right anyway or says nothing about the kept set; what decides it are
    blocks whose labels are near the cut. A block's weight falls off as exp(-distance), distance in
    ranks from the cut, in units of a quarter of the sequence's candidates; a pair's weight is the
    product.

    Args:
        predicted: [B] scores in units of the labels' standard deviation.
        labels, layout, keep, keep_first, keep_last: as for `kept_set_recall`.

    Returns:
        mean over sequences, a scalar; 0 where no sequence has a choice.
    """
    losses = []
    for guess, truth in zip(_sequences(predicted, layout), _sequences(labels, layout)):
        free, count = _candidates(guess.numel(), keep, keep_first, keep_last)
        guess, truth = guess[free], truth[free]
        if not 0 < count < guess.numel():
            continue
        order = torch.argsort(truth, descending=True, stable=True)
        kept = guess[order[max(count - _MAX_BLOCKS_A_SIDE, 0) : count]].flip(0)
        dropped = guess[order[count : count + _MAX_BLOCKS_A_SIDE]]
        decay = 4.0 / guess.numel()
        near_kept = torch.exp(-decay * torch.arange(kept.numel(), device=guess.device))
        near_dropped = torch.exp(-decay * torch.arange(dropped.numel(), device=guess.device))
        weight = near_kept[:, None] * near_dropped[None, :]
        wrong = functional.softplus(-(kept[:, None] - dropped[None, :]))
        losses.append((weight * wrong).sum() / weight.sum())
    return torch.stack(losses).mean() if losses else predicted.sum() * 0.0


class ElasticSize:
    """Counts how often hidden units are zero, and prunes a predictor and its optimizer together.

    Args:
        predictor: the module; its parameters are replaced by smaller ones in `prune`.
        optimizer: the AdamW that holds exactly these parameters; its state and its parameter list
            follow.
        zero_share: a unit that is zero for at least this share of the counted tokens is pruned.
        target: share of the initial hidden units of each hidden layer to shrink to, or None.
    """

    def __init__(
        self,
        predictor: Predictor,
        optimizer: torch.optim.Optimizer,
        zero_share: float,
        target: float | None,
    ):
        self.predictor = predictor
        self.optimizer = optimizer
        self.zero_share = zero_share
        self.target = target
        self._initial = {name: self._sizes(net) for name, net in predictor.nets()}
        self._reset()

    @property
    def hidden_units(self) -> int:
        """Hidden units that are left, over nets and hidden layers."""
        return sum(sum(self._sizes(net)) for _, net in self.predictor.nets())

    @torch.no_grad()
    def count(self, x: Tensor) -> None:
        """Adds the activity of the hidden units on an even sample of the tokens `x` [T, H]."""
        x = x[:: max(x.shape[0] // _COUNTED_TOKENS, 1)].float()
        self._tokens += x.shape[0]
        for name, net in self.predictor.nets():
            for layer, hidden in enumerate(net.hidden(x)):
                self._zeros[name][layer] += (hidden == 0).sum(0)
                self._products[name][layer] += hidden.T @ hidden

    @torch.no_grad()
    def prune(self, progress: float) -> int:
        """Prunes dead units and, where a target is set, the least missed ones; restarts the count.

        What the next layer loses with a unit is what the others cannot make up for; they take over
        the rest.

        Args:
            progress: share of the pruning schedule that is over, in [0, 1]; at 1 the target is
                reached.

        Returns:
            units pruned.
        """
        before = self.hidden_units
        for name, net in self.predictor.nets():
            keep = []
            for layer, outgoing in enumerate((net.mid, net.up)):
                limit = self._initial[name][layer]
                if self.target is not None:
                    limit = math.ceil(limit * (1 - progress * (1 - self.target)))
                dead = self._zeros[name][layer] >= self.zero_share * self._tokens
                keep.append(_surgery(outgoing, self._products[name][layer], dead, limit))
            first, second = keep
            self._replace(net, "down", first, slice(None))
            self._replace(net, "mid", second, first)
            self._replace(net, "up", slice(None), second)
        self._reset()
        return before - self.hidden_units

    def _replace(
        self, net: LowRankNet, name: str, rows: Tensor | slice, columns: Tensor | slice
    ) -> None:
        """Cuts one parameter down in the module, in the optimizer's groups and in its state."""
        old = getattr(net, name)
        new = nn.Parameter(old[rows][:, columns].clone())
        setattr(net, name, new)
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        state = self.optimizer.state.pop(old, {})
        self.optimizer.state[new] = {
            key: entry[rows][:, columns].clone() if getattr(entry, "ndim", 0) == 2 else entry
            for key, entry in state.items()
        }

    def _reset(self) -> None:
        self._tokens = 0
        self._zeros: dict[str, list[Tensor]] = {}
        self._products: dict[str, list[Tensor]] = {}
        for name, net in self.predictor.nets():
            sizes, device = self._sizes(net), net.down.device
            self._zeros[name] = [torch.zeros(size, device=device) for size in sizes]
            self._products[name] = [torch.zeros(size, size, device=device) for size in sizes]

    @staticmethod
    def _sizes(net: LowRankNet) -> tuple[int, int]:
        return net.down.shape[0], net.mid.shape[0]


def _surgery(outgoing: Tensor, products: Tensor, dead: Tensor, limit: int) -> Tensor:
    """Removes hidden units one by one, the least missed first, and lets the others take over.

    With the units' second moments G, the outgoing weights of unit u are distributed over the others
    so that the next layer's input changes least; the mean square of the change is |w_u|^2 /
    inverse(G)_uu (Optimal Brain Surgeon, Hassibi and Stork, 1993, for the layer's input).

    Args:
        outgoing: [N, R] weights of the next layer; adjusted in place. Those of removed units become
            0.
        products: [R, R] sums of products of the units' activations.
        dead: [R] bool, units to remove in any case.
        limit: units to keep at most.

    Returns:
        [K] int64, ascending: the units that are left, at least one, since a net without is none.
    """
    weights, moments = outgoing.double().cpu(), products.to("cpu", torch.float64, copy=True)
    # Units that are always 0, or always the same, must not make the inverse explode.
    damping = 1e-4 * moments.diagonal().mean().clamp(min=1e-12)
    moments.diagonal().add_(damping)
    inverse, dead = torch.linalg.inv(moments), dead.cpu()
    left = torch.ones_like(dead)
    while left.sum() > 1 and (left.sum() > limit or (left & dead).any()):
        loss = weights.square().sum(0) / inverse.diagonal()
        candidates = left & dead if (left & dead).any() else left
        unit = loss.masked_fill(~candidates, math.inf).argmin()
        share = inverse[unit] / inverse[unit, unit]
        weights -= weights[:, unit, None] * share
        inverse -= inverse[:, unit, None] * share
        left[unit] = False
    outgoing.copy_(weights.masked_fill(~left, 0.0))
    return left.nonzero()[:, 0].to(outgoing.device)


def fit(
    predictor: Predictor,
    data: SubBlockData,
    profile: PositionProfile,
    settings: PredictorSettings,
    generator: torch.Generator,
    on_step: Callable[[float], None] = lambda loss: None,
) -> FitResult:
    """Trains one predictor to say what the content of a block adds to its profile.

    For attention the loss is a Huber regression of the standardised labels of blocks plus
    `rank_weight` times `ranking_loss` of the restored scores. The label of a block for the MLP is
    the mean of labels of its tokens: there the loss is a regression of those, several steps of the
    optimizer for each step of the settings. Only the windows of one step are in memory in fp32.

    Args:
        predictor: module, fp32, on any device; trained in place, possibly shrunk.
        data: windows of one sub-block.
        profile: mean and deviation of the labels; `profile.restore(predictor(x, layout), layout)`
            are the scores.
        settings: see `PredictorSettings`.
        generator: order of the windows and tokens.
        on_step: called with the loss after every step.
    """
    device = predictor.key.down.device
    optimizer = torch.optim.AdamW(
        predictor.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    target = settings.prune_to
    if isinstance(predictor, MlpPredictor) and settings.prune_mlp_to is not None:
        target = settings.prune_mlp_to
    elastic = ElasticSize(predictor, optimizer, settings.prune_zero_share, target)
    units, losses = elastic.hidden_units, []
    prunings = settings.prunings
    windows, profile = _resident(data.x, device), profile.to(device)
    if data.token_labels:
        losses_of_step = _token_losses(predictor, data, profile, generator)
    else:
        losses_of_step = _block_losses(predictor, data, profile, settings)
    order: list[int] = []
    for step in range(settings.steps):
        while len(order) < settings.windows_per_step:
            order += torch.randperm(len(data.x), generator=generator, device="cpu").tolist()
        chosen, order = order[: settings.windows_per_step], order[settings.windows_per_step :]
        x = torch.cat([windows[i].to(device) for i in chosen]).float()
        parts = []
        for done, loss in losses_of_step(chosen, x):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(step + done, settings.steps)
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


# (share of the step that is done, loss) for windows and their tokens.
Losses = Callable[[list[int], Tensor], Iterator[tuple[float, Tensor]]]


def _block_losses(
    predictor: Predictor,
    data: SubBlockData,
    profile: PositionProfile,
    settings: PredictorSettings,
) -> Losses:
    device = predictor.key.down.device
    unit = profile.deviation.mean()

    def losses(chosen: list[int], x: Tensor) -> Iterator[tuple[float, Tensor]]:
        labels = torch.cat([data.labels[i] for i in chosen]).to(device)
        layout = BlockLayout.from_seqlens(
            [n for i in chosen for n in data.layouts[i].seqlens],
            data.layouts[chosen[0]].block_size,
            device,
        )
        free = free_blocks(layout, settings.keep_first, settings.keep_last)
        content, target = predictor(x, layout), profile.standardise(labels, layout)
        loss = functional.smooth_l1_loss(content[free], target[free])
        yield (
            0.0,
            loss
            + settings.rank_weight
            * ranking_loss(
                profile.restore(content, layout) / unit,
                labels / unit,
                layout,
                settings.keep,
                settings.keep_first,
                settings.keep_last,
            ),
        )

    return losses


def _token_losses(
    predictor: Predictor,
    data: SubBlockData,
    profile: PositionProfile,
    generator: torch.Generator,
) -> Losses:
    device = predictor.key.down.device
    # The same in all places, see PositionProfile.
    mean, deviation = profile.mean[0], profile.deviation[0]
    spread = torch.cat(data.token_labels).std(unbiased=False).to(device).maximum(deviation)
    layouts: dict[int, BlockLayout] = {}

    def losses(chosen: list[int], x: Tensor) -> Iterator[tuple[float, Tensor]]:
        labels = torch.cat([data.token_labels[i] for i in chosen]).to(device)
        target = (labels - mean) / spread
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


def _schedule(step: float, steps: int) -> float:
    warmup = max(steps // 20, 1)
    if step < warmup:
        return min((step + 1) / warmup, 1.0)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
