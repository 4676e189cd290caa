"""Embeddings of all tokens, of which the decoder gets those of the kept rows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lemo.models.generic.kept import KeptBatch
from lemo.models.interception import works_row_by_row

__all__ = ["embedding_whole"]


@contextmanager
def embedding_whole(
    decoder: PreTrainedModel, kept: KeptBatch, call: Mapping[str, Any]
) -> Iterator[None]:
    """Inside, an embedding that may look at more than one token gets the batch as it is.

    Such as one with NEFTune's hook, whose noise depends on the number of tokens.

    Args:
        decoder: it is called with the kept tokens [1, R], and embeds them.
        kept: the kept rows.
        call: the arguments of a call for the batch, by name.
    """
    if call.get("input_ids") is None:  # they are embedded already
        yield
        return
    embedding = decoder.get_input_embeddings()
    if all(map(works_row_by_row, embedding.modules())):
        yield
        return
    # GPT-2 embeds the kinds of its tokens by the same weights.
    given = [call[name] for name in ("input_ids", "token_type_ids") if call.get(name) is not None]
    replaced = False

    @torch.compiler.disable
    def give_all(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal replaced
        ids = args[0].reshape(-1)
        whole = next((all_of for all_of in given if torch.equal(ids, kept.of(all_of)[0])), None)
        replaced = whole is not None
        return (whole, *args[1:]) if replaced else None

    @torch.compiler.disable
    def take_kept(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return kept.of(output) if replaced else output

    hooks = (
        embedding.register_forward_pre_hook(give_all),
        embedding.register_forward_hook(take_kept),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
