"""block_attention: how much attention chosen rows give to each block, without their T weights."""

import torch
from torch import Tensor

from lemo.ops.call import call
from lemo.packing.blocks import BlockLayout

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::block_attention")
def _(q, k, rows, block_starts, cu_blocks, scale):
    shape = (q.shape[0], q.shape[1], block_starts.shape[0] - 1)
    return tuple(q.new_empty(shape, dtype=torch.float32) for _ in range(2))


def block_attention(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    layout: BlockLayout,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The largest attention logit of chosen query rows in each block, and the logsumexp of all.

    A query sees the tokens of its own sequence up to its own row; `scale * (q . k)` are its
    attention logits. With `lse = logsumexp.logsumexp(-1, keepdim=True)`, the largest
    attention weight of a query in a block is `(maximum - lse).exp()`, and the sum of its weights
    there `(logsumexp - lse).exp()`. Nothing of size R x T is stored.

    Args:
        q: [R, H, D] fp32, bf16 or fp16, the queries of R chosen rows and H chosen heads, rotated as
            the attention uses them. On CUDA bf16 or fp16, and D a multiple of 8 up to 128.
        k: [T, Hk, D] of the same dtype, the keys of all tokens; H is a multiple of Hk.
        rows: [R] int32 or int64, the packed row of each query, in any order. On a GPU they are not
            checked: a query of a row outside 0 to T - 1 sees nothing.
        layout: how the T packed tokens are cut.
        scale: positive; None is `D ** -0.5`.

    Returns:
        (maximum, logsumexp), each [R, H, B] fp32, natural logarithms; -inf where the query sees no
        token of the block. Not differentiable.

    Raises:
        ValueError, TypeError: an argument does not fit.
        NotImplementedError: there is no kernel for this device, dtype or head size.
    """
    if scale is None:
        scale = max(q.shape[-1], 1) ** -0.5
    return call(
        _ops.block_attention,
        q.detach(),
        k.detach(),
        rows,
        layout.block_starts,
        layout.cu_blocks,
        scale,
    )
