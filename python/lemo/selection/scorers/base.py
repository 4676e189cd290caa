"""What a scorer is, and what it may ask of the model and of the batch."""

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from lemo.packing.blocks import BlockLayout

__all__ = ["BlockedBatch", "ScoredModel", "Scorer"]


class BlockedBatch(Protocol):
    """The batch that is scored: T packed rows, cut into B blocks."""

    @property
    def layout(self) -> BlockLayout:
        """How the rows are cut."""

    @property
    def ids(self) -> Tensor | None:
        """[T] int64, the tokens; None where the model got embeddings."""

    @property
    def labelled(self) -> Tensor | None:
        """[T] bool, rows that predict a label; None: nothing is known of labels."""

    @property
    def scores(self) -> Tensor | None:
        """[T] fp32, scores of the tokens that the caller gave; None: none."""

    def on_host(self) -> tuple[Tensor, Tensor]:
        """`ids` and `labelled` on the CPU, where both are known."""


class ScoredModel(Protocol):
    """The parts of a model that scores are computed from; `lemo.models` has one for each model.

    `layer` is the index of a layer; `x` [R, H] are rows behind the norm of its sub-block.
    """

    @property
    def config(self) -> Any:
        """The model's Transformers configuration."""

    @property
    def embedding(self) -> Tensor | None:
        """The weight of its token embedding, [V, H]; None where it has none of that name."""

    def normalized(self, layer: int, kind: str, residual: Tensor, /) -> Tensor:
        """[T, H], what the norm of sub-block `kind` makes of the residual."""

    def queries(self, layer: int, x: Tensor, /) -> Tensor:
        """[R, Hq, D], before rotation."""

    def keys(self, layer: int, x: Tensor, /) -> Tensor:
        """[R, Hk, D], before rotation; Hq is a multiple of Hk."""

    def rotated(self, layer: int, x: Tensor, batch: Any, /) -> tuple[Tensor, Tensor]:
        """Queries and keys of all rows of `batch`, as attention multiplies them."""

    def scale(self, layer: int, /) -> float:
        """What products of queries and keys are multiplied with."""

    def activation(self, layer: int, x: Tensor, /) -> Tensor:
        """What the MLP's last projection sees, [R, F]: `act(gate) * up`, or `act(fc1)`."""

    def without_dropout(self, layer: int, /) -> AbstractContextManager[None]:
        """Dropout of the layer is off inside."""


class Scorer(Protocol):
    """Gives every block of a batch a score for a sub-block.

    Attributes:
        block_size: tokens of the blocks that it can score; None: any number.
        thresholds: {"attention": [one for each layer], "mlp": [...]} on the scale of its scores;
            None: it knows none.
        reads_residual: whether scores follow from the residual; else it gets an empty tensor.
    """

    block_size: int | None = None
    thresholds: dict[str, list[float]] | None = None
    reads_residual: bool = True

    @abstractmethod
    def __call__(self, layer: int, kind: str, residual: Tensor, batch: BlockedBatch) -> Tensor:
        """Scores [B] fp32 of the blocks of `batch.layout`; higher is more informative.

        The caller has switched gradients off.

        Args:
            layer: index of the layer.
            kind: "attention" or "mlp".
            residual: [T, H], all rows at the entry of that sub-block; not to be changed.
            batch: the batch of the T rows.
        """

    def begin_step(self, step: int) -> None:
        """Tells that optimizer step `step`, from 0, begins. Only random scores depend on it."""
        return

    def begin_replica(self, replica: int) -> None:
        """Tells which of several groups of processes this one is of, from 0.

        Only random scores depend on it: processes of one group draw the same.
        """
        return

    def begin_pass(self, index: int) -> None:
        """Tells that forward pass `index` of the step, of all processes' passes, begins.

        Only random scores depend on it, and on the process from then on no more.
        """
        return
