"""Which rows of a batch predict a label, as far as lemo is told.

A forward pass with `labels` tells. Where the loss is computed outside the model, they may still be
known: the module that a trainer calls gets them, or the user names them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from lemo.models.calls.per_thread import PerThread

__all__ = ["IGNORE_INDEX", "Watcher", "named", "of_call", "of_labels", "of_tokens"]

# The label that ForCausalLMLoss does not count where no other one is named.
IGNORE_INDEX = -100


class Named(Protocol):
    """What can be told of labels: a `lemo.models.training.Training`."""

    row_labels: Tensor | None


@contextmanager
def named(target: Named, rows: Tensor | None) -> Iterator[None]:
    """Names rows for the forward passes inside; None leaves what is known already."""
    before = target.row_labels
    target.row_labels = before if rows is None else rows
    try:
        yield
    finally:
        target.row_labels = before


def of_tokens(mask: Tensor) -> Tensor:
    """[..., S] bool: rows that predict the tokens of a mask [..., S] bool."""
    return pad(mask, (0, 1))[..., 1:]


def of_labels(
    labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int
) -> Tensor | None:
    """[B, S] bool: rows that predict a label; None: no labels are given.

    Args:
        labels: [B, S], not shifted.
        shift_labels: [B, S], shifted already; `labels` are not read then.
        ignore_index: the label that does not count.
    """
    if shift_labels is not None:
        return shift_labels != ignore_index
    return None if labels is None else of_tokens(labels != ignore_index)


def of_call(arguments: Mapping[str, Any]) -> Tensor | None:
    """The same by the arguments of a call; None, too, where labels are none of its tokens.

    A module around a causal LM may have one for each sequence, or a text.
    """
    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    if not _are_of_tokens(labels if shifted is None else shifted, arguments):
        return None
    return of_labels(labels, shifted, arguments.get("ignore_index", IGNORE_INDEX))


def _are_of_tokens(labels: Any, arguments: Mapping[str, Any]) -> bool:
    if not torch.is_tensor(labels) or labels.ndim != 2 or labels.is_floating_point():
        return False
    tokens = [arguments.get(name) for name in ("input_ids", "inputs_embeds")]
    return all(x.shape[:2] == labels.shape for x in tokens if torch.is_tensor(x))


class Watcher:
    """Names the labels of every call of the modules that it watches, whatever their forward.

    Calls nest, and several hooks of one may be on the same module: what was known before comes
    back when the last of them ends. A class, because hooks are copied and pickled with a module.

    Attributes:
        evaluates: whether a module that it watches runs in eval mode, in this thread.
    """

    evaluates = PerThread(False)
    _before = PerThread[tuple[tuple[Tensor | None, bool], ...]](())
    _outside = PerThread[tuple[Tensor | None, bool]]((None, False))

    def __init__(self, target: Named) -> None:
        self._target = target

    def watch(self, module: nn.Module) -> Callable[[], None]:
        """Begins with a module; returns what ends it."""
        hooks = (
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, always_call=True),
        )
        return partial(_remove, *hooks)

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before = (*self._before, (self._target.row_labels, self.evaluates))
        _check_not_replicated(module)  # behind the line above, since `_end` is called all the same
        self.evaluates = self.evaluates or not module.training
        rows = of_call({"input_ids": args[0], **kwargs} if args else kwargs)
        if rows is not None:
            self._target.row_labels = rows

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        *before, (self._target.row_labels, self.evaluates) = self._before
        self._before = tuple(before)

    def interrupted(self) -> None:
        """Ends all calls: those that Ctrl-C ends have no hooks run behind them."""
        if self._before:
            self._outside = self._before[0]
            self._before = ()
        # Once more for a call around the one that was interrupted, if labels were named between.
        self._target.row_labels, self.evaluates = self._outside


def _check_not_replicated(module: nn.Module) -> None:
    # The forwards that lemo has replaced are those of the original, on another device.
    if getattr(module, "_is_replica", False):
        raise NotImplementedError(
            "model: expected one process for each GPU, got torch.nn.DataParallel, which trainers "
            "use where one process sees several; start with torchrun or accelerate launch, or show "
            "the process one GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def _remove(*hooks: RemovableHandle) -> None:
    for hook in hooks:
        hook.remove()
