"""Whether a model uses kept rows as it should: every layer attends once, at the rows' positions."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lemo.models.calls.per_thread import in_this_thread
from lemo.models.generic.attention import KeptRows

__all__ = ["LayoutCheck", "not_attending"]


class LayoutCheck:
    """Looks at one pass of a decoder on kept rows.

    Args:
        decoder: the layers.
        rows: the rows of the pass.
        positions: [..., R] int, the positions that the decoder gets.
    """

    def __init__(self, decoder: PreTrainedModel, rows: KeptRows, positions: Tensor) -> None:
        self._decoder, self._rows = decoder, rows
        self._positions = positions.flatten(0, -2)
        self._used = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the decoder runs once.

        Raises:
            ValueError: a layer does not attend, or a module gets other positions; the message
                names the model.
        """
        layers = [*getattr(self._decoder, "layers", ())]
        inner = {id(m) for layer in layers for m in layer.modules()}
        outer = [
            m for m in self._decoder.modules() if id(m) not in inner and m is not self._decoder
        ]
        with ExitStack() as stack:
            for module in (*outer, *layers):
                look = in_this_thread(self._look)
                stack.enter_context(module.register_forward_pre_hook(look, with_kwargs=True))
            for index, layer in enumerate(layers):
                count = in_this_thread(self._count(index))
                stack.enter_context(layer.register_forward_hook(count))
            yield
        if not self._used:
            raise ValueError(
                f"model: {self._rows.model} was given the positions of the kept rows, but no part "
                "of it reads them, so their order alone would count; train without lemo"
            )

    def _count(self, index: int) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            if self._rows.counts and self._rows.calls != index + 1:
                raise not_attending(self._rows, index + 1, f"up to layer {index}")

        return count

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = (*zip(inspect.signature(module.forward).parameters, args), *kwargs.items())
        for name, value in named:
            if name == "cache_position":
                continue  # where a key-value cache would put the rows
            if not (torch.is_tensor(value) and value.ndim and value.shape[-1] == self._rows.count):
                continue
            if value.is_floating_point() or value.dtype == torch.bool:
                continue
            given = value.reshape(-1, value.shape[-1])
            if any(torch.equal(given[0], own.to(given)) for own in self._positions):
                self._used = True
            elif self._counts_rows(given[0]):
                raise ValueError(
                    f"model: {type(module).__name__} of {self._rows.model} counts the kept rows "
                    "instead of reading their positions; train without lemo"
                )

    def _counts_rows(self, given: Tensor) -> bool:
        """Whether a module got 0, 1, 2, ... where the kept rows have gaps."""
        return given.numel() > 1 and bool((given.diff() == 1).all())


def not_attending(rows: KeptRows, expected: int, where: str) -> ValueError:
    """What to raise where attention was not called as often as there are layers."""
    return ValueError(
        f"model: expected every layer of {rows.model} to attend once through Transformers' "
        f"attention interface, {expected} calls {where}, got {rows.calls}: some layers mix rows in "
        "another way or are left out; train without lemo"
    )
