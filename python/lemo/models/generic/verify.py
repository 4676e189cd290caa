"""The generic path against the model's own forward, with all rows and with some left out."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lemo import ops
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.eval_mode import evaluating
from lemo.models.calls.labels import IGNORE_INDEX
from lemo.models.generic.forward import GenericForward
from lemo.models.generic.parts import Parts
from lemo.models.verify import Difference, beginning, gradients, own_forward
from lemo.packing.blocks import BlockLayout, Selection

__all__ = ["verify"]

# Of eight blocks; what is left out in between, and where the sequence begins.
_KEPT = (0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0)


def verify(parts: Parts, forward: GenericForward, batch: Mapping[str, Any], tokens: int) -> None:
    """See `lemo.Handle.verify`.

    A model's own forward knows kept rows, too: tokens that its attention mask leaves out in the
    middle are seen by no other, and the others keep their positions. What else a batch holds, such
    as images or kinds of tokens, belongs to tokens in a way that the model knows: such a batch is
    compared as a whole first.

    Args:
        parts: the model.
        forward: what computes in place of the model's own forward.
        batch, tokens: as of the handle.
    """
    kinds = parts.takes_images and batch.get("token_type_ids") is not None
    if not ForwardArguments.of(batch).unknown and not kinds:
        _verify_text(parts, forward, batch, tokens)
        return
    _verify_as_called(parts, forward, batch)
    try:
        _verify_text(parts, forward, batch, tokens)
    except NotImplementedError as error:
        forward.say(f"verified with every token kept only, since text alone has no rule: {error}")


def _verify_text(
    parts: Parts, forward: GenericForward, batch: Mapping[str, Any], tokens: int
) -> None:
    model = parts.causal_lm
    arguments = beginning(batch, tokens, next(model.parameters()).device)
    embedded = model.get_input_embeddings()(arguments.pop("input_ids")).detach().requires_grad_()
    trainable = {"the embedded tokens": embedded}
    trainable |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    with ExitStack() as stack:
        # Its own code may make noise of any kind, not dropout alone.
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        arguments["inputs_embeds"] = embedded
        columns = torch.arange(embedded.shape[1], device=embedded.device)[None]
        if parts.takes_images:
            # Models with images would make positions of those of an earlier batch.
            arguments.setdefault("position_ids", columns)
        with forward.dense():
            expected = own_forward(model, arguments).loss
        arguments.setdefault("position_ids", columns)
        with forward.keeping(Selection.everything, 1):
            got = forward.loss(ForwardArguments.of(arguments)).loss
        _compare(parts, forward, got, expected, trainable, "even with every token kept")
        first = _first_sequence(arguments)
        if first < len(_KEPT):
            return
        for name in ("inputs_embeds", "labels"):
            arguments[name] = arguments[name][:, :first]
        size = -(-first // len(_KEPT))
        scores = torch.tensor(_KEPT, device=embedded.device)
        kept = scores.bool().repeat_interleave(size)[None, :first]
        arguments["position_ids"] = arguments["position_ids"][..., :first]
        labels = arguments["labels"]
        of_kept = labels.clone()
        of_kept[:, 1:] = labels[:, 1:].where(kept[:, :-1], IGNORE_INDEX)
        if not bool((of_kept[:, 1:] != IGNORE_INDEX).any()):
            return
        own = {**arguments, "labels": of_kept, "attention_mask": kept.long()}
        # Other implementations drop masked tokens first, and count windows without them.
        with forward.dense(), forward.names.eager():
            expected = own_forward(model, own).loss

        def choose(layout: BlockLayout) -> Selection:
            return ops.token_select(scores[: layout.num_blocks], layout, "threshold", 0.5, 0, 0)

        with forward.keeping(choose, size):
            got = forward.loss(ForwardArguments.of(arguments)).loss
        _compare(parts, forward, got, expected, trainable, "with half of the tokens kept")


def _verify_as_called(parts: Parts, forward: GenericForward, batch: Mapping[str, Any]) -> None:
    model = parts.causal_lm
    device = next(model.parameters()).device
    arguments = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
    arguments = {"labels": arguments.get("input_ids"), **arguments, "use_cache": False}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        with forward.dense():
            expected = own_forward(model, arguments).loss
        with forward.keeping(Selection.everything, 1):
            got = forward.loss(ForwardArguments.of(arguments)).loss
        _compare(parts, forward, got, expected, trainable, "even with every token kept")


def _compare(
    parts: Parts,
    forward: GenericForward,
    got: Tensor,
    expected: Tensor,
    trainable: Mapping[str, Tensor],
    when: str,
) -> None:
    found = forward.whole(gradients(got, trainable)), gradients(expected, trainable)
    difference = Difference(parts.causal_lm, (got, expected), found)
    if not difference.is_rounding:
        raise ValueError(
            f"model: lemo does not compute what {parts.name} computes, {when}: {difference}. "
            "Train without lemo"
        )


def _first_sequence(arguments: Mapping[str, Any]) -> int:
    """Tokens of the first of the sequences that positions may tell apart."""
    tokens: int = arguments["labels"].shape[1]
    restarts = (arguments["position_ids"].flatten(0, -2)[0].diff() != 1).nonzero()
    return int(restarts[0]) + 1 if len(restarts) else tokens
