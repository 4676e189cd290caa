"""The predictors of all layers of a model, as they run."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lemo.ops import predictor
from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import KINDS
from lemo.predictors.position import PositionProfile

__all__ = ["MATRICES", "NETS", "PROFILE", "PredictorSet"]

# The stored tensors of a sub-block are layers.N.KIND.NET.MATRIX and layers.N.KIND.profile.NAME.
NETS = {"attention": ("key", "query"), "mlp": ("key",)}
MATRICES = ("down", "mid", "up")
PROFILE = ("knots", "mean", "deviation")


class PredictorSet:
    """The predictors of all layers of one model, ready to score.

    Attributes:
        block_size: tokens of the blocks that the predictors were trained for.
        num_layers, hidden_size: of the model.
        thresholds: {"attention": [one for each layer], "mlp": [...]}.
        description: the contents of predictor.json.
    """

    def __init__(self, tensors: Mapping[str, Tensor], description: Mapping[str, Any]):
        self.description = dict(description)
        self.block_size: int = description["block_size"]
        self.num_layers: int = description["num_layers"]
        self.hidden_size: int = description["hidden_size"]
        self.thresholds: dict[str, list[float]] = {
            kind: list(description["thresholds"][kind]) for kind in KINDS
        }
        self._nets: dict[tuple[int, str], list[tuple[Tensor, ...]]] = {}
        self._profiles: dict[tuple[int, str], PositionProfile] = {}
        for layer in range(self.num_layers):
            for kind in KINDS:
                stem = f"layers.{layer}.{kind}"
                self._nets[layer, kind] = [
                    tuple(tensors[f"{stem}.{net}.{name}"] for name in MATRICES)
                    for net in NETS[kind]
                ]
                self._profiles[layer, kind] = PositionProfile(
                    *(tensors[f"{stem}.profile.{name}"] for name in PROFILE)
                )
        # Weights on the device and in the dtype of the rows that they scored last.
        self._cast: dict[tuple[int, str, torch.device, torch.dtype], tuple[Any, ...]] = {}
        # What the profiles say of every block, for the cut of the rows that were scored last:
        # windows of one length follow each other, and a profile is two dozen small kernels.
        self._cut: tuple[tuple[int, ...], torch.device] | None = None
        self._places: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def scores(self, layer: int, kind: str, x: Tensor, layout: BlockLayout) -> Tensor:
        """Predicted scores of all blocks, [B] fp32.

        Args:
            layer: index of the layer.
            kind: "attention" or "mlp".
            x: [T, H], output of the sub-block's norm for all rows.
            layout: how the T rows are cut; its block size must be that of the predictors.

        Raises:
            ValueError: it is not; or there is no such sub-block.
        """
        if layout.block_size != self.block_size:
            raise ValueError(
                f"layout: expected blocks of {self.block_size} tokens, as the predictors were "
                f"trained for, got {layout.block_size}"
            )
        if (layer, kind) not in self._nets:
            raise ValueError(
                f"layer, kind: expected a layer below {self.num_layers} and one of "
                f"{', '.join(KINDS)}, got {layer!r}, {kind!r}"
            )
        place = (layer, kind, x.device, x.dtype)
        if place not in self._cast:
            self._cast[place] = tuple(
                tuple(weight.to(x.device, x.dtype) for weight in net)
                for net in self._nets[layer, kind]
            )
        key, *query = self._cast[place]
        with torch.no_grad():
            content = predictor(x, key, query[0] if query else None, layout)
            mean, deviation = self._place(layer, kind, layout, x.device)
            return mean + deviation * content

    def _place(
        self, layer: int, kind: str, layout: BlockLayout, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the blocks' scores for their places, [B] each."""
        cut = (layout.seqlens, device)
        if cut != self._cut:
            self._cut, self._places = cut, {}
        if (layer, kind) not in self._places:
            self._places[layer, kind] = self._profiles[layer, kind].at(layout, device)
        return self._places[layer, kind]
