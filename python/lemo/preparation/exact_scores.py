"""Exact scores, which predictors learn: computed from the dense model, and stored.

One window of tokens at a time runs through the dense model; the input of every sub-block and the
exact scores of its blocks are stored (LeMo, section 4.1). Nothing of size tokens x tokens exists:
attention's scores are one pass over tiles (`block_scores`), and the inputs go to disk in bf16 as
soon as they exist. The store takes

    tokens x layers x 2 sub-blocks x hidden size x 2 bytes

and training reads back the files of one sub-block at a time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lemo.files import naming_file
from lemo.models.layers.capture import capture_sub_blocks
from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import KINDS
from lemo.selection.scorers.paper.exact import attention_scores, mlp_token_scores, token_means

__all__ = ["FeatureStore", "SubBlockData"]


@dataclass(frozen=True)
class SubBlockData:
    """What is stored of one sub-block, window by window.

    Attributes:
        x: its input [T, H] in bf16, mapped from disk.
        scores: the exact scores of the blocks, [B] fp32.
        layouts: how the window is cut into blocks.
        token_scores: those of the tokens, [T] fp32, where a block's score is the mean over its
            tokens (the MLP); empty otherwise.
    """

    x: list[Tensor]
    scores: list[Tensor]
    layouts: list[BlockLayout]
    token_scores: list[Tensor]

    def subset(self, windows: Iterable[int]) -> "SubBlockData":
        """The data of some windows, by index."""
        chosen = list(windows)
        return SubBlockData(
            [self.x[i] for i in chosen],
            [self.scores[i] for i in chosen],
            [self.layouts[i] for i in chosen],
            [self.token_scores[i] for i in chosen] if self.token_scores else [],
        )


class FeatureStore:
    """Inputs and exact scores of every sub-block: a file of bf16 rows for each, grown by windows.

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
        self._scores: dict[tuple[int, str], list[Tensor]] = {
            (layer, kind): [] for layer in range(num_layers) for kind in KINDS
        }
        self._token_scores: dict[int, list[Tensor]] = {layer: [] for layer in range(num_layers)}

    @staticmethod
    def bytes_of_token(num_layers: int, hidden_size: int) -> int:
        """Bytes on disk that one token takes."""
        return num_layers * len(KINDS) * hidden_size * torch.bfloat16.itemsize

    def add_window(self, model: nn.Module, ids: Tensor) -> None:
        """Runs the dense model over a window and stores what its sub-blocks see.

        Args:
            model: a supported causal LM in eval mode.
            ids: [T] int64 token ids, on the device of the model.
        """
        batch = {"input_ids": ids[None]}
        capture_sub_blocks(model, batch, self.visit, block_size=self.block_size)
        self.end_window(ids.numel())

    def visit(
        self, layer: int, kind: str, x: Tensor, tensors: Mapping[str, Any], layout: BlockLayout
    ) -> None:
        """As `capture_sub_blocks` calls it: computes the exact scores and stores them with `x`."""
        if kind == "attention":
            q, k = tensors["q"], tensors["k"]
            # Positive products alone make the scores, and nan is none.
            _check_finite("queries and keys", layer, kind, q, k)
            scores = attention_scores(q, k, layout, tensors["scale"])
        else:
            scores = mlp_token_scores(tensors["activation"])
        self.add(layer, kind, x, scores, layout)

    def add(self, layer: int, kind: str, x: Tensor, scores: Tensor, layout: BlockLayout) -> None:
        """Stores one sub-block of the window that `end_window` will close.

        Args:
            layer, kind: the sub-block.
            x: [T, H], its input.
            scores: for attention one for each block of `layout`, for the MLP one for each token.
            layout: the window's blocks.

        Raises:
            ValueError: `x` is of another width, or the scores are not finite.
        """
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: expected [tokens, {self.hidden_size}], got {tuple(x.shape)}")
        _check_finite("exact scores", layer, kind, scores)
        scores = scores.detach().float()
        if kind == "mlp":
            self._token_scores[layer].append(scores.cpu())
            scores = token_means(scores, layout)
        self._scores[layer, kind].append(scores.cpu())
        rows = x.detach().to("cpu", torch.bfloat16).contiguous()
        # Ordinary writes, not stores through a mapping: a full disk must raise, not kill the
        # process.
        path = self._file(layer, kind)
        with naming_file(path), path.open("ab") as file:
            file.write(rows.view(torch.uint8).numpy().data)

    def end_window(self, tokens: int) -> None:
        """Closes a window.

        Raises:
            RuntimeError: a sub-block was not added, or more than once.
        """
        self.layouts.append(BlockLayout.from_seqlens([tokens], self.block_size, "cpu"))
        for (layer, kind), scores in self._scores.items():
            if len(scores) != len(self.layouts):
                raise RuntimeError(
                    f"capture: expected {len(self.layouts)} windows of layer {layer} {kind}, "
                    f"got {len(scores)}"
                )

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
            list(self._scores[layer, kind]),
            list(self.layouts),
            list(self._token_scores[layer]) if kind == "mlp" else [],
        )

    def _file(self, layer: int, kind: str) -> Path:
        return self.folder / f"features.{layer}.{kind}.bf16"


def _check_finite(what: str, layer: int, kind: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(
            f"model: the {what} of layer {layer}'s {kind} are not finite; "
            "expected a model whose activations are finite in its dtype"
        )
