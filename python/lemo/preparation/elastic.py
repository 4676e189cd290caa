"""Elastic size: hidden units that are not needed are pruned while a predictor trains.

LeMo, section 4.2.
"""

import math

import torch
from torch import Tensor, nn

from lemo.predictors.modules import LowRankNet, Predictor
from lemo.predictors.relevance import RelevancePredictor

__all__ = ["ElasticSize"]

# Tokens whose hidden units are counted in one step: enough to see a unit that is active once in a
# hundred tokens.
_COUNTED_TOKENS = 1024


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
        predictor: Predictor | RelevancePredictor,
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
        """Prunes dead units and, where a target is set, those that cost least; restarts the count.

        A unit's cost is the change of the next layer's input that the remaining units cannot
        compensate; their weights are corrected for what they can.

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
    """Removes hidden units one by one, those first that change the next layer's input least.

    With the units' second moments G, the outgoing weights of unit u are distributed over the
    remaining units so that the next layer's input changes least; the mean square of the change is
    |w_u|^2 / inverse(G)_uu (Optimal Brain Surgeon, Hassibi and Stork, 1993, for the layer's input).

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
