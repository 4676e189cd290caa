"""The predictors of block scores: low-rank linear maps with ReLU between them (LeMo, section 4.2).

A predictor reads the input of its sub-block, the normalised residual, and gives each block a score,
before any query, key or activation is computed. Both modules compute through `lemo.ops.predictor`:
the operator that runs in fine-tuning is the operator that is trained.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lemo.ops import predictor
from lemo.packing.blocks import BlockLayout

__all__ = [
    "KINDS",
    "AttentionPredictor",
    "LowRankNet",
    "MlpPredictor",
    "Predictor",
    "default_rank",
    "make_predictor",
]

# The sub-blocks of a layer, in their order.
KINDS = ("attention", "mlp")

# The last map starts small, so that training starts from "the content says nothing" and not from
# noise that it has to unlearn; on a 14-layer model this raised the recall of the attention's
# content from .65 to .73 in layer 8 and from .66 to .67 in layer 12 (docs/LOG.md, 2026-11-24).
_UP_SCALE = 0.1


def default_rank(hidden_size: int) -> int:
    """A sixteenth of the hidden size: all predictors of a usual model take 1 to 2% of its bytes."""
    return max(8, hidden_size // 16)


class LowRankNet(nn.Module):
    """`up(relu(mid(relu(down(x)))))`, without biases; weights have the shape of `nn.Linear.weight`.

    Args:
        inputs: features of a token (the hidden size of the model).
        rank: hidden units of both hidden layers; elastic pruning shrinks them separately.
        outputs: features of the result.
        generator: source of the initial weights.
    """

    def __init__(self, inputs: int, rank: int, outputs: int, generator: torch.Generator):
        super().__init__()
        self.down = _initial(rank, inputs, generator)
        self.mid = _initial(rank, rank, generator)
        self.up = _initial(outputs, rank, generator, scale=_UP_SCALE)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """(down [R1, inputs], mid [R2, R1], up [outputs, R2])."""
        return self.down, self.mid, self.up

    @torch.no_grad()
    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations of the two hidden layers for tokens `x` [T, inputs]: ([T, R1], [T, R2])."""
        first = torch.relu(x.to(self.down.dtype) @ self.down.T)
        return first, torch.relu(first @ self.mid.T)


class AttentionPredictor(nn.Module):
    """Key and query nets; `score[n]` is `k_n . mean of q_m` over the query blocks `m >= n`."""

    def __init__(self, hidden_size: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.key = LowRankNet(hidden_size, rank, rank, generator)
        self.query = LowRankNet(hidden_size, rank, rank, generator)

    def forward(self, x: Tensor, layout: BlockLayout) -> Tensor:
        """Scores [B], fp32, of the blocks of `x` [T, hidden_size]; no gradient for `x`."""
        return predictor(x, self.key.weights, self.query.weights, layout)

    def nets(self) -> Iterator[tuple[str, LowRankNet]]:
        """(name, net) of every net, in the order of the stored tensors."""
        yield "key", self.key
        yield "query", self.query


class MlpPredictor(nn.Module):
    """One net with a scalar output; `score[n]` is its mean over the tokens of block n."""

    def __init__(self, hidden_size: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.key = LowRankNet(hidden_size, rank, 1, generator)

    def forward(self, x: Tensor, layout: BlockLayout) -> Tensor:
        """Scores [B], fp32, of the blocks of `x` [T, hidden_size]; no gradient for `x`."""
        return predictor(x, self.key.weights, None, layout)

    def nets(self) -> Iterator[tuple[str, LowRankNet]]:
        """(name, net) of every net, in the order of the stored tensors."""
        yield "key", self.key


Predictor = AttentionPredictor | MlpPredictor


def make_predictor(kind: str, hidden_size: int, rank: int, generator: torch.Generator) -> Predictor:
    """The predictor of a sub-block; `kind` is "attention" or "mlp"."""
    makers: dict[str, type[Predictor]] = {"attention": AttentionPredictor, "mlp": MlpPredictor}
    return makers[kind](hidden_size, rank, generator)


def _initial(
    outputs: int, inputs: int, generator: torch.Generator, scale: float = 1.0
) -> nn.Parameter:
    """Gaussian of variance 2 / inputs, which a ReLU keeps in scale (He et al., 2015)."""
    deviation = scale * math.sqrt(2 / inputs)
    return nn.Parameter(torch.randn(outputs, inputs, generator=generator, device="cpu") * deviation)
