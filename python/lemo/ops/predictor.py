"""predictor: scores of blocks from low-rank maps of their tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lemo.ops.autograd import first_order_only
from lemo.ops.call import call
from lemo.packing.blocks import BlockLayout

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::predictor")
def _(x, k_down, k_mid, k_up, q_down, q_mid, q_up, block_starts, cu_blocks):
    return x.new_empty(block_starts.shape[0] - 1, dtype=torch.float32)


@torch.library.register_fake("lemo::predictor_backward")
def _(dscores, x, k_down, k_mid, k_up, q_down, q_mid, q_up, block_starts, cu_blocks):
    return tuple(
        x.new_empty(0 if weight is None else weight.shape, dtype=torch.float32)
        for weight in (k_down, k_mid, k_up, q_down, q_mid, q_up)
    )


class _Predictor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, k_down, k_mid, k_up, q_down, q_mid, q_up, block_starts, cu_blocks):
        arguments = (x, k_down, k_mid, k_up, q_down, q_mid, q_up, block_starts, cu_blocks)
        ctx.save_for_backward(*arguments)
        return call(_ops.predictor, *arguments)

    @staticmethod
    @first_order_only("predictor")
    def backward(ctx, dscores):
        gradients = call(_ops.predictor_backward, dscores, *ctx.saved_tensors)
        weights, wanted = ctx.saved_tensors[1:7], ctx.needs_input_grad[1:7]
        return (
            None,
            *(g.to(w.dtype) if want else None for g, w, want in zip(gradients, weights, wanted)),
            None,
            None,
        )


def predictor(
    x: Tensor,
    key_weights: Sequence[Tensor],
    query_weights: Sequence[Tensor] | None,
    layout: BlockLayout,
) -> Tensor:
    """Predicts scores of blocks (LeMo, section 4.2).

    Each token of a block goes through `up(relu(mid(relu(down(x)))))`, averaged over the block: k_n
    by the key weights, q_m by the query weights. The score of block n is `k_n . q`, with q the mean
    of q_m over the blocks m >= n of the sequence; without query weights it is k_n itself.

    Args:
        x: [T, H] fp32, bf16 or fp16. No gradient flows into it.
        key_weights: (down [R1, H], mid [R2, R1], up [E, R2]), float, as nn.Linear stores them.
        query_weights: the same for the queries, with the same E (R1 and R2 may differ); None for
            the predictor of an MLP, whose E is 1.
        layout: how the T packed tokens are cut.

    On CUDA the products take both operands in the dtype of x: weights of another dtype are rounded
    to it, and so are, between two maps, the activations (in backward their gradients). The mean,
    the last map and the gradients of the weights are fp32.

    Returns:
        [B] fp32. Differentiable once in the weights.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    for name, weights in (("key_weights", key_weights), ("query_weights", query_weights)):
        if weights is not None and len(weights) != 3:
            raise ValueError(
                f"predictor: argument '{name}': expected 3 tensors (down, mid, up), "
                f"got {len(weights)}"
            )
    queries = (None, None, None) if query_weights is None else query_weights
    return _Predictor.apply(x, *key_weights, *queries, layout.block_starts, layout.cu_blocks)
