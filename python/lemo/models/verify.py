"""Keep = 1 against the model's own forward, on the beginning of a batch."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.labels import IGNORE_INDEX
from lemo.models.layers.architectures import Architecture
from lemo.models.training import Training
from lemo.models.training_forward import TrainingForward

__all__ = ["Difference", "beginning", "gradients", "own_forward", "verify", "verify_sharded"]

# Largest relative differences of a loss and of all gradients together. Rounding alone stays some
# seven times below or more (docs/LOG.md, "never silently wrong").
_TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float16: (1e-2, 0.1), torch.bfloat16: (2e-2, 0.2)}


def verify(
    architecture: Architecture,
    forward: TrainingForward,
    batch: Mapping[str, Any],
    tokens: int,
    makes_loss: bool = True,
) -> None:
    """See `lemo.Handle.verify`.

    Args:
        architecture: access to the model.
        forward: what computes in place of the model's own forward.
        batch, tokens: as of the handle.
        makes_loss: whether `forward` also makes the loss. Where it does not, the decoder's states
            are compared, by the loss that Transformers itself would make of them.

    Raises:
        ValueError: as of the handle.
    """
    model = architecture.causal_lm
    arguments = beginning(batch, tokens, next(model.parameters()).device)
    # What flows to the embedded tokens counts, too: it has passed every layer.
    embedded = model.get_input_embeddings()(arguments.pop("input_ids")).detach().requires_grad_()
    arguments["inputs_embeds"] = embedded
    trainable = {"the embedded tokens": embedded}
    trainable |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    with ExitStack() as stack:
        stack.enter_context(_quiet(model))
        stack.enter_context(torch.enable_grad())
        if makes_loss:
            expected = own_forward(model, arguments).loss
        else:
            expected = _loss_of_states(architecture, arguments)
        expected_gradients = gradients(expected, trainable)
        _check_finite(expected, expected_gradients)
        with forward.keeping_everything():
            got = forward.loss(ForwardArguments.of(arguments)).loss
            got_gradients = forward.whole(gradients(got, trainable))
        difference = Difference(model, (got, expected), (got_gradients, expected_gradients))
        if difference.is_rounding:
            return
        place = ""
        if forward.context is None:
            place = " " + _first_difference(model, forward, arguments, difference.tolerances[1])
    raise _wrong(difference, place)


def _loss_of_states(architecture: Architecture, arguments: dict[str, Any]) -> Tensor:
    """The mean cross entropy of the head's logits of what the decoder's own forward gives."""
    inputs = {name: value for name, value in arguments.items() if name != "labels"}
    states = own_forward(architecture.decoder, inputs).last_hidden_state
    logits, labels = architecture.lm_head(states)[:, :-1], arguments["labels"][:, 1:]
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX)


def verify_sharded(
    root: nn.Module, forward: Training[Any], batch: Mapping[str, Any], tokens: int
) -> None:
    """The same for weights that FSDP2 shards, by calls of the module that it was called on last.

    Args:
        root: that module; its gradients are None.
        forward: what computes in place of the model's own forward.
        batch, tokens: as of the handle; each process may have its own.

    Raises:
        ValueError: as of the handle.
    """
    arguments = beginning(batch, tokens, next(root.parameters()).device)
    trainable = {name: p for name, p in root.named_parameters() if p.requires_grad}
    found = []
    with ExitStack() as stack:
        stack.enter_context(_quiet(root))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(forward.keeping_everything())
        for call in (partial(root, **arguments), partial(own_forward, root, arguments)):
            loss = call().loss
            loss.backward()
            # Whole ones, so that every process finds the same.
            whole = {
                name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                for name, p in trainable.items()
                if p.grad is not None
            }
            for parameter in trainable.values():
                parameter.grad = None
            found.append((loss.detach(), whole))
    (got, got_gradients), (expected, expected_gradients) = found
    _check_finite(expected, expected_gradients)
    difference = Difference(root, (got, expected), (got_gradients, expected_gradients))
    if not difference.is_rounding:
        raise _wrong(difference)


def _check_finite(loss: Tensor, of_loss: Mapping[str, Tensor]) -> None:
    """ValueError where the model itself computes no numbers."""
    if not bool(loss.isfinite()):
        raise ValueError(
            f"model: its own loss, with every token kept, is {loss.item()}; expected weights and "
            "activations that are finite in the dtype"
        )
    wrong = [name for name, gradient in of_loss.items() if not bool(gradient.isfinite().all())]
    if wrong:
        raise ValueError(
            f"model: its own gradients, with every token kept, are not finite in {len(wrong)} of "
            f"{len(of_loss)} parameters, such as {wrong[0]}; expected numbers in the dtype"
        )


def _wrong(difference: "Difference", place: str = "") -> ValueError:
    return ValueError(
        f"model: lemo does not compute what the model computes, even with every token kept: "
        f"{difference}.{place} Something changed what the model's own code does; undo it, or "
        "train without lemo"
    )


class Difference:
    """How far a loss and its gradients are from what is expected.

    Args:
        model: whose dtypes decide what rounding may do.
        losses: got and expected.
        gradients: the same by name of the parameter.

    Attributes:
        tolerances: the largest relative differences of losses and gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: tuple[Tensor, Tensor],
        gradients: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    ) -> None:
        self.tolerances = _TOLERANCES[dtype_of(model)]
        self._losses = losses[0].item(), losses[1].item()
        self._gradients = gradients
        got, expected = self._losses
        self._of_losses = abs(got - expected) / max(abs(expected), 1e-6)
        self._of_gradients = relative(*gradients)

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains it."""
        differences = self._of_losses, self._of_gradients
        return all(d <= t for d, t in zip(differences, self.tolerances))

    def __str__(self) -> str:
        got, expected = self._gradients
        worst = max(expected, key=lambda name: relative({name: got[name]}, {name: expected[name]}))
        return (
            f"loss {self._losses[0]:.6g}, expected {self._losses[1]:.6g}; gradients differ by "
            f"{self._of_gradients:.2g} of their norm, most in {worst} (allowed: "
            f"{self.tolerances[0]:g} and {self.tolerances[1]:g})"
        )


def beginning(batch: Mapping[str, Any], tokens: int, device: torch.device) -> dict[str, Any]:
    """The first sequence's first tokens, without padding, with labels.

    Args:
        batch: input_ids [B, S], and attention_mask, position_ids and labels where there are any.
        tokens: of the sequence, at most.
        device: where they go.

    Returns:
        The arguments of a call: input_ids and labels [1, t], and position_ids where there is no
        mask.

    Raises:
        ValueError: no sequence of two tokens or more, or fewer are asked for.
    """
    ids = batch.get("input_ids")
    if not torch.is_tensor(ids) or ids.ndim != 2 or not len(ids) or ids.shape[1] < 2:
        got = list(ids.shape) if torch.is_tensor(ids) else type(ids).__name__
        raise ValueError(
            "batch: expected input_ids [batch, tokens] of a sequence of 2 tokens or more, got "
            f"{got}"
        )
    if tokens < 2:
        raise ValueError(f"tokens: expected at least 2, got {tokens}")
    columns = slice(0, tokens)
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        first = int(mask[0].argmax())
        columns = slice(first, min(first + tokens, first + int(mask[0].sum())))
    cut = {"input_ids": ids[:1, columns].to(device)}
    if positions is not None and mask is None:
        cut["position_ids"] = positions[:1, columns].to(device)
    labels = batch.get("labels")
    labels = cut["input_ids"] if labels is None else labels[:1, columns].to(device)
    # A prompt has no label; that the two agree can be seen with any.
    if not bool((labels[:, 1:] != IGNORE_INDEX).any()):
        labels = cut["input_ids"]
    return {**cut, "labels": labels, "use_cache": False}


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """No dropout, no checkpointing by Transformers; random generators are as before afterwards."""
    changed: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if _drops(module) and module.training:
            changed.append((module, "training", True))
            module.training = False
        if getattr(module, "gradient_checkpointing", False):
            changed.append((module, "gradient_checkpointing", True))
            module.gradient_checkpointing = False
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _drops(module: nn.Module) -> bool:
    # Layers of OPT drop by a function, at the share that they hold.
    return isinstance(module, nn.Dropout) or isinstance(getattr(module, "dropout", None), float)


def own_forward(model: nn.Module, arguments: dict[str, Any], **more: Any) -> Any:
    """The model's output by the forwards that lemo replaced."""
    installed = [m for m in model.modules() if hasattr(vars(m).get("forward"), "pausing")]
    with ExitStack() as stack:
        for module in installed:
            stack.enter_context(vars(module)["forward"].pausing())
        return model(**arguments, **more)


def gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of parameters by name; zeros for those that the loss does not depend on."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(parameters.items(), found)
    }


def relative(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """|got - expected| / |expected|, over all tensors together."""
    squares = [
        torch.stack(((g.double() - e.double()).square().sum(), e.double().square().sum()))
        for g, e in zip(got.values(), expected.values())
    ]
    difference, norm = torch.stack(squares).sum(0).sqrt().tolist()
    return difference / norm if norm else float(difference > 0)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The coarsest dtype that takes part: of autocast, or of the weights."""
    dtypes = {p.dtype for p in model.parameters()}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in dtypes:
            return dtype
    return torch.float32


def _first_difference(
    model: nn.Module, forward: TrainingForward, arguments: dict[str, Any], tolerance: float
) -> str:
    """The first layer in which the hidden states differ, as text."""
    inputs = {name: value for name, value in arguments.items() if name != "labels"}
    inputs["output_hidden_states"] = True
    with torch.no_grad():
        own = own_forward(model, inputs).hidden_states
        with forward.keeping_everything():
            mine = forward.states(ForwardArguments.of(inputs)).hidden_states
    for layer, (got, expected) in enumerate(zip(mine, own)):
        # What is not finite is not below anything.
        if not relative({"": got}, {"": expected}) <= tolerance / 10:
            where = "the embedding" if layer == 0 else f"layer {layer - 1}"
            return f"Hidden states differ first behind {where}."
    return "Hidden states agree; the loss or the gradients differ."
