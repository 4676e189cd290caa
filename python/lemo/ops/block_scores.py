"""block_scores: how much later queries attend to each block of keys, in one pass over tiles."""

import torch
from torch import Tensor

from lemo.ops.call import call
from lemo.packing.blocks import BlockLayout

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::block_scores")
def _(q, k, block_starts, cu_blocks, scale, kernel_name="auto"):
    return q.new_empty(block_starts.shape[0] - 1, dtype=torch.float32)


def block_scores(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    scale: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Scores blocks by the attention that later queries would give them (LeMo, section 4.1).

    For rows i > j of one sequence `S[i, j] = scale * mean_h max(q_ih . k_jh, 0)`; the score of a
    block is the mean, over the query blocks that can see it (itself included), of the maximum of S
    over the pair of blocks. Nothing of size T x T is stored.

    Args:
        q: [T, Hq, D] fp32, bf16 or fp16, rotated as the attention uses it. On CUDA bf16 or fp16,
            and D a multiple of 8 up to 128.
        k: [T, Hk, D] of the same dtype; Hq is a multiple of Hk.
        layout: how the T packed tokens are cut.
        scale: positive; None is `D ** -0.5`.
        kernel: "auto", or on CUDA the name of one ("portable", "hopper"), for tests.

    Returns:
        [B] fp32. Not differentiable.

    Raises:
        ValueError, TypeError: an argument does not fit.
        NotImplementedError: there is no kernel for this device, dtype or head size, or none of
            this name for this GPU.
    """
    if scale is None:
        scale = max(q.shape[-1], 1) ** -0.5
    return call(
        _ops.block_scores,
        q.detach(),
        k.detach(),
        layout.block_starts,
        layout.cu_blocks,
        scale,
        kernel,
    )
