"""word_relevance: how much each answer of a prompt needs each block, by the words they share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lemo.ops.call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::word_relevance")
def _(ids, firsts, ends, block_size):
    blocks = -(-ids.shape[0] // block_size)
    return ids.new_empty((firsts.shape[0], blocks), dtype=torch.float32)


def word_relevance(
    ids: Tensor, firsts: Sequence[int], ends: Sequence[int], block_size: int
) -> Tensor:
    """How much each of A answers needs each block of its sequence, by shared words, in two steps.

    A word is a token id. A token counts for an answer if it stands before the answer, in a block
    without labels.

    1. The words of the answer and of the 16 tokens before it, the end of its question, that stand
       in the block: the sum of log(blocks / blocks that have the word).
    2. The words around the answer's place: the 16 tokens in which the answer's own words weigh
       most, log(S / occurrences) each. Those of the 24 tokens up to the end of the place and of the
       8 behind it are looked for; a block gets the square of the most that they weigh in any 16
       tokens that overlap it.

    Either step's scores are divided by their sum over the blocks; a block gets the larger one.

    Args:
        ids: [S] int64, the tokens, at least 0. On a GPU they are copied to the host, which waits.
        firsts: for each answer the row that predicts its first token.
        ends: for each answer one more than the row that predicts its last token; at most S.
        block_size: tokens of a block; the last one may be shorter.

    Returns:
        [A, B] fp32 on the device of `ids`. Not differentiable.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    on_host = ids.detach().cpu()
    rows = [torch.tensor(values, dtype=torch.int64, device="cpu") for values in (firsts, ends)]
    relevance: Tensor = call(_ops.word_relevance, on_host, *rows, block_size)
    return relevance.to(ids.device)
