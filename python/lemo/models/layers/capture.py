"""The tensors of every sub-block of the dense model, for exact scores and for predictors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lemo.models.calls.arguments import ForwardArguments
from lemo.models.layers.architectures import architecture_of
from lemo.models.layers.sub_blocks import MLP, Attention
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
    arguments = ForwardArguments(
        input_ids=batch.get("input_ids"),
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
    )
    blocked, residual = architecture.embed(arguments, block_size)
    everything = Selection.everything(blocked.layout)
    for index in range(architecture.num_layers):
        attention = Attention(architecture, index, blocked, everything)
        x = attention.normalize(residual)
        heads = attention.project(x)
        tensors = {"q": heads.q, "k": heads.k, "scale": architecture.scale(index)}
        visit(index, "attention", x, tensors, blocked.layout)
        del tensors, x
        residual = residual + attention.output(attention.attend(heads))
        del heads

        mlp = MLP(architecture, index, everything)
        x = mlp.normalize(residual)
        activation = architecture.activation(index, x)
        visit(index, "mlp", x, {"activation": activation}, blocked.layout)
        residual = residual + mlp.output(x, activation=activation)
        del activation
