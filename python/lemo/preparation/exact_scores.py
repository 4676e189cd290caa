"""Labels of the predictors, from the frozen dense model, and their store (LeMo, section 4.1).

One window of tokens at a time runs through the dense model; every sub-block leaves its input and
the informativeness of its blocks. Nothing of size tokens x tokens exists: the attention labels are
one pass over tiles (`block_scores`), and the inputs go to disk in bf16 as soon as they exist. The
store takes

    tokens x layers x 2 sub-blocks x hidden size x 2 bytes

and training reads back the files of one sub-block at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import KINDS
from lemo.selection.scorers.exact import attention_scores, mlp_token_scores, token_means

__all__ = ["FeatureStore", "SubBlockData"]


@dataclass(frozen=True)
class SubBlockData:
    """What one sub-block left of every window.

    Attributes:
        x: for each window, its input [T, H] in bf16, mapped from disk.
        labels: for each window, [B] fp32.
        layouts: for each window, its block layout.
        token_labels: for each window, [T] fp32, where a block's label is the mean of those of its
            tokens (the MLP); empty otherwise.
    """

    x: list[Tensor]
    labels: list[Tensor]
    layouts: list[BlockLayout]
    token_labels: list[Tensor]

    def subset(self, windows: Iterable[int]) -> "SubBlockData":
        """The data of some windows, by index."""
        chosen = list(windows)
        return SubBlockData(
            [self.x[i] for i in chosen],
            [self.labels[i] for i in chosen],
            [self.layouts[i] for i in chosen],
            [self.token_labels[i] for i in chosen] if self.token_labels else [],
        )


class FeatureStore:
    """Inputs and labels of every sub-block: a file of bf16 rows for each, grown by windows.

    Args:
        folder: an existing folder; the store adds its files there and the caller removes them.
        num_layers: layers of the model.
        hidden_size: features of a token.
        block_size: tokens of a block.
    """

    def __init__(self, folder: Path, num_layers: int, hidden_size: int, block_size: int):
        self.folder = folder
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.block_size = block_size
        self.layouts: list[BlockLayout] = []
        self._labels: dict[tuple[int, str], list[Tensor]] = {
            (layer, kind): [] for layer in range(num_layers) for kind in KINDS
        }
        self._token_labels: dict[int, list[Tensor]] = {layer: [] for layer in range(num_layers)}

    @staticmethod
    def bytes_of_token(num_layers: int, hidden_size: int) -> int:
        """Bytes on disk that one token takes."""
        return num_layers * len(KINDS) * hidden_size * torch.bfloat16.itemsize

    def add(self, layer: int, kind: str, x: Tensor, labels: Tensor, layout: BlockLayout) -> None:
        """Appends what one sub-block left of the window that `end_window` will close.

        Args:
            layer, kind: the sub-block.
            x: [T, H].
            labels: for attention one for each block of `layout`, for the MLP one for each token.
            layout: the window's blocks.
        """
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: expected [tokens, {self.hidden_size}], got {tuple(x.shape)}")
        if not torch.isfinite(labels).all():
            raise ValueError(
                f"model: the {kind} labels of layer {layer} are not finite; "
                "expected a model whose activations are finite in its dtype"
            )
        labels = labels.detach().float()
        if kind == "mlp":
            self._token_labels[layer].append(labels.cpu())
            labels = token_means(labels, layout)
        self._labels[layer, kind].append(labels.cpu())
        rows = x.detach().to("cpu", torch.bfloat16).contiguous()
        # Ordinary writes, not stores through a mapping: a full disk must raise, not kill the
        # process.
        with self._file(layer, kind).open("ab") as file:
            file.write(rows.view(torch.uint8).numpy().data)

    def end_window(self, tokens: int) -> None:
        """Closes a window; every sub-block must have been added exactly once."""
        self.layouts.append(BlockLayout.from_seqlens([tokens], self.block_size, "cpu"))
        for (layer, kind), labels in self._labels.items():
            if len(labels) != len(self.layouts):
                raise RuntimeError(
                    f"capture: expected {len(self.layouts)} windows of layer {layer} {kind}, "
                    f"got {len(labels)}"
                )

    def visitor(self) -> Any:
        """The `visit` of `capture_sub_blocks`: makes the labels and stores them."""

        def visit(
            layer: int, kind: str, x: Tensor, tensors: dict[str, Any], layout: BlockLayout
        ) -> None:
            if kind == "attention":
                labels = attention_scores(tensors["q"], tensors["k"], layout, tensors["scale"])
            else:
                labels = mlp_token_scores(tensors["activation"])
            self.add(layer, kind, x, labels, layout)

        return visit

    def read(self, layer: int, kind: str) -> SubBlockData:
        """Data of one sub-block; the rows stay on disk until they are touched."""
        tokens = [layout.num_tokens for layout in self.layouts]
        rows = torch.from_file(
            str(self._file(layer, kind)),
            shared=False,
            size=sum(tokens) * self.hidden_size,
            dtype=torch.bfloat16,
            device="cpu",
        ).view(-1, self.hidden_size)
        return SubBlockData(
            list(rows.split(tokens)),
            list(self._labels[layer, kind]),
            list(self.layouts),
            list(self._token_labels[layer]) if kind == "mlp" else [],
        )

    def _file(self, layer: int, kind: str) -> Path:
        return self.folder / f"features.{layer}.{kind}.bf16"
