"""The predictor of relevance: how much an answer needs each block, before any layer has run."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lemo.packing.blocks import BlockLayout
from lemo.packing.to_device import to_device
from lemo.predictors.modules import LowRankNet
from lemo.relevance.answers import Answers

__all__ = ["EMBEDDING", "REACH", "SHARPNESS", "RelevancePredictor", "query_rows"]

# Features that queries and keys are compared in; `lemo.ops.block_attention` takes as many.
EMBEDDING = 128
# Neighbours on each side that a token's features are mixed with.
REACH = 2
# What products of queries and keys are multiplied with.
SHARPNESS = 0.25
# Correlation of the weights that both nets begin with.
_ALIKE = 0.95
# Tokens before an answer that ask for it: the end of its question.
_QUESTION = 16
# The last map starts larger than where scores are regressed: sums of products of two have to begin
# to differ from each other.
_UP_SCALE = 5.0


class RelevancePredictor(nn.Module):
    """Query and key nets of tokens, compared token by token and gathered late.

    A net gives each token `up(relu(mid(relu(down(x)))))`, which is mixed with that of its two
    neighbours on either side, each feature by weights of its own: so short runs of words are told
    apart. Every token of an answer and of the end of its question finds the key that it fits best
    in a block, and the score of the block for the answer is the sum of these products (late
    interaction, as in ColBERT; Khattab and Zaharia, SIGIR 2020).

    Both nets start partly alike, so that a token fits itself best before anything is learned.

    Args:
        hidden_size: features of a token.
        rank: hidden units of both hidden layers of a net.
        scale: [hidden_size] fp32, what features are multiplied with to be of one size.
        generator: source of the initial weights.
    """

    def __init__(
        self, hidden_size: int, rank: int, scale: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", scale)
        self.key = LowRankNet(hidden_size, rank, EMBEDDING, generator)
        self.query = LowRankNet(hidden_size, rank, EMBEDDING, generator)
        for net in (self.key, self.query):
            net.up.data *= _UP_SCALE
        for mine, other in zip(self.query.weights, self.key.weights):
            mine.data = _ALIKE * other.data + math.sqrt(1.0 - _ALIKE**2) * mine.data
        self.key_mix = nn.Parameter(_initial_mix(generator))
        self.query_mix = nn.Parameter(self.key_mix.detach().clone())

    @torch.no_grad()
    def centre(self, x: Tensor) -> None:
        """Takes out of both nets what all tokens have in common, by the tokens x [T, H].

        Hidden units are never negative, so the features of all tokens begin alike, and no two of
        them would differ much.
        """
        for net in (self.key, self.query):
            _, hidden = net.hidden(x * self.scale)
            common = normalize(hidden.mean(0), dim=0)
            net.up.sub_((net.up @ common)[:, None] * common)

    @classmethod
    def of_weights(
        cls,
        key: Sequence[Tensor],
        query: Sequence[Tensor],
        key_mix: Tensor,
        query_mix: Tensor,
        scale: Tensor,
    ) -> "RelevancePredictor":
        """One with these weights, (down, mid, up) of each net, which are not trained."""
        made = cls(1, 1, scale, torch.Generator("cpu"))
        for net, weights in ((made.key, key), (made.query, query)):
            net.down, net.mid, net.up = (nn.Parameter(weight) for weight in weights)
        made.key_mix, made.query_mix = nn.Parameter(key_mix), nn.Parameter(query_mix)
        return made.requires_grad_(False)

    def nets(self) -> Iterator[tuple[str, LowRankNet]]:
        """(name, net) of both nets, in the order of the stored tensors."""
        yield "key", self.key
        yield "query", self.query

    def keys(self, x: Tensor, layout: BlockLayout) -> Tensor:
        """[T, E] of length 1 of the tokens x [T, H] of some sequences, in the dtype of x."""
        features, mix = self._features(self.key, x), self.key_mix.to(x.dtype)
        tokens, sequences = x.shape[0], len(layout.seqlens)
        lengths = layout.cu_seqlens.diff()
        number = torch.arange(sequences, device=x.device)
        # Rows of zeros between the sequences, so that no token is mixed with one of another.
        gaps = REACH * (number + 1).repeat_interleave(lengths, output_size=tokens)
        places = torch.arange(tokens, device=x.device) + gaps
        spread = features.new_zeros(tokens + REACH * (sequences + 1), features.shape[1])
        spread = spread.index_copy(0, places, features)
        inner = spread.shape[0] - 2 * REACH
        mixed = spread[:inner] * mix[0]
        for offset in range(1, 2 * REACH + 1):
            mixed = torch.addcmul(mixed, spread[offset : offset + inner], mix[offset])
        return normalize(mixed.index_select(0, places - REACH), dim=-1)

    def queries(self, x: Tensor, rows: Sequence[int], spans: Sequence[tuple[int, int]]) -> Tensor:
        """[R, E] of some tokens.

        Args:
            x: [T, H], all tokens.
            rows: the tokens, in any order.
            spans: for each of them the first token of its sequence, and one more than the last.
        """
        bounds = torch.tensor(spans, dtype=torch.int64)
        offsets = torch.arange(-REACH, REACH + 1)
        places = torch.tensor(rows, dtype=torch.int64)[:, None] + offsets
        inside = (places >= bounds[:, :1]) & (places < bounds[:, 1:])
        # The rows of several answers are neighbours of each other: each is computed once.
        used, index = places.clamp(0, x.shape[0] - 1).unique(return_inverse=True)
        used, index, inside = (to_device(each, x.device) for each in (used, index, inside))
        around = self._features(self.query, x[used])[index]
        weights = inside[..., None] * self.query_mix.to(x.dtype)
        return (around * weights).sum(1)

    def _features(self, net: LowRankNet, x: Tensor) -> Tensor:
        down, mid, up = net.weights
        # The scale goes into the first map, which is smaller than the tokens are.
        down, mid, up = (each.to(x.dtype) for each in (down * self.scale, mid, up))
        return torch.relu(torch.relu(x @ down.T) @ mid.T) @ up.T


def query_rows(answers: Answers, tokens: int) -> tuple[list[int], list[int]]:
    """The tokens that look for what answers need, and the answer of each.

    Of every answer its own tokens and the 16 before, the end of its question.

    Args:
        answers: of a sequence.
        tokens: S, of the sequence.
    """
    rows: list[int] = []
    of_rows: list[int] = []
    for answer, (first, end) in enumerate(zip(answers.firsts, answers.ends)):
        # Row `end - 1` predicts the last token, which stands behind it.
        mine = range(max(first + 1 - _QUESTION, 0), min(end, tokens - 1) + 1)
        rows += mine
        of_rows += len(mine) * [answer]
    return rows, of_rows


def _initial_mix(generator: torch.Generator) -> Tensor:
    """[2 * reach + 1, E]: nearly the token alone."""
    noise = torch.randn(2 * REACH + 1, EMBEDDING, generator=generator, device="cpu")
    mix = noise * (0.1 / math.sqrt(2 * REACH + 1))
    mix[REACH] += 1.0
    return mix
