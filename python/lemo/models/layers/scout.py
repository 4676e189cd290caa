"""A scout: the first layers of the dense model, without gradients, for what their heads look at."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from lemo.models.layers.architectures import Architecture
from lemo.models.layers.batch import Batch
from lemo.models.layers.sub_blocks import MLP, Attention
from lemo.models.memory.sharded import gathered
from lemo.packing.blocks import Selection

__all__ = ["Scout"]

# Rows of the MLP at a time: its activations are the largest tensors of a layer.
_ROWS = 16384


class Scout:
    """Runs layers of a model densely on a copy of the residual.

    Args:
        architecture: access to the model.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    @torch.no_grad()
    def __call__(
        self, batch: Batch, residual: Tensor, first: int, layers: Collection[int]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (layer, q [T, Hq, D], k [T, Hk, D]) of some layers, as attention multiplies them.

        Args:
            batch: what the rows are.
            residual: [T, H], at the entry of layer `first`.
            first: the first layer that runs.
            layers: layers that are asked for; none before `first`.
        """
        architecture, last = self._architecture, max(layers)
        everything = Selection.everything(batch.layout)
        residual = residual.clone()
        for index in range(first, last + 1):
            with ExitStack() as stack:
                stack.enter_context(architecture.without_dropout(index))
                stack.enter_context(gathered(architecture.layer(index)))
                attention = Attention(architecture, index, batch, everything)
                x = attention.normalize(residual)
                if index == last:
                    q, k = architecture.rotated(index, x, batch)
                    yield index, q, k
                    return
                heads = attention.project(x)
                del x
                if index in layers:
                    yield index, heads.q, heads.k
                residual += attention.output(attention.attend(heads))
                del heads
                mlp = MLP(architecture, index, everything)
                for rows in residual.split(_ROWS):
                    rows += mlp(rows)
