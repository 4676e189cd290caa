"""Whether the scores of blocks are numbers: those of a broken model would choose its whole rows."""

import torch
from torch import Tensor

__all__ = ["FiniteScores"]


class FiniteScores:
    """Looks at the scores of each pass.

    A block whose scores are nan would be left out on a GPU, and with it what is wrong. On the CPU
    an error says so at once. A GPU is not waited for: the loss of the pass is nan, and `reason`
    tells where it comes from.
    """

    def __init__(self) -> None:
        self._places: list[tuple[int, str]] = []
        self._wrong: list[Tensor] = []
        # Of the first pass in which something was wrong: all of the next may be, behind its step.
        self._first: tuple[list[tuple[int, str]], Tensor] | None = None

    def begin(self) -> None:
        """A pass begins."""
        self._places, self._wrong = [], []

    def checked(self, layer: int, kind: str, scores: Tensor, residual: Tensor) -> Tensor:
        """The scores; all of them nan where what they were made of is not finite.

        Args:
            layer: index of the layer.
            kind: "attention" or "mlp", the sub-block.
            scores: [B] fp32.
            residual: [T, H], what they were made of. Networks on the way (ReLU) may make 0 of nan.

        Raises:
            FloatingPointError: they are nan, on the CPU.
        """
        scores = scores + 0.0 * residual.sum(dtype=torch.float32).to(scores.device)
        wrong = scores.isnan().any()
        if not _is_waited_for(wrong):
            self._places.append((layer, kind))
            self._wrong.append(wrong)
        elif wrong:
            raise FloatingPointError(_text(layer, kind))
        return scores

    def marked(self, value: Tensor) -> Tensor:
        """A loss or its weight in the pass that ends; nan, and its gradients, where scores were."""
        if not self._wrong:
            return value
        wrong = torch.stack(self._wrong)
        if self._first is not None and self._first[0] == self._places:
            before = self._first[1]
            self._first = self._places, torch.where(before.any(), before, wrong)
        else:
            self._first = self._places, wrong
        return value * torch.where(wrong.any(), torch.nan, 1.0).to(value)

    def reason(self) -> str | None:
        """Where scores were nan first, in words; None: nowhere. Waits for a GPU."""
        if self._first is None:
            return None
        found = zip(self._first[0], self._first[1].tolist())
        return next((_text(*place) for place, wrong in found if wrong), None)


def _is_waited_for(tensor: Tensor) -> bool:
    """Whether it may be read at once, since its device does not work behind."""
    return tensor.device.type == "cpu"


def _text(layer: int, kind: str) -> str:
    return (
        f"layer {layer}: the scores of blocks for its {kind} are nan, so expected numbers in what "
        "enters it, got nan or infinity"
    )
