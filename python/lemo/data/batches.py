"""Windows as the arguments of one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lemo.data.examples import Window

__all__ = ["TrainingBatch", "collate"]


@dataclass(frozen=True)
class TrainingBatch:
    """What one forward pass gets.

    Attributes:
        input_ids, labels: [B, S] int64; labels are not shifted.
        position_ids: [B, S] int64, which begin again with each example; None: rows are whole.
        num_labels: labels that count.
        scores: [B, S] fp32 of the tokens, for `Handle.scored`; None: there are none.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    num_labels: int
    scores: Tensor | None = None

    def arguments(
        self, device: torch.device | str = "cpu", on_host: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """What the model is called with; on a GPU by copies that the host does not wait for.

        Args:
            device: where the tensors go.
            on_host: names of tensors that stay on the host, ready for such a copy.
        """
        tensors = {"input_ids": self.input_ids, "labels": self.labels}
        if self.position_ids is not None:
            tensors["position_ids"] = self.position_ids
        if torch.device(device).type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return {
            name: tensor if name in on_host else tensor.to(device, non_blocking=True)
            for name, tensor in tensors.items()
        }


def collate(windows: Sequence[Tensor | Window]) -> TrainingBatch:
    """The batch of some windows: rows where they are equally long and whole, else one packed row.

    A packed row holds all examples one after the other, with positions that begin again, and no
    padding.

    Args:
        windows: all of documents, [T] int64 each, or all of examples.
    """
    documents = [window for window in windows if isinstance(window, Tensor)]
    if documents:
        ids = torch.stack(documents)
        return TrainingBatch(ids, ids, None, ids.shape[0] * (ids.shape[1] - 1))
    examples = [window for window in windows if isinstance(window, Window)]
    count = sum(window.num_labels for window in examples)
    scores = [window.scores for window in examples if window.scores is not None]
    shapes = {window.seqlens for window in examples}
    if len(shapes) == 1 and len(examples[0].seqlens) == 1:
        ids = torch.stack([window.ids for window in examples])
        labels = torch.stack([window.labels for window in examples])
        return TrainingBatch(ids, labels, None, count, torch.stack(scores) if scores else None)
    return TrainingBatch(
        torch.cat([window.ids for window in examples])[None],
        torch.cat([window.labels for window in examples])[None],
        torch.cat([window.position_ids for window in examples])[None],
        count,
        torch.cat(scores)[None] if scores else None,
    )
