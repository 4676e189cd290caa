"""The rows of a batch that are kept, as the model's decoder gets them: one packed sequence."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lemo.distributed.attention import SharedKeys
from lemo.distributed.context import ContextParallel
from lemo.models.generic.attention import KeptRows, RowsMask
from lemo.models.layers.batch import Batch
from lemo.models.layers.placement import SharedOut
from lemo.packing.blocks import Selection

__all__ = ["KeptBatch"]


@dataclass(frozen=True)
class KeptBatch:
    """A batch and its kept rows.

    Attributes:
        batch: what the T rows are.
        selection: the R of them that are kept, where processes share them out those of this one.
        model: the type of the model, for errors.
        whole: all that are kept.
        keys: those of all processes; None: this one has them all.
    """

    batch: Batch
    selection: Selection
    model: str
    whole: Selection
    keys: SharedKeys | None = None

    @classmethod
    def of_group(
        cls, batch: Batch, whole: Selection, model: str, context: ContextParallel | None
    ) -> "KeptBatch":
        """The kept rows of this process.

        Args:
            batch: what the T rows are.
            whole: what is kept of them.
            model: the type of the model, for errors.
            context: processes that share them out; None: this one has them all.
        """
        if context is None:
            return cls(batch, whole, model, whole)
        place = SharedOut(context, batch, whole, None)
        own = replace(place.of(whole), rows=place.rows)
        return cls(batch, own, model, whole, place.keys)

    def attention(self, group_size: int = 0) -> KeptRows:
        """What attention has to know of the rows.

        Args:
            group_size: tokens of a shifted attention group; 0: no groups.
        """
        selection, (lines, columns) = self.selection, self.batch.packed.shape
        rows = selection.num_rows, selection.cu_rows, selection.positions
        count = torch.arange(lines * columns, device=selection.cu_rows.device)
        index = self.of(count.reshape(lines, columns))[0]
        places = torch.stack((index // columns, index % columns))
        return KeptRows(self.model, *rows, places, self.keys, group_size)

    def of(self, values: Tensor) -> Tensor:
        """[1, R, ...], the kept rows of [B or 1, S, ...]."""
        batch, tokens = self.batch.packed.shape
        packed = self.batch.packed.pack(values.expand(batch, tokens, *values.shape[2:]))
        return self.of_packed(packed)[None]

    def of_packed(self, values: Tensor) -> Tensor:
        """[R, ...], the kept rows of [T, ...]."""
        rows = self.selection.rows
        return values if rows is None else values.index_select(0, rows.to(values.device))

    def positions(self, position_ids: Tensor | None, device: torch.device) -> Tensor:
        """The kept rows' own positions, [1, R], or [K, 1, R] where a row has K of them.

        Args:
            position_ids: [B or 1, S] or [K, B or 1, S]; None: the column of each token, as models
                count where nothing else is said.
            device: where they are to be.
        """
        if position_ids is None:
            position_ids = torch.arange(self.batch.packed.shape[1], device=device)[None]
        if position_ids.ndim == 3:
            return torch.stack([self.of(part) for part in position_ids])
        return self.of(position_ids)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the decoder, for the kept rows alone.

        Raises:
            ValueError: one of them is a tensor of which it is not known what its rows are.
        """
        call = dict(given)
        call.pop("labels", None)  # which the causal LM has handed on with all else
        device = None
        for name in ("input_ids", "inputs_embeds"):
            if call.get(name) is not None:
                call[name] = self.of(call[name])
                device = call[name].device
        if device is None:
            raise ValueError(
                f"model: expected {self.model} to call its decoder with input_ids or inputs_embeds "
                f"by name, got {', '.join(call) or 'nothing'}; train without lemo"
            )
        call["position_ids"] = self.positions(call.get("position_ids"), device)
        if "cache_position" in call:
            # From which some count positions.
            call["cache_position"] = call["position_ids"].reshape(-1, self.selection.num_rows)[0]
        for name in ("per_layer_inputs", "token_type_ids"):
            if torch.is_tensor(call.get(name)):
                call[name] = self.of(call[name])
        if torch.is_tensor(call.get("visual_pos_masks")):
            self._keep_visual(call)
        mask = call.get("attention_mask")
        if not _is_ours(mask):
            # All ones: positions that leave out some must not be taken for those of several
            # sequences, which attention knows anyway.
            count = self.selection.num_rows
            call["attention_mask"] = torch.ones(1, count, dtype=torch.long, device=device)
        for name, value in call.items():
            if name not in _OF_ROWS and _holds_tensors(value):
                raise ValueError(
                    f"{name}: {self.model} gives it to its layers, but lemo does not know which of "
                    "it belongs to which row; train without lemo"
                )
        return call

    def _keep_visual(self, call: dict[str, Any]) -> None:
        """What layers add to the tokens of images: [N, H] for the N of them in the batch."""
        mask = call["visual_pos_masks"]
        numbers = (mask.flatten().cumsum(0) - 1).reshape(mask.shape)
        call["visual_pos_masks"] = kept = self.of(mask)
        added = call.get("deepstack_visual_embeds")
        if added is not None:
            rows = self.of(numbers)[kept]
            call["deepstack_visual_embeds"] = [x.index_select(0, rows.to(x.device)) for x in added]


# Arguments of a decoder of which it is known what belongs to which row.
_OF_ROWS = {
    "attention_mask",
    "cache_position",
    "deepstack_visual_embeds",
    "input_ids",
    "inputs_embeds",
    "per_layer_inputs",
    "position_ids",
    "token_type_ids",
    "visual_pos_masks",
}


def _is_ours(mask: Any) -> bool:
    """Whether a mask was made in this pass already: the model made it outside of the decoder."""
    if isinstance(mask, Mapping):
        return all(map(_is_ours, mask.values()))
    return isinstance(mask, RowsMask)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return torch.is_tensor(value)
