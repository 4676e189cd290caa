"""Whether a model uses kept rows as it should: every layer attends, at the rows' positions."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from lemo.models.calls.per_thread import in_this_thread
from lemo.models.generic.attention import KeptRows

__all__ = ["LayoutCheck", "not_attending", "states_of"]

# Arguments whose numbers may follow one another without counting rows.
_OF_TOKENS = ("input_ids", "token_type_ids")


class LayoutCheck:
    """Looks at one pass of a decoder on kept rows.

    Args:
        decoder: the layers.
        rows: the rows of the pass.
        given: what the decoder gets, `position_ids` [..., R] among it.
        call: the same for the whole batch.

    Attributes:
        runs: how often a layer has run; 0 where the decoder has no list of them.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        rows: KeptRows,
        given: Mapping[str, Any],
        call: Mapping[str, Any],
    ) -> None:
        self._decoder, self._rows = decoder, rows
        self._positions = given["position_ids"].flatten(0, -2)
        of_tokens = [each.get(name) for each in (given, call) for name in _OF_TOKENS]
        self._of_tokens = [line for x in of_tokens if x is not None for line in x.flatten(0, -2)]
        self._used = False
        self.runs = self._calls = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the decoder is called once.

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
            for module in dict.fromkeys((*outer, *layers)):
                look = in_this_thread(self._look)
                stack.enter_context(module.register_forward_pre_hook(look, with_kwargs=True))
            for layer in dict.fromkeys(layers):  # one may stand in several places
                count = in_this_thread(self._count)
                stack.enter_context(layer.register_forward_hook(count))
            yield
        if not self._used:
            raise ValueError(
                f"model: {self._rows.model} was given the positions of the kept rows, but no part "
                "of it reads them, so their order alone would count; train without lemo"
            )

    def check_one_run_each(self, layers: int) -> None:
        """Raises NotImplementedError where some of the layers have run more than once."""
        if self.runs > layers:
            raise NotImplementedError(
                f"host_memory: expected 0, since {self._rows.model} runs some layers more than "
                f"once, {self.runs} times in all, by which activations would go to the host"
            )

    @torch.compiler.disable
    def _count(self, module: nn.Module, args: Any, output: Any) -> None:
        self.runs += 1
        if self._rows.counts and self._rows.calls == self._calls:
            raise ValueError(
                f"model: expected every layer of {self._rows.model} to attend through "
                "Transformers' attention interface, got no call of it by layer "
                f"{self.runs - 1}, which mixes rows in another way or not at all; train without "
                "lemo"
            )
        self._calls = self._rows.calls

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = (*zip(inspect.signature(module.forward).parameters, args), *kwargs.items())
        for name, value in named:
            if name == "cache_position":
                continue  # where a key-value cache would put the rows
            if not (torch.is_tensor(value) and value.ndim and value.shape[-1] == self._rows.count):
                continue
            if value.is_floating_point() or value.dtype == torch.bool:
                continue
            given = value.reshape(-1, value.shape[-1])[0]
            if _is_among(given, self._positions):
                self._used = True
            elif self._counts_rows(given) and not _is_among(given, self._of_tokens):
                raise ValueError(
                    f"model: {type(module).__name__} of {self._rows.model} counts the kept rows "
                    "instead of reading their positions; train without lemo"
                )

    def _counts_rows(self, given: Tensor) -> bool:
        """Whether a module got 0, 1, 2, ... where the kept rows have gaps."""
        return given.numel() > 1 and bool((given.diff() == 1).all())


def _is_among(line: Tensor, others: Iterable[Tensor]) -> bool:
    return any(torch.equal(line, other.to(line)) for other in others)


def states_of(output: Any, model: str) -> Tensor:
    """[1, R, H], the hidden states of what a decoder returned.

    Raises:
        ValueError: it has none by their name. The message names the model.
    """
    if not isinstance(output, ModelOutput):
        raise ValueError(
            f"model: expected the decoder of {model} to return a ModelOutput with "
            f"last_hidden_state, got {type(output).__name__}; train without lemo"
        )
    states: Tensor = output.last_hidden_state
    return states


def not_attending(model: str, expected: int, got: int) -> ValueError:
    """What to raise where attention was not called as often as layers ran, or as before."""
    return ValueError(
        f"model: expected every layer of {model} to attend through Transformers' attention "
        f"interface, {expected} calls in all, got {got}: some layers mix rows in another way or "
        "are left out; train without lemo"
    )
