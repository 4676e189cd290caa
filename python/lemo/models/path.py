"""What `lemo.enable` needs of a path: the way in which a model's training pass is replaced."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.replaced_forward import Implementation
from lemo.models.training import Training

__all__ = ["Path", "Steering", "returned"]

F = TypeVar("F", bound=Training[Any], covariant=True)


class Path(ABC, Generic[F]):
    """One way to train a model with token elimination.

    Attributes:
        causal_lm: the model, without what wraps it.
    """

    causal_lm: nn.Module

    @property
    @abstractmethod
    def forward(self) -> F:
        """What computes in place of the model's own forward."""

    @property
    @abstractmethod
    def modules(self) -> dict[nn.Module, Implementation]:
        """The modules whose forward is replaced, and by what; the causal LM is the first."""

    @abstractmethod
    def verify(self, batch: Mapping[str, Any], tokens: int) -> None:
        """See `lemo.Handle.verify`."""

    @abstractmethod
    def general_modules(self) -> dict[str, str]:
        """See `lemo.Handle.general_modules`."""

    def check_loss(self) -> None:
        """Raises ValueError where a training pass makes another loss than `Handle.loss` would."""
        return

    def unquantised_products(self) -> dict[str, str]:
        """See `lemo.Handle.unquantised_products`."""
        return {}

    def begin_step(self, step: int) -> None:
        """Tells that optimizer step `step`, from 0, begins."""
        self.forward.begin_step(step)

    def install(self) -> None:
        """Called before the forwards are replaced."""
        return

    def uninstall(self) -> None:
        """Called after the forwards are the model's own again."""
        return


class Steering(Protocol):
    """What replaced forwards ask of the handle."""

    @property
    def path(self) -> Path[Training[Any]]: ...

    @property
    def weights(self) -> list[Tensor] | None: ...

    @property
    def scales(self) -> bool: ...

    def acts_on(self, module: nn.Module, arguments: ForwardArguments) -> bool: ...

    def naming(self, rows: Tensor | None) -> AbstractContextManager[None]: ...


def returned(output: ModelOutput, arguments: ForwardArguments, module: Any) -> Any:
    """The output as a call asked for it: as an object or as a tuple."""
    return_dict = arguments.return_dict
    if return_dict is None:
        return_dict = module.config.return_dict
    return output if return_dict else output.to_tuple()
