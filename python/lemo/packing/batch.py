"""Packed batches: a padded [B, S] batch as one list of T tokens, and back."""

import copy
from itertools import accumulate

import torch
from torch import Tensor

from lemo.packing.to_device import index_tensors

__all__ = ["PackedBatch", "shape_of"]


class PackedBatch:
    """The tokens of a batch that are not padding, sequence after sequence.

    Attributes:
        shape: (B, S) of the batch as the model got it.
        seqlens: tokens of each of the N sequences; they sum to T.
        cu_seqlens: [N+1] int32, first row of every sequence; the last entry is T.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        device: torch.device,
    ) -> None:
        """Finds the sequences of a batch.

        Args:
            shape: (B, S).
            attention_mask: [B, S] of 0/1, ones contiguous in every row; or None.
            position_ids: [B or 1, S]; without a mask, a step other than +1 starts a new sequence
                (the rule of Transformers). Not read when there is a mask, as in Transformers.
            device: where the tokens are.

        Raises:
            ValueError: a mask that is not [B, S], has gaps, or keeps no token at all; positions of
                another shape.
        """
        self.shape = shape
        self._token_rows: Tensor | None = None
        if position_ids is not None and tuple(position_ids.shape) not in (shape, (1, shape[1])):
            raise ValueError(
                f"position_ids: expected [batch, tokens] = {list(shape)} or [1, tokens], got "
                f"{list(position_ids.shape)}"
            )
        if attention_mask is not None:
            seqlens = self._remove_padding(attention_mask.to(device))
        elif position_ids is not None:
            # Those on the host are read without waiting for a device.
            seqlens = _packed_lengths(position_ids.expand(shape))
        else:
            seqlens = [shape[1]] * shape[0]
        self.seqlens = tuple(seqlens)
        [self.cu_seqlens] = index_tensors(device, list(accumulate(seqlens, initial=0)))
        self._positions: Tensor | None = None

    def _remove_padding(self, mask: Tensor) -> list[int]:
        if tuple(mask.shape) != tuple(self.shape):
            raise ValueError(
                f"attention_mask: expected [batch, tokens] = {list(self.shape)} of 0/1, got shape "
                f"{list(mask.shape)}; prepared masks of other shapes are not supported"
            )
        tokens = mask != 0
        on_device = tokens.sum(1)
        starts = tokens[:, :1].sum(1) + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
        # The one read-back of a padded batch: lengths and the number of runs of ones.
        lengths, starts = torch.stack((on_device, starts)).tolist()
        if max(starts) > 1:
            raise ValueError(
                "attention_mask: expected the ones of each row to be contiguous (padding on the "
                f"left or right), got {max(starts)} runs in row {starts.index(max(starts))}; where "
                "prompt tuning puts tokens before the prompt, pad on the right"
            )
        if sum(lengths) == 0:
            raise ValueError("attention_mask: expected at least one token, got only zeros")
        if sum(lengths) < tokens.numel():
            # What nonzero() would give, which waits for its size to be read back once more.
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            firsts = rows * tokens.shape[1] + tokens.int().argmax(1)
            shifts = firsts - (on_device.cumsum(0) - on_device)
            packed = torch.arange(sum(lengths), device=tokens.device)
            self._token_rows = packed + shifts.repeat_interleave(on_device, output_size=len(packed))
        return lengths

    def with_positions(self, positions: Tensor | None) -> "PackedBatch":
        """The same batch, whose `positions` are these [T] int32; None: they are not known yet."""
        batch = copy.copy(self)
        batch._positions = positions
        return batch

    @property
    def num_tokens(self) -> int:
        """T, the tokens of all sequences."""
        return sum(self.seqlens)

    @property
    def is_padded(self) -> bool:
        """Whether some of the B * S tokens are padding."""
        return self._token_rows is not None

    def padding(self) -> Tensor | None:
        """[B, S] bool, the tokens that are padding; None: no token is."""
        if self._token_rows is None:
            return None
        padding = torch.ones(
            self.shape[0] * self.shape[1], dtype=torch.bool, device=self._token_rows.device
        )
        return padding.index_fill_(0, self._token_rows, False).reshape(self.shape)

    def pack(self, values: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]; shares storage with `values` when nothing is padded."""
        flat = values.reshape(-1, *values.shape[2:])
        return flat if self._token_rows is None else flat.index_select(0, self._token_rows)

    def unpack(self, values: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...]; padding gets zeros."""
        if self._token_rows is not None:
            padded = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
            values = padded.index_copy(0, self._token_rows, values)
        return values.reshape(*self.shape, *values.shape[1:])

    @property
    def positions(self) -> Tensor:
        """[T] int32, the position of every token in its own sequence."""
        if self._positions is None:
            cu_seqlens, tokens = self.cu_seqlens, self.num_tokens
            rows = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
            firsts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=tokens)
            self._positions = rows - firsts
        return self._positions


def _packed_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the sequences in [B, S] positions: a step other than +1 starts a new one."""
    batch, tokens = position_ids.shape
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    firsts = starts.flatten().nonzero()[:, 0].tolist()
    return [end - first for first, end in zip(firsts, [*firsts[1:], batch * tokens])]


def shape_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """(B, S) of a batch given as ids [B, S] or embeddings [B, S, H].

    Raises:
        ValueError: both or none of the two are given, or one of other dimensions.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
    for name, given, dims in (
        ("input_ids", input_ids, ["batch", "tokens"]),
        ("inputs_embeds", inputs_embeds, ["batch", "tokens", "hidden size"]),
    ):
        if given is not None and given.ndim != len(dims):
            raise ValueError(f"{name}: expected [{', '.join(dims)}], got {list(given.shape)}")
    batch, tokens = next(t.shape[:2] for t in (input_ids, inputs_embeds) if t is not None)
    return batch, tokens
