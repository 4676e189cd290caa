"""The tensors of every sub-block of the dense model, for labels and for training predictors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lemo import ops
from lemo.models.architectures import architecture_of
from lemo.packing.blocks import BlockLayout, Selection

__all__ = ["Visit", "capture_sub_blocks"]

Visit = Callable[[int, str, Tensor, Mapping[str, Any], BlockLayout], None]


@torch.no_grad()
def capture_sub_blocks(
    model: nn.Module, batch: Mapping[str, Tensor], visit: Visit, block_size: int = 64
) -> None:
    """Runs the dense model over one batch and shows every sub-block to `visit`.

    Nothing is kept: what `visit` does not store is freed before the next sub-block runs. Modules
    run as they are, so put the model into eval mode to leave dropout out.

    Args:
        model: a supported causal LM, possibly wrapped.
        batch: input_ids [B, S] and optionally attention_mask [B, S], position_ids [B, S].
        visit: called as visit(layer, kind, x, tensors, layout), where `x` [T, H] is the output of
            the sub-block's norm for all rows, and `tensors` are for kind "attention"
            {"q": [T, Hq, D], "k": [T, Hk, D], "scale": float} (rotated, as attention multiplies
            them), for kind "mlp" {"activation": [T, F]} (act(gate) * up, or act(fc1)).
        block_size: tokens of a block of the layout that `visit` gets.

    Raises:
        TypeError: an unsupported model.
        ValueError: layers or attention that are not Transformers' own any more; a mask that is not
            [B, S] of contiguous ones.
    """
    architecture = architecture_of(model)
    architecture.check_parts()
    packed, x = architecture.embed(
        batch["input_ids"],
        None,
        batch.get("attention_mask"),
        batch.get("position_ids"),
        block_size,
    )
    everything = Selection.everything(packed.layout)
    for index in range(architecture.num_layers):
        xs = architecture.normalize(x, architecture.attention_norm(index))
        q, k = architecture.rotated(index, xs, packed)
        tensors = {"q": q, "k": k, "scale": architecture.scale(index)}
        visit(index, "attention", xs, tensors, packed.layout)
        v = architecture.values(index, xs)
        del tensors, xs
        heads = ops.segment_attention(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            everything.cu_rows,
            scale=architecture.scale(index),
            window=architecture.window(index),
        )
        del q, k, v
        x = x + architecture.attention_output(index, heads)
        del heads

        xs = architecture.normalize(x, architecture.mlp_norm(index))
        visit(index, "mlp", xs, {"activation": architecture.activation(index, xs)}, packed.layout)
        x = x + architecture.mlp(index, xs)
