"""What a training forward returns: the loss, and logits that exist only when they are read."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["DeferredLogits", "EliminatedOutput"]


class DeferredLogits:
    """Logits [B, S, V] that are computed when `read` is called.

    Args:
        compute: gives the logits, with a graph where gradients are enabled.
        device: where; autocast is there what it is now.
        difference: what is another in the model than in the forward pass, in words; None: nothing.
    """

    def __init__(
        self,
        compute: Callable[[], Tensor],
        difference: Callable[[], str | None],
        device: torch.device,
    ) -> None:
        self._compute = compute
        self._difference = difference
        self._read: dict[bool, Tensor] = {}
        self._device = device.type
        self._autocast = torch.is_autocast_enabled(self._device)
        self._dtype = torch.get_autocast_dtype(self._device)

    def read(self) -> Tensor:
        """The logits; computed at most once with a graph and once without.

        Raises:
            RuntimeError: an optimizer step, a switch of adapters or the like came in between. Steps
                that write through `weight.data` are not seen, and give logits of the new weights.
        """
        with_graph = torch.is_grad_enabled()
        logits = self._read.get(True, self._read.get(with_graph))
        if logits is not None:
            return logits if with_graph else logits.detach()
        difference = self._difference()
        if difference is not None:
            raise RuntimeError(
                "logits: expected to be read while the model is as in the forward pass, since they "
                f"are computed then, got {difference}; read outputs.logits before optimizer.step() "
                "and before adapters are switched or disabled"
            )
        with torch.autocast(self._device, dtype=self._dtype, enabled=self._autocast):
            logits = self._compute()
        # Mixed precision hands out fp32.
        self._read[with_graph] = logits.float() if self._autocast else logits
        return self._read[with_graph]


class EliminatedOutput(CausalLMOutputWithPast):
    """The output of a causal LM whose `logits` may be `DeferredLogits`, computed when read.

    An index, a name and the attribute read them. Whoever goes through `items()`, `values()` or the
    fields of the dataclass, as FSDP does, does not: their field is `deferred`.
    """

    def __init__(self, *args: Any, deferred: DeferredLogits | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if deferred is not None:
            self["logits"] = deferred

    @property
    def deferred(self) -> DeferredLogits | None:
        """The logits that may still have to be computed."""
        logits = self.__dict__.get("logits")
        return logits if isinstance(logits, DeferredLogits) else None

    @property
    def logits(self) -> Tensor | None:
        return _read(self.__dict__.get("logits"))

    @logits.setter
    def logits(self, value: Tensor | DeferredLogits | None) -> None:
        self.__dict__["logits"] = value

    def __setitem__(self, key: str, value: Any) -> None:
        # An output that is made of another one's fields.
        super().__setitem__("logits" if key == "deferred" else key, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return _read(super().__getitem__(key))
        names = list(self.keys())[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def get(self, key: str, default: Any = None) -> Any:
        return _read(super().get(key, default))


def _fields() -> dict[str, Any]:
    @dataclass
    class Fields:
        deferred: DeferredLogits | None = None

    own = {field.name: field for field in fields(CausalLMOutputWithPast) if field.name != "logits"}
    return own | {field.name: field for field in fields(Fields)}


# Somebody who copies an output field by field must not compute the logits.
setattr(EliminatedOutput, "__dataclass_fields__", _fields())  # noqa: B010


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, DeferredLogits) else value
