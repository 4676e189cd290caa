"""Parts of a decoder that look at all tokens of the batch, where it gets the kept rows alone."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lemo.models.calls.interception import works_row_by_row
from lemo.models.calls.per_thread import in_this_thread
from lemo.models.generic.kept import KeptBatch

__all__ = ["seeing_the_batch"]

# Kinds of rotation that depend on the largest position.
_BY_LENGTH = ("dynamic", "longrope")


@contextmanager
def seeing_the_batch(
    decoder: PreTrainedModel, kept: KeptBatch, call: Mapping[str, Any]
) -> Iterator[None]:
    """Inside, embedding and rotation of the kept rows are those that they have in the batch.

    Args:
        decoder: it is called with the kept rows.
        kept: these.
        call: the arguments of a call for the batch, by name.
    """
    with ExitStack() as stack:
        if call.get("input_ids") is not None:
            stack.enter_context(_embedding_all(decoder.get_input_embeddings(), kept, call))
        positions = call.get("position_ids")
        if positions is not None and positions.ndim == 3 and len(positions) == 4:
            positions = positions[1:]  # the first counts tokens (images)
        largest = kept.batch.packed.shape[1] - 1 if positions is None else positions.max()
        for module in decoder.modules():
            if _depends_on_length(module):
                stack.enter_context(_with_position(module, largest))
        yield


@contextmanager
def _embedding_all(
    embedding: nn.Module, kept: KeptBatch, call: Mapping[str, Any]
) -> Iterator[None]:
    """Inside, an embedding that may look at more than one token gets the batch as it is.

    Such as one with NEFTune's hook, whose noise depends on the number of tokens.
    """
    if all(map(works_row_by_row, embedding.modules())):
        yield
        return
    # GPT-2 embeds the kinds of its tokens by the same weights.
    given = [call[name] for name in ("input_ids", "token_type_ids") if call.get(name) is not None]
    replaced = False

    def give_all(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal replaced
        ids = args[0].reshape(-1)
        whole = next((all_of for all_of in given if torch.equal(ids, kept.of(all_of)[0])), None)
        replaced = whole is not None
        return (whole, *args[1:]) if replaced else None

    def take_kept(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return kept.of(output) if replaced else output

    hooks = (
        embedding.register_forward_pre_hook(in_this_thread(give_all)),
        embedding.register_forward_hook(in_this_thread(take_kept)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _depends_on_length(module: nn.Module) -> bool:
    kinds = vars(module).get("rope_type")
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind in str(of) for of in kinds for kind in _BY_LENGTH)


@contextmanager
def _with_position(rotation: nn.Module, largest: Tensor | int) -> Iterator[None]:
    """Inside, a rotation of rows sees one more position, whose tables it does not return."""

    def add(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = "position_ids" in kwargs
        positions = kwargs["position_ids"] if named else args[1]
        last = positions.new_ones(()) * largest
        positions = torch.cat((positions, last.expand(*positions.shape[:-1], 1)), dim=-1)
        if named:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def take(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.is_tensor(output):
            return output[..., :-1, :]
        return tuple(table[..., :-1, :] for table in output)

    hooks = (
        rotation.register_forward_pre_hook(in_this_thread(add), with_kwargs=True),
        rotation.register_forward_hook(in_this_thread(take)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
