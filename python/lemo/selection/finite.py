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
        # Of the first pass over some places in which something was wrong: all of the next may be,
        # behind its step.
        self._first: dict[tuple[tuple[int, str], ...], Tensor] = {}

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
        wrong, places = torch.stack(self._wrong), tuple(self._places)
        before = self._first.get(places, wrong)
        self._first[places] = torch.where(before.any(), before, wrong)
        return value * torch.where(wrong.any(), torch.nan, 1.0).to(value)

    def reason(self) -> str | None:
        """Where scores were nan first, in words; None: nowhere. Waits for a GPU."""
        for places, found in self._first.items():
            for place, wrong in zip(places, found.tolist()):
                if wrong:
                    return _text(*place)
        return None


def _is_waited_for(tensor: Tensor) -> bool:
    """Whether it may be read at once, since its device does not work behind."""
    return tensor.device.type == "cpu"


def _text(layer: int, kind: str) -> str:
    return (
        f"layer {layer}: the scores of blocks for its {kind} are nan, so expected numbers in what "
        "enters it, got nan or infinity"
    )
